"""The data of a run: splits opened or created, and validated; identical on every process."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from lamzoo.data import BadInput, LabelledImages, find_invalid_images, leave_out_invalid, select
from lamzoo.data.fingerprint import Fingerprint, describe_changes, read_fingerprints
from lamzoo.data.json_files import read_json
from lamzoo.data.splits import hold_out, open_default, synonyms
from lamzoo.data.trained import HELD_OUT_NAME, RECIPE_NAME, MadeSplit
from lamzoo.errors import DataError, MissingSplitError, RecipeError
from lamzoo.escaping import csv_line
from lamzoo.files import atomic_files
from lamzoo.reading import to_json
from lamzoo.tasks import Task
from lamzoo.tasks.classification import CLASSIFICATION
from lamzoo.training.checkpoints import on_main_process
from lamzoo.training.recipe import DataSection

_logger = logging.getLogger(__name__)

ScanProgress = Callable[[str, int, int], None]
#: Inputs left out by a scan, by split.
BadInputs = tuple[tuple[str, BadInput], ...]


@dataclass(frozen=True)
class Splits:
    """Training and evaluation data of a run.

    Attributes:
        train: the training images.
        evaluation: images scored during the run; None until they are held out of the training images.
        test: images scored once at the end, if any.
        bad: images left out by a scan, by split.
        made: description of the held-out split, if the data has no evaluation split.
    """

    train: LabelledImages
    evaluation: LabelledImages | None
    test: LabelledImages | None
    bad: BadInputs = ()
    made: MadeSplit | None = None


def open_splits(data: DataSection) -> Splits:
    """Opens the existing splits without reading images.

    Data without splits are used for training entirely, provided that ``train_split`` is a name of the training split.

    Raises:
        DataError: the data set or a required split does not exist.
        RecipeError: a scored split equals the training split.
    """
    train = _open_train(data)
    evaluation = None
    try:
        evaluation = CLASSIFICATION.open_split(data.source, data.eval_split)
    except MissingSplitError as error:
        if data.val_fraction is None:
            raise (_same_images(data, train) if train.split is None else error) from None
    if evaluation is not None and evaluation.split == train.split:
        if data.val_fraction is None:
            raise _same_images(data, train)
        evaluation = None
    test = None if data.test_split is None else CLASSIFICATION.open_split(data.source, data.test_split)
    if test is not None and test.split == train.split:
        raise _same_images(data, train)
    return Splits(train, evaluation, test)


def open_roles(
    task: Task, data: Any, seed: int, roles: Collection[str] = ("train", "validation", "test")
) -> tuple[dict[str, Any], frozenset[str]]:
    """Opens the splits of a recipe without reading inputs.

    Args:
        task: of the recipe.
        data: the recipe's ``[data]``. If it has a ``val_fraction`` and the data no validation split, this share of the
            training videos is held out.
        seed: seed for drawing these videos.
        roles: roles of the splits to open; a test split is opened only if the recipe names one.

    Returns:
        The splits by role, and the names of the held-out videos.

    Raises:
        DataError: the data set or a required split does not exist.
    """
    names = {"train": data.train_split, "validation": data.eval_split, "test": data.test_split}
    opener, fraction = partial(task.open_split, data.source), getattr(data, "val_fraction", None)
    splits = {}
    for role in roles:
        if names[role] is None:
            continue
        if role == "train" and fraction is not None and "train" in synonyms(names[role]):
            splits[role] = open_default(opener, names[role])
            continue
        try:
            splits[role] = opener(names[role])
        except MissingSplitError:
            if role != "validation" or fraction is None:
                raise
    if "validation" in splits or "validation" not in roles or fraction is None:
        return splits, frozenset()
    train = splits["train"]
    known = train.video_names()
    held_out = hold_out(known, fraction, seed, data.source)
    rest = {role: split for role, split in splits.items() if role == "test"}
    parts = {"train": known - held_out, "validation": held_out}
    return {role: train.of_videos(names, role) for role, names in parts.items()} | rest, held_out


def check_disjoint(splits: Mapping[str, Any], names: Callable[[Any], Collection[Any]], items: str, source: str) -> None:
    """Checks that no item of the training split is in another one.

    Args:
        splits: the splits by role.
        names: returns the names of a split's items.
        items: what they are, for the message: ``"videos"``.
        source: the data set, for the message.

    Raises:
        RecipeError: a split shares items with the training split; names one.
    """
    train = splits["train"]
    known = set(names(train))
    for role, split in splits.items():
        common = known & set(names(split))
        if role != "train" and common:
            raise RecipeError(
                f"{len(common)} {items} of {source}, such as {min(common)!r}, are in both {train.split or 'all'} and "
                f"{split.split or 'all'}, so they would be used for training and scoring; name other splits in "
                "data.train_split and data.eval_split."
            )


def keep_held_out(folder: Path, held_out: Collection[str]) -> None:
    """Writes the names of the held-out videos to the run's folder, or compares them with those already there.

    Raises:
        DataError: the held-out videos of a resumed run differ, or the file can't be written.
    """
    path, names = folder / HELD_OUT_NAME, sorted(held_out)
    if (folder / RECIPE_NAME).exists() and path.exists() and read_json(path, file_names=True) != names:
        raise DataError(
            f"the training videos have changed since the run in {folder} held some out for validation; restore the "
            "same videos, or start a new run in another folder"
        )
    if names:
        with atomic_files(DataError) as stage:
            stage(path).write_text(to_json(names, indent=2) + "\n", encoding="utf-8")
    else:
        path.unlink(missing_ok=True)  # left by a run without a checkpoint


def check_fingerprints(folder: Path, splits: Mapping[str, Any], accelerator: Accelerator) -> dict[str, Fingerprint]:
    """Fingerprints the data that a run trains and validates on; call on every process.

    Args:
        folder: the run's folder. If it holds a run, its fingerprints are compared; one of lamzoo 0.1.0 has none.
        splits: the splits by role, as opened. Those of a plug-in's task may lack the method ``fingerprint``.
        accelerator: defines the processes; the main one does the work.

    Returns:
        The fingerprints by role.

    Raises:
        DataError: the data of a resumed run have changed; says how.
    """

    def check() -> dict[str, Fingerprint]:
        roles = [role for role in ("train", "validation") if hasattr(splits.get(role), "fingerprint")]
        found = {role: splits[role].fingerprint() for role in roles}
        resumed = (folder / RECIPE_NAME).exists()
        before = read_fingerprints(folder) if resumed else None
        if resumed and before is None:
            _logger.info("%s has no record of the data that its run began with; it can't be compared", folder)
        if changes := describe_changes(before or {}, found):
            raise DataError(
                f"the training data has changed since the run in {folder} began: {changes}; restore the data, or start "
                "a new run in another folder"
            )
        return found

    return on_main_process(accelerator, check)


def prepare_splits(
    data: DataSection, splits: Splits, seed: int, accelerator: Accelerator, progress: ScanProgress | None = None
) -> Splits:
    """Searches the splits for invalid images, and holds out an evaluation split if there is none.

    Each process reads its share of the images; all processes return the same result.

    Args:
        data: the recipe's section.
        splits: the opened splits.
        seed: seed of the held-out split.
        accelerator: defines the processes.
        progress: called on the main process with the split, the number of images read of its share, and their total.

    Raises:
        DataError: there are invalid images and the recipe does not skip them, or too few images are left.
    """
    train, evaluation, test = splits.train, splits.evaluation, splits.test
    bad: list[tuple[str, BadInput]] = []
    train = _scan(train, "train", data, accelerator, bad, progress)
    bad_train = len(bad)
    evaluation = evaluation and _scan(evaluation, "validation", data, accelerator, bad, progress)
    test = test and _scan(test, "test", data, accelerator, bad, progress)
    if evaluation is not None:
        return Splits(train, evaluation, test, tuple(bad))
    assert data.val_fraction is not None  # ensured by open_splits
    left_out = [image.index for _, image in bad[:bad_train]]
    train, evaluation, made = MadeSplit.make(train, data.val_fraction, seed, left_out)
    return Splits(train, evaluation, test, tuple(bad), made)


def check_made_split(folder: Path, made: MadeSplit | None) -> None:
    """Checks that a resumed run still has the validation split that it started with.

    Args:
        folder: the run's folder.
        made: the split held out now, if any.

    Raises:
        DataError: the images have changed, so that some training images would now be held out.
    """
    if not (folder / RECIPE_NAME).exists():
        return  # left by a run that was stopped before its first checkpoint
    before = MadeSplit.read(folder)
    if before is not None and before != made:
        raise DataError(
            f"the training images have changed since the run in {folder} held some out for validation; restore the "
            "same images, or start a new run in another folder"
        )


def write_bad_inputs(path: Path, bad: BadInputs) -> None:
    """Writes the inputs left out to a CSV file: split, index in the split, file, reason.

    Raises:
        DataError: the file can't be written.
    """
    rows = ((split, image.index, image.filename, image.reason) for split, image in bad)
    text = "".join(map(csv_line, [("split", "index", "file", "reason"), *rows]))
    with atomic_files(DataError) as stage:
        stage(path).write_text(text, encoding="utf-8", errors="backslashreplace")


def scan_split(
    split: Any,
    role: str,
    accelerator: Accelerator,
    progress: ScanProgress | None,
    *,
    select: Callable[[Any, range], Any],
    find: Callable[..., list[BadInput]] | None,
) -> list[BadInput]:
    """Finds the invalid inputs of a split; the processes share the work, and each returns all of them.

    Args:
        split: the data set, which has a length, and as ``lost`` the inputs that are known to be missing.
        role: of the split in the run, for ``progress``.
        accelerator: the processes.
        progress: called on the main process with the role, and the number of inputs read and in all.
        select: returns the part of a split with some indices.
        find: returns the invalid inputs of a part, and takes ``progress``; None reads none, and returns the lost ones.
    """
    if find is None:
        return list(split.lost)
    share = range(accelerator.process_index, len(split), accelerator.num_processes)

    def moved(done: int, total: int) -> None:
        if progress is not None and accelerator.is_main_process:
            progress(role, done, total)

    own = find(select(split, share), progress=moved) if len(share) else []
    found = [replace(each, index=share[each.index]) for each in own]
    return sorted(gather_object(found), key=lambda each: each.index) if accelerator.num_processes > 1 else found


def _scan(
    dataset: LabelledImages,
    role: str,
    data: DataSection,
    accelerator: Accelerator,
    bad: list[tuple[str, BadInput]],
    progress: ScanProgress | None,
) -> LabelledImages:
    """Leaves out the invalid images; without ``data.scan`` only the missing ones, which are known without reading."""
    find = partial(find_invalid_images, workers=data.workers) if data.scan else None
    found = scan_split(dataset, role, accelerator, progress, select=select, find=find)
    bad += [(dataset.split or role, image) for image in found]
    return leave_out_invalid(dataset, found, data.on_bad_input, every_class=role == "train")


def _open_train(data: DataSection) -> LabelledImages:
    opener, split = partial(CLASSIFICATION.open_split, data.source), data.train_split
    train: LabelledImages = open_default(opener, split) if "train" in synonyms(split) else opener(split)
    if train.split is None:
        train.source.check_classes()
    return train


def _same_images(data: DataSection, train: LabelledImages) -> RecipeError:
    return RecipeError(
        f"{data.source} would use the same images for training and scoring ({train.split or 'no splits'}); use a "
        "folder for each split, and name them in data.train_split and data.eval_split, or set data.val_fraction."
    )
