"""``create_model``: which weights it takes, what it leaves on the model, and how it refuses."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from lamzoo.errors import (
    ConfigError,
    HashMismatchError,
    HubUnreachableError,
    StateDictError,
    WeightsNotFoundError,
)
from lamzoo.lam import LamConfig
from lamzoo.profiling.inputs import image_size
from lamzoo.reduction import TokenReduction
from lamzoo.registry import catalog
from lamzoo.registry.catalog import get_pretrained_cfg, list_models, model_info, register_cards, register_model
from lamzoo.registry.factory import create_model
from lamzoo.weights.files import file_sha256, write_state_dict
from tests.weights.hub_server import COMMIT, HubServer


def saved(path: Path, fill: float, **kwargs: object) -> nn.Module:
    model = timm.create_model("test_vit", **{"img_size": 32, "num_classes": 4, **kwargs})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(fill)
    write_state_dict(model.state_dict(), path)
    return model


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A model ``tiny_zoo`` with the tags bundled (parameters 1.0), hub (2.0) and nowhere; timm's test_vit is 3.0."""
    list_models()
    monkeypatch.setattr(catalog, "_specs", dict(catalog._specs))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    saved(tmp_path / "bundled.safetensors", 1.0)
    saved(tmp_path / "hub.safetensors", 2.0)
    saved(tmp_path / "timm.safetensors", 3.0, img_size=160, num_classes=1000)
    timms = get_pretrained_cfg("timm/test_vit.r160_in1k").hf_hub_id
    assert timms is not None
    (tmp_path / "zoo.toml").write_text(f"""
[models.tiny_zoo]
builder = "lamzoo.models.vit:lam_vit"
[models.tiny_zoo.backbone]
timm = "test_vit"
[models.tiny_zoo.lam]
rank = 2
[models.tiny_zoo.pretrained_cfg]
input_size = [3, 32, 32]
num_classes = 4
[models.tiny_zoo.tags.bundled]
file = "bundled.safetensors"
sha256 = "{file_sha256(tmp_path / "bundled.safetensors")}"
[models.tiny_zoo.tags.hub]
hub = "zoo/tiny"
revision = "{COMMIT}"
sha256 = "{file_sha256(tmp_path / "hub.safetensors")}"
[models.tiny_zoo.tags.nowhere]
file = "nowhere.safetensors"
sha256 = "{"0" * 64}"
""")
    register_cards(tmp_path / "zoo.toml")
    repos = {
        "zoo/tiny": {"model.safetensors": (tmp_path / "hub.safetensors").read_bytes()},
        timms: {"model.safetensors": (tmp_path / "timm.safetensors").read_bytes()},
    }
    with HubServer(repos) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def value(model: nn.Module) -> float:
    return model.norm.weight[0].item()


@pytest.mark.parametrize(
    ("name", "lam", "expected"),
    [
        ("timm/test_vit", {"rank": 3, "op": "mul"}, LamConfig(rank=3, op="mul")),
        ("timm/test_vit", {}, LamConfig()),
        ("timm/test_vit", True, LamConfig()),
        ("timm/test_vit", False, None),
        ("tiny_zoo", {"rank": 3}, LamConfig(rank=3)),
        ("tiny_zoo", True, LamConfig(rank=2)),
        ("tiny_zoo", False, None),
    ],
)
def test_masks_are_given_as_fields_or_as_yes_and_no(
    zoo: HubServer, name: str, lam: Any, expected: LamConfig | None
) -> None:
    assert create_model(name, lam=lam, img_size=32).lam_config == expected


@pytest.mark.parametrize(
    ("lam", "message"), [({"rnak": 3}, "did you mean 'rank'"), ("rank=3", "'rank=3' is not a Lam")]
)
def test_masks_that_mean_nothing_are_refused(lam: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_model("timm/test_vit", lam=lam)


def test_the_records_of_timm_are_on_the_model() -> None:
    model = create_model("lam_vit_micro", num_classes=5)
    assert model.lam_config == LamConfig(keys="position", rank=7)
    assert model.default_cfg is model.pretrained_cfg
    assert model.pretrained_cfg["architecture"] == "lam_vit_micro"
    config = timm.data.resolve_model_data_config(model)
    assert (config["input_size"], config["crop_pct"]) == ((3, 32, 32), 1.0)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 5)
    plain = create_model("timm/test_vit", img_size=32)
    assert plain.lam_config is None
    assert plain.pretrained_cfg["tag"] == "r160_in1k"


