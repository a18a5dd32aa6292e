"""A LAM alone can be listed, saved, put back and taken out again."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lamzoo.adapters import add_lam, lam_parameters, lam_state_dict, load_lam_state_dict, remove_lam
from lamzoo.errors import StateDictError, UnsupportedHostError
from lamzoo.lam import LamConfig
from tests.adapters.timm_hosts import HOSTS, Host, params

hosts = pytest.mark.parametrize("host", params())
VIT = HOSTS["vit_tiny_patch16_224"]


def shaken(model: nn.Module) -> nn.Module:
    """The model with every mask parameter moved away from where it began."""
    with torch.no_grad():
        for parameter in lam_parameters(model):
            parameter.add_(torch.randn_like(parameter))
    return model


@hosts
def test_removing_gives_the_host_back_bitwise(host: Host) -> None:
    plain, x = host.create().eval(), host.images()
    kinds = [(path, type(module), len(module._forward_pre_hooks)) for path, module in plain.named_modules()]
    keys, expected = list(plain.state_dict()), plain(x)
    for layers in host.kinds_of_layers():
        config = LamConfig(layers=layers, keys="position" if host.positions else "content")
        model = remove_lam(shaken(add_lam(plain, config)))
        assert model is plain
        assert [(path, type(m), len(m._forward_pre_hooks)) for path, m in model.named_modules()] == kinds
        assert list(model.state_dict()) == keys
        assert not hasattr(model, "lam_config")
        assert torch.equal(model(x), expected)


def test_removing_keeps_what_the_host_learned_and_the_hooks_of_others() -> None:
    model = add_lam(VIT.create(), LamConfig(layers="single", keys="position"))
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda *_: seen.append("block"))
    model.blocks[0].attn.register_forward_hook(lambda *_: seen.append("attn"))
    model.blocks[0].attn.qkv.weight.data.fill_(0.5)
    model.eval()
    remove_lam(model)(VIT.images())
    assert seen == ["block", "attn"]
    assert (model.blocks[0].attn.qkv.weight == 0.5).all()
    assert not model.blocks[0].attn.training


def test_lam_parameters_are_those_of_the_masks_alone() -> None:
    plain = VIT.create()
    host = {id(parameter) for parameter in plain.parameters()}
    model = add_lam(plain)
    ours = list(lam_parameters(model))
    assert len(ours) == len({id(p) for p in ours}) == sum(".lam." in name for name, _ in model.named_parameters())
    assert not host & {id(parameter) for parameter in ours}


def test_a_lam_alone_can_be_trained() -> None:
    model = add_lam(VIT.create().requires_grad_(False), LamConfig(rank=3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(lam_parameters(model), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(VIT.images()).square().sum().backward()
        optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == set(lam_state_dict(model))


@pytest.mark.parametrize("layers", ["multi", "single"])
@pytest.mark.parametrize("keys", ["content", "position"])
def test_a_lam_saved_alone_can_be_put_back(layers: str, keys: str) -> None:
    plain, x = VIT.create().eval(), VIT.images()
    model = shaken(add_lam(copy.deepcopy(plain), LamConfig(layers=layers, keys=keys)))
    state = {name: value.clone() for name, value in lam_state_dict(model).items()}
    assert all(".lam." in name for name in state)
    again = add_lam(plain, LamConfig(layers=layers, keys=keys))
    assert load_lam_state_dict(again, state) == []
    assert torch.equal(again(x), model(x))


def test_a_lam_saved_by_an_older_version_can_be_put_back(caplog: pytest.LogCaptureFixture) -> None:
    model, again = shaken(add_lam(VIT.create())), add_lam(VIT.create())
    state = {name: value.clone() for name, value in lam_state_dict(model).items()}
    dead = {f"blocks.{index}.attn.lam.network.key.0.bias": torch.ones(27) for index in (0, 1)}
    with caplog.at_level("INFO"):
        load_lam_state_dict(again, state | dead)
    assert all(torch.equal(value, state[name]) for name, value in lam_state_dict(again).items())
    assert all(name in caplog.text for name in dead)


def test_tables_of_another_image_size_are_resized_and_named() -> None:
    config = LamConfig(keys="position", heads="per-head")
    small = shaken(add_lam(VIT.create(dynamic_img_size=True).eval(), config))
    large = add_lam(VIT.create(img_size=64, dynamic_img_size=True).eval(), config)
    resized = load_lam_state_dict(large, lam_state_dict(small))
    tables = [f"blocks.{index}.attn.lam.network.table" for index in (0, 1)]
    assert sorted(resized) == [f"{table}.{name}" for table in tables for name in ("bias", "weight")]
    before, after = (model.blocks[0].attn.lam.network.table for model in (small, large))
    assert_close(after.weight[:, 0], before.weight[:, 0])  # the class token's row
    # A small table resized once and a small table resized in each forward pass are the same.
    assert_close(after(65, (8, 8)), before(65, (8, 8)))


def test_wrong_keys_and_shapes_are_named_and_nothing_is_loaded() -> None:
    model = add_lam(VIT.create(), LamConfig(keys="position", heads="shared"))
    before = {name: value.clone() for name, value in lam_state_dict(model).items()}
    good = {name: torch.randn_like(value) for name, value in before.items()}
    key = "blocks.1.attn.lam.network.table.weight"
    cases = [
        ({name: value for name, value in good.items() if name != key}, re.escape(key)),
        (good | {"blocks.1.attn.qkv.weight": torch.zeros(1)}, r"blocks\.1\.attn\.qkv\.weight"),
        (good | {key: torch.zeros(1, 17, 3)}, re.escape(key)),
        (good | {key: torch.zeros(2, 17, 8)}, re.escape(key)),
        (good | {key: torch.zeros(1, 12, 8)}, re.escape(key)),
        (good | {key: torch.zeros(1, 12, 8), key.replace("weight", "bias"): torch.zeros(1, 12)}, "square grid"),
        (good | {key: torch.zeros(17)}, re.escape(key)),
        (dict(lam_state_dict(add_lam(VIT.create()))), "lacks"),
    ]
    for state, message in cases:
        with pytest.raises(StateDictError, match=message):
            load_lam_state_dict(model, state)
        assert all(torch.equal(value, before[name]) for name, value in lam_state_dict(model).items())


def test_models_without_masks_are_told_so() -> None:
    for function in (lam_state_dict, remove_lam, lambda model: list(lam_parameters(model))):
        with pytest.raises(UnsupportedHostError, match="add_lam"):
            function(VIT.create())
    with pytest.raises(UnsupportedHostError, match="add_lam"):
        load_lam_state_dict(VIT.create(), {})
