"""Models run with and without their masks, for the page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn

from lamzoo.adapters.capture import capture_masks
from lamzoo.adapters.hosts import token_layout
from lamzoo.adapters.state import masks_of
from lamzoo.adapters.wrappers import unwrap
from lamzoo.data.retrieval.video_files import find_video
from lamzoo.data.video.instants import Instants, middles
from lamzoo.data.video.reader import read_video
from lamzoo.errors import DataError, UnsupportedHostError, class_name
from lamzoo.evaluation import class_names
from lamzoo.evaluation.runtime import check_finite
from lamzoo.files import atomic_files, check_target
from lamzoo.lam import FactoredMask, Lam, MaskRecord
from lamzoo.profiling.inputs import evaluating
from lamzoo.reduction.pruning import ScoredAttention
from lamzoo.report.explorer.document import Answer, Exploration, ExploredLayer, TokenRun, best_answers, to_html
from lamzoo.report.mask_pictures import caption_of, patch_grid, run_all_queries, title_of
from lamzoo.report.model_view import view

Output = TypeVar("Output")

SHARP_SIDE = 448  # pixels of the picture that the page shows
_THUMBNAIL = 128  # pixels of the height of a frame


def explore_image(model: nn.Module, image: str | Path | Image.Image, path: str | Path) -> None:
    """Writes an interactive page of a model's masks and attention over one image.

    For each patch, layer and head it shows ``M[i, :]``, the attention with the mask and without it, and their
    difference; the importance of each token in each layer; the classes with the masks and without; and which patches
    are one token in a model with merged tokens, or have left in a pruned one.

    Args:
        model: a vision transformer of timm or open_clip with masks.
        image: a file or a Pillow image; rotated by its EXIF orientation.
        path: the HTML file, in an existing folder; an older file is replaced.

    Raises:
        UnsupportedHostError: the model has no masks, or no patch grid.
        ConfigError: the model's outputs or masks are not finite.
        DataError: the image can't be read, or the file can't be written.
    """
    path, model = Path(path), unwrap(model)
    check_target(path, "page", suffix=".html")
    masks = masks_of(model)
    shown = view(model, image, sharp_side=SHARP_SIDE)
    records, masked, plain = run_twice(model, lambda: run_all_queries(model, shown.images))
    picture = to_picture(shown.sharp)
    sequences: dict[tuple[int, tuple[int, int]], tuple[TokenRun, ...]] = {}
    layers = []
    for name, record in records.items():
        prefix, grid = _layout(model, name, shown.images, record)
        if (prefix, grid) not in sequences:
            sequences[prefix, grid] = patch_tokens(model, name, prefix, grid, picture)
        runs = sequences[prefix, grid]
        layers.append(ExploredLayer(name.removesuffix(".attn"), masks[f"{name}.lam"].config, record, runs, runs))
    config = next(iter(masks.values())).config
    subject = "image" if isinstance(image, Image.Image) else Path(image).name
    exploration = Exploration(
        title=f"{title_of(model)} on {subject}",
        layers=layers,
        facts=(caption_of(config, None, shown.images),),
        answers=answers_of(model, masked, plain),
    )
    write_page(exploration, path)


def write_page(exploration: Exploration, path: Path) -> None:
    """Writes the page to a file; raises as :func:`to_html`, or a DataError if the file can't be written."""
    text = to_html(exploration)
    with atomic_files(DataError) as stage:
        stage(path).write_text(text, encoding="utf-8")


def run_twice(model: nn.Module, run: Callable[[], Output]) -> tuple[Mapping[str, MaskRecord], Output, Output]:
    """Runs a model with its masks and with neutral ones, in evaluation mode and without gradients.

    Returns:
        What was captured with the masks, and both outputs.
    """
    with evaluating(model), torch.no_grad():
        with capture_masks(model) as captured:
            masked = run()
            records = dict(captured)
        with neutral_masks(model):
            plain = run()
    return records, masked, plain


def answers_of(model: nn.Module, masked: Any, plain: Any) -> list[Answer]:
    """Returns the most probable classes of a classifier's output ``(1, classes)``; none for other outputs."""
    if not isinstance(masked, Tensor) or masked.ndim != 2 or getattr(model, "num_classes", 0) != masked.shape[1]:
        return []
    check_finite(masked)
    names = [name.split(",")[0] for name in class_names(model, masked.shape[1])]
    return best_answers(names, masked[0], plain[0])


