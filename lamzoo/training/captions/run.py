"""Training runs of captions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelerate.utils import gather_object
from torch import Tensor, nn

from lamzoo.data.captions import CaptionDataset
from lamzoo.errors import RecipeError
from lamzoo.evaluation.captions.evaluate import caption_scores, check_streams, describe_clips
from lamzoo.registry.factory import create_model
from lamzoo.training.build import reduce_by_section
from lamzoo.training.captions.batches import Collate, Samples, caption_counts, caption_losses
from lamzoo.training.captions.recipe import CaptionRecipe
from lamzoo.training.feature_run import FeatureRun


class CaptionRun(FeatureRun):
    """One run of a describer; arguments as of :class:`TrainingRun`."""

    recipe: CaptionRecipe

    def names(self, split: CaptionDataset) -> set[str]:
        return {item.id for item in split.items}

    def build_model(self) -> nn.Module:
        section = self.recipe.model
        kwargs = section.arguments()
        if self.fits_model_to_data:
            kwargs = {"features": dict(self.splits["train"].modalities), **kwargs}
        model: Any = create_model(section.name, pretrained=section.pretrained, **kwargs)
        check_streams(model, self.splits["train"].modalities)
        if self.recipe.data.context and not model.context_tokens:
            raise RecipeError(
                f"data.context is {self.recipe.data.context}, but {section.name} does not support earlier captions; "
                "set context_tokens in model.kwargs."
            )
        if self.recipe.reduction is not None:
            reduce_by_section(model, self.recipe.reduction)
        return model

    def samples(self) -> Samples:
        return Samples(self.splits["train"], self.recipe.augment.splice, self.recipe.data.context)

    def collate(self, model: nn.Module) -> Any:
        return Collate(model)

    def counts(self, batch: Any) -> Mapping[str, Tensor]:
        return caption_counts(batch)

    def losses(self, batch: Any, counts: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        with self.accelerator.autocast():
            found = self.model(batch["streams"], batch["text"], batch.get("context"))
        return caption_losses(found, batch, self.recipe.loss, counts)

    def score(self, role: str) -> dict[str, float]:
        accelerator, split = self.accelerator, self.splits[role]
        captions = describe_clips(
            self.evaluated_model, split, self.share(role), context=self.recipe.data.context,
            batch_size=self.recipe.run.batch_size, device=accelerator.device, workers=self.recipe.data.workers,
        )  # fmt: skip
        if accelerator.num_processes > 1:
            captions = dict(gather_object(list(captions.items())))
        return caption_scores(split, captions)
