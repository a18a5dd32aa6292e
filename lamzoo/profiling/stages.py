"""The two stages of retrieval with a tight head as models of their own, for measurement."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def first_stage(model: Any) -> Any:
    """Changes a model with ``similarity="tight"`` in place to its first stage: ``"mean"`` on the same towers."""
    from lamzoo.models.clip4clip.heads import MeanHead

    model.head = MeanHead()
    model.similarity_type, model.words, model.patch_grid = "mean", False, 0
    return model


class TwoStages(nn.Module):
    """Work for one video and one text: encoding both, comparing the embeddings, and matching the text with candidates.

    Args:
        model: a model of the family ``lam_clip4clip`` with ``similarity="tight"``.
        candidates: number of videos that the joint transformer compares with each text.
    """

    def __init__(self, model: Any, candidates: int) -> None:
        super().__init__()
        self.model = model
        self.candidates = candidates
        self.image_size = model.image_size

    def forward(self, frames: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Returns similarities of the embeddings ``(B, B)`` and logits ``(B * candidates,)``.

        Args:
            frames: ``(B, F, 3, H, W)``.
            text: ``(B, context_length)``; each is matched with its own video, as often as there are candidates.
        """
        video, words = self.model.encode_video(frames), self.model.encode_text(text)
        every = (each.repeat_interleave(self.candidates, dim=0) for each in (words, video))
        return self.model.dual_similarity(words, video), self.model.match(*every)

    def example_inputs(self, batch_size: int = 1) -> tuple[Tensor, Tensor]:
        """Returns those of the model."""
        inputs: tuple[Tensor, Tensor] = self.model.example_inputs(batch_size)
        return inputs
