"""The regions of a part through the model, in batches of regions; what the plain path and Ray's actors both run."""

import argparse
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from perceptiondlm.common.loading import load_pipeline
from perceptiondlm.pipeline_perceptiondlm import PreparedSample
from perceptiondlm.samples_perceptiondlm import BAD_SAMPLE
from perceptiondlm.serving.annotate.job import AnnotationJob
from perceptiondlm.serving.annotate.plan import PartResult, write_part
from perceptiondlm.serving.annotate.reading import PreparedImage, PreparedPart, failure, measure, segmented
from perceptiondlm.serving.attributes import parse_attributes
from perceptiondlm.serving.records import caption_tokens, region_record
from perceptiondlm.serving.segmenters import load_segmenter


logger = logging.getLogger(__name__)


class Captioner:
    """A model, ready to caption the parts of a job.

    Args:
        job: settled.
        device: where the model is put, by default the job's.

    Raises:
        ValueError: for a model, device or settings that cannot be.
    """

    def __init__(self, job: AnnotationJob, device: str | None = None):
        self.job = job
        device = device or job.device
        chosen = {"model": job.model, "device": device, "dtype": job.dtype, "quantize": job.quantize}
        self.pipe: Any = load_pipeline(argparse.Namespace(**chosen))
        self.pipe.model.eval()
        self.pipe.model._settings_and_inputs(None, dict(job.generate))  # refuses settings before any work
        self.processor = self.pipe.processor
        self.question = job.question or self.processor.region_question
        self.attributes = parse_attributes(job.attributes) if job.attributes else []
        named = job.regions.segmenter
        self.segmenter = load_segmenter(named, device) if job.regions.needs_model and named else None
        self.limit = job.regions_per_batch
        self.went_through = job.retry is not None

    def __call__(self, part: PreparedPart) -> dict[str, int]:
        """Caption a part's regions, write its file, and say how many there were."""
        result = self.captioned(part)
        write_part(self.job.folder, result)
        return result.summary()

    def captioned(self, part: PreparedPart) -> PartResult:
        """The records, images and failures of a part, in the source's order."""
        images = [self._found(image) for image in part.images]
        answers: dict[int, list[dict[str, Any]]] = {}
        failures = {place: list(image.failures) for place, image in enumerate(images)}
        for batch in batches(images, self.limit):
            for place, answered in self._answers(images, batch):
                if isinstance(answered, Exception):
                    record = images[place].record
                    failures[place].append(failure(record["id"], record["image"], answered))
                else:
                    answers[place] = answered
        records, read = [], []
        for place, image in enumerate(images):
            if any(entry["kind"] == "image" for entry in failures[place]):
                continue
            told = zip(image.keys, image.found, answers.get(place, []), image.spans, strict=True)
            made = (self.job.model_name, self.job.shown_settings)
            rows = [region_record(image.record, key, region, answer, *made, span) for key, region, answer, span in told]
            records += rows
            read.append({**image.record, "regions": len(rows), "part": part.number})
        failed = [entry | {"place": images[place].record["place"]} for place in failures for entry in failures[place]]
        return PartResult(part.number, records, read, failed)

    def _found(self, image: PreparedImage) -> PreparedImage:
        """The image with the regions that a segmenter on this device finds."""
        if image.picture is None or self.segmenter is None:
            return image
        try:
            found = segmented(self.job, self.segmenter, image.picture, image.found)
            measure(image, found, image.picture, self.job, self.processor)
        except BAD_SAMPLE as error:
            return PreparedImage(image.record, failures=[failure(image.record["id"], image.record["image"], error)])
        return image

    def _answers(
        self, images: Sequence[PreparedImage], batch: list[int]
    ) -> Iterator[tuple[int, list[dict[str, Any]] | Exception]]:
        """Answers of a batch's images; where it fails as a whole, of each by itself, or its error.

        A batch that does not fit the device's memory is halved, and so are those of later parts.
        """
        try:
            results = self._generate([images[place] for place in batch])
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            if torch.accelerator.is_available():
                torch.accelerator.empty_cache()
            self.limit = min(self.limit, max(1, sum(len(images[place].found) for place in batch) // 2))
            logger.warning("a batch did not fit into memory: %s regions at a time from now on", self.limit)
            for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
                yield from self._answers(images, half)
            return
        except BAD_SAMPLE as error:
            if len(batch) == 1:
                if not self.went_through:  # the model fails whatever it is given
                    raise
                yield batch[0], error
                return
            for place in batch:
                yield from self._answers(images, [place])
            return
        self.went_through = True
        yield from zip(batch, results, strict=True)

    def _generate(self, images: Sequence[PreparedImage]) -> list[list[dict[str, Any]]]:
        """One call of the model: for every image an answer per region, in their order."""
        samples = [PreparedSample(None, self.question, passes=image.passes) for image in images]
        output = self.pipe.forward(self.pipe.preprocess(samples), **self.job.generate)["output"]
        answers = self.processor.post_process_region_captions(output, True, len(images))
        if self.job.tokens:
            places = iter([answer for image in answers for answer in image])
            rows = zip(output.sequences.tolist(), output.confidences.tolist(), strict=True)
            for answer, (ids, confidences) in zip(places, rows, strict=True):
                answer["tokens"] = caption_tokens(ids, confidences, self.processor.tokenizer)
        for part in self._portions(images):
            for image, told in zip(part, self._attributes([images[place] for place in part]), strict=True):
                for answer, values in zip(answers[image], told, strict=True):
                    answer["attributes"] = values
        return answers

    def _portions(self, images: Sequence[PreparedImage]) -> Iterator[list[int]]:
        """Places of images whose regions, one row per attribute, make batches; nothing where none is asked for."""
        if self.attributes:
            yield from batches(images, max(1, self.limit // len(self.attributes)))

    def _attributes(self, images: Sequence[PreparedImage]) -> list[list[dict[str, Any]]]:
        """Answers about every region of some images: attribute to value and score; each image is encoded once."""
        count = len(self.attributes)
        rows = [
            row
            for place, image in enumerate(images)
            for number, one in enumerate(self.attributes)
            for row in self.processor.lay_out(image.passes, one.question, place * count + number)
        ]
        output = self.pipe.forward(dict(self.processor.collate(rows)), **self.job.generate)["output"]
        answers = self.processor.post_process_region_captions(output, True, len(images) * count)
        return [
            [
                {
                    one.name: {"value": a["caption"], "score": a["score"]}
                    for one, a in zip(self.attributes, region, strict=True)
                }
                for region in zip(*answers[place * count : (place + 1) * count], strict=True)
            ]
            for place in range(len(images))
        ]


def batches(images: Sequence[PreparedImage], limit: int) -> Iterator[list[int]]:
    """Places of images that have regions, of like size next to each other, in batches of at most `limit` regions.

    An image with more regions makes a batch by itself, which the model runs in several passes.
    """
    filled = [place for place, image in enumerate(images) if image.passes]
    filled.sort(key=lambda place: (tiles_of(images[place]), len(images[place].found), place))
    batch: list[int] = []
    count = 0
    for place in filled:
        regions = len(images[place].found)
        if batch and count + regions > limit:
            yield batch
            batch, count = [], 0
        batch.append(place)
        count += regions
    if batch:
        yield batch


def tiles_of(image: PreparedImage) -> int:
    """Tiles of an image, which decide how long its prompt is."""
    return len(image.passes[0]["tiles"])
