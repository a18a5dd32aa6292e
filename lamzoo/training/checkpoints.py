"""Checkpoints and logs of a run, written atomically; only the latest checkpoints are kept."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
import pickle
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lamzoo import records
from lamzoo.adapters.wrappers import full_state_dict, is_sharded
from lamzoo.data.trained import BAD_INPUTS_NAME, RECIPE_NAME
from lamzoo.errors import LamzooError, RecipeError
from lamzoo.files import atomic_files, file_lock
from lamzoo.lam import LamConfig
from lamzoo.reading import open_regular, parse_json, read_text, to_json
from lamzoo.training.recipe import AnyRecipe, parse_recipe
from lamzoo.training.sharding import load_whole, sharded_state, whole_state
from lamzoo.weights.files import file_sha256, stage_state_dict

_logger = logging.getLogger(__name__)

_STATE, _MODEL, _OPTIMIZER, _EMA, _SCALER = (
    "state.json", "model.safetensors", "optimizer.bin", "ema.safetensors", "scaler.pt",
)  # fmt: skip
#: Settings that may change when a run is resumed, because its curve does not depend on them.
_FREE = frozenset({
    "data.workers", "run.checkpoint_interval", "run.device", "run.fsdp", "run.keep", "run.keep_checkpoints",
    "run.output", "run.report", "run.tensorboard", "schedule.epochs", "towers.cache",
})  # fmt: skip
_PICKLED_EMA = "custom_checkpoint_0.pkl"  # written by lamzoo 0.1.0
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class TrainedParts:
    """The objects of a run whose state a checkpoint holds; random states aren't needed, as each update is seeded.

    Attributes:
        model: the trained model, not wrapped.
        optimizer: its optimiser.
        ema: the averaged model, if any.
        scaler: the gradient scaler of fp16, if any.
    """

    model: nn.Module
    optimizer: Any
    ema: nn.Module | None = None
    scaler: Any = None


@dataclass(frozen=True)
class _File:
    """A file in the manifest of a checkpoint."""

    size: int
    sha256: str


@dataclass(frozen=True)
class _Best:
    """The epoch, from 0, whose weights are in ``model/``."""

    epoch: int
    value: float
    sha256: str | None = None


@dataclass(frozen=True)
class _RunState:
    """The types of the values in ``state.json``; ``files``, the manifest, is missing in those of lamzoo 0.1.0."""

    update: int
    loss_sum: float
    seconds: float
    history: list[dict[str, Any]]
    wall_seconds: float | None = None
    best: _Best | None = None
    lam_config: dict[str, Any] | None = None
    files: dict[str, _File] | None = None


class _DamagedError(Exception):
    """A checkpoint that is not whole; the message names the file and the fault."""


class Checkpoints:
    """The folder of one run: ``recipe.json``, ``metrics.csv`` and ``checkpoints/update-NNNNNNNN/``.

    A checkpoint holds the weights and the averaged weights as safetensors, the optimiser's state, read with
    ``weights_only=True``, and ``state.json``, which also states size and sha256 of the other files.

    Args:
        output: the run's folder.
        recipe: the run's recipe. A folder that holds a run of another recipe is rejected.
        resume: whether an existing run may be continued.

    Raises:
        RecipeError: the folder holds a run of another recipe, or any run without ``resume``.
    """

    def __init__(self, output: Path, recipe: AnyRecipe, resume: bool) -> None:
        self.output = output
        self._folder = output / "checkpoints"
        self._recipe = recipe
        self._resume = resume
        self._manifest: dict[str, Any] | None = None  # of the latest checkpoint
        self._check_identity()

    def needs_scan(self) -> bool:
        """Returns whether the recipe's ``data.scan`` applies: not to a resumed run that has left no inputs out."""
        began = self._resume and (self.output / RECIPE_NAME).exists()
        complete = began and not (self.output / BAD_INPUTS_NAME).exists()
        return self._recipe.data.scan and not complete

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Creates the folder and locks it, so that no other process trains in it.

        Call it on the main process, after all other checks.

        Raises:
            RecipeError: the folder can't be created, or another process trains in it or has just done so.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RecipeError(
                f"run.output {self.output} can't be trained in: its folder {error.filename} can't be created "
                f"({error.strerror}); choose another folder."
            ) from None
        with file_lock(self.output / ".lock") as held:
            if held is False:
                raise RecipeError(
                    f"run.output {self.output} is being trained in by another process; wait for its end, or choose "
                    "another folder."
                )
            if held is None:
                _logger.warning("%s can't be locked; don't start a second training in it", self.output)
            self._check_identity()  # again: another run may have begun since
            for leftover in self._folder.glob(".update-*"):  # of a process that was killed
                shutil.rmtree(leftover, ignore_errors=True)
            recipe = self.output / RECIPE_NAME
            begins = not recipe.exists()
            try:
                yield
            finally:
                if begins and not self._finished():  # a run that left nothing does not hold its folder
                    recipe.unlink(missing_ok=True)

    def write_recipe(self) -> None:
        """Writes ``recipe.json``, the identity of the run; call it on the main process before any :meth:`save`."""
        _write_text(self.output / RECIPE_NAME, to_json(self._recipe.to_dict(), indent=2, sort_keys=True) + "\n")

    def save(self, accelerator: Accelerator, parts: TrainedParts, state: dict[str, Any]) -> None:
        """Writes ``parts`` and ``state`` (JSON values) as the latest checkpoint; call on every process.

        Raises:
            RecipeError: the checkpoint can't be written; nothing of it is left.
        """
        states = _states(parts, accelerator.is_main_process)  # gathered on every process
        on_main_process(accelerator, lambda: self._write(states, state))

    def amend(self, accelerator: Accelerator, state: dict[str, Any]) -> None:
        """Replaces the ``state`` of the checkpoint written at the same update; call on every process."""
        path = self._folder / _name(state) / _STATE
        on_main_process(accelerator, lambda: _write_text(path, _state_text(state, self._manifest)))

    def load(self, accelerator: Accelerator, parts: TrainedParts, lam: LamConfig | None) -> dict[str, Any] | None:
        """Loads the newest whole checkpoint into ``parts`` and returns its state; None without checkpoints.

        A checkpoint with a missing, damaged or altered file is left out with a warning.

        Args:
            accelerator: the accelerator of the run.
            parts: the run's objects.
            lam: mask configuration of the model.

        Raises:
            RecipeError: no checkpoint is whole, the checkpoint has other masks, or its optimiser has other parameters
                or groups.
        """
        name = on_main_process(accelerator, lambda: self._newest_whole(parts))
        if name is None:
            return None
        folder = self._folder / name
        try:
            state, found = _read_state(folder), _read_parts(folder, parts)
        except _DamagedError as error:  # since it was checked, or on this process's machine only
            raise RecipeError(f"{folder} can't be read: {error}; restore it, and start again.") from None
        self._manifest = state.pop("files", None)
        if "lam_config" in state:
            self._check_masks(state["lam_config"], lam)
        elif lam is not None and accelerator.is_main_process:
            _logger.warning("%s does not record its mask configuration; its masks are loaded as %s", folder, lam)
        if parts.ema is not None and _EMA not in found:
            found[_EMA] = found[_MODEL]
            if accelerator.is_main_process:
                _logger.warning("%s has no averaged weights; the average starts again from its weights", folder)
        try:
            _load_weights(parts.model, found[_MODEL])
            optimizer = found[_OPTIMIZER]
            parts.optimizer.load_state_dict(
                sharded_state(parts.optimizer, optimizer) if is_sharded(parts.model) else optimizer
            )
            if parts.ema is not None:
                _load_weights(parts.ema, found[_EMA])
            if parts.scaler is not None and _SCALER in found:
                parts.scaler.load_state_dict(found[_SCALER])
        except (ValueError, RuntimeError, LookupError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise RecipeError(
                f"{folder} was written by another version of lamzoo, whose model or optimiser had other parameters "
                f"({reason}); resume it with that version, or start a new run in another folder."
            ) from error
        return state

    def write_metrics(self, history: list[dict[str, float]]) -> None:
        """Rewrites ``metrics.csv`` with one line per epoch."""
        columns = list(dict.fromkeys(key for record in history for key in record))
        records.write_csv(self.output / "metrics.csv", columns, history, error=RecipeError)

    def _check_identity(self) -> None:
        """Raises a :class:`RecipeError` if the folder holds another run, or one that is not to be resumed."""
        written = self.output / RECIPE_NAME
        if not written.exists():
            if self._finished():
                raise RecipeError(
                    f"run.output {self.output} holds checkpoints, but no {RECIPE_NAME} that says of which run; restore "
                    "it, or choose another folder."
                )
            return
        if not self._resume:
            raise RecipeError(
                f"run.output {self.output} already holds a run; continue it with --resume, or choose another folder."
            )
        changed = _changed(written, self._recipe)
        if changed:
            moved = "; data that has moved needs a link at its former path" if "data.source" in changed else ""
            raise RecipeError(
                f"run.output {self.output} holds a run of another recipe: {changed}; restore it, or choose another "
                f"folder{moved}."
            )

    def _check_masks(self, fields: dict[str, Any] | None, lam: LamConfig | None) -> None:
        saved = LamConfig.from_dict(fields) if fields is not None else None
        if saved is None or lam is None:
            same = saved is lam
        else:
            same = not saved.differences(lam)
        if not same:
            raise RecipeError(
                f"run.output {self.output} holds a run of a model with masks of {saved}, but the recipe's model now "
                f"has {lam}; start a run in another folder, with these masks as model.lam, or from the trained weights "
                f"with {self.output} as model.name and model.pretrained = true."
            )

    def _write(self, states: dict[str, Any], state: dict[str, Any]) -> None:
        target = self._folder / _name(state)
        unfinished = self._folder / f".{target.name}"
        try:
            with atomic_files(RecipeError) as stage:
                manifest = _stage(stage, unfinished, states, state)
            _discard(target)  # damaged, or written before the run went back to an older one
            os.replace(unfinished, target)
            self._manifest = manifest
            finished = self._finished()
            own = finished.index(target)
            for old in (*finished[: max(0, own + 1 - self._recipe.run.keep_checkpoints)], *finished[own + 1 :]):
                _discard(old)
        except OSError as error:
            raise RecipeError(f"{target} cannot be written ({error}); choose another folder.") from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    def _newest_whole(self, parts: TrainedParts) -> str | None:
        """Returns the name of the newest checkpoint that can be read; None without checkpoints."""
        faults: list[str] = []
        for folder in reversed(self._finished()):
            try:
                _check(folder, parts)
            except _DamagedError as error:
                faults.append(f"{folder.name}: {error}")
                continue
            for fault in faults:
                _logger.warning("%s is damaged (%s); the run continues from %s", self._folder, fault, folder.name)
            return folder.name
        if faults:
            raise RecipeError(
                f"No checkpoint in {self._folder} is whole ({'; '.join(faults)}); restore one of them from a copy, or "
                "start a new run in another folder."
            )
        return None

    def _finished(self) -> list[Path]:
        folders = [folder for folder in self._folder.glob("update-*") if folder.name[7:].isdecimal()]
        return sorted(folders, key=lambda folder: int(folder.name[7:]))


def on_main_process(accelerator: Accelerator, function: Callable[[], _Result]) -> _Result:
    """Calls a function on the main process; all processes return its result or raise its error."""
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome = [function(), None]
        except (LamzooError, OSError, RuntimeError) as error:  # the last of torch, such as a GPU without memory left
            outcome = [None, error]
    result, failure = broadcast_object_list(outcome)
    if failure is not None:
        raise failure
    return result


def _name(state: Mapping[str, Any]) -> str:
    return f"update-{state['update']:08d}"


def _states(parts: TrainedParts, keep: bool) -> dict[str, Any]:
    """Returns the state of each part by the name of its file; without ``keep`` those of sharded parts lack tensors."""
    modules = {name: module for name, module in ((_MODEL, parts.model), (_EMA, parts.ema)) if module is not None}
    others = {name: part for name, part in ((_OPTIMIZER, parts.optimizer), (_SCALER, parts.scaler)) if part is not None}
    states: dict[str, Any] = {}
    for name, module in modules.items():
        state = states[name] = module.state_dict() if is_sharded(module) else full_state_dict(module)
        for key, value in state.items():  # in place, which keeps the metadata
            state[key] = whole_state(value, keep)
    return states | {name: whole_state(part.state_dict(), keep) for name, part in others.items()}


def _stage(
    stage: Callable[[Path], Path], folder: Path, states: Mapping[str, Any], state: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Writes the files of a checkpoint; returns its manifest."""
    files: dict[str, Path] = {}

    def add(path: Path) -> Path:
        files[path.name] = stage(path)
        return files[path.name]

    for name, content in states.items():
        if name.endswith(".safetensors"):
            stage_state_dict(add, content, folder / name, None)
        else:
            _save(content, add(folder / name))
    manifest = {name: {"size": path.stat().st_size, "sha256": file_sha256(path)} for name, path in files.items()}
    stage(folder / _STATE).write_text(_state_text(state, manifest), encoding="utf-8")
    return manifest


def _save(value: Any, path: Path) -> None:
    try:
        with path.open("wb") as file:
            torch.save(value, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # such as a full disk, which torch reports as a wrong position
            raise error.__context__ from None
        raise


def _state_text(state: dict[str, Any], manifest: dict[str, Any] | None) -> str:
    if manifest is None:
        return to_json(state)
    content = {**state, "files": manifest}
    return to_json({**content, "sha256": _digest(content)})


def _digest(state: dict[str, Any]) -> str:
    return hashlib.sha256(to_json(state, sort_keys=True).encode()).hexdigest()


def _check(folder: Path, parts: TrainedParts) -> None:
    """Checks that a checkpoint is whole, by its manifest or, without one, by reading it.

    Raises:
        _DamagedError: a file is missing, damaged or altered.
        RecipeError: the checkpoint has pickled averaged weights.
    """
    files = _read_state(folder).get("files")
    if files is not None:
        _check_manifest(folder, files)
        return
    if (folder / _PICKLED_EMA).exists():
        raise RecipeError(
            f"{folder / _PICKLED_EMA} is a pickle of lamzoo 0.1.0, which can run code when it is read; finish the run "
            "with lamzoo 0.1.0, or delete the file: the average of the weights then starts again from the weights of "
            "this checkpoint."
        )
    _read_parts(folder, parts)


def _check_manifest(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    for name, expected in files.items():
        path = folder / Path(name).name
        try:
            if (size := path.stat().st_size) != expected["size"]:
                raise _DamagedError(f"{name} has {size} bytes instead of {expected['size']}")
            if file_sha256(path) != expected["sha256"]:
                raise _DamagedError(f"{name} was altered")
        except OSError as error:
            raise _DamagedError(f"{name} can't be read ({error.strerror})") from None


def _read_state(folder: Path) -> dict[str, Any]:
    try:
        state = parse_json(read_text(folder / _STATE), file_names=True, not_finite=True)
    except OSError as error:
        raise _DamagedError(f"{_STATE} can't be read ({error.strerror})") from None
    except ValueError as error:
        raise _DamagedError(f"{_STATE} is not JSON ({error})") from None
    if isinstance(state, dict) and "files" in state and state.pop("sha256", None) != _digest(state):
        raise _DamagedError(f"{_STATE} was altered")
    try:
        records.build(_RunState, state, source=_STATE, error=RecipeError)
    except RecipeError as error:
        raise _DamagedError(str(error).rstrip(".")) from None
    for record in state["history"]:
        for key, value in record.items():
            if value is None:
                record[key] = math.nan  # which JSON lacks
            elif not isinstance(value, (int, float)):
                raise _DamagedError(f"{_STATE} has no number for {key!r}")
    return state


def _read_parts(folder: Path, parts: TrainedParts) -> dict[str, Any]:
    """Returns the contents of the files of ``parts``, by name; the averaged weights and the scaler may be missing."""
    names = [_MODEL, _OPTIMIZER]
    names += [_EMA] if parts.ema is not None and (folder / _EMA).exists() else []
    names += [_SCALER] if parts.scaler is not None and (folder / _SCALER).exists() else []
    return {name: _read_tensors(folder / name) for name in names}


def _read_tensors(path: Path) -> Any:
    try:
        with open_regular(path) as file:
            if path.suffix == ".safetensors":
                return load_file(path)
            return torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise _DamagedError(f"{path.name} can't be read ({error.strerror})") from None
    except (
        SafetensorError,
        RuntimeError,
        EOFError,
        pickle.UnpicklingError,
        ValueError,
        TypeError,
        LookupError,
    ) as error:
        raise _DamagedError(f"{path.name} is damaged ({' '.join(str(error).split())})") from None


def _load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Loads weights of a checkpoint; 0.1.0 kept the prefix of wrapped models, and shared tensors only once."""
    if all(name.startswith("module.") for name in weights):
        weights = {name.removeprefix("module."): tensor for name, tensor in weights.items()}
    if is_sharded(model):
        load_whole(model, weights)
        return
    own = model.state_dict()
    kept = {tensor.data_ptr(): name for name, tensor in own.items() if name in weights}
    shared = {name: weights[kept[tensor.data_ptr()]] for name, tensor in own.items() if tensor.data_ptr() in kept}
    model.load_state_dict({**shared, **weights})


def _changed(path: Path, recipe: AnyRecipe) -> str:
    """Returns how a stored recipe differs in settings that change the curve; newer keys have their defaults."""
    try:
        written = parse_recipe(records.read_table(path, what="Recipe", error=RecipeError))
    except LamzooError as error:
        return str(error).rstrip(".")
    before, now = (_flat(each.to_dict()) for each in (written, recipe))
    keys = [key for key in {**now, **before} if key not in _FREE and before.get(key) != now.get(key)]
    return " and ".join(f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in keys)


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested values to keys such as ``"run.seed"``."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        nested = isinstance(value, dict) and value
        flat |= _flat(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return flat


def _discard(folder: Path) -> None:
    """Removes a checkpoint; one that is removed only in part is never taken for a whole one."""
    if folder.exists():
        hidden = folder.with_name(f".{folder.name}.removed")
        os.replace(folder, hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def _write_text(path: Path, text: str) -> None:
    with atomic_files(RecipeError) as stage:
        stage(path).write_text(text, encoding="utf-8")
