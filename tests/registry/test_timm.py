"""``import lamzoo.timm``: timm's factory, its lists and its scripts have the image models of lamzoo."""

from __future__ import annotations

import json
import runpy
from argparse import Namespace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.data import resolve_data_config, resolve_input_data_config
from timm.models import _hub, load_checkpoint, resolve_model_input_args, save_for_hf
from timm.models._registry import _model_entrypoints
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import nn

import lamzoo
import lamzoo.timm
from lamzoo.errors import ConfigError, UnknownModelError, WeightsNotFoundError
from tests.weights.hub_server import HubServer

IMAGE = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)


def same_output(left: nn.Module, right: nn.Module, x: torch.Tensor = IMAGE) -> bool:
    with torch.no_grad():
        return torch.equal(left.eval()(x), right.eval()(x))


def changed(model: nn.Module) -> nn.Module:
    """A model whose masks are no identity."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def test_timm_lists_the_image_models_and_no_others() -> None:
    listed = [name for name in lamzoo.list_models() if lamzoo.model_info(name).task == "classification"]
    assert timm.list_models(module="timm") == listed
    assert set(timm.list_models("lam_*")) < set(lamzoo.list_models("lam_vit*")) | set(lamzoo.list_models("lam_single*"))
    assert timm.list_pretrained("lam_vit_*") == lamzoo.list_models("lam_vit_*", pretrained=True)
    assert timm.is_model("lam_vit_base")
    assert not timm.is_model("lam_clip4clip")
    assert "lamzoo" not in timm.list_models()
    for name in lamzoo.list_models("lam_vit_*", pretrained=True):
        assert timm.get_pretrained_cfg(name) == lamzoo.get_pretrained_cfg(name)
    assert timm.get_pretrained_cfg("lam_vit_base").tag == "augreg2_in21k_ft_in1k"


def test_lamzoo_does_not_take_them_for_timms_own() -> None:
    assert not any("lam_vit" in name for name in lamzoo.list_models("timm/*"))
    with pytest.raises(UnknownModelError, match="did you mean lam_vit_micro"):
        lamzoo.create_model("timm/lam_vit_micro")


def test_timm_creates_what_lamzoo_creates() -> None:
    model = timm.create_model("lam_vit_micro", pretrained=True)
    assert same_output(model, lamzoo.create_model("lam_vit_micro", pretrained=True))
    assert model.weights_source == "lam_vit_micro.cifar10"
    assert timm.data.resolve_model_data_config(model)["mean"] == (0.4914, 0.4822, 0.4465)


def test_a_bare_name_has_the_masks_of_its_default_tag_in_scripts_too() -> None:
    masks = lamzoo.model_info("lam_vit_tiny_patch8_64.tinyimagenet100").lam
    assert masks != lamzoo.model_info("lam_vit_tiny_patch8_64").lam
    with torch.device("meta"):
        assert timm.create_model("lam_vit_tiny_patch8_64").lam_config == masks
        assert timm.create_model(**resolve_model_input_args("lam_vit_tiny_patch8_64")).lam_config == masks


def test_arguments_are_those_of_lamzoo() -> None:
    model = timm.create_model(
        "lam_vit_micro", pretrained=True, num_classes=4, in_chans=1, img_size=48, drop_path_rate=0.1, bn_eps=None
    )
    assert model(torch.zeros(1, 1, 48, 48)).shape == (1, 4)
    assert timm.create_model("lam_vit_micro", lam=False).lam_config is None
    maps = timm.create_model("lam_vit_micro", pretrained=True, features_only=True, out_indices=(1, 3))(IMAGE)
    assert [each.shape for each in maps] == [(1, 128, 8, 8)] * 2


def test_weights_of_your_own_are_loaded(tmp_path: Path) -> None:
    model = changed(lamzoo.create_model("lam_vit_micro"))
    lamzoo.save_pretrained(model, tmp_path)
    file = str(tmp_path / "model.safetensors")
    assert same_output(model, timm.create_model("lam_vit_micro", checkpoint_path=file))
    overlay = {"file": file}
    assert same_output(model, timm.create_model("lam_vit_micro", True, pretrained_cfg_overlay=overlay))
    assert timm.create_model("lam_vit_micro", pretrained_cfg_overlay=overlay).weights_source is None
    with pytest.raises(WeightsNotFoundError, match="none.safetensors"):
        timm.create_model("lam_vit_micro", True, pretrained_cfg_overlay={"file": "none.safetensors"})


@pytest.mark.parametrize(
    ("name", "arguments", "error", "says"),
    [
        ("lam_vit_micro.nope", {}, UnknownModelError, "lam_vit_micro has no weights 'nope'; its tags are cifar10"),
        ("lam_vit_micro", {"nope": 1}, TypeError, "lam_vit_micro takes no argument 'nope'"),
        ("lam_vit_micro", {"pretrained_cfg_overlay": {"mean": (0, 0, 0)}}, ConfigError, "can't have another mean"),
        ("lam_vit_micro", {"pretrained_strict": False}, ConfigError, "takes no pretrained_strict"),
        ("lamzoo", {}, UnknownModelError, "is the architecture of saved models; name one, as local-dir:FOLDER"),
        ("lamzoo.timm.lam_vit_micro", {}, UnknownModelError, "is the architecture of saved models"),
    ],
)
def test_errors_name_the_culprit(name: str, arguments: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        timm.create_model(name, **arguments)


SMALL = {"img_size": 32, "num_classes": 3, "depth": 1, "embed_dim": 16, "num_heads": 2}
SAVED = [
    ("lam_vit_micro", SMALL),
    ("lam_vit_tiny", SMALL),
    ("vit_micro", SMALL),
    ("vit_micro", {"lam": lamzoo.LamConfig(rank=2), **SMALL}),
    ("timm/test_vit", {"lam": lamzoo.LamConfig(rank=3, op="add", keys="position"), **SMALL}),
]


@pytest.mark.parametrize(("name", "arguments"), SAVED)
def test_a_saved_folder_comes_back_with_its_masks(name: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    model = changed(lamzoo.create_model(name, **arguments))
    lamzoo.save_pretrained(model, tmp_path / "m")
    source = f"local-dir:{tmp_path / 'm'}"
    loaded = timm.create_model(source, pretrained=True)
    assert loaded.lam_config == model.lam_config
    assert same_output(model, loaded)
    lamzoo.save_pretrained(loaded, tmp_path / "again")
    assert (tmp_path / "again/config.json").read_bytes() == (tmp_path / "m/config.json").read_bytes()
    assert not same_output(model, timm.create_model(source))  # without its weights
    adapted = timm.create_model(**resolve_model_input_args(source, {"img_size": 48}, pretrained=True, num_classes=2))
    assert adapted(torch.zeros(1, 3, 48, 48)).shape == (1, 2)
    assert adapted.lam_config == model.lam_config


def test_a_hub_repository_comes_back_with_its_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = changed(lamzoo.create_model("timm/test_vit", lam=lamzoo.LamConfig(), **SMALL))
    lamzoo.save_pretrained(model, tmp_path / "m")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with HubServer({"me/vit": {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()}}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)  # huggingface_hub has read it, and timm passes no endpoint
        monkeypatch.setattr(_hub, "hf_hub_download", partial(_hub.hf_hub_download, endpoint=server.url))
        for name in ("hf-hub:me/vit", "hf-hub:me/vit@main"):
            loaded = timm.create_model(name, pretrained=True, cache_dir=tmp_path / "cache")
            assert same_output(model, loaded)
            assert loaded.lam_config == model.lam_config


@pytest.mark.parametrize(
    "create", [partial(timm.create_model, "lam_vit_micro"), partial(lamzoo.create_model, "lam_vit_tiny_patch8_64")]
)
def test_a_folder_written_by_timm_is_read_with_the_masks_of_the_card(create: Any, tmp_path: Path) -> None:
    model = changed(create(num_classes=3, img_size=32))  # of the second, the card and the tag have different ranks
    save_for_hf(model, tmp_path, safe_serialization=True)
    for read in (timm.create_model, lamzoo.create_model):
        assert same_output(model, read(f"local-dir:{tmp_path}", pretrained=True))


def test_the_masks_that_were_asked_for_are_saved(tmp_path: Path) -> None:
    model = timm.create_model("lam_vit_micro", lam={"rank": 2}, lam_weights="fresh", **SMALL)
    lamzoo.save_pretrained(model, tmp_path)
    assert not {"lam", "lam_weights"} & json.loads((tmp_path / "config.json").read_text())["model_args"].keys()
    assert timm.create_model(f"local-dir:{tmp_path}", pretrained=True).lam_config == lamzoo.LamConfig(rank=2)


@pytest.fixture
def unregistered(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lamzoo", *timm.list_models(module="timm")):
        monkeypatch.delitem(_model_entrypoints, name)


@pytest.mark.parametrize(("name", "arguments"), SAVED)
@pytest.mark.usefixtures("unregistered")
def test_without_the_import_timms_error_names_it(name: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    lamzoo.save_pretrained(lamzoo.create_model(name, **arguments), tmp_path)
    with pytest.raises(RuntimeError, match=rf"Unknown model \(lamzoo\.timm\.{name.removeprefix('timm/')}\)"):
        timm.create_model(f"local-dir:{tmp_path}")


def test_the_file_does_not_stand_in_for_timm() -> None:
    with pytest.raises(ImportError, match="in place of timm, because the folder of lamzoo's source"):
        runpy.run_path(str(lamzoo.timm.__file__), run_name="timm")


def script_arguments(**changes: Any) -> Namespace:
    """The arguments of timm's scripts that concern models, as their parsers leave them."""
    defaults = {
        "pretrained": True, "num_classes": None, "img_size": None, "in_chans": None, "input_size": None, "gp": None,
        "crop_pct": None, "crop_mode": None, "mean": None, "std": None, "interpolation": "", "drop": 0.0,
        "drop_path": None, "drop_block": None, "bn_momentum": None, "bn_eps": None, "torchscript": False,
        "initial_checkpoint": "", "checkpoint": "", "opt": "adamw", "lr": 1e-3, "weight_decay": 0.05, "momentum": 0.9,
        "opt_eps": None, "opt_betas": None, "layer_decay": 0.75, "device_modules": ["lamzoo.timm"],
    }  # fmt: skip
    return Namespace(**{**defaults, **changes})


