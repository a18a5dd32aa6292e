"""Finding the images of a data set that cannot be used, before a long run stumbles over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from lamzoo.data.images.decode import unreadable_because
from lamzoo.data.images.image_dataset import LabelledImages
from lamzoo.data.images.selection import select
from lamzoo.data.validation import BadInput, OnBadInput, check_on_bad, find_bad, place, usable
from lamzoo.errors import DataError

_CHUNK = 32  # images from one report of a worker to the next


def why_bad(dataset: LabelledImages, index: int) -> str | None:
    """Reads one image whole, without the data set's transforms; returns what is wrong with it, or ``None``."""
    try:
        dataset.decode(index)
    except DataError as error:
        return unreadable_because(error)
    return None


def find_bad_images(
    dataset: LabelledImages, *, workers: int = 0, progress: Callable[[int, int], None] | None = None
) -> list[BadInput]:
    """Reads every image of a data set and lists those that are broken or have no valid label.

    Args:
        dataset: its transforms are neither used nor changed.
        workers: processes that read images; 0 reads in this one.
        progress: called with the images read and their total, from time to time.

    Returns:
        The bad ones, in the data set's order.

    Raises:
        ConfigError: a negative number of workers.
    """
    return find_bad(dataset, partial(why_bad, dataset), chunk=_CHUNK, workers=workers, progress=progress)


def set_aside_bad(
    dataset: LabelledImages,
    on_bad: OnBadInput,
    *,
    workers: int = 0,
    every_class: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[LabelledImages, list[BadInput]]:
    """Searches a data set for bad images, and either leaves them out or refuses the data set.

    Args:
        dataset: left as it is.
        on_bad: ``"stop"`` raises if there is any; ``"skip"`` goes on without them.
        workers: as of :func:`find_bad_images`.
        every_class: refuse to lose the last image of a class, as training must; a split that is only scored can do
            without.
        progress: as of :func:`find_bad_images`.

    Returns:
        The data set without its bad images, itself where there are none, and the bad ones.

    Raises:
        ConfigError: ``on_bad`` or ``workers`` is not possible.
        DataError: there are bad images and ``on_bad`` is ``"stop"`` (names the first, and says how many); or no image
            is left, or none of a class that had some.
    """
    check_on_bad(on_bad)
    bad = find_bad_images(dataset, workers=workers, progress=progress)
    return leave_out_bad(dataset, bad, on_bad, every_class=every_class), bad


def leave_out_bad(
    dataset: LabelledImages, bad: Sequence[BadInput], on_bad: OnBadInput, *, every_class: bool = True
) -> LabelledImages:
    """Does what :func:`set_aside_bad` does once the bad images are known; arguments and errors as there."""
    if not bad:
        return dataset
    kept = select(dataset, usable(dataset, bad, on_bad, "images"))
    if every_class:
        _check_classes(dataset, {image.index for image in bad}, place(dataset))
    return kept


def _check_classes(dataset: LabelledImages, wrong: set[int], where: str) -> None:
    """Raises if a class loses its last image; labels that are no class numbers are among the wrong ones."""
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
            f"no usable image is left of the class {name} of {where}{more}; replace {filename}, or remove the class"
        )
