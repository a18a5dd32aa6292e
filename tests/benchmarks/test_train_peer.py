"""Training with a peer: the run of `lamzoo train`, with other tokens."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lamzoo
from benchmarks import train_peer
from benchmarks.methods import ALL, PEERS
from benchmarks.reduction import Images, Subject, logits_of, measure_all, training_of
from benchmarks.reduction_tables import TrainedRow, best_variants
from benchmarks.rows import read_rows
from lamzoo.errors import RecipeError
from lamzoo.records import to_toml
from lamzoo.tasks import TASKS
from lamzoo.training import load_recipe, train
from tests.images import write_npz
from tests.training.processes import train_killed


@pytest.fixture(autouse=True)
def _task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registers the task, and forgets it afterwards."""
    monkeypatch.setitem(TASKS, train_peer.TASK.name, train_peer.TASK)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    for split in ("train", "test"):
        write_npz(folder, split, each=8)
    return folder


@pytest.fixture
def path(data: Path, tmp_path: Path) -> Path:
    """A recipe of four updates that averages weights; 80 % of the GMACs of a tiny plain model."""
    arguments = {"embed_dim": 16, "depth": 3, "num_heads": 2}
    target = 0.8 * lamzoo.profile(lamzoo.create_model("vit_micro", num_classes=3, **arguments)).gmacs
    path = tmp_path / "recipe.toml"
    table = {
        "model": {"name": "lam_vit_micro", "kwargs": arguments},
        "reduction": {"target_gmacs": target},
        "data": {"source": f"npz:{data}", "eval_split": "test"},
        "optimizer": {"lr": 1e-2},
        "schedule": {"epochs": 2, "warmup_epochs": 0},
        "run": {"output": str(tmp_path / "run"), "batch_size": 12, "device": "cpu", "report": False, "ema_decay": 0.5},
    }
    path.write_text(to_toml(table))
    return path


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def test_a_killed_run_resumes_to_the_same_weights(path: Path, tmp_path: Path) -> None:
    overrides = ["run.checkpoint_interval=1", "run.precision=bf16"]
    whole = train(train_peer.peer_recipe(path, overrides, "ToMe"))
    resumed = train_killed(train_peer.peer_recipe(path, overrides, "ToMe").to_dict(), tmp_path / "killed", 3)
    torch.testing.assert_close(weights(resumed.output), weights(whole.output), rtol=0, atol=0)


def test_a_peer_that_keeps_all_tokens_trains_as_without_it(path: Path, tmp_path: Path) -> None:
    with_peer = train(train_peer.peer_recipe(path, ["reduction.target_gmacs=9"], "ToMe"))
    table = load_recipe(path).to_dict()
    del table["reduction"]
    (tmp_path / "plain.toml").write_text(to_toml(table))
    without = train(load_recipe(tmp_path / "plain.toml", [f"run.output={tmp_path / 'plain'}"]))
    torch.testing.assert_close(weights(with_peer.output), weights(without.output))


@pytest.mark.parametrize("name", ["lam_vit_micro", "vit_micro"])
def test_the_saved_model_has_all_tokens_and_was_scored_with_the_peer(path: Path, data: Path, name: str) -> None:
    result = train(train_peer.peer_recipe(path, [f"model.name={name}"], "ToMe"))
    model = lamzoo.create_model(f"local-dir:{result.model}", pretrained=True)
    assert not hasattr(model, "token_reduction")
    images = Images.load(model, f"npz:{data}", "test")
    target = load_recipe(path).to_dict()["reduction"]["target_gmacs"]
    with next(iter(PEERS["ToMe"](model).values()))(model, target, (), None) as setting:
        assert setting is not None
        few = logits_of(model, images)
    losses = [float(torch.nn.functional.cross_entropy(each, images.labels)) for each in (few, logits_of(model, images))]
    assert result.history[-1]["eval_loss"] == pytest.approx(losses[0], abs=1e-5)
    assert losses[0] != pytest.approx(losses[1], abs=1e-4)