def test_masks_are_the_cards_the_callers_or_none() -> None:
    assert create_model("lam_vit_micro", lam=LamConfig(rank=1)).lam_config == LamConfig(rank=1)
    assert create_model("lam_vit_micro", lam=False).lam_config is None
    assert create_model("vit_micro", lam=LamConfig(rank=1)).lam_config == LamConfig(rank=1)


@pytest.mark.parametrize("name", ["lam_vit_micro", "timm/test_vit"])
def test_an_unknown_argument_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match="takes no argument 'no_such'"):
        create_model(name, no_such=3)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"pretrained_cfg": "cifar10_mul"}, "takes no pretrained_cfg; name its weights, as arch.tag"),
        ({"pretrained_cfg_overlay": {"mean": (0.0, 0.0, 0.0)}}, "takes no pretrained_cfg_overlay; .*checkpoint_path="),
        ({"pretrained_strict": False}, "takes no pretrained_strict; weights are loaded strictly"),
    ],
)
def test_an_argument_of_timms_for_weights_is_refused_with_lamzoos_way(arguments: dict[str, Any], says: str) -> None:
    for name in ("lam_vit_micro", "timm/test_vit"):
        with pytest.raises(ConfigError, match=says):
            create_model(name, pretrained=True, **arguments)


@pytest.mark.parametrize("arguments", [{"reg_tokens": 2}, {"class_token": True, "global_pool": "token"}])
def test_another_number_of_prefix_tokens_is_named(arguments: dict[str, Any]) -> None:
    says = rf"its 'pos_embed' of shape \(1, 64, 128\) is for .*; {next(iter(arguments))}= must be what the weights were"
    with pytest.raises(StateDictError, match=says):
        create_model("lam_vit_micro.cifar10", pretrained=True, **arguments)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("lam_vit_tiny_patch8_64.tinyimagenet100", {"out_indices": (1, 5)}),
        ("lam_single_vit_tiny_patch8_64.tinyimagenet100", {}),
        ("vit_tiny_patch8_64.tinyimagenet100", {"in_chans": 1, "img_size": 32}),
        ("lam_vit_micro.cifar10", {"out_indices": (0, 2)}),
        ("vit_micro.cifar10", {"img_size": 64}),
    ],
)
def test_features_come_with_the_weights_of_the_whole_model(name: str, kwargs: dict[str, Any]) -> None:
    features = create_model(name, pretrained=True, features_only=True, **kwargs).eval()
    indices = kwargs.pop("out_indices", 3)
    whole = create_model(name, pretrained=True, **kwargs).eval()
    x = torch.rand(1, *image_size(whole))
    with torch.no_grad():
        expected = whole.forward_intermediates(x, indices=indices, norm=False, intermediates_only=True)
        found = features(x)
    assert features.weights_source == name
    assert features.feature_info.channels() == [whole.embed_dim] * len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)


def test_features_whose_weights_have_other_names_are_refused(tmp_path: Path) -> None:
    write_state_dict(timm.create_model("resnet10t").state_dict(), tmp_path / "r.safetensors")
    args: dict[str, Any] = {"features_only": True, "checkpoint_path": tmp_path / "r.safetensors"}
    assert len(create_model("timm/resnet10t", **args)(torch.rand(1, 3, 64, 64))) == 5
    write_state_dict(timm.create_model("test_convnext").state_dict(), tmp_path / "r.safetensors")
    with pytest.raises(ConfigError, match="renames the weights of timm/test_convnext"):
        create_model("timm/test_convnext", **args)


def test_no_network_is_said_in_three_short_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("lam_vit_base", "lam_vit_base.augreg_in1k", "timm/test_vit"):
        with pytest.raises(HubUnreachableError) as raised:
            create_model(name, pretrained=True, cache_dir=tmp_path)
        missing, works, bring = str(raised.value).split("\n")
        assert missing.startswith(f"{name.partition('.')[0]}: timm/") and "is not in the cache" in missing
        assert re.search(r"pretrained=False, .*checkpoint_path= .*bundled model \(lam_vit_micro\.cifar10, ", works)
        assert re.search(r"hf download timm/.* model\.safetensors.*copy .*models--timm--", bring)


