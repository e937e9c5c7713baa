"""DLC-Bench as a metric: `evaluate.load("evaluation/dlc")`."""

import evaluate

from perceptiondlm.evaluation.metric import CaptionQuestions


class DLC(CaptionQuestions, evaluate.Metric):
    """Captions of single regions, judged by questions; the judge reads the caption alone."""

    protocol = "dlc"
