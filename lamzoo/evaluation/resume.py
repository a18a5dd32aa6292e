"""Resumable evaluation state, kept in a file."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lamzoo import records
from lamzoo.adapters.wrappers import unwrap
from lamzoo.errors import DataError, WeightsError
from lamzoo.files import atomic_files, cache_folder, file_lock
from lamzoo.reading import parse_json, read_text, to_json

_logger = logging.getLogger(__name__)

_KIND = "lamzoo evaluation"
_COUNTS = ("seen", "correct1", "correct5", "real_seen", "real_correct1", "real_correct5")


@dataclass(frozen=True)
class EvalState:
    """Counts over the first ``seen`` images.

    Attributes:
        seen: images processed so far, including unreadable ones.
        correct1: images with a correct first guess.
        correct5: images with a correct guess among the first five.
        bad: indices of unreadable images.
        real_seen: images with ReaL labels.
        real_correct1: images whose first guess is among their ReaL labels.
        real_correct5: images with one of five guesses among their ReaL labels.
        seconds: time spent.
    """

    seen: int = 0
    correct1: int = 0
    correct5: int = 0
    bad: tuple[int, ...] = ()
    real_seen: int = 0
    real_correct1: int = 0
    real_correct5: int = 0
    seconds: float = 0.0

    @property
    def scored(self) -> int:
        """Number of readable images."""
        return self.seen - len(self.bad)

    @property
    def top1(self) -> float:
        """Top-1 accuracy on the readable images, in percent; 0 without images."""
        return 100 * self.correct1 / max(1, self.scored)


class StateFile:
    """A JSON file with an :class:`EvalState` and the key that identifies its evaluation.

    Args:
        path: the file; it need not exist.
        key: everything that the scores depend on: model, weights, data, batches, precision.

    Raises:
        DataError: the file exists and is not an evaluation state; it is left unchanged.
    """

    def __init__(self, path: str | Path, key: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.key = parse_json(to_json(key), file_names=True)  # as read back: tuples become lists
        self._saves = True
        self._found = self._read()

    def load(self) -> EvalState:
        """Returns the stored state; an empty one if the file does not exist.

        Raises:
            DataError: the file belongs to another evaluation; names the difference.
        """
        if self._found is None:
            return EvalState()
        there = self._found["key"]
        differing = [key for key in there if there[key] != self.key.get(key)]  # older files lack some
        if differing:
            key = differing[0]
            raise DataError(
                f"{self.path} belongs to another evaluation ({key} was {there.get(key)!r}, now {self.key.get(key)!r}); "
                "start without resuming, or use another state file"
            )
        return records.build(EvalState, self._found["partial"], source=f"{self.path}:")

    @contextlib.contextmanager
    def reserve(self, resume: bool) -> Iterator[EvalState]:
        """Keeps other evaluations from using the file while this one runs; yields the state to start from.

        If another evaluation uses the file, this one is not saved, with a warning.

        Args:
            resume: start from the stored state.

        Raises:
            DataError: with ``resume``, the file is used by another evaluation, or belongs to another one.
        """
        with file_lock(self.path.parent / f"{self.path.name}.lock") as held:
            self._saves = held is not False
            if not self._saves:
                in_use = f"{self.path} is in use by another evaluation"
                if resume:
                    raise DataError(f"{in_use}; wait for its end, or use another state file")
                _logger.warning("%s, so this one can't be resumed if it is interrupted", in_use)
            yield self.load() if resume else EvalState()

    def save(self, partial: EvalState) -> None:
        """Replaces the file atomically, unless another evaluation uses it; if it can't be written, it warns once."""
        if not self._saves:
            return
        content = {"kind": _KIND, "key": self.key, "partial": dataclasses.asdict(partial)}
        try:
            with atomic_files() as stage:
                stage(self.path).write_text(to_json(content, indent=1) + "\n", encoding="utf-8")
        except WeightsError as error:
            self._saves = False
            _logger.warning("%s The evaluation continues, but can't be resumed from here if interrupted.", error)

    def remove(self) -> None:
        """Removes the file, once the evaluation is complete; not that of another evaluation. Warns on failure."""
        try:
            if self._saves:
                self.path.unlink(missing_ok=True)
        except OSError as error:
            _logger.warning("%s is no longer needed, but can't be removed (%s)", self.path, error.strerror)

    def _read(self) -> dict[str, Any] | None:
        if not self.path.exists():
            return None
        try:
            content = parse_json(read_text(self.path), file_names=True)
            whole = content["kind"] == _KIND and isinstance(content["key"], dict)
            partial = records.build(EvalState, content["partial"], source=f"{self.path}:")
        except OSError as error:
            raise DataError(f"{self.path} cannot be read ({error.strerror}); use another state file") from error
        except (ValueError, TypeError, KeyError, DataError) as error:
            raise DataError(f"{self.path} is not an evaluation state; use another file, or remove it") from error
        seen, *counts = (getattr(partial, name) for name in _COUNTS)
        if not whole or not all(0 <= count <= seen for count in (*counts, len(partial.bad))):
            raise DataError(f"{self.path} is not an evaluation state; use another file, or remove it")
        return content


def default_state_path(*parts: str) -> Path:
    """Returns the default path of an evaluation's state file, in the user's cache folder.

    Args:
        *parts: strings that identify the evaluation: model, data, split.
    """
    name = hashlib.sha256("\0".join((os.getcwd(), *parts)).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return cache_folder() / "eval" / f"{name}.json"


def weights_sha256(model: nn.Module) -> str:
    """Hashes the names, dtypes, shapes and values of a model's state dict."""
    return tensors_sha256(model.state_dict())


def tensors_sha256(tensors: Mapping[str, Any]) -> str:
    """Hashes the names, dtypes, shapes and values of tensors; other values are ignored."""
    digest = hashlib.sha256()
    for name, value in tensors.items():
        if isinstance(value, torch.Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def settings_of(model: nn.Module) -> dict[str, Any]:
    """Returns what the outputs of a model depend on besides its tensors, as JSON values.

    Returns:
        ``masks``, the fields of its LamConfig, and ``reduction``, those of its token reduction; empty without either.
    """
    host = unwrap(model)
    masks, reduction = (getattr(host, name, None) for name in ("lam_config", "token_reduction"))
    return {
        "masks": {} if masks is None else masks.to_dict(),
        "reduction": {} if reduction is None else reduction.to_dict(),
    }


def origin_difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """Compares the provenance that a file records with that of a model; None if they agree.

    A file of an earlier release lacks fields: the reduction of its model, which counts as none, and others, which count
    as the same.

    Args:
        there: recorded in the file.
        here: of the model, as JSON values.

    Returns:
        The name of the first field that differs.
    """
    for name, value in here.items():
        absent = {} if name.endswith("reduction") else value
        if there.get(name, absent) != value:
            return name
    return None
