"""Pictures of a model's masks over a photograph; drawn by :mod:`lamzoo.report.mask_figure`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from lamzoo.adapters.capture import capture_masks
from lamzoo.adapters.hosts import token_layout
from lamzoo.adapters.state import masks_of
from lamzoo.adapters.wrappers import unwrap
from lamzoo.errors import ConfigError, UnsupportedHostError, class_name
from lamzoo.evaluation import class_names
from lamzoo.evaluation.runtime import check_finite
from lamzoo.files import check_target
from lamzoo.lam import LamConfig, MaskRecord
from lamzoo.profiling.inputs import evaluating
from lamzoo.report.mask_figure import LayerPicture, draw
from lamzoo.report.model_view import view
from lamzoo.report.mpl import write_figure

Patch = tuple[int, int]


def explain(
    model: nn.Module,
    image: str | Path | Image.Image,
    path: str | Path,
    *,
    rows: Sequence[Patch] | None = None,
    head: int | None = None,
) -> None:
    """Writes a PNG file of a model's masks over one image.

    The picture has one column per layer, or a single one if all layers share their mask. The first row is the token
    importance ``mean_i M_ij`` over the image; the rows below are ``M[i, :]`` for a few query patches ``i``, which are
    outlined on the image. Class and register tokens are omitted as keys; the importance averages over all queries. In a
    model with merged tokens, each patch has the values of the token that it is part of, and a last layer that computes
    the class token alone is left out. Colours are centred at the mask's neutral value (1 for ``op="mul"``, 0 for
    ``"add"``).

    Args:
        model: a vision transformer with masks, whose host has a patch grid.
        image: a file or a Pillow image; rotated by its EXIF orientation.
        path: the PNG file, in an existing folder; an older file is replaced.
        rows: ``(row, column)`` of the query patches on the patch grid; three on the diagonal by default.
        head: head to draw, for per-head masks; their mean by default.

    Raises:
        UnsupportedHostError: the model has no masks, has no patch grid, or prunes tokens.
        ConfigError: a query patch is outside the grid, the mask has no such head, or the model's outputs or masks are
            not finite.
        MissingExtraError: matplotlib is not installed.
        DataError: the image can't be read, or the file can't be written.
    """
    path, model = Path(path), unwrap(model)
    check_target(path, "picture", suffix=".png")
    config = next(iter(masks_of(model).values())).config
    shown = view(model, image)
    with evaluating(model), torch.no_grad(), capture_masks(model) as captured:
        output = run_all_queries(model, shown.images)
    if isinstance(output, Tensor):
        check_finite(output)
    records = list(captured.items())
    if config.layers == "single":
        records = records[:1]
    computed = [(name, record) for name, record in records if not _lacks_queries(record)]
    layers = [_picture(model, shown.images, name, record, rows, head) for name, record in computed]
    if config.layers == "single":
        layers = [replace(layers[0], name="all layers")]
    subject = "image" if isinstance(image, Image.Image) else Path(image).name
    title = f"{title_of(model)} on {subject}{_prediction(model, output)}\n{caption_of(config, head, shown.images)}"
    figure = draw(layers, shown.seen.numpy(), shown.sharp.numpy(), neutral=config.mask_op.identity, title=title)
    write_figure(figure, path)


def run_all_queries(model: Any, images: Tensor) -> Any:
    """Runs a classifier so that a last layer with merged tokens computes all of them, not the class token alone."""
    if getattr(model, "token_reduction", None) is not None and hasattr(model, "forward_head"):
        return model.forward_head(model.forward_features(images))
    return model(images)


def _lacks_queries(record: MaskRecord) -> bool:
    """Returns whether patches are among the keys of a layer and not among its queries."""
    if record.query_places is None:
        return False
    lacks = record.query_places < 0
    return bool((lacks if record.key_places is None else lacks & (record.key_places >= 0)).any())


def _picture(
    model: nn.Module, images: Tensor, path: str, record: MaskRecord, rows: Sequence[Patch] | None, head: int | None
) -> LayerPicture:
    keys, queries = (
        torch.arange(factor.shape[2]) if places is None else places[0].cpu()
        for factor, places in zip(reversed(record.mask), (record.key_places, record.query_places), strict=True)
    )
    found = patch_grid(model, path, images, len(keys)) if keys.min() >= 0 else None
    if found is None:
        raise UnsupportedHostError(
            f"{path} of {class_name(model)} attends to {len(keys.unique())} tokens that aren't a patch grid; explain "
            "draws vision transformers of timm and open_clip whose tokens aren't pruned."
        )
    prefix, grid = found
    rows = _spread_rows(grid) if rows is None else rows
    left, right = (_head(factor[:1].float().cpu(), head) for factor in record.mask)
    chosen = queries[[prefix + _index(row, grid) for row in rows]]
    values = (left[:, chosen] @ right.mT).mean(dim=0)[:, keys]  # (rows, tokens of the stack's input)
    importance = _head(record.importance[:1].float().cpu(), head).mean(dim=0)[keys]
    return LayerPicture(
        name=path.removesuffix(".attn"),
        importance=importance[prefix:].unflatten(0, grid).numpy(),
        queries=tuple(rows),
        rows=values[:, prefix:].unflatten(1, grid).numpy(),
    )


def patch_grid(model: nn.Module, path: str, images: Tensor, count: int) -> tuple[int, Patch] | None:
    """Returns the number of prefix tokens and the patch grid of a layer; None if they are not its tokens.

    Args:
        model: a model of any host.
        path: of the attention layer.
        images: input of the model, ``(B, C, H, W)``.
        count: number of the tokens at the input of the layer's stack.
    """
    layout = token_layout(model, path)
    if layout.grid_at is None:
        return None
    prefix, grid = layout.num_prefix_tokens, layout.grid_at((images.shape[-2], images.shape[-1]))
    return (prefix, grid) if prefix + grid[0] * grid[1] == count else None


def _spread_rows(grid: Patch) -> list[Patch]:
    return list(dict.fromkeys((grid[0] * i // 4, grid[1] * i // 4) for i in (1, 2, 3)))


def _index(row: Patch, grid: Patch) -> int:
    if not (0 <= row[0] < grid[0] and 0 <= row[1] < grid[1]):
        raise ConfigError(f"The query patch {row} is outside the patch grid of {grid[0]} rows and {grid[1]} columns.")
    return row[0] * grid[1] + row[1]


def _head(factor: Tensor, head: int | None) -> Tensor:
    """Selects one head, or all, of ``(1, Hm, ...)``; returns ``(1 | Hm, ...)``."""
    if head is None:
        return factor[0]
    if not 0 <= head < factor.shape[1]:
        raise ConfigError(f"There is no head {head}: this model has {factor.shape[1]} mask(s) a layer, counted from 0.")
    return factor[0, head : head + 1]


def _prediction(model: nn.Module, output: Any) -> str:
    if not isinstance(output, Tensor) or output.ndim != 2 or getattr(model, "num_classes", 0) != output.shape[1]:
        return ""
    names = class_names(model, output.shape[1])
    top = output[0].float().softmax(dim=0).topk(min(3, len(names)))
    guesses = zip(top.values.tolist(), top.indices.tolist(), strict=True)
    return ": " + ", ".join(f"{names[index].split(',')[0]} {probability:.0%}" for probability, index in guesses)


def title_of(model: nn.Module) -> str:
    """Returns the name of a model and the source of its weights."""
    cfg: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    arch = getattr(model, "registry_name", None) or cfg.get("architecture") or type(model).__name__
    # The record has its tag even without weights, so the title uses what was loaded.
    source = getattr(model, "weights_source", None)
    return arch if source is None else source if source.startswith(arch) else f"{arch} ({source})"


def mask_words(config: LamConfig) -> str:
    """Returns how a mask acts and its main settings."""
    return (
        f"M {config.mask_op.effect} the attention scores, {config.mask_op.identity:g} is neutral; keys={config.keys}, "
        f"rank={config.rank}, sign={config.sign}"
    )


def caption_of(config: LamConfig, head: int | None, images: Tensor) -> str:
    """Returns what the mask is, and the size of the images that a model was given."""
    heads = "one mask for all heads"
    if config.heads == "per-head":
        heads = "mean of the heads' masks" if head is None else f"mask of head {head}"
    return f"{mask_words(config)}; {heads}; input {images.shape[-2]} x {images.shape[-1]} px"
