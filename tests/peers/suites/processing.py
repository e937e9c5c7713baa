"""transformers' common tests of processors, for PerceptionDLM. Run by tests/peers/test_peer_suites.py."""

import os
import unittest

from transformers import AutoTokenizer

from perceptiondlm.processing_perceptiondlm import PerceptionDLMProcessor

from ...test_processing_common import ProcessorTesterMixin


class ProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = PerceptionDLMProcessor
    image_token = ""

    @classmethod
    def _setup_tokenizer(cls):
        return AutoTokenizer.from_pretrained(os.environ["PERCEPTIONDLM_ROOT"])

    @staticmethod
    def prepare_processor_dict():
        return {"tile_size": 256, "max_tiles": 2}
