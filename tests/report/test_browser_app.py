"""What the app computes, without a server; the server is tested in test_browser_app_pages.py."""

import sys
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from PIL import Image

from lamzoo.cli import main
from lamzoo.errors import ConfigError, DataError, MissingExtraError, UnknownModelError
from lamzoo.evaluation.classification.prediction import Prediction
from lamzoo.report.browser_app import _answering, _by_task, _named, _Shelf, build, launch

MODEL = "lam_vit_micro.cifar10"


@pytest.fixture(scope="module")
def shelf() -> _Shelf:
    return _Shelf(torch.device("cpu"))


def test_an_image_has_its_classes_and_its_page_with_a_budget(shelf: _Shelf, tmp_path: Path) -> None:
    Image.new("RGB", (40, 40), "blue").save(tmp_path / "photo.png")
    classes, frame, file = shelf.image(str(tmp_path / "photo.png"), MODEL, 0.6)
    assert len(classes) == 5
    assert 0.5 < sum(classes.values()) <= 1.001
    assert frame.startswith('<iframe title="masks and attention" sandbox="allow-scripts" srcdoc="&lt;!doctype html&gt;')
    assert "lam_vit_micro.cifar10 on photo.png</title>" in Path(file).read_text()
    assert shelf.load(MODEL, 0.6) is shelf.load(MODEL, 0.6)
    assert shelf.load(MODEL, 0.6).token_reduction is not None


def test_models_are_sorted_by_their_task_and_others_are_named() -> None:
    assert _by_task([MODEL]) == {"classification": [MODEL], "retrieval": []}
    found = _by_task([])
    assert MODEL in found["classification"]
    assert "lam_clip4clip_micro.grid" in found["retrieval"]
    assert not [name for name in found["classification"] if name.startswith("lam_vit_base")]
    with pytest.raises(ConfigError, match="a model of the family lam_describer; the app takes models for image class"):
        _by_task(["lam_describer_micro.grid"])
    with pytest.raises(ConfigError, match="vit_micro.cifar10 has no masks"):
        _by_task(["vit_micro.cifar10"])
    with pytest.raises(UnknownModelError, match="lam_vit_mikro"):
        _by_task(["lam_vit_mikro"])


def test_what_is_missing_is_one_sentence(shelf: _Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="there is no image; upload one"):
        shelf.image(None, MODEL, 1.0)
    with pytest.raises(ConfigError, match="a video and at least one text are needed"):
        shelf.video("film.mp4", " \n", "lam_clip4clip_micro.grid", 1.0)
    (tmp_path / "photo.png").write_text("nothing")
    with pytest.raises(DataError, match="photo.png"):
        shelf.image(str(tmp_path / "photo.png"), MODEL, 1.0)
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(MissingExtraError, match=r"lamzoo\[app\]"):
        launch()


def test_the_last_few_pages_are_kept_and_uploads_for_an_hour(gradio: MagicMock) -> None:
    shelf = _Shelf(torch.device("cpu"))
    files = [Path(shelf._page(lambda path: path.write_text("page"))[1]) for _ in range(6)]
    assert [file.exists() for file in files] == [False] * 2 + [True] * 4
    build([MODEL])
    assert gradio.Blocks.call_args.kwargs["delete_cache"] == (3600, 3600)


def test_an_upload_is_opened_by_lamzoo_alone(gradio: MagicMock) -> None:
    build([MODEL])
    read = gradio.Image.return_value.preprocess
    assert (read(None), read(SimpleNamespace(path="photo.eps"))) == (None, "photo.eps")


def test_an_error_is_shown_as_text_without_the_folders_of_the_server(gradio: MagicMock) -> None:
    gradio.Error = lambda says, print_exception: RuntimeError(says)

    def fail(path: str, texts: str) -> None:
        raise DataError(f"cannot read {path}: <b>{texts}</b>")

    with pytest.raises(RuntimeError, match="^cannot read a.png: &lt;b&gt;a/b&lt;/b&gt;$"):
        _answering(gradio, fail)("/tmp/gradio/1/a.png", "a/b")


