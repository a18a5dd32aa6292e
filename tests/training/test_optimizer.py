"""The rates and the weight decay at which a run trains each parameter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lamzoo.training import parse_recipe
from lamzoo.training.build import build_optimizer, build_scheduler
from lamzoo.training.retrieval import RetrievalRun
from lamzoo.training.sections import SCHEDULES, OptimizerSection, ScheduleSection
from tests.training.retrieval_data import retrieval_table, write_faces


@pytest.fixture(scope="module")
def retrieval(tmp_path_factory: pytest.TempPathFactory) -> RetrievalRun:
    """A retrieval run whose towers have a learning rate of their own."""
    folder = tmp_path_factory.mktemp("retrieval")
    table = retrieval_table(write_faces(folder, copies=1), folder / "out")
    table["optimizer"] |= {"lr": 1e-4, "tower_lr": 1e-7}
    return RetrievalRun(parse_recipe(table), False, None, None)


def rates(optimizer: torch.optim.Optimizer) -> dict[torch.nn.Parameter, float]:
    return {parameter: group["lr"] for group in optimizer.param_groups for parameter in group["params"]}


def scheduled_rates(optimizer: torch.optim.Optimizer, schedule: ScheduleSection) -> list[dict[Any, float]]:
    """Returns every parameter's learning rate in each of ten updates an epoch."""
    scheduler = build_scheduler(schedule, optimizer, 10)
    found = []
    for update in range(10 * schedule.epochs):
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