def test_the_bundled_models_need_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    models = catalog.bundled_models()
    assert {"lam_vit_micro.cifar10", "lam_clip4clip_micro.grid"} <= set(models)
    assert not [name for name in models if name.startswith("lam_vit_base")]


def test_an_explicit_tag_loads_exactly_that(zoo: HubServer, tmp_path: Path) -> None:
    for tag, fill in (("bundled", 1.0), ("hub", 2.0)):
        model = create_model(f"tiny_zoo.{tag}", pretrained=True, cache_dir=tmp_path / "cache")
        assert (value(model), model.pretrained_cfg["tag"], model.num_classes) == (fill, tag, 4)
    zoo.status = 404
    with pytest.raises(WeightsNotFoundError, match="zoo/tiny"):
        create_model("tiny_zoo.hub", pretrained=True, cache_dir=tmp_path / "other")
    with pytest.raises(WeightsNotFoundError, match=r"tiny_zoo\.nowhere .*checkpoint_path="):
        create_model("tiny_zoo.nowhere", pretrained=True)


def test_a_tag_for_fewer_tokens_comes_pruned_and_others_do_not(zoo: HubServer, tmp_path: Path) -> None:
    card = (tmp_path / "zoo.toml").read_text()
    tag = card[card.index("[models.tiny_zoo.tags.bundled]") : card.index("[models.tiny_zoo.tags.hub]")]
    pruned = tag.replace("tags.bundled", "tags.pruned") + "prune = { keep = 0.5, at = [1] }\n"
    (tmp_path / "pruned.toml").write_text((card + pruned).replace("tiny_zoo", "pruned_zoo"))
    register_cards(tmp_path / "pruned.toml")
    model = create_model("pruned_zoo.pruned", pretrained=True)
    assert (model.prune_config.keep, model.prune_config.at) == (0.5, (1,))
    assert not hasattr(create_model("pruned_zoo.bundled", pretrained=True), "prune_config")
    assert not hasattr(create_model("pruned_zoo.pruned", lam=False), "prune_config")


def test_a_tag_for_merged_tokens_comes_merged_with_masks_or_without(zoo: HubServer, tmp_path: Path) -> None:
    card = (tmp_path / "zoo.toml").read_text()
    tag = card[card.index("[models.tiny_zoo.tags.bundled]") : card.index("[models.tiny_zoo.tags.hub]")]
    merged = tag.replace("tags.bundled", "tags.merged") + "reduction = { keep = 0.5, at = [0, 1] }\n"
    (tmp_path / "merged.toml").write_text((card + merged).replace("tiny_zoo", "merged_zoo"))
    register_cards(tmp_path / "merged.toml")
    info = model_info("merged_zoo.merged")
    assert (info.reduction, info.prune) == (TokenReduction(0.5, at=(0, 1)), None)
    assert create_model("merged_zoo.merged", pretrained=True).token_reduction == info.reduction
    assert create_model("merged_zoo.merged", lam=False).token_reduction == info.reduction
    assert not hasattr(create_model("merged_zoo.bundled", pretrained=True), "token_reduction")


def test_a_bundled_tag_never_asks_the_hub(zoo: HubServer) -> None:
    create_model("tiny_zoo.bundled", pretrained=True)
    assert not zoo.seen


