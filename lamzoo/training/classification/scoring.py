"""Predictions of a classifier on a whole split, gathered across processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lamzoo.profiling.inputs import evaluating


@dataclass(frozen=True)
class Score:
    """Predictions for the images of a split, in no particular order.

    Attributes:
        labels: ``(N,)``, int64, on the CPU.
        guesses: the predicted class of each image, ``(N,)``, int64.
        loss: mean cross-entropy.
        top5: top-5 accuracy in percent; None below five classes, where it is trivial.
    """

    labels: Tensor
    guesses: Tensor
    loss: float
    top5: float | None

    @property
    def samples(self) -> int:
        """Images scored."""
        return len(self.labels)

    @property
    def top1(self) -> float:
        """Top-1 accuracy in percent."""
        return 100 * float((self.labels == self.guesses).double().mean())


@torch.inference_mode()
def score(accelerator: Accelerator, model: nn.Module, loader: Any) -> Score:
    """Evaluates a classifier on a prepared loader; call on every process.

    Args:
        accelerator: defines processes, device and precision.
        model: the unwrapped model; it keeps its training or evaluation mode.
        loader: loader of images ``(B, C, H, W)`` and labels ``(B,)``.
    """
    labels, guesses, losses, hits = [], [], [], []
    with evaluating(model):
        for images, truth in loader:
            with accelerator.autocast():
                logits = model(images).float()
            logits, truth = accelerator.gather_for_metrics((logits, truth))
            order = logits.topk(min(5, logits.shape[1]), dim=1).indices
            labels.append(truth)
            guesses.append(logits.argmax(dim=1))
            losses.append(nn.functional.cross_entropy(logits, truth, reduction="sum"))
            hits.append((order == truth[:, None]).sum())
            classes = logits.shape[1]
    count = sum(map(len, labels))
    return Score(
        labels=torch.cat(labels).cpu(),
        guesses=torch.cat(guesses).cpu(),
        loss=float(torch.stack(losses).cpu().double().sum()) / count,
        top5=100 * float(torch.stack(hits).cpu().sum()) / count if classes >= 5 else None,
    )
