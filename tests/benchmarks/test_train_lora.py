"""Fine-tuning by LoRA: what is trained, and what is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lamzoo
from benchmarks import train_lora
from benchmarks.ablation import run as ablation
from benchmarks.reduction import Images, logits_of
from lamzoo.errors import RecipeError
from lamzoo.records import to_toml
from lamzoo.tasks import TASKS
from lamzoo.training import train
from tests.images import write_npz


@pytest.fixture(autouse=True)
def _task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registers the task, and forgets it afterwards."""
    monkeypatch.setitem(TASKS, train_lora.TASK.name, train_lora.TASK)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    for split in ("train", "test"):
        write_npz(tmp_path, split, each=8)
    table = {
        "model": {
            "name": "lam_vit_micro.cifar10",
            "pretrained": True,
            "lam": {"rank": 2, "keys": "position"},
            "kwargs": {"lam_weights": "fresh"},
        },
        "data": {"source": f"npz:{tmp_path}", "eval_split": "test"},
        "optimizer": {"lr": 1e-2},
        "schedule": {"epochs": 1, "warmup_epochs": 0},
        "run": {"output": str(tmp_path / "run"), "batch_size": 12, "device": "cpu", "report": False, "ema_decay": 0.5},
    }
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(to_toml(table))
    return recipe


def test_lora_masks_and_the_head_are_trained_and_the_saved_weights_contain_them(path: Path, tmp_path: Path) -> None:
    result = train(train_lora.lora_recipe(path, ["run.keep=last"]))
    model: Any = lamzoo.create_model(f"local-dir:{result.model}", pretrained=True).eval()
    assert not any("lora" in name for name in model.state_dict())
    images = Images.load(model, f"npz:{tmp_path}", "test")
    accuracy = (logits_of(model, images).argmax(dim=1) == images.labels).float().mean()
    assert 100 * float(accuracy) == pytest.approx(result.scores["test"].top1)
    base = lamzoo.create_model("vit_micro.cifar10", num_classes=3)
    start = lamzoo.create_model("lam_vit_micro.cifar10", pretrained=True).state_dict()
    changed = {}
    for name, weight in model.state_dict().items():
        if name in start and start[name].shape == weight.shape and ".lam." not in name:
            changed[name] = not torch.equal(weight, start[name])
    layers = {name for name in base.state_dict() if name.startswith("blocks.") and name.endswith(".weight")}
    layers = {name for name in layers if ".norm" not in name}
    assert {name for name, moved in changed.items() if moved} - {"head.weight", "head.bias"} == layers
    for name in layers:
        assert torch.linalg.matrix_rank(model.state_dict()[name] - start[name], rtol=1e-3) <= 8, name
    assert any(parameter.any() for parameter in lamzoo.lam_parameters(model))


def test_the_best_weights_are_refused_before_the_training(path: Path) -> None:
    with pytest.raises(RecipeError, match=r"run\.keep is 'best', but .*; set it to 'last'"):
        train_lora.lora_recipe(path, [])


def test_models_without_blocks_are_refused() -> None:
    with pytest.raises(RecipeError, match="LoRA is for timm's transformers"):
        train_lora.add_lora(torch.nn.Linear(2, 2))


def test_rows_of_lora_are_trained_by_their_module(tmp_path: Path) -> None:
    runs = ablation.plan(ablation.HERE / "clothing10.toml", tmp_path, ["plain", "lora", "lora-mask"], [0], [])
    assert [run.module for run in runs] == [None, "benchmarks.train_lora", "benchmarks.train_lora"]
    assert len({run.sha256 for run in runs}) == 3
