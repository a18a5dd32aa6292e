"""What timm promises of its image models, of the zoo's: timm runs the same checks on its own (tests/test_models.py)."""

from __future__ import annotations

from fnmatch import fnmatch

import pytest
import torch
from timm.models import FeatureInfo, get_notrace_functions, get_notrace_modules
from timm.models._manipulate import group_parameters
from torch import Tensor
from torch.testing import assert_close
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import lamzoo
from lamzoo.errors import ConfigError, ExportError

NAMES = [name for name in lamzoo.list_models(family="lam_vit") if lamzoo.model_info(name).task == "classification"]


def size_of(name: str) -> tuple[int, ...]:
    return tuple(lamzoo.get_pretrained_cfg(name).input_size)


def of(names: list[str]) -> pytest.MarkDecorator:
    marked = [pytest.param(name, marks=() if name == "lam_vit_micro" else pytest.mark.slow) for name in names]
    return pytest.mark.parametrize("name", marked)


every_model = of(NAMES)  # on the meta device
models = of([name for name in NAMES if lamzoo.model_info(name).params < 30e6])  # ViT-B and ViT-L take minutes


def images(name: str, batch: int = 2) -> Tensor:
    return torch.randn(batch, *size_of(name))


@models
def test_forward_is_the_same_with_gradient_checkpointing_and_in_its_two_halves(name: str) -> None:
    model, x = lamzoo.create_model(name).eval(), images(name)
    with torch.no_grad():
        logits = model(x)
        features = model.forward_features(x)
        assert_close(model.forward_head(features), logits)
        last, intermediates = model.forward_intermediates(x)
        assert_close(last, features)
    info = FeatureInfo(model.feature_info, len(intermediates))
    assert [each.shape[1] for each in intermediates] == info.channels()
    assert [size_of(name)[1] // each.shape[2] for each in intermediates] == info.reduction()
    assert features.shape[-1] == model.num_features
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    model.set_grad_checkpointing()
    assert_close(model(x), logits)


@models
def test_backward_reaches_every_parameter(name: str) -> None:
    model = lamzoo.create_model(name, num_classes=42).train()
    logits = model(images(name))
    logits.mean().backward()
    assert logits.shape == (2, 42)
    assert [key for key, parameter in model.named_parameters() if parameter.grad is None] == []


@every_model
def test_the_classifier_is_where_the_record_says_and_is_replaced_in_place(name: str) -> None:
    with torch.device("meta"):
        model = lamzoo.create_model(name)
    cfg, keys = model.pretrained_cfg, model.state_dict().keys()
    assert {f"{cfg['classifier']}.weight", f"{cfg['first_conv']}.weight"} <= keys
    assert model.get_classifier() is model.get_submodule(cfg["classifier"])
    model.to(torch.float64).requires_grad_(False)
    model.reset_classifier(0)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model(torch.empty(2, *size_of(name), device="meta", dtype=torch.float64)).shape == (2, model.num_features)
    model.reset_classifier(7)
    assert (model.num_classes, model.get_classifier().weight.dtype) == (7, torch.float64)
    assert lamzoo.create_model(name, num_classes=0, device="meta").num_classes == 0


@every_model
def test_names_of_parameters_are_those_of_groups_and_weight_decay(name: str) -> None:
    model = lamzoo.create_model(name, device="meta", dtype=torch.bfloat16)
    names = [key for key, _ in model.named_parameters()]
    assert len(set(group_parameters(model, model.group_matcher(coarse=False), reverse=True).values())) > 1
    unused = {each for each in model.no_weight_decay() if not any(fnmatch(key, each) for key in names)}
    assert unused <= {"cls_token", "dist_token", "reg_token"}
    tensors = [*model.parameters(), *model.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {torch.bfloat16}


@every_model
def test_an_argument_that_the_model_does_not_take_is_a_type_error(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} takes no argument 'not_an_argument'"):
        lamzoo.create_model(name, device="meta", not_an_argument=1)


@models
def test_features_only_gives_the_maps_of_the_whole_model(name: str) -> None:
    torch.manual_seed(0)
    features = lamzoo.create_model(name, features_only=True).eval()
    torch.manual_seed(0)
    model, x = lamzoo.create_model(name).eval(), images(name)
    model.load_state_dict({key.removeprefix("model."): value for key, value in features.state_dict().items()}, False)
    with torch.no_grad():
        maps = features(x)
        expected = model.forward_intermediates(x, indices=3, intermediates_only=True)
    assert features.feature_info.channels() == [each.shape[1] for each in maps]
    assert features.feature_info.reduction() == [size_of(name)[1] // each.shape[2] for each in maps]
    for ours, theirs in zip(maps, expected, strict=True):
        assert_close(ours, theirs)


@models
def test_symbolic_traces_run_and_train_as_the_model_does(name: str) -> None:
    model, x = lamzoo.create_model(name, num_classes=5), images(name)
    tracer = {"leaf_modules": get_notrace_modules(), "autowrap_functions": get_notrace_functions()}
    _, nodes = get_graph_node_names(model, tracer_kwargs=tracer)
    traced = create_feature_extractor(model, [nodes[-1]], tracer_kwargs=tracer)
    traced.train()
    traced(x)[nodes[-1]].mean().backward()
    assert [key for key, parameter in traced.named_parameters() if parameter.grad is None] == []
    model.eval()
    traced.eval()
    with torch.no_grad():
        assert_close(traced(x)[nodes[-1]], model(x))


@models
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")
def test_scripting_works_without_masks_and_is_refused_with_a_way_out_with_them(name: str) -> None:
    model, x = lamzoo.create_model(name).eval(), images(name)
    if model.lam_config is None:
        with torch.no_grad():
            assert_close(torch.jit.script(model)(x), model(x))
        return
    with pytest.raises(ExportError, match=r"torch\.jit\.script, which torch deprecates.*use torch\.export"):
        torch.jit.script(model)


@pytest.mark.parametrize("feature_cls", ["getter", "hook"])
def test_features_of_a_wrapper_of_timms_have_the_weights(feature_cls: str) -> None:
    features = lamzoo.create_model("lam_vit_micro", pretrained=True, features_only=True, feature_cls=feature_cls)
    model, x = lamzoo.create_model("lam_vit_micro", pretrained=True).eval(), images("lam_vit_micro")
    with torch.no_grad():
        first = features.eval()(x)[0]
        if feature_cls == "hook":  # tokens, which timm doesn't arrange as a map
            first = first.transpose(1, 2).unflatten(2, (8, 8))
        assert_close(first, model.forward_intermediates(x, indices=[1], norm=False, intermediates_only=True)[0])


def test_feature_graphs_are_refused_with_a_way_out() -> None:
    with pytest.raises(ConfigError, match="use feature_cls='getter', or create the whole model and call"):
        lamzoo.create_model("lam_vit_micro", features_only=True, feature_cls="fx", depth=4, embed_dim=16)
