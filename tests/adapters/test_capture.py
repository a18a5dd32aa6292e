"""capture_masks shows what every layer did, and leaves the model as it was."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lamzoo.adapters import add_lam, capture_masks
from lamzoo.errors import UnsupportedHostError
from lamzoo.lam import Lam, LamConfig
from tests.adapters.timm_hosts import FEW, HOSTS, Host

few_hosts = pytest.mark.parametrize("host", [HOSTS[name] for name in FEW], ids=FEW)
VIT = HOSTS["vit_tiny_patch16_224"]


def recorders(model: torch.nn.Module) -> list[object]:
    return [module.recorder for module in model.modules() if isinstance(module, Lam)]


@few_hosts
@pytest.mark.parametrize("layers", ["multi", "single"])
def test_mask_attention_and_importance_of_each_layer(host: Host, layers: str) -> None:
    model, x = add_lam(host.create().eval(), LamConfig(layers=layers, init="paper", heads="per-head")), host.images()
    expected = model(x)
    with capture_masks(model) as masks:
        assert not masks
        assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert list(masks) == [f"blocks.{i}.attn" for i in range(len(model.blocks))]
    for path, record in masks.items():
        heads = model.get_submodule(path).num_heads
        tokens = record.attention.shape[-1]
        assert record.attention.shape == record.mask.dense().shape == (2, heads, tokens, tokens)
        assert_close(record.attention.sum(-1), torch.ones(2, heads, tokens))
        assert_close(record.importance, record.mask.dense().mean(dim=2), rtol=1e-4, atol=1e-5)
        assert not any(tensor.requires_grad for tensor in (*record.mask, record.attention, record.importance))
    first, second = (record.mask.dense() for record in list(masks.values())[:2])
    assert torch.equal(first, second) == (layers == "single")


def test_importance_is_over_the_queries_that_are_not_padding() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = add_lam(nn.TransformerEncoder(layer, 1), LamConfig(init="paper")).eval()
    tokens = torch.randn(2, 9, 16)
    padding = torch.tensor([[False] * 5 + [True] * 4, [False] * 9])
    with capture_masks(model) as masks:
        model(tokens[:1, :5])
        (alone,) = (record.importance for record in masks.values())
        model(tokens, src_key_padding_mask=padding)
        (together,) = (record.importance for record in masks.values())
    assert_close(together[:1, :, :5], alone)


def test_capture_ends_with_its_context_also_after_an_exception() -> None:
    model, x = add_lam(VIT.create().eval()), VIT.images()
    with pytest.raises(ZeroDivisionError), capture_masks(model) as masks:  # noqa: PT012
        model(x)
        raise ZeroDivisionError
    assert recorders(model) == [None, None]
    before = dict(masks)
    model(x)
    assert dict(masks) == before


def test_captures_can_be_nested_and_repeated() -> None:
    model, x = add_lam(VIT.create().eval(), LamConfig(init="paper")), VIT.images()
    with capture_masks(model) as outer:
        with capture_masks(model) as inner:
            model(x)
        assert list(inner) == list(outer) == ["blocks.0.attn", "blocks.1.attn"]
        model(VIT.images())
    assert not torch.equal(outer["blocks.0.attn"].attention, inner["blocks.0.attn"].attention)
    with capture_masks(model) as again:
        model(x)
    assert torch.equal(again["blocks.0.attn"].attention, inner["blocks.0.attn"].attention)
    assert recorders(model) == [None, None]


def test_captures_may_end_in_any_order() -> None:
    model = add_lam(VIT.create().eval(), LamConfig(init="paper"))
    contexts = [capture_masks(model) for _ in range(3)]
    first, second, third = [context.__enter__() for context in contexts]
    contexts[1].__exit__(None, None, None)
    contexts[0].__exit__(None, None, None)
    model(VIT.images())
    assert (len(first), len(second), len(third)) == (0, 0, 2)
    contexts[2].__exit__(None, None, None)
    assert recorders(model) == [None, None]


def test_gradients_flow_while_masks_are_captured() -> None:
    model = add_lam(VIT.create(), LamConfig(init="paper"))
    with capture_masks(model):
        model(VIT.images()).sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if ".lam." in name)


def test_a_model_without_masks_is_told_so() -> None:
    with pytest.raises(UnsupportedHostError, match="add_lam"), capture_masks(VIT.create()):
        pass
