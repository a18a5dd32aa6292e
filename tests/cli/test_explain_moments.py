"""The timeline from the command line, of a model and a data set that lie in folders."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lamzoo
from lamzoo.weights.files import write_state_dict
from tests.images import encoded

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with weights of a model of moments and one of images, an image, and seven queries about one video."""
    folder = tmp_path_factory.mktemp("moments")
    models = {name: lamzoo.create_model(name) for name in ("lam_moment_detr_micro", "lam_vit_micro")}
    for name, model in models.items():
        write_state_dict(model.state_dict(), folder / f"{name}.safetensors")
    finder: Any = models["lam_moment_detr_micro"]
    (folder / "photo.png").write_bytes(encoded(0, 0))
    query = {"query": "A dog runs.", "vid": "v", "duration": 12, "relevant_windows": [[4, 8]]}
    lines = [json.dumps({"qid": 10 + number, **query}) for number in range(7)]
    (folder / "highlight_val_release.jsonl").write_text("\n".join(lines))
    draw = np.random.default_rng(0).standard_normal
    for part, names, key, shape in (
        ("clip_features", ["v"], "features", (6, finder.video_dim - 2)),
        ("clip_text_features", [f"qid{10 + number}" for number in range(7)], "last_hidden_state", (3, finder.text_dim)),
    ):
        (folder / part).mkdir()
        for name in names:
            np.savez(folder / part / f"{name}.npz", **{key: draw(shape).astype(np.float32)})
    return folder


@pytest.fixture
def call(run: Callable[..., Any], place: Path) -> Callable[..., Any]:
    """Explains one of the models; DATA and PHOTO stand for what lies in the folder."""

    def call(model: str, arguments: str) -> Any:
        arguments = arguments.replace("DATA", f"qvhighlights:{place}").replace("PHOTO", str(place / "photo.png"))
        return run("explain", model, "--checkpoint", place / f"{model}.safetensors", *arguments.split())

    return call


@pytest.mark.parametrize(("query", "index"), [("", 0), ("--query 10", 0), ("--query 13", 3)])
def test_a_query_is_drawn_by_its_id_or_the_first(
    call: Callable[..., Any], query: str, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lamzoo.report import moment_pictures

    seen = []
    real = moment_pictures._measure
    monkeypatch.setattr(moment_pictures, "_measure", lambda *args: (seen.append(args[3]), real(*args))[1])
    done = call("lam_moment_detr_micro", f"--data DATA --split val {query} --out time.png")
    assert (done.code, done.out) == (0, "time.png\n"), done.err
    assert Path("time.png").read_bytes().startswith(b"\x89PNG")
    assert seen == [index]


def test_an_image_is_still_drawn(call: Callable[..., Any]) -> None:
    done = call("lam_vit_micro", "PHOTO --out masks.png")
    assert (done.code, done.out) == (0, "masks.png\n"), done.err
    assert Path("masks.png").read_bytes().startswith(b"\x89PNG")


def test_a_page_is_written_alone_or_beside_the_picture(call: Callable[..., Any]) -> None:
    done = call("lam_vit_micro", "PHOTO --html masks.html")
    assert (done.code, done.out) == (0, "masks.html\n"), done.err
    assert Path("masks.html").read_bytes().startswith(b"<!doctype html>")
    done = call("lam_vit_micro", "PHOTO --html masks.html --out masks.png")
    assert (done.code, done.out) == (0, "masks.png\nmasks.html\n"), done.err


def test_a_figure_is_written_for_an_image_and_a_query(call: Callable[..., Any]) -> None:
    done = call("lam_vit_micro", "PHOTO --figure masks.pdf")
    assert (done.code, done.out) == (0, "masks.pdf\n"), done.err
    done = call("lam_moment_detr_micro", "--data DATA --split val --figure masks.svg")
    assert (done.code, done.out) == (0, "masks.svg\n"), done.err


def test_a_page_of_a_query_has_clips_and_words(call: Callable[..., Any]) -> None:
    done = call("lam_moment_detr_micro", "--data DATA --split val --query 13 --html time.html")
    assert (done.code, done.out) == (0, "time.html\n"), done.err
    assert '"0.00–2.00 s"' in Path("time.html").read_text()
    assert '"labels": ["A", "dog", "runs."]' in Path("time.html").read_text()


def test_thumbnails_are_from_the_videos_of_a_folder(call: Callable[..., Any]) -> None:
    pytest.importorskip("av")
    from tests.videos import pictures, write_clip

    Path("films").mkdir()
    write_clip(Path("films/v.mp4"), pictures(12), fps=1)
    command = "--data DATA --split val --query 13 --videos"
    done = call("lam_moment_detr_micro", f"{command} films --html time.html")
    assert (done.code, done.out) == (0, "time.html\n"), done.err
    assert '"frames": 24' in Path("time.html").read_text()
    for arguments, says in (
        (f"{command} nowhere --html x.html", "no such folder: nowhere"),
        (f"{command} films --out x.png", "--videos is for the thumbnails of a page; add --html FILE.html"),
        ("PHOTO --videos films --html x.html", "--videos does not apply to a file"),
    ):
        done = call("lam_moment_detr_micro", arguments)
        assert (done.code, done.err.count("\n"), says in done.err) == (2, 1, True), done.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("PHOTO", "give --out FILE.png for a picture, --html FILE.html for a page, or --figure FILE.pdf for a figure"),
        ("PHOTO --figure x.jpg", "--figure is x.jpg; its name must end in .pdf, .svg or .png"),
        ("PHOTO --html x.png", "x.png"),
        ("PHOTO --html nowhere/x.html --out x.png", "The folder nowhere of the page does not exist"),
    ],
)
def test_a_page_that_can_not_be_written_is_named_before_the_picture_is(
    call: Callable[..., Any], arguments: str, says: str
) -> None:
    done = call("lam_vit_micro", arguments)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert says in done.err
    assert not list(Path().glob("x.*"))


