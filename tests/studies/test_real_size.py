"""The real size in small: a checkpoint made once, phases that survive an interruption, memory as the formula says."""

import json
from functools import partial

import pytest
import torch
from test_documents import RESULTS, ROOT

from perceptiondlm.checkpoints.layouts import BASE_FIELDS
from perceptiondlm.common.loading import REPOSITORY
from perceptiondlm.common.measuring import peak_allocation
from perceptiondlm.configuration_perceptiondlm import PerceptionDLMConfig
from perceptiondlm.modeling_perceptiondlm import PerceptionDLMForConditionalGeneration
from perceptiondlm.processing_perceptiondlm import PerceptionDLMProcessor
from perceptiondlm.studies import memory_model, real_size
from perceptiondlm.studies.efficiency import make_inputs
from perceptiondlm.studies.memory_model import CARDS, PROMPT, RESERVED, MemoryModel
from perceptiondlm.studies.regions_at_scale import boxes, picture


CPU = torch.device("cpu")
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
    "image_size": 64, "patch_size": 16, "vision_use_head": False,
}  # fmt: skip
TEXT = {
    "vocab_size": 4096, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 1024, "pad_token_id": None,
}  # fmt: skip
COMMITTED = RESULTS / "real_size_cpu.json"


@pytest.fixture(scope="module")
def base():
    """The 8B shape's stand-in: a base model of tiles of 64 px."""
    return PerceptionDLMConfig(
        vision_config=dict(VISION),
        text_config={**TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        **BASE_FIELDS,
    )


@pytest.fixture(scope="module")
def measured(base, tmp_path_factory):
    """A folder with the checkpoint, and the report of a run."""
    folder = tmp_path_factory.mktemp("real_size")
    return folder, real_size.measure(folder, base, [1, 4], folder / "report.json", REPOSITORY)


def test_every_phase_is_reported(measured):
    folder, result = measured
    assert json.loads((folder / "report.json").read_text()) == json.loads(json.dumps(result))
    assert [(p["phase"], p.get("regions"), p.get("run", p.get("steps"))) for p in result["phases"]] == [
        ("load", None, None),
        ("vision", None, "first"), ("vision", None, "again"),
        ("prefill and one pass", 1, "first"), ("prefill and one pass", 1, "again"),
        ("passes", 1, 1), ("passes", 1, 3), ("passes", 4, 1), ("passes", 4, 3),
    ]  # fmt: skip
    assert result["tiles"] == PROMPT[0] == 7
    assert result["shared_tokens"] - 7 * 2**2 == PROMPT[1] - 7 * 16**2
    assert all(phase["seconds"] > 0 for phase in result["phases"])
    found = real_size.summary(result)
    assert list(found["pass"]) == [1, 4]
    weights = sum(path.stat().st_size for path in (folder / "checkpoint").glob("*.safetensors"))
    assert found["peak_resident_bytes"]["passes"] > weights
    assert result["checkpoint"]["conversion"]["peak_resident_bytes"] > weights
    assert not (folder / ".source").exists()


def test_prefill_is_left_out_of_the_passes(measured):
    """Passes behind a remembered prefix allocate neither prefix nor image; prefill does."""
    _, result = measured
    phases = [phase for phase in result["phases"] if phase["phase"] != "load" and phase.get("steps") != 3]
    allocated = {(phase["phase"], phase.get("regions")): phase["allocated_bytes"] for phase in phases}
    model = MemoryModel(PerceptionDLMConfig.from_dict(result["config"]), result["tiles"], result["shared_tokens"])
    assert allocated["prefill and one pass", 1] > allocated["passes", 1] + model.prefix / 2


def test_report_as_markdown_has_measurement_and_formula_side_by_side(measured, monkeypatch, capsys):
    folder, result = measured
    monkeypatch.setattr("sys.argv", ["real_size", "--show", str(folder / "report.json")])
    real_size.main()
    printed = capsys.readouterr().out
    assert printed.strip() == real_size.markdown(result)
    for name, found, formula in real_size.compared(result):
        assert f"| {name} | {found / 1e9:.3f} | {formula / 1e9:.3f} |" in printed
    assert "| a pass, 4 regions |" in printed
    assert "| 200 | " in printed


def test_an_interrupted_run_keeps_its_phases_and_the_checkpoint_is_used_again(measured, base, monkeypatch, tmp_path):
    folder, _ = measured
    before = {path: path.stat().st_mtime_ns for path in (folder / "checkpoint").iterdir()}
    original = real_size.captions

    def interrupted(model, processor, image, regions, steps):
        if regions == 4:
            raise KeyboardInterrupt
        return original(model, processor, image, regions, steps)

    monkeypatch.setattr(real_size, "captions", interrupted)
    with pytest.raises(KeyboardInterrupt):
        real_size.measure(folder, base, [1, 4], tmp_path / "r.json", REPOSITORY)
    kept = json.loads((tmp_path / "r.json").read_text())["phases"]
    assert (kept[-1]["phase"], kept[-1]["regions"], kept[-1]["steps"]) == ("passes", 1, 3)
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "checkpoint").iterdir()}


