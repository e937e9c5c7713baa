"""The efficiency study's systems: the same random weights and the same prompt, captioned in different ways.

Every system starts from the pixels of seven tiles and N regions and ends with 32 tokens per region. Diffusion systems
run this repository's model; autoregressive ones run transformers' Llama with the same weights, causal mask and static
cache. No caption ends early, so that all write the same number of tokens.

Legend: N regions, L prompt tokens, G tokens per caption.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from typing import Any

import torch
from transformers import AutoModel, LlamaForCausalLM, LlamaModel, StaticCache

from perceptiondlm.attention_perceptiondlm import MaskedPass
from perceptiondlm.common.loading import from_checkpoint
from perceptiondlm.common.measuring import count_flops
from perceptiondlm.configuration_perceptiondlm import PerceptionDLMConfig, num_tiles
from perceptiondlm.inputs_perceptiondlm import PromptInputs
from perceptiondlm.modeling_perceptiondlm import PerceptionDLMForConditionalGeneration
from perceptiondlm.released_perceptiondlm import released_schedule
from perceptiondlm.sequence_perceptiondlm import ROI, SEPARATOR, SHARED, Prompt


# transformers renames the argument that a cache is passed by.
CACHE_KEYWORD = "cache" if "cache" in signature(LlamaModel.forward).parameters else "past_key_values"
GRID = (3, 2)  # with the thumbnail seven tiles, as the paper's benchmark has them
TEXT_BEFORE, TEXT_AFTER = 25, 20  # tokens of the turns around image and regions
SHAPES: dict[str, dict[str, Any]] = {
    "small": {
        "vision_config": {
            "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 4,
            "image_size": 512, "patch_size": 16, "vision_use_head": False,
        },
        "text_config": {
            "vocab_size": 32768, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8,
            "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 4096, "pad_token_id": None,
        },
        "image_token_id": 1, "mask_token_id": 2, "newline_token_id": 3, "end_of_turn_token_id": 4,
        "end_of_text_token_id": 5, "roi_token_ids": [6], "caption_token_ids": [7],
    },
}  # fmt: skip
SYSTEMS = {
    "full": "diffusion, the whole sequence in every step, full vocabulary in fp64, as released",
    "cached": "diffusion, cached prefix",
    "fast": "diffusion, cached prefix, as few passes as the fast preset needs",
    "fast_on_cached_image": "the same, on an image encoded before",
    "ar_one_by_one": "autoregressive, one region at a time, the image encoded anew",
    "ar_shared_prefix": "autoregressive, one region at a time on a shared prefix",
    "ar_batch": "autoregressive, all regions in one batch on a shared prefix",
}


def build_model(shape: str, embedded: str, device: torch.device, dtype: torch.dtype):
    """The model of a shape: random weights, or the embedded model from `embedded`."""
    if shape == "embedded":
        return from_checkpoint(AutoModel, embedded).to(device, dtype).eval()
    settings = {"region_conditioning": "replay", "attention_layout": "isolated"}
    config = (
        PerceptionDLMConfig.from_preset("8b", **settings)
        if shape == "8b"
        else PerceptionDLMConfig(**SHAPES[shape], **settings)
    )
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return PerceptionDLMForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(default)


def make_inputs(config: PerceptionDLMConfig, num_regions: int, device: torch.device) -> dict[str, torch.Tensor]:
    """What the processor would give for one image of seven tiles with N regions; pixels and tokens are random."""
    generator = torch.Generator().manual_seed(num_regions)
    tiles, side = num_tiles(GRID), config.vision_config.image_size
    image = tiles * config.tokens_per_side**2
    span = config.roi_size**2
    words = torch.randint(10, config.text_config.vocab_size, (TEXT_BEFORE + TEXT_AFTER,), generator=generator).tolist()
    words = [10 if word == config.image_token_id else word for word in words]
    regions = [r for r in range(num_regions) for _ in range(span + 1)]
    ids = [*words[:TEXT_BEFORE], *[config.image_token_id] * image]
    ids += ([config.roi_token_ids[0]] * span + [config.newline_token_id]) * num_regions + words[TEXT_BEFORE:]
    before = TEXT_BEFORE + image
    roles = [SHARED] * before + ([ROI] * span + [SEPARATOR]) * num_regions + [SHARED] * TEXT_AFTER
    low = torch.randint(0, 400, (num_regions, 2), generator=generator)
    cells = config.roi_size * config.coverage_subsamples
    inputs = {
        "input_ids": torch.tensor([ids]),
        "token_roles": torch.tensor([roles]),
        "region_ids": torch.tensor([[-1] * before + regions + [-1] * TEXT_AFTER]),
        "num_regions": torch.tensor([num_regions]),
        "pixel_values": torch.rand((tiles, 3, side, side), generator=generator) * 2 - 1,
        "tile_grids": torch.tensor([GRID]),
        "image_sizes": torch.tensor([[512, 768]]),
        "region_boxes": torch.cat((low, low + 100), dim=1),
        "region_coverage": torch.ones(num_regions, cells, cells),
    }
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def as_released(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inputs as the released layout has them: the newline after the last region is shared."""
    roles, regions = inputs["token_roles"].clone(), inputs["region_ids"].clone()
    last = (roles[0] == SEPARATOR).nonzero()[-1]
    roles[0, last], regions[0, last] = SHARED, -1
    return {**inputs, "token_roles": roles, "region_ids": regions}


