"""From a source checkpoint to a self-contained target directory, or to nothing at all if anything is wrong."""

import copy
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from transformers import PreTrainedTokenizerFast
from transformers.dynamic_module_utils import custom_object_save

from perceptiondlm.checkpoints import layouts, recipes
from perceptiondlm.checkpoints.files import (
    Checkpoint,
    Part,
    new_folder,
    refuse_existing,
    write_json,
    write_shards,
)
from perceptiondlm.checkpoints.folder import prepare_config, register_auto_classes
from perceptiondlm.checkpoints.plan import Plan
from perceptiondlm.checkpoints.tokenizer import REGION_TOKENS, VISION_TOKENS
from perceptiondlm.common.environment import environment
from perceptiondlm.common.json_files import read_json
from perceptiondlm.common.measuring import peak_memory
from perceptiondlm.configuration_perceptiondlm import PerceptionDLMConfig
from perceptiondlm.generation_config_perceptiondlm import PerceptionDLMGenerationConfig
from perceptiondlm.modeling_perceptiondlm import PerceptionDLMForConditionalGeneration
from perceptiondlm.processing_perceptiondlm import PerceptionDLMProcessor


RECORD = "conversion.json"  # what a target was made of, kept beside it
HUB_FILES = ["*.json", "*.safetensors", "*.jinja"]
OTHER_FILES = 64 * 2**20  # room for tokenizer, code and configs
NEW_ROWS_DEVIATION = 0.02  # of embeddings for added tokens


@dataclass
class Options:
    """What a user asks for; see the `convert` subcommand."""

    source: str
    target: Path
    to: str = "perceptiondlm"
    vision_tower: str | None = None
    region_conditioning: str = "replay"
    attention_layout: str = "isolated"
    dtype: torch.dtype | None = None
    max_shard_size: int = 5 * 10**9
    seed: int = 0
    push_to_hub: str | None = None


@dataclass
class Report:
    """What a conversion did: tensors used, dropped (name to reason) and initialised anew, bytes, time and memory."""

    kind: str
    target: str
    used: int
    dropped: dict[str, str]
    fresh: list[str]
    dtype: str
    num_bytes: int
    seconds: float
    peak_memory_bytes: int | None


def convert(options: Options) -> Report:
    """Convert a checkpoint; see the module's docstring.

    Raises:
        FileNotFoundError, FileExistsError, OSError, ValueError: naming what is wrong; nothing is left behind.
    """
    start = time.perf_counter()
    refuse_existing(options.target)  # before anything is downloaded
    folder = local_folder(options.source)
    kind = recipes.detect(folder)
    towers = [local_folder(options.vision_tower)] if options.vision_tower else []
    check_combination(options, kind, [recipes.detect(tower) for tower in towers])
    source = Checkpoint(folder)
    plan = Plan()
    recipe, content = None, {}
    if options.to == "released":
        content = released_content(folder)
        plan.add(source, layouts.TO_RELEASED_RULES)
        shapes = {name: plan.stored(name).shape for name in plan.used}
    else:
        plan.add(source, recipes.RULES[kind])
        for tower in towers:
            plan.add(Checkpoint(tower), recipes.RULES["siglip"])
        recipe = make_recipe(options, kind, folder, towers, vocabulary_rows(plan))
        shapes = target_shapes(recipe.config)
        plan.check(shapes, recipe.fresh, recipes.VOCABULARY)
    dtype = plan.dtype(options.dtype)
    parts = make_parts(plan, shapes, dtype, options)
    if recipe is not None and plan.fresh:
        parts.append(fresh_part(recipe.config, plan.fresh, dtype, options.seed))
    num_bytes = sum(part.num_bytes for part in parts)
    with new_folder(options.target, num_bytes + OTHER_FILES) as partial_folder:
        write_shards(partial_folder, parts)
        if recipe is None:
            write_released(partial_folder, folder, content)
        else:
            write_model_files(partial_folder, recipe, dtype)
            write_json(partial_folder / RECORD, record(options, kind, folder, plan))
    report = Report(
        kind, str(options.target), len(plan.used), plan.dropped, plan.fresh, str(dtype).removeprefix("torch."),
        num_bytes, time.perf_counter() - start, peak_memory(),
    )  # fmt: skip
    if options.push_to_hub:
        push(options.target, options.push_to_hub)
    return report


