"""``lamzoo find``: the moments of a video that match a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lamzoo.cli import _output as out
from lamzoo.cli._options import Checkpoint, Device, Json, check_masked, load_model
from lamzoo.errors import ConfigError, DataError
from lamzoo.files import check_target

if TYPE_CHECKING:
    from lamzoo.data.moments import MomentFeatures
    from lamzoo.evaluation.moments.evaluate import MomentPrediction
    from lamzoo.report.moment_strip import Span
    from lamzoo.video.extractor import FeatureExtractor, VideoFeatures

_STRIP = Path("lamzoo-find.png")
_FRAMES = 24  # on the page


def find(
    query: Annotated[str, typer.Argument(metavar="QUERY", help="Description of the moment, in quotes.")],
    video: Annotated[Path, typer.Argument(metavar="VIDEO", help="A video file.")],
    model: Annotated[str, typer.Option(metavar="NAME", help=(
        "Of the family lam_moment_detr, trained on the same features: arch.tag, hf-hub:REPO or a folder."))],
    features: Annotated[str, typer.Option(metavar="NAME", help=(
        "The towers that compute the features: open_clip/NAME:TAG, hf-hub:REPO or a folder."))]
    = "open_clip/ViT-B-32:openai",
    checkpoint: Checkpoint = None,
    clip_seconds: Annotated[float, typer.Option(help="Length of a clip in seconds, as in training.")] = 2.0,
    top: Annotated[int, typer.Option(min=1, help="Number of moments.")] = 5,
    strip: Annotated[Path | None, typer.Option(metavar="FILE.png", help=(
        f"The preview: a row of frames for each moment [{_STRIP}]."))] = None,
    no_strip: Annotated[bool, typer.Option("--no-strip", help="Draw no preview.")] = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE.html", help=(
        "Interactive page of the masks and the attention over the video."))] = None,
    device: Device = "auto",
    json: Json = False,
) -> None:  # fmt: skip
    """Finds the moments of a video that match a sentence."""
    if not query.strip():
        raise ConfigError("the query is empty; describe the moment")
    if no_strip and strip is not None:
        raise ConfigError("--strip and --no-strip contradict each other; leave one out")
    if html is not None:
        check_target(html, "page", suffix=".html")
    picture = None if no_strip else out.drawable(strip, _STRIP, "preview strip")
    from lamzoo.data.paths import file_exists, folder_exists

    if folder_exists(video):
        raise DataError(f"{video} is a folder; give a video file, or search the folder with `lamzoo search`")
    if not file_exists(video):
        raise DataError(f"no such video: {video}")
    from lamzoo.evaluation import resolve_device
    from lamzoo.report.moment_strip import Span, write_strip
    from lamzoo.video.extractor import FeatureExtractor, clip_middles, feature_widths

    target = resolve_device(device)
    clip_middles(clip_seconds)
    network: Any = load_model(model, checkpoint).to(target).eval()
    if html is not None:
        check_masked(network, model)  # before the work
    if (widths := feature_widths(features)) is not None:
        _check_widths(network, *widths)  # before the weights of unsuitable towers are downloaded
    extractor = FeatureExtractor(load_model(features, None), clip_seconds=clip_seconds, device=target)
    seen, features_of_query, found = _find(network, extractor, query, video)
    spans = [Span(float(start), float(end), float(score)) for start, end, score in found.windows[:top]]
    if not json:
        _print(query, video, seen, spans)
    if picture is not None:
        write_strip(picture, query, video, spans)
    if html is not None:
        _write_page(network, features_of_query, query, video, seen.duration, html)
    if json:
        record = _record(query, video, seen, found, spans, picture, html)
        out.print_json({"model": model, "features": features, **record})
        return
    for path in (picture, html):
        if path is not None:
            out.print_line(out.path_text(path))


def _write_page(network: Any, features: MomentFeatures, query: str, video: Path, duration: float, html: Path) -> None:
    from lamzoo.data.moments import MomentQuery
    from lamzoo.data.video.instants import Instants, middles
    from lamzoo.data.video.reader import read_video
    from lamzoo.report import explore_moments

    frames = read_video(video, Instants(at=middles(0.0, duration, _FRAMES))).frames
    explore_moments(network, features, MomentQuery("", query, video.name, duration, ()), html, frames=frames)


def _find(
    network: Any, extractor: FeatureExtractor, query: str, video: Path
) -> tuple[VideoFeatures, MomentFeatures, MomentPrediction]:
    """Reads the video and finds the query, after a check that the model fits the features."""
    from lamzoo.data.feature_arrays import unit
    from lamzoo.data.moments import MomentFeatures
    from lamzoo.data.moments.base import with_positions
    from lamzoo.evaluation.moments.evaluate import find_moments

    text = unit(extractor.texts([query])[0])
    _check_widths(network, extractor.video_dim, text.shape[1])  # before a long video is read in vain
    seen = extractor.video(video)
    features = MomentFeatures(with_positions(unit(seen.clips)), text)
    return seen, features, find_moments(network, [features], [seen.duration])[0]


def _check_widths(network: Any, video_dim: int, text_dim: int) -> None:
    """Raises an error unless the model takes features of these widths, per clip without positions and per word."""
    import numpy as np

    from lamzoo.data.moments import MomentFeatures
    from lamzoo.data.moments.base import with_positions
    from lamzoo.evaluation.moments.evaluate import check_features

    clip, word = (np.zeros((1, width), dtype=np.float32) for width in (video_dim, text_dim))
    check_features(network, MomentFeatures(with_positions(clip), word))


def _print(query: str, video: Path, seen: VideoFeatures, spans: Sequence[Span]) -> None:
    rows = [
        (rank, f"{span.start:.1f}", f"{span.end:.1f}", f"{span.score:.3f}") for rank, span in enumerate(spans, start=1)
    ]
    # On its own line: the title of a narrow table would be wrapped.
    out.print_line(f"{query}: {out.path_text(video)}, {seen.duration:.1f} s in {len(seen.clips)} clips")
    out.print_table(("rank", "start (s)", "end (s)", "score"), rows, numbers=(1, 2, 3))


def _record(
    query: str,
    video: Path,
    seen: VideoFeatures,
    found: MomentPrediction,
    spans: Sequence[Span],
    picture: Path | None,
    html: Path | None,
) -> dict[str, Any]:
    return {
        "query": query,
        "video": out.path_text(video),
        "duration": seen.duration,
        "strip": None if picture is None else out.path_text(picture),
        "html": None if html is None else out.path_text(html),
        "spans": [
            {"rank": rank, "start": span.start, "end": span.end, "score": span.score}
            for rank, span in enumerate(spans, start=1)
        ],
        "saliency": [round(float(score), 4) for score in found.saliency],
    }