def test_a_folder_with_another_shape_is_refused(measured):
    folder, _ = measured
    with pytest.raises(ValueError, match=r"'num_hidden_layers': 3.*'num_hidden_layers': 32.*another folder"):
        real_size.make_checkpoint(folder, real_size.shape(), REPOSITORY)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give FOLDER and --json to measure"),
        (["x", "--json", "r.json", "--regions", "0"], "--regions must be at least 1"),
        (["x", "--json", "r.json", "--layers", "1"], "--layers at least 2"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["real_size", *arguments])
    with pytest.raises(SystemExit):
        real_size.main()
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# --- memory by formula --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide():
    """A model wide enough that its activations outweigh indices and masks."""
    vision = {**VISION, "hidden_size": 128, "intermediate_size": 384, "image_size": 256}
    text = {**TEXT, "hidden_size": 256, "intermediate_size": 768}
    config = PerceptionDLMConfig(vision_config=vision, text_config=text, image_token_id=1, mask_token_id=2,
        newline_token_id=3, end_of_turn_token_id=4, end_of_text_token_id=5, roi_token_ids=[6], caption_token_ids=[7],
    )  # fmt: skip
    return PerceptionDLMForConditionalGeneration(config).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("regions", "slots"), [(2, 32), (40, 32), (40, 4)])
def test_formula_is_what_generate_allocates(wide, dtype, regions, slots):
    """From pixels, and behind an image and a prefix that are known, to 6 %."""
    model = wide.to(dtype)
    inputs = make_inputs(model.config, regions, CPU)
    inputs["pixel_values"] = ((inputs["pixel_values"] + 1) * 127).to(torch.uint8)
    shared = int((inputs["token_roles"] == 0).sum())
    formula = MemoryModel(
        model.config, len(inputs["pixel_values"]), shared, slots, itemsize=dtype.itemsize, copies_casts=True
    )
    assert formula.weights == sum(weight.nbytes for weight in model.parameters())
    settings = {"max_new_tokens": slots, "steps": 2, "early_exit": False}
    found = peak_allocation(lambda: model.generate(**inputs, **settings), CPU)
    assert found == pytest.approx(formula.peak(regions) - formula.weights - formula.pixels, rel=0.06)
    image = model.encode_image(**inputs)
    del inputs["pixel_values"]
    model.generate(**inputs, encoded_image=image, **settings)
    assert image.num_bytes == formula.image + formula.prefix
    known = {name: size for name, size in formula.moments(regions).items() if name in ("spans", "pass", "scoring")}
    expected = max(known.values()) - formula.weights - formula.pixels - image.num_bytes
    expected = max(expected, formula.regions(regions))
    found = peak_allocation(lambda: model.generate(**inputs, encoded_image=image, **settings), CPU)
    assert found == pytest.approx(expected, rel=0.06)


def test_groups_take_what_the_formula_says_of_one_group(measured):
    """Forty regions, ten at a time, allocate little more than ten do."""
    folder, result = measured
    model = PerceptionDLMForConditionalGeneration.from_pretrained(
        folder / "checkpoint", dtype=torch.bfloat16, trust_remote_code=True
    )
    processor = PerceptionDLMProcessor.from_pretrained(folder / "checkpoint", trust_remote_code=True)
    image = model.encode_image(**processor(images=picture(), boxes=boxes(1)))

    def peak(count: int, **limit: int) -> int:
        inputs = processor(images=image, boxes=boxes(count), **limit)
        run = partial(model.generate, **inputs, encoded_image=image, steps=2, early_exit=False)
        run()
        return peak_allocation(run, CPU)

    formula = MemoryModel(model.config, result["tiles"], result["shared_tokens"], copies_casts=True)
    ten, forty = (formula.moments(count)["scoring"] - formula.weights - formula.prefix for count in (10, 40))
    assert peak(10) < 1.15 * ten
    assert peak(40, max_regions_per_pass=10) < 1.15 * ten < 0.5 * forty < peak(40)


def test_largest_group_is_the_last_that_fits():
    formula = MemoryModel(PerceptionDLMConfig.from_preset("8b"), *PROMPT)
    for size in CARDS.values():
        group = formula.largest_group(size - RESERVED)
        assert formula.peak(group) <= size - RESERVED < formula.peak(group + 1)
    assert formula.largest_group(formula.weights) == 0


def test_table_says_what_fits(monkeypatch):
    monkeypatch.setattr(memory_model, "CARDS", {"24 GB": 24 * 2**30})
    formula = MemoryModel(PerceptionDLMConfig.from_preset("8b"), *PROMPT)
    most = formula.largest_group(24 * 2**30 - RESERVED)
    rows = memory_model.table(formula, [most, most + 1]).splitlines()[2:]
    assert [row.split("|")[-2].strip() for row in rows] == ["fits", "does not fit", f"{most:,}"]


def test_formula_refuses_what_it_does_not_describe():
    with pytest.raises(ValueError, match=r"isolated.*'released'"):
        MemoryModel(PerceptionDLMConfig.from_preset("8b", attention_layout="released"), *PROMPT)
    config = PerceptionDLMConfig.from_preset("8b")
    config.text_config.num_key_value_heads = 8
    with pytest.raises(ValueError, match="got 8 and 32"):
        MemoryModel(config, *PROMPT)


# --- the page -----------------------------------------------------------------------------------------------------


def test_page_shows_the_formula():
    table = memory_model.table(MemoryModel(PerceptionDLMConfig.from_preset("8b"), *PROMPT))
    assert table in (ROOT / "docs" / "efficiency.md").read_text()


@pytest.mark.skipif(not COMMITTED.is_file(), reason="the 8B shape has not been measured: no real_size_cpu.json")
def test_page_shows_the_committed_measurement():
    result = json.loads(COMMITTED.read_text())
    assert real_size.markdown(result) in (ROOT / "docs" / "efficiency.md").read_text()
    for name, found, formula in real_size.compared(result):
        assert found == pytest.approx(formula, rel=0.1), name
