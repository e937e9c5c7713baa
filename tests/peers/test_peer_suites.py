"""transformers' own common tests of models, configs and processors, run on this project's classes.

They come with the source distribution of transformers, not with its wheel. Name one of the installed version, packed or
unpacked, in TRANSFORMERS_SDIST, or let pip fetch it (`make peers`):

    TRANSFORMERS_SDIST=download pytest tests/peers
"""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import transformers
from peer_tree import download, plant, run, unpack, version_of


MODEL_SUITES = ("IsolatedReplayTest", "ReleasedVisionTest")

# Tests that fail, and why they may. A test that passes has no place here.
MODEL_FAILURES = {
    "test_generation_tester_mixin_inheritance": (
        "asks for a mixin that tests autoregressive decoding; `generate` denoises masked slots"
    ),
    "test_model_base_model_prefix": (
        "asks for a headless model under the same config; tower, projector and language model stand beside the head"
    ),
    "test_model_outputs_equivalence": (
        "subtracts every pair of outputs to word its message, which torch refuses for the boolean `masked`; "
        "tests/model/test_outputs.py compares tuple and dict"
    ),
    "test_model_weights_reload_no_missing_tied_weights": (
        "loads a checkpoint without one weight of the model, which is refused unless ignore_mismatched_sizes=True; "
        "test_weights_reload_with_nothing_but_fresh_ones runs it so"
    ),
    "test_multimodal_outputs_are_returned": (
        "asks for `image_outputs` per row; tiles are encoded once for all rows that show them, see `encode_image`"
    ),
}
NEVER_TRUNCATED = "a prompt is never truncated: a `max_length` below its image tokens is refused"
PROCESSOR_FAILURES = {
    "test_apply_chat_template_assistant_mask": "asks for padding on the left; an answer follows its row's last token",
    "test_apply_chat_template_image_0": "passes keywords of videos",
    "test_apply_chat_template_image_1": "passes keywords of videos",
    "test_kwargs_overrides_default_subprocessor_kwargs_0_images": NEVER_TRUNCATED,
    "test_model_input_names": "the names of all keys are listed, whichever of them a call returns",
    "test_processor_text_has_no_visual": "fetches a picture from the Hub",
    "test_processor_to_json_string": "switches are saved in config.json, not among the settings",
    "test_structured_kwargs_nested_from_dict_0_images": NEVER_TRUNCATED,
    "test_subprocessor_defaults_0_text": "text is a question: it is put into the chat template, not tokenized bare",
    "test_subprocessor_defaults_preserved_by_kwargs_0_images": NEVER_TRUNCATED,
    "test_unstructured_kwargs_0_images": NEVER_TRUNCATED,
    "test_unstructured_kwargs_batched_0_images": NEVER_TRUNCATED,
}
EXPECTED_FAILURES = {
    **{f"{suite}.{test}": reason for suite in MODEL_SUITES for test, reason in MODEL_FAILURES.items()},
    **{f"ProcessorTest.{test}": reason for test, reason in PROCESSOR_FAILURES.items()},
}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The unpacked source distribution of the installed transformers."""
    named = os.environ.get("TRANSFORMERS_SDIST")
    if not named:
        pytest.skip("TRANSFORMERS_SDIST names no source distribution of transformers; `make peers` fetches it")
    if find_spec("parameterized") is None:
        pytest.skip("transformers' common tests need the package parameterized: pip install parameterized")
    path = Path(named)
    if named == "download":
        path = download(transformers.__version__, tmp_path_factory.mktemp("download"))
    if path.is_file():
        path = unpack(path, tmp_path_factory.mktemp("sdist"))
    if version_of(path) != transformers.__version__:
        pytest.skip(f"{named} is transformers {version_of(path)}, {transformers.__version__} is installed")
    return path


@pytest.fixture(scope="module")
def outcomes(sdist, tmp_path_factory) -> dict[str, tuple[str, str]]:
    """`Class.test` to its outcome and message."""
    tree = tmp_path_factory.mktemp("tree")
    return run(tree, plant(sdist, tree))


def test_the_suites_fail_where_they_are_known_to_and_nowhere_else(outcomes):
    failed = {name: message for name, (outcome, message) in outcomes.items() if outcome == "failed"}
    unexpected = {name: message for name, message in failed.items() if name not in EXPECTED_FAILURES}
    assert not unexpected
    passed_or_gone = [name for name in EXPECTED_FAILURES if name not in failed]
    assert not passed_or_gone, "delete these from EXPECTED_FAILURES"


@pytest.mark.parametrize("suite", MODEL_SUITES)
def test_the_suites_ran(outcomes, suite):
    """Not everything was skipped: what a user of transformers relies on was tested."""
    passed = {name for name, (outcome, _) in outcomes.items() if outcome == "passed"}
    relied_on = {
        "test_attention_outputs",
        "test_can_init_all_missing_weights",
        "test_can_use_safetensors",
        "test_config",
        "test_eager_matches_sdpa_inference_08_fp32_pad_left_sdpa_kernels",
        "test_hidden_states_output",
        "test_inputs_embeds",
        "test_load_save_without_tied_weights",
        "test_resize_tokens_embeddings",
        "test_retain_grad_hidden_states_attentions",
        "test_save_load",
        "test_tied_weights_keys",
        "test_training_gradient_checkpointing",
        "test_weights_reload_with_nothing_but_fresh_ones",
    }
    assert {f"{suite}.{test}" for test in relied_on} <= passed
