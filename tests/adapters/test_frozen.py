"""Training of masks alone: a frozen host keeps its weights, and the masks get the gradients that they always get."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close

from lamzoo.adapters import add_lam
from lamzoo.lam import LamConfig, attention_backend
from tests.adapters.staged_hosts import STAGED
from tests.adapters.timm_hosts import HOSTS, Host

CHOSEN: dict[str, Host] = {
    name: {**HOSTS, **STAGED}[name]
    for name in (
        "vit_tiny_patch16_224",
        "eva_giant_patch14_224",
        "beit_base_patch16_224",  # a bias that would be an attention mask with a gradient
        "levit_128s",
        "pvt_v2_b0",
        "cait_xxs24_224",
    )
}
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")),
]


class WatchSdpa(TorchFunctionMode):
    """Counts calls of torch's fused attention in which nothing but the attention mask requires a gradient.

    The backward pass of such a call reads invalid memory on CUDA before pytorch#188302 (pytorch#148476).
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.unsafe = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            mask: Tensor | None = args[3] if len(args) > 3 else kwargs.get("attn_mask")
            self.calls += 1
            self.unsafe += mask is not None and mask.requires_grad and not any(x.requires_grad for x in args[:3])
        return func(*args, **kwargs)


def only_masks_train(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lam." in name)
    return model


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", ["add", "mul"])
@pytest.mark.parametrize("host", CHOSEN.values(), ids=CHOSEN)
def test_masks_of_a_frozen_host_get_their_gradients_by_every_backend(host: Host, op: str, device: str) -> None:
    model = add_lam(host.create().eval(), LamConfig(op=op, rank=3, init="paper", heads="per-head")).to(device)
    x = host.images().to(device)
    with attention_backend("eager"):
        expected = {name: grad for name, grad in gradients(model, x).items() if ".lam." in name}
    only_masks_train(model)
    for backend in ("eager", "sdpa"):
        with attention_backend(backend), WatchSdpa() as watch:
            found = gradients(model, x)
        assert found.keys() == expected.keys()
        assert any(grad.any() for grad in found.values())
        for name, grad in found.items():
            assert_close(grad, expected[name], rtol=1e-3, atol=1e-5, msg=f"{backend} {name}")
        assert watch.unsafe == 0
        assert (watch.calls > 0) == (backend == "sdpa") or "cait" in host.name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layers", ["multi", "single"])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "pvt_v2_b0"])
def test_gradient_checkpointing_keeps_the_gradients_of_masks_in_a_frozen_host(
    name: str, layers: str, device: str
) -> None:
    model = only_masks_train(add_lam(CHOSEN[name].create().train(), LamConfig(layers=layers, init="paper"))).to(device)
    x = CHOSEN[name].images().to(device)
    expected = gradients(model, x)
    model.set_grad_checkpointing(True)
    found = gradients(model, x)
    assert found.keys() == expected.keys()
    for parameter, grad in found.items():
        assert_close(grad, expected[parameter], rtol=1e-4, atol=1e-6, msg=parameter)
