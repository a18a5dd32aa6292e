"""Pictures of a describer's masks and word attention; drawn by :mod:`lamzoo.report.word_attention`."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lamzoo.adapters.capture import capture_masks
from lamzoo.errors import DataError, UnsupportedHostError
from lamzoo.evaluation.captions.evaluate import move, pad_streams
from lamzoo.files import check_target
from lamzoo.lam import Lam, LamConfig, MaskRecord
from lamzoo.models.describer.encoder import Joint
from lamzoo.profiling.inputs import evaluating
from lamzoo.report.frame_rows import clock, one_line
from lamzoo.report.mask_pictures import title_of
from lamzoo.report.mpl import write_figure
from lamzoo.report.word_attention import ModalityView, WindowView, draw_windows
from lamzoo.video.describe import DescribedWindow, VideoWindows, context_of

MAX_WINDOWS = 6

_LINE = 110  # characters of a line of the title


def explain_windows(
    model: nn.Module, windows: VideoWindows, described: Sequence[DescribedWindow], path: str | Path
) -> None:
    """Writes a PNG file of a describer's masks and word attention over the windows of a video, in seconds.

    Each window has one panel per modality. The top is the importance ``mean_i M_ij`` of each token over time, averaged
    over heads and layers; it is omitted for models without masks. Below, each word of the sentence has a row: the
    decoder's cross-attention when the word was generated, averaged over heads, layers and the tokens of the word. The
    number beside a row is the share of that attention on the modality; the rest is on the encoder's first token or on
    the previous sentences.

    Args:
        model: the model that generated the descriptions.
        windows: the windows of the video.
        described: the descriptions; the first :data:`MAX_WINDOWS` are drawn.
        path: the PNG file, in an existing folder; an older file is replaced.

    Raises:
        DataError: there is nothing to draw, the video can't be read, or the file can't be written.
        MissingExtraError: matplotlib is not installed.
    """
    path = Path(path)
    check_target(path, "picture", suffix=".png")
    masks = {name: module for name, module in model.named_modules() if isinstance(module, Lam)}
    config = next(iter(masks.values())).config if masks else None
    views = [_measure(model, windows, each, bool(masks)) for each in described[:MAX_WINDOWS]]
    if not any(view.words or config for view in views):
        raise DataError(f"{windows.path} has nothing to draw: the model has no masks and generated no words")
    title = _title(model, windows, len(described), config)
    figure = draw_windows(views, neutral=0.0 if config is None else config.mask_op.identity, title=title)
    write_figure(figure, path)


def word_attention(model: Any, joint: Joint, tokens: Sequence[int]) -> Tensor:
    """Returns the cross-attention of a describer's decoder for each generated token, averaged over heads and layers.

    Args:
        model: a model of the family ``lam_describer``, in evaluation mode.
        joint: the encoder's tokens of one clip.
        tokens: token ids of the sentence, without start and end.

    Returns:
        ``(len(tokens), N)``, float32 on the CPU: weights of the encoder's tokens, which sum to 1.
    """
    text = torch.tensor([[model.tokenizer.sot_token_id, *tokens[:-1]]], device=joint.tokens.device)
    looks: Tensor = model.decoder.memory_attention(text, joint.tokens, joint.mask)
    return looks[0].float().cpu()


def words_of(tokenizer: Any, tokens: Sequence[int]) -> list[tuple[str, list[int]]]:
    """Returns the words of a token sequence, each with the positions of its tokens."""
    texts: list[str] = str(tokenizer.decode(list(tokens))).split()
    pieces: list[list[int]] = [[] for _ in texts]
    for number in range(len(tokens)):
        so_far = len(str(tokenizer.decode(list(tokens[: number + 1]))).split())
        if texts:
            pieces[min(max(so_far, 1), len(texts)) - 1].append(number)
    return [(text, numbers) for text, numbers in zip(texts, pieces, strict=True) if numbers]


@torch.no_grad()
def _measure(model: nn.Module, windows: VideoWindows, described: DescribedWindow, masked: bool) -> WindowView:
    describer: Any = model
    device = next(model.parameters()).device
    streams = windows.streams(described.number)
    batch = {name: move(stream, device) for name, stream in pad_streams([streams]).items()}
    capture: AbstractContextManager[Mapping[str, MaskRecord]] = capture_masks(model) if masked else nullcontext({})
    with evaluating(model), capture as captured:
        joint = describer.encode(batch, context_of(describer, described.context, device))
        words = words_of(describer.tokenizer, described.tokens)
        attention = np.zeros((0, joint.tokens.shape[1]), np.float32)
        if words:
            of_tokens = word_attention(describer, joint, described.tokens)
            attention = torch.stack([of_tokens[numbers].mean(dim=0) for _, numbers in words]).numpy()
        importance = _importance(model, captured, joint)
    views = [
        ModalityView(
            name,
            streams[name].times + np.float32(described.start),
            None if importance is None else importance[first:last],
            attention[:, first:last],
        )
        for name, (first, last) in joint.spans.items()
    ]
    texts = tuple(one_line(text, start=True) for text, _ in words)
    return WindowView(described.start, described.end, texts, tuple(views))


def _importance(model: nn.Module, captured: Mapping[str, MaskRecord], joint: Joint) -> Any:
    """Returns the mean mask value of each of the encoder's tokens, ``(N,)``; None without masks."""
    if not captured:
        return None
    layers = [record.importance[0].float().mean(dim=0).cpu().numpy() for record in captured.values()]
    if {len(layer) for layer in layers} != {joint.tokens.shape[1]}:
        raise UnsupportedHostError(
            f"{type(model).__name__} masks attention to other tokens than its encoder's; draw a model of the family "
            "lam_describer, unwrapped."
        )
    return np.mean(layers, axis=0)


def _title(model: nn.Module, windows: VideoWindows, count: int, config: LamConfig | None) -> str:
    lines = textwrap.wrap(f"{title_of(model)} on {one_line(windows.path)}", _LINE)
    if count > MAX_WINDOWS:
        lines.append(f"the first {MAX_WINDOWS} of {count} windows, of {clock(windows.duration)} in all")
    if config is not None:
        lines.append(
            f"curves: importance, the mean of M over heads and layers; M {config.mask_op.effect} the attention "
            f"scores, {config.mask_op.identity:g} is neutral"
        )
    lines.append("rows: attention of the decoder for a word (dark: high), and its share on the modality")
    return "\n".join(lines)