def create_for_training(args: Namespace) -> Any:
    """Calls what train.py calls, with the same arguments."""
    for module in args.device_modules:
        import_module(module)
    return timm.create_model(
        **resolve_model_input_args(
            args.model,
            vars(args),
            pretrained=args.pretrained,
            num_classes=args.num_classes,
            drop_rate=args.drop,
            drop_path_rate=args.drop_path,
            drop_block_rate=args.drop_block,
            global_pool=args.gp,
            bn_momentum=args.bn_momentum,
            bn_eps=args.bn_eps,
            scriptable=args.torchscript,
            checkpoint_path=args.initial_checkpoint,
        )
    )


def create_for_inference(args: Namespace, **more: Any) -> Any:
    """Calls what validate.py calls and, with ``checkpoint_path``, what inference.py calls."""
    return timm.create_model(
        **resolve_model_input_args(
            args.model, vars(args), pretrained=args.pretrained, num_classes=args.num_classes, **more
        )
    )


def test_timms_scripts_train_and_validate(tmp_path: Path) -> None:
    args = script_arguments(model="lam_vit_micro", num_classes=3)
    model = create_for_training(args)
    model.set_grad_checkpointing(enable=True)
    model.get_classifier().weight.data.mul_(0.5)
    assert resolve_data_config(vars(args), model=model)["input_size"] == (3, 32, 32)
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args))
    ema = ModelEmaV3(model)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model(torch.randn(4, *IMAGE.shape[1:])).square().mean().backward()
    optimizer.step()
    ema.update(model)
    assert [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])] == []
    saver = CheckpointSaver(model, optimizer, args=args, model_ema=ema, checkpoint_dir=tmp_path, recovery_dir=tmp_path)
    saver.save_checkpoint(0, 1.0)
    file = str(tmp_path / "model_best.pth.tar")

    args = script_arguments(model="lam_vit_micro", num_classes=3, pretrained=False)
    validated = create_for_inference(args, global_pool=args.gp, scriptable=args.torchscript)
    load_checkpoint(validated, file, use_ema=False)
    assert same_output(validated, model)
    assert resolve_input_data_config(validated, vars(args), use_test_size=True)["crop_pct"] == 1.0
    assert same_output(create_for_inference(args, checkpoint_path=file), ema.module)  # timm prefers the averages
    assert same_output(
        lamzoo.create_model("lam_vit_micro", num_classes=3, checkpoint_path=file, allow_pickle=True), ema
    )

    lamzoo.save_pretrained(validated, tmp_path / "saved")
    args = script_arguments(model=f"local-dir:{tmp_path / 'saved'}")
    assert same_output(create_for_inference(args, global_pool=None, scriptable=False), model)


def test_timms_scripts_adapt_size_and_channels() -> None:
    args = script_arguments(model="lam_vit_micro.cifar10", img_size=48, in_chans=1)
    model = create_for_inference(args)
    config = resolve_input_data_config(model, vars(args), use_test_size=True)
    assert (config["input_size"], len(config["mean"])) == ((1, 48, 48), 1)
    assert model(torch.zeros(2, 1, 48, 48)).shape == (2, 10)


ROOT = Path(__file__).resolve().parents[2]


def test_torch_hub_has_every_model() -> None:
    model = torch.hub.load(str(ROOT), "lam_vit_micro", source="local", pretrained=True)
    assert same_output(model, lamzoo.create_model("lam_vit_micro", pretrained=True))
    tagged = torch.hub.load(str(ROOT), "create_model", "lam_vit_micro.cifar10", source="local", num_classes=3)
    assert tagged.num_classes == 3
    hub = runpy.run_path(str(ROOT / "hubconf.py"))
    assert {name for name, value in hub.items() if callable(value) and not name.startswith("_")} == {
        *lamzoo.list_models(), "create_model", "list_models",
    }  # fmt: skip
    assert "a mask in each layer" in hub["lam_vit_base"].__doc__
