"""Region sets: both published shapes in every file form, dealing of masks, prompt ids, limits, bad records."""

import base64
import gzip
import json
import random
import re
import time
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from perceptiondlm.training.data.collator import AnswerCollator
from perceptiondlm.training.data.data_config import DataConfig, LossConfig, SourceConfig
from perceptiondlm.training.data.mixture import build_dataset
from perceptiondlm.training.data.region_sets import deal, record_spans


SIZE = (60, 48)  # width and height


def rle(index: int) -> dict:
    """A square of 5 pixels, somewhere else for every index."""
    mask = np.zeros(SIZE[::-1], np.uint8, order="F")
    row, column = divmod(index, 8)
    mask[6 * row : 6 * row + 5, 6 * column : 6 * column + 5] = 1
    encoded = coco_mask.encode(mask)
    return {"size": list(SIZE[::-1]), "counts": encoded["counts"].decode()}


def picture() -> bytes:
    stream = BytesIO()
    Image.new("RGB", SIZE, "blue").save(stream, "PNG")
    return stream.getvalue()


def flat(count: int, image: str = "a.png", key: str = "image") -> dict:
    return {key: image, "mask_rles": [rle(i) for i in range(count)], "captions": [f"a red {i}" for i in range(count)]}


def annotated(count: int, image: str = "a.png") -> dict:
    items = [{"segmentation": rle(i), "caption": f"a red {i}"} for i in range(count)]
    return {"note": 'braces } and "quotes" {', "image": image, "annotations": items}


def write(path, records: list[dict]) -> None:
    text = "\n".join(map(json.dumps, records)) if ".jsonl" in path.name else json.dumps(records, indent=1)
    (gzip.open if path.suffix == ".gz" else open)(path, "wb").write(text.encode())


@pytest.fixture
def build(tiny_model, tiny_processor, tmp_path):
    """Factory `build(path, conditioning, loss settings, data settings)` of dataset and collator."""
    (tmp_path / "a.png").write_bytes(picture())

    def make(path, conditioning: str = "vision", loss: dict | None = None, model: dict | None = None, **settings):
        model = tiny_model(region_conditioning=conditioning, **(model or {}))
        processor = tiny_processor(model)
        source = SourceConfig("regions", path=str(path), image_root=str(tmp_path))
        data, loss = DataConfig([source], **settings), LossConfig(**{"num_slots": 8, "noise_copies": 1, **(loss or {})})
        dataset = build_dataset(data, loss, processor, model.config, tmp_path / "cache")
        return dataset, AnswerCollator.build(data, loss, processor, model.config)

    return make


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".json.gz", ".jsonl.gz"])
@pytest.mark.parametrize("shape", [flat, annotated])
def test_both_shapes_are_read_from_every_file_form(build, tmp_path, suffix, shape):
    write(tmp_path / f"set{suffix}", [shape(2), shape(1), shape(3)])
    dataset, _ = build(tmp_path / f"set{suffix}")
    assert dataset.report[0]["bad"] == 0
    assert [len(dataset[i]["masks"]) for i in range(3)] == [2, 1, 3]
    assert sorted(dataset[2]["captions"]) == ["a red 0", "a red 1", "a red 2"]
    for mask, caption in zip(dataset[2]["masks"], dataset[2]["captions"], strict=True):
        assert mask == rle(int(caption[-1]))  # still its own caption


@pytest.mark.parametrize("key", ["image", "image_file", "image_path"])
def test_images_are_paths_or_data_urls(build, tmp_path, key):
    url = "data:image/png;base64," + base64.b64encode(picture()).decode()
    single = {**flat(1, key=key), "mask_rles": rle(0)}  # one mask without a list
    write(tmp_path / "set.json", [flat(1, key=key), flat(1, url, key), single])
    dataset, collator = build(tmp_path / "set.json")
    assert dataset.report[0]["bad"] == 0
    assert (collator([dataset[i] for i in range(3)])["pixel_values"][:, 2] == 255).all()  # blue


def test_large_files_are_read_record_by_record(build, tmp_path):
    """Only the bytes of a record are read: the rest of the file may be anything by then."""
    write(tmp_path / "set.json", [flat(1), flat(2), flat(1)])
    dataset, _ = build(tmp_path / "set.json")
    source = dataset.sources[0]
    start, end = source.spans[0][1]
    content = (tmp_path / "set.json").read_bytes()
    (tmp_path / "set.json").write_bytes(b"#" * start + content[start:end] + b"#" * (len(content) - end))
    assert len(dataset[1]["masks"]) == 2
    with pytest.raises(OSError, match=r"set\.json, record 2 was fine before the run"):
        dataset[2]


