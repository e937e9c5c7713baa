"""transformers' common tests of processors, for PerceptionDLM. Run by tests/peers/test_peer_suites.py."""

import os
import unittest

from transformers import AutoImageProcessor, AutoTokenizer

from perceptiondlm.configuration_perceptiondlm import PerceptionDLMConfig
from perceptiondlm.image_processing_perceptiondlm import PerceptionDLMImageProcessor
from perceptiondlm.processing_perceptiondlm import PerceptionDLMProcessor

from ...test_processing_common import ProcessorTesterMixin


AutoImageProcessor.register(PerceptionDLMConfig, image_processor_classes={"pil": PerceptionDLMImageProcessor})


class ProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = PerceptionDLMProcessor
    image_token = "<IMG_CONTEXT>"

    @classmethod
    def _setup_tokenizer(cls):
        return AutoTokenizer.from_pretrained(os.environ["PERCEPTIONDLM_ROOT"], trust_remote_code=True)

    @classmethod
    def _setup_image_processor(cls):
        return PerceptionDLMImageProcessor.from_pretrained(os.environ["PERCEPTIONDLM_ROOT"])

    @staticmethod
    def prepare_processor_dict():
        return {"config": PerceptionDLMConfig.from_pretrained(os.environ["PERCEPTIONDLM_ROOT"])}
