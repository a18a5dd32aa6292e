"""``save_pretrained`` and back: a folder, the hub, timm itself."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models._registry import _model_entrypoints
from torch import nn

from lamzoo.adapters import fuse, unfuse
from lamzoo.adapters.deploy import is_fused
from lamzoo.errors import (
    ConfigError,
    HashMismatchError,
    StateDictError,
    UnsafeWeightsError,
    WeightsError,
    WeightsNotFoundError,
)
from lamzoo.lam import LamConfig
from lamzoo.reduction import TokenReduction, merge_tokens, remove_reduction
from lamzoo.registry.catalog import get_pretrained_cfg, model_info
from lamzoo.registry.factory import create_model
from lamzoo.registry.saving import save_pretrained
from tests.weights.hub_server import COMMIT, HubServer

TIMM = "timm/test_vit"
IMAGE = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)


@pytest.fixture
def model() -> nn.Module:
    model = create_model("lam_vit_micro", num_classes=4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model.eval()


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def same_output(left: nn.Module, right: nn.Module) -> bool:
    with torch.no_grad():
        return torch.equal(left.eval()(IMAGE), right.eval()(IMAGE))


def test_a_folder_gives_the_model_back(model: nn.Module, tmp_path: Path) -> None:
    save_pretrained(model, tmp_path / "m", label_names=["a", "b", "c", "d"])
    assert sorted(files(tmp_path / "m")) == ["config.json", "model.safetensors"]
    loaded = create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True)
    assert same_output(model, loaded)
    assert loaded.lam_config == model.lam_config
    assert loaded.num_classes == 4
    assert tuple(loaded.pretrained_cfg["label_names"]) == ("a", "b", "c", "d")
    before, after = (timm.data.resolve_model_data_config(m) for m in (model, loaded))
    assert before == after
    save_pretrained(loaded, tmp_path / "again")
    assert files(tmp_path / "again")["model.safetensors"] == files(tmp_path / "m")["model.safetensors"]


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("lam_vit_micro", {"depth": 2}),
        ("vit_micro", {"depth": 2}),
        (TIMM, {"img_size": 32, "patch_size": 8, "depth": 2}),
    ],
)
def test_a_folder_gives_a_merged_model_back(name: str, kwargs: dict[str, Any], tmp_path: Path) -> None:
    merged = merge_tokens(create_model(name, **kwargs), keep=0.5)
    save_pretrained(merged, tmp_path)
    loaded = create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert loaded.token_reduction == model_info(tmp_path).reduction == TokenReduction(0.5)
    assert same_output(merged, loaded)
    assert create_model(f"local-dir:{tmp_path}", lam=False).token_reduction == TokenReduction(0.5)
    save_pretrained(remove_reduction(loaded), tmp_path)
    assert model_info(tmp_path).reduction is None


@pytest.mark.parametrize("merges", [False, True])
def test_a_folder_gives_a_fused_model_back_with_its_unfused_weights(merges: bool, tmp_path: Path) -> None:
    config = LamConfig(keys="position", rank=7, init="paper")
    model = create_model("lam_vit_tiny", lam=config, **{**SMALL, "depth": 2})
    if merges:
        merge_tokens(model, keep=0.5)
    save_pretrained(model, tmp_path / "before")
    save_pretrained(fuse(model), tmp_path / "fused")
    assert files(tmp_path / "fused")["model.safetensors"] == files(tmp_path / "before")["model.safetensors"]
    assert json.loads((tmp_path / "fused" / "config.json").read_text())["fused"] is True
    assert "fused" not in json.loads((tmp_path / "before" / "config.json").read_text())
    assert model_info(tmp_path / "fused").fused
    loaded = create_model(tmp_path / "fused", pretrained=True)
    assert is_fused(loaded)
    assert hasattr(loaded, "token_reduction") == merges
    assert same_output(model, loaded)
    assert not is_fused(create_model(tmp_path / "fused", pretrained=True, lam=False))
    other = create_model(tmp_path / "fused", pretrained=True, lam={"op": "mul"}, lam_weights="fresh")
    assert not is_fused(other)
    save_pretrained(unfuse(loaded), tmp_path / "again")
    assert not model_info(tmp_path / "again").fused


def test_a_reduction_that_does_not_fit_names_the_file(model: nn.Module, tmp_path: Path) -> None:
    save_pretrained(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"token_reduction": {"keep": 0.5, "at": [40]}}))
    with pytest.raises(
        ConfigError, match=r"config\.json does not fit the model: at=\(40,\): tokens can merge in layers"
    ):
        create_model(tmp_path)


def test_a_folder_is_adapted_like_any_weights(model: nn.Module, tmp_path: Path) -> None:
    save_pretrained(model, tmp_path)
    loaded = create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=2, in_chans=1, img_size=48, lam=False)
    assert loaded.lam_config is None
    assert loaded(torch.zeros(1, 1, 48, 48)).shape == (1, 2)


def test_a_custom_configuration_survives(tmp_path: Path) -> None:
    config = LamConfig(keys="position", op="add", rank=3, hidden=(5,), layers="single")
    model = create_model("timm/test_vit", lam=config, img_size=32, num_classes=3, global_pool="avg")
    save_pretrained(model, tmp_path)
    loaded = create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert loaded.lam_config == config
    assert same_output(model, loaded)
    assert create_model(f"local-dir:{tmp_path}").num_classes == 3


def test_timm_reads_a_plain_model(tmp_path: Path) -> None:
    model = create_model("timm/test_vit", img_size=32, num_classes=3)
    save_pretrained(model, tmp_path)
    assert same_output(model, timm.create_model(f"local-dir:{tmp_path}", pretrained=True))


SMALL = {"img_size": 32, "num_classes": 3, "depth": 1, "embed_dim": 16, "num_heads": 2}


@pytest.mark.parametrize(
    "kwargs",
    [
        {"name": "lam_vit_tiny"},
        {"name": "vit_tiny_patch8_64", "lam": LamConfig(op="mul")},
        {"name": TIMM, "lam": LamConfig()},
    ],
)
def test_timm_refuses_a_masked_model_and_takes_it_without_masks(
    kwargs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(_model_entrypoints, "lamzoo", raising=False)  # registered by lamzoo.timm
    save_pretrained(create_model(**kwargs, **SMALL), tmp_path / "masked")
    for pretrained in (False, True):
        with pytest.raises(RuntimeError, match="Unknown model"):
            timm.create_model(f"local-dir:{tmp_path / 'masked'}", pretrained=pretrained)
    loaded = create_model(f"local-dir:{tmp_path / 'masked'}", pretrained=True)
    assert loaded.lam_config is not None
    save_pretrained(loaded, tmp_path / "again")
    assert files(tmp_path / "again") == files(tmp_path / "masked")
    plain = create_model(f"local-dir:{tmp_path / 'masked'}", pretrained=True, lam=False)
    save_pretrained(plain, tmp_path / "plain")
    assert same_output(plain, timm.create_model(f"local-dir:{tmp_path / 'plain'}", pretrained=True))


def test_a_masked_folder_of_an_earlier_version_still_loads(tmp_path: Path) -> None:
    model = create_model("lam_vit_tiny", **SMALL)
    save_pretrained(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["architecture"] = "vit_tiny_patch16_224"  # as lamzoo 0.1.0 wrote it
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert loaded.lam_config == model.lam_config
    assert same_output(model, loaded)


def test_what_timm_saved_is_read(tmp_path: Path) -> None:
    model = timm.create_model("test_vit", img_size=32, num_classes=3)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    loaded = create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert same_output(model, loaded)
    masked = create_model(f"local-dir:{tmp_path}", pretrained=True, lam=LamConfig(rank=2))
    with torch.no_grad():
        assert torch.allclose(masked.eval()(IMAGE), model(IMAGE), atol=1e-5)


def test_a_model_of_timms_with_masks_can_be_saved(tmp_path: Path) -> None:
    from lamzoo.adapters import add_lam

    model = add_lam(timm.create_model("test_vit", img_size=32), LamConfig(rank=2))
    save_pretrained(model, tmp_path)
    assert same_output(model, create_model(f"local-dir:{tmp_path}", pretrained=True))


def test_a_module_that_nothing_can_rebuild_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Linear cannot be saved"):
        save_pretrained(nn.Linear(2, 2), tmp_path / "m")
    assert not (tmp_path / "m").exists()


def other_head(model: Any) -> None:
    model.head = nn.Linear(128, 9)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (other_head, r"head\.weight \(\(9, 128\) instead of \(4, 128\)\), head\.bias .*; set the head by its reset_cl"),
        (
            lambda model: model.prune_intermediate_layers([1]),
            r"blocks\.2\.norm1\.weight \(missing instead of \(128,\)\)",
        ),
        (lambda model: model.to("meta"), "its pos_embed is on the meta device; call to_empty and load_state_dict"),
    ],
    ids=["head", "depth", "meta"],
)
def test_a_model_that_its_configuration_does_not_build_is_not_saved(
    model: nn.Module, change: Callable[[Any], object], says: str, tmp_path: Path
) -> None:
    change(model)
    with pytest.raises(ConfigError, match=f"lam_vit_micro cannot be saved, because .*{says}"):
        save_pretrained(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_head_that_was_reset_is_saved(model: Any, tmp_path: Path) -> None:
    model.reset_classifier(9)
    assert same_output(model, create_model(save_pretrained(model, tmp_path / "m"), pretrained=True))


@pytest.mark.parametrize("create", [create_model, timm.create_model])
def test_a_part_of_a_model_is_not_saved(create: Any, tmp_path: Path) -> None:
    name = "test_vit" if create is timm.create_model else "lam_vit_micro"
    with pytest.raises(ConfigError, match="FeatureGetterNet is a part of a model, made by features_only; save the wh"):
        save_pretrained(create(name, features_only=True), tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_class_names_that_are_not_utf8_survive(model: nn.Module, tmp_path: Path) -> None:
    names = (os.fsdecode(b"caf\xe9"), *"bcd")[: model.num_classes]
    save_pretrained(model, tmp_path, label_names=names)
    assert get_pretrained_cfg(tmp_path).label_names == names


def test_label_names_must_fit_the_head(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="2 label names .* 4 classes"):
        save_pretrained(model, tmp_path, label_names=["a", "b"])


def test_a_full_disk_keeps_the_earlier_save(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_pretrained(model, tmp_path)
    before = files(tmp_path)

    def full(contents: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("lamzoo.weights.files.save_file", full)
    with pytest.raises(WeightsError, match="No space left on device"):
        save_pretrained(create_model("lam_vit_micro"), tmp_path)
    assert files(tmp_path) == before


def test_a_sharded_save_loads_and_replaces_a_whole_one(model: nn.Module, tmp_path: Path) -> None:
    save_pretrained(model, tmp_path)
    save_pretrained(model, tmp_path, max_shard_bytes=2_000_000)
    assert "model.safetensors" not in files(tmp_path)
    assert all(len(data) <= 2_000_000 for data in files(tmp_path).values())
    assert same_output(model, create_model(f"local-dir:{tmp_path}", pretrained=True))
    save_pretrained(model, tmp_path)
    assert sorted(files(tmp_path)) == ["config.json", "model.safetensors"]


def test_a_flipped_byte_in_a_folder_is_noticed(model: nn.Module, tmp_path: Path) -> None:
    save_pretrained(model, tmp_path)
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(HashMismatchError, match=r"model\.safetensors"):
        create_model(f"local-dir:{tmp_path}", pretrained=True)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"architecture": 3}', '{"architecture": "test_vit", "pretrained_cfg": {"x": 1}}']
)
def test_a_damaged_config_is_one_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(WeightsError, match=r"config\.json"):
        create_model(f"local-dir:{tmp_path}", pretrained=True)


def test_a_folder_without_weights_says_what_it_looked_for(model: nn.Module, tmp_path: Path) -> None:
    save_pretrained(model, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(WeightsNotFoundError, match=r"model\.safetensors"):
        create_model(f"local-dir:{tmp_path}", pretrained=True)
    with pytest.raises(WeightsNotFoundError, match="no such folder"):
        create_model(f"local-dir:{tmp_path / 'nowhere'}")


@pytest.mark.parametrize("max_shard_bytes", [None, 2_000_000])
@pytest.mark.parametrize("revision", ["", f"@{COMMIT}"])
def test_the_hub_gives_the_model_back(
    server: HubServer, model: nn.Module, tmp_path: Path, max_shard_bytes: int | None, revision: str
) -> None:
    save_pretrained(model, tmp_path / "m", max_shard_bytes=max_shard_bytes)
    server.repos["zoo/micro"] = files(tmp_path / "m")
    name = f"hf-hub:zoo/micro{revision}"
    loaded = create_model(name, pretrained=True, cache_dir=tmp_path / "cache")
    assert same_output(model, loaded)
    assert loaded.pretrained_cfg["source"] == "hf-hub"
    server.status = 500
    assert same_output(model, create_model(name, pretrained=True, cache_dir=tmp_path / "cache"))


def test_the_hub_gives_no_masks_of_one_kind_to_another(server: HubServer, model: nn.Module, tmp_path: Path) -> None:
    save_pretrained(model, tmp_path / "m")
    server.repos["zoo/micro"] = files(tmp_path / "m")
    args: dict[str, Any] = {"pretrained": True, "cache_dir": tmp_path / "cache", "lam": LamConfig()}
    with pytest.raises(StateDictError, match=r"keys='position', rank=7.*keys='content', rank=8; omit lam="):
        create_model("hf-hub:zoo/micro", **args)
    assert create_model("hf-hub:zoo/micro", **args, lam_weights="fresh").lam_config == LamConfig()


def test_a_configuration_that_is_not_of_its_file_is_refused(model: nn.Module, tmp_path: Path) -> None:
    save_pretrained(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["lam_config"]["op"] = "mul"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(StateDictError, match=r"op='add'.*op='mul'; pass lam=LamConfig"):
        create_model(f"local-dir:{tmp_path}", pretrained=True)


def test_a_repository_with_a_pickle_only_needs_leave(server: HubServer, tmp_path: Path) -> None:
    model = timm.create_model("test_vit", img_size=32, num_classes=3)
    timm.models.save_for_hf(model, tmp_path / "m", safe_serialization=False)
    server.repos["zoo/pickle"] = files(tmp_path / "m")
    with pytest.raises(UnsafeWeightsError, match=r"zoo/pickle has no model\.safetensors.*allow_pickle=True"):
        create_model("hf-hub:zoo/pickle", pretrained=True, cache_dir=tmp_path / "cache")
    loaded = create_model("hf-hub:zoo/pickle", pretrained=True, cache_dir=tmp_path / "cache", allow_pickle=True)
    assert same_output(model, loaded)


def test_bytes_changed_on_the_way_are_noticed(server: HubServer, model: nn.Module, tmp_path: Path) -> None:
    save_pretrained(model, tmp_path / "m")
    contents = files(tmp_path / "m")
    config = json.loads(contents["config.json"])
    del config["lamzoo"]["sha256"]  # the hub's own etag is enough
    server.repos["zoo/micro"] = {**contents, "config.json": json.dumps(config).encode()}
    create_model("hf-hub:zoo/micro", cache_dir=tmp_path / "cache")
    server.corrupt = True
    with pytest.raises(HashMismatchError, match=r"model\.safetensors arrived twice with another sha256"):
        create_model("hf-hub:zoo/micro", pretrained=True, cache_dir=tmp_path / "cache")
    server.corrupt = False
    assert same_output(model, create_model("hf-hub:zoo/micro", pretrained=True, cache_dir=tmp_path / "cache"))


GOOD = {
    "architecture": "test_vit",
    "num_classes": 2,
    "label_names": ["a", "b"],
    "model_args": {"img_size": 32},
    "pretrained_cfg": {"input_size": [3, 32, 32], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_args": {"img_size": 0}}, "model_args.img_size is 0; it must lie between 1 and 16384"),
        ({"model_args": {"img_size": 10**9}}, "model_args.img_size"),
        ({"model_args": {"depth": 10**9}}, "model_args.depth"),
        ({"model_args": {"checkpoint_path": "/x"}}, "model_args.checkpoint_path is not an argument of a saved model"),
        ({"model_args": [1]}, "model_args"),
        ({"num_classes": 10**12}, "num_classes"),
        ({"label_names": ["a"]}, "label_names"),
        ({"pretrained_cfg": {"std": [0, 0, 0]}}, "pretrained_cfg.std"),
        ({"architecture": "../x"}, "architecture is '../x'"),
        ({"lamzoo": {"name": "local-dir:x"}}, "lamzoo.name"),
        ({"lamzoo": {"sha256": {"../outside/model.safetensors": "0" * 64}}}, "outside"),
        ({"lamzoo": {"sha256": {"C:model.safetensors": "0" * 64}}}, "lamzoo.sha256"),
        ({"lamzoo": {"sha256": {"model.bin": "0" * 64}}}, "model.bin"),
        ({"lam_config": {"rank": 1e9}}, "rank"),
        ({"lam_config": {"hidden": [2] * 10_000}}, "hidden"),
        ({"prune_config": {"keep": "x", "at": [0]}}, "keep='x'"),
        ({"prune_config": {"keep": 0.5, "at": ["x"]}}, "at="),
        ({"token_reduction": {"keep": "x"}}, "keep='x'"),
        ({"token_reduction": {"keep": 0.5, "at": 3}}, "at=3"),
        ({"token_reduction": {"keep": 0.5, "method": "mix"}}, "method='mix'"),
        ({"token_reduction": {"keep": 0.5, "kept": 1}}, "no field 'kept'; did you mean 'keep'"),
        ({"token_reduction": {}}, "keep"),
        ({"token_reduction": {"keep": 0.5}, "prune_config": {"keep": 0.5, "at": [0]}}, "exclude each other"),
    ],
)
def test_a_value_in_a_config_is_refused_by_file_key_and_way_out(
    tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GOOD))
    assert get_pretrained_cfg(tmp_path).label_names == ("a", "b")
    (tmp_path / "config.json").write_text(json.dumps(GOOD | change))
    with pytest.raises(
        WeightsError, match=rf"config\.json is not .*{re.escape(says)}.*; replace it with an intact copy"
    ):
        get_pretrained_cfg(tmp_path)


def test_a_deeply_nested_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"x": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(WeightsError, match=r"config\.json is not .* nested too deeply"):
        get_pretrained_cfg(tmp_path)


def test_label_names_of_an_earlier_head_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = {**GOOD, "pretrained_cfg": {"num_classes": 3, "label_names": ["a", "b", "c"]}}
    del config["label_names"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert get_pretrained_cfg(tmp_path).label_names is None
    assert "3 label names in pretrained_cfg are ignored" in caplog.text


def test_arguments_with_which_no_model_can_be_built_are_one_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GOOD | {"model_args": {"depth": "abc"}}))
    with pytest.raises(ConfigError, match=r"cannot be built with .*depth='abc' \(TypeError: .*config\.json states"):
        create_model(tmp_path)


@pytest.mark.parametrize("change", [{}, {"lam_config": {"rank": 10**6}}])
def test_a_model_that_needs_more_memory_than_the_machine_has_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GOOD | change))
    monkeypatch.setattr(os, "sysconf", lambda name: 5000 if change else 1000)  # a machine of 25 or of 1 MB
    with pytest.raises(ConfigError, match="more memory than this machine has"):
        create_model(tmp_path)


def test_a_config_that_the_hub_had_damaged_is_read_again_once_it_is_mended(
    server: HubServer, model: nn.Module, tmp_path: Path
) -> None:
    save_pretrained(model, tmp_path / "m")
    good = files(tmp_path / "m")
    server.repos["zoo/micro"] = good | {"config.json": b"{"}
    cache = tmp_path / "cache"
    for _ in range(2):
        with pytest.raises(WeightsError, match=r"config\.json .*tell its authors"):
            create_model("hf-hub:zoo/micro", pretrained=True, cache_dir=cache)
    server.repos["zoo/micro"], server.commit = good, COMMIT[::-1]
    assert same_output(model, create_model("hf-hub:zoo/micro", pretrained=True, cache_dir=cache))


def test_weights_are_of_the_commit_that_the_config_is_of(server: HubServer, model: nn.Module, tmp_path: Path) -> None:
    save_pretrained(model, tmp_path / "m")
    server.repos["zoo/micro"] = files(tmp_path / "m")
    create_model("hf-hub:zoo/micro", cache_dir=tmp_path / "cache")
    create_model("hf-hub:zoo/micro", pretrained=True, cache_dir=tmp_path / "cache")
    assert server.seen["GET", f"/zoo/micro/resolve/{COMMIT}/model.safetensors"] == 1


def test_a_repository_whose_files_are_of_two_saves_is_read_once_its_authors_mended_it(
    server: HubServer, model: nn.Module, tmp_path: Path
) -> None:
    save_pretrained(model, tmp_path / "m")
    save_pretrained(create_model("lam_vit_micro", num_classes=4), tmp_path / "other")
    good, cache = files(tmp_path / "m"), tmp_path / "cache"
    server.repos["zoo/micro"] = good | {"model.safetensors": files(tmp_path / "other")["model.safetensors"]}
    for _ in range(2):
        with pytest.raises(HashMismatchError, match="as the hub had it; tell its authors"):
            create_model("hf-hub:zoo/micro", pretrained=True, cache_dir=cache)
    server.repos["zoo/micro"], server.commit = good, COMMIT[::-1]
    assert same_output(model, create_model("hf-hub:zoo/micro", pretrained=True, cache_dir=cache))


@pytest.mark.parametrize(("built", "now"), [((32, 32), (48, 48)), ((32, 64), (48, 48)), ((16, 64), (32, 32))])
@pytest.mark.parametrize(
    ("name", "options"),
    [("lam_vit_micro", {"embed_dim": 32, "depth": 2, "num_heads": 2}), ("timm/vit_tiny_patch16_224", {"depth": 2})],
)
def test_a_model_of_another_image_size_than_it_was_built_with_is_read_back(
    name: str, options: dict[str, Any], built: tuple[int, int], now: tuple[int, int], tmp_path: Path
) -> None:
    options |= {"patch_size": 8} if name.startswith("timm/") else {}
    lam = LamConfig(keys="position", rank=2, init="paper")
    model: Any = create_model(name, img_size=built, lam=lam, **options).eval()
    model.set_input_size(now)
    images = torch.randn(2, 3, *now)
    again = create_model(save_pretrained(model, tmp_path), pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(images), model(images))
