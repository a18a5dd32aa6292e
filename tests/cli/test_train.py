"""One line trains on one's own folder, and what is wrong with it is one sentence."""

from __future__ import annotations

import csv
import inspect
import json
import re
import tomllib
from pathlib import Path

import pytest

import lamzoo
from lamzoo.cli.train import train
from lamzoo.profiling import bench, read_rows
from lamzoo.profiling.worker import measured_row
from tests.images import CLASSES, write_folder, write_npz

pytest.importorskip("accelerate")


@pytest.fixture
def start(tmp_path: Path) -> str:
    """Weights to start from, of a model for other classes."""
    model = lamzoo.create_model("lam_vit_micro", embed_dim=16, depth=1, num_classes=2)
    lamzoo.save_pretrained(model, tmp_path / "start", label_names=["cat", "dog"])
    return f"local-dir:{tmp_path / 'start'}"


def recipe_of(folder: Path) -> dict[str, dict[str, object]]:
    return json.loads((folder / "recipe.json").read_text("utf-8"))


def test_one_line_fine_tunes_on_a_folder(run, start: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "my photos", splits=(), each=5)
    arguments = ("train", "--model", start, "--pretrained", "--data", f"imagefolder:{folder}", "--epochs", 1)
    done = run(*arguments, "--workers", 0, "--device", "cpu")
    assert done.code == 0
    data, schedule, parameters, epoch = done.err.splitlines()
    assert data.endswith(": 12 images to train on, 3 to validate on (held out: 0.1 of each class, by seed 0)")
    assert schedule.startswith("1 epoch of 2 updates, batches of 6; adamw, learning rate 0.00")
    assert parameters.endswith("on cpu in 1 process(es), precision no; output folder runs/start-my-photos")
    assert re.match(r"epoch 1 of 1: training loss [\d.]+; validation: top1 .*, loss .* \(the best so far\);", epoch)
    output = Path("runs/start-my-photos")
    assert f"the report is {output / 'report' / 'report.md'}\nthe model is {output / 'model'}\n" in done.out
    assert "validation" in done.out
    report = (output / "report" / "report.md").read_text("utf-8")
    assert f"lamzoo train --model {start} --pretrained --data 'imagefolder:{folder}' --epochs 1" in report
    model = lamzoo.create_model(f"local-dir:{output / 'model'}", pretrained=True)
    assert list(model.pretrained_cfg["label_names"]) == CLASSES
    again = run(*arguments)
    assert (again.code, again.out) == (2, "")
    assert "already holds a run; continue it with --resume" in again.err


