"""A host library of one attention layer, and its adapter, which adds the mask by a hook and replaces nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lamzoo.adapters.hosts import AttentionSite, Pooling, TokenLayout
from lamzoo.lam import Lam


class ToyBlock(nn.Module):
    """Self-attention with one head, whose class the library doesn't want replaced."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = ToyAttention(width)

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + self.attn(tokens)


class ToyAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        scores = self.query(tokens) @ self.key(tokens).mT
        return (scores if mask is None else scores + mask).softmax(dim=-1) @ tokens


class ToyModel(nn.Module):
    def __init__(self, width: int = 8, depth: int = 2) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(ToyBlock(width) for _ in range(depth)))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.blocks(tokens).mean(dim=1)


class Feed:
    """Forward pre-hook of an attention layer: computes the mask and passes it on."""

    def __call__(self, attn: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        return args[0], attn.lam(args[0], args[0]).dense().squeeze(1)


class ToyAdapter:
    owns_multihead_attention: ClassVar[bool] = False

    def sites(self, model: nn.Module) -> Iterator[AttentionSite]:
        for path, module in model.named_modules():
            if isinstance(module, ToyAttention):
                width = module.query.in_features
                stack = path.rsplit(".", 2)[0]
                yield AttentionSite(path, stack, width, width, 1)

    def token_layout(self, model: nn.Module, path: str) -> TokenLayout | None:
        if not isinstance(model.get_submodule(path), ToyAttention):
            return None
        blocks = path.rsplit(".", 2)[0]
        root = blocks.rpartition(".")[0]
        pooling = Pooling(blocks, root, "avg", has_class_token=False, num_unpooled=0, last=model.get_submodule(blocks))
        return TokenLayout(pooling=pooling)

    def wrap(self, model: nn.Module, lams: Mapping[AttentionSite, Lam]) -> None:
        for site, lam in lams.items():
            attn: Any = model.get_submodule(site.path)
            attn.lam = lam
            attn.register_forward_pre_hook(Feed())

    def stacks(self, model: nn.Module) -> Iterator[TokenLayout]:
        return iter(())

    def unwrap(self, model: nn.Module, kind: type[nn.Module] | None = None) -> None:
        for attn in model.modules():
            if isinstance(attn, ToyAttention) and "lam" in attn._modules:
                del attn.lam
                for key in [key for key, hook in attn._forward_pre_hooks.items() if isinstance(hook, Feed)]:
                    del attn._forward_pre_hooks[key]


def inputs() -> Tensor:
    return torch.randn(2, 6, 8)
