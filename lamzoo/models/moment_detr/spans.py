"""Time spans as (centre, width) or (start, end), and their overlaps, computed as torchvision boxes of height 1."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import box_iou, generalized_box_iou


def to_edges(spans: Tensor) -> Tensor:
    """Converts ``(..., 2)``, centre and width, to start and end."""
    centre, width = spans.unbind(-1)
    return torch.stack([centre - width / 2, centre + width / 2], dim=-1)


def to_centres(spans: Tensor) -> Tensor:
    """Converts ``(..., 2)``, start and end, to centre and width."""
    start, end = spans.unbind(-1)
    return torch.stack([(start + end) / 2, end - start], dim=-1)


def span_iou(spans: Tensor, others: Tensor) -> Tensor:
    """Returns the intersection over union of spans ``(N, 2)`` and ``(M, 2)``, start and end: ``(N, M)``."""
    return box_iou(to_boxes(spans), to_boxes(others))


def generalized_span_iou(spans: Tensor, others: Tensor) -> Tensor:
    """Returns the generalised intersection over union (arXiv 1902.09630), -1 to 1, of spans as for :func:`span_iou`."""
    return generalized_box_iou(to_boxes(spans), to_boxes(others))


def to_boxes(spans: Tensor) -> Tensor:
    """Converts ``(..., 2)``, start and end, to torchvision boxes, ``(..., 4)``."""
    start, end = spans.unbind(-1)
    return torch.stack([start, torch.zeros_like(start), end, torch.ones_like(end)], dim=-1)