def test_rows_of_trained_weights_name_their_training_and_the_gain(path: Path, data: Path, tmp_path: Path) -> None:
    arguments = load_recipe(path).to_dict()["model"]["kwargs"]
    names = {name: f"local-dir:{tmp_path / name}" for name in ("lam_vit_micro", "vit_micro")}
    for name in names:
        lamzoo.save_pretrained(lamzoo.create_model(name, num_classes=3, **arguments), tmp_path / name)
    start, plain = names.values()
    given = [f"model.name={start}", "model.pretrained=true", "model.kwargs={}", "schedule.epochs=1"]
    merged = train(load_recipe(path, [*given, f"run.output={tmp_path / 'merged'}"]))
    tome = train(train_peer.peer_recipe(path, [*given, f"run.output={tmp_path / 'tome'}"], "ToMe"))
    subjects = [
        Subject(f"local-dir:{result.model}", plain, str(data), "test", (0,), (0.8,), start) for result in (merged, tome)
    ]
    results = tmp_path / "rows.csv"
    measure_all(subjects, (ALL, "merged", "stride"), "npz:", results, tmp_path / "kept", torch.device("cpu"))
    rows = best_variants(read_rows(results, TrainedRow))
    assert [(row.model, row.method) for row in rows] == [
        (subject.model, method) for subject in subjects for method in (ALL, "merged", "stride")
    ]
    assert {(row.start, row.epochs) for row in rows} == {(start, 1)}
    assert [row.training for row in rows] == ["merged, 80%"] * 3 + ["ToMe, 80%"] * 3
    whole = lamzoo.profile(lamzoo.create_model(start)).gmacs
    assert [row.gmacs for row in rows if row.method == ALL] == [pytest.approx(whole, abs=1e-6)] * 2
    before = lamzoo.create_model(start, pretrained=True).eval()
    images = Images.load(before, f"npz:{data}", "test")
    top1 = 100 * float((logits_of(before, images).argmax(dim=1) == images.labels).double().mean())
    assert [row.gain for row in rows] == [pytest.approx(row.top1 - top1, abs=0.011) for row in rows]
    best = max(row.top1 for row in rows if row.method == "stride")
    ours = [row for row in rows if row.method == "merged"]
    assert [row.ahead for row in ours] == [pytest.approx(row.top1 - best, abs=0.011) for row in ours]
    with pytest.raises(lamzoo.LamzooError, match="was trained from .*lam_vit_micro, and not from other; .*--like"):
        training_of(replace(subjects[0], start="other"))


def test_a_run_with_a_peer_is_not_continued_without_it(path: Path) -> None:
    train(train_peer.peer_recipe(path, [], "ToMe"))
    with pytest.raises(RecipeError, match=r"peer\.method was 'ToMe' and is 'PiToMe'"):
        train(train_peer.peer_recipe(path, [], "PiToMe"), resume=True)
    with pytest.raises(RecipeError, match="holds a run of another recipe"):
        train(load_recipe(path), resume=True)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("reduction.target_gmacs=0", r"peer\.target_gmacs is 0\.0; it must be positive"),
        ("reduction.target_gmacs=1e-9", r"peer\.target_gmacs is 1e-09, which no setting of ToMe meets .*raise it"),
        ("run.grad_checkpointing=true", r"run\.grad_checkpointing is true, which peers don't support"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused(
    path: Path, override: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train_peer", str(path), override])
    with pytest.raises(SystemExit) as ended:
        train_peer.main()
    assert ended.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_recipe_without_a_budget_is_refused(path: Path) -> None:
    path.write_text(path.read_text().replace("target_gmacs", "keep"))
    with pytest.raises(RecipeError, match=r"recipe\.toml has no reduction\.target_gmacs, .*; add it"):
        train_peer.peer_recipe(path, [], "ToMe")
