"""What a run trains on, as typed settings: sources, limits, order, answers and noise. The loader builds them from YAML.

The data they describe is built by two calls::

    dataset = build_dataset(run.data, run.loss, processor, model.config, cache_dir)     # training.mixture
    collator = AnswerCollator.build(run.data, run.loss, processor, model.config)        # training.collator

`dataset` is a map-style `MixtureDataset` (`set_epoch`, `epoch`, `len`, `lengths` of every sample in tokens, `report`
for the run's summary), to be read in the order of `LengthGroupedBatches` (batches.py). When its sources stream it is a
`StreamingDataset`, to be read in the order of `StreamOrder` (streaming.py).
"""

from dataclasses import dataclass, field


SOURCE_KINDS = ("scenes", "scene_conversations", "conversations", "regions", "named_regions")
REGION_KINDS = ("scenes", "regions", "named_regions")
TURNS = ("one", "all", "all_in_one")
NOISE_LEVELS = ("region", "sample")
WEIGHTINGS = ("elbo", "masked", "released")


@dataclass
class SourceConfig:
    """One part of a mixture.

    Args:
        kind: `scenes` (drawn regions), `scene_conversations` (drawn questions about whole images), `conversations`
            (parquet), `regions` (captioned, JSON or JSON lines, also .gz) or `named_regions` (COCO instances or
            panoptic, LVIS, or region JSON, captioned by what is true of them).
        path: of a file, a folder or a glob, for sets on disk.
        hub: id of a conversation set on the Hugging Face Hub, instead of `path`; `subset` and `split` choose its part.
        samples: records (rows, images, scenes) an epoch takes: fewer than the set holds are a fixed random subset,
            more repeat it. Default: every record once. Drawn sources have no end and need it. Epochs of a stream that
            take less than the set go on where the one before stopped, so that rows are repeated only after all.
        streaming: read the parquet files of `conversations` from front to back (sets too large to look through first).
        image_root: folder that the image paths of a set are relative to; default: the folder of its file.
        turns: of a conversation, `one` turn drawn per epoch; `all` turns, each a sample; or `all_in_one`, all turns of
            a row in one sequence, whose prompt is paid once (layout `isolated`). Earlier turns are context. A row of a
            stream is one sample, so that `all` is not for streams.
        seed: of the drawn world.
        conversation_share: share of `scenes` that are asked about the whole image instead, in [0, 1].
        general_share: share of `named_regions` captioned with a word more general than their name, in [0, 1): the more,
            the surer the model must be to say a name.
        augment: whether `named_regions` are mirrored and cut out of their picture at random.
        variants: of a picture that `augment` makes in all, the first the picture as it is: with a few, a frozen tower's
            features of them can be kept (`train.tower_features`). Default: new ones in every epoch.

    Raises:
        ValueError: naming the setting, its value and what is accepted.
    """

    kind: str
    path: str | None = None
    hub: str | None = None
    subset: str | None = None
    split: str = "train"
    samples: int | None = None
    streaming: bool = False
    image_root: str | None = None
    turns: str = "one"
    seed: int = 1
    conversation_share: float = 0.0
    general_share: float = 0.25
    augment: bool = True
    variants: int | None = None

    def __post_init__(self):
        _check_choice("sources.kind", self.kind, SOURCE_KINDS)
        _check_choice("sources.turns", self.turns, TURNS)
        if self.samples is not None and self.samples < 1:
            raise ValueError(f"sources.samples must be at least 1, got {self.samples}")
        if not 0 <= self.conversation_share <= 1:
            raise ValueError(f"sources.conversation_share must be in [0, 1], got {self.conversation_share}")
        if not 0 <= self.general_share < 1:
            raise ValueError(f"sources.general_share must be in [0, 1), got {self.general_share}")
        if self.variants is not None and (self.variants < 1 or not self.augment):
            raise ValueError(f"sources.variants must be at least 1 and needs augment, got {self.variants}")
        given = " and ".join(name for name in ("path", "hub") if getattr(self, name) is not None)
        on_disk = {"conversations": ("path", "hub"), "regions": ("path",), "named_regions": ("path",)}
        accepted = on_disk.get(self.kind, ("",))
        if given not in accepted:
            needed = " or ".join(accepted) or "neither path nor hub"
            raise ValueError(f"a source of kind {self.kind!r} needs {needed}, got {given or 'neither'}")
        if self.streaming and self.kind != "conversations":
            raise ValueError(f"streaming is for sources of kind 'conversations', got kind {self.kind!r}")
        if self.streaming and self.turns == "all":
            raise ValueError(
                "a row of a stream is one sample: set sources.turns to 'one' or 'all_in_one', or streaming to false"
            )
        if self.samples is None and self.is_drawn:
            raise ValueError("a drawn source has no end: set sources.samples")

    @property
    def is_drawn(self) -> bool:
        """Whether the source is drawn by code."""
        return self.kind.startswith("scene")

    @property
    def name(self) -> str:
        """What messages, reports and noise seeds call the source."""
        return f"{self.kind}-{self.seed}" if self.is_drawn else str(self.path or self.hub)


