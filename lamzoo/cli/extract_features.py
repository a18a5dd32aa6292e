"""``lamzoo extract-features``: the features of videos and queries that moment models read, as npz files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lamzoo.cli import _output as out
from lamzoo.cli._options import Device, Json, Precision


def extract_features(
    videos: Annotated[list[Path], typer.Argument(metavar="VIDEOS...", help="Video files and folders.")],
    output: Annotated[Path, typer.Option("--out", metavar="DIR", help="Output folder.")],
    model: Annotated[str, typer.Option(metavar="NAME", help=(
        "CLIP's towers: open_clip/NAME:TAG, hf-hub:REPO or a folder."))] = "open_clip/ViT-B-32:openai",
    queries: Annotated[Path | None, typer.Option(metavar="FILE.jsonl", help=(
        "Queries with qid and query, in QVHighlights' format; their words are embedded too."))] = None,
    clip_seconds: Annotated[float, typer.Option(help="Length of a clip in seconds.")] = 2.0,
    device: Device = "auto",
    precision: Precision = "float32",
    batch_size: Annotated[int, typer.Option(help="Frames or queries per batch.")] = 64,
    workers: Annotated[int, typer.Option(help="Worker processes that read videos.")] = 0,
    on_bad_input: Annotated[Literal["stop", "skip"], typer.Option(help=(
        "Stop at a video that cannot be read, or skip it with a warning."))] = "stop",
    force: Annotated[bool, typer.Option("--force", help="Compute all files again.")] = False,
    json: Json = False,
) -> None:  # fmt: skip
    """Computes the features that moment models read.

    One npz file for each video and query. Complete files are kept, so an interrupted run resumes. The processes of
    torchrun share the videos.
    """
    from lamzoo.video.features import extract_features
    from lamzoo.video.processes import launched_processes

    with (
        launched_processes() as processes,
        out.progress_bar(f"{model} on {out.path_text(videos[0])}", hidden=json or not processes.is_main) as advance,
    ):
        made = extract_features(
            videos,
            output,
            model,
            queries=queries,
            clip_seconds=clip_seconds,
            device=device,
            precision=precision,
            batch_size=batch_size,
            workers=workers,
            on_bad_input=on_bad_input,
            force=force,
            processes=processes,
            progress=lambda what, done, total: advance(done, total, what),
        )
    if not out.is_main_process():
        return
    record: dict[str, Any] = {
        "model": model,
        "out": out.path_text(output),
        "clip_seconds": clip_seconds,
        "videos": made.videos,
        "new_videos": made.new_videos,
        "queries": made.queries,
        "new_queries": made.new_queries,
        "unreadable": [{"path": out.path_text(path), "reason": reason} for path, reason in made.unreadable.items()],
    }
    if json:
        out.print_json(record)
        return
    rows = [("videos", made.videos, made.new_videos, len(made.unreadable))]
    if queries is not None:
        rows.append(("queries", made.queries, made.new_queries, 0))
    out.print_table(("features of", "there", "made now", "left out"), rows)
    out.print_line(out.path_text(output))
