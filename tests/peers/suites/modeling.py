"""transformers' common tests of models and configs, for PerceptionDLM. Run by tests/peers/test_peer_suites.py.

Every row shows one tile and asks about one region of it:

    3 text, 4 image tokens, 2 text, 4 RoI tokens, a newline, 3 text | marker, 5 slots (and a terminator)
"""

import copy
import functools
import unittest
from unittest import mock

import torch
from transformers import set_seed
from transformers.testing_utils import torch_device

from perceptiondlm.configuration_perceptiondlm import PerceptionDLMConfig
from perceptiondlm.modeling_perceptiondlm import PerceptionDLMForConditionalGeneration
from perceptiondlm.sequence_perceptiondlm import ROI, SEPARATOR, SHARED

from ...test_configuration_common import ConfigTester
from ...test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor


IMAGE, MASK, NEWLINE, END_OF_TURN, END_OF_TEXT = range(1, 6)
ROI_IDS, CAPTION_IDS = tuple(range(6, 12)), tuple(range(12, 18))
FIRST_WORD, LAST_WORD, VOCABULARY = 20, 79, 99  # the suite cuts off up to 15 ids
TILE, PATCH, TOKENS, ROI_TOKENS, SLOTS = 16, 4, 4, 4, 5


def words(rows: int, length: int) -> torch.Tensor:
    """Ids of plain text (rows, length)."""
    return ids_tensor([rows, length], LAST_WORD + 1 - FIRST_WORD) + FIRST_WORD


class PerceptionDLMModelTester:
    """Config and inputs of a tiny model. Seven rows, as many as the comparison of attention kernels asks for."""

    batch_size = 7
    is_training = True
    num_hidden_layers = 2
    num_attention_heads = 4
    hidden_size = 32
    vocab_size = VOCABULARY

    def __init__(self, layout: str, conditioning: str):
        self.layout, self.conditioning = layout, conditioning
        self.seq_length = 3 + TOKENS + 2 + ROI_TOKENS + 1 + 3 + 1 + SLOTS + (layout != "isolated")
        self.encoder_seq_length = self.key_length = self.seq_length
        sizes = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
        self.vision_config = {**sizes, "image_size": TILE, "patch_size": PATCH, "vision_use_head": False}
        self.text_config = {
            **sizes,
            "vocab_size": VOCABULARY,
            "num_key_value_heads": 4,
            "max_position_embeddings": 512,
            "bos_token_id": END_OF_TEXT,
            "eos_token_id": END_OF_TEXT,
            "pad_token_id": END_OF_TEXT,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        }

    def get_config(self) -> PerceptionDLMConfig:
        return PerceptionDLMConfig(
            vision_config=self.vision_config,
            text_config=self.text_config,
            vision_feature_layer=-1,
            roi_size=2,
            attention_layout=self.layout,
            region_conditioning=self.conditioning,
            num_region_prompts=3,
            image_token_id=IMAGE,
            mask_token_id=MASK,
            newline_token_id=NEWLINE,
            end_of_turn_token_id=END_OF_TURN,
            end_of_text_token_id=END_OF_TEXT,
            roi_token_ids=ROI_IDS,
            caption_token_ids=CAPTION_IDS,
        )

    def prepare_config_and_inputs_for_common(self):
        rows = self.batch_size
        spans = [
            words(rows, 3),
            torch.full((rows, TOKENS), IMAGE),
            words(rows, 2),
            torch.full((rows, ROI_TOKENS), ROI_IDS[0]),
            torch.full((rows, 1), NEWLINE),
            words(rows, 3),
        ]
        isolated = self.layout == "isolated"  # elsewhere the last span's newline is shared
        roles = [SHARED] * (5 + TOKENS) + [ROI] * ROI_TOKENS + [SEPARATOR if isolated else SHARED] + [SHARED] * 3
        ids, role = torch.cat(spans, dim=1), torch.tensor(roles).expand(rows, -1)
        x, y = torch.randint(0, 20, (2, rows))
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "token_roles": role,
            "region_ids": torch.where(role == SHARED, -1, 0),
            "num_regions": torch.ones(rows, dtype=torch.long),
            "pixel_values": floats_tensor([rows, 3, TILE, TILE]),
            "tile_grids": torch.ones(rows, 2, dtype=torch.long),
            "image_sizes": torch.full((rows, 2), 40),
            "region_boxes": torch.stack((x, y, x + 17, y + 9), dim=1),
            "answer_ids": torch.cat((words(rows, 2), torch.full((rows, SLOTS - 2), MASK)), dim=1),
        }
        side = TILE // PATCH
        if self.conditioning == "replay":
            inputs["region_coverage"] = torch.rand(rows, 4, 4)
        else:
            inputs["prompt_coverage"] = torch.rand(rows, 3, side, side)
            inputs["prompt_ids"] = torch.zeros(rows, dtype=torch.long)
        return self.get_config(), {name: value.to(torch_device) for name, value in inputs.items()}


class ModelSuite(ModelTesterMixin):
    """The common tests; `layout` and `conditioning` are the subclass's."""

    layout: str
    conditioning: str
    all_model_classes = (PerceptionDLMForConditionalGeneration,)
    _is_composite = True
    test_can_init_all_missing_weights_before_2023 = True
    additional_model_inputs = (
        "token_roles", "region_ids", "num_regions", "pixel_values", "tile_grids", "image_sizes", "region_boxes",
        "region_coverage", "prompt_coverage", "prompt_ids", "answer_ids",
    )  # fmt: skip

    def setUp(self):
        set_seed(0)
        self.model_tester = PerceptionDLMModelTester(self.layout, self.conditioning)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        """Labels stand for the canvas of scored slots; their noise is fixed, so that two passes compare."""
        inputs = copy.deepcopy(inputs_dict)
        if return_labels:
            inputs.pop("answer_ids", None)
            generator = torch.Generator().manual_seed(0)
            rows = self.model_tester.batch_size
            inputs["labels"] = torch.randint(FIRST_WORD, LAST_WORD + 1, (rows, SLOTS), generator=generator)
            inputs["mask_probability"] = torch.full((rows, 1), 0.7)
            inputs["answer_noise"] = torch.rand(rows, SLOTS, generator=generator)
        return inputs

    def test_config(self):
        ConfigTester(self, config_class=PerceptionDLMConfig, has_text_modality=False).run_common_tests()

    def test_weights_reload_with_nothing_but_fresh_ones(self):
        """As `test_model_weights_reload_no_missing_tied_weights`, for a caller who accepts fresh weights."""
        lenient = functools.partial(PerceptionDLMForConditionalGeneration.from_pretrained, ignore_mismatched_sizes=True)
        with mock.patch.object(PerceptionDLMForConditionalGeneration, "from_pretrained", lenient):
            self.test_model_weights_reload_no_missing_tied_weights()


class IsolatedReplayTest(ModelSuite, unittest.TestCase):
    layout, conditioning = "isolated", "replay"


class ReleasedVisionTest(ModelSuite, unittest.TestCase):
    layout, conditioning = "released", "vision"