@pytest.mark.parametrize(("count", "groups"), [(1, 1), (3, 1), (4, 2), (6, 2), (7, 2), (8, 3), (50, 15)])
def test_masks_are_dealt_into_groups(count, groups):
    """ceil(n / ((1 + K) / 2)) groups for K = 6, of sizes up to K, every mask once."""
    dealt = deal(count, 6, "0")
    assert len(dealt) == groups == int(np.ceil(count / 3.5))
    assert sorted(index for group in dealt for index in group) == list(range(count))
    assert max(map(len, dealt)) <= 6
    assert deal(count, 6, "0") == dealt
    assert count < 4 or deal(count, 6, "1") != dealt


def test_every_mask_is_seen_once_per_epoch_in_new_company(build, tmp_path):
    write(tmp_path / "set.jsonl", [flat(9), flat(2)])
    dataset, _ = build(tmp_path / "set.jsonl")
    assert len(dataset) == 3 + 1
    epochs = []
    for epoch in range(2):
        dataset.set_epoch(epoch)
        groups = [dataset[i]["captions"] for i in range(3)]
        assert sorted(caption for group in groups for caption in group) == [f"a red {i}" for i in range(9)]
        epochs.append({frozenset(group) for group in groups})
        assert len({dataset[i]["noise_seed"] for i in range(4)}) == 4
    assert epochs[0] != epochs[1]


def test_prompt_ids_are_shuffled_without_replacement_and_markers_follow(build, tmp_path):
    write(tmp_path / "set.jsonl", [flat(3)])
    dataset, collator = build(tmp_path / "set.jsonl")
    drawn = []
    for epoch in range(20):
        dataset.set_epoch(epoch)
        batch = collator([dataset[0]])
        ids = batch["prompt_ids"].tolist()
        assert len(set(ids)) == 3
        used = batch["prompt_coverage"].flatten(2).sum(dim=(0, 2))  # (K,): which prompts cover anything
        assert used.nonzero().flatten().tolist() == sorted(ids)
        drawn.append(tuple(ids))
        again = collator([dataset[0]])
        assert all(torch.equal(batch[name], again[name]) for name in batch)
    assert set(sum(drawn, ())) == set(range(6))
    assert len(set(drawn)) > 10


def test_released_order_takes_answers_along(build, tmp_path):
    """Where regions enter by area, the labels do, too."""
    big = np.zeros(SIZE[::-1], np.uint8, order="F")
    big[20:, 20:] = 1
    counts = coco_mask.encode(big)["counts"].decode()
    record = flat(2)
    record["mask_rles"][1] = {"size": list(SIZE[::-1]), "counts": counts}
    write(tmp_path / "set.jsonl", [record])
    released = {"attention_layout": "released", "supervise_markers": True}
    dataset, collator = build(tmp_path / "set.jsonl", loss={"noise_level": "sample"}, model=released)
    collator.processor.sort_regions = True
    batch = collator([dataset[0]])
    texts = [collator.processor.tokenizer.decode(labels[labels != -100]) for labels in batch["labels"]]
    areas = (batch["region_boxes"][:, 2:] - batch["region_boxes"][:, :2]).prod(dim=1).tolist()
    collator.processor.sort_regions = False
    assert areas == sorted(areas, reverse=True)
    assert texts == ["a red 1", "a red 0"]  # no end of turn: the model ends every block
    assert len(set(batch["mask_probability"].flatten().tolist())) == 1
    assert batch["answer_masked"].shape[1] == batch["labels"].shape[1] + 2


def test_what_a_sample_adds_to_a_batch_does_not_depend_on_the_others(build, tiny_model, tmp_path):
    """Loss of the batch = losses of its samples, although captions differ in length (markers trained, too)."""
    records = [flat(2), flat(1)]
    records[1]["captions"] = ["a large striped red house with a blue roof"]
    write(tmp_path / "set.jsonl", records)
    model = {"attention_layout": "released", "supervise_markers": True}
    dataset, collator = build(tmp_path / "set.jsonl", loss={"max_slots": 32}, model=model)
    network = tiny_model(region_conditioning="vision", **model)
    with torch.no_grad():
        together = network(**collator([dataset[0], dataset[1]]))
        alone = [network(**collator([dataset[i]])) for i in range(2)]
    assert int(together.masked.sum()) == sum(int(output.masked.sum()) for output in alone)
    total = sum(output.token_losses.sum() for output in alone)
    torch.testing.assert_close(together.token_losses.sum(), total, atol=1e-3, rtol=1e-4)


