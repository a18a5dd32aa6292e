"""``lamzoo describe`` writes a sentence for each window, from the numbers that a model was trained on."""

from __future__ import annotations

import html
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import lamzoo
from lamzoo.errors import ConfigError, DataError
from tests.byte_pairs import write_byte_pairs
from tests.videos import write_clip

pytest.importorskip("open_clip")
pytest.importorskip("matplotlib")
from lamzoo.data.captions import create_caption_dataset
from lamzoo.evaluation.captions.evaluate import move, pad_streams
from lamzoo.models.describer.generation import GenerationConfig
from lamzoo.video.describe import VideoWindows, describe_windows
from lamzoo.video.extractor import FeatureExtractor
from lamzoo.video.features import extract_features
from tests.cli.test_find import TOWERS, saved
from tests.data.audio.test_spectra import write_pieces

SMALL: dict[str, Any] = {
    "rates": {"video": 5.0}, "seconds": 2.0, "width": 32, "heads": 2, "hidden": 32, "encoder_layers": 2,
    "decoder_layers": 1, "align": False, "lam": lamzoo.LamConfig(init="paper"),
}  # fmt: skip
CUE = re.compile(r"(\d\d+):(\d\d):(\d\d)\.(\d{3}) --> (\d\d+):(\d\d):(\d\d)\.(\d{3})\n(.+)\n")


