"""Finding the images of a data set that cannot be used, before a long run stumbles over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch.utils.data import DataLoader, Dataset

from lamzoo.data.images import unreadable_because
from lamzoo.data.labelled import LabelledImages
from lamzoo.data.selection import select
from lamzoo.errors import ConfigError, DataError

OnBadInput = Literal["stop", "skip"]
_NAMED = 3  # files that one error names; a list is what find_bad_images is for
_CHUNK = 32  # images from one report of a worker to the next


@dataclass(frozen=True)
class BadImage:
    """An image that cannot be used.

    Attributes:
        index: in the data set that was searched.
        filename: its path, or its place in the file that holds it.
        reason: what is wrong, in a few words.
    """

    index: int
    filename: str
    reason: str


def why_bad(dataset: LabelledImages, index: int) -> str | None:
    """Reads one image whole, without the data set's transforms; returns what is wrong with it, or ``None``."""
    try:
        dataset.decode(index)
    except DataError as error:
        return unreadable_because(error)
    return None


def find_bad_images(
    dataset: LabelledImages, *, workers: int = 0, progress: Callable[[int, int], None] | None = None
) -> list[BadImage]:
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
    if workers < 0:
        raise ConfigError(f"the number of workers is {workers}; it must be 0 or more")
    # The loader draws a seed for its workers, which are deterministic here: the caller's random state is left alone.
    loader = DataLoader(
        _Reasons(dataset), _CHUNK, collate_fn=list, num_workers=workers, generator=torch.Generator().manual_seed(0)
    )
    bad: list[BadImage] = []
    done = 0
    for reasons in loader:
        for index, reason in enumerate(reasons, done):
            if reason is not None:
                bad.append(BadImage(index, dataset.filename(index), reason))
        done += len(reasons)
        if progress is not None:
            progress(done, len(dataset))
    return bad


def set_aside_bad(
    dataset: LabelledImages,
    on_bad: OnBadInput,
    *,
    workers: int = 0,
    every_class: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[LabelledImages, list[BadImage]]:
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
    if on_bad not in get_args(OnBadInput):
        raise ConfigError(f"on_bad is {on_bad!r}; it must be 'stop' or 'skip'")
    bad = find_bad_images(dataset, workers=workers, progress=progress)
    return leave_out_bad(dataset, bad, on_bad, every_class=every_class), bad


def leave_out_bad(
    dataset: LabelledImages, bad: Sequence[BadImage], on_bad: OnBadInput, *, every_class: bool = True
) -> LabelledImages:
    """Does what :func:`set_aside_bad` does once the bad images are known; arguments and errors as there."""
    if not bad:
        return dataset
    where = dataset.spec if dataset.split is None else f"{dataset.spec} ({dataset.split})"
    files = "; ".join(f"{image.filename} ({image.reason})" for image in bad[:_NAMED])
    if len(bad) > _NAMED:
        files = f"{files}; and {len(bad) - _NAMED} more"
    if on_bad == "stop":
        raise DataError(
            f"{len(bad)} of the {len(dataset)} images of {where} cannot be used: {files}; replace or remove them, "
            "or go on without them with --on-bad-input skip"
        )
    wrong = {image.index for image in bad}
    left = [index for index in range(len(dataset)) if index not in wrong]
    if not left:
        raise DataError(f"none of the {len(dataset)} images of {where} can be used: {files}; replace them")
    kept = select(dataset, left)
    if every_class:
        _check_classes(dataset, wrong, where)
    return kept


class _Reasons(Dataset):
    """What is wrong with each image, item by item."""

    def __init__(self, dataset: LabelledImages) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> str | None:
        return why_bad(self._dataset, index)


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
