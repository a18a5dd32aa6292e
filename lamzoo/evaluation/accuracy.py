"""Top-1 and top-5 accuracy, accumulated batch by batch."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lamzoo.data import BadInput, LabelledImages
from lamzoo.data.images.validation import check_image
from lamzoo.errors import DataError
from lamzoo.evaluation.classification.imagenet_real import RealLabels
from lamzoo.evaluation.resume import EvalState
from lamzoo.evaluation.runtime import check_logits

_logger = logging.getLogger(__name__)
#: The label of an image that could not be read.
BAD_LABEL = -1


@dataclass(frozen=True)
class EvalResult:
    """Accuracy of a classifier on a data set.

    Attributes:
        top1: top-1 accuracy in percent.
        top5: top-5 accuracy in percent; None below five classes, where it is trivial.
        samples: number of images scored.
        seconds: wall time, including reading, decoding and the time before a resumption.
        images_per_s: ``samples / seconds``.
        skipped: number of unreadable images that were left out; not counted in ``samples``.
        bad_images: the skipped images, with reasons.
        real_top1: top-1 accuracy on ReaL labels in percent: a guess is correct if it is any of an image's labels; None
            without ReaL labels.
        real_top5: top-5 accuracy on ReaL labels, likewise.
        real_samples: number of scored images with at least one ReaL label.
    """

    top1: float
    top5: float | None
    samples: int
    seconds: float
    images_per_s: float
    skipped: int = 0
    bad_images: tuple[BadInput, ...] = ()
    real_top1: float | None = None
    real_top5: float | None = None
    real_samples: int | None = None


class AccuracyCounter:
    """Counts correct predictions on a data set.

    Args:
        dataset: the images.
        num_classes: number of classes of the model.
        real: ReaL labels to score against as well.
        skip: leave out images labelled :data:`BAD_LABEL` instead of raising an error.
    """

    def __init__(self, dataset: LabelledImages, num_classes: int, *, real: RealLabels | None, skip: bool) -> None:
        self._dataset = dataset
        self._num_classes = num_classes
        self._real = real
        self._skip = skip

    def add(self, done: EvalState, batch: Sequence[int], logits: Tensor, labels: Tensor, seconds: float) -> EvalState:
        """Adds a batch to the counts.

        Args:
            done: the counts so far.
            batch: indices of the images in the data set.
            logits: ``(B, num_classes)``.
            labels: ``(B,)``, on the same device as the logits.
            seconds: time since the start.

        Returns:
            The updated counts.

        Raises:
            ConfigError, UnsupportedHostError: as of :func:`lamzoo.evaluation.runtime.check_logits`.
            DataError: a label is not a class of the model, or an image has no entry among the ReaL labels.
        """
        check_logits(logits, self._num_classes)
        self._check(labels)
        guesses = logits.float().topk(min(5, logits.shape[1]), dim=1).indices
        hits = guesses == labels[:, None]  # BAD_LABEL never matches
        bad = [index for index, label in zip(batch, labels.tolist(), strict=True) if label == BAD_LABEL]
        for image in map(self._bad_image, bad):
            _logger.warning("left out %s: %s", image.filename, image.reason)
        ranks = self._real_ranks(batch, guesses, bad)
        return EvalState(
            seen=done.seen + len(labels),
            correct1=done.correct1 + int(hits[:, 0].sum()),
            correct5=done.correct5 + int(hits.sum()),
            bad=(*done.bad, *bad),
            real_seen=done.real_seen + len(ranks),
            real_correct1=done.real_correct1 + ranks.count(0),
            real_correct5=done.real_correct5 + len(ranks) - ranks.count(None),
            seconds=seconds,
        )

    def top5(self, done: EvalState) -> float | None:
        """Returns the top-5 accuracy so far, in percent; None below five classes."""
        return 100 * done.correct5 / done.scored if self._num_classes >= 5 and done.scored else None

    def result(self, done: EvalState) -> EvalResult:
        """Returns the final scores.

        Raises:
            DataError: no image could be read.
        """
        if not done.scored:
            raise DataError(f"none of the {done.seen} images of {self._dataset.spec} can be read; use another data set")
        real_seen = done.real_seen
        return EvalResult(
            top1=done.top1,
            top5=self.top5(done),
            samples=done.scored,
            seconds=done.seconds,
            images_per_s=done.scored / done.seconds,
            skipped=len(done.bad),
            bad_images=tuple(map(self._bad_image, done.bad)),
            real_top1=100 * done.real_correct1 / real_seen if real_seen else None,
            real_top5=100 * done.real_correct5 / real_seen if real_seen and self._num_classes >= 5 else None,
            real_samples=None if self._real is None else real_seen,
        )

    def _check(self, labels: Tensor) -> None:
        highest, lowest = int(labels.max()), int(labels.min())
        if highest >= self._num_classes:
            raise DataError(
                f"{self._dataset.spec} has a label {highest} and the model has {self._num_classes} classes; "
                "they do not match"
            )
        if lowest < 0 and not (self._skip and lowest == BAD_LABEL):
            raise DataError(f"{self._dataset.spec} has the label {lowest}; labels must be class indices from 0")

    def _real_ranks(self, batch: Sequence[int], guesses: Tensor, skipped: Sequence[int]) -> list[int | None]:
        """Returns the rank, from 0, of the first correct guess for each image with ReaL labels; None without one."""
        ranks: list[int | None] = []
        if self._real is None:
            return ranks
        for index, guessed in zip(batch, guesses.tolist(), strict=True):
            right = () if index in skipped else self._real.of(self._dataset.filename(index))
            if right:
                ranks.append(next((rank for rank, label in enumerate(guessed) if label in right), None))
        return ranks

    def _bad_image(self, index: int) -> BadInput:
        reason = check_image(self._dataset, index) or "the first attempt to read it failed"
        return BadInput(index, self._dataset.filename(index), reason)
