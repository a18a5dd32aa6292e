"""Training on features, the base of moments and captions; each process scores a share of the inputs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lamzoo.errors import RecipeError
from lamzoo.training.gradients import average_gradients, global_counts
from lamzoo.training.loaders import create_seeded_loader, seed_everything
from lamzoo.training.splits import BadInputs, ScanProgress, open_roles
from lamzoo.training.trainer import TrainingRun


class FeatureRun(TrainingRun):
    """One run on features; arguments as of :class:`TrainingRun`."""

    scoring_precision = "float32"
    splits: Mapping[str, Any]

    @abstractmethod
    def names(self, split: Any) -> Collection[Any]:
        """Returns the identifiers of a split's items, to detect items that two splits share."""

    @abstractmethod
    def samples(self) -> Any:
        """Returns the training samples, spliced as the recipe says."""

    @abstractmethod
    def collate(self, model: nn.Module) -> Any:
        """Returns the function that collates samples into a batch."""

    @abstractmethod
    def counts(self, batch: Any) -> Mapping[str, Tensor]:
        """Returns the divisors of a batch's losses, int64 scalars, with the same names for every batch."""

    @abstractmethod
    def losses(self, batch: Any, counts: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Returns a batch's part of the weighted losses of the global batch; enters the autocast itself.

        Args:
            batch: one of the global batch's.
            counts: as of :meth:`counts`, of all of them together.
        """

    def complete(self, batches: list[Any]) -> list[Any]:
        """Returns this process's batches of an update with data from the other processes; called on every process."""
        return batches

    def open_data(self) -> None:
        data = self.recipe.data
        self.splits, self.videos_held_out = open_roles(self.task, data, self.recipe.run.seed)
        train = self.splits["train"]
        known = set(self.names(train))
        for role, split in self.splits.items():
            common = known & set(self.names(split))
            if role != "train" and common:
                raise RecipeError(
                    f"{len(common)} {self.task.items} of {data.source} would be trained and scored on, such as "
                    f"{min(common)!r}, in {train.split} and {split.split}; name other splits in data.train_split and "
                    "data.eval_split."
                )
        if len(train) < self.recipe.run.batch_size:
            raise RecipeError(
                f"run.batch_size asks for batches of {self.recipe.run.batch_size} {self.task.items} and {data.source} "
                f"has {len(train)} in {train.split}; use a smaller batch."
            )
        if self.recipe.augment.splice:
            train.splice()  # which says where the data can't

    def datasets(self) -> Mapping[str, Any]:
        return self.splits

    def scan_data(self, progress: ScanProgress | None) -> BadInputs:
        if self.recipe.data.scan:
            for role, split in self.splits.items():
                share = self.share(role)
                for done, index in enumerate(share, start=1):
                    split.read(index)  # which names what is missing or damaged
                    if progress is not None and self.accelerator.is_main_process:
                        progress(role, done, len(share))
        return ()

    def train_loader(self, model: nn.Module) -> DataLoader[Any]:
        return create_seeded_loader(self.recipe, self.samples(), self.collate(model))

    def share(self, role: str) -> range:
        """Returns the indices of a split's items that this process scores."""
        return range(self.accelerator.process_index, len(self.splits[role]), self.accelerator.num_processes)

    def prepare_model(self, model: nn.Module) -> Any:
        # Not wrapped: a process whose clips all lack a modality has no gradient for its weights, which
        # DistributedDataParallel would wait for. The autocast that Accelerate puts around forward is taken off again,
        # since losses enters it and scores are float32.
        model = self.accelerator.prepare_model(model, evaluation_mode=True)
        return self.accelerator.unwrap_model(model, keep_fp32_wrapper=False)

    def backward(self, epoch: int, update: int, batches: list[Any]) -> Tensor:
        batches = self.complete(batches)
        counts = global_counts(self.accelerator, [self.counts(batch) for batch in batches])
        losses = []
        for index, batch in enumerate(batches):
            # Seeds of their own for each pass: dropout needs no states in the checkpoints.
            step = update * len(batches) + index
            seed_everything(self.recipe.run.seed, epoch, step, self.accelerator.process_index, 1)
            loss = torch.stack(list(self.losses(batch, counts).values())).sum()
            self.accelerator.backward(loss * self.accelerator.num_processes)  # the mean below divides their sum
            losses.append(loss.detach())
        average_gradients(self.accelerator, self.model)
        return self.accelerator.reduce(torch.stack(losses).sum(), "sum")
