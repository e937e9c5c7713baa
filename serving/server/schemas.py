"""What clients send, as pydantic models: every field is named, and unknown ones are refused."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field


Number = Annotated[float, Field(allow_inf_nan=False)]
Ring = list[Number]
Point = tuple[Number, Number]
Box = tuple[Number, Number, Number, Number]


class Strict(BaseModel):
    """A model that refuses what it does not know."""

    model_config = ConfigDict(extra="forbid")


class RunLengths(Strict):
    """A mask as COCO run lengths."""

    size: tuple[int, int] = Field(description="height and width of the image, in pixels")
    counts: str | list[int] = Field(description="compressed as COCO writes it, or the run lengths themselves")


Mask = RunLengths | Ring | list[Ring] | str


class Regions(Strict):
    """Where the regions are: masks, boxes and points together, or a text, or everything."""

    masks: list[Mask] | None = Field(
        None,
        description="an entry per region: run lengths, a polygon x0, y0, x1, y1, ... or several rings of one region, "
        "in pixels, or a mask picture of the image's size as base64 or data: URL",
    )
    boxes: list[Box] | None = Field(None, description="x0, y0, x1, y1 in pixels, half-open")
    points: list[Point | list[Point]] | None = Field(
        None, description="an entry per region: x, y in pixels, or several points of one region; needs a segmenter"
    )
    point_labels: list[int | list[int]] | None = Field(
        None, description="in the nesting of points: 1 inside the region, 0 outside"
    )
    text: str | None = Field(None, description="what to find, such as 'red car'; needs a segmenter that reads texts")
    everything: bool = Field(False, description="find all regions; needs a segmenter")


class Settings(Strict):
    """How answers are decoded, see PerceptionDLMGenerationConfig; what is left out is the server's default."""

    preset: str | None = None
    steps: int | None = None
    max_new_tokens: int | None = None
    block_length: int | None = None
    sampler: str | None = None
    threshold: float | None = None
    entropy_bound: float | None = None
    naming_threshold: float | None = None
    early_exit: bool | None = None
    remasking: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def given(self) -> dict[str, Any]:
        """Those that are given, as keywords of `generate`."""
        return self.model_dump(exclude_none=True)


class CaptionRequest(Regions):
    """Regions of one image, to be captioned. In a form (multipart) image and mask pictures come as files instead."""

    image: str | None = Field(None, description="base64 of a picture, a data: URL, or an address where allowed")
    question: str | None = Field(None, description="asked instead of the default one")
    settings: Settings = Field(default_factory=Settings)
    max_tiles: int | None = Field(None, ge=1, description="most tiles that the image is cut into")
    exif: Literal["stored", "applied"] | None = Field(
        None, description="regions refer to the pixels as stored, or to the picture with its orientation applied"
    )
    return_masks: bool = Field(False, description="send each region's mask back as run lengths")
    stream: bool = Field(False, description="server-sent events: drafts, then the result")


class ImageUrl(BaseModel):
    url: str
    detail: str | None = None


class ContentPart(BaseModel):
    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageUrl | str | None = None


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ContentPart]


class ChatRequest(Strict):
    """A conversation about images, or about regions of one image, in the form of OpenAI's chat completions.

    Besides that form: `regions`, `settings` and `max_tiles`. Keywords of autoregressive decoding are accepted where
    they ask for nothing.
    """

    model: str | None = None
    messages: list[Message] = Field(min_length=1)
    regions: Regions | None = Field(
        None, description="regions of the one image; without it, a transparent part of the image marks its region"
    )
    settings: Settings = Field(default_factory=Settings)
    max_tiles: int | None = Field(None, ge=1)
    stream: bool = False
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    n: Literal[1] | None = None
    num_beams: Literal[1] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logprobs: Literal[False] | None = None
    stop: None = None
    use_cache: bool | None = None
    stream_options: dict[str, Any] | None = None
    user: str | None = None

    def given_settings(self, slots: int) -> dict[str, Any]:
        """Keywords of `generate`: `settings` over what the form of OpenAI has for them.

        Args:
            slots: of an answer by default; `max_tokens` asks for fewer, never for more.
        """
        given = {"temperature": self.temperature, "top_p": self.top_p, "seed": self.seed}
        most = self.max_completion_tokens or self.max_tokens
        if most is not None and most < slots:
            given["max_new_tokens"] = most
        return {name: value for name, value in given.items() if value is not None} | self.settings.given()
