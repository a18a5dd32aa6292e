"""Training data depend on seed and epoch apart, and every process gets its share of a split to score."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import Dataset

from lamzoo.training import parse_recipe
from lamzoo.training.classification.run import ClassificationRun
from lamzoo.training.loaders import SeededDataset, SeededSampler, create_eval_loader, seed_everything
from lamzoo.training.retrieval.run import RetrievalRun
from tests.training.retrieval_data import retrieval_table, write_faces


class Draws(Dataset[tuple[float, float, float]]):
    """Items that are three random numbers."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))


def seeded(seed: int, epoch: int) -> SeededDataset:
    dataset = SeededDataset(Draws(), seed)
    dataset.epoch = epoch
    return dataset


def test_no_two_seeds_and_epochs_share_an_order_or_a_draw() -> None:
    datasets = [seeded(seed, epoch) for seed in range(4) for epoch in range(4)]
    orders = {tuple(SeededSampler(dataset)) for dataset in datasets}
    assert len(orders) == 16
    assert all(sorted(order) == list(range(12)) for order in orders)
    draws = [draw for dataset in datasets for index in range(12) for draw in dataset[index]]
    assert len(set(draws)) == len(draws)


def test_the_initialisation_shares_no_random_state_with_an_image() -> None:
    seed_everything(3)
    assert (random.random(), float(np.random.rand()), float(torch.rand(()))) != seeded(3, 0)[0]


@pytest.mark.parametrize("processes", range(1, 9))
@pytest.mark.parametrize("accumulation", [1, 2])
def test_any_number_of_processes_scores_every_image(
    recipe_table: dict[str, Any], processes: int, accumulation: int
) -> None:
    model = timm.create_model("test_vit")
    for share in (1, 30, 60):
        batch = {"batch_size": share * processes * accumulation, "accumulation": accumulation}
        recipe: Any = parse_recipe({**recipe_table, "run": {**recipe_table["run"], **batch}})
        loader = create_eval_loader(recipe, Indices(), model)
        assert loader.batch_size is not None and 128 < loader.batch_size <= max(256, share * processes)
        scored: set[int] = set()
        for rank in range(processes):
            shard = prepare_data_loader(
                loader, num_processes=processes, process_index=rank, split_batches=True, put_on_device=False
            )
            scored |= {int(index) for batch in shard for index in batch}
        assert scored == set(range(300))


class Indices(Dataset[int]):
    """300 items that are their own indices."""

    transform = None

    def __len__(self) -> int:
        return 300

    def __getitem__(self, index: int) -> int:
        return index


def orders(run: Any, epochs: int) -> list[list[int]]:
    """Returns the indices of a run's training data in the order in which its prepared loader asks for them."""
    found: list[list[int]] = []
    run.seeded.dataset = Recorded(run.seeded.dataset, found)
    for epoch in range(epochs):
        found.append([])
        run.seeded.epoch = epoch
        for _ in run.loader:
            pass
    return found


class Recorded(Dataset[Any]):
    """A data set that notes what it is asked for."""

    def __init__(self, dataset: Any, orders: list[list[int]]) -> None:
        self.dataset, self.orders = dataset, orders

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        self.orders[-1].append(index)
        return self.dataset[index]


def test_a_seeds_next_epoch_is_not_the_next_seeds_epoch_in_runs(recipe_table: dict[str, Any], tmp_path: Path) -> None:
    retrieval = retrieval_table(write_faces(tmp_path, copies=1), tmp_path / "out")
    for kind, table in ((ClassificationRun, recipe_table), (RetrievalRun, retrieval)):
        found = []
        for seed in (0, 1):
            recipe: Any = parse_recipe({**table, "run": {**table["run"], "seed": seed}})
            found += orders(kind(recipe, False, None, None), 2)
        assert len({tuple(order) for order in found}) == 4
