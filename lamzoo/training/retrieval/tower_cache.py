"""States of frozen towers in files: computed once, with their provenance, and read in place of the inputs."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lamzoo.data import plain_worker_errors
from lamzoo.data.arrays import read_npz
from lamzoo.data.retrieval import CaptionedVideos
from lamzoo.data.retrieval.clips import Clips, Pairs, pad_clips
from lamzoo.errors import DataError, RecipeError
from lamzoo.evaluation.resume import settings_of, tensors_sha256
from lamzoo.evaluation.retrieval.evaluate import frames_config
from lamzoo.files import atomic_files
from lamzoo.profiling.inputs import evaluating
from lamzoo.reading import parse_json, to_json
from lamzoo.training.build import attention_kernels
from lamzoo.training.checkpoints import on_main_process
from lamzoo.training.retrieval.recipe import RetrievalRecipe, Tower

_logger = logging.getLogger(__name__)

_STATES, _OFFSETS, _ORIGIN = "states", "offsets", "origin"


class TowerCache:
    """The states of the frozen towers of a run, in the folder ``towers.cache`` of its recipe.

    There is a file for each tower and split, ``vision-train.npz``, which later runs read if their tower, data and
    preprocessing are the same, and replace otherwise.

    Args:
        recipe: the recipe.
        model: a model of the family ``lam_clip4clip``, frozen as the recipe says.
        accelerator: device, precision and processes; the main process computes the files.

    Raises:
        RecipeError: a frozen tower has masks, with which its states change.
    """

    def __init__(self, recipe: RetrievalRecipe, model: Any, accelerator: Accelerator) -> None:
        self._recipe, self._model, self._accelerator = recipe, model, accelerator
        towers = recipe.towers
        self._folder = None if towers is None or towers.cache is None else Path(towers.cache).expanduser()
        self._towers: tuple[Tower, ...] = () if towers is None or towers.cache is None else tuple(towers.freeze)
        self._texts: dict[str, TextStates] = {}
        if masked := next((tower for tower in self._towers if not model.is_cacheable(tower)), None):
            raise RecipeError(
                f"Recipe key towers.cache is set, and the {masked} tower has masks, which are trained; leave "
                f"{masked!r} out of model.kwargs.lam_in, or leave out the cache."
            )

    def has(self, tower: Tower) -> bool:
        """Returns whether the states of a tower are read from files."""
        return tower in self._towers

    def pairs(self, pairs: Pairs) -> Pairs:
        """Returns the pairs of the training split, with states ``(F, S, C)`` in place of frames."""
        clips = Clips(pairs.videos, pairs.sampling, pairs.transform)
        return _CachedPairs(pairs, self._videos("train", clips), self._video_tokens)

    def clips(self, role: str, clips: Clips) -> Dataset[Tensor]:
        """Returns the videos of a split, as states ``(F, S, C)`` in place of frames."""
        return _CachedClips(self._videos(role, clips), self._video_tokens)

    def texts(self, role: str, split: CaptionedVideos) -> TextStates:
        """Returns the states of the texts of a split."""
        if role not in self._texts:
            texts = list(dict.fromkeys(split.texts))
            tokens = self._model.tokenizer(texts)
            origin = {"tokens": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(), "words": self._model.words}
            states = self._states("text", role, origin, len(texts), self._make_texts(role, tokens))
            rows = 1 + self._model.words * self._model.context_length
            self._texts[role] = TextStates({text: number for number, text in enumerate(texts)}, states, rows)
        return self._texts[role]

    @property
    def _video_tokens(self) -> int:
        return 1 + self._model.patch_grid**2

    def _videos(self, role: str, clips: Clips) -> States:
        origin = {
            "data": asdict(clips.videos.fingerprint()),
            "sampling": asdict(clips.sampling),
            "preprocessing": frames_config(self._model),
            "transform": "training" if role == "train" else "evaluation",
            "patch_grid": self._model.patch_grid,
            "reduction": settings_of(self._model)["reduction"],
        }
        return self._states("vision", role, origin, len(clips), self._make_videos(role, clips))

    def _states(self, tower: Tower, role: str, origin: Mapping[str, Any], count: int, make: Iterator[Tensor]) -> States:
        assert self._folder is not None  # callers ask whether the tower is cached
        common = {
            "weights": tensors_sha256(self._model.tower_state(tower)),
            "towers": hashlib.sha256(to_json(self._model.tower_facts, sort_keys=True).encode()).hexdigest(),
            "alone": self._model.encodes_alone,
            "fused_attention": self._takes_fused_kernels(role),
            "precision": self._recipe.run.precision,
            "device": self._accelerator.device.type,
        }
        made: list[States] = []
        read = partial(read_or_make, self._folder / f"{tower}-{role}.npz", {**common, **origin}, count, make)
        on_main_process(self._accelerator, lambda: made.append(read()))  # first, as the others read what it has written
        return made[0] if made else read()

    def _takes_fused_kernels(self, role: str) -> bool:
        return self._recipe.model.fused_attention or role != "train"  # as a run without the cache, which trains so

    def _make_videos(self, role: str, clips: Clips) -> Iterator[Tensor]:
        recipe, device = self._recipe, self._accelerator.device
        batch = recipe.run.batch_size // recipe.run.accumulation
        collate = partial(pad_clips, frames=recipe.data.max_frames)
        seed = torch.Generator().manual_seed(0)  # of the workers, which are deterministic
        loader = DataLoader(clips, batch, collate_fn=collate, num_workers=recipe.data.workers, generator=seed)
        model, fused = self._model.to(device), self._takes_fused_kernels(role)
        with evaluating(model), torch.no_grad(), plain_worker_errors():
            for frames, mask in loader:
                with self._accelerator.autocast(), attention_kernels(fused):
                    states = model.frame_states(frames.to(device), mask.to(device)).float()
                for own, there in zip(states.cpu(), mask, strict=True):
                    yield own[there].flatten(0, 1)

    def _make_texts(self, role: str, tokens: Tensor) -> Iterator[Tensor]:
        device, fused = self._accelerator.device, self._takes_fused_kernels(role)
        model = self._model.to(device)
        with evaluating(model), torch.no_grad():
            for some in tokens.split(self._recipe.run.batch_size):
                with self._accelerator.autocast(), attention_kernels(fused):
                    states = model.text_states(some.to(device)).float()
                for own in states.cpu():
                    yield own[: int(own.any(dim=-1).nonzero().max()) + 1]  # zeros pad the words


class TextStates:
    """States of texts, by the text: ``(B, S, C)`` of a list of texts, float32, zeros for padding.

    Args:
        places: each text with its place in ``states``.
        states: the states.
        rows: ``S``, the pooled state and the words.
    """

    def __init__(self, places: Mapping[str, int], states: States, rows: int) -> None:
        self._places, self._states, self._rows = places, states, rows

    def __call__(self, texts: Sequence[str]) -> Tensor:
        return self._states.padded([self._places[text] for text in texts], self._rows)


class _CachedPairs(Pairs):
    def __init__(self, pairs: Pairs, states: States, tokens: int) -> None:
        super().__init__(pairs.videos, pairs.sampling, pairs.transform, pairs.captions, pairs.splice, pairs.phrase)
        self._states, self._tokens = states, tokens

    def clip(self, video: int) -> Tensor:
        return self._states[video].unflatten(0, (-1, self._tokens))


class _CachedClips(Dataset[Tensor]):
    def __init__(self, states: States, tokens: int) -> None:
        self._states, self._tokens = states, tokens

    def __len__(self) -> int:
        return len(self._states)

    def __getitem__(self, index: int) -> Tensor:
        return self._states[index].unflatten(0, (-1, self._tokens))


@dataclass(frozen=True)
class States:
    """States of texts or videos, each with a number of rows of its own.

    Attributes:
        states: ``(N, C)``, float32, those of all items.
        offsets: ``(items + 1,)``, int64: the first row of each item, and the end.
    """

    states: NDArray[np.float32]
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Tensor:
        """Returns the states of an item, ``(rows, C)``, float32."""
        return torch.from_numpy(self.states[self.offsets[index] : self.offsets[index + 1]])

    def padded(self, indices: Sequence[int], rows: int) -> Tensor:
        """Returns the states of items, ``(len(indices), rows, C)``, float32, with zeros after those of an item."""
        batch = torch.zeros(len(indices), rows, self.states.shape[1])
        for place, index in zip(batch, indices, strict=True):
            own = self[index]
            place[: len(own)] = own
        return batch


def read_or_make(path: Path, origin: Mapping[str, Any], count: int, make: Iterable[Tensor]) -> States:
    """Returns the states in a file; if it is missing, damaged or of another origin, computes and writes them.

    Args:
        path: the file; its folder is created.
        origin: all that the states depend on, as JSON values.
        count: number of items.
        make: computes the states of the items, in order: ``(rows, C)``, float32; only iterated if necessary.

    Raises:
        RecipeError: the file can't be written.
    """
    origin = parse_json(to_json(origin))  # as read back
    found = _read(path, origin, count)
    if found is not None:
        return found
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(
            f"The folder {path.parent} can't be created ({error.strerror}); choose another as towers.cache."
        ) from error
    parts = [part.cpu() for part in make]
    offsets = np.cumsum([0, *map(len, parts)], dtype=np.int64)
    states = States(torch.cat(parts).numpy(), offsets)
    arrays = {_STATES: states.states, _OFFSETS: offsets, _ORIGIN: np.array(to_json(origin))}
    with atomic_files(RecipeError) as stage, stage(path).open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # mypy takes the arrays for allow_pickle
    return states


def _read(path: Path, origin: Mapping[str, Any], count: int) -> States | None:
    if not path.exists():
        _logger.info("%s: computing the states of %d items", path, count)
        return None
    try:
        arrays = read_npz(path, (_STATES, _OFFSETS, _ORIGIN))
        there = parse_json(str(arrays[_ORIGIN]))
        states, offsets = arrays[_STATES], arrays[_OFFSETS]
        if not isinstance(there, dict):
            raise ValueError("its origin is no table")
        if states.ndim != 2 or states.dtype != np.float32 or offsets.dtype != np.int64 or offsets.ndim != 1:
            raise ValueError("its arrays have other shapes or types")
        if offsets[0] != 0 or offsets[-1] != len(states) or (np.diff(offsets) < 0).any():
            raise ValueError("its offsets do not rise from 0 to the number of states")
    except (DataError, ValueError, IndexError) as error:
        _logger.warning("%s is damaged (%s); the states are computed again", path, error)
        return None
    differs = next((key for key in origin if there.get(key) != origin[key]), None)
    if differs is None and len(offsets) != count + 1:
        differs = "number of items"
    if differs is not None:
        _logger.info("%s is of another %s; the states of %d items are computed again", path, differs, count)
        return None
    _logger.info("%s: the states of %d items are read", path, count)
    return States(states, offsets)
