"""``lamzoo extract-features`` and ``lamzoo find`` print tables and draw a preview; what is wrong is one sentence."""

from __future__ import annotations

import json
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
from tests.videos import nearest, pictures, write_clip

pytest.importorskip("open_clip")
pytest.importorskip("matplotlib")
from lamzoo.data.moments import MomentFeatures
from lamzoo.data.moments.base import with_positions
from lamzoo.data.moments.feature_folder import FeatureFolder
from lamzoo.evaluation.moments.evaluate import find_moments
from lamzoo.report import moment_strip as drawing
from lamzoo.report.moment_strip import Span, write_strip

TOWERS: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "head_width": 16, "layers": 1},
    "text_cfg": {"context_length": 16, "vocab_size": 600, "width": 32, "heads": 2, "layers": 1},
}


def saved(folder: Path, name: str, **options: Any) -> str:
    torch.manual_seed(0)
    built: Any = lamzoo.create_model(name, **options)
    lamzoo.save_pretrained(built, folder)
    return f"local-dir:{folder}"


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(tmp_path_factory.mktemp("towers") / "clip", "lam_clip4clip_micro", clip=TOWERS, head_layers=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(tmp_path_factory.mktemp("model") / "detr", "lam_moment_detr_micro", video_dim=26, text_dim=32)


@pytest.fixture(scope="module")
def filmed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("filmed") / "film.mp4", 60, fps=5)


@pytest.fixture
def video(filmed: Path, tmp_path: Path) -> Path:
    (tmp_path / "my вид[red]os").mkdir()
    return Path(shutil.copy(filmed, tmp_path / "my вид[red]os" / "film.mp4"))


def test_features_that_were_extracted_answer_as_find_does(run, model: str, towers: str, video: Path) -> None:
    Path("queries.jsonl").write_text(json.dumps({"qid": 7, "query": "a woman smiles"}))
    options = ("--model", towers, "--out", "data/features", "--queries", "queries.jsonl", "--device", "cpu")
    done = run("extract-features", video.parent, *options)
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines()[-1] == "data/features"
    folder = FeatureFolder(Path("data"))
    features = MomentFeatures(with_positions(folder.video("film")), folder.text(7))
    expected = find_moments(lamzoo.create_model(model, pretrained=True).eval(), [features], [12.0])[0]
    done = run("find", "a woman smiles", video, "--model", model, "--features", towers, "--json", "--top", 3)
    assert (done.code, done.err) == (0, "")
    record = json.loads(done.out)
    spans = [[span["start"], span["end"], span["score"]] for span in record["spans"]]
    np.testing.assert_allclose(spans, expected.windows[:3], atol=1e-4)
    np.testing.assert_allclose(record["saliency"], expected.saliency, atol=1e-3)
    assert (record["duration"], len(record["saliency"]), record["strip"]) == (12.0, 6, "lamzoo-find.png")
    assert [span["rank"] for span in record["spans"]] == [1, 2, 3]


def test_extract_features_in_json_goes_on_where_it_was(run, towers: str, video: Path) -> None:
    (video.parent / "empty.mp4").touch()
    options = ("--model", towers, "--out", "out", "--on-bad-input", "skip", "--json")
    record = json.loads(run("extract-features", video.parent, *options).out)
    assert (record["videos"], record["new_videos"], record["queries"]) == (1, 1, 0)
    assert record["unreadable"] == [{"path": str(video.parent / "empty.mp4"), "reason": "it is empty"}]
    Path("out/clip_features/film.npz").write_bytes(b"half")
    done = run("extract-features", video.parent, *options)
    assert json.loads(done.out)["new_videos"] == 1 and "not a complete npz archive" in done.err
    done = run("extract-features", video.parent, *options)
    assert json.loads(done.out)["new_videos"] == 0