def test_a_killed_run_goes_on_by_its_folder_alone(run, start: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", splits=(), each=5)
    common = ("--device", "cpu", "--workers", 0, "--no-report")
    options = ("--model", start, "--pretrained", "--data", folder, "--epochs", 1, "--output", "out", *common)
    assert run("train", *options).code == 0
    before = recipe_of(Path("out"))
    for again in (options, ("--output", "out")):
        done = run("train", *again, "--resume")
        assert done.code == 0
        assert done.err.endswith("\ncontinued after 2 updates, 1 epoch of them whole\n")
        assert "the model is out/model" in done.out
    assert recipe_of(Path("out")) == before
    other = run("train", *options, "--resume", "--seed", 3)
    assert other.code == 2
    assert "another recipe: run.seed was 0 and is 3" in other.err
    assert run("train", *options, "--epochs", 2, "--resume").code == 0
    assert recipe_of(Path("out")) == before | {"schedule": before["schedule"] | {"epochs": 2}}


@pytest.mark.parametrize("tune", ["lam", "head"])
def test_tune_names_the_run_and_trains_a_part(run, start: str, tmp_path: Path, tune: str) -> None:
    folder = write_folder(tmp_path / "photos", splits=("train", "val", "test"))
    arguments = ("--model", start, "--pretrained", "--data", folder, "--tune", tune, "--epochs", 1, "--device", "cpu")
    done = run("train", *arguments, "--workers", 0)
    assert done.code == 0
    content = json.loads(Path(f"runs/start-photos-{tune}/report/report.json").read_text("utf-8"))
    assert list(content["scores"]) == ["val", "test"]
    masks = Path(f"runs/start-photos-{tune}/lam")
    assert masks.is_dir() == (f"alone are {masks}" in done.out) == (tune == "lam")
    assert 0 < content["parameters"]["trained"] < content["parameters"]["all"] / 2


def test_a_recipe_with_changes_and_options(run, tmp_path: Path) -> None:
    write_npz(tmp_path / "packed", "train")
    write_npz(tmp_path / "packed", "test")
    Path("recipe.toml").write_text(
        """
        model = {name = "vit_micro", kwargs = {depth = 1}}
        data = {source = "npz:packed", train_split = "train", eval_split = "test"}
        schedule = {epochs = 9, warmup_epochs = 0}
        run = {output = "out", batch_size = 4, device = "cpu", report = false}
        """
    )
    done = run("train", "recipe.toml", "schedule.epochs=8", "run.seed=3", "--epochs", 1, "--model", "lam_vit_micro")
    assert done.code == 0
    recipe = recipe_of(Path("out"))
    assert recipe["schedule"]["epochs"] == 1  # options win over changes, and those over the recipe
    assert recipe["run"]["seed"] == 3
    assert recipe["model"]["name"] == "lam_vit_micro"
    assert not Path("out/report").exists()
    done = run("train", "out/recipe.json", "run.output=again")
    assert done.code == 0
    assert recipe_of(Path("again"))["run"]["seed"] == 3


def test_every_option_reaches_the_recipe(run) -> None:
    Path("recipe.toml").write_text(
        'model = {name = "vit_micro"}\ndata = {source = "npz:packed"}\nrun = {output = "out"}\n', "utf-8"
    )
    given = {
        "model": ("model.name", "lam_vit_micro"), "pretrained": ("model.pretrained", True),
        "checkpoint": ("model.kwargs.checkpoint_path", "start.safetensors"), "tune": ("model.tune", "lam"),
        "img-size": ("model.kwargs.img_size", 48), "data": ("data.source", "imagefolder:photos"),
        "train-split": ("data.train_split", "one"), "val-split": ("data.eval_split", "two"),
        "test-split": ("data.test_split", "three"), "val-fraction": ("data.val_fraction", 0.25),
        "on-bad-input": ("data.on_bad_input", "skip"), "scan": ("data.scan", False), "workers": ("data.workers", 2),
        "epochs": ("schedule.epochs", 3), "lr": ("optimizer.lr", 0.003), "batch-size": ("run.batch_size", 12),
        "seed": ("run.seed", 7), "output": ("run.output", "elsewhere"), "device": ("run.device", "cpu"),
        "precision": ("run.precision", "bf16"), "fsdp": ("run.fsdp", True), "report": ("run.report", False),
    }  # fmt: skip
    others = {"context", "arguments", "resume", "print_recipe"}
    assert {name.replace("-", "_") for name in given} | others == inspect.signature(train).parameters.keys()
    options: list[object] = []
    for name, (_, value) in given.items():
        options += [f"--{'' if value else 'no-'}{name}"] if isinstance(value, bool) else [f"--{name}", value]
    recipes = []
    for more in ([], options):
        done = run("train", "recipe.toml", *more, "--print-recipe")
        assert (done.code, done.err) == (0, "")
        recipes.append(tomllib.loads(done.out))
    assert not Path("elsewhere").exists()
    default, recipe = recipes
    for key, value in given.values():
        *sections, last = key.split(".")
        table, before = recipe, default
        for section in sections:
            table, before = table[section], before.get(section, {})
        assert table[last] == value, key
        assert before.get(last) != value, key


def test_bad_images_stop_or_are_left_out(run, start: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "photos", splits=(), each=5)
    (folder / CLASSES[0] / "Bild ü 1.jpg").write_bytes(b"no image")
    options = ("--model", start, "--pretrained", "--data", folder, "--epochs", 1, "--workers", 0, "--no-report")
    done = run("train", *options)
    assert (done.code, done.out) == (2, "")
    assert "Bild ü 1.jpg" in done.err and "--on-bad-input skip" in done.err
    assert not Path("runs").exists()
    done = run("train", *options, "--on-bad-input", "skip")
    assert done.code == 0
    assert "left out 1 unreadable inputs" in " ".join(done.err.split())
    assert "Bild ü 1.jpg" in Path("runs/start-photos/bad-inputs.csv").read_text("utf-8")


def test_the_split_that_a_run_made_is_scored_again(
    run, start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_folder(tmp_path / "photos", splits=(), each=10)
    (folder / CLASSES[0] / "3.jpg").write_bytes(b"no image")
    options = ("--model", start, "--pretrained", "--data", folder, "--epochs", 1, "--workers", 0, "--no-report")
    assert run("train", *options, "--on-bad-input", "skip", "--val-fraction", 0.3, "--output", "out").code == 0
    with Path("out/metrics.csv").open(newline="") as file:
        top1 = float(list(csv.DictReader(file))[-1]["eval_top1"])
    for arguments in (
        ("local-dir:out", "--split", "val"),
        ("local-dir:out/model",),
        ("local-dir:out", "--data", f"imagefolder:{folder}", "--split", "val"),
    ):
        done = run("eval", *arguments, "--device", "cpu", "--json")
        record = json.loads(done.out)
        assert (record["split"], record["samples"], record["skipped"]) == ("validation", 9, 0)
        assert record["top1"] == pytest.approx(top1, abs=1e-3)
    assert json.loads(run("eval", "local-dir:out", "--split", "train", "--json").out)["samples"] == 20
    monkeypatch.setitem(bench.bench.__kwdefaults__, "runner", lambda job, timeout: measured_row(job))
    assert run("bench", "out", "--data", f"imagefolder:{folder}", "--repeats", 2, "--out", "r.csv").code == 0
    (row,) = read_rows("r.csv")
    assert (row.split, row.value) == ("validation", pytest.approx(top1, abs=1e-3))
    refused = run("eval", start, "--data", folder, "--split", "val")
    assert refused.code == 2
    assert "has no split 'val', since it has no splits" in refused.err


def test_a_run_whose_images_changed_is_not_resumed(run, start: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "photos", splits=(), each=5)
    options = ("--model", start, "--pretrained", "--data", folder, "--epochs", 1, "--workers", 0, "--no-report")
    assert run("train", *options, "--output", "out").code == 0
    (folder / CLASSES[0] / "new.jpg").write_bytes((folder / CLASSES[0] / "0.jpg").read_bytes())
    done = run("train", "--output", "out", "--resume")
    assert done.code == 2
    assert "the training data has changed since the run in out began: 1 image of class '" in done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "no --model and no --data"),
        ("--model vit_micro", "no --data"),
        ("--data DATA run.seed=1", "no --model"),
        ("--model vit_mikro --data DATA", "did you mean vit_micro"),
        ("--model vit_micro --data nowhere", "neither a data set nor an existing folder"),
        ("--model vit_micro --data videos:DATA", "'videos:data' is data for text-video retrieval or captions"),
        ("--model vit_micro --data DATA --tune head", "no weights"),
        ("--model vit_micro --pretrained --data DATA --tune lam", "no learnable masks"),
        ("--model vit_micro --pretrained --data DATA --tune neck", "neck"),
        ("--model vit_micro --data DATA --epochs 0", "epochs is 0"),
        ("--model vit_micro --data DATA --lr -1", "lr is -1"),
        ("--model vit_micro --data DATA --val-fraction 1.5", "val_fraction is 1.5"),
        ("--model vit_micro --data DATA --test-split absent", "no split 'absent'"),
        ("--model vit_micro --data DATA optimizer.name=adamv", "did you mean"),
        ("--model vit_micro --data DATA run.sede=1", "did you mean run.seed"),
        ("--model vit_micro --data DATA --checkpoint none.safetensors --epochs 1", "none.safetensors"),
        ("--output out --resume", "out/recipe.json can't be read"),
        ("none.toml", "none.toml"),
    ],
)
def test_what_is_wrong_is_one_sentence_and_leaves_nothing(run, tmp_path: Path, arguments: str, message: str) -> None:
    write_folder(tmp_path / "data", splits=("train", "val"))
    done = run("train", *arguments.replace("DATA", "data").split())
    assert (done.code, done.out) == (2, ""), done.err
    assert done.err.startswith("lamzoo: ") and done.err.count("\n") == 1
    assert message in done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]
