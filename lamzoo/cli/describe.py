"""``lamzoo describe``: a sentence for each window of a video, or of all videos of a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lamzoo.cli import _output as out
from lamzoo.cli._options import Checkpoint, Device, Json, check_masked, load_model
from lamzoo.errors import ConfigError, DataError
from lamzoo.files import check_target

if TYPE_CHECKING:
    from lamzoo.video.describe import DescribedWindow, VideoWindows


def describe(
    video: Annotated[Path, typer.Argument(metavar="VIDEO", help="A video file, or a folder of videos.")],
    model: Annotated[str, typer.Option(metavar="NAME", help=(
        "Of the family lam_describer, trained on the same features: arch.tag, hf-hub:REPO or a folder."))],
    features: Annotated[str, typer.Option(metavar="NAME", help=(
        "The towers that compute the features of frames: open_clip/NAME:TAG, hf-hub:REPO or a folder."))]
    = "open_clip/ViT-B-32:openai",
    checkpoint: Checkpoint = None,
    rate: Annotated[float | None, typer.Option(help="Frames per second [the model's, or 5].")] = None,
    seconds: Annotated[float | None, typer.Option(help="Length of a window in seconds [the model's].")] = None,
    start: Annotated[float, typer.Option(help="Start in seconds.")] = 0.0,
    end: Annotated[float | None, typer.Option(help="End in seconds [the end of the video].")] = None,
    beams: Annotated[int, typer.Option(help="Beams of the search; 1 is greedy.")] = 1,
    top_p: Annotated[float | None, typer.Option(help="Sample from the nucleus of this probability instead.")] = None,
    length_penalty: Annotated[float, typer.Option(help="Above 0, beam search favours longer sentences.")] = 1.0,
    context: Annotated[bool | None, typer.Option("--context/--no-context", help=(
        "Condition on the previous sentences [if the model supports it]."))] = None,
    output: Annotated[Path | None, typer.Option("--out", metavar="FILE.vtt|DIR", help=(
        "Also write subtitles; for a folder of videos, the folder of their descriptions and subtitles."))] = None,
    explain: Annotated[Path | None, typer.Option(metavar="FILE.png", help=(
        "Draw the masks and the attention of words in the first windows."))] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE.html", help=(
        "Interactive page of the masks and the attention in the first window."))] = None,
    device: Device = "auto",
    on_bad_input: Annotated[Literal["stop", "skip"], typer.Option(help=(
        "In a folder: stop at a video that cannot be described, or skip it with a warning."))] = "stop",
    force: Annotated[bool, typer.Option("--force", help="In a folder: describe all videos again.")] = False,
    json: Json = False,
) -> None:  # fmt: skip
    """Describes a video, one sentence per window, or all videos of a folder.

    For a folder, --out gets NAME.json and NAME.vtt for each video. Complete ones are kept, so an interrupted run
    resumes. The processes of torchrun share the videos.
    """
    from lamzoo.data.paths import folder_exists

    if folder_exists(video):
        if output is None or output.suffix == ".vtt" or start or end is not None or explain or html:
            raise ConfigError(
                f"{video} is a folder; name a folder for the descriptions with --out, and leave out --start, --end, "
                "--explain and --html, or give a video file"
            )
        options = {"towers": features, "rate": rate, "seconds": seconds, "context": context, "device": device}
        decoding: dict[str, Any] = {"beams": beams, "top_p": top_p, "length_penalty": length_penalty}
        _describe_folder(video, output, model, checkpoint, decoding, on_bad_input, force, json, options)
        return
    _check_files(video, output, explain, html)
    if force or on_bad_input != "stop":
        raise ConfigError(f"--force and --on-bad-input are options for a folder, and {video} is a file; leave them out")
    if not out.is_main_process():
        return
    from lamzoo.evaluation import resolve_device
    from lamzoo.video.describe import VideoWindows, describe_windows

    target = resolve_device(device)
    network: Any = load_model(model, checkpoint).to(target).eval()
    if html is not None:
        check_masked(network, model)  # before the work
    from lamzoo.models.describer.generation import GenerationConfig

    generation = GenerationConfig(beams=beams, top_p=top_p, length_penalty=length_penalty)
    windows = VideoWindows(
        video, network, towers=features, rate=rate, seconds=seconds, start=start, end=end, device=target
    )
    with out.progress_bar(f"{model} on {out.path_text(video)}", hidden=json) as advance:
        described = describe_windows(network, windows, generation=generation, context=context, progress=advance)
    if not json:
        _print(windows, described)
    if output is not None:
        from lamzoo.video.webvtt import Cue, write_webvtt

        write_webvtt(output, [Cue(each.start, each.end, each.text) for each in described])
    if explain is not None:
        from lamzoo.report import explain_windows

        explain_windows(network, windows, described, explain)
    if html is not None:
        from lamzoo.report import explore_window

        explore_window(network, windows, described[0], html, generation=generation)
    if json:
        towers = features if windows.rate is not None else None
        out.print_json({"model": model, "features": towers, **_record(windows, described, output, explain, html)})
        return
    for path in (output, explain, html):
        if path is not None:
            out.print_line(out.path_text(path))


def _describe_folder(
    videos: Path,
    output: Path,
    model: str,
    checkpoint: Path | None,
    decoding: dict[str, Any],
    on_bad_input: Literal["stop", "skip"],
    force: bool,
    json: bool,
    options: dict[str, Any],
) -> None:
    from lamzoo.models.describer.generation import GenerationConfig
    from lamzoo.video.described_folder import describe_videos
    from lamzoo.video.processes import launched_processes

    generation = GenerationConfig(**decoding)
    network = load_model(model, checkpoint)
    with (
        launched_processes() as processes,
        out.progress_bar(f"{model} on {out.path_text(videos)}", hidden=json or not processes.is_main) as advance,
    ):
        made = describe_videos(
            [videos],
            output,
            network,
            generation=generation,
            on_bad_input=on_bad_input,
            force=force,
            processes=processes,
            progress=advance,
            **options,
        )
    if not out.is_main_process():
        return
    if json:
        unreadable = [{"path": out.path_text(path), "reason": reason} for path, reason in made.unreadable.items()]
        facts = {"model": model, "features": options["towers"], "out": out.path_text(output), "new_videos": made.new}
        out.print_json({**facts, "unreadable": unreadable, "videos": made.records})
        return
    rows = [(len(made.records), made.new, len(made.unreadable), sum(len(each["windows"]) for each in made.records))]
    out.print_table(("videos", "made now", "left out", "sentences"), rows)
    out.print_line(out.path_text(output))


def _check_files(video: Path, output: Path | None, explain: Path | None, html: Path | None) -> None:
    """Checks the paths before anything is loaded."""
    from lamzoo.data.paths import file_exists

    if not file_exists(video):
        raise DataError(f"no such video: {video}")
    if output is not None:
        from lamzoo.video.webvtt import check_webvtt

        check_webvtt(output)
        if output.exists() and output.samefile(video):
            raise ConfigError(f"--out {output} would replace the video itself; choose another file")
    if explain is not None:
        from lamzoo.report.frame_rows import check_rows

        check_rows(explain, "picture")
    if html is not None:
        check_target(html, "page", suffix=".html")


def _print(windows: VideoWindows, described: Sequence[DescribedWindow]) -> None:
    # On its own line: the title of a narrow table would be wrapped.
    out.print_line(
        f"{out.path_text(windows.path)}, {windows.duration:.1f} s: {len(described)} of {len(windows)} windows, from "
        f"{' and '.join(windows.modalities)}"
    )
    rows = [(f"{each.start:.1f}", f"{each.end:.1f}", each.text) for each in described]
    out.print_table(("start (s)", "end (s)", "sentence"), rows, numbers=(0, 1))


def _record(
    windows: VideoWindows,
    described: Sequence[DescribedWindow],
    output: Path | None,
    explain: Path | None,
    html: Path | None,
) -> dict[str, Any]:
    from lamzoo.video.describe import as_record

    return {
        **as_record(windows, described),
        "out": None if output is None else out.path_text(output),
        "explain": None if explain is None else out.path_text(explain),
        "html": None if html is None else out.path_text(html),
    }