def local_folder(source: str) -> Path:
    """A directory as it is; a Hub id is downloaded (safetensors and JSON only)."""
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists() or source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{source} is neither a directory nor a Hub id such as MSALab/PerceptionDLM")
    return Path(snapshot_download(source, allow_patterns=HUB_FILES))


def check_combination(options: Options, kind: str, tower_kinds: list[str]) -> None:
    """Refuse a target that cannot be made of a source."""
    possible = {
        "released": ("perceptiondlm",),
        "released-base": ("perceptiondlm", "region"),
        "llada": ("perceptiondlm",),
        "llada-hf": ("perceptiondlm",),
        "siglip": (),
        "perceptiondlm": ("released", "region"),
    }[kind]
    what = recipes.KINDS[kind]
    if options.to not in possible:
        hint = (
            "give LLaDA as SOURCE and the tower as --vision-tower"
            if kind == "siglip"
            else " or ".join(f"--to {to}" for to in possible)
        )
        raise ValueError(f"{options.source} is {what}, which does not convert --to {options.to}; accepted: {hint}")
    if tower_kinds and (tower_kinds != ["siglip"] or not kind.startswith("llada")):
        found = ", ".join(recipes.KINDS[tower] for tower in tower_kinds)
        raise ValueError(
            f"--vision-tower joins a SigLIP vision tower to LLaDA; got {found} for a source that is {what}"
        )


def make_recipe(options: Options, kind: str, folder: Path, towers: list[Path], rows: int) -> recipes.Recipe:
    """The recipe of the conversion asked for."""
    if options.to == "region":
        return recipes.region_recipe(folder, kind, rows, options.region_conditioning, options.attention_layout)
    if kind.startswith("released"):
        return recipes.released_recipe(folder, rows)
    return recipes.llada_recipe(folder, rows, towers[0] if towers else None)


def vocabulary_rows(plan: Plan) -> int:
    """Rows of the token embeddings, which the output layer must share."""
    missing = [name for name in recipes.VOCABULARY if name not in plan.used]
    if missing:
        raise ValueError(f"the source does not fill {', '.join(missing)}")
    rows = [plan.stored(name).shape[0] for name in recipes.VOCABULARY]
    if rows[0] != rows[1]:
        raise ValueError(f"token embeddings have {rows[0]} rows, the output layer {rows[1]}")
    return rows[0]


