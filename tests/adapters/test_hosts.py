"""A host library is one adapter and one entry in the list; everything else finds it there."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from torch import nn

import lamzoo
from lamzoo.adapters import add_lam, add_lam_to, lam_state_dict, remove_lam
from lamzoo.adapters.hosts import ADAPTERS, TokenLayout, adapters_of, token_layout
from lamzoo.errors import UnsupportedHostError
from lamzoo.lam import Lam, LamConfig
from lamzoo.layers.attention import HeadAttention
from tests.adapters.timm_hosts import HOSTS
from tests.adapters.toy_host import ToyAttention, ToyModel, inputs

VIT = HOSTS["vit_tiny_patch16_224"]


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ADAPTERS, "tests", "tests.adapters.toy_host:ToyAdapter")


@pytest.mark.usefixtures("registered")
def test_one_entry_in_the_list_supports_a_library() -> None:
    model, x = ToyModel(), inputs()
    expected, keys = model(x), list(model.state_dict())
    add_lam(model)
    torch.testing.assert_close(model(x), expected)
    assert [key for key in model.state_dict() if ".lam." not in key] == keys
    assert all(type(module) is ToyAttention for path, module in model.named_modules() if path.endswith(".attn"))
    add_lam(remove_lam(model), LamConfig(init="paper"))
    assert not torch.allclose(model(x), expected)
    assert set(lam_state_dict(model)) == {key for key in model.state_dict() if ".lam." in key}
    remove_lam(model)
    assert list(model.state_dict()) == keys
    assert torch.equal(model(x), expected)


def test_without_its_entry_a_library_is_unknown() -> None:
    with pytest.raises(UnsupportedHostError, match=r"tests\.adapters\.toy_host\.ToyModel\) has no attention layer"):
        add_lam(ToyModel())


@pytest.mark.usefixtures("registered")
def test_hosts_of_several_libraries_are_masked_and_restored_in_one_model() -> None:
    model = nn.ModuleDict({"toy": ToyModel(), "vit": VIT.create(), "layer": nn.TransformerEncoderLayer(8, 2, 8)})
    classes = [type(module) for module in model.modules()]
    add_lam(model)
    assert len([module for module in model.modules() if isinstance(module, Lam)]) == 2 + 2 + 1
    assert [type(module) for module in remove_lam(model).modules()] == classes


def test_adapters_are_those_of_the_libraries_in_the_model_with_or_without_masks() -> None:
    model = VIT.create()
    assert list(adapters_of(model)) == ["timm", "torch"]
    add_lam(model)
    assert list(adapters_of(nn.ModuleList([model.blocks[0].attn]))) == ["timm", "torch", "lamzoo"]


def test_a_token_layout_is_the_same_with_and_without_masks() -> None:
    model = HOSTS["vit_small_patch14_reg4_dinov2"].create()
    plain = token_layout(model, "blocks.1.attn")
    masked = token_layout(add_lam(model), "blocks.1.attn")
    assert (masked.length, masked.num_prefix_tokens, masked.grid) == (21, 5, (4, 4))
    assert masked.pooling == plain.pooling
    assert masked.grid_at is not None
    assert masked.grid_at((28, 56)) == (4, 8)
    assert token_layout(nn.TransformerEncoderLayer(8, 2, 8), "self_attn") == TokenLayout()


def test_masks_in_parts_of_a_model_have_the_lengths_that_are_given() -> None:
    model = nn.ModuleDict({"one": nn.TransformerEncoderLayer(8, 2, 8), "two": VIT.create()})
    config = LamConfig(keys="position")
    assert add_lam_to(model, {"one": 7, "two": None}, config) is model
    assert model.lam_config == config
    assert not hasattr(model["one"], "lam_config")
    tables = {path: lam.network.table.weight.shape[1] for path, lam in model.named_modules() if isinstance(lam, Lam)}
    assert tables == {"one.self_attn.lam": 7, "two.blocks.0.attn.lam": 17, "two.blocks.1.attn.lam": 17}
    assert any("table" in name for name in model.no_weight_decay())


def test_a_layer_that_would_still_run_its_earlier_forward_is_refused() -> None:
    merge = functools.partial(lamzoo.merge_tokens, keep=0.5)
    model, images = VIT.create(), torch.randn(1, 3, 32, 32)
    layer = model.blocks[1].attn
    classes = [type(module) for module in model.modules()]

    def check(change: Callable[[nn.Module], object]) -> None:
        with pytest.raises(UnsupportedHostError, match=r"blocks\.1\.attn \(.*\) can't be replaced, because"):
            change(model)
        assert [type(module) for module in model.modules()] == classes

    layer.forward = functools.partial(type(layer).forward, layer)
    for change in (add_lam, merge):
        check(change)
    del layer.forward
    layer.compile()
    for change in (add_lam, merge):
        check(change)
    model = add_lam(copy.deepcopy(model), LamConfig(init="paper"))
    masked = model(images)
    classes = [type(module) for module in model.modules()]
    model.blocks[1].attn.forward = functools.partial(type(model.blocks[1].attn).forward, model.blocks[1].attn)
    check(remove_lam)
    assert torch.equal(model(images), masked)
    del model.blocks[1].attn.forward
    remove_lam(model)
    merge(model)
    classes = [type(module) for module in model.modules()]
    model.blocks[1].attn.compile()
    for change in (lamzoo.remove_reduction, merge):
        check(change)


def test_a_model_that_is_the_attention_layer_is_refused() -> None:
    with pytest.raises(UnsupportedHostError, match=r"The model \(.*HeadAttention\) can't be replaced in place"):
        add_lam(HeadAttention(8, 2, 8, 8, 0.0))


@pytest.mark.parametrize("name", ["timm", "torch", "lamzoo"])
def test_a_quantised_layer_is_refused_by_name(name: str) -> None:
    hosts = {
        "timm": (VIT.create(), r"blocks\.0\.attn"),
        "torch": (nn.TransformerEncoderLayer(8, 2, 8), "self_attn"),
        "lamzoo": (nn.Sequential(HeadAttention(8, 2, 8, 8, 0.0)), "0"),
    }
    model, path = hosts[name]
    for module in model.get_submodule(path.replace("\\", "")).modules():
        for key, parameter in list(module.named_parameters(recurse=False)):  # as in 8 bits
            setattr(module, key, nn.Parameter(parameter.to(torch.int8), requires_grad=False))
    with pytest.raises(UnsupportedHostError, match=rf"^{path} \(.*\) can't .*because it is quantised"):
        add_lam(model)


@pytest.mark.parametrize("training", [False, True])
def test_padding_of_a_sample_without_keys_changes_nothing_in_layers_of_the_zoo(training: bool) -> None:
    layer, allowed = HeadAttention(8, 2, 8, 8, 0.0).train(training), torch.tensor([[True, False], [False, False]])
    query, key, value = torch.randn(3, 2, 2, 8)
    plain = layer(query, key, value, query, key, allowed)
    torch.testing.assert_close(plain[1], layer.out_proj.bias.expand(2, -1))
    masked = add_lam(nn.Sequential(layer))[0]
    torch.testing.assert_close(masked(query, key, value, query, key, allowed), plain)