def test_a_bare_name_takes_the_hub_before_the_bundle_and_says_which(
    zoo: HubServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "lamzoo"):
        model = create_model("tiny_zoo", pretrained=True, cache_dir=tmp_path / "cache")
    assert (value(model), model.pretrained_cfg["tag"]) == (2.0, "hub")
    assert "using the weights tiny_zoo.hub" in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_bare_name_falls_back_to_the_bundle_with_a_warning(
    zoo: HubServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with caplog.at_level(logging.INFO, "lamzoo"):
        model = create_model("tiny_zoo", pretrained=True, cache_dir=tmp_path / "cache")
    assert (value(model), model.pretrained_cfg["tag"]) == (1.0, "bundled")
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "tiny_zoo.bundled, because tiny_zoo.hub is not available" in warning
    assert "HF_HUB_OFFLINE" in warning


@pytest.mark.parametrize("status", [404, 500])
def test_a_hub_that_answers_with_an_error_is_no_obstacle_to_the_bundle(
    zoo: HubServer, tmp_path: Path, status: int
) -> None:
    zoo.status = status
    assert value(create_model("tiny_zoo", pretrained=True, cache_dir=tmp_path / "cache")) == 1.0


def test_a_damaged_file_is_an_error_and_no_reason_to_fall_back(zoo: HubServer, tmp_path: Path) -> None:
    zoo.corrupt = True
    with pytest.raises(HashMismatchError, match="sha256"):
        create_model("tiny_zoo", pretrained=True, cache_dir=tmp_path / "cache")


def test_timms_weights_come_through_our_own_download_and_loader(zoo: HubServer, tmp_path: Path) -> None:
    cache = {"cache_dir": tmp_path / "cache"}
    model = create_model("timm/test_vit", pretrained=True, lam=LamConfig(rank=2), num_classes=7, in_chans=1, **cache)
    assert (value(model), model.pretrained_cfg["tag"]) == (3.0, "r160_in1k")
    assert not torch.equal(model.head.weight, torch.full_like(model.head.weight, 3.0))
    assert create_model("timm/test_vit.r160_in1k", pretrained=True, img_size=64, **cache).pos_embed.shape[1] == 17
    with pytest.raises(StateDictError, match="q_norm"):
        create_model("timm/test_vit", pretrained=True, qk_norm=True, **cache)


def test_a_model_without_weights_says_so() -> None:
    with pytest.raises(WeightsNotFoundError, match="has no weights yet"):
        create_model("timm/vit_giant_patch14_224", pretrained=True)


def test_a_plugins_weights_are_loaded_by_lamzoo(zoo: HubServer, tmp_path: Path) -> None:
    saved(tmp_path / "p.safetensors", 5.0)
    tag = {"hub": "zoo/plugin", "revision": COMMIT, "sha256": file_sha256(tmp_path / "p.safetensors")}
    zoo.repos["zoo/plugin"] = {"model.safetensors": (tmp_path / "p.safetensors").read_bytes()}

    @register_model(tags={"t": tag}, pretrained_cfg={"num_classes": 4, "classifier": "head"})
    def a_small_plugin(num_classes: int = 9) -> nn.Module:
        return timm.create_model("test_vit", img_size=32, num_classes=num_classes)

    assert create_model("a_small_plugin").num_classes == 9
    model = create_model("a_small_plugin", pretrained=True, cache_dir=tmp_path / "cache")
    assert (value(model), model.num_classes, model.pretrained_cfg["tag"]) == (5.0, 4, "t")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"img_size": 0}, "img_size is 0; it must lie between 1 and 16384"),
        ({"img_size": 10**9}, "img_size is 1000000000; it must lie between 1 and 16384"),
        ({"img_size": "large"}, "img_size='large'.*img_size must be an integer"),
        ({"img_size": (32, 32, 32)}, "img_size must be a height and a width"),
        ({"depth": 2.5}, "depth=2.5.*depth must be an integer"),
        ({"drop_path_rate": float("nan")}, "drop_path_rate is nan; it must lie between 0 and 1"),
        ({"embed_dim": 64, "num_heads": 3}, r"cannot be built with .*dim should be divisible by num_heads"),
        ({"init_values": "small"}, r"cannot be built with .*init_values='small'"),
        ({"checkpoint_path": 2.5}, "checkpoint_path is 2.5; it must be a path"),
        ({"lam": {"rank": 10**9}}, "rank has 1000000000; widths and lengths must be whole numbers from 1 to"),
    ],
)
def test_values_that_the_builder_refuses_are_named(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        create_model("timm/test_vit", **arguments)


def test_depths_of_branches_may_be_nested() -> None:
    blocks = create_model("timm/crossvit_tiny_240", depth=[[1, 1, 0]] * 3).blocks
    assert isinstance(blocks, nn.ModuleList)
    assert len(blocks) == 3


def test_an_argument_of_a_plugin_may_have_another_meaning() -> None:
    @register_model
    def a_plugin_of_depth(depth: str = "shallow", in_chans: int = 3) -> nn.Module:
        return timm.create_model("test_vit", img_size=32, in_chans=in_chans, num_classes=len(depth))

    assert create_model("a_plugin_of_depth", depth="deep").num_classes == 4


def test_a_builder_that_exits_is_named() -> None:
    @register_model
    def a_builder_that_exits() -> nn.Module:
        sys.exit(3)

    with pytest.raises(ConfigError, match=r"a_builder_that_exits cannot be built .*SystemExit: 3"):
        create_model("a_builder_that_exits")
