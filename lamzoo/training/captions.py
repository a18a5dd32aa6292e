"""Training of description: what a run does with clips and what people wrote about them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lamzoo.data.captions import create_caption_dataset
from lamzoo.errors import RecipeError
from lamzoo.evaluation.describing import caption_scores, check_streams, describe_clips
from lamzoo.lam import LamConfig
from lamzoo.registry import create_model
from lamzoo.training.build import build_optimizer
from lamzoo.training.caption_batches import Collate, Samples, caption_losses
from lamzoo.training.caption_recipe import CaptionRecipe
from lamzoo.training.inputs import BadInputs, ScanProgress
from lamzoo.training.loaders import SeededDataset, seed_everything
from lamzoo.training.run import TrainingRun, TrainResult
from lamzoo.training.score_report import caption_table, write_score_report
from lamzoo.weights import save_pretrained

_CURVE = ("eval_WER", "word error rate, validation (%)")
_WATCHED = ("WER", "sentence_accuracy", "CIDEr", "Bleu_4", "ROUGE_L")


class CaptionRun(TrainingRun):
    """One run of a describer; arguments as of :class:`TrainingRun`."""

    metric = "WER"
    recipe: CaptionRecipe
    metrics: Mapping[str, float] | None = None

    def open_data(self) -> None:
        data = self.recipe.data
        roles = {"train": data.train_split, "validation": data.eval_split, "test": data.test_split}
        self.splits = {
            role: create_caption_dataset(data.source, split) for role, split in roles.items() if split is not None
        }
        train = self.splits["train"]
        for role, split in self.splits.items():
            common = split.references().keys() & train.references().keys()
            if role != "train" and common:
                raise RecipeError(
                    f"{len(common)} clips of {data.source} would be trained and scored on, such as {min(common)!r}, in "
                    f"{train.split} and {split.split}; name other splits in data.train_split and data.eval_split."
                )
        if len(train) < self.recipe.run.batch_size:
            raise RecipeError(
                f"run.batch_size asks for batches of {self.recipe.run.batch_size} clips and {data.source} has "
                f"{len(train)} in {train.split}; use a smaller batch."
            )
        if self.recipe.augment.splice:
            train.splice()  # which says where the data can't

    def build_model(self) -> nn.Module:
        section = self.recipe.model
        kwargs = dict(section.kwargs)
        if ":" not in section.name and not section.pretrained:
            kwargs = {"features": dict(self.splits["train"].modalities), **kwargs}
        if section.lam is not None:
            kwargs["lam"] = LamConfig.from_dict(section.lam)
        model: Any = create_model(section.name, pretrained=section.pretrained, **kwargs)
        check_streams(model, self.splits["train"].modalities)
        if self.recipe.data.context and not model.context_tokens:
            raise RecipeError(
                f"data.context asks for {self.recipe.data.context} earlier captions and {section.name} has no room for "
                "any; set context_tokens in model.kwargs."
            )
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
        samples = Samples(self.splits["train"], recipe.augment.splice, recipe.data.context)
        dataset: Any = SeededDataset(samples, recipe.run.seed)
        return DataLoader(
            dataset,
            recipe.run.batch_size // recipe.run.accumulation,
            shuffle=True,
            collate_fn=Collate(model),
            num_workers=recipe.data.workers,
            pin_memory=torch.cuda.is_available() and recipe.run.device != "cpu",
            drop_last=True,
        )

    def eval_loaders(self, model: nn.Module) -> list[DataLoader[Any]]:
        return []  # each process describes its own share of the clips

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
                    found = self.model(batch["streams"], batch["text"], batch.get("context"))
                parts = caption_losses(found, batch, self.recipe.loss)
                loss = torch.stack(list(parts.values())).sum() / len(batches)
                self.accelerator.backward(loss)
            losses.append(loss.detach())
        return self.accelerator.reduce(torch.stack(losses).sum(), "mean")

    def evaluate(self) -> dict[str, float]:
        self.metrics = self._score("validation")
        return {f"eval_{name}": self.metrics[name] for name in _WATCHED}

    def finish(self, command: str | None) -> TrainResult:
        folder, main = self.checkpoints.output / "model", self.accelerator.is_main_process
        if main:
            save_pretrained(self.evaluated_model, folder)
        self.accelerator.wait_for_everyone()
        if self.metrics is None:  # the run was complete before it was resumed
            self.evaluate()
        scores: dict[str, Any] = {str(self.splits["validation"].split): self.metrics}
        if "test" in self.splits:
            scores[str(self.splits["test"].split)] = self._score("test")
        report = None
        if self.recipe.run.report:
            report = self.checkpoints.output / "report" / "report.md"
            if main:
                facts = self.facts(command) | {"training_clips": len(self.splits["train"])}
                write_score_report(report.parent, facts, scores, caption_table(scores), self.history, _CURVE)
        return self.result(folder, scores, report)

    def _score(self, role: str) -> dict[str, float]:
        accelerator, split = self.accelerator, self.splits[role]
        own = range(accelerator.process_index, len(split), accelerator.num_processes)
        with accelerator.autocast():
            captions = describe_clips(
                self.evaluated_model, split, own, context=self.recipe.data.context,
                batch_size=self.recipe.run.batch_size, device=accelerator.device, workers=self.recipe.data.workers,
            )  # fmt: skip
        if accelerator.num_processes > 1:
            captions = dict(gather_object(list(captions.items())))
        return caption_scores(split, captions)
