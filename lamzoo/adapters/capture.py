"""Recording masks and attention while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

from torch import nn

from lamzoo.adapters.state import masks_of
from lamzoo.lam import MaskRecord


@contextmanager
def capture_masks(model: nn.Module) -> Iterator[Mapping[str, MaskRecord]]:
    """Records mask, attention and importance of each layer while the context is open.

    Meanwhile the model uses the eager backend, since fused attention returns no weights; its own backend is restored
    on exit, also after an exception. Several contexts may be open, and each records the forward passes of all threads.

    Args:
        model: a model with masks, or a wrapper around one.

    Yields:
        The :class:`~lamzoo.lam.MaskRecord` of the last forward pass by layer, such as ``"blocks.3.attn"``, in the order
        in which the layers first ran; empty until the model runs.

    Raises:
        UnsupportedHostError: the model has no masks.
    """
    records: dict[str, MaskRecord] = {}
    masks = masks_of(model)
    for path, lam in masks.items():
        lam.recorder = _Recorder(records, path.removesuffix(".lam"), lam.recorder)
    try:
        yield MappingProxyType(records)
    finally:
        for lam in masks.values():
            lam.recorder = _without(lam.recorder, records)


class _Recorder:
    """Keeps the last record of one layer, and passes it on to the recorder of an outer context."""

    def __init__(self, records: dict[str, MaskRecord], path: str, outer: Callable[[MaskRecord], None] | None) -> None:
        self.records, self.path, self.outer = records, path, outer

    def __call__(self, record: MaskRecord) -> None:
        self.records[self.path] = record
        if self.outer is not None:
            self.outer(record)


def _without(
    recorder: Callable[[MaskRecord], None] | None, records: dict[str, MaskRecord]
) -> Callable[[MaskRecord], None] | None:
    """Returns a recorder without the one of a context that ends, which may be an outer one of it."""
    if not isinstance(recorder, _Recorder):
        return recorder
    if recorder.records is records:
        return recorder.outer
    recorder.outer = _without(recorder.outer, records)
    return recorder
