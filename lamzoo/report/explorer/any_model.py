"""The page for any model with masks: what its tokens are is read from its configuration and inputs, or described."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lamzoo.adapters.hosts import token_layout
from lamzoo.adapters.state import masks_of
from lamzoo.adapters.wrappers import unwrap
from lamzoo.errors import class_name
from lamzoo.files import check_target
from lamzoo.lam import MaskRecord
from lamzoo.report.explorer.document import Answer, Exploration, ExploredLayer, TokenRun, best_answers
from lamzoo.report.explorer.runs import run_twice, write_page
from lamzoo.report.mask_pictures import title_of

_MOST_PREFIX_TOKENS = 8  # class, distillation and register tokens before the patches


def explore(
    model: nn.Module,
    inputs: Tensor | Sequence[Any] | Mapping[str, Any],
    path: str | Path,
    *,
    processor: Any = None,
    tokens: Sequence[Sequence[TokenRun]] = (),
) -> None:
    """Writes an interactive page of masks and attention of any model with masks, for one input.

    The tokens of a layer are, by their number and in this order: one of ``tokens``; the patches of an image among the
    inputs, after class and register tokens; the ids of a text; else they are numbered. The page is that of
    :func:`explore_image`. Of a batch it shows the first sample, and of a layer with windows the first window.

    Args:
        model: a model with masks of any host: timm, open_clip, transformers, ``nn.MultiheadAttention`` or one's own.
        inputs: what the model is called with: a tensor, positional arguments, or keyword arguments by name. Texts are
            integer tensors ``(B, N)``, images float tensors ``(B, C, H, W)``.
        path: the HTML file, in an existing folder; an older file is replaced.
        processor: a tokenizer or processor of transformers, or a tokenizer of open_clip, which names the tokens of
            texts, and whose mean and standard deviation bring back the colours of the image.
        tokens: descriptions of sequences, for layers whose queries or keys are as many.

    Raises:
        UnsupportedHostError: the model has no masks, or a layer attends to its tokens part by part.
        ConfigError: the model's masks or scores are not finite.
        DataError: the file can't be written.
    """
    path, model = Path(path), unwrap(model)
    check_target(path, "page", suffix=".html")
    masks = masks_of(model)
    named = dict(inputs) if isinstance(inputs, Mapping) else {}
    named = {key: named[key] for key in _WORDS if key in named} | named
    args = () if isinstance(inputs, Mapping) else (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    records, masked, plain = run_twice(model, lambda: model(*args, **named))
    reader = _TokenReader(model, tree_leaves((args, named)), processor, tokens)
    layers = []
    for name, record in records.items():
        many = "" if len(record.attention) == 1 else f" (first of {len(record.attention)})"
        queries, keys = reader.read(name, record)
        layers.append(ExploredLayer(f"{name}{many}", masks[f"{name}.lam"].config, record, queries, keys))
    answers = _answers(model, masked, plain)
    write_page(Exploration(title_of(model), layers, (f"{class_name(model)}",), answers), path)


_WORDS = ("input_ids", "decoder_input_ids", "text")  # before masks and types of the same size


class _TokenReader:
    """Finds out what the tokens of layers are."""

    def __init__(
        self, model: nn.Module, inputs: Sequence[Any], processor: Any, described: Sequence[Sequence[TokenRun]]
    ) -> None:
        tensors = [each for each in inputs if isinstance(each, Tensor)]
        self.model, self.described = model, described
        self.images = [each for each in tensors if each.ndim == 4 and each.is_floating_point()]
        # Besides ids, inputs of transformers have masks and types of the same size, which come later.
        ids = [each for each in tensors if each.ndim == 2 and not each.is_floating_point() and each.dtype != torch.bool]
        self.texts = [TokenRun("word", _words(each[0], processor)) for each in ids]
        self.pictures = [_picture(each[0], processor) for each in self.images]
        self._known: dict[Any, tuple[TokenRun, ...]] = {}

    def read(self, path: str, record: MaskRecord) -> tuple[tuple[TokenRun, ...], tuple[TokenRun, ...]]:
        """Returns the runs of the queries and the keys of a layer; the same object where they are as many."""
        queries, keys = (self._sequence(path, count) for count in record.num_tokens)
        return queries, keys

    def _sequence(self, path: str, count: int) -> tuple[TokenRun, ...]:
        for runs in self.described:
            if sum(map(len, runs)) == count:
                return self._once(("described", id(runs)), runs)
        config = getattr(self.model.get_submodule(path), "config", None)
        reads_images = hasattr(config, "patch_size")
        words = next((run for run in self.texts if len(run) == count), None)
        if words is not None and not reads_images:
            return self._once(("words", id(words)), (words,))
        for number, image in enumerate(self.images):
            grid = self._grid(path, config, image)
            before = count - (0 if grid is None else grid[0] * grid[1])
            if grid is None or before < 0:
                continue
            patches = TokenRun("patch", grid=grid, picture=self.pictures[number])
            if before <= _MOST_PREFIX_TOKENS:
                return self._once((number, grid, before), (*_prefix(before), patches))
        if words is not None:
            return self._once(("words", id(words)), (words,))
        return self._once(count, (TokenRun("token", tuple(map(str, range(count)))),))

    def _once(self, key: Any, runs: Sequence[TokenRun]) -> tuple[TokenRun, ...]:
        return self._known.setdefault(key, tuple(runs))

    def _grid(self, path: str, config: Any, image: Tensor) -> tuple[int, int] | None:
        height, width = image.shape[-2:]
        grid_at = token_layout(self.model, path).grid_at
        if grid_at is not None:
            return grid_at((height, width))
        size = getattr(config, "patch_size", None)
        if size is None:
            return None
        rows, columns = (size, size) if isinstance(size, int) else size[-2:]
        return height // rows, width // columns


def _prefix(count: int) -> tuple[TokenRun, ...]:
    names = ("class", *(f"register {number}" for number in range(1, count)))
    return (TokenRun("token", names[:count]),) if count else ()


def _words(ids: Tensor, processor: Any) -> tuple[str, ...]:
    tokenizer = getattr(processor, "tokenizer", processor)
    if hasattr(tokenizer, "convert_ids_to_tokens"):
        return tuple(map(str, tokenizer.convert_ids_to_tokens(ids.tolist())))
    if hasattr(tokenizer, "decode"):
        return tuple(tokenizer.decode([number]) for number in ids.tolist())
    return tuple(map(str, ids.tolist()))


def _picture(pixels: Tensor, processor: Any) -> Image.Image:
    """Returns an image ``(C, H, W)`` as it was before it was normalised; without a processor, stretched to 0 to 1."""
    of_images = getattr(processor, "image_processor", processor)
    values = pixels.detach().float().cpu()
    mean, std = (getattr(of_images, name, None) for name in ("image_mean", "image_std"))
    if mean is not None and std is not None:
        values = values * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    else:
        low, high = values.min(), values.max()
        values = (values - low) / (high - low).clamp_min(1e-6)
    values = values if len(values) == 3 else values[:1].expand(3, -1, -1)
    return Image.fromarray((values.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


def _answers(model: Any, masked: Any, plain: Any) -> list[Answer]:
    """Returns the most probable labels of a classifier of transformers, or the texts that fit an image best."""
    for name, kind in (("logits", "class"), ("logits_per_image", "text")):
        logits: list[Any] = [getattr(output, name, None) for output in (masked, plain)]
        if not all(isinstance(each, Tensor) and each.ndim == 2 and each.shape[1] > 1 for each in logits):
            continue
        labels = (getattr(getattr(model, "config", None), "id2label", None) or {}) if name == "logits" else {}
        texts = [str(labels.get(index, f"{kind} {index}")) for index in range(logits[0].shape[1])]
        return best_answers(texts, logits[0][0], logits[1][0])
    return []
