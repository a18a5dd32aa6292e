"""Training runs of image classification."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lamzoo.data.trained import SPLIT_NAME
from lamzoo.reduction import pruning_loss
from lamzoo.training.build import attention_kernels, build_model
from lamzoo.training.checkpoints import on_main_process
from lamzoo.training.classification.report import RunFacts, write_report
from lamzoo.training.classification.scoring import Score, score
from lamzoo.training.freezing import Tuning
from lamzoo.training.gradients import average_gradients
from lamzoo.training.loaders import (
    check_batch,
    check_mixup,
    create_eval_loader,
    create_mixup,
    create_train_loader,
    seed_everything,
)
from lamzoo.training.recipe import Recipe
from lamzoo.training.recipe_common import PruneSection
from lamzoo.training.splits import (
    BadInputs,
    ScanProgress,
    Splits,
    check_made_split,
    open_splits,
    prepare_splits,
)
from lamzoo.training.trainer import TrainingRun
from lamzoo.weights import save_lam


class ClassificationRun(TrainingRun):
    """A training run of an image classifier; arguments as of :class:`TrainingRun`."""

    recipe: Recipe
    splits: Splits
    averages = True  # gradients, after the passes; False once DDP averages them in the backward pass

    def open_data(self) -> None:
        self.splits = open_splits(self.recipe.data)

    def datasets(self) -> Mapping[str, Any]:
        splits = {"train": self.splits.train, "validation": self.splits.evaluation, "test": self.splits.test}
        return {role: split for role, split in splits.items() if split is not None}

    def held_out(self) -> str:
        made = self.splits.made
        return "" if made is None else f" (held out: {made.fraction:g} of each class, by seed {made.seed})"

    def class_names(self) -> list[str] | None:
        return self.splits.train.classes

    def build_model(self) -> nn.Module:
        check_mixup(self.recipe, self.accelerator.num_processes, len(self.splits.train))
        model = build_model(self.recipe, self.splits.train.classes)
        self.tuning = Tuning(model, self.recipe.model.tune)
        config = getattr(model, "prune_config", None)
        learns = config is not None and config.training == "straight-through"
        self.prune_weight = (self.recipe.token_reduction or PruneSection()).loss_weight if learns else 0.0
        return model

    def scan_data(self, progress: ScanProgress | None) -> BadInputs:
        recipe = self.recipe
        data = replace(recipe.data, scan=self.checkpoints.needs_scan())
        self.splits = prepare_splits(data, self.splits, recipe.run.seed, self.accelerator, progress)
        check_batch(recipe, len(self.splits.train), "images", recipe.data.train_split)
        check_made_split(self.checkpoints.output, self.splits.made)
        return self.splits.bad

    def write_records(self) -> None:
        super().write_records()
        if self.splits.made is not None:
            self.splits.made.write(self.checkpoints.output)
        else:
            (self.checkpoints.output / SPLIT_NAME).unlink(missing_ok=True)  # left by a run without a checkpoint

    def train_loader(self, model: nn.Module) -> DataLoader[Any]:
        self.mixup = create_mixup(self.recipe, int(model.num_classes))  # type: ignore[arg-type]
        self.loss = nn.CrossEntropyLoss(label_smoothing=0.0 if self.mixup else self.recipe.augment.label_smoothing)
        return create_train_loader(self.recipe, self.splits.train, model)

    def eval_loaders(self, model: nn.Module) -> list[DataLoader[Any]]:
        scored = [split for split in (self.splits.evaluation, self.splits.test) if split is not None]
        return [create_eval_loader(self.recipe, split, model) for split in scored]

    def keep_model(self) -> Path:
        folder = super().keep_model()
        # load_lam gives masks to all blocks; of a model with masks in some, model/ has them.
        if self.recipe.model.tune == "lam" and not hasattr(self.evaluated_model, "lam_blocks"):
            self.masks = self.checkpoints.output / "lam"
            also, names = self.tuning.classifier, self.class_names()
            save = partial(save_lam, self.evaluated_model, self.masks, also=also, label_names=names)
            on_main_process(self.accelerator, save)
        return folder

    def train_mode(self) -> None:
        self.tuning.train_mode(self.model)

    def backward(self, epoch: int, update: int, batches: list[Any]) -> Tensor:
        losses = []
        for index, (images, labels) in enumerate(batches):
            # Separate seeds for each pass: dropout and mixup need no states in the checkpoints.
            step = update * len(batches) + index
            seed_everything(self.recipe.run.seed, epoch, step, self.accelerator.process_index, 1)
            if self.mixup is not None:
                images, labels = self.mixup(images, labels)
            kernels = attention_kernels(self.recipe.model.fused_attention)
            alone = self.averages or index + 1 < len(batches)
            with kernels, self.accelerator.no_sync(self.model) if alone else nullcontext():
                with self.accelerator.autocast():
                    logits = self.model(images)
                loss: Tensor = self.loss(logits.float(), labels)
                if self.prune_weight:
                    loss = loss + self.prune_weight * pruning_loss(self.model)
                loss = loss / len(batches)
                self.accelerator.backward(loss)
            losses.append(loss.detach())
        if self.averages:
            average_gradients(self.accelerator, self.model)
            # DDP fails if a parameter gets no gradient, such as a mask token for pretraining. FSDP does not average
            # the gradients of scalars.
            trained = (parameter for parameter in self.model.parameters() if parameter.requires_grad)
            self.averages = self.whole is not None or any(parameter.grad is None for parameter in trained)
        return self.accelerator.reduce(torch.stack(losses).sum(), "mean")

    def score(self, role: str) -> Score:
        loader = self.prepared_eval_loaders[0 if role == "validation" else 1]
        return score(self.accelerator, self.evaluated_model, loader)

    def write_report(self, folder: Path, scores: Mapping[str, Any], command: str | None) -> None:
        facts = RunFacts(
            common=self.facts(command),
            recipe=self.recipe,
            model=self.evaluated_model,
            splits=self.splits,
            scores=scores,
            history=self.history,
            about_weights=self.about_weights(),
        )
        write_report(folder, facts)
