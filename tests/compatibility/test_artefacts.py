"""Files written by earlier releases are read, and give what those releases read out of them.

``artefacts/`` was written by ``make.py`` with 0.1.0, on data that ``inputs.py`` draws from seeds. The tests use
only the command line and the names of ``lamzoo.__all__``, which outlive the modules behind them. When a later release
changes a format, add its files; never replace these.
"""

from __future__ import annotations

import csv
import importlib
import json
import os
import runpy
import shutil
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import lamzoo
from lamzoo import cli
from tests.compatibility.inputs import CLASSES, pixels, write_photos, write_speech

ARTEFACTS = Path(__file__).resolve().parent / "artefacts"
EXPECTED = json.loads((ARTEFACTS / "expected.json").read_text(encoding="utf-8"))
TASKS = ("classification", "retrieval", "moments", "captions")

Command = Callable[..., str]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data and the models, called as when the artefacts were made."""
    folder = tmp_path_factory.mktemp("artefacts")
    write_photos(folder / "photos")
    write_speech(folder / "speech")
    shutil.copytree(ARTEFACTS / "models", folder / "models")
    return folder


@pytest.fixture
def command(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command line in that folder and returns what it prints; it has to end well."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    monkeypatch.setenv("PATH", "")  # without Java, which takes seconds

    def call(*arguments: object) -> str:
        with pytest.raises(SystemExit) as caught:
            cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert caught.value.code == 0, err
        return out

    return call


def unpack(task: str, folder: Path) -> Path:
    """Unpacks a run that was killed half-way."""
    with tarfile.open(ARTEFACTS / "training" / f"{task}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder / "run"


def open_model(name: str) -> Any:
    return lamzoo.create_model(f"local-dir:{ARTEFACTS / 'models' / name}", pretrained=True).eval()


def assert_logits(model: Any, name: str) -> None:
    with torch.inference_mode():
        torch.testing.assert_close(model(pixels()), torch.tensor(EXPECTED[f"logits of {name}"]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["vit", "pruned", "sharded"])
def test_a_saved_folder_gives_the_same_logits(name: str) -> None:
    model = open_model(name)
    assert_logits(model, name.replace("sharded", "vit"))
    assert model.lam_config == lamzoo.LamConfig(keys="position", op="mul", rank=3)
    assert list(model.pretrained_cfg["label_names"]) == [*CLASSES]


def test_a_saved_folder_says_how_its_tokens_are_pruned() -> None:
    assert open_model("pruned").prune_config.to_dict().items() >= {"at": [0], "score": "mask", "rest": "drop"}.items()


def test_captured_masks_are_the_same() -> None:
    model = open_model("vit")
    with torch.inference_mode(), lamzoo.capture_masks(model) as masks:
        model(pixels())
    importance = [*masks.values()][-1].importance[0].flatten()
    torch.testing.assert_close(importance, torch.tensor(EXPECTED["importance of vit"]), atol=1e-5, rtol=1e-5)


def test_a_file_of_weights_names_its_masks_and_refuses_others() -> None:
    file = ARTEFACTS / "models" / "vit" / "model.safetensors"
    with safe_open(file, "pt") as weights:
        assert lamzoo.LamConfig.from_json(weights.metadata()["lam_config"]).op == "mul"
    size = {"embed_dim": 8, "depth": 2, "num_classes": 2, "checkpoint_path": file}
    own = lamzoo.LamConfig(keys="position", op="mul", rank=3)
    assert_logits(lamzoo.create_model("lam_vit_micro", lam=own, **size).eval(), "vit")
    with pytest.raises(lamzoo.LamzooError, match="op"):
        lamzoo.create_model("lam_vit_micro", lam=lamzoo.LamConfig(keys="position", op="add", rank=3), **size)


def test_stored_masks_are_put_into_their_backbone() -> None:
    model = lamzoo.create_model(
        f"local-dir:{ARTEFACTS / 'models' / 'vit'}", pretrained=True, lam_weights="fresh"
    ).eval()
    lamzoo.load_lam_state_dict(model, load_file(ARTEFACTS / "masks.safetensors"))
    assert_logits(model, "vit")


@pytest.mark.parametrize("name", ["vit.onnx", "vit.pt2"])
def test_an_exported_program_gives_the_same_logits(name: str, command: Command, place: Path) -> None:
    pytest.importorskip("onnxruntime" if name.endswith("onnx") else "torch")
    if name.endswith("pt2"):
        with pytest.raises(lamzoo.LamzooError, match="trust=True"):
            lamzoo.load_exported(ARTEFACTS / name)
    program = lamzoo.load_exported(ARTEFACTS / name, trust=True)
    torch.testing.assert_close(program(pixels()), torch.tensor(EXPECTED["logits of vit"]), atol=1e-5, rtol=0)
    photo = place / "photos" / "red" / "00.png"
    guesses = [
        {
            guess["label"]: guess["probability"]
            for guess in json.loads(command("predict", which, photo, "--json"))[0]["predictions"]
        }
        for which in (ARTEFACTS / name, "local-dir:models/vit")
    ]
    assert guesses[0].keys() == {*CLASSES}
    assert guesses[0] == pytest.approx(guesses[1], abs=1e-5)


@pytest.mark.parametrize("task", TASKS)
def test_a_killed_run_goes_on_by_its_recipe_to_the_same_end(
    task: str, command: Command, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("accelerate")
    output = unpack(task, tmp_path)
    before = json.loads((output / "recipe.json").read_text(encoding="utf-8"))
    update = EXPECTED[f"update of {task}"]
    checkpoint = output / "checkpoints" / f"update-{update:08}"
    assert [*(output / "checkpoints").iterdir()] == [checkpoint]
    (checkpoint / "custom_checkpoint_0.pkl").unlink(missing_ok=True)  # a pickle is refused: tests/training
    command("train", ARTEFACTS / "recipes" / f"{task}.toml", "--output", output, "--resume")
    assert f"continued after {update} updates" in caplog.text
    after = json.loads((output / "recipe.json").read_text(encoding="utf-8"))
    assert (before["run"].pop("output"), after["run"].pop("output")) == ("run", str(output))
    assert after.pop("task") == before.pop("task") == task
    assert all(after[section].items() >= values.items() for section, values in before.items())
    with (output / "metrics.csv").open(newline="", encoding="utf-8") as file:
        curve = list(csv.DictReader(file))
    frozen = EXPECTED[f"curve of {task}"]
    assert curve[0].keys() >= frozen[0].keys()
    for column in ("epoch", "update", "lr", "train_loss"):
        values = [[float(record[column]) for record in records] for records in (curve, frozen)]
        assert values[0] == pytest.approx(values[1], rel=1e-3)
    assert (output / "model" / "config.json").is_file()


def test_a_run_and_the_split_that_it_made_are_opened(command: Command, tmp_path: Path) -> None:
    run = unpack("classification", tmp_path)
    for split, images in (("val", 10), ("train", 30)):
        record = json.loads(command("eval", f"local-dir:{run}", "--split", split, "--device", "cpu", "--json"))
        assert record["samples"] == images
    score = json.loads(command("eval", f"local-dir:{run}", "--device", "cpu", "--json"))["top1"]
    assert score == float(EXPECTED["curve of classification"][0]["eval_top1"])


def test_a_killed_evaluation_goes_on(command: Command, place: Path, tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    content = json.loads((ARTEFACTS / "state.json").read_text(encoding="utf-8"))
    content["key"]["first image"] = str(place / "photos" / "blue" / "00.png")
    state.write_text(json.dumps(content), encoding="utf-8")
    line = ("--data", "imagefolder:photos", "--batch-size", 1, "--device", "cpu", "--state", state, "--json")
    record = json.loads(command("eval", "local-dir:models/vit", *line, "--resume"))
    assert record["seconds"] > content["partial"]["seconds"] == 1000, "it begins where the other stopped"
    assert (record["samples"], record["top1"]) == (40, EXPECTED["accuracy of vit"]["top1"])
    assert not state.exists()


def test_an_index_of_videos_answers_without_embedding_them_again(command: Command, tmp_path: Path) -> None:
    pytest.importorskip("av")
    shutil.copytree(ARTEFACTS / "clips", tmp_path / "clips")
    for number, clip in enumerate(sorted((tmp_path / "clips").iterdir())):
        os.utime(clip, (1_700_000_000 + number,) * 2)  # which the index has, and a checkout hasn't
    index = shutil.copy(ARTEFACTS / "index.safetensors", tmp_path)
    line = ("--videos", tmp_path / "clips", "--model", "local-dir:models/retrieval", "--index", index, "--no-sheet")
    found = json.loads(command("search", *EXPECTED["search"], *line, "--device", "cpu", "--json"))
    assert (found["embedded"], found["videos"]) == (0, 3)
    answers = {
        entry["query"]: {Path(match["path"]).name: match["score"] for match in entry["matches"]}
        for entry in found["queries"]
    }
    for query, frozen in EXPECTED["search"].items():
        assert answers[query] == pytest.approx(dict(frozen), abs=1e-5)
    query = "red at the left"  # the other one has two clips within 3e-6
    assert list(answers[query]) == [name for name, _ in EXPECTED["search"][query]]


def test_a_saved_retrieval_model_scores_the_same(command: Command) -> None:
    line = ("--task", "retrieval", "--data", "grid:speech:face", "--split", "test", "--device", "cpu", "--json")
    assert (
        json.loads(command("eval", "local-dir:models/retrieval", *line))["metrics"] == EXPECTED["scores of retrieval"]
    )


def test_a_saved_moment_model_and_its_stored_predictions_score_the_same(command: Command, tmp_path: Path) -> None:
    line = ("--task", "moments", "--data", "grid:speech:audio", "--split", "test", "--json")
    frozen = ARTEFACTS / "moments.jsonl"
    assert json.loads(command("eval", frozen, *line))["metrics"] == EXPECTED["scores of moments"]
    written = tmp_path / "moments.jsonl"
    command("eval", "local-dir:models/moments", *line, "--device", "cpu", "--submission", written)
    before, now = ([json.loads(text) for text in file.read_text("utf-8").splitlines()] for file in (frozen, written))
    assert [line["qid"] for line in now] == [line["qid"] for line in before]
    for one, other in zip(now, before, strict=True):
        for key in ("pred_relevant_windows", "pred_saliency_scores"):
            values = [torch.tensor(line[key]).flatten().sort().values for line in (one, other)]  # equals in any order
            torch.testing.assert_close(*values, atol=2e-3, rtol=0)


def test_a_saved_describer_and_its_stored_captions_score_the_same(command: Command, tmp_path: Path) -> None:
    pytest.importorskip("pycocoevalcap")
    line = ("--task", "captions", "--data", "grid:speech:audio", "--split", "test", "--json")
    written, frozen = tmp_path / "captions.json", ARTEFACTS / "captions.json"
    for name, more in ((frozen, ()), ("local-dir:models/captions", ("--device", "cpu", "--submission", written))):
        metrics = json.loads(command("eval", name, *line, *more))["metrics"]
        assert metrics == {key: pytest.approx(EXPECTED["scores of captions"][key], abs=1e-6) for key in metrics}
        assert {"WER", "CIDEr", "Bleu_4"} <= metrics.keys()
    assert json.loads(written.read_text("utf-8")) == json.loads(frozen.read_text("utf-8"))


def test_results_of_bench_are_compared(command: Command) -> None:
    pytest.importorskip("matplotlib")
    (before,) = csv.DictReader(EXPECTED["comparison"].splitlines())
    (now,) = csv.DictReader(command("compare", ARTEFACTS / "bench.csv", "--format", "csv").splitlines())
    before.pop("source"), now.pop("source")  # the path of the file
    assert now.items() >= before.items()


def test_results_of_an_ablation_are_tabled_and_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = shutil.copy(ARTEFACTS / "ablation.csv", tmp_path)
    line = ["--ablation", str(ARTEFACTS / "ablation.toml"), "--results", str(results)]
    monkeypatch.setattr(sys, "argv", ["table", *line])
    runpy.run_module("benchmarks.ablation.table", run_name="__main__")
    rows = capsys.readouterr().out.splitlines()[1:]  # its headings have been renamed since
    assert rows == EXPECTED["ablation"].splitlines()[1:]
    monkeypatch.setattr(sys, "argv", ["run", *line, "--out", str(tmp_path / "out")])
    importlib.import_module("benchmarks.ablation.run").main()
    assert "2 runs, 2 done" in capsys.readouterr().out
