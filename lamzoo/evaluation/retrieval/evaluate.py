"""Scores of a retrieval model on captioned videos: all embeddings first, then similarities block by block."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import timm.data
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lamzoo.data import BadInput, OnBadInput, plain_worker_errors
from lamzoo.data.retrieval import CaptionedVideos, leave_out_invalid_videos, set_aside_invalid_videos
from lamzoo.data.retrieval.clips import Clips, EachFrame, pad_clips
from lamzoo.data.video.sampling import FrameSampling, adjusted
from lamzoo.errors import ConfigError, UnsupportedHostError
from lamzoo.evaluation.retrieval.metrics import dual_softmax, retrieval_metrics, two_way_metrics
from lamzoo.evaluation.retrieval.reranking import check_rerank, rerank_candidates
from lamzoo.evaluation.runtime import Precision, check_batches, check_finite, inference, resolve_device
from lamzoo.reading import parse_json, to_json
from lamzoo.tasks.base import EvalRequest, Evaluation

_TEXTS = 1024  # texts per block of similarities


@dataclass(frozen=True)
class RetrievalResult:
    """Scores of a retrieval model.

    Attributes:
        metrics: as returned by :func:`retrieval_metrics`.
        dual: the same after :func:`dual_softmax`; None if not requested.
        first_stage: with ``rerank``, the metrics of the embeddings alone; else None.
        texts: number of texts.
        videos: number of videos.
        skipped: number of unreadable videos, left out with their texts.
        seconds: total time, including reading.
    """

    metrics: dict[str, dict[str, float]]
    dual: dict[str, dict[str, float]] | None
    first_stage: dict[str, dict[str, float]] | None
    texts: int
    videos: int
    skipped: int
    seconds: float


def evaluate_retrieval(
    model: nn.Module,
    dataset: CaptionedVideos,
    sampling: FrameSampling | None = None,
    *,
    batch_size: int = 16,
    device: str | torch.device = "auto",
    precision: Precision = "float32",
    workers: int = 0,
    dual: bool = False,
    rerank: int | None = None,
    on_bad_input: OnBadInput = "stop",
    progress: Callable[[str, int, int], None] | None = None,
) -> RetrievalResult:
    """Scores a model of the family ``lam_clip4clip`` on a split of captioned videos.

    Args:
        model: the model; it stays on the device.
        dataset: the split.
        sampling: frame sampling; the model's own by default.
        batch_size: videos, and texts, per forward pass.
        device: a torch device, or ``"auto"``.
        precision: autocast precision.
        workers: worker processes that read videos; 0 reads in the main process.
        dual: also score the similarities after dual softmax.
        rerank: score in two stages: embeddings select this many candidates for each query, and the joint transformer of
            ``similarity="tight"`` orders them, where otherwise it compares every pair. Not together with ``dual``.
        on_bad_input: ``"stop"`` at an unreadable or missing video, or ``"skip"``: check all videos first and leave
            these out.
        progress: called with the stage (``"scan"``, ``"videos"``, ``"texts"``), the number done, and the total.

    Returns:
        The scores.

    Raises:
        ConfigError: an invalid device, precision, batch size or number of workers, more frames than the model has
            positions for, ``rerank`` with a model that has no joint transformer, or ``dual`` with one that has.
        DataError: a video can't be read.
        UnsupportedHostError: the model is not a text-video retrieval model.
    """
    check_batches(batch_size, workers, precision)
    device = resolve_device(device)
    config = frames_config(model)
    if rerank is not None:
        check_rerank(model, rerank)
        if dual:
            raise ConfigError("dual softmax needs the scores of all pairs, and rerank has those of candidates; use one")
    elif dual and model.similarity_type == "tight":
        raise ConfigError(
            "dual softmax weights similarities by their size, and logits of similarity='tight' are only known up to a "
            "constant; leave it out."
        )
    chosen: Any = model.sampling if sampling is None else sampling
    moved = progress or (lambda what, done, total: None)
    start = time.perf_counter()
    bad: list[BadInput] = []
    leave_out_invalid_videos(dataset, dataset.lost, on_bad_input)  # raises before the model runs
    if on_bad_input == "skip":
        dataset, bad = set_aside_invalid_videos(
            dataset, chosen, "skip", workers=workers, progress=partial(moved, "scan")
        )
    loader = DataLoader(
        Clips(dataset, chosen, EachFrame(timm.data.create_transform(**config))),
        batch_size,
        collate_fn=pad_clips,
        num_workers=workers,
        pin_memory=device.type == "cuda",
    )
    model.to(device)
    with inference(model, device, precision, batch_size), plain_worker_errors():
        videos, masks = [], []
        for frames, mask in loader:
            videos.append(model.encode_video(frames.to(device), mask.to(device)).float())  # type: ignore[operator]
            masks.append(mask)
            moved("videos", sum(map(len, masks)), len(dataset))
        texts = encode_texts(model, dataset.texts, batch_size, partial(moved, "texts"))
        scores = score_embeddings(
            model, texts, *join_videos(videos, masks), dataset.video_of_text, dual=dual, rerank=rerank
        )
    seconds = time.perf_counter() - start
    return RetrievalResult(*scores, len(dataset.texts), len(dataset), len(bad), seconds)


def score_retrieval(model: Any, dataset: CaptionedVideos, request: EvalRequest) -> Evaluation:
    """Scores a retrieval model as ``lamzoo eval`` and ``lamzoo bench`` do; errors as of :func:`evaluate_retrieval`.

    Args:
        model: a model of the family ``lam_clip4clip``.
        dataset: its videos and texts.
        request: evaluation settings; its options are ``fps``, ``slicing``, ``dual_softmax``, ``rerank``
            and ``on_bad_input``.
    """
    frames_config(model)  # raises for other models
    options = request.options
    sampling = adjusted(model.sampling, fps=options.get("fps"), slicing=options.get("slicing"))
    result = evaluate_retrieval(
        model, dataset, sampling, batch_size=request.batch_size, device=request.device, precision=request.precision,
        workers=request.workers, dual=options.get("dual_softmax", False), rerank=options.get("rerank"),
        on_bad_input=options.get("on_bad_input", "stop"),
        progress=lambda what, done, total: request.progress(done, total, what),
    )  # fmt: skip
    notes = (f"{result.skipped} videos could not be read and were left out",) if result.skipped else ()
    return Evaluation(
        result.metrics,
        f"{result.texts:,} texts, {result.videos:,} videos",
        {"sampling": asdict(sampling), "rerank": options.get("rerank"), **asdict(result)},
        variants={
            name: scores
            for name, scores in (("with dual softmax", result.dual), ("first stage alone", result.first_stage))
            if scores is not None
        },
        notes=notes,
    )


def describe_input(model: Any) -> str:
    """Returns the input size of a retrieval model, for a model card."""
    height, width = model.image_size
    return f"{model.max_frames} frames of {width} x {height} px and one text"


def frames_config(model: nn.Module) -> dict[str, Any]:
    """Returns timm's frame preprocessing for a retrieval model, at the size that it was built for.

    Raises:
        UnsupportedHostError: the model is not a text-video retrieval model.
    """
    size: Any = getattr(model, "image_size", None)
    if size is None or not hasattr(model, "encode_video"):
        raise UnsupportedHostError(
            f"{type(model).__name__} does not compare texts with videos; use a model of the family lam_clip4clip."
        )
    return timm.data.resolve_model_data_config(model, {"input_size": (3, *size)})


def preprocessing_of(model: nn.Module) -> dict[str, Any]:
    """Returns :func:`frames_config` as it is read back from a file, in which tuples become lists; errors likewise."""
    settings: dict[str, Any] = parse_json(to_json(frames_config(model)))
    return settings


def encode_texts(
    model: Any, texts: Sequence[str], batch_size: int, progress: Callable[[int, int], None] | None = None
) -> Tensor:
    """Returns text embeddings ``(T, D)``, float32, on the model's device."""
    device = next(model.parameters()).device
    parts = []
    for start in range(0, len(texts), batch_size):
        parts.append(model.encode_text(model.tokenizer(list(texts[start : start + batch_size])).to(device)).float())
        if progress is not None:
            progress(min(start + batch_size, len(texts)), len(texts))
    return torch.cat(parts)


