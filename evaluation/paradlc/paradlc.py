"""ParaDLC-Bench as a metric: `evaluate.load("evaluation/paradlc")`."""

import evaluate

from perceptiondlm.evaluation.metric import CaptionQuestions


class ParaDLC(CaptionQuestions, evaluate.Metric):
    """Captions of several regions of an image, judged by questions; the judge may see image and mask."""

    protocol = "paradlc"
