"""Finding the invalid images of a data set before a long run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from lamzoo.data.images.decode import unreadable_because
from lamzoo.data.images.image_dataset import LabelledImages
from lamzoo.data.images.selection import select
from lamzoo.data.validation import BadInput, OnBadInput, check_on_bad, find_invalid, place, valid_indices
from lamzoo.errors import DataError

_CHUNK = 32  # images per report of a worker


def check_image(dataset: LabelledImages, index: int) -> str | None:
    """Decodes one image, without the data set's transforms; returns why it is invalid, or ``None``."""
    try:
        dataset.decode(index)
    except DataError as error:
        return unreadable_because(error)
    return None


def find_invalid_images(
    dataset: LabelledImages, *, workers: int = 0, progress: Callable[[int, int], None] | None = None
) -> list[BadInput]:
    """Decodes every image of a data set and returns those that are damaged or have an invalid label.

    Args:
        dataset: its transforms are neither used nor changed.
        workers: worker processes; 0 runs in the main process.
        progress: called with the number of images read and their total.

    Returns:
        The invalid images, in the data set's order.

    Raises:
        ConfigError: a negative number of workers.
    """
    return find_invalid(dataset, partial(check_image, dataset), chunk=_CHUNK, workers=workers, progress=progress)


def set_aside_invalid(
    dataset: LabelledImages,
    on_bad: OnBadInput,
    *,
    workers: int = 0,
    every_class: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[LabelledImages, list[BadInput]]:
    """Checks every image of a data set, and leaves out the invalid ones or refuses the data set.

    Args:
        dataset: is not changed.
        on_bad: ``"stop"`` raises an error if an image is invalid; ``"skip"`` leaves out the invalid images.
        workers: see :func:`find_invalid_images`.
        every_class: raise an error if a class loses its last image; required for training, not for evaluation.
        progress: see :func:`find_invalid_images`.

    Returns:
        The data set without its invalid images, or ``dataset`` itself if there are none; and the invalid images.

    Raises:
        ConfigError: an invalid ``on_bad`` or ``workers``.
        DataError: images are invalid and ``on_bad`` is ``"stop"`` (with their number and the first of them), no image
            is left, or a class loses its last image.
    """
    check_on_bad(on_bad, "on_bad")
    bad = find_invalid_images(dataset, workers=workers, progress=progress)
    return leave_out_invalid(dataset, bad, on_bad, every_class=every_class), bad


def leave_out_invalid(
    dataset: LabelledImages, bad: Sequence[BadInput], on_bad: OnBadInput, *, every_class: bool = True
) -> LabelledImages:
    """Leaves out known invalid images; arguments and errors as for :func:`set_aside_invalid`."""
    if not bad:
        return dataset
    kept = select(dataset, valid_indices(dataset, bad, on_bad, "images"))
    if every_class:
        _check_classes(dataset, {image.index for image in bad}, place(dataset))
    return kept


def _check_classes(dataset: LabelledImages, wrong: set[int], where: str) -> None:
    """Raises if a class loses its last image; images whose label is not a class number are in ``wrong``."""
    given = dataset.source.labels()
    left = {int(label) for index, label in enumerate(given) if index not in wrong}
    lost: dict[int, str] = {}
    for index in sorted(wrong):
        label = given[index]
        if dataset.is_label(label) and int(label) not in left:
            lost.setdefault(int(label), dataset.filename(index))
    if lost:
        label, filename = next(iter(lost.items()))
        name = str(label) if dataset.classes is None else repr(dataset.classes[label])
        more = f", nor of {len(lost) - 1} other classes" if len(lost) > 1 else ""
        raise DataError(
            f"no valid image is left of the class {name} of {where}{more}; replace {filename}, or remove the class"
        )