def cues(path: Path) -> list[tuple[float, float, str]]:
    head, *blocks = path.read_text(encoding="utf-8").split("\n\n")
    assert head.strip() == "WEBVTT"
    found = []
    for block in blocks:
        match = CUE.fullmatch(block.rstrip("\n") + "\n")
        assert match, block
        h, m, s, ms, *end = map(int, match.groups()[:8])
        stop = 3600 * end[0] + 60 * end[1] + end[2] + end[3] / 1000
        found.append((3600 * h + 60 * m + s + ms / 1000, stop, html.unescape(match[9])))
    return found


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(tmp_path_factory.mktemp("towers") / "clip", "lam_clip4clip_micro", clip=TOWERS, head_layers=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Reads frames and sound, and has room for the sentences before."""
    folder = tmp_path_factory.mktemp("model") / "describer"
    return saved(folder, "lam_describer_micro", features={"video": 24, "audio": 128}, context_tokens=20, **SMALL)


@pytest.fixture(scope="module")
def listener(tmp_path_factory: pytest.TempPathFactory) -> str:
    """As for GRID: lips, which no file gives, and sound."""
    folder = tmp_path_factory.mktemp("model") / "listener"
    return saved(folder, "lam_describer_micro", features={"mouth": 384, "audio": 128}, **SMALL)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    write_clip(folder / "film.mp4", 85, fps=5, audio=17.0)
    write_clip(folder / "half.mp4", 25, fps=5, audio=2.5)  # its sound ends after half of the time
    write_clip(folder / "mute.mp4", 10, fps=5)
    write_clip(folder / "whole.mp4", 20, fps=5, audio=4.0, container_options={"movflags": "faststart"})
    return folder


@pytest.fixture
def film(clips: Path, tmp_path: Path) -> Path:
    (tmp_path / "my вид[red]os").mkdir()
    return Path(shutil.copy(clips / "film.mp4", tmp_path / "my вид[red]os" / "film.mp4"))


def loaded(name: str) -> Any:
    return lamzoo.create_model(name, pretrained=True).eval()


@pytest.mark.parametrize("size", [4, 64])
def test_some_clips_have_to_the_bit_the_features_that_they_have_among_all(towers: str, film: Path, size: int) -> None:
    extractor = FeatureExtractor(loaded(towers), clip_seconds=0.2, device="cpu", batch_size=size)
    whole = extractor.video(film).clips
    seen: list[tuple[int, int]] = []
    some = extractor.video(film, range(63, 66), lambda *done: seen.append(done))
    assert np.array_equal(some.clips, whole[63:66])
    assert seen[-1] == ((8, 8) if size == 4 else (85, 85))


def test_a_window_has_the_numbers_that_the_data_have_for_its_span(
    model: str, towers: str, film: Path, tmp_path: Path
) -> None:
    extract_features([film], film.parent / "features", towers, clip_seconds=0.2, device="cpu")
    spans = [(13.0 + 2 * k, min(15.0 + 2 * k, 16.5)) for k in range(2)]
    lines = [f"film.mp4,{start},{end},a tone\n" for start, end in spans]
    (film.parent / "captions.csv").write_text("video,start,end,caption\n" + "".join(lines))
    dataset = create_caption_dataset(f"videos:{film.parent}", "all")
    windows = VideoWindows(film, loaded(model), towers=towers, start=13.0, end=16.5, device="cpu")
    assert windows.spans == spans
    for number in range(2):
        here, there = windows.streams(number), dataset.read(number)
        assert list(here) == list(there) == ["video", "audio"]
        for name, stream in there.items():
            assert np.array_equal(here[name].features, stream.features), name
            assert np.array_equal(here[name].times, stream.times), name


def test_frames_are_read_once_and_only_those_that_are_wanted(
    model: str, towers: str, film: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = VideoWindows(film, loaded(model), towers=towers, start=2.0, end=6.0, device="cpu")
    asked: list[range] = []
    extractor: Any = windows._extractor
    whole = extractor.video
    monkeypatch.setattr(extractor, "video", lambda *args: (asked.append(args[1]), whole(*args))[1])
    described = describe_windows(loaded(model), windows)
    assert [(each.start, each.end) for each in described] == [(2.0, 4.0), (4.0, 6.0)]
    assert asked == [range(10, 30)]


def test_describe_prints_a_table_and_writes_subtitles(run, model: str, towers: str, film: Path) -> None:
    common = ("describe", film, "--model", model, "--features", towers, "--device", "cpu")
    done = run(*common, "--out", "film.vtt", "--beams", 2)
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines()[0] == f"{film}, 17.0 s: 9 of 9 windows, from video and audio"
    assert done.out.splitlines()[-1] == "film.vtt"
    found = cues(Path("film.vtt"))
    assert [start for start, *_ in found] == pytest.approx(np.arange(0, 17, 2))
    assert [end for _, end, _ in found] == pytest.approx([*np.arange(2, 17, 2), 17])
    assert sorted(path.name for path in Path().iterdir()) == ["film.vtt", film.parent.name]
    described = lamzoo.describe_video(film, model, towers=towers, generation=GenerationConfig(beams=2), device="cpu")
    assert [each.text for each in described] == [text for *_, text in found]
    assert all(each.text in done.out for each in described)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--beams", 3, "--length-penalty", 0.25), GenerationConfig(beams=3, length_penalty=0.25)),
        (("--top-p", 0.5), GenerationConfig(top_p=0.5)),
    ],
)
def test_options_of_the_decoding_reach_it(
    run, listener: str, clips: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[object, ...],
    expected: GenerationConfig,
) -> None:  # fmt: skip
    found = []

    def decode(*args: Any, generation: GenerationConfig, **kwargs: Any) -> None:
        found.append(generation)
        raise DataError("recorded")

    monkeypatch.setattr("lamzoo.video.describe.describe_windows", decode)
    monkeypatch.setattr("lamzoo.video.described_folder.describe_videos", decode)
    for place in ((clips / "half.mp4",), (clips, "--out", "described")):
        done = run("describe", *place, "--model", listener, "--device", "cpu", *options)
        assert (done.code, done.err.splitlines()[-1]) == (2, "lamzoo: recorded")
    assert found == [expected, expected]


def test_json_says_what_was_read_and_what_was_not(run, listener: str, clips: Path) -> None:
    done = run("describe", clips / "half.mp4", "--model", listener, "--json", "--seconds", 1.5)
    assert done.code == 0
    said = " ".join(done.err.split())
    assert "mouth can't be computed from a video file: described from audio alone" in said
    assert "without audio: 3.0 to 4.5 s, 4.5 to 5.0 s" in said
    record = json.loads(done.out)
    assert (record["features"], record["rate"], record["seconds"], record["duration"]) == (None, None, 1.5, 5.0)
    assert (record["modalities"], record["missing"]) == (["audio"], ["mouth"])
    assert [(each["start"], each["end"]) for each in record["windows"]] == [(0, 1.5), (1.5, 3)]
    assert record["skipped"] == [{"start": 3.0, "end": 4.5}, {"start": 4.5, "end": 5.0}]


def test_where_it_is_silent_the_frames_are_described(run, model: str, towers: str, clips: Path) -> None:
    common = ("--model", model, "--features", towers, "--json", "--device", "cpu")
    done = run("describe", clips / "half.mp4", *common)
    assert "has silent windows, described from video alone: 4.0 to 5.0 s" in " ".join(done.err.split())
    assert [each["modalities"] for each in json.loads(done.out)["windows"]] == [["video", "audio"]] * 2 + [["video"]]
    done = run("describe", clips / "mute.mp4", *common, "--seconds", 10)
    said = " ".join(done.err.split())
    assert "has no sound: described from video alone" in said
    assert "2.0 s to describe, less than a window of 10 s" in said
    assert [(each["start"], each["end"]) for each in json.loads(done.out)["windows"]] == [(0.0, 2.0)]


def test_a_describer_of_other_features_is_refused_before_weights_of_the_towers_are_asked_for(
    run, model: str, film: Path
) -> None:
    done = run("describe", film, "--model", model, "--device", "cpu")
    assert done.code == 2
    assert "takes 24 features per frame, and the towers compute 512" in done.err


def test_no_sentence_is_written_for_a_gap_in_the_sound(
    listener: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pieces = [(0.0, 44_100, "mono", 440.0), (4.1, 48_000, "stereo", 880.0)]  # of other formats, too
    film = write_pieces(tmp_path / "film.mkv", "mp2", pieces, seconds=6.0)
    described = lamzoo.describe_video(film, listener, seconds=1.0, device="cpu")
    assert [window.start for window in described] == [0, 1, 2, 4, 5]  # the encoder's last frame reaches into the third
    assert "without audio: 3.0 to 4.0 s" in caplog.text


def test_the_model_reads_what_it_wrote_before_as_far_as_it_fits(model: str, towers: str, film: Path) -> None:
    built = loaded(model)
    windows = VideoWindows(film, built, towers=towers, end=8.0, device="cpu")
    described = describe_windows(built, windows)
    texts = [each.text for each in described]
    assert {len(text.split()) for text in texts} == {7}  # and there is room for 18 words
    assert [each.context for each in described] == [(), tuple(texts[:1]), tuple(texts[:2]), tuple(texts[1:3])]
    alone = describe_windows(built, windows, context=False)
    assert all(not each.context for each in alone)
    batch = {name: move(stream, torch.device("cpu")) for name, stream in pad_streams([windows.streams(2)]).items()}
    assert built.describe(batch) == [alone[2].text]


def test_explain_draws_the_first_windows(run, model: str, towers: str, film: Path) -> None:
    options = ("--model", model, "--features", towers, "--end", "3", "--explain", "words.png", "--top-p", 0.9)
    done = run("describe", film, *options, "--html", "words.html")
    assert (done.code, done.out.splitlines()[-2:]) == (0, ["words.png", "words.html"])
    page = Path("words.html").read_text()
    assert "film.mp4, 0.0 to 2.0 s</title>" in page and '"frames": 12' in page
    with Image.open("words.png") as image:
        assert image.format == "PNG" and image.width == 8 * 130
    assert sorted(path.name for path in Path().iterdir()) == sorted(["words.html", "words.png", film.parent.name])


def test_a_video_and_texts_have_a_page_of_their_frames(run, towers: str, film: Path) -> None:
    done = run("explain", towers, film, "--text", "a tone", "--text", "a dog", "--html", "frames.html")
    assert (done.code, done.out) == (0, "frames.html\n"), done.err
    page = Path("frames.html").read_text()
    assert "on film.mp4</title>" in page and "<th>this text: a tone</th>" in page and '"labels": ["0.00 s"' in page
    for options, says in (
        (("--html", "x.html"), "compares videos with texts; give one with --text"),
        (("--text", "a", "--out", "x.png"), "can't draw as x.png; give --html FILE.html"),
        (("--text", "a", "--data", "grid:x", "--html", "x.html"), "exclude each other"),
    ):
        done = run("explain", towers, film, *options)
        assert (done.code, says in done.err) == (2, True), done.err
    done = run("explain", towers, "none.mp4", "--text", "a", "--html", "x.html")
    assert (done.code, "no such video: none.mp4" in done.err) == (2, True)


@pytest.mark.parametrize("reads", ["cross", "prefix"])
def test_gpt2_describes_and_explains(run, towers: str, film: Path, tmp_path: Path, reads: str) -> None:
    pytest.importorskip("transformers", reason="the extra gpt2")
    small = {name: value for name, value in SMALL.items() if name not in ("align", "decoder_layers")}
    gpt2 = {"reads": reads, "vocab_size": 300, "positions": 256, "width": 24, "layers": 2, "heads": 2}
    pairs = str(write_byte_pairs(tmp_path))
    features = {"video": 24, "audio": 128}
    name = saved(
        tmp_path / "gpt2", "lam_describer_gpt2", features=features, gpt2=gpt2, tokenizer_name=pairs, context_length=12,
        **{**small, "rates": {"video": 5.0, "audio": 50.0}},
    )  # fmt: skip
    options = ("--features", towers, "--end", 6, "--json", "--explain", "words.png", "--beams", 2)
    done = run("describe", film, "--model", name, *options)
    assert done.code == 0, done.err
    assert len(json.loads(done.out)["windows"]) == 3
    with Image.open("words.png") as image:
        assert image.format == "PNG"


def test_without_matplotlib_only_the_picture_is_refused(
    run, listener: str, film: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    options = ("describe", film, "--model", listener, "--end", 2)
    done = run(*options, "--explain", "words.png")
    assert done.code == 2 and "lamzoo[report]" in done.err
    assert run(*options).code == 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("nowhere.mp4", "no such video: nowhere.mp4"),
        ("folder", "folder is a folder"),
        ("broken.mp4", "broken.mp4"),
        ("cut.mp4", "cut.mp4"),
        ("sound.wav", "sound.wav"),
        ("film.mp4 --out film.srt", "film.srt"),
        ("film.mp4 --out nowhere/film.vtt", "nowhere"),
        ("film.mp4 --explain film.jpg", "film.jpg"),
        ("film.mp4 --html film.jpg", "film.jpg"),
        ("film.mp4 --seconds 0", "a window is 0 s long"),
        ("film.mp4 --rate 0", "0 frames per second"),
        ("film.mp4 --start 99", "from 99 to its end"),
        ("film.mp4 --start 3 --end 2", "from 3 to 2 s"),
        ("film.mp4 --start -1", "from -1 to its end"),
        ("film.mp4 --beams 0", "beams=0"),
        ("film.mp4 --beams 2 --top-p 0.5", "top_p=0.5"),
        ("film.mp4 --device abacus", "abacus"),
        ("film.mp4 --model moment_detr_micro", "no weights"),
        ("film.mp4 --features lam_vit_micro", "lam_clip4clip"),
        ("film.mp4 --model TOWERS", "does not generate captions"),
        ("", "VIDEO"),
    ],
)
def test_a_mistake_in_describe_is_one_line(
    run, model: str, towers: str, clips: Path, arguments: str, named: str
) -> None:
    Path("folder").mkdir()
    shutil.copy(clips / "half.mp4", "film.mp4")
    for name in ("broken.mp4", "sound.wav"):
        Path(name).write_text("nothing")
    Path("cut.mp4").write_bytes((clips / "whole.mp4").read_bytes()[:-3000])
    before = sorted(Path().iterdir())
    given = arguments.replace("TOWERS", towers).split()
    given += [] if "--model" in given else ["--model", model]
    given += [] if "--features" in given else ["--features", towers]
    given += [] if "--out" in given else ["--out", "out.vtt"]
    done = run("describe", *given)
    assert (done.code, done.out) == (2, "")
    assert named in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert sorted(Path().iterdir()) == before


def test_what_cannot_be_made_is_refused(run, listener: str, towers: str, clips: Path, tmp_path: Path) -> None:
    done = run("describe", clips / "mute.mp4", "--model", listener)
    assert done.code == 2 and "has no sound, the only input of the model that a file can provide" in done.err
    done = run("describe", clips / "film.mp4", "--model", listener, "--context")
    assert done.code == 2 and "no room for the sentences before" in done.err
    done = run("describe", clips / "half.mp4", "--model", listener, "--start", 3.5)
    assert done.code == 2 and "none of the 1 windows" in done.err
    lips = saved(tmp_path / "lips", "lam_describer_micro", features={"mouth": 384}, **SMALL)
    done = run("describe", clips / "film.mp4", "--model", lips)
    assert done.code == 2 and "none of which can be computed from a video file" in done.err
    wide = saved(tmp_path / "wide", "lam_describer_micro", features={"video": 512}, **SMALL)
    done = run("describe", clips / "film.mp4", "--model", wide, "--features", towers)
    assert done.code == 2 and "takes 512 features per frame, and the towers compute 24" in done.err


def test_a_damaged_video_leaves_nothing_behind(run, model: str, towers: str, film: Path) -> None:
    data = bytearray(film.read_bytes())
    place = data.index(b"mdat") + 40_000
    data[place : place + 20_000] = bytes(20_000)
    film.write_bytes(data)
    done = run("describe", film, "--model", model, "--features", towers, "--out", "film.vtt", "--explain", "film.png")
    assert done.code == 2 and "film.mp4" in done.err and len(done.err.strip().splitlines()) == 1
    assert list(Path().iterdir()) == [Path(film.parent.name)]


def test_errors_of_the_library_are_lamzoos_own(listener: str, clips: Path) -> None:
    with pytest.raises(ConfigError, match="at least"):
        lamzoo.describe_video(clips / "film.mp4", loaded(listener), seconds=float("nan"))
    with pytest.raises(DataError, match="no such video"):
        lamzoo.describe_video(clips / "none.mp4", loaded(listener))


def test_the_page_shows_the_sentence_that_was_printed(run, model: str, towers: str, clips: Path) -> None:
    line = ("describe", clips / "mute.mp4", "--model", model, "--features", towers, "--html", "page.html", "--json")
    done = run(*line, "--top-p", "1")
    assert done.code == 0, done.err
    text = json.loads(done.out)["windows"][0]["text"]
    greedy = json.loads(run(*line).out)["windows"][0]["text"]
    done = run(*line, "--top-p", "1")
    (with_masks, _) = re.findall(r'<td class="text">“(.*?)”</td>', Path("page.html").read_text(encoding="utf-8"))
    assert text != greedy and html.unescape(with_masks) == text


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("--html page.html --json", "has no learnable masks"),
        ("--force", "options for a folder"),
        ("--on-bad-input skip", "options for a folder"),
    ],
)
def test_options_that_cannot_be_met_are_refused_before_the_work(
    run, towers: str, clips: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch,
    options: str, named: str,
) -> None:  # fmt: skip
    monkeypatch.setattr("lamzoo.video.describe.describe_windows", lambda *args, **kwargs: pytest.fail("described"))
    plain = saved(
        tmp_path_factory.mktemp("plain") / "model",
        "lam_describer_micro",
        features={"audio": 128},
        **SMALL | {"lam": False},
    )
    done = run("describe", clips / "film.mp4", "--model", plain, "--features", towers, *options.split())
    assert (done.code, done.out, named in done.err) == (2, "", True), done.err