EMPTY = {"size": list(SIZE[::-1]), "counts": [SIZE[0] * SIZE[1]]}
BAD_RECORDS = {
    "a missing image": (flat(1, "gone.png"), "gone.png"),
    "broken base64": (flat(1, "data:image/png;base64,!!"), "image|base64|padding"),
    "a broken RLE": ({**flat(1), "mask_rles": [{**rle(0), "counts": rle(0)["counts"][:-2]}]}, "RLE"),
    "an empty mask": ({**flat(1), "mask_rles": [EMPTY]}, "is empty"),
    "an empty caption": ({**flat(1), "captions": [" "]}, "caption 0 is empty"),
    "a caption too few": ({**flat(2), "captions": ["a cat"]}, "2 masks for 1 captions"),
    "a caption that is no text": ({**flat(1), "captions": [3]}, "caption 0 is 3"),
    "another size": ({**flat(1), "mask_rles": [{**rle(0), "size": [4, 4]}]}, "4 x 4"),
    "wrong keys": ({"picture": "a.png", "mask": rle(0)}, "mask_rles and captions"),
    "no annotations": ({"image": "a.png", "annotations": None}, "or no masks"),
    "masks that are no list": ({**flat(1), "mask_rles": 3}, "or no masks"),
    "no object": ([1, 2], "a list"),
}


@pytest.mark.parametrize("kind", BAD_RECORDS)
def test_bad_records_are_counted_named_and_left_out(build, tmp_path, kind):
    bad, message = BAD_RECORDS[kind]
    write(tmp_path / "set.jsonl", [flat(1), bad, flat(1), flat(1)])
    dataset, _ = build(tmp_path / "set.jsonl", max_bad_share=0.3)
    report = dataset.report[0]
    assert (report["records"], report["bad"], len(dataset)) == (4, 1, 3)
    assert report["bad_records"][0].startswith(f"{tmp_path / 'set.jsonl'}, record 1: ")
    assert re.search(message, report["bad_records"][0])
    with pytest.raises(ValueError, match=r"1 of the first 4 records of .*max_bad_share"):
        build(tmp_path / "set.jsonl")


def test_files_that_are_missing_or_cut_short_are_refused(build, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent.json.*accepted"):
        build(tmp_path / "absent.json")
    write(tmp_path / "set.json", [flat(1), flat(1)])
    whole = (tmp_path / "set.json").read_bytes()
    (tmp_path / "set.json").write_bytes(whole[:-40])
    with pytest.raises(ValueError, match="cut short"):
        build(tmp_path / "set.json")
    (tmp_path / "set.json").write_bytes(b'[{"image": 1}, 3, "a"]')
    with pytest.raises(ValueError, match="list of objects alone"):
        build(tmp_path / "set.json")
    (tmp_path / "set.json").write_bytes(b'{"image": 1}')
    with pytest.raises(ValueError, match="does not start with"):
        build(tmp_path / "set.json")


CUT = (
    '[{"image": "a.png", "note": "'
    + 'say \\\\"x\\\\" ' * 20_000
    + '", "mask_rles": [], "captions": []},\n {"image": "b{"}]'
)


@pytest.mark.parametrize("end", [*range(1, 40, 3), 90_001, 150_000, len(CUT) - 20, len(CUT) - 2, len(CUT) - 1])
def test_a_json_list_cut_anywhere_is_refused_at_once(tmp_path, end):
    """In strings, too, and between escapes: time grows with the file alone."""
    path = tmp_path / "set.json"
    path.write_text(CUT)
    assert len(record_spans(path, tmp_path / "cache")) == 2
    path.write_text(CUT[:end])
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"set\.json (ends inside|does not start|holds)"):
        record_spans(path, tmp_path / "cache")
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json.gz"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.95, 0.999])
def test_files_cut_anywhere_never_give_other_records(build, tmp_path, suffix, share):
    path = tmp_path / f"set{suffix}"
    write(path, [flat(i % 3 + 1) for i in range(40)])
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    if suffix.endswith(".gz"):
        with pytest.raises(ValueError, match=re.escape(path.name)):
            build(path)
        return
    dataset, _ = build(path, max_bad_share=1.0)
    report = dataset.report[0]
    assert report["bad"] == 1  # the line in which the file ends
    assert [len(dataset[i]["masks"]) for i in range(len(dataset))] == [i % 3 + 1 for i in range(report["records"] - 1)]


def test_lists_may_begin_with_a_byte_order_mark_and_suffixes_be_upper_case(build, tmp_path):
    write(tmp_path / "set.json", [flat(1), flat(2)])
    (tmp_path / "SET.JSON").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "set.json").read_bytes())
    dataset, _ = build(tmp_path / "SET.JSON")
    assert (dataset.report[0]["bad"], len(dataset)) == (0, 2)


