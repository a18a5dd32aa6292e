"""Models in wrappers, of torch.compile, data parallelism and FSDP: looked through, or refused in a sentence."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lamzoo
from lamzoo.adapters.wrappers import full_state_dict, is_sharded, unwrap
from lamzoo.errors import ConfigError, UnsupportedHostError
from lamzoo.evaluation import evaluate, predict
from lamzoo.evaluation.classification.prediction import label_names
from lamzoo.evaluation.runtime import data_config
from lamzoo.export import ExportedModel
from lamzoo.lam.fused import pinned_form
from lamzoo.models.describer.model import describer
from lamzoo.profiling import best_batch, measure, time_latency
from lamzoo.report import (
    explore,
    explore_description,
    explore_image,
    explore_moments,
    explore_query,
    explore_retrieval,
    explore_video,
    explore_window,
)
from lamzoo.report.paper_figure import figure_image
from lamzoo.weights import load_into

IMAGE = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
Wrap = Callable[[nn.Module], nn.Module]


def create(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = lamzoo.create_model("lam_vit_micro", img_size=16, embed_dim=16, depth=2, num_heads=2, num_classes=10)
    with torch.no_grad():
        for parameter in lamzoo.lam_parameters(model):
            parameter.normal_(std=0.1)
    return model.eval()


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


def compiled_blocks(model: Any) -> nn.Module:
    for index, block in enumerate(model.blocks):
        model.blocks[index] = compiled(block)
    return model


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def fsdp2(model: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def fsdp1(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, device_id=torch.device("cpu"))


@pytest.fixture(scope="module", autouse=True)
def _one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


every = pytest.mark.parametrize(
    "wrap",
    [compiled, compiled_blocks, nn.DataParallel, ddp, lambda model: compiled(ddp(model)), fsdp2],
    ids=["compiled", "compiled blocks", "DataParallel", "DDP", "compiled DDP", "FSDP2"],
)
distributed = pytest.mark.parametrize("wrap", [ddp, fsdp2])


@every
def test_a_wrapped_model_is_saved_as_the_model_itself(wrap: Wrap, tmp_path: Path) -> None:
    lamzoo.save_pretrained(create(), tmp_path / "bare")
    lamzoo.save_pretrained(wrap(create()), tmp_path / "wrapped")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "wrapped" / name).read_bytes() == (tmp_path / "bare" / name).read_bytes()


@every
def test_masks_have_the_models_own_keys_and_load_from_and_into_a_wrapper(wrap: Wrap) -> None:
    bare, wrapped = create(), wrap(create(seed=1))
    state = lamzoo.lam_state_dict(bare)
    lamzoo.load_lam_state_dict(wrapped, state)
    got = lamzoo.lam_state_dict(wrapped)
    assert got.keys() == state.keys()
    assert all(torch.equal(got[key], value) for key, value in state.items())
    again = create(seed=2)
    lamzoo.load_lam_state_dict(again, got)
    assert all(torch.equal(value, state[key]) for key, value in lamzoo.lam_state_dict(again).items())


@every
def test_masks_of_a_wrapped_model_are_saved_loaded_and_switched_as_those_of_the_model_itself(
    wrap: Wrap, tmp_path: Path
) -> None:
    bare = lamzoo.save_lam(create(), tmp_path / "bare", also=["head"])
    wrapped = lamzoo.save_lam(wrap(create()), tmp_path / "wrapped", also=["head"])
    for name in ("lam_config.json", "lam_model.safetensors"):
        assert (wrapped / name).read_bytes() == (bare / name).read_bytes()
    model = lamzoo.load_lam(wrap(create(seed=1)), bare, name="saved")
    state = lamzoo.lam_state_dict(create())
    for name, same in (("default", False), ("saved", True)):
        got = lamzoo.lam_state_dict(lamzoo.set_lam(model, name))
        assert all(torch.equal(got[key], value) for key, value in state.items()) is same
        assert torch.equal(full_state_dict(model)["head.weight"], create(seed=not same).head.weight)


@distributed
def test_masks_of_another_configuration_are_not_loaded_into_a_distributed_model(wrap: Wrap, tmp_path: Path) -> None:
    lamzoo.save_lam(additive(), tmp_path)
    model = wrap(create())
    for use in (lambda: lamzoo.load_lam(model, tmp_path), lambda: lamzoo.set_lam(model, None)):
        with pytest.raises(UnsupportedHostError, match="add or remove masks before that"):
            use()


def test_masks_saved_with_the_keys_of_a_wrapper_still_load() -> None:
    state = lamzoo.lam_state_dict(create())
    for prefix in ("module.", "_orig_mod.", "_orig_mod.module."):
        model = create(seed=1)
        lamzoo.load_lam_state_dict(model, {prefix + key: value for key, value in state.items()})
        assert all(torch.equal(value, state[key]) for key, value in lamzoo.lam_state_dict(model).items())


@every
def test_a_wrapped_model_costs_what_the_model_itself_does(wrap: Wrap) -> None:
    assert lamzoo.profile(wrap(create())).gmacs == lamzoo.profile(create()).gmacs


@pytest.mark.parametrize("wrap", [compiled, nn.DataParallel, ddp, fsdp2])
def test_a_wrapped_model_is_pruned_and_captured_as_the_model_itself(wrap: Wrap) -> None:
    bare, wrapped = create(), wrap(create())
    assert lamzoo.prune_tokens(wrapped, 0.3, at=(0,)) is wrapped
    lamzoo.prune_tokens(bare, 0.3, at=(0,))
    assert unwrap(wrapped).prune_config == bare.prune_config
    with torch.no_grad(), lamzoo.capture_masks(wrapped) as masks:
        assert torch.allclose(wrapped(IMAGE), bare(IMAGE), atol=1e-6)
    assert list(masks) == ["blocks.0.attn", "blocks.1.attn"]


@pytest.mark.parametrize("wrap", [pytest.param(compiled, marks=pytest.mark.slow), nn.DataParallel, ddp, fsdp2])
def test_tokens_of_a_wrapped_model_merge_as_those_of_the_model_itself(wrap: Wrap) -> None:
    bare, wrapped = create(), wrap(create())
    for keep in (0.5, 0.25):  # a compiled model notices
        lamzoo.merge_tokens(bare, keep=keep)
        assert lamzoo.merge_tokens(wrapped, keep=keep) is wrapped
        assert unwrap(wrapped).token_reduction == bare.token_reduction
        with torch.no_grad():
            assert torch.allclose(wrapped(IMAGE), bare(IMAGE), atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(lamzoo.remove_reduction(wrapped)(IMAGE), create()(IMAGE), atol=1e-6)


def test_tokens_of_a_plain_model_merge_before_it_is_sharded() -> None:
    model = fsdp2(lamzoo.remove_lam(create()))
    with pytest.raises(UnsupportedHostError, match="sharded by FSDP, and merging replaces its attention layers"):
        lamzoo.merge_tokens(model, keep=0.5)
    model = lamzoo.merge_tokens(lamzoo.remove_lam(create()), keep=0.5)
    with torch.no_grad():
        expected = model(IMAGE)
        assert torch.allclose(fsdp2(model)(IMAGE), expected, atol=1e-6)


def test_a_sharded_describer_without_masks_does_not_merge() -> None:
    from torch.distributed.fsdp import fully_shard

    sizes: dict[str, Any] = {"width": 8, "heads": 2, "encoder_layers": 2, "text_layers": 1, "decoder_layers": 1}
    model = describer({"features": {"audio": 4}, "vocabulary": ["bin"], **sizes}, lam=None)
    with pytest.raises(UnsupportedHostError, match="sharded by FSDP, and merging replaces its attention layers"):
        lamzoo.merge_tokens(fully_shard(model), keep=0.5)
    assert not any(module._forward_hooks for module in model.encoder.layers)


@pytest.mark.slow
def test_a_wrapped_model_is_exported_as_the_model_itself(tmp_path: Path) -> None:
    lamzoo.export_model(compiled(ddp(create())), tmp_path / "m.pt2", images=IMAGE)
    with torch.no_grad():
        assert torch.allclose(lamzoo.load_exported(tmp_path / "m.pt2")(IMAGE), create()(IMAGE), atol=1e-5)


def test_a_sharded_model_is_not_exported(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="sharded by FSDP; save it with save_pretrained"):
        lamzoo.export_model(fsdp2(create()), tmp_path / "m.pt2")


def test_a_sharded_model_is_not_fused() -> None:
    with pytest.raises(UnsupportedHostError, match="sharded by FSDP, and its fused form would copy whole weights"):
        lamzoo.fuse(fsdp2(additive()))


@pytest.mark.parametrize("wrap", [nn.DataParallel, ddp, fsdp2])
def test_a_fused_model_can_be_wrapped(wrap: Wrap) -> None:
    model = additive().eval()
    with torch.no_grad(), pinned_form(True):
        expected = model(IMAGE)
        assert torch.allclose(wrap(lamzoo.fuse(model))(IMAGE), expected, atol=5e-6)


def additive() -> nn.Module:
    return lamzoo.add_lam(lamzoo.remove_lam(create()), lamzoo.LamConfig(init="paper", rank=3))


@pytest.mark.parametrize("wrap", [pytest.param(compiled, marks=pytest.mark.slow), nn.DataParallel])
def test_masks_come_into_a_wrapped_model_and_out_of_it(wrap: Wrap) -> None:
    plain = lamzoo.remove_lam(create())
    with torch.no_grad():
        expected = plain(IMAGE)
        wrapped = wrap(plain)
        wrapped(IMAGE)
        lamzoo.add_lam(wrapped, lamzoo.LamConfig(init="paper"))
        assert plain.lam_config == lamzoo.LamConfig(init="paper")
        assert not torch.allclose(wrapped(IMAGE), expected)
        lamzoo.remove_lam(wrapped)
        assert torch.equal(wrapped(IMAGE), expected)


@distributed
def test_a_distributed_model_gets_no_parameters_that_nothing_synchronises(wrap: Wrap) -> None:
    with pytest.raises(UnsupportedHostError, match="add or remove masks before that"):
        lamzoo.add_lam(wrap(lamzoo.remove_lam(create())))
    with pytest.raises(UnsupportedHostError, match="add or remove masks before that"):
        lamzoo.remove_lam(wrap(create()))


def test_a_model_with_compiled_parts_gets_no_masks() -> None:
    with pytest.raises(
        UnsupportedHostError,
        match=r"blocks\.0 of the model \(timm\..*\.VisionTransformer\) is compiled",
    ):
        lamzoo.add_lam(compiled_blocks(lamzoo.remove_lam(create())))


def test_a_sharded_model_is_recognised_without_its_state_dict() -> None:
    def fail(*_: object) -> None:
        raise AssertionError("a state dict was built")

    models = {wrap: wrap(create()) for wrap in (fsdp2, ddp, nn.DataParallel)}
    for model in models.values():
        model.register_state_dict_pre_hook(fail)
        with torch.no_grad():
            model(IMAGE)  # after which the parameters of FSDP2's root module are gathered
    assert [is_sharded(unwrap(model)) for model in models.values()] == [True, False, False]


def test_fsdp1_is_refused_in_one_sentence(tmp_path: Path) -> None:
    model = fsdp1(create())
    uses: list[Callable[[nn.Module], object]] = [
        lamzoo.lam_state_dict,
        lamzoo.profile,
        lambda it: list(lamzoo.lam_parameters(it)),
        lambda it: lamzoo.save_pretrained(it, tmp_path / "m"),
        lambda it: lamzoo.export_model(it, tmp_path / "m.pt2"),
    ]
    for use in uses:
        with pytest.raises(UnsupportedHostError, match="fully_shard, or the model before it was wrapped"):
            use(model)


def test_the_metadata_of_a_state_dict_is_unwrapped_with_its_keys() -> None:
    state = full_state_dict(compiled_blocks(create()))
    assert "blocks.0.attn.lam" in state._metadata  # type: ignore[attr-defined]
    assert state.keys() == create().state_dict().keys()


@pytest.mark.parametrize("wrap", [compiled, nn.DataParallel])
def test_a_wrapped_model_is_preprocessed_for_as_the_model_itself(wrap: Wrap) -> None:
    model = lamzoo.create_model("lam_vit_micro.cifar10", pretrained=True)
    assert data_config(wrap(model)) == data_config(model)
    assert label_names(wrap(model)) == label_names(model)


# Functions with a model as their first argument, called with another thing.
TAKES_A_MODEL: dict[str, Callable[[Any], object]] = {
    "add_lam": lamzoo.add_lam,
    "best_batch": best_batch,
    "capture_masks": lambda model: lamzoo.capture_masks(model).__enter__(),
    "evaluate": lambda model: evaluate(model, None),  # type: ignore[arg-type]
    "explore": lambda model: explore(model, (), "page.html"),
    "explore_description": lambda model: explore_description(model, None, None, "page.html"),  # type: ignore[arg-type]
    "explore_image": lambda model: explore_image(model, "photo.png", "page.html"),
    "explore_moments": lambda model: explore_moments(model, None, None, "page.html"),  # type: ignore[arg-type]
    "explore_query": lambda model: explore_query(model, None, None, "page.html"),  # type: ignore[arg-type]
    "explore_retrieval": lambda model: explore_retrieval(model, None, None, "page.html"),  # type: ignore[arg-type]
    "explore_video": lambda model: explore_video(model, "film.mp4", "a dog", "page.html"),
    "explore_window": lambda model: explore_window(model, None, None, "page.html"),  # type: ignore[arg-type]
    "export_model": lambda model: lamzoo.export_model(model, "model.pt2"),
    "figure_image": lambda model: figure_image(model, "photo.png", "masks.pdf"),
    "fuse": lamzoo.fuse,
    "lam_parameters": lambda model: list(lamzoo.lam_parameters(model)),
    "lam_state_dict": lamzoo.lam_state_dict,
    "load_into": lambda model: load_into(model, {}, source="weights"),
    "load_lam": lambda model: lamzoo.load_lam(model, "folder"),
    "load_lam_state_dict": lambda model: lamzoo.load_lam_state_dict(model, {}),
    "measure": measure,
    "merge_tokens": lambda model: lamzoo.merge_tokens(model, keep=0.5),
    "predict": lambda model: predict(model, []),
    "profile": lamzoo.profile,
    "prune_tokens": lambda model: lamzoo.prune_tokens(model, 0.5),
    "pruning_loss": lamzoo.pruning_loss,
    "remove_lam": lamzoo.remove_lam,
    "remove_pruning": lamzoo.remove_pruning,
    "remove_reduction": lamzoo.remove_reduction,
    "save_lam": lambda model: lamzoo.save_lam(model, "folder"),
    "save_pretrained": lambda model: lamzoo.save_pretrained(model, "folder"),
    "set_lam": lambda model: lamzoo.set_lam(model, None),
    "time_latency": lambda model: time_latency(model, IMAGE),
    "unfuse": lamzoo.unfuse,
}


@pytest.mark.parametrize("function", TAKES_A_MODEL)
@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            None,
            "The model is None, which is not a torch.nn.Module; pass a model, for example from lamzoo.create_model.",
        ),
        ("vit", "The model is 'vit', which is not a torch.nn.Module; pass lamzoo.create_model('vit')."),
        (lamzoo.LamConfig(), "The model is of class lamzoo.lam.config.LamConfig, which is not a torch.nn.Module; "),
        (nn.Linear, "The model is the class torch.nn.modules.linear.Linear; pass an instance of it."),
    ],
    ids=["none", "name", "config", "class"],
)
def test_what_is_not_a_model_is_refused_and_nothing_is_written(
    function: str, other: object, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnsupportedHostError, match=re.escape(message)):
        TAKES_A_MODEL[function](other)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("function", ["best_batch", "export_model", "measure", "profile", "save_pretrained"])
def test_an_exported_program_is_refused_where_the_model_is_needed(
    function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    program = ExportedModel(torch.flatten, {"pretrained_cfg": {"input_size": (3, 16, 16), "num_classes": 768}})
    with pytest.raises(UnsupportedHostError, match="ExportedModel.* has no parameters, as exp.*; pass the model that"):
        TAKES_A_MODEL[function](program)
    assert not list(tmp_path.iterdir())


def test_only_a_describer_describes_videos() -> None:
    for other in (None, lamzoo.LamConfig(), nn.Linear(1, 1)):
        with pytest.raises(UnsupportedHostError, match="does not generate captions; use a model of the family"):
            lamzoo.describe_video("none.mp4", other)  # type: ignore[arg-type]


def test_every_public_function_of_a_model_is_among_these() -> None:
    takes = {name for name in lamzoo.__all__ if "model" in getattr(lamzoo, name).__annotations__}
    assert takes - {"describe_video", "describe_videos", "index_videos"} <= TAKES_A_MODEL.keys()
