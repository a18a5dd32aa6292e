"""The rates and the weight decay at which a run trains each parameter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import timm.optim
import torch

from lamzoo.adapters import add_lam, lam_parameters
from lamzoo.errors import RecipeError
from lamzoo.lam import LamConfig
from lamzoo.training import parse_recipe
from lamzoo.training.build import build_optimizer, build_scheduler
from lamzoo.training.recipe_common import SCHEDULES, SHARDED_OPTIMIZERS, OptimizerSection, ScheduleSection
from lamzoo.training.retrieval.run import RetrievalRun
from tests.training.optimizer_steps import steps, steps_in_two
from tests.training.retrieval_data import retrieval_table, write_faces


@pytest.fixture(scope="module")
def retrieval(tmp_path_factory: pytest.TempPathFactory) -> RetrievalRun:
    """A retrieval run whose towers have a learning rate of their own, and masks of every place tables of positions."""
    folder = tmp_path_factory.mktemp("retrieval")
    table = retrieval_table(write_faces(folder, copies=1), folder / "out")
    table["optimizer"] |= {"lr": 1e-4, "tower_lr": 1e-7, "weight_decay": 0.2}
    table["model"]["lam"] |= {"keys": "position"}
    table["model"]["kwargs"] |= {"lam_in": ["head", "vision", "text"]}
    return RetrievalRun(parse_recipe(table), False, None, None)


def rates(optimizer: torch.optim.Optimizer) -> dict[torch.nn.Parameter, float]:
    return {parameter: group["lr"] for group in optimizer.param_groups for parameter in group["params"]}


def scheduled_rates(optimizer: torch.optim.Optimizer, schedule: ScheduleSection) -> list[dict[Any, float]]:
    """Returns every parameter's learning rate in each of ten updates an epoch."""
    scheduler = build_scheduler(schedule, optimizer, 10)
    found = []
    for update in range(10 * schedule.total_epochs):
        scheduler.step_update(update)
        found.append(rates(optimizer))
    return found


@pytest.mark.parametrize("name", SCHEDULES)
def test_towers_train_at_their_own_rate_after_warmup(retrieval: RetrievalRun, name: str) -> None:
    schedule = ScheduleSection(name, epochs=3, warmup_epochs=1)
    whole = torch.nn.Linear(1, 1)
    reference = scheduled_rates(build_optimizer(OptimizerSection(lr=1e-4), whole), schedule)
    found = scheduled_rates(retrieval.build_optimizer(retrieval.model), schedule)
    for update in range(10, 30):
        lr = reference[update][whole.weight]
        for key, parameter in retrieval.model.named_parameters():
            tower = key.startswith("clip.") and ".lam." not in key
            assert found[update][parameter] == pytest.approx(lr / 1000 if tower else lr), (key, update)
    if name == "constant":
        assert found[10][retrieval.model.clip.visual.proj] == pytest.approx(1e-7)


@pytest.mark.parametrize("name", SCHEDULES)
def test_layer_decay_scales_each_blocks_rate_once(name: str) -> None:
    schedule = ScheduleSection(name, epochs=2, warmup_epochs=1)
    model: Any = add_lam(timm.create_model("test_vit", img_size=32, num_classes=2))
    found = scheduled_rates(build_optimizer(OptimizerSection(layer_decay=0.5), model), schedule)
    whole = torch.nn.Linear(1, 1)
    reference = scheduled_rates(build_optimizer(OptimizerSection(), whole), schedule)
    depth = len(model.blocks)
    for update in range(10, 20):
        lr = reference[update][whole.weight]
        assert found[update][model.head.weight] == pytest.approx(lr)
        for index, block in enumerate(model.blocks):
            assert found[update][block.attn.qkv.weight] == pytest.approx(lr * 0.5 ** (depth - index))
            assert found[update][block.attn.lam.network.query[0].weight] == pytest.approx(lr)


@pytest.mark.parametrize("layer_decay", [None, 0.5])
def test_masks_train_at_a_rate_of_their_own(layer_decay: float | None) -> None:
    schedule = ScheduleSection(epochs=2, warmup_epochs=0)
    model: Any = add_lam(timm.create_model("test_vit", img_size=32, num_classes=2), LamConfig(keys="position"))
    section = OptimizerSection(lr=1e-3, lam_lr=3e-3, layer_decay=layer_decay)
    optimizer = build_optimizer(section, model)
    found, other = (scheduled_rates(each, schedule) for each in (optimizer, build_optimizer(OptimizerSection(), model)))
    masks = set(lam_parameters(model))
    for update in (0, 7, 19):
        for parameter, rate in other[update].items():
            if parameter in masks:
                assert found[update][parameter] == pytest.approx(3 * rate)
            elif layer_decay is None:
                assert found[update][parameter] == pytest.approx(rate)
        for index, block in enumerate(model.blocks):
            weight = block.attn.qkv.weight
            decay = 1 if layer_decay is None else layer_decay ** (len(model.blocks) - index)
            assert found[update][weight] == pytest.approx(other[update][weight] * decay)
    decays = {parameter: group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]}
    tables = [decays[parameter] for name, parameter in model.named_parameters() if ".table." in name]
    assert tables and not any(tables)