def test_find_prints_a_table_and_draws_a_preview(run, model: str, towers: str, video: Path) -> None:
    common = ("find", "a woman smiles", video, "--model", model, "--features", towers, "--device", "cpu")
    done = run(*common, "--html", "time.html")
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines()[-1] == "time.html"
    page = Path("time.html").read_text()
    assert "on video film.mp4</title>" in page and '"frames": 24' in page and "moments in the data: unknown" in page
    Path("time.html").unlink()
    done = run(*common)
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines()[0] == f"a woman smiles: {video}, 12.0 s in 6 clips"
    assert done.out.splitlines()[-1] == "lamzoo-find.png"
    with Image.open("lamzoo-find.png") as image:
        assert image.width > image.height > 5 * 144
    Path("lamzoo-find.png").unlink()
    done = run(*common, "--top", 1, "--no-strip")
    assert not Path("lamzoo-find.png").exists()
    weights = Path(model.removeprefix("local-dir:")) / "model.safetensors"
    assert run(*common, "--top", 1, "--no-strip", "--checkpoint", weights).out == done.out


def test_find_goes_on_without_a_preview_that_nobody_asked_for(
    run, model: str, towers: str, video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    common = ("find", "a smile", video, "--model", model, "--features", towers)
    done = run(*common)
    assert done.code == 0
    assert "no preview" in done.err and "score" in done.out
    done = run(*common, "--strip", "strip.png")
    assert done.code == 2
    assert "lamzoo[report]" in done.err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("smile nowhere.mp4", "nowhere.mp4"),
        ("smile folder", "folder is a folder"),
        ("smile broken.mp4", "broken.mp4"),
        ("smile cut.mp4", "cut short"),
        ("smile film.mp4 --strip strip.jpg", "strip.jpg"),
        ("smile film.mp4 --strip nowhere/strip.png", "nowhere"),
        ("smile film.mp4 --strip strip.png --no-strip", "--no-strip"),
        ("smile film.mp4 --top 0", "--top"),
        ("smile film.mp4 --clip-seconds 0", "a clip is 0.0 s"),
        ("smile film.mp4 --device abacus", "abacus"),
        ("smile film.mp4 --model lam_moment_detr_micro", "no weights"),
        ("smile film.mp4 --model local-dir:nowhere", "nowhere"),
        ("smile film.mp4 --features lam_vit_micro", "lam_clip4clip"),
        ("smile", "VIDEO"),
    ],
)
def test_a_mistake_in_find_is_one_line(run, model: str, towers: str, filmed: Path, arguments: str, named: str) -> None:
    Path("folder").mkdir()
    shutil.copy(filmed, "film.mp4")
    Path("broken.mp4").write_text("nothing")
    write_clip(Path("cut.mp4"), 40, fps=5, container_options={"movflags": "faststart"})
    Path("cut.mp4").write_bytes(Path("cut.mp4").read_bytes()[:-3000])
    options = () if "--model" in arguments else ("--model", model)
    options += () if "--features" in arguments else ("--features", towers)
    done = run("find", *arguments.split(), *options)
    assert (done.code, done.out) == (2, "")
    assert named in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert not list(Path().glob("*.png"))


def test_a_model_of_other_features_is_refused_before_the_video_is_read(
    run, model: str, towers: str, video: Path, tmp_path: Path
) -> None:
    other = saved(tmp_path / "wide", "lam_moment_detr_micro", video_dim=514, text_dim=512)
    video.write_text("nothing")
    done = run("find", "a smile", video, "--model", other, "--features", towers)
    assert done.code == 2
    assert "514 features per clip and 512 per word, but the data have 26 and 32" in done.err
    done = run("find", "a smile", video, "--model", towers, "--features", towers)
    assert done.code == 2
    assert "does not predict moments" in done.err


