"""``lamzoo search`` prints a table and a contact sheet, and what is wrong is one sentence."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import lamzoo
from lamzoo.errors import DataError
from tests.videos import pictures, write_clip

pytest.importorskip("open_clip")
pytest.importorskip("matplotlib")

TOWERS: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "head_width": 16, "layers": 1},
    "text_cfg": {"context_length": 16, "vocab_size": 600, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "small"
    built = lamzoo.create_model("lam_clip4clip_micro", clip=TOWERS, head_layers=1, max_frames=4, fps=1)
    lamzoo.save_pretrained(built, folder)
    return f"local-dir:{folder}"


@pytest.fixture(scope="module")
def filmed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("filmed")
    for number, name in enumerate(("astronaut", "coffee", "rocket")):
        write_clip(folder / f"{name}.mp4", pictures(6 + 5 * number, name=name), fps=5)
    return folder


@pytest.fixture
def videos(filmed: Path, tmp_path: Path) -> Path:
    return shutil.copytree(filmed, tmp_path / "my вид[red]os")


def test_search_prints_a_table_and_writes_a_contact_sheet(run, model: str, videos: Path) -> None:
    common = ("search", "a cup of coffee", "--videos", videos.name, "--model", model, "--device", "cpu")
    done = run(*common)
    assert (done.code, done.err) == (0, "")
    assert "a cup of coffee: 3 of 3 videos" in done.out
    for name in ("astronaut", "coffee", "rocket"):
        assert f"{videos.name}/{name}.mp4" in done.out
    assert done.out.splitlines()[-1] == "lamzoo-search.png"
    with Image.open("lamzoo-search.png") as image:
        assert image.width > image.height > 300
    (index,) = Path(os.environ["XDG_CACHE_HOME"]).rglob("*.safetensors")
    assert index.name.startswith("my-red-os.lam_clip4clip_micro.")
    assert len(list(videos.iterdir())) == 3
    Path("lamzoo-search.png").unlink()
    done = run(*common, "--top", 1, "--no-sheet")
    assert "1 of 3 videos" in done.out
    assert not Path("lamzoo-search.png").exists()


def test_search_in_two_stages_needs_a_model_with_a_joint_transformer(run, model: str, videos: Path) -> None:
    done = run("search", "a cup", "--videos", videos.name, "--model", model, "--rerank", "20")
    assert (done.code, done.out) == (2, "")
    assert 'rerank needs a model with a joint transformer, similarity="tight"' in " ".join(done.err.split())


def test_search_in_json_takes_several_queries(run, model: str, videos: Path) -> None:
    (videos / "empty.mp4").touch()
    options = ("--videos", videos, "--model", model, "--sheet", "found.png", "--fps", 2, "--max-frames", 3, "--json")
    done = run("search", "a cup of coffee", "a rocket", *options)
    assert done.code == 0
    assert "skipped" in done.err
    record = json.loads(done.out)
    assert (record["videos"], record["embedded"], record["model"]) == (3, 3, model)
    assert record["unreadable"] == [{"path": str(videos / "empty.mp4"), "reason": "it is empty"}]
    assert [answer["query"] for answer in record["queries"]] == ["a cup of coffee", "a rocket"]
    assert [answer["sheet"] for answer in record["queries"]] == ["found-1.png", "found-2.png"]
    assert Path("found-1.png").is_file() and Path("found-2.png").is_file() and not Path("found.png").exists()
    for answer in record["queries"]:
        matches = answer["matches"]
        assert [match["rank"] for match in matches] == [1, 2, 3]
        assert [match["score"] for match in matches] == sorted((match["score"] for match in matches), reverse=True)
        assert {Path(match["path"]) for match in matches} == set(videos.glob("*[a-z][a-z].mp4")) - {
            videos / "empty.mp4"
        }
    done = run("search", "a rocket", "--videos", videos, "--model", model, "--json", "--no-sheet")
    again = json.loads(done.out)
    assert again["embedded"] == 0, "the index's own sampling is taken"
    assert again["queries"][0]["matches"] == record["queries"][1]["matches"]
    done = run("search", "a rocket", "--videos", videos, "--model", model, "--no-sheet")
    assert "1 video cannot be read" in done.out


@pytest.mark.parametrize(("options", "expected"), [((), None), (("--approximate",), True), (("--exact",), False)])
def test_the_kind_of_search_reaches_the_index(
    run, model: str, filmed: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], expected: bool | None
) -> None:
    found = []

    def index_videos(*args: Any, approximate: bool | None, **kwargs: Any) -> None:
        found.append(approximate)
        raise DataError("recorded")

    monkeypatch.setattr("lamzoo.video.search.index_videos", index_videos)
    done = run("search", "coffee", "--videos", filmed, "--model", model, "--device", "cpu", *options)
    assert (done.code, done.err.splitlines()[-1], found) == (2, "lamzoo: recorded", [expected])


def test_search_takes_weights_from_a_checkpoint(run, model: str, videos: Path) -> None:
    folder = Path(model.removeprefix("local-dir:"))
    common = ("search", "a cup", "--videos", videos, "--model", model, "--no-sheet", "--json")
    assert json.loads(run(*common).out)["embedded"] == 3
    weights = folder / "model.safetensors"
    assert json.loads(run(*common, "--checkpoint", weights).out)["embedded"] == 0


def test_search_goes_on_without_a_sheet_that_nobody_asked_for(
    run, model: str, videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    common = ("search", "a cup", "--videos", videos, "--model", model)
    done = run(*common)
    assert done.code == 0
    assert "3 of 3 videos" in done.out
    assert "no contact sheet" in done.err
    done = run(*common, "--sheet", "sheet.png")
    assert done.code == 2
    assert "lamzoo[report]" in done.err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("rocket --videos nowhere", "nowhere"),
        ("rocket --videos bare", "bare has no video"),
        ("rocket --videos videos --sheet sheet.jpg", "sheet.jpg"),
        ("rocket --videos videos --sheet sheet.png --no-sheet", "--no-sheet"),
        ("rocket --videos videos --index index.bin", "index.bin"),
        ("rocket --videos videos --top 0", "--top"),
        ("rocket --videos videos --max-frames 9", "max_frames is 9"),
        ("rocket --videos videos --batch-size 0", "batch size"),
        ("rocket --videos videos --on-bad-input stop", "broken.mp4"),
        ("rocket --videos videos --index index.safetensors", "damaged"),
        ("rocket", "--videos"),
        ("--videos videos", "QUERY"),
    ],
)
def test_a_mistake_is_one_line(run, model: str, filmed: Path, arguments: str, named: str) -> None:
    shutil.copytree(filmed, "videos")
    Path("videos/broken.mp4").write_text("nothing")
    Path("index.safetensors").write_text("nothing")
    Path("bare").mkdir()
    done = run("search", *arguments.split(), "--model", model, "--device", "cpu")
    assert (done.code, done.out) == (2, "")
    assert named in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert not list(Path().glob("*.png"))


def test_an_empty_query_is_one_line(run, model: str, videos: Path) -> None:
    done = run("search", " ", "--videos", videos, "--model", model)
    assert done.code == 2
    assert "the query is empty" in done.err