@pytest.mark.parametrize(
    ("model", "arguments", "says"),
    [
        (
            "lam_moment_detr_micro",
            "",
            "nothing to explain; give INPUT, an image or a video with --text, or a data",
        ),
        ("lam_moment_detr_micro", "PHOTO --data DATA", "exclude each other; leave one out"),
        (
            "lam_moment_detr_micro",
            "PHOTO",
            "a model of the family lam_moment_detr, which takes no images; use --data instead",
        ),
        ("lam_vit_micro", "PHOTO --query 10", "--query does not apply to a file"),
        ("lam_vit_micro", "PHOTO --split val", "--split does not apply to a file"),
        ("lam_vit_micro", "PHOTO --text a", "--text does not apply to lam_vit_micro, a classifier"),
        ("lam_moment_detr_micro", "--data DATA --text a", "--text applies to a video file, not to --data"),
        ("lam_vit_micro", "--data DATA --split val", "a classifier, which is drawn over an image; give INPUT instead"),
        ("lam_moment_detr_micro", "--data DATA", "no split 'test'; it has 'val'"),
        ("lam_moment_detr_micro", "--data moments:x", "is not a moment data set"),
        (
            "lam_moment_detr_micro",
            "--data DATA --split val --query 99",
            "has no query '99'; it has '10', '11', '12', '13', '14' and 2 more",
        ),
        ("lam_moment_detr_micro", "--data DATA --split val --device tpu9", "no device 'tpu9'"),
    ],
)
def test_what_can_not_be_drawn_is_one_sentence(call: Callable[..., Any], model: str, arguments: str, says: str) -> None:
    done = call(model, f"{arguments} --out x.png")
    assert (done.code, done.out) == (2, "")
    assert done.err.count("\n") == 1
    assert says in done.err
    assert not Path("x.png").exists()


def test_a_picture_that_can_not_be_written_is_named(call: Callable[..., Any]) -> None:
    done = call("lam_moment_detr_micro", "--data DATA --split val --out nowhere/x.png")
    assert done.code == 2
    assert "The folder nowhere of the picture does not exist" in done.err
