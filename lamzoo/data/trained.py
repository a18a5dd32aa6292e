"""The data of a training run, read from its folder, including a validation split that the run created."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from lamzoo import records
from lamzoo.data.images.factory import create_dataset
from lamzoo.data.images.image_dataset import LabelledImages
from lamzoo.data.images.selection import select, split_off
from lamzoo.data.json_files import read_json
from lamzoo.data.splits import WHOLE, open_default, synonyms
from lamzoo.errors import DataError, MissingSplitError, UnsplitError
from lamzoo.files import atomic_files
from lamzoo.reading import to_json

RECIPE_NAME = "recipe.json"
SPLIT_NAME = "split.json"
HELD_OUT_NAME = "held-out.json"
BAD_INPUTS_NAME = "bad-inputs.csv"
MODEL_FOLDERS = ("model", "last")  # model folders of a run


@dataclass(frozen=True)
class MadeSplit:
    """Record of a validation split that a run created, with a digest of the images.

    Attributes:
        split: name of the original split in the data; None for data without splits.
        fraction: fraction of each class held out for validation; see :func:`lamzoo.data.split_off`.
        seed: seed of the selection.
        left_out: indices of unreadable images, which are in neither part.
        sha256: hash of the labels and file names of the other images, in order.
    """

    split: str | None
    fraction: float
    seed: int
    left_out: tuple[int, ...]
    sha256: str

    @classmethod
    def make(
        cls, dataset: LabelledImages, fraction: float, seed: int, left_out: Collection[int] = ()
    ) -> tuple[LabelledImages, LabelledImages, MadeSplit]:
        """Splits a data set, already without the images ``left_out``; returns both parts and the record."""
        train, validation = split_off(dataset, fraction, seed)
        record = cls(dataset.split, fraction, seed, tuple(sorted(left_out)), _digest(dataset))
        return train, validation, record

    def again(self, spec: str) -> tuple[LabelledImages, LabelledImages]:
        """Opens the data set and reproduces the two parts.

        Raises:
            DataError: the data set can't be opened, or its images have changed.
        """
        dataset = create_dataset(spec, self.split or WHOLE)
        if self.left_out and max(self.left_out) < len(dataset):
            out = set(self.left_out)
            dataset = select(dataset, (index for index in range(len(dataset)) if index not in out))
        if _digest(dataset) != self.sha256:
            raise DataError(
                f"the images of {spec} have changed since the run split them, so its validation split can't be "
                "reproduced; restore the images, or score another split"
            )
        return split_off(dataset, self.fraction, self.seed)

    def write(self, folder: Path) -> None:
        """Writes the record to the folder of a run.

        Raises:
            DataError: the record can't be written.
        """
        with atomic_files(DataError) as stage:
            stage(folder / SPLIT_NAME).write_text(to_json(dataclasses.asdict(self), indent=2) + "\n", "utf-8")

    @classmethod
    def read(cls, folder: Path) -> MadeSplit | None:
        """Reads the record from the folder of a run; None if there is none.

        Raises:
            DataError: the record is damaged.
        """
        path = folder / SPLIT_NAME
        if not path.is_file():
            return None
        try:
            return records.build(cls, read_json(path, file_names=True), source=f"{path}:")
        except DataError as error:
            raise DataError(f"{path} is not a record of a run's split ({error}); restore it") from None


@dataclass(frozen=True)
class TrainedData:
    """The training data of a run.

    Attributes:
        task: task of its recipe.
        source: specification of the data set.
        made: the validation split of images that the run created; None if the data has one.
        held_out: the videos that the run held out for validation; empty if the data has a validation split.
    """

    task: str
    source: str
    made: MadeSplit | None = None
    held_out: tuple[str, ...] = ()

    @classmethod
    def read(cls, folder: Path) -> TrainedData | None:
        """Reads the folder of a run, or its model folder; None for any other folder.

        Raises:
            DataError: a file of the run is damaged.
        """
        folder = folder.resolve()
        places = [folder, folder.parent] if folder.name in MODEL_FOLDERS else [folder]
        run = next((place for place in places if (place / RECIPE_NAME).is_file()), None)
        if run is None:
            return None
        try:
            recipe = read_json(run / RECIPE_NAME, file_names=True)
            task, source = recipe.get("task", "classification"), recipe["data"]["source"]
        except (AttributeError, LookupError, TypeError) as error:
            raise DataError(f"{run / RECIPE_NAME} is not the recipe of a run ({error}); restore it") from None
        videos = read_json(run / HELD_OUT_NAME, file_names=True) if (run / HELD_OUT_NAME).is_file() else []
        found = {"task": task, "source": source, "held_out": videos}
        return replace(records.build(cls, found, source=f"{run}: the run's"), made=MadeSplit.read(run))


def open_videos(opener: Callable[[str], Any], spec: str, split: str | None, trained: TrainedData | None = None) -> Any:
    """Opens the videos that a model is scored on; errors are those of ``opener``.

    Args:
        opener: opens a split of the data set by its name.
        spec: the data set.
        split: None for ``test``, and for all of data without splits.
        trained: training data of the model. If its run held out videos of this data, ``train`` and ``validation`` (the
            default) are those of the run.
    """
    part = _part("validation" if split is None else split)
    if trained is None or not trained.held_out or part is None or _place(spec) != _place(trained.source):
        return open_default(opener, "test") if split is None else opener(split)
    whole = open_default(opener, part)
    if whole.split is not None:  # splits were added to the data later
        return opener(split or "test")
    held = set(trained.held_out)
    return whole.of_videos(held if part == "validation" else whole.video_names() - held, part)


def open_scored(spec: str, split: str | None, trained: TrainedData | None = None) -> LabelledImages:
    """Opens the images that a model is scored on.

    Args:
        spec: the data set.
        split: the split; None for ``test``, for the validation split of the run if its data has no ``test``, and for
            all of other data without splits.
        trained: training data of the model. If its run created a validation split of this data, ``validation`` and
            ``train`` are those of the run.

    Raises:
        MissingSplitError: neither the data nor the run has such a split.
        DataError: as for :func:`create_dataset`; or the images of the run have changed.
    """
    made = None if trained is None else trained.made
    opener = partial(create_dataset, spec)
    own = trained is not None and _place(spec) == _place(trained.source)
    if made is None or (split is None and not own):
        return opener(split) if split is not None else open_default(opener, "test")
    part = _part("validation" if split is None else split)
    if split is None or part is None or not own:
        try:
            return opener(split or "test")
        except MissingSplitError as error:
            if part is None and own and isinstance(error, UnsplitError):
                raise MissingSplitError(
                    f"{spec} has no split {split!r}: the run split it into 'train' and 'validation'; use one of these, "
                    f"or '{WHOLE}' for both"
                ) from None
            if part is None:
                raise
    return made.again(spec)[part == "validation"]


def _part(split: str) -> str | None:
    """Returns the part of a run's data that a split name refers to, or None."""
    return next((name for name in ("train", "validation") if name in synonyms(split)), None)


def _place(spec: str) -> tuple[str, ...]:
    """Returns a specification with canonical paths, equal for all spellings of a data set."""
    kind, colon, rest = spec.partition(":")
    if not colon or kind in ("imagefolder", "npz"):
        return "", str(Path(rest if colon else spec).resolve())
    parts = [rest] if os.path.exists(rest) else rest.split(":")
    return kind, *(str(Path(part).resolve()) if os.path.exists(part) else part for part in parts)


def _digest(dataset: LabelledImages) -> str:
    """Hashes labels and file names without folders, so that data may be moved."""
    digest = hashlib.sha256()
    for index, label in enumerate(dataset.labels()):
        name = dataset.filename(index).replace("\\", "/").rpartition("/")[2]
        digest.update(f"{label} {name}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