@contextmanager
def released_layout(config: PerceptionDLMConfig) -> Iterator[None]:
    """Run a model in the released layout for a while; no weight depends on it."""
    before = config.attention_layout
    config.attention_layout = "released"
    try:
        yield
    finally:
        config.attention_layout = before


@dataclass
class Study:
    """One model and its autoregressive twin, ready to run every system.

    Args:
        model: the diffusion model.
        num_tokens: G, per caption.
        steps: of `full` and `cached`.
        fast_steps: of `fast`: the mean number of passes that the fast preset needs on the drawn world.
        compiled: whether the passes of `cached` and `fast` are compiled.
        compile_rival: whether the autoregressive decoding step is compiled.
    """

    model: Any
    num_tokens: int = 32
    steps: int = 32
    fast_steps: int = 8
    compiled: bool = False
    compile_rival: bool = False
    causal: Any = field(init=False)

    def __post_init__(self):
        weights = {f"model.{name}": weight for name, weight in self.model.language_model.state_dict().items()}
        weights["lm_head.weight"] = self.model.lm_head.weight
        config = self.model.config.text_config
        first = self.model.lm_head.weight
        self.causal = LlamaForCausalLM._from_config(config, dtype=first.dtype).to(first.device).eval()
        self.causal.load_state_dict(weights)
        self.step = self.causal.forward
        if self.compile_rival:
            self.step = torch.compile(self.causal.forward, mode="reduce-overhead", fullgraph=True)

    def passes(self, system: str) -> int:
        """Passes that a system needs behind each prefill: denoising steps, or tokens written one after another."""
        steps = {"full": self.steps, "cached": self.steps, "fast": self.fast_steps}
        return steps.get(system.removesuffix("_on_cached_image"), self.num_tokens)

    def sequences(self, system: str, num_regions: int) -> int:
        """How often a system goes through its passes."""
        return num_regions if system in ("ar_one_by_one", "ar_shared_prefix") else 1

    def run(self, system: str, inputs: dict[str, torch.Tensor], encoded_image: Any = None, passes: int | None = None):
        """Caption all regions; returns the tokens, (N, G). With fewer `passes` than needed, only these are run."""
        passes = passes or self.passes(system)
        with torch.inference_mode():
            if system == "full":
                with released_layout(self.model.config):
                    return self._full(as_released(inputs), passes)
            if system in ("cached", "fast", "fast_on_cached_image"):
                return self._cached(inputs, passes, encoded_image)
            rivals = {"ar_one_by_one": self._each_anew, "ar_shared_prefix": self._in_turn, "ar_batch": self._at_once}
            return rivals[system](inputs, passes)

    def flops(self, system: str, inputs: dict[str, torch.Tensor], encoded_image: Any = None) -> int:
        """Floating-point operations of a system, counted without compilation: every pass costs what the second does."""
        chosen = (self.compiled, self.step)
        self.compiled, self.step = False, self.causal.forward
        try:
            one, two = (count_flops(partial(self.run, system, inputs, encoded_image, n)) for n in (1, 2))
        finally:
            self.compiled, self.step = chosen
        return one + (self.passes(system) - 1) * (two - one)

    def _cached(self, inputs, steps: int, encoded_image) -> torch.Tensor:
        if encoded_image is not None:
            inputs = {name: tensor for name, tensor in inputs.items() if name != "pixel_values"}
        settings = {"max_new_tokens": self.num_tokens, "steps": steps, "early_exit": False, "compile": self.compiled}
        return self.model.generate(**inputs, encoded_image=encoded_image, **settings).sequences

    def _full(self, inputs, steps: int) -> torch.Tensor:
        """Every step runs all L + N (G + 1) tokens and scores the whole vocabulary at each of them."""
        model = self.model
        prompt = self._prompt(inputs)
        regions = int(prompt.num_regions)
        spans = model.place_answers(prompt, regions, self.num_tokens)
        roles = prompt.roles.cat(spans.roles)
        attending = MaskedPass(model.config.layout.allowed(roles, roles))
        positions = torch.cat((prompt.positions, spans.positions), dim=1)
        blank = model.config.mask_token_id
        slots = torch.full((regions, self.num_tokens), blank, device=prompt.embeds.device)
        for decided in released_schedule(slots.numel(), steps):
            answers = model.get_input_embeddings()(spans.lay_out(spans.enclose(slots)))
            hidden = model.language_model(torch.cat((prompt.embeds, answers), dim=1), positions, attending)
            probabilities = model.lm_head(hidden).double().softmax(dim=-1)
            tail = spans.pick(probabilities[:, -answers.shape[1] :])[:, 1 : 1 + self.num_tokens]
            confidence, tokens = tail.max(dim=-1)
            slots = torch.where(slots == blank, tokens, slots).flatten()
            lowest = confidence.flatten().topk(slots.numel() - decided, largest=False).indices
            slots = slots.index_fill(0, lowest, blank).view(regions, -1)
        return slots

    def _prefix(self, inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings of the shared tokens (1, L_S, D), and of every region's own (N, L_R, D)."""
        prompt = self._prompt(inputs)
        return prompt.shared(0)[1], prompt.spans()[0]

    def _prompt(self, inputs) -> Prompt:
        return self.model.embed_prompt(PromptInputs(**inputs).checked(self.model))

    def _cache(self, length: int) -> StaticCache:
        return StaticCache(config=self.causal.config, max_cache_len=length)

    def _prefill(self, embeds: torch.Tensor, cache: StaticCache) -> torch.Tensor:
        """Run embeddings behind what a cache holds; the likeliest next token of every row, (rows, 1)."""
        output = self.causal(inputs_embeds=embeds, use_cache=True, logits_to_keep=1, **{CACHE_KEYWORD: cache})
        return output.logits.argmax(dim=-1)

    def _decode(self, token: torch.Tensor, cache: StaticCache, count: int) -> torch.Tensor:
        """Greedy decoding from a first token (rows, 1): (rows, count)."""
        tokens = [token]
        for _ in range(count - 1):
            output = self.step(input_ids=tokens[-1], use_cache=True, **{CACHE_KEYWORD: cache})
            tokens.append(output.logits.argmax(dim=-1).clone())
        return torch.cat(tokens, dim=1)

    def _each_anew(self, inputs, count: int) -> torch.Tensor:
        rows = []
        for index in range(int(inputs["num_regions"])):
            shared, own = self._prefix(inputs)  # encodes the image every time
            sequence = torch.cat((shared, own[index : index + 1]), dim=1)
            cache = self._cache(sequence.shape[1] + self.num_tokens)
            rows.append(self._decode(self._prefill(sequence, cache), cache, count))
        return torch.cat(rows)

    def _in_turn(self, inputs, count: int) -> torch.Tensor:
        shared, own = self._prefix(inputs)
        cache = self._cache(shared.shape[1] + own.shape[1] + self.num_tokens)
        self._prefill(shared, cache)
        rows = []
        for index in range(len(own)):
            for layer in cache.layers:
                layer.cumulative_length.fill_(shared.shape[1])
            rows.append(self._decode(self._prefill(own[index : index + 1], cache), cache, count))
        return torch.cat(rows)

    def _at_once(self, inputs, count: int) -> torch.Tensor:
        shared, own = self._prefix(inputs)
        length = shared.shape[1]
        single, cache = self._cache(length), self._cache(length + own.shape[1] + self.num_tokens)
        self._prefill(shared, single)
        for layer, source in zip(cache.layers, single.layers, strict=True):
            rows = (len(own), -1, -1, -1)
            layer.lazy_initialization(source.keys[:, :, :1].expand(rows), source.values[:, :, :1].expand(rows))
            layer.keys[:, :, :length] = source.keys
            layer.values[:, :, :length] = source.values
            layer.cumulative_length.fill_(length)
        return self._decode(self._prefill(own, cache), cache, count)
