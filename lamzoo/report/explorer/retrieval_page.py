"""The page for a retrieval model: frames of a video over time, patches of some frames, and words of a text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm.data
import torch
from torch import Tensor, nn

from lamzoo.adapters.hosts import token_layout
from lamzoo.adapters.state import masks_of
from lamzoo.adapters.wrappers import unwrap
from lamzoo.data.retrieval import CaptionedVideos
from lamzoo.data.retrieval.clips import EachFrame
from lamzoo.data.splits import index_of_id
from lamzoo.data.video.reader import VideoClip, read_video
from lamzoo.errors import ConfigError, UnsupportedHostError, class_name
from lamzoo.evaluation.retrieval.evaluate import frames_config
from lamzoo.evaluation.runtime import check_finite
from lamzoo.files import check_target
from lamzoo.lam import MaskRecord
from lamzoo.reduction.frames import merge_frames
from lamzoo.report.explorer.document import Answer, Exploration, ExploredLayer, TokenRun, best_answers
from lamzoo.report.explorer.runs import SHARP_SIDE, patch_tokens, run_twice, thumbnails, to_picture, write_page
from lamzoo.report.mask_pictures import title_of
from lamzoo.report.model_view import sharp_crop

_FRAMES = 4  # frames whose patches are shown: each takes as much of the page as an image
_TEXTS = 16  # of a data set, among which the model chooses


def explore_video(
    model: nn.Module,
    video: str | Path | VideoClip,
    texts: str | Sequence[str],
    path: str | Path,
    *,
    facts: Sequence[str] = (),
    title: str = "",
) -> None:
    """Writes an interactive page of a retrieval model's masks and attention for a video and a text.

    The tokens are the frames over time in the head (and the text's embedding in the tight one, and the words and
    patches that it compares), the patches of up to four frames in the vision tower, and the words in the text tower, of
    those that have masks. The prediction is the probability of each text given the video, or the similarity if there is
    only one. Otherwise as :func:`lamzoo.report.explore_image`.

    Args:
        model: a model of the family ``lam_clip4clip`` with masks.
        video: a file, or sampled frames.
        texts: a text, or several to choose among; the page shows the words of the first.
        path: the HTML file, in an existing folder; an older file is replaced.
        facts: lines below the title.
        title: of the page; the model and the file by default.

    Raises:
        UnsupportedHostError: the model has no masks, or is not a retrieval model.
        ConfigError: there is no text, or the model's masks or outputs are not finite.
        DataError: the video can't be read, or the file can't be written.
        MissingExtraError: PyAV, which reads video files, is not installed.
    """
    path, model = Path(path), unwrap(model)
    check_target(path, "page", suffix=".html")
    masks = masks_of(model)
    config = frames_config(model)
    network: Any = model
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts or not all(text.strip() for text in texts):
        raise ConfigError("a text is empty; describe the video")
    clip = video if isinstance(video, VideoClip) else read_video(video, network.sampling)
    like = next(model.parameters())
    frames = EachFrame(timm.data.create_transform(**config))(clip.frames)[None].to(like.device, like.dtype)
    ids = network.tokenizer(texts)
    records, masked, plain = run_twice(model, lambda: network(frames, ids.to(like.device)))
    tokens = _Tokens(network, clip, frames, ids[0], config)
    layers = [
        ExploredLayer(f"{name.removesuffix('.attn')}{where}", masks[f"{name}.lam"].config, record, runs, runs, sample)
        for name, record in sorted(records.items(), key=lambda item: _place(item[0]))
        for where, runs, sample in tokens.read(name, record)
    ]
    title = title or f"{title_of(model)} on {'a video' if isinstance(video, VideoClip) else Path(video).name}"
    shown = f"{len(clip.frames)} frames of {clip.duration:.1f} s; “{texts[0]}”"
    write_page(Exploration(title, layers, (shown, *facts), _answers(texts, masked, plain)), path)


def explore_retrieval(model: nn.Module, dataset: CaptionedVideos, video: str | None, path: str | Path) -> None:
    """Writes the page of :func:`explore_video` for a video of a data set and its first caption.

    The model chooses among this caption and those of up to 15 videos that follow in the split.

    Args:
        model: a model of the family ``lam_clip4clip`` with masks.
        dataset: a split of captioned videos.
        video: id of the video; None for the first one.
        path: the HTML file, in an existing folder; an older file is replaced.

    Raises:
        UnsupportedHostError: as of :func:`explore_video`.
        ConfigError: as of :func:`explore_video`.
        DataError: the split has no such video, it can't be read, or the file can't be written.
    """
    check_target(Path(path), "page", suffix=".html")
    masks_of(model)
    frames_config(unwrap(model))  # raises for other models
    index = index_of_id(dataset.videos, video, f"the split {dataset.split!r} of {dataset.spec}", "video")
    around = [(index + step) % len(dataset) for step in range(min(_TEXTS, len(dataset)))]
    texts = list(dict.fromkeys(dataset.texts[dataset.texts_of(number)[0]] for number in around))
    network: Any = unwrap(model)
    clip = dataset.read(index, network.sampling)
    title = f"{title_of(network)} on video {dataset.videos[index]}"
    explore_video(network, clip, texts, path, title=title, facts=[f"to choose among: {len(texts)} texts"])


class _Tokens:
    """The queries and keys of each layer of a retrieval model, for one video and one text."""

    def __init__(self, model: Any, clip: VideoClip, frames: Tensor, ids: Tensor, config: Mapping[str, Any]) -> None:
        self.model, self.clip, self.config, self.size = model, clip, config, (frames.shape[-2], frames.shape[-1])
        times = tuple(f"{time:.2f} s" for time in clip.times)
        self.frames = (TokenRun("frame", times, time=True, frames=thumbnails(clip.frames)),)
        self.words = (TokenRun("word", _words(ids, model.tokenizer)),)
        words = self.words if model.words else ()
        self.pair = (TokenRun("text", ("embedding",)), *words, *(self._with_patches() or self.frames))
        # Frames that merge are one in the vision tower: the row of each frame there.
        reduction = getattr(model, "token_reduction", None)
        token_map = None if reduction is None else merge_frames(frames, reduction.frames)[1]
        rows = list(range(len(times))) if token_map is None or token_map.into is None else token_map.into[0].tolist()
        first = {row: frame for frame, row in reversed(list(enumerate(rows)))}
        shown = [round(at) for at in torch.linspace(0, len(first) - 1, min(_FRAMES, len(first))).tolist()]
        self.rows = {row: first[row] for row in sorted(sorted(first)[at] for at in shown)}
        self._patches: dict[int, tuple[TokenRun, ...]] = {}

    def read(self, path: str, record: MaskRecord) -> Iterator[tuple[str, Sequence[TokenRun], int]]:
        """Yields what to add to the layer's name, the runs of its tokens, and the sample in the batch."""
        if path.startswith("head."):
            yield "", self.pair if self.model.similarity_type == "tight" else self.frames, 0
        elif path.startswith("clip.visual."):
            for row, frame in self.rows.items():
                yield f", frame at {self.clip.times[frame]:.2f} s", self._of_frame(path, frame), row
        else:
            yield "", self.words, 0

    def _with_patches(self) -> list[TokenRun]:
        """Returns each frame and its patches, as a tight head compares them; empty without a grid of patches."""
        side, runs = self.model.patch_grid, []
        for time, frame in zip(self.clip.times if side else (), self.clip.frames, strict=False):
            picture = to_picture(sharp_crop(self.config, frame, SHARP_SIDE))
            runs += [TokenRun("frame", (f"{time:.2f} s",)), TokenRun("patch", grid=(side, side), picture=picture)]
        return runs

    def _of_frame(self, path: str, frame: int) -> tuple[TokenRun, ...]:
        if frame not in self._patches:
            layout = token_layout(self.model, path)
            if layout.grid_at is None:
                raise UnsupportedHostError(f"{path} of {class_name(self.model)} has no patch grid to show.")
            picture = to_picture(sharp_crop(self.config, self.clip.frames[frame], SHARP_SIDE))
            runs = patch_tokens(self.model, path, layout.num_prefix_tokens, layout.grid_at(self.size), picture)
            self._patches[frame] = runs
        return self._patches[frame]


def _place(path: str) -> int:
    """Returns the order of the parts on the page: head, vision tower, text tower."""
    return 0 if path.startswith("head.") else 1 if path.startswith("clip.visual.") else 2


def _words(ids: Tensor, tokenizer: Any) -> tuple[str, ...]:
    used = int(ids.nonzero().max()) + 1
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of transformers, in open_clip's
    return tuple(tokenizer.decode([number]) if at < used else "" for at, number in enumerate(ids.tolist()))


def _answers(texts: Sequence[str], masked: Tensor, plain: Tensor) -> list[Answer]:
    check_finite(masked)
    if len(texts) == 1:
        with_mask, without = (f"{float(output[0, 0]):.2f}" for output in (masked, plain))
        return [Answer("similarity (cosine × temperature)", with_mask, without)]
    return best_answers([f"this text: {texts[0]}", *texts[1:]], masked[:, 0], plain[:, 0], also=0)
