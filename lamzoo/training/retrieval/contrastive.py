"""Contrastive loss over a batch split over forward passes and processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F

from lamzoo.training.gradients import average_gradients


def contrastive_loss(similarity: Tensor, positives: Tensor | None = None) -> Tensor:
    """Symmetric cross-entropy of ``(B, B)`` similarities with matching pairs on the diagonal (arXiv 2104.08860, eq. 8).

    Args:
        similarity: similarities of texts (rows) and videos (columns).
        positives: ``(B, B)``, bool, symmetric: all matching pairs, including the diagonal; the pairs of a row share one
            target (as in arXiv 2204.03610, equation 3).
    """
    if positives is None:
        labels = torch.arange(len(similarity), device=similarity.device)
    else:
        labels = F.normalize(positives.to(similarity.dtype), p=1, dim=1)
    return (F.cross_entropy(similarity, labels) + F.cross_entropy(similarity.T, labels)) / 2


def contrastive_backward(
    accelerator: Accelerator,
    model: Any,
    batches: Sequence[Any],
    encode: Callable[[int, Any], tuple[Tensor, Tensor]],
    frame_masks: Sequence[Tensor],
    captions: Sequence[Tensor] | None = None,
    loss_of: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor] | None = None,
) -> Tensor:
    """Accumulates the gradients of the loss over all pairs of all batches on all processes; returns the loss.

    The gradient equals that of one large batch in one process: first all embeddings are computed, then the loss and its
    gradient with respect to them, and finally each batch passes through the towers again ("gradient cache", arXiv
    2101.06983). With a single batch, nothing is computed twice. Batches of all processes must have the same shape.

    Args:
        accelerator: defines processes and precision.
        model: the unwrapped model with ``similarity(text, video, frame_mask)``; its gradients are averaged over
            processes.
        batches: inputs of ``encode``.
        encode: returns text and video embeddings of batch ``i``; must be deterministic across calls.
        frame_masks: frame mask of each batch, ``(B, F)``, bool.
        captions: tokens of each batch, ``(B, L)``: videos with equal captions are positives for both. None treats every
            other video as a negative, as CLIP4Clip does.
        loss_of: the loss of text embeddings, video embeddings, their frame mask and the positives of
            :func:`contrastive_loss`, of the global batch; by default the contrastive loss of ``model.similarity``. Must
            be deterministic across processes.

    Returns:
        The loss, a scalar, equal on all processes.
    """
    once = len(batches) == 1
    texts, videos = [], []
    for index, batch in enumerate(batches):
        with nullcontext() if once else torch.no_grad():
            text, video = encode(index, batch)
        texts.append(text)
        videos.append(video)
    text_leaf = torch.cat(texts).detach().requires_grad_()
    video_leaf = torch.cat(videos).detach().requires_grad_()
    mask = _gathered(accelerator, torch.cat(list(frame_masks)), len(batches))
    positives = None
    if captions is not None:
        tokens = _gathered(accelerator, torch.cat(list(captions)), len(batches))
        positives = (tokens[:, None] == tokens).all(-1)
    text, video = (_gathered(accelerator, leaf, len(batches)) for leaf in (text_leaf, video_leaf))
    with accelerator.autocast():
        if loss_of is None:
            loss = contrastive_loss(model.similarity(text, video, mask).float(), positives)
        else:
            loss = loss_of(text, video, mask, positives)
    accelerator.backward(loss)
    # Each process has the gradient of the whole loss for its own embeddings; scale to offset the mean below.
    text_grads = (text_leaf.grad * accelerator.num_processes).split([len(text) for text in texts])
    video_grads = (video_leaf.grad * accelerator.num_processes).split([len(video) for video in videos])
    for index, batch in enumerate(batches):
        outputs = (texts[index], videos[index]) if once else encode(index, batch)
        pairs = zip(outputs, (text_grads[index], video_grads[index]), strict=True)
        trained = [(output, grad) for output, grad in pairs if output.requires_grad]  # a tower may be frozen
        torch.autograd.backward([output for output, _ in trained], [grad for _, grad in trained])
    average_gradients(accelerator, model)
    return loss.detach()


def _gathered(accelerator: Accelerator, own: Tensor, batches: int) -> Tensor:
    """Gathers a tensor of all processes in the order of the data; gradients flow to this process's own part.

    In each round, every process takes one batch.
    """
    if accelerator.num_processes == 1:
        return own
    parts = list(accelerator.gather(own.detach()).split(len(own)))
    parts[accelerator.process_index] = own
    return torch.stack([part.unflatten(0, (batches, -1)) for part in parts], dim=1).flatten(0, 2)