@dataclass
class DataConfig:
    """The mixture of a run and how it is read.

    The first `coarse_epochs` are a curriculum: every image is a single tile and only the first `coarse_slots` of an
    answer are trained ("a large striped red house"). Nothing but the region tells these words, so seeing is learned
    first, on short sequences; the rest of the caption comes after.

    Args:
        sources: parts of the mixture.
        seed: decides subsets, dealing of masks, drawn turns and prompt ids, and noise.
        max_length: tokens of a sequence, answers included. Image tokens are never cut: answers are (whole slots), and
            what leaves no room for an answer is left out and counted as too long.
        max_bad_share: share of unreadable records of a source above which the run stops.
        group_by_length: whether a batch holds samples of similar length.
        prepared: folder where `perceptiondlm prepare` leaves what it finds, and training looks for it; default: the
            run's `trainer.output_dir`.
    """

    sources: list[SourceConfig] = field(default_factory=list)
    seed: int = 0
    max_length: int = 4096
    max_bad_share: float = 0.01
    group_by_length: bool = True
    prepared: str | None = None
    coarse_epochs: int = 0
    coarse_slots: int | None = None

    def __post_init__(self):
        if self.max_length < 1:
            raise ValueError(f"data.max_length must be at least 1, got {self.max_length}")
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"data.max_bad_share must be in [0, 1], got {self.max_bad_share}")
        if len({source.streaming for source in self.sources}) > 1:
            raise ValueError("either all data.sources stream or none: they are read in different orders")

    @property
    def streaming(self) -> bool:
        """Whether the mixture is read as a stream."""
        return any(source.streaming for source in self.sources)


@dataclass
class LossConfig:
    """Answers, their noise (equation 1) and the loss (equation 2) with its variance reductions.

    Args:
        num_slots: an answer takes a multiple of this many slots, filled with end-of-text tokens, because generation
            works in slots. A model with `supervise_markers` trains answers of their own length instead.
        max_slots: most slots of an answer, `num_slots` by default; longer answers are cut.
        noise_copies: noised copies of an answer; two are antithetic and mask every token exactly once.
        noise_level: t is drawn per `region` (answer), stratified over the answers of a sample, or once per `sample`.
        weighting: see `masked_diffusion_loss`: "elbo" (1/p, the paper), "masked" (mean over masked tokens, bounded
            weights), or "released" (1/p, every micro-batch divided by its own tokens).
    """

    num_slots: int = 32
    max_slots: int | None = None
    noise_copies: int = 2
    noise_level: str = "region"
    weighting: str = "masked"

    def __post_init__(self):
        _check_choice("loss.noise_level", self.noise_level, NOISE_LEVELS)
        _check_choice("loss.weighting", self.weighting, WEIGHTINGS)
        _check_choice("loss.noise_copies", self.noise_copies, (1, 2))
        if self.num_slots < 1:
            raise ValueError(f"loss.num_slots must be at least 1, got {self.num_slots}")
        if self.max_slots is not None and (self.max_slots < self.num_slots or self.max_slots % self.num_slots):
            raise ValueError(f"loss.max_slots must be a multiple of num_slots={self.num_slots}, got {self.max_slots}")

    @property
    def slot_limit(self) -> int:
        """Most slots of an answer."""
        return self.max_slots or self.num_slots


def _check_choice(name: str, value: object, accepted: tuple) -> None:
    if value not in accepted:
        raise ValueError(f"{name} must be one of {accepted}, got {value!r}")