def test_a_rate_for_masks_needs_masks() -> None:
    with pytest.raises(RecipeError, match="optimizer.lam_lr is for masks, and the model has none"):
        build_optimizer(OptimizerSection(lam_lr=1e-3), timm.create_model("test_vit"))


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "constant"])
def test_cooldown_epochs_follow_the_schedule_at_its_lowest_rate(name: str) -> None:
    model = torch.nn.Linear(1, 1)
    schedule = ScheduleSection(name, epochs=3, warmup_epochs=1, min_lr=1e-5, cooldown_epochs=2)
    found = [lrs[model.weight] for lrs in scheduled_rates(build_optimizer(OptimizerSection(), model), schedule)]
    assert len(found) == 50
    assert found[29] > 1e-5
    assert found[30:] == pytest.approx([1e-5] * 20)


def test_a_schedule_whose_lengths_do_not_fit_is_refused() -> None:
    optimizer = build_optimizer(OptimizerSection(), torch.nn.Linear(1, 1))
    with pytest.raises(RecipeError, match="schedule.name 'wsd' does not fit"):
        build_scheduler(ScheduleSection("wsd", epochs=3, warmup_epochs=5), optimizer, 10)


def test_retrieval_decays_no_table_or_bias_of_a_mask_and_gives_adamw_only_the_towers_embeddings(
    retrieval: RetrievalRun,
) -> None:
    optimizer = retrieval.build_optimizer(retrieval.model)
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    masks = {name: p for name, p in retrieval.model.named_parameters() if ".lam." in name}
    tables = {name for name in masks if ".table." in name}
    assert {name.split(".lam.")[0].split(".")[0] for name in tables} == {"clip", "head"}
    for name, parameter in masks.items():
        exempt = name in tables or name.endswith(".bias")
        assert groups[parameter]["weight_decay"] == (0.0 if exempt else 0.2), name
        assert not groups[parameter]["use_fallback"], name
    clip: Any = retrieval.model.clip
    for parameter in (clip.token_embedding.weight, clip.positional_embedding, clip.visual.positional_embedding):
        assert groups[parameter]["use_fallback"]


@pytest.mark.parametrize("layer_decay", [None, 0.5])
def test_the_state_of_an_optimizer_of_lamzoo_0_1_0_is_loaded_into_todays_groups(layer_decay: float | None) -> None:
    model = add_lam(timm.create_model("test_vit", img_size=32), LamConfig(keys="position", rank=2))
    host = model.no_weight_decay
    del model.no_weight_decay
    former = timm.optim.create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.1, layer_decay=layer_decay)
    model.no_weight_decay = host
    today = build_optimizer(OptimizerSection(weight_decay=0.1, layer_decay=layer_decay), model)
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    former.step()
    scales = [(group["weight_decay"], group.get("lr_scale")) for group in today.param_groups]
    today.load_state_dict(former.state_dict())
    assert [(group["weight_decay"], group.get("lr_scale")) for group in today.param_groups] == scales
    moved = 0
    for name, parameter in model.named_parameters():
        assert torch.equal(today.state[parameter]["exp_avg"], former.state[parameter]["exp_avg"]), name
        moved += bool(parameter.grad is not None and parameter.grad.any())
    assert moved > 10


@pytest.mark.parametrize("kwargs", [{"betas": [2.0, -1.0]}, {"eps": -1}, {"nonsense": 1}])
def test_arguments_that_the_optimizer_refuses_are_named(kwargs: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="optimizer.kwargs .* do not fit 'adamw'"):
        build_optimizer(OptimizerSection(kwargs=kwargs), torch.nn.Linear(2, 2))


@pytest.mark.slow
def test_every_optimizer_of_sharded_runs_updates_two_processes_as_one(tmp_path: Path) -> None:
    two = steps_in_two(tmp_path)
    assert list(two) == list(SHARDED_OPTIMIZERS)
    for name, weights in two.items():
        expected = steps(name)
        for key, value in expected.items():
            torch.testing.assert_close(weights[key], value, rtol=1e-9, atol=1e-10, msg=f"{name}: {key}")