BAD_REGIONS = {
    "text for a mask": ("abc", "accepted: RLE"),
    "a path for a mask": ("a.png", "accepted: RLE"),
    "null": (None, "mask 1 is None"),
    "a number": (7, "mask 1 is 7"),
    "an empty mask": (EMPTY, "is empty"),
    "another size": ({**rle(0), "size": [4, 4]}, "4 x 4"),
    "no counts": ({"size": [48, 60]}, "counts"),
    "counts that are no counts": ({"size": [48, 60], "counts": {"a": 1}}, "counts"),
    "an empty list": ([], "mask"),
    "nonsense in lists": ([["x"]], "mask"),
}


@pytest.mark.parametrize("kind", BAD_REGIONS)
def test_a_bad_mask_costs_that_mask_alone(build, tmp_path, kind):
    mask, message = BAD_REGIONS[kind]
    record = flat(28)
    record["mask_rles"][1] = mask
    write(tmp_path / "set.jsonl", [flat(2), record])
    dataset, collator = build(tmp_path / "set.jsonl")
    report = dataset.report[0]
    assert (report["bad"], report["bad_regions"]) == (0, 1)
    (text,) = report["bad_region_records"]
    assert text.startswith(f"{tmp_path / 'set.jsonl'}, record 1, region 1: ")
    assert re.search(message, text)
    captions = sorted(caption for i in range(1, len(dataset)) for caption in dataset[i]["captions"])
    assert captions == sorted(f"a red {i}" for i in range(28) if i != 1)
    for index in range(len(dataset)):
        assert len(collator([dataset[index]])["region_boxes"]) == len(dataset[index]["captions"])


def test_a_bad_caption_costs_that_region_alone(build, tmp_path):
    record = flat(3)
    record["captions"] = ["a red 0", "half \ud800", "<|mdm_mask|>"]
    items = {"image": "a.png", "annotations": [*annotated(2)["annotations"], 5]}
    write(tmp_path / "set.jsonl", [record, items])
    dataset, _ = build(tmp_path / "set.jsonl")
    assert [sorted(dataset[i]["captions"]) for i in range(2)] == [["a red 0"], ["a red 0", "a red 1"]]
    assert [text.rpartition("region ")[2][0] for text in dataset.report[0]["bad_region_records"]] == ["1", "2", "2"]


def test_whatever_a_record_holds_it_is_good_or_counted(build, tmp_path):
    """Records with one value replaced by something else, at any depth."""
    dice = random.Random(0)
    junk = [None, True, 3, -1, 1e308, "", "abc", "\ud800", [], {}, [[]], {"a": 1}, [1, 2], "data:;base64,AAAA", 10**30]

    def spoiled(value, depth):
        if depth == 0 or not isinstance(value, (dict, list)) or not value:
            return dice.choice(junk)
        key = dice.choice(list(value) if isinstance(value, dict) else range(len(value)))
        value[key] = spoiled(value[key], depth - 1)
        return value

    records = [spoiled(dice.choice((flat, annotated))(2), dice.randrange(5)) for _ in range(400)]
    lines = [json.dumps(record) for record in records] + ["[" * 100_000, '{"a": ' * 100_000, "{", "\x00", "NaN"]
    (tmp_path / "set.jsonl").write_text("\n".join(lines))
    dataset, collator = build(tmp_path / "set.jsonl", max_bad_share=1.0)
    report = dataset.report[0]
    assert report["records"] == len(lines)
    assert report["bad"] > 100
    assert report["bad_regions"] > 20
    for index in range(0, len(dataset), 5):
        collator([dataset[index]])


def test_long_captions_are_cut_and_crowded_images_left_out(build, tmp_path):
    records = [flat(1), flat(3)]
    records[0]["captions"] = ["a large striped red house with a blue roof and a green door"]
    write(tmp_path / "set.jsonl", records)
    dataset, collator = build(tmp_path / "set.jsonl")
    marked = [8 + 1, 3 * (8 + 1)]  # slots and marker of every caption
    lengths = [collator([dataset[i]])["input_ids"].shape[1] + marked[i] for i in range(2)]
    assert dataset.lengths.tolist() == lengths
    dataset, collator = build(tmp_path / "set.jsonl", max_length=lengths[1] - 1)
    assert (dataset.report[0]["cut"], dataset.report[0]["too_long"], len(dataset)) == (1, 1, 1)
    batch = collator([dataset[0]])
    assert batch["labels"].shape == (1, 8)
    assert batch["region_boxes"].shape == (1, 4)
