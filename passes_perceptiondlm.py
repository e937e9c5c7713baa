"""Denoising passes: what is computed once before the first of them, and what each of them runs.

A kind of passes is a callable from the slots of the running answers to their hidden states. Which kind serves follows
from who looks at answers:

    StaticPasses   nobody but themselves (isolated layout). Keys and values of the prompt are computed once and exact;
                   a pass runs the tokens of the running answers.
    PackedPasses   the prompt does. Every `refresh_interval`-th pass runs whole rows, which is exact if all do; those
                   between run the answers alone, on the prompt's keys and values of the last whole pass.

Legend: see sequence_perceptiondlm.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch

from .attention_perceptiondlm import MaskedPass, StaticPass
from .cache_perceptiondlm import EncodedImage, KeyValues, PackedCache
from .sequence_perceptiondlm import AnswerSpans, Prompt


def shared_prefix(model: Any, prompt: Prompt, row: int, image: EncodedImage | None) -> KeyValues:
    """Keys and values of a row's shared tokens, from its image if that remembers them."""
    ids, embeds, positions = prompt.shared(row)
    key = tuple(ids.tolist())
    if image is not None and (known := image.prefix(key)) is not None:
        return known
    prefix = KeyValues(model.config.text_config.num_hidden_layers)
    model.language_model.fill(embeds, positions, StaticPass([(None, 1)], keep=prefix))
    if image is not None:
        image.remember(key, prefix)
    return prefix


def region_spans(model: Any, prompt: Prompt, prefixes: list[KeyValues]) -> KeyValues | None:
    """Keys and values (R, h, U, d) of all RoI spans, each behind its row's prefix; None where there are none."""
    embeds, positions = prompt.spans()
    if not embeds.shape[0] * embeds.shape[1]:
        return None
    spans = KeyValues(model.config.text_config.num_hidden_layers)
    runs = list(zip(prefixes, prompt.num_regions.tolist(), strict=True))
    model.language_model.fill(embeds, positions, StaticPass([run for run in runs if run[1]], keep=spans))
    return spans


