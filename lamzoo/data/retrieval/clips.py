"""Padded batches of video frames: single videos for evaluation, pairs of video and caption for training."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from lamzoo.data.retrieval import CaptionedVideos
from lamzoo.data.video.sampling import FrameSampling

FramesTransform = Callable[[list[Image.Image]], Tensor]


class Clips(Dataset[Tensor]):
    """The videos of a data set in order, as frames ``(F, 3, H, W)``, float; ``F`` varies.

    Args:
        videos: the data set.
        sampling: the frame sampling.
        transform: transform from the frames of a video to a tensor.
    """

    def __init__(self, videos: CaptionedVideos, sampling: FrameSampling, transform: FramesTransform) -> None:
        self.videos, self.sampling, self.transform = videos, sampling, transform

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(self.videos.read(index, self.sampling).frames)


class Pairs(Dataset[tuple[Tensor, str]]):
    """Pairs of a video and a caption, as frames and text.

    Args:
        videos: the data set.
        sampling: the frame sampling.
        transform: transform from the frames of a video to a tensor.
        captions: ``"all"``: one pair per caption; ``"one"``: one pair per video, with a caption drawn from
            :mod:`random`.
        splice: probability that a pair is spliced from pieces of several videos (with :mod:`random`), if the data
            support it.
        phrase: probability that such a pair consists of a few neighbouring pieces only, mostly one.
    """

    def __init__(
        self,
        videos: CaptionedVideos,
        sampling: FrameSampling,
        transform: FramesTransform,
        captions: Literal["all", "one"] = "all",
        splice: float = 0.0,
        phrase: float = 0.0,
    ) -> None:
        self.videos, self.sampling, self.transform = videos, sampling, transform
        self.captions, self.splice, self.phrase = captions, splice, phrase

    def __len__(self) -> int:
        return len(self.videos.texts) if self.captions == "all" else len(self.videos)

    def clip(self, video: int) -> Tensor:
        """Returns the transformed frames of a video."""
        return self.transform(self.videos.read(video, self.sampling).frames)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        if self.splice and random.random() < self.splice:
            clip, caption = self.videos.splice(self.sampling, random.random() < self.phrase)
            return self.transform(clip.frames), caption
        if self.captions == "all":
            video, text = self.videos.video_of_text[index], index
        else:
            video, text = index, random.choice(self.videos.texts_of(index))
        return self.clip(video), self.videos.texts[text]


def pad_clips(clips: Sequence[Tensor], frames: int | None = None) -> tuple[Tensor, Tensor]:
    """Pads videos of different lengths to one batch.

    Args:
        clips: ``(F, 3, H, W)`` each.
        frames: length of the batch; that of the longest video by default.

    Returns:
        ``(B, F, 3, H, W)``, zeros after the end of a video, and ``(B, F)``, bool, True for frames of the video.
    """
    longest = max(map(len, clips)) if frames is None else frames
    batch = clips[0].new_zeros(len(clips), longest, *clips[0].shape[1:])
    mask = torch.zeros(len(clips), longest, dtype=torch.bool)
    for row, clip in enumerate(clips):
        batch[row, : len(clip)] = clip
        mask[row, : len(clip)] = True
    return batch, mask


class EachFrame:
    """A video transform that applies an image transform to every frame.

    Args:
        transform: transform from a frame to a tensor ``(3, H, W)``.
    """

    def __init__(self, transform: Callable[[Image.Image], Tensor]) -> None:
        self._transform = transform

    def __call__(self, frames: list[Image.Image]) -> Tensor:
        return torch.stack([self._transform(frame) for frame in frames])


class ClipAugment:
    """Augments all frames of a video in the same way, with torchvision; draws from torch's random state.

    Without augmentation the frames are the same each time: the largest central crop of the input's aspect ratio.

    Args:
        config: timm's data configuration of the model: ``input_size``, ``mean``, ``std``, ``interpolation``.
        scale: range of the crop's area, relative to that of the frame.
        ratio: aspect ratio of the crop, relative to that of the model's input.
        hflip: probability of a horizontal flip.
        color_jitter: strength of changes in brightness, contrast and saturation; 0 for none.
    """

    def __init__(
        self,
        config: dict[str, Any],
        scale: tuple[float, float],
        ratio: tuple[float, float],
        hflip: float,
        color_jitter: float,
    ) -> None:
        height, width = config["input_size"][-2:]
        shape = width / height
        interpolation = v2.InterpolationMode(config["interpolation"])
        crop: Any = v2.RandomResizedCrop((height, width), scale, (ratio[0] * shape, ratio[1] * shape), interpolation)
        if tuple(scale) == tuple(ratio) == (1, 1):
            crop = partial(_crop_centrally, size=(height, width), interpolation=interpolation)
        steps: list[Any] = [crop, v2.RandomHorizontalFlip(hflip)]
        if color_jitter:
            steps.append(v2.ColorJitter(color_jitter, color_jitter, color_jitter))
        steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(config["mean"], config["std"])]
        self._steps = v2.Compose(steps)

    def __call__(self, frames: list[Image.Image]) -> Tensor:
        return self._steps(torch.stack([v2.functional.pil_to_tensor(frame) for frame in frames]))


def _crop_centrally(frames: Tensor, size: tuple[int, int], interpolation: v2.InterpolationMode) -> Tensor:
    """Returns the largest crop of an aspect ratio, resized.

    :class:`RandomResizedCrop` has this crop too, except that it moves one that is a pixel too small at random.
    """
    height, width = frames.shape[-2:]
    shape = size[1] / size[0]
    rows = min(height, round(width / shape))
    columns = min(width, round(height * shape))
    top, left = (height - rows) // 2, (width - columns) // 2
    return v2.functional.resized_crop(frames, top, left, rows, columns, list(size), interpolation, antialias=True)
