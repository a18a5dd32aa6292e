"""Training on features, the base of moment retrieval and captioning; scoring is distributed over processes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lamzoo.registry.catalog import model_ref
from lamzoo.training.gradients import average_gradients, global_counts
from lamzoo.training.loaders import check_batch, create_seeded_loader, seed_everything
from lamzoo.training.splits import BadInputs, ScanProgress, check_disjoint, open_roles
from lamzoo.training.trainer import TrainingRun


class FeatureRun(TrainingRun):
    """A training run on features; arguments as of :class:`TrainingRun`."""

    scoring_precision = "float32"
    splits: Mapping[str, Any]

    @abstractmethod
    def names(self, split: Any) -> Collection[Any]:
        """Returns the identifiers of a split's items, to detect items in two splits."""

    @abstractmethod
    def samples(self) -> Any:
        """Returns the training samples, spliced according to the recipe."""

    @abstractmethod
    def collate(self, model: nn.Module) -> Any:
        """Returns the collate function for samples."""

    @abstractmethod
    def counts(self, batch: Any) -> Mapping[str, Tensor]:
        """Returns the denominators of a batch's losses, int64 scalars, with the same names for every batch."""

    @abstractmethod
    def losses(self, batch: Any, counts: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Returns a batch's share of the weighted losses of the global batch; this method enters the autocast itself.

        Args:
            batch: one batch of the global batch.
            counts: as of :meth:`counts`, summed over the global batch.
        """

    def complete(self, batches: list[Any]) -> list[Any]:
        """Adds to this process's batches of an update the data they need from others; called on every process."""
        return batches

    def open_data(self) -> None:
        data = self.recipe.data
        self.splits, self.videos_held_out = open_roles(self.task, data, self.recipe.run.seed)
        train = self.splits["train"]
        check_disjoint(self.splits, self.names, self.task.items, data.source)
        check_batch(self.recipe, len(train), self.task.items, train.split)
        if self.recipe.augment.splice:
            train.splice()  # raises if the data does not support it

    @property
    def fits_model_to_data(self) -> bool:
        """Whether the data sets the sizes of the model's inputs: without weights, and not for a saved model."""
        section = self.recipe.model
        return not section.pretrained and not model_ref(section.name).is_saved

    def datasets(self) -> Mapping[str, Any]:
        return self.splits

    def scan_data(self, progress: ScanProgress | None) -> BadInputs:
        if self.checkpoints.needs_scan():
            for role, split in self.splits.items():
                share = self.share(role)
                for done, index in enumerate(share, start=1):
                    split.read(index)  # raises for missing or damaged features
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
        # DistributedDataParallel would wait for. Accelerate's autocast around forward is removed, because losses enters
        # autocast itself and scores are computed in float32.
        model = self.accelerator.prepare_model(model, evaluation_mode=True)
        return self.accelerator.unwrap_model(model, keep_fp32_wrapper=False)

    def backward(self, epoch: int, update: int, batches: list[Any]) -> Tensor:
        batches = self.complete(batches)
        counts = global_counts(self.accelerator, [self.counts(batch) for batch in batches])
        losses = []
        for index, batch in enumerate(batches):
            # Separate seeds for each pass: dropout needs no states in the checkpoints.
            step = update * len(batches) + index
            seed_everything(self.recipe.run.seed, epoch, step, self.accelerator.process_index, 1)
            loss = torch.stack(list(self.losses(batch, counts).values())).sum()
            self.accelerator.backward(loss * self.accelerator.num_processes)  # offsets the mean over processes below
            losses.append(loss.detach())
        average_gradients(self.accelerator, self.model)
        return self.accelerator.reduce(torch.stack(losses).sum(), "sum")
