"""Training of moment retrieval and highlight detection: what a run does with queries about videos."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lamzoo.data.moments import create_moment_dataset
from lamzoo.errors import RecipeError
from lamzoo.evaluation.finding import check_features, submission
from lamzoo.evaluation.moments import moment_metrics
from lamzoo.lam import LamConfig
from lamzoo.registry import create_model
from lamzoo.training.build import build_optimizer
from lamzoo.training.inputs import BadInputs, ScanProgress
from lamzoo.training.loaders import SeededDataset, seed_everything
from lamzoo.training.moment_batches import Samples, collate
from lamzoo.training.moment_losses import MomentTargets, moment_losses
from lamzoo.training.moment_recipe import MomentRecipe
from lamzoo.training.run import TrainingRun, TrainResult
from lamzoo.training.score_report import moment_table, write_score_report
from lamzoo.weights import save_pretrained

_CURVE = ("eval_R1@0.7", "R1@0.7, validation (%)")
_WATCHED = {"MR-full-R1@0.5": "R1@0.5", "MR-full-R1@0.7": "R1@0.7", "MR-full-mAP": "mAP",
            "HL-min-VeryGood-mAP": "HL_mAP", "HL-min-VeryGood-Hit1": "HL_Hit1"}  # fmt: skip


class MomentRun(TrainingRun):
    """One run of a moment model; arguments as of :class:`TrainingRun`."""

    metric = "R1@0.7"
    recipe: MomentRecipe
    metrics: Mapping[str, Any] | None = None

    def open_data(self) -> None:
        data = self.recipe.data
        roles = {"train": data.train_split, "validation": data.eval_split, "test": data.test_split}
        self.splits = {
            role: create_moment_dataset(data.source, split) for role, split in roles.items() if split is not None
        }
        self.truth = {role: split.annotations() for role, split in self.splits.items()}
        train = self.splits["train"]
        for role, split in self.splits.items():
            common = {query.qid for query in split.queries} & {query.qid for query in train.queries}
            if role != "train" and common:
                raise RecipeError(
                    f"{len(common)} queries of {data.source} would be trained and scored on, such as {min(common)!r}, "
                    f"in {train.split} and {split.split}; name other splits in data.train_split and data.eval_split."
                )
        if len(train) < self.recipe.run.batch_size:
            raise RecipeError(
                f"run.batch_size asks for batches of {self.recipe.run.batch_size} queries and {data.source} has "
                f"{len(train)} in {train.split}; use a smaller batch."
            )
        self.example = train.read(0)
        if self.recipe.augment.splice:
            train.splice()  # which says where the data can't

    def build_model(self) -> nn.Module:
        section = self.recipe.model
        kwargs = dict(section.kwargs)
        if ":" not in section.name and not section.pretrained:
            video, text = self.example.video.shape[1], self.example.text.shape[1]
            kwargs = {"video_dim": video, "text_dim": text, **kwargs}
        if section.lam is not None:
            kwargs["lam"] = LamConfig.from_dict(section.lam)
        model = create_model(section.name, pretrained=section.pretrained, **kwargs)
        check_features(model, self.example)
        return model

    def scan_data(self, progress: ScanProgress | None) -> BadInputs:
        if self.recipe.data.scan:
            for role, split in self.splits.items():
                share = range(self.accelerator.process_index, len(split), self.accelerator.num_processes)
                for done, index in enumerate(share, start=1):
                    split.read(index)  # which names what is missing or damaged
                    if progress is not None and self.accelerator.is_main_process:
                        progress(role, done, len(share))
        return ()

    def train_loader(self, model: nn.Module) -> DataLoader[Any]:
        recipe = self.recipe
        dataset: Any = SeededDataset(Samples(self.splits["train"], recipe.augment.splice), recipe.run.seed)
        return DataLoader(
            dataset,
            recipe.run.batch_size // recipe.run.accumulation,
            shuffle=True,
            collate_fn=collate,
            num_workers=recipe.data.workers,
            pin_memory=torch.cuda.is_available() and recipe.run.device != "cpu",
            drop_last=True,
        )

    def eval_loaders(self, model: nn.Module) -> list[DataLoader[Any]]:
        return []  # each process answers its own share of the queries

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(self.recipe.optimizer, model)

    def prepare_model(self, model: nn.Module) -> Any:
        return self.accelerator.prepare(model)

    def backward(self, epoch: int, update: int, batches: list[Any]) -> Tensor:
        losses = []
        for index, batch in enumerate(batches):
            # Seeds of their own for each pass: dropout needs no states in the checkpoints.
            step = update * len(batches) + index
            seed_everything(self.recipe.run.seed, epoch, step, self.accelerator.process_index, 1)
            with self.accelerator.no_sync(self.model) if index + 1 < len(batches) else nullcontext():
                with self.accelerator.autocast():
                    found = self.model(batch["video"], batch["text"], batch["video_mask"], batch["text_mask"])
                parts = moment_losses(found, _targets(batch), self.recipe.loss)
                loss = torch.stack(list(parts.values())).sum() / len(batches)
                self.accelerator.backward(loss)
            losses.append(loss.detach())
        return self.accelerator.reduce(torch.stack(losses).sum(), "mean")

    def evaluate(self) -> dict[str, float]:
        self.metrics = self._score("validation")
        brief = self.metrics["brief"]
        return {f"eval_{name}": brief[key] for key, name in _WATCHED.items() if key in brief}

    def finish(self, command: str | None) -> TrainResult:
        folder, main = self.checkpoints.output / "model", self.accelerator.is_main_process
        if main:
            save_pretrained(self.evaluated_model, folder)
        self.accelerator.wait_for_everyone()
        if self.metrics is None:  # the run was complete before it was resumed
            self.evaluate()
        scores: dict[str, Any] = {self.splits["validation"].split: self.metrics}
        if "test" in self.splits:
            scores[self.splits["test"].split] = self._score("test")
        report = None
        if self.recipe.run.report:
            report = self.checkpoints.output / "report" / "report.md"
            if main:
                facts = self.facts(command) | {"training_queries": len(self.splits["train"])}
                write_score_report(report.parent, facts, scores, moment_table(scores), self.history, _CURVE)
        return self.result(folder, scores, report)

    def _score(self, role: str) -> dict[str, Any]:
        accelerator, split = self.accelerator, self.splits[role]
        own = range(accelerator.process_index, len(split), accelerator.num_processes)
        with accelerator.autocast():
            predictions = submission(
                self.evaluated_model, split, own, batch_size=self.recipe.run.batch_size, device=accelerator.device,
                workers=self.recipe.data.workers,
            )  # fmt: skip
        if accelerator.num_processes > 1:
            predictions = gather_object(predictions)
        return moment_metrics(predictions, self.truth[role])


def _targets(batch: Mapping[str, Tensor]) -> MomentTargets:
    spans = tuple(row[:count] for row, count in zip(batch["spans"], batch["moments"].tolist(), strict=True))
    return MomentTargets(spans, batch["better"], batch["worse"], batch["grades"], batch["video_mask"])
