"""FLOPs of lamzoo's own operators, for ``torch.utils.flop_counter.FlopCounterMode``."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

_FORWARD = ("lam_attention_forward", "chunked_attention")
_BACKWARD = ("lam_attention_backward", "chunked_attention_backward")


def forward_flops(query: Any, key: Any, value: Any, left: Any, *args: Any, **kwargs: Any) -> int:
    """FLOPs of a forward pass from the shapes of its inputs; a multiply-add counts as two, masking isn't deducted."""
    return 2 * _scores(query, key) * (query[-1] + value[-1] + left[-1])


def backward_flops(grad_out: Any, query: Any, key: Any, value: Any, left: Any, *args: Any, **kwargs: Any) -> int:
    """FLOPs of a backward pass: scores and mask again, then five gradients and that of the weights."""
    return 2 * _scores(query, key) * (3 * query[-1] + 2 * value[-1] + 3 * left[-1])


def count_flops() -> None:
    """Registers the operators with ``FlopCounterMode``, including counters that are already running.

    Called with each call of an operator rather than at import, because torch's counter imports triton, or warns if it
    is missing. Does nothing until the counter has been imported.
    """
    if torch.compiler.is_compiling() or (module := sys.modules.get("torch.utils.flop_counter")) is None:
        return
    operators = {
        getattr(torch.ops.lamzoo, name): formula
        for names, formula in ((_FORWARD, forward_flops), (_BACKWARD, backward_flops))
        for name in names
    }
    for operator, formula in operators.items():
        if operator not in module.flop_registry:
            module.register_flop_formula(operator)(formula)
    for mode in _get_current_dispatch_mode_stack():
        counter = getattr(mode, "counter", None)
        if isinstance(counter, module.FlopCounterMode):  # it copied the registry when it was made
            for operator in operators:
                counter.flop_registry.setdefault(operator, module.flop_registry[operator])


def _scores(query: Any, key: Any) -> int:
    return int(query[0] * query[1] * query[2] * key[2])
