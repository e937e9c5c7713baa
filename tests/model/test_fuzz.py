"""A short run of tests/fuzz_inputs.py."""

import logging
import warnings

from fuzz_inputs import Doors, try_one

from perceptiondlm.pipeline_perceptiondlm import RegionCaptioningPipeline


def test_mutated_inputs_come_out_or_are_refused_by_name(model, processor, tmp_path, caplog):
    caplog.set_level(logging.ERROR)
    doors = Doors(RegionCaptioningPipeline(model=model, processor=processor), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcomes = [try_one(doors, 1, number) for number in range(400)]
    assert {"regions", "image", "processor", "pipeline", "file", "record", "refused"} == set(outcomes)
    assert 40 < outcomes.count("refused") < 360
