"""Training runs of moment retrieval and highlight detection."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from accelerate.utils import gather_object
from torch import Tensor, nn

from lamzoo.data.moments import MomentDataset
from lamzoo.errors import RecipeError
from lamzoo.evaluation.moments.evaluate import check_features, submission
from lamzoo.evaluation.moments.metrics import check_grades, moment_metrics
from lamzoo.registry.factory import create_model
from lamzoo.training.feature_run import FeatureRun
from lamzoo.training.moments.batches import Samples, collate, with_unrelated
from lamzoo.training.moments.losses import MomentTargets, moment_counts, moment_losses
from lamzoo.training.moments.recipe import MomentRecipe

_logger = logging.getLogger(__name__)

_READ = ("video", "text", "video_mask", "text_mask")


class MomentRun(FeatureRun):
    """A training run of a moment model; arguments as of :class:`TrainingRun`."""

    recipe: MomentRecipe

    def names(self, split: MomentDataset) -> set[int | str]:
        return {query.qid for query in split.queries}

    def open_data(self) -> None:
        super().open_data()
        self.truth = {role: split.annotations() for role, split in self.splits.items()}
        for role in self.truth.keys() - {"train"}:
            check_grades(self.truth[role])  # otherwise detected only after the first epoch
        self.example = self.splits["train"].read(0)

    def build_model(self) -> nn.Module:
        section = self.recipe.model
        kwargs = section.arguments()
        if self.fits_model_to_data:
            video, text = self.example.video.shape[1], self.example.text.shape[1]
            words = len(self.splits["train"].vocabulary)
            kwargs = {"video_dim": video, "text_dim": text, "words": words, **kwargs}
        model: Any = create_model(section.name, pretrained=section.pretrained, **kwargs)
        check_features(model, self.example)
        self._check_words(model)
        # A batch of one has no other sentence for a negative pair.
        self.reads_unrelated = model.reads_unrelated and self.recipe.run.batch_size > 1
        if model.reads_unrelated and not self.reads_unrelated:
            _logger.warning(
                "run.batch_size is 1, so %s is trained without negative sentences (its losses negative and contrast); "
                "use a larger batch, which run.accumulation may split",
                section.name,
            )
        return model

    def _check_words(self, model: nn.Module) -> None:
        head, known = getattr(model, "word_head", None), len(self.splits["train"].vocabulary)
        if head is not None and known and head.out_features != known + 1:
            raise RecipeError(
                f"{self.recipe.model.name} classifies {head.out_features - 1} words, but {self.recipe.data.source} has "
                f"the times of {known}; set model.kwargs.words to {known}."
            )

    def samples(self) -> Samples:
        return Samples(self.splits["train"], self.recipe.augment.splice)

    def collate(self, model: nn.Module) -> Any:
        return collate

    def complete(self, batches: list[Any]) -> list[Any]:
        return with_unrelated(self.accelerator, batches) if self.reads_unrelated else batches

    def counts(self, batch: Any) -> Mapping[str, Tensor]:
        return moment_counts(_targets(batch), self.model.num_queries)

    def losses(self, batch: Any, counts: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        with self.accelerator.autocast():
            found = self.model(*(batch[key] for key in _READ), batch.get("unrelated"))
        return moment_losses(found, _targets(batch), self.recipe.loss, counts)

    def score(self, role: str) -> dict[str, Any]:
        accelerator = self.accelerator
        predictions = submission(
            self.evaluated_model, self.splits[role], self.share(role), batch_size=self.recipe.run.batch_size,
            device=accelerator.device, workers=self.recipe.data.workers,
        )  # fmt: skip
        if accelerator.num_processes > 1:
            predictions = gather_object(predictions)
        return moment_metrics(predictions, self.truth[role])


def _targets(batch: Mapping[str, Tensor]) -> MomentTargets:
    spans = tuple(row[:count] for row, count in zip(batch["spans"], batch["moments"].tolist(), strict=True))
    return MomentTargets(
        spans, batch["better"], batch["worse"], batch["grades"], batch["video_mask"], batch.get("words")
    )
