"""``lamzoo search``: the videos of a folder that match a text."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lamzoo.cli import _output as out
from lamzoo.cli._options import Checkpoint, Device, Json, Precision, load_model
from lamzoo.errors import ConfigError

if TYPE_CHECKING:
    from lamzoo.data.video.sampling import FrameSampling, Slicing
    from lamzoo.video.search import Match, VideoIndex

    _Answer = tuple[str, list[Match], float]  # query, matches, seconds

_SHEET = Path("lamzoo-search.png")


def search(
    queries: Annotated[list[str], typer.Argument(metavar="QUERY...", help="Description of the video, in quotes.")],
    videos: Annotated[Path, typer.Option(metavar="DIR", help="Folder of videos, including subfolders.")],
    model: Annotated[str, typer.Option(metavar="NAME", help=(
        "A model of the family lam_clip4clip: arch, arch.tag, open_clip/NAME:TAG, hf-hub:REPO or a folder."))]
    = "lam_clip4clip",
    checkpoint: Checkpoint = None,
    index: Annotated[Path | None, typer.Option(metavar="FILE.safetensors", help=(
        "File of the embeddings [in the user's cache, one for each DIR and weights]."))] = None,
    top: Annotated[int, typer.Option(min=1, help="Matches per query.")] = 10,
    rerank: Annotated[int | None, typer.Option(min=1, metavar="K", help=(
        "With a tight head: embeddings select K videos, at least --top, and the head orders them [the head compares "
        "all videos]."))] = None,
    sheet: Annotated[Path | None, typer.Option(metavar="FILE.png", help=(
        f"The contact sheet; of several queries they are numbered [{_SHEET}]."))] = None,
    no_sheet: Annotated[bool, typer.Option("--no-sheet", help="Draw no contact sheet.")] = False,
    fps: Annotated[float | None, typer.Option(help=(
        "Frames per second; 0 for all [as in the index, otherwise 1]."))]
    = None,
    max_frames: Annotated[int | None, typer.Option(min=1, help=(
        "Maximum number of frames [as in the index, otherwise the model's number of positions]."))] = None,
    slicing: Annotated[Literal["head", "middle", "tail", "uniform"] | None, typer.Option(
        help="Selection of frames in longer videos [as in the index, otherwise uniform].")] = None,
    device: Device = "auto",
    precision: Precision = "float32",
    batch_size: Annotated[int, typer.Option(help="Videos per batch.")] = 16,
    workers: Annotated[int, typer.Option(help="Worker processes that read videos.")] = 0,
    on_bad_input: Annotated[Literal["stop", "skip"], typer.Option(help=(
        "Stop at a video that cannot be read, or skip it with a warning."))] = "skip",
    approximate: Annotated[bool | None, typer.Option("--approximate/--exact", help=(
        "Search with faiss in clusters of the embeddings, or all embeddings [from 100,000 videos on, with faiss]."))]
    = None,
    force: Annotated[bool, typer.Option("--force", help="Embed all videos again.")] = False,
    json: Json = False,
) -> None:  # fmt: skip
    """Finds the videos of a folder that match a text.

    The first call embeds the videos into an index; later calls embed only new and changed videos. The processes of
    torchrun share the embedding.
    """
    if not all(query.strip() for query in queries):
        raise ConfigError("the query is empty; describe the video")
    if no_sheet and sheet is not None:
        raise ConfigError("--sheet and --no-sheet contradict each other; leave one out")
    sheets = [] if no_sheet else _sheets(sheet, len(queries))
    from lamzoo.data.video.reader import find_videos
    from lamzoo.evaluation import check_batches, resolve_device
    from lamzoo.evaluation.retrieval.evaluate import frames_config
    from lamzoo.evaluation.retrieval.reranking import check_rerank
    from lamzoo.report.contact_sheet import write_contact_sheet
    from lamzoo.video.processes import launched_processes
    from lamzoo.video.search import index_videos

    target = resolve_device(device)
    check_batches(batch_size, workers, precision)
    find_videos([videos])
    network = load_model(model, checkpoint)
    frames_config(network)
    if rerank is not None:
        check_rerank(network, rerank, top)
    with (
        launched_processes() as processes,
        out.progress_bar(f"{model} on {out.path_text(videos)}", hidden=json or not processes.is_main) as advance,
    ):
        found = index_videos(
            videos,
            network,
            index=index,
            sampling=_sampling(network, fps, max_frames, slicing),
            batch_size=batch_size,
            device=target,
            precision=precision,
            workers=workers,
            on_bad_input=on_bad_input,
            force=force,
            processes=processes,
            approximate=approximate,
            progress=advance,
        )
    if not out.is_main_process():
        return
    _ = network.tokenizer  # read from a file at first use, which must not count as the time of a query
    answers = []
    for query in queries:
        start = time.perf_counter()
        matches = found.search(query, top, rerank=rerank)
        answers.append((query, matches, time.perf_counter() - start))
    if not json:
        _print(found, answers)
    for picture, (query, matches, _) in zip(sheets, answers, strict=False):
        write_contact_sheet(picture, query, matches)
    if json:
        out.print_json({"model": model, **_record(found, answers, sheets)})
    else:
        for picture in sheets:
            out.print_line(out.path_text(picture))


def _sheets(sheet: Path | None, count: int) -> list[Path]:
    """Returns the paths of the contact sheets after a check that they can be drawn; none if not requested."""
    first = out.drawable(sheet, _SHEET, "contact sheet")
    if first is None:
        return []
    if count == 1:
        return [first]
    return [first.with_name(f"{first.stem}-{number}{first.suffix}") for number in range(1, count + 1)]


def _sampling(model: Any, fps: float | None, max_frames: int | None, slicing: Slicing | None) -> FrameSampling | None:
    from lamzoo.data.video.sampling import adjusted

    if fps is None and max_frames is None and slicing is None:
        return None
    return adjusted(model.sampling, fps=fps, max_frames=max_frames, slicing=slicing)


def _print(found: VideoIndex, answers: Sequence[_Answer]) -> None:
    for query, matches, seconds in answers:
        rows = [
            (rank, f"{match.score:.3f}", match.duration, out.path_text(match.path))
            for rank, match in enumerate(matches, start=1)
        ]
        title = f"{query}: {len(rows)} of {len(found)} videos, {1000 * seconds:.1f} ms"
        out.print_table(("rank", "score", "duration (s)", "file"), rows, title=title, numbers=(1,))
    if found.unreadable:
        count = len(found.unreadable)
        out.print_line(f"{count} {'video' if count == 1 else 'videos'} cannot be read; --json lists them")


def _record(found: VideoIndex, answers: Sequence[_Answer], sheets: Sequence[Path]) -> dict[str, Any]:
    return {
        "index": out.path_text(found.path),
        "videos": len(found),
        "embedded": found.embedded,
        "unreadable": [{"path": out.path_text(path), "reason": reason} for path, reason in found.unreadable.items()],
        "queries": [
            {
                "query": query,
                "seconds": seconds,
                "sheet": out.path_text(sheets[number]) if sheets else None,
                "matches": [
                    {"rank": rank, "score": match.score, "duration": match.duration, "path": out.path_text(match.path)}
                    for rank, match in enumerate(matches, start=1)
                ],
            }
            for number, (query, matches, seconds) in enumerate(answers)
        ],
    }
