"""Models of Hugging Face transformers, which are refused by name: their attention can't carry a mask yet.

Without this adapter, only the few ``nn.MultiheadAttention`` in them, such as SigLIP's pooling head, would be masked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import nn

from lamzoo.adapters.hosts import AttentionSite, HostTakeover, TakeoverAdapter
from lamzoo.errors import UnsupportedHostError, class_name

_MODEL = "transformers.modeling_utils.PreTrainedModel"


class TransformersAdapter(TakeoverAdapter):
    """Refuses models of transformers; its wrappers around timm models have no attention of their own and pass."""

    owns_multihead_attention = True
    takeovers: ClassVar[Mapping[type[nn.Module], type[HostTakeover]]] = {}

    def sites(self, model: nn.Module) -> tuple[AttentionSite, ...]:
        """Returns no sites.

        Raises:
            UnsupportedHostError: the model is, or contains, a model of transformers, or a part of one that has
                attention; names it.
        """
        for path, module in model.named_modules():
            classes = [class_name(cls) for cls in type(module).__mro__]
            if not any(name.startswith("transformers.") for name in classes):
                continue
            attends = any(isinstance(child, nn.MultiheadAttention) for child in module.children())
            wraps_timm = classes[0].startswith("transformers.models.timm_")
            if attends or (_MODEL in classes and not wraps_timm):
                raise UnsupportedHostError(
                    f"{path or 'The model'} ({classes[0]}) belongs to Hugging Face transformers, whose attention can't "
                    "carry a learnable mask; give add_lam a part of the model without it, or a model of timm or "
                    "open_clip."
                )
        return ()
