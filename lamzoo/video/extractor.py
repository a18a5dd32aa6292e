"""Feature extraction with CLIP's towers: one feature per clip of a video and per word of a sentence."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import timm.data
import torch
from torch import Tensor, nn

from lamzoo.data.feature_arrays import Features
from lamzoo.data.retrieval.clips import EachFrame, FramesTransform
from lamzoo.data.video.instants import ClipMiddles
from lamzoo.data.video.reader import read_video_pieces
from lamzoo.errors import ConfigError, UnsupportedHostError
from lamzoo.evaluation.resume import settings_of, weights_sha256
from lamzoo.evaluation.retrieval.evaluate import frames_config, preprocessing_of
from lamzoo.evaluation.runtime import Precision, check_batches, inference, resolve_device
from lamzoo.registry.factory import create_model
from lamzoo.registry.refs import name_of

_logger = logging.getLogger(__name__)

_AT_ONCE = 128  # frames of a video in memory, 0.8 GB in full HD; or a batch, if that is larger


@dataclass(frozen=True)
class VideoFeatures:
    """Features of a video.

    Attributes:
        clips: ``(N, D)``, float32, one row per clip, not normalised.
        duration: duration of the video, seconds.
    """

    clips: Features
    duration: float


class FeatureExtractor:
    """Computes CLIP features of videos and sentences for QVHighlights' models.

    The feature of a clip is the image embedding of one frame, the last one that appears before the middle of the clip
    (see :class:`ClipMiddles`). The features of a sentence are the hidden states of its tokens, from start to end, after
    the last norm of the text tower and before its projection: 512 wide for ViT-B/32. Features are not normalised; their
    readers do that.

    Attributes:
        model: the towers, on the device.
        sampling: the frame sampling.
        transform: transform from frames to the input of the model.
        chunk: frames that are read at once, a multiple of the batch size.
        clip_seconds: length of a clip.

    Args:
        model: a name with weights, ``open_clip/NAME:TAG``, or a model of the family ``lam_clip4clip``, as created by
            such a name.
        clip_seconds: length of a clip.
        device: a torch device, or ``"auto"``.
        precision: precision of the autocast.
        batch_size: frames, or sentences, per batch.

    Raises:
        ConfigError: an argument is invalid.
        UnsupportedHostError: the model has no image and text towers, or no end token of texts.
        WeightsError: the weights of the model are not available.
    """

    def __init__(
        self,
        model: str | nn.Module = "open_clip/ViT-B-32:openai",
        *,
        clip_seconds: float = 2.0,
        device: str | torch.device = "auto",
        precision: Precision = "float32",
        batch_size: int = 64,
    ) -> None:
        check_batches(batch_size, precision=precision)
        self.sampling, self.clip_seconds = clip_middles(clip_seconds), clip_seconds
        self._device, self._precision, self._batch_size = resolve_device(device), precision, batch_size
        self.chunk = max(1, _AT_ONCE // batch_size) * batch_size  # so that batches don't depend on the chunks
        self.model: Any = create_model(model, pretrained=True) if isinstance(model, str) else model
        self.transform: FramesTransform = EachFrame(timm.data.create_transform(**frames_config(self.model)))
        if not self.model.gives_words or not hasattr(self.model.tokenizer, "eot_token_id"):
            raise UnsupportedHostError(
                f"the text tower of {name_of(self.model)} gives no features of words, or no end of a text; use another "
                "model, such as open_clip/ViT-B-32:openai."
            )
        self.model.to(self._device)

    @property
    def video_dim(self) -> int:
        """Feature width of a clip, without its two positions."""
        return self.model.num_features

    @cached_property
    def text_dim(self) -> int:
        """Feature width of a word."""
        return self.texts(["a"])[0].shape[1]

    def video(
        self, path: str | Path, clips: range | None = None, progress: Callable[[int, int], None] | None = None
    ) -> VideoFeatures:
        """Computes the features of a video, batch by batch.

        Args:
            path: the file.
            clips: range of clips, with a step of 1; all by default. The features don't depend on the range, bit by bit,
                because batches that contain other clips too are computed whole.
            progress: called with the number of clips done and their total.

        Raises:
            ConfigError: the features are not finite in this precision, or a batch doesn't fit into the memory of the
                device.
            DataError: the video can't be read.
            MissingExtraError: PyAV is not installed.
        """
        sampling, before = self.sampling, 0
        if clips is not None:
            before = clips.start % self._batch_size
            whole = math.ceil((before + len(clips)) / self._batch_size) * self._batch_size
            sampling = replace(sampling, first=clips.start - before, max_frames=whole)
        parts, duration = [], 0.0
        for frames, duration, _ in read_pieces(Path(path), sampling, self.transform, self.chunk):
            parts.append(self.frames(frames))
            if progress is not None:
                progress(sum(map(len, parts)), len(sampling.numbers(duration)))
        features = np.concatenate(parts)
        if clips is not None:
            features = features[before : before + len(clips)]
        return VideoFeatures(self.finite(features, path), duration)

    def frames(self, frames: Tensor) -> Features:
        """Returns the features ``(F, D)``, float32, of preprocessed frames ``(F, 3, H, W)``."""
        with self._inference():
            some = frames.split(self._batch_size)
            parts = [self.model.encode_frames(part[None].to(self._device))[0].float().cpu() for part in some]
        return torch.cat(parts).numpy()

    def texts(self, texts: Sequence[str]) -> list[Features]:
        """Returns the features ``(W, D)``, float32, of the tokens of each text.

        Raises:
            ConfigError: the features are not finite in this precision, or a batch doesn't fit into the memory of the
                device.
        """
        found: list[Features] = []
        for start in range(0, len(texts), self._batch_size):
            some = list(texts[start : start + self._batch_size])
            tokens = self.model.tokenizer(some)
            with self._inference():
                states = self.model.word_states(tokens.to(self._device)).float().cpu()
            lengths = states.any(dim=-1).sum(dim=1)  # zeros are padding
            for text, of_text, length in zip(some, states, lengths.tolist(), strict=True):
                found.append(self.finite(of_text[:length].clone().numpy(), repr(text)))
        return found

    def finite(self, features: Features, what: str | Path) -> Features:
        """Returns the features; raises a :class:`ConfigError` that names their source if one is not finite."""
        if not np.isfinite(features).all():
            raise ConfigError(
                f"the features of {what} are not finite in {self._precision}; use float32, or other weights"
            )
        return features

    def origin(self) -> dict[str, Any]:
        """Returns the provenance that feature files record, as JSON values."""
        return {
            "model": name_of(self.model),
            "weights": weights_sha256(self.model),
            **settings_of(self.model),
            "preprocessing": preprocessing_of(self.model),
        }

    def _inference(self) -> AbstractContextManager[None]:
        return inference(self.model, self._device, self._precision, self._batch_size)


def feature_widths(model: str) -> tuple[int, int] | None:
    """Returns the feature widths of a clip and of a word, without loading weights.

    Args:
        model: a name, as for :class:`FeatureExtractor`.

    Returns:
        Both widths; None if they are unknown until the towers are loaded.

    Raises:
        UnsupportedHostError: the model has no image and text towers.
        UnknownModelError: there is no such model.
    """
    try:
        with torch.device("meta"):
            towers: Any = create_model(model)
            frames_config(towers)
            if not towers.gives_words:
                return None  # FeatureExtractor raises the error
            states = towers.word_states(towers.tokenizer(["a"]).to("meta"))
    except (OSError, RuntimeError) as error:  # the model needs files from a hub, or its sizes depend on values
        _logger.debug("the feature widths of %s are unknown until its weights are loaded: %s", model, error)
        return None
    return towers.num_features, states.shape[-1]


def read_pieces(
    path: Path, sampling: ClipMiddles, transform: FramesTransform, size: int
) -> Iterator[tuple[Tensor, float, bool]]:
    """Reads the sampled frames of a video in chunks of ``size``, so that memory doesn't grow with its length.

    Yields:
        Frames ``(F, 3, H, W)``, the duration of the video in seconds, and whether these are its last frames.
    """
    done = 0
    for clip in read_video_pieces(path, sampling, size):
        done += len(clip.frames)
        yield transform(clip.frames), clip.duration, done >= len(sampling.numbers(clip.duration))


def clip_middles(clip_seconds: float) -> ClipMiddles:
    """Returns the sampling for a clip length; raises a :class:`ConfigError` if the length is invalid."""
    if not (clip_seconds > 0 and math.isfinite(clip_seconds)):
        raise ConfigError(f"a clip is {clip_seconds} s long; it must be more than 0")
    return ClipMiddles(fps=1 / clip_seconds)