def test_classes_of_one_name_are_all_shown() -> None:
    labels = {0: "crane, a bird", 1: "crane, a machine", 2: "cat, a pet", 3: "maillot", 4: "maillot"}
    named = _named([Prediction(index, label, 0.2) for index, label in labels.items()])
    assert list(named) == ["crane, a bird", "crane, a machine", "cat", "maillot (3)", "maillot (4)"]


def test_a_video_that_was_removed_is_left_out_and_the_index_renewed(
    shelf: _Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("av")
    from tests.videos import write_clip

    write_clip(tmp_path / "a.mp4", [Image.new("RGB", (64, 48), "red")] * 10, fps=10, size=(64, 48))
    matches = [SimpleNamespace(path=tmp_path / f"{name}.mp4", duration=1.0, score=0.5) for name in "ba"]
    indexed = []

    @lru_cache(1)
    def index(name: str, folder: Path) -> SimpleNamespace:
        indexed.append(folder)
        return SimpleNamespace(search=lambda query, count: matches)

    monkeypatch.setattr(shelf, "index", index)
    ((frame, caption),) = shelf.search(tmp_path, "red", "model")
    assert (caption, np.asarray(frame).shape[-1]) == ("2. a.mp4, 1.0 s, score 0.500", 3)
    assert indexed == [tmp_path] * 2


class NoConnectionError(Exception):
    """Stands for the errors of httpx."""


@pytest.fixture
def gradio(monkeypatch: pytest.MonkeyPatch) -> MagicMock:
    """Stands for gradio, which isn't among the tests' packages, and records what it is asked for."""
    module = MagicMock()
    module.app = module.Blocks.return_value.__enter__.return_value
    monkeypatch.setitem(sys.modules, "gradio", module)
    monkeypatch.setitem(sys.modules, "httpx", SimpleNamespace(HTTPError=NoConnectionError))
    for name in ("starlette", "starlette.middleware", "starlette.middleware.trustedhost"):
        monkeypatch.setitem(sys.modules, name, module)
    return module


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            OSError("Cannot find empty port"),
            "no-host:7860 .Cannot find empty port.; choose another --port, and as --host",
        ),
        (
            NoConnectionError("refused"),
            "does not answer at no-host:7860 .NoConnectionError.; behind an HTTP proxy set NO_PROXY",
        ),
        (Exception("Couldn't start the app"), "set NO_PROXY=127.0.0.1,localhost, and choose as --host"),
        (ValueError("set share=True"), "set NO_PROXY=127.0.0.1,localhost, and choose as --host"),
    ],
)
def test_an_app_that_cannot_be_reached_is_closed_with_a_way_out(gradio: MagicMock, error: Exception, says: str) -> None:
    gradio.app.launch.side_effect = error
    with pytest.raises(ConfigError, match=says):
        launch([MODEL], host="no-host")
    gradio.app.close.assert_called_once_with()


def test_a_fault_of_the_app_is_not_called_one_of_the_network(gradio: MagicMock) -> None:
    gradio.app.launch.side_effect = TypeError("unexpected argument")
    with pytest.raises(TypeError, match="unexpected argument"):
        launch([MODEL])
    gradio.app.close.assert_called_once_with()


@pytest.mark.parametrize(
    ("options", "address"),
    [((), ("127.0.0.1", 7860)), (("--host", "0.0.0.0", "--port", "80"), ("0.0.0.0", 80))],
)
def test_the_command_serves_this_machine_unless_asked(
    gradio: MagicMock, options: tuple[str, ...], address: tuple[str, int]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["app", MODEL, "--device", "cpu", *options])
    given = gradio.app.launch.call_args.kwargs
    assert (ended.value.code, given["server_name"], given["server_port"]) == (0, *address)
    assert (given["share"], given["enable_monitoring"], given["mcp_server"]) == (False, False, False)
    assert len(given["app_kwargs"]["middleware"]) == (not options)
    gradio.app.block_thread.assert_called_once_with()
