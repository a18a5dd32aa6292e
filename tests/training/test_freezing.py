"""Only what is tuned changes, and the rest computes as in evaluation meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lamzoo
from lamzoo.errors import RecipeError, StateDictError
from lamzoo.training import parse_recipe, train
from lamzoo.training.build import build_model
from lamzoo.training.freezing import Tuning
from tests.training.processes import train_killed


@pytest.fixture
def start(tmp_path: Path) -> str:
    """A saved model to start from: a convolutional stem with batch norm, dropout, masks, other classes."""
    model = lamzoo.create_model("lam_vit_micro", embed_dim=16, depth=2, num_classes=2, drop_path_rate=0.2)
    lamzoo.save_pretrained(model, tmp_path / "start", label_names=["cat", "dog"])
    return f"local-dir:{tmp_path / 'start'}"


def tuned(recipe_table: dict[str, Any], start: str, tune: str, **run: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The state dicts before and after one epoch."""
    recipe_table["model"] = {"name": start, "pretrained": True, "tune": tune}
    recipe_table["schedule"]["epochs"] = 1
    result = train(parse_recipe({**recipe_table, "run": {**recipe_table["run"], **run}}))
    return load_file(Path(start.removeprefix("local-dir:")) / "model.safetensors"), load_file(
        result.model / "model.safetensors"
    )


@pytest.mark.parametrize(("tune", "trained"), [("head", ("head.",)), ("lam", ("head.", ".lam.")), ("all", ("",))])
def test_nothing_else_changes(recipe_table: dict[str, Any], start: str, tune: str, trained: tuple[str, ...]) -> None:
    before, after = tuned(recipe_table, start, tune, ema_decay=0.9)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    expected = {name for name in before if any(part in name for part in trained)}
    assert changed <= expected
    for part in trained:  # and each part that is tuned does
        assert any(part in name for name in changed)


def test_masks_and_classifier_are_saved_alone_too(recipe_table: dict[str, Any], start: str, tmp_path: Path) -> None:
    _, whole = tuned(recipe_table, start, "lam", output=str(tmp_path / "run"), ema_decay=0.9)
    base: Any = lamzoo.create_model(start, pretrained=True, num_classes=len(whole["head.bias"]))
    lamzoo.load_lam(base, tmp_path / "run" / "lam")
    assert all(torch.equal(value, whole[key]) for key, value in base.state_dict().items())
    names = lamzoo.get_pretrained_cfg(tmp_path / "run").label_names
    assert list(base.pretrained_cfg["label_names"]) == list(names)  # type: ignore[arg-type]
    assert sum(file.stat().st_size for file in (tmp_path / "run" / "lam").iterdir()) < 100_000


def test_what_is_frozen_computes_as_in_evaluation(start: str) -> None:
    model = lamzoo.create_model(start, pretrained=True)
    tuning = Tuning(model, "lam")
    tuning.train_mode(model)
    modes = {name: module.training for name, module in model.named_modules()}
    assert not any(isinstance(module, nn.BatchNorm2d) and module.training for module in model.modules())
    assert not modes["blocks.1.drop_path1"]
    assert modes["blocks.1.attn.lam"]
    assert modes["head"] and modes["head_drop"]


def test_tuning_masks_of_a_plain_model_is_refused(recipe_table: dict[str, Any], start: str) -> None:
    recipe_table["model"] = {"name": start, "pretrained": True, "tune": "lam"}
    model = lamzoo.create_model(start, lam=False)
    with pytest.raises(RecipeError, match="no learnable masks"):
        Tuning(model, "lam")
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_tuning_without_a_classifier_is_refused(start: str) -> None:
    with pytest.raises(RecipeError, match="no classifier"):
        Tuning(lamzoo.create_model(start, num_classes=0), "head")


def test_freezing_a_backbone_without_weights_is_refused(recipe_table: dict[str, Any]) -> None:
    recipe_table["model"]["tune"] = "head"
    with pytest.raises(RecipeError, match="no weights"):
        parse_recipe(recipe_table)


@pytest.mark.parametrize("tune", ["lam", pytest.param("head", marks=pytest.mark.slow)])
def test_killed_run_resumes_to_the_same_weights(
    recipe_table: dict[str, Any], start: str, tmp_path: Path, tune: str
) -> None:
    _, whole = tuned(recipe_table, start, tune, output=str(tmp_path / "whole"))
    recipe_table["run"]["checkpoint_interval"] = 2
    killed = train_killed(recipe_table, tmp_path / "killed", killed_at=3)
    resumed = load_file(killed.model / "model.safetensors")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_classifier_for_other_classes_is_made_anew(recipe_table: dict[str, Any], start: str) -> None:
    recipe_table["model"] = {"name": start, "pretrained": True}
    recipe = parse_recipe(recipe_table)
    weight = lamzoo.create_model(start, pretrained=True).head.weight
    assert torch.equal(build_model(recipe, ["cat", "dog"]).head.weight, weight)
    assert not torch.equal(build_model(recipe, ["blue", "red"]).head.weight, weight)


def test_tuning_masks_of_another_kind_is_refused_unless_they_start_anew(
    recipe_table: dict[str, Any], start: str
) -> None:
    model = {"name": start, "pretrained": True, "tune": "lam", "lam": {"op": "mul"}}
    recipe_table["schedule"]["epochs"] = 1
    with pytest.raises(StateDictError, match=r"op='add'.*model\.kwargs\.lam_weights"):
        train(parse_recipe(recipe_table | {"model": model}))
    result = train(parse_recipe(recipe_table | {"model": model | {"kwargs": {"lam_weights": "fresh"}}}))
    assert lamzoo.create_model(f"local-dir:{result.model}").lam_config == lamzoo.LamConfig(op="mul")


def test_classifier_for_the_same_classes_in_another_spelling_is_kept(
    recipe_table: dict[str, Any], tmp_path: Path
) -> None:
    model = lamzoo.create_model("lam_vit_micro", embed_dim=16, depth=1, num_classes=2)
    lamzoo.save_pretrained(model, tmp_path / "start", label_names=["Cafe\u0301", "dog"])
    recipe_table["model"] = {"name": f"local-dir:{tmp_path / 'start'}", "pretrained": True}
    built = build_model(parse_recipe(recipe_table), ["Caf\u00e9", "dog"])
    assert torch.equal(built.head.weight, model.head.weight)
    assert not torch.equal(build_model(parse_recipe(recipe_table), ["cafe", "dog"]).head.weight, model.head.weight)