def target_shapes(config: PerceptionDLMConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a model, without making it."""
    with torch.device("meta"):
        model = PerceptionDLMForConditionalGeneration(config)
    return {name: tuple(weight.shape) for name, weight in model.state_dict().items()}


def make_parts(plan: Plan, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, options: Options) -> list[Part]:
    """The target's shards: those of the source, split where they exceed the largest size."""
    by_shard: dict[tuple[int, str], list[str]] = {}
    for target, (source, name) in plan.used.items():
        by_shard.setdefault((id(source), source.tensors[name].shard), []).append(target)
    sizes = {name: int(torch.Size(shapes[name]).numel()) * dtype.itemsize for name in plan.used}
    return [
        Part(partial(read_part, plan, group, shapes, dtype, options.seed), sum(sizes[name] for name in group))
        for targets in by_shard.values()
        for group in split(targets, [sizes[name] for name in targets], options.max_shard_size)
    ]


def split(names: list[str], sizes: list[int], largest: int) -> list[list[str]]:
    """Consecutive groups of names whose sizes add up to at most `largest` bytes, or hold one name."""
    groups: list[list[str]] = []
    room = 0
    for name, size in zip(names, sizes, strict=True):
        if not groups or size > room:
            groups.append([])
            room = largest
        groups[-1].append(name)
        room -= size
    return groups


def read_part(plan: Plan, group: list[str], shapes, dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    """The target tensors of one group, which lie in one source shard; vocabularies grow rows for added tokens."""
    source, first = plan.used[group[0]]
    tensors = source.read(source.tensors[first].shard, [plan.used[name][1] for name in group])
    result = {name: tensors[plan.used[name][1]].to(dtype) for name in group}
    for name in set(recipes.VOCABULARY) & set(group):
        missing = shapes[name][0] - len(result[name])
        if missing:
            generator = torch.Generator().manual_seed(seed)
            rows = torch.randn(missing, shapes[name][1], generator=generator) * NEW_ROWS_DEVIATION
            result[name] = torch.cat((result[name], rows.to(dtype)))
    return result


def fresh_part(config: PerceptionDLMConfig, names: list[str], dtype: torch.dtype, seed: int) -> Part:
    """New parts as a new model has them, taken from a model of the same widths with next to nothing else in it."""
    small = copy.deepcopy(config)
    small.vision_feature_layer = -1
    small.vision_config.num_hidden_layers = small.text_config.num_hidden_layers = 1
    small.vision_config.intermediate_size = small.text_config.intermediate_size = 8
    small.text_config.vocab_size, small.text_config.pad_token_id = 8, None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        weights = PerceptionDLMForConditionalGeneration(small).state_dict()
    tensors = {name: weights[name].to(dtype).contiguous() for name in names}
    return Part(lambda: tensors, sum(tensor.nbytes for tensor in tensors.values()))


def write_model_files(folder: Path, recipe: recipes.Recipe, dtype: torch.dtype) -> None:
    """Config, generation config, processor, tokenizer and the code that reads them."""
    register_auto_classes()
    config = prepare_config(recipe.config)
    config.architectures, config.dtype = ["PerceptionDLMForConditionalGeneration"], dtype
    config.save_pretrained(folder)
    PerceptionDLMGenerationConfig(**recipe.generation).save_pretrained(folder)
    PerceptionDLMProcessor.from_config(config, recipe.tokenizer, **recipe.processor).save_pretrained(folder)
    with torch.device("meta"):
        custom_object_save(PerceptionDLMForConditionalGeneration(config), folder, config=config)


def record(options: Options, kind: str, folder: Path, plan: Plan) -> dict[str, Any]:
    """What a target was made of; the source's config is kept word for word for the way back."""
    return {
        "source": options.source if not Path(options.source).exists() else Path(options.source).resolve().name,
        "kind": kind,
        "dropped": plan.dropped,
        "fresh": plan.fresh,
        "environment": environment(),
        "source_config": read_json(folder / "config.json"),
    }


def released_content(folder: Path) -> dict[str, Any]:
    """The released config of one of our checkpoints: the one it was converted from, or else a new one."""
    config = PerceptionDLMConfig.from_pretrained(folder)
    as_released = all(getattr(config, name) == value for name, value in layouts.RELEASED_QUIRKS.items())
    as_base = all(getattr(config, name) == value for name, value in layouts.BASE_FIELDS.items())
    if config.text_only or not (as_released or as_base):
        quirks = {name: getattr(config, name) for name in layouts.RELEASED_QUIRKS}
        raise ValueError(f"the released code cannot run this model: it needs {layouts.RELEASED_QUIRKS}, found {quirks}")
    if (folder / RECORD).is_file():
        source = read_json(folder / RECORD)["source_config"]
        if source.get("model_type") == ("pdmllm" if as_released else "dmllm"):
            return source
    return layouts.to_released_config(config)


def write_released(folder: Path, source: Path, content: dict[str, Any]) -> None:
    """Config, image preprocessing and tokenizer of a released checkpoint; its code is the authors' to add."""
    write_json(folder / "config.json", content)
    side = content["image_size"]
    preprocessing = {
        "image_processor_type": "SiglipImageProcessor", "do_resize": True, "do_rescale": True, "do_normalize": True,
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2, "rescale_factor": 1 / 255,
        "size": {"height": side, "width": side},
    }  # fmt: skip
    write_json(folder / "preprocessor_config.json", preprocessing)
    write_released_tokenizer(folder, recipes.load_tokenizer(source))


def write_released_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """A tokenizer as transformers 4 reads it, which the released code needs; version 5 names its classes anew."""
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token, "pad_token": tokenizer.pad_token}
    added = [token for token in (*VISION_TOKENS, *REGION_TOKENS) if token in tokenizer.get_vocab()]
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast", **named, "additional_special_tokens": added,
        "clean_up_tokenization_spaces": False, "model_max_length": tokenizer.model_max_length, "padding_side": "right",
    }  # fmt: skip
    write_json(folder / "tokenizer_config.json", content)


def push(folder: Path, repository: str) -> None:
    """Upload a finished target to the Hub."""
    api = HfApi()
    api.create_repo(repository, exist_ok=True)
    api.upload_folder(repo_id=repository, folder_path=folder)