class StaticPasses:
    """Passes behind prompts that look at no answer; see the top of this file.

    Args:
        model: a [`PerceptionDLMForConditionalGeneration`].
        prompt: rows that all have regions, or all have none.
        images: the image of each row, where it may remember the keys and values of the shared tokens.
        num_slots: G.
        compiled: run passes through `torch.compile`; the answers of a row are then padded to a power of two.
    """

    answers_can_leave = True

    def __init__(self, model: Any, prompt: Prompt, images: list[EncodedImage | None], num_slots: int, compiled: bool):
        self.model, self.compiled, self.count = model, compiled, 0
        counts = prompt.num_regions.clamp(min=1).tolist()
        bare = not prompt.num_regions.any()
        self.spans = model.place_answers(prompt, sum(counts), num_slots, bare=bare)
        self.positions_AZ = self.spans.pick(self.spans.positions)
        self.rows = [row for row, count in enumerate(counts) for _ in range(count)]  # of every answer
        self.everything = list(range(len(self.rows)))
        self.prefixes = [shared_prefix(model, prompt, row, image) for row, image in enumerate(images)]
        self.own = region_spans(model, prompt, self.prefixes)
        if compiled:
            for prefix in self.prefixes:
                mark_dynamic(prefix, 2)
            mark_dynamic(self.own, 0)
        self._choose(self.everything)

    def __call__(self, slots_AG: torch.Tensor, running: list[int] | None = None) -> torch.Tensor:
        """Hidden states (A', G, D) for the slots (A', G) of the running answers, by default all."""
        ids, positions = self.tokens(slots_AG, running)
        language_model = self.model.language_model
        run = language_model.compiled if self.compiled else language_model
        embeds = self.model.get_input_embeddings()(ids)
        hidden = run(embeds, positions, StaticPass(self.runs, self.own, self.index))
        return hidden[self.first_lanes if self.lanes is not None else slice(None), self.spans.slots]

    @property
    def joins_with(self) -> tuple[int, int, bool] | None:
        """Passes of equal values can run together; None: these run alone."""
        if self.compiled:
            return None
        return self.spans.width, self.spans.num_slots, self.own is not None

    def tokens(self, slots_AG: torch.Tensor, running: list[int] | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and positions (A', Z) of a pass, which is counted; `runs` and `index` then describe it."""
        self.count += 1
        if (running or self.everything) != self.running:
            self._choose(running or self.everything)
        slots = slots_AG if self.lanes is None else slots_AG[self.lanes]
        positions = self.positions_AZ if self.index is None else self.positions_AZ[self.index]
        return self.spans.enclose(slots, self.index), positions

    def _choose(self, running: list[int]) -> None:
        """Which answers run from now on; `index` is None for all of them in order, `lanes` None without padding."""
        self.running, self.lanes, answers = running, None, running
        device = self.positions_AZ.device
        if self.compiled:
            lanes = self._padded(running)
            answers = [running[lane] for lane in lanes]
            self.lanes = torch.tensor(lanes, device=device)
            self.first_lanes = torch.tensor([lanes.index(place) for place in range(len(running))], device=device)
        counts = Counter(self.rows[answer] for answer in answers)
        self.runs = [(self.prefixes[row], count) for row, count in sorted(counts.items())]
        everything = answers == self.everything and not self.compiled  # compiled passes have one shape of inputs
        self.index = None if everything else torch.tensor(answers, device=device)

    def _padded(self, running: list[int]) -> list[int]:
        """Places in `running`, each row's repeated up to a power of two, so that few shapes occur."""
        lanes: list[int] = []
        for _, places in groupby(range(len(running)), key=lambda place: self.rows[running[place]]):
            own = list(places)
            lanes += own + own[-1:] * ((1 << (len(own) - 1).bit_length()) - len(own))
        return lanes


def join_spans(members: Sequence[StaticPasses]) -> KeyValues | None:
    """The RoI spans of several passes one after the other; None where regions have none."""
    own = [passes.own for passes in members if passes.own is not None]
    if not own:
        return None
    joined = KeyValues(len(own[0].layers))
    for layer, pairs in enumerate(zip(*(kept.layers for kept in own), strict=True)):
        joined.put(layer, *(torch.cat(tensors) for tensors in zip(*pairs, strict=True)))
    return joined


def run_joined(
    model: Any,
    members: Sequence[StaticPasses],
    slots: Sequence[tuple[torch.Tensor, list[int] | None]],
    spans: KeyValues | None,
) -> list[torch.Tensor]:
    """One pass over the running answers of several `StaticPasses` whose `joins_with` are equal.

    Args:
        slots: ids (A', G) and running answers of each, as for its own call.
        spans: what `join_spans` made of the members.
    Returns:
        hidden states (A', G, D) of each.
    """
    ids, positions = zip(*(passes.tokens(*own) for passes, own in zip(members, slots, strict=True)), strict=True)
    index = None
    if spans is not None:
        chosen, first = [], 0
        for passes in members:
            chosen += [first + answer for answer in passes.running]
            first += len(passes.everything)
        index = torch.tensor(chosen, device=ids[0].device)
    runs = [run for passes in members for run in passes.runs]
    embeds = model.get_input_embeddings()(torch.cat(ids))
    hidden = model.language_model(embeds, torch.cat(positions), StaticPass(runs, spans, index))
    return [part[:, members[0].spans.slots] for part in hidden.split([len(part) for part in ids])]


def mark_dynamic(kept: KeyValues | None, dimension: int) -> None:
    """Let one compiled graph serve prefixes of any length, or any number of RoI spans."""
    for pair in kept.layers if kept is not None else ():
        for tensor in pair:
            torch._dynamo.maybe_mark_dynamic(tensor, dimension)


class PackedPasses:
    """Passes over whole rows, or over the answers alone behind a prompt that is refreshed now and then.

    Args:
        model, prompt, num_slots: as for `StaticPasses`.
        refresh_interval: every how many passes whole rows are run.
        compiled: run passes through `torch.compile`.
    """

    answers_can_leave = False
    joins_with = None

    def __init__(self, model: Any, prompt: Prompt, num_slots: int, refresh_interval: int = 1, compiled: bool = False):
        self.model, self.prompt, self.refresh_interval = model, prompt, refresh_interval
        self.compiled, self.count = compiled, 0
        answers = int(prompt.num_regions.clamp(min=1).sum())
        self.spans = model.place_answers(prompt, answers, num_slots, bare=not prompt.num_regions.any())
        rows = self.spans.roles
        self.whole = model.config.layout.allowed(prompt.roles.cat(rows), prompt.roles.cat(rows))
        self.between, self.cache = self.whole, None
        if refresh_interval > 1:
            self.between = self.whole[:, :, prompt.ids.shape[1] :]
            layers = model.config.text_config.num_hidden_layers
            self.cache = PackedCache(layers, self.whole.shape[-1])

    def __call__(self, slots_AG: torch.Tensor, running: list[int] | None = None) -> torch.Tensor:
        """Hidden states (A, G, D) for the slots (A, G) of all answers."""
        assert running is None  # answers see each other: none leaves
        whole = self.count % self.refresh_interval == 0
        self.count += 1
        if self.cache is not None and whole:
            self.cache.length = 0
        allowed = self.whole if whole else self.between
        ids_AZ = self.spans.enclose(slots_AG)
        hidden_AZD = run_packed(self.model, self.prompt, self.spans, ids_AZ, allowed, self.cache, self.compiled)
        if self.cache is not None and whole:
            self.cache.keep(self.prompt.ids.shape[1])
        return hidden_AZD[:, self.spans.slots]


def run_packed(
    model: Any,
    prompt: Prompt,
    spans: AnswerSpans,
    ids_AZ: torch.Tensor,
    allowed: torch.Tensor,
    cache: PackedCache | None = None,
    compiled: bool = False,
) -> torch.Tensor:
    """Hidden states (A, Z, D) of whole spans; prompt tokens that a cache holds are not run again.

    Args:
        ids_AZ: of the spans; allowed: bool (B, 1, queries, keys) for the tokens that are run.
    """
    new = prompt if cache is None else prompt.tokens(cache.length)
    answers_BXD = model.get_input_embeddings()(spans.lay_out(ids_AZ))
    embeds = torch.cat((new.embeds, answers_BXD), dim=1)
    positions = torch.cat((new.positions, spans.positions), dim=1)
    run = model.language_model.compiled if compiled else model.language_model
    hidden = run(embeds, positions, MaskedPass(allowed, cache))
    return spans.pick(hidden[:, -answers_BXD.shape[1] :])
