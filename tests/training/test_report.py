"""The report says what the trained model gets right, and shows it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lamzoo.report.curves
from lamzoo.errors import MissingExtraError
from lamzoo.training import Score, TrainResult, parse_recipe, train
from lamzoo.training.classification import report as report_module
from lamzoo.training.classification.report import confusion
from tests.images import write_folder

Reported = tuple[TrainResult, dict[str, Any], str]


def reported(table: dict[str, Any], **model: Any) -> Reported:
    table["schedule"]["epochs"] = 1
    table["model"] |= model
    table["run"]["report"] = True
    result = train(parse_recipe(table), command="lamzoo train --model 'as typed'")
    assert result.report is not None
    folder = result.report.parent
    return result, json.loads((folder / "report.json").read_text("utf-8")), result.report.read_text("utf-8")


def with_folder(table: dict[str, Any], place: Path) -> dict[str, Any]:
    folder = write_folder(place / "data | ü", splits=("train", "val", "test"), each=4)
    (folder / "test" / "red" / "0.jpg").rename(folder / "test" / "red" / "a | b.jpg")
    table["data"] = {"source": str(folder), "eval_split": "validation", "test_split": "test"}
    return table


@pytest.fixture
def folder_table(recipe_table: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    return with_folder(recipe_table, tmp_path)


@pytest.fixture(scope="module")
def report(recipe_in: Callable[[Path], dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Reported:
    """The report of one training, for tests that only read it."""
    place = tmp_path_factory.mktemp("reported")
    return reported(with_folder(recipe_in(place), place))


def test_report_scores_every_split_and_class(report: Reported) -> None:
    result, content, text = report
    assert list(content["scores"]) == ["val", "test"]
    for split, score in content["scores"].items():
        assert score["images"] == 12
        assert score["top1"] == pytest.approx(result.scores[split].top1, abs=1e-3)
        matrix = torch.tensor(score["confusion"])
        assert matrix.sum(dim=1).tolist() == [4, 4, 4]
        assert score["top1"] == pytest.approx(100 * float(matrix.trace()) / 12, abs=1e-3)
        assert [line["recall"] for line in score["per_class"]] == (25 * matrix.diagonal()).tolist()
    assert content["scores"]["val"]["top1"] == pytest.approx(result.history[-1]["eval_top1"], abs=1e-3)
    assert f"| test | 12 | {content['scores']['test']['top1']:.2f} %" in text
    assert "lamzoo train --model 'as typed'" in text
    assert all(line.count("|") - line.count("\\|") == line.strip().count(" | ") + 2 for line in text.splitlines()
               if line.startswith("| `") or line.startswith("| red"))  # fmt: skip


def test_report_counts_what_was_trained(report: Reported) -> None:
    _, content, text = report
    model = lamzoo.create_model(f"local-dir:{content['output']}/model")
    counts = content["parameters"]
    assert counts["all"] == counts["trained"] == sum(p.numel() for p in model.parameters())
    assert counts["masks"] == sum(p.numel() for p in lamzoo.lam_parameters(model))
    assert f"{counts['all']:,}" in text


def test_report_shows_curves_confusion_and_masks(report: Reported) -> None:
    pytest.importorskip("matplotlib")
    result, _, text = report
    assert result.report is not None
    for name in ("curves.png", "confusion.png", "masks-1.png", "masks-2.png", "masks-3.png"):
        assert (result.report.parent / name).read_bytes().startswith(b"\x89PNG")
        assert f"]({name})" in text
    assert sorted(path.suffix for path in result.report.parent.iterdir()) == [".json", ".md", *[".png"] * 5]


def test_report_of_a_plain_model_says_that_it_has_no_masks(folder_table: dict[str, Any]) -> None:
    del folder_table["model"]["lam"]
    result, content, text = reported(folder_table)
    assert content["masks"] is None
    assert content["parameters"]["masks"] == 0
    assert "no learnable masks" in text
    assert result.report is not None
    assert not list(result.report.parent.glob("masks-*"))


def test_without_matplotlib_the_report_says_how_to_get_pictures(
    folder_table: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*args: object, **kwargs: object) -> None:
        raise MissingExtraError("Drawing needs matplotlib; pip install 'lamzoo[report]'")

    monkeypatch.setattr(lamzoo.report.curves, "new_figure", missing)
    monkeypatch.setattr("lamzoo.report.mask_pictures.draw", missing)
    result, content, text = reported(folder_table)
    assert content["scores"]
    assert text.count("pip install 'lamzoo[report]'") == 2
    assert result.report is not None
    assert not list(result.report.parent.glob("*.png"))


def test_a_finished_run_that_is_resumed_reports_the_same(folder_table: dict[str, Any]) -> None:
    _, content, _ = reported(folder_table)
    train(parse_recipe(folder_table), resume=True)
    again = json.loads(Path(content["output"], "report", "report.json").read_text("utf-8"))
    assert again["scores"] == content["scores"]
    assert again["train_seconds"] == content["train_seconds"]


def test_confusion_counts_classes_in_rows_and_guesses_in_columns() -> None:
    score = Score(torch.tensor([0, 0, 2]), torch.tensor([0, 1, 1]), loss=1.0, top5=None)
    assert confusion(score, 3).tolist() == [[1, 1, 0], [0, 0, 0], [0, 1, 0]]
    assert score.top1 == pytest.approx(100 / 3)


def test_the_most_confused_classes_are_listed_without_a_matrix_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_module, "confusion", lambda *args: pytest.fail("a matrix of 30,000 classes"))
    labels, guesses = torch.tensor([29999, 29999, 5, 3, 3, 3, 1]), torch.tensor([7, 7, 2, 4, 4, 3, 0])
    names = [f"class {index}" for index in range(30_000)]
    content = report_module._score(Score(labels, guesses, loss=1.0, top5=None), names, np.zeros(30_000, np.int64))
    found = [(pair["class"], pair["taken_for"], pair["images"]) for pair in content["most_confused"]]
    assert found == [
        ("class 3", "class 4", 2),
        ("class 29999", "class 7", 2),
        ("class 1", "class 0", 1),
        ("class 5", "class 2", 1),
    ]
    assert content["per_class"][3]["recall"] == pytest.approx(33.33)
    assert content["confusion"] is None


@pytest.mark.parametrize("classes", [2, 40, 150])
def test_confusion_of_any_number_of_classes_can_be_drawn(classes: int) -> None:
    pytest.importorskip("matplotlib")
    labels = torch.arange(classes)
    counts = confusion(Score(labels, labels.flip(0), loss=0.0, top5=None), classes)
    figure = lamzoo.report.curves.draw_confusion(counts, [f"a class of a long name {i}" for i in range(classes)], "t")
    figure.canvas.draw()


def test_no_name_in_the_data_is_markup_in_the_report(folder_table: dict[str, Any]) -> None:
    folder = Path(folder_table["data"]["source"])
    name = "<img src=x onerror=alert(1)> [a](http:x) `|`\x1b[2J"
    for split in ("train", "val", "test"):
        (folder / split / "red").rename(folder / split / name)
    _, content, text = reported(folder_table)
    assert content["scores"]["test"]["per_class"][0]["class"] == name
    assert "\x1b" not in text
    markdown = pytest.importorskip("markdown", reason="needs Python-Markdown, of the extra docs")
    html = markdown.markdown(text, extensions=["tables", "fenced_code"])
    assert "onerror=alert(1)&gt; " in html and "http:x" in html
    sources = re.findall(r'<img[^>]*src="?([^" >]+)', html)
    assert all(re.fullmatch(r"(curves|confusion|masks-\d)\.png", source) for source in sources)
    assert "<a" not in html