@contextmanager
def neutral_masks(model: nn.Module) -> Iterator[None]:
    """Makes the masks leave the attention scores as they are, while the context is open.

    Merged tokens stay merged, and masks still decide which tokens leave a pruned model.
    """

    def neutral(lam: Lam, args: tuple[Any, ...], mask: FactoredMask) -> FactoredMask:
        left, right = (torch.zeros_like(factor) for factor in mask)
        left[..., 0] = right[..., 0] = lam.config.mask_op.identity
        return FactoredMask(left, right)

    def scored(lam: Lam, hook: ScoredAttention, attention: Callable[..., Tensor], *args: Any, **options: Any) -> Tensor:
        def attend(*inputs: Any, **more: Any) -> Tensor:
            return attention(*inputs[:-1], neutral(lam, (), inputs[-1]), **more)

        return hook(attend, *args, **options)

    with ExitStack() as stack:
        for lam in masks_of(model).values():
            hook = lam.attention_hook
            if isinstance(hook, ScoredAttention):
                lam.attention_hook = partial(scored, lam, hook)
                stack.callback(setattr, lam, "attention_hook", hook)
            else:
                stack.callback(lam.register_forward_hook(neutral).remove)
        # Capturing keeps fused attention, which doesn't call the masks, out of the way.
        stack.enter_context(capture_masks(model))
        yield


def _layout(model: nn.Module, path: str, images: Tensor, record: MaskRecord) -> tuple[int, tuple[int, int]]:
    """Returns the number of prefix tokens and the patch grid of the stack's input."""
    count = record.num_tokens[1]
    found = patch_grid(model, path, images, count)
    if found is None:
        raise UnsupportedHostError(
            f"{path} of {class_name(model)} attends to {count} tokens that aren't a patch grid; the page shows images "
            "in vision transformers of timm and open_clip."
        )
    return found


def patch_tokens(
    model: nn.Module, path: str, prefix: int, grid: tuple[int, int], picture: Image.Image
) -> tuple[TokenRun, ...]:
    """Returns the tokens of an image in a layer: class and other prefix tokens, then the patches."""
    pooling = token_layout(model, path).pooling
    names = ["class"] if prefix and pooling is not None and pooling.has_class_token else []
    names += [str(number) for number in range(len(names), prefix)]
    prefixes = (TokenRun("token", tuple(names)),) if prefix else ()
    return (*prefixes, TokenRun("patch", grid=grid, picture=picture))


def to_picture(pixels: Tensor) -> Image.Image:
    """Returns an image of ``(H, W, 3)``, 0 to 1."""
    return Image.fromarray((pixels * 255).round().byte().numpy())


def frames_of(
    dataset: Any, index: int, count: int, folder: str | Path | None, place: tuple[str, float, float]
) -> list[Image.Image]:
    """Returns frames of an item of a data set, evenly spaced.

    Args:
        dataset: its own frames are returned if it has some.
        index: the item.
        count: number of frames.
        folder: else, folder of video files; None for no frames.
        place: name of the video file in the folder, without extension, and the start and end of the span, seconds.

    Raises:
        DataError: there is no such folder, no such video in it, or several, or it can't be read.
        MissingExtraError: PyAV, which reads video files, is not installed.
    """
    frames: list[Image.Image] = dataset.frames(index, count)
    if frames or folder is None:
        return frames
    video, start, end = place
    return read_video(find_video(Path(folder), video), Instants(at=middles(start, end, count))).frames


def without_frames(video: str) -> str:
    """Returns the line of the page that says why there are no thumbnails, and how to have them."""
    return f"Thumbnails need the video, and the data have only its features: give --videos DIR with {video}.mp4 in it."


def thumbnails(frames: Sequence[Image.Image]) -> tuple[Image.Image, ...]:
    """Returns frames at the size of the first one's thumbnail, for :attr:`TokenRun.frames`."""
    if not frames:
        return ()
    width, height = frames[0].size
    scale = min(1.0, _THUMBNAIL / height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return tuple(frame.convert("RGB").resize(size, Image.Resampling.BICUBIC) for frame in frames)