def score_embeddings(
    model: Any,
    texts: Tensor,
    videos: Tensor,
    frame_masks: Tensor,
    video_of_text: Sequence[int],
    *,
    dual: bool = False,
    rerank: int | None = None,
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]] | None, dict[str, dict[str, float]] | None]:
    """Computes the metrics of :func:`retrieval_metrics` from embeddings on the model's device.

    Args:
        model: a model of the family ``lam_clip4clip``.
        texts: ``(T, D)``.
        videos: ``(V, D)`` or ``(V, F, D)``.
        frame_masks: ``(V, F)``, bool.
        video_of_text: index of each text's video.
        dual: also compute them after dual softmax.
        rerank: candidates of each query in two stages; None compares all pairs.

    Returns:
        The metrics, with ``dual`` those after dual softmax, and with ``rerank`` those of the first stage alone.

    Raises:
        ConfigError: as of :func:`compare` and :func:`lamzoo.evaluation.retrieval.reranking.check_rerank`.
    """
    similarity = compare(model, texts, videos, frame_masks, dual=rerank is not None)
    metrics, first = retrieval_metrics(similarity, video_of_text), None
    if rerank is not None:
        staged = rerank_candidates(model, texts, videos, frame_masks, similarity, rerank)
        metrics, first = two_way_metrics(*staged, video_of_text), metrics
    return metrics, two_way_metrics(*dual_softmax(similarity), video_of_text) if dual else None, first


def join_videos(videos: Sequence[Tensor], masks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Concatenates the results of :meth:`encode_video` over batches, with frames padded to the longest video."""
    longest = max(mask.shape[1] for mask in masks)
    padded = [nn.functional.pad(mask, (0, longest - mask.shape[1])) for mask in masks]
    if inner := videos[0].ndim - 2:  # frames, and maybe their patches
        videos = [nn.functional.pad(video, (*[0] * 2 * inner, 0, longest - video.shape[1])) for video in videos]
    return torch.cat(list(videos)), torch.cat(padded).to(videos[0].device)


def compare(model: Any, texts: Tensor, videos: Tensor, frame_masks: Tensor, *, dual: bool = False) -> Tensor:
    """Returns the similarity ``(T, V)``, float32 on the CPU, of text and video embeddings, computed block by block.

    Args:
        model: a model of the family ``lam_clip4clip``.
        texts: ``(T, D)``.
        videos: ``(V, D)`` or ``(V, F, D)``, on the same device.
        frame_masks: ``(V, F)``, bool.
        dual: compare the embeddings alone, as the first of two stages does.

    Raises:
        ConfigError: a block does not fit into the device's memory, or a similarity is not finite.
    """
    similarity_of = model.dual_similarity if dual else model.similarity
    try:
        blocks = [similarity_of(some, videos, frame_masks).float().cpu() for some in texts.split(_TEXTS)]
    except torch.OutOfMemoryError as error:
        raise ConfigError(f"{len(videos)} videos do not fit on {videos.device} at once; use another device") from error
    similarity = torch.cat(blocks)
    check_finite(similarity)
    return similarity