def test_a_model_of_other_features_is_refused_before_weights_of_the_towers_are_asked_for(
    run, model: str, video: Path
) -> None:
    done = run("find", "a smile", video, "--model", model)
    assert done.code == 2
    assert "26 features per clip and 32 per word, but the data have 514 and 512" in done.err
    fitting = saved(Path("fitting"), "lam_moment_detr_micro", video_dim=514, text_dim=512)
    done = run("find", "a smile", video, "--model", fitting)
    assert done.code == 2
    assert "vit_base_patch32_clip_224.openai" in done.err and "is not in the cache" in done.err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("nowhere --out out", "nowhere"),
        ("bare --out out", "bare has no video"),
        ("videos --out out", "broken.mp4"),
        ("videos --out film.mp4", "can't be created"),
        ("videos twins --out out", "twins/film.mp4"),
        ("videos --out out --queries none.jsonl", "none.jsonl"),
        ("videos --out out --batch-size 0", "batch size"),
        ("videos --out out --clip-seconds -1", "a clip is -1.0 s"),
        ("videos --out out --model lam_vit_micro", "use a model of the family lam_clip4clip"),
        ("videos", "--out"),
        ("--out out", "VIDEOS"),
    ],
)
def test_a_mistake_in_extract_features_is_one_line(run, towers: str, filmed: Path, arguments: str, named: str) -> None:
    for folder in ("bare", "videos", "twins"):
        Path(folder).mkdir()
    for name in ("film.mp4", "videos/film.mp4", "twins/film.mp4"):
        shutil.copy(filmed, name)
    Path("videos/broken.mp4").write_text("nothing")
    options = () if "--model" in arguments else ("--model", towers)
    done = run("extract-features", *arguments.split(), *options, "--device", "cpu")
    assert (done.code, done.out) == (2, "")
    assert named in done.err
    assert len(done.err.strip().splitlines()) == 1


def test_the_strip_shows_frames_of_each_span(filmed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[str, list[int]]] = []
    shown = pictures(60)

    def draw(path: Path, title: str, rows: Any, count: int) -> None:
        drawn.extend((caption, [nearest(frame, shown) for frame in frames]) for caption, frames in rows)
        assert len(drawn) == count

    monkeypatch.setattr(drawing, "draw_rows", draw)
    spans = [Span(4.0, 10.0, 0.9), Span(0.0, 1.2, 0.5), Span(5.0, 5.0, 0.1), Span(6.0, 12.0, 0.05)]
    write_strip(tmp_path / "strip.png", "a smile", filmed, spans)
    assert drawn == [
        ("1    0.900    4.0 s – 10.0 s", [22, 27, 32, 37, 42, 47]),
        ("2    0.500    0.0 s – 1.2 s", [0, 1, 2, 3, 4, 5]),
        ("3    0.100    5.0 s – 5.0 s", [25] * 6),
        ("4    0.050    6.0 s – 12.0 s", [32, 37, 42, 47, 52, 57]),
    ]


def test_a_strip_that_cannot_be_drawn_is_one_sentence(filmed: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one span"):
        write_strip(tmp_path / "strip.png", "a smile", filmed, [])
    with pytest.raises(DataError, match=r"end in \.png"):
        write_strip(tmp_path / "strip.jpg", "a smile", filmed, [Span(0, 1, 0.5)])
    with pytest.raises(DataError, match="no such video"):
        write_strip(tmp_path / "strip.png", "a smile", tmp_path / "none.mp4", [Span(0, 1, 0.5)])
    assert not (tmp_path / "strip.png").exists()


def test_a_page_of_a_model_without_masks_is_refused_before_the_work(
    run, towers: str, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lamzoo.video.extractor.FeatureExtractor.video", lambda *args: pytest.fail("read"))
    plain = saved(tmp_path / "plain", "lam_moment_detr_micro", video_dim=26, text_dim=32, lam=False)
    done = run("find", "a smile", video, "--model", plain, "--features", towers, "--html", "page.html", "--json")
    assert (done.code, done.out, "has no learnable masks" in done.err) == (2, "", True), done.err
