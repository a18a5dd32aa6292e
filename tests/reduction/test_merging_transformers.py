"""What merge_tokens promises of the vision transformers of Hugging Face transformers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.testing import assert_close

transformers = pytest.importorskip("transformers", reason="the extra transformers")

import lamzoo  # noqa: E402
from lamzoo import LamConfig, add_lam, merge_tokens, remove_reduction  # noqa: E402
from lamzoo.errors import UnsupportedHostError  # noqa: E402
from lamzoo.reduction.stacks import find_stack  # noqa: E402

_SMALL = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
_IMAGE = _SMALL | {"image_size": 32, "patch_size": 8}
_CLIP = {"text_config": _SMALL | {"vocab_size": 40}, "vision_config": _IMAGE, "projection_dim": 8}

# Model class to its configuration, on 4 x 4 patches or, of clips, on 4 x 2 x 2.
MODELS: dict[str, Callable[[], Any]] = {
    "ViTModel": lambda: transformers.ViTConfig(**_IMAGE),
    "ViTForImageClassification": lambda: transformers.ViTConfig(**_IMAGE, num_labels=5),
    "DeiTForImageClassification": lambda: transformers.DeiTConfig(**_IMAGE, num_labels=5),
    "ViTMSNModel": lambda: transformers.ViTMSNConfig(**_IMAGE),
    "IJepaModel": lambda: transformers.IJepaConfig(**_IMAGE),
    "Dinov2Model": lambda: transformers.Dinov2Config(**_IMAGE),
    "Dinov2ForImageClassification": lambda: transformers.Dinov2Config(**_IMAGE, num_labels=5),
    "Dinov2WithRegistersModel": lambda: transformers.Dinov2WithRegistersConfig(**_IMAGE, num_register_tokens=2),
    "CLIPVisionModel": lambda: transformers.CLIPVisionConfig(**_IMAGE),
    "CLIPForImageClassification": lambda: transformers.CLIPConfig(**_CLIP, num_labels=5),
    "SiglipVisionModel": lambda: transformers.SiglipVisionConfig(**_IMAGE),
    "VideoMAEForVideoClassification": lambda: transformers.VideoMAEConfig(
        **_SMALL, image_size=16, patch_size=8, num_frames=8, tubelet_size=2, num_labels=5
    ),
    "VivitForVideoClassification": lambda: transformers.VivitConfig(
        **_SMALL, image_size=16, num_frames=8, tubelet_size=[2, 8, 8], num_labels=5
    ),
}
CONFIGS = [
    LamConfig(rank=3, init="paper"),
    LamConfig(rank=3, init="paper", keys="position", layers="single"),
    LamConfig(rank=3, init="paper", op="mul", layers="single"),
    LamConfig(rank=3, init="paper", keys="position"),
]
each_model = pytest.mark.parametrize("name", MODELS)
each_model_once = pytest.mark.parametrize(
    ("name", "masked"), [(name, index % 3 < 2) for index, name in enumerate(MODELS)]
)


def create(name: str, masked: bool = False) -> Any:
    model = copy.deepcopy(_built(name))
    return add_lam(model, CONFIGS[list(MODELS).index(name) % 4]) if masked else model


@cache
def _built(name: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, name)(MODELS[name]()).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.3)
            elif "lambda" in key:
                parameter.fill_(0.5)
    return model


def inputs(name: str) -> Tensor:
    shape = (2, 8, 3, 16, 16) if "Video" in name else (2, 3, 32, 32)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def run(model: Any, x: Tensor, **kwargs: Any) -> Tensor:
    outputs = model(pixel_values=x, **kwargs)
    found: Tensor = outputs["logits" if "logits" in outputs else "last_hidden_state"]
    return found


def stack_of(model: nn.Module) -> Any:
    return find_stack(model, masked=False, verb="merged")


@each_model
def test_equal_patches_merge_without_loss(name: str) -> None:
    """Patches that are equal in pairs: half of them are gone after the first layer."""
    model, x = create(name), inputs(name)
    if list(MODELS).index(name) % 2:
        add_lam(model, LamConfig(rank=3, init="paper"))
    prefix = stack_of(model).layout.num_prefix_tokens

    def pair(block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        tokens = args[0]
        pairs = tokens[:, prefix::2].repeat_interleave(2, dim=1)
        return (torch.cat([tokens[:, :prefix], pairs], dim=1), *args[1:])

    next(iter(stack_of(model).blocks.values())).register_forward_pre_hook(pair)
    before = run(model, x)
    merge_tokens(model, keep=0.5, at=(0,))
    assert_close(run(model, x), before, atol=1e-5, rtol=1e-5)


@each_model_once
def test_merging_changes_the_output_keeping_all_does_not_and_removing_restores_the_model(
    name: str, masked: bool
) -> None:
    model, x = create(name, masked), inputs(name)
    before, keys, classes = run(model, x), list(model.state_dict()), [type(module) for module in model.modules()]
    assert_close(run(merge_tokens(model, keep=1), x), before, atol=1e-5, rtol=1e-5)
    merge_tokens(model, keep=0.4)
    after = run(model, x)
    assert after.shape == before.shape
    assert not torch.allclose(after, before, atol=1e-4)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(other, x), after)
    assert list(model.state_dict()) == keys
    remove_reduction(model)
    assert torch.equal(run(model, x), before)
    assert [type(module) for module in model.modules()] == classes


@each_model_once
def test_gradient_checkpointing_changes_no_gradient(name: str, masked: bool) -> None:
    model, x = merge_tokens(create(name, masked), keep=0.4).train(), inputs(name)
    gradients = []
    for checkpoints in (False, True):
        if checkpoints:
            model.activation_checkpointing_enable()
        model.zero_grad()
        run(model, x).square().sum().backward()
        gradients.append([each.grad for each in model.parameters() if each.grad is not None])
    assert_close(*gradients)


# Parts of names in transformers to those in timm.
_NAMES = {
    "embeddings.cls_token": "cls_token", "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj", "embeddings.class_embedding": "cls_token",
    "embeddings.position_embedding.weight": "pos_embed", "embeddings.patch_embedding.": "patch_embed.proj.",
    "pre_layrnorm": "norm_pre", "post_layernorm": "norm", "encoder.layers": "blocks", "encoder.layer": "blocks",
    "layers": "blocks", "layernorm_before": "norm1", "layernorm_after": "norm2", "layer_norm1": "norm1",
    "layer_norm2": "norm2", "layernorm": "norm", "self_attn": "attn", "attention": "attn", "o_proj": "proj",
    "out_proj": "proj", "layer_scale1.lambda1": "ls1.gamma", "layer_scale2.lambda1": "ls2.gamma", "vit.": "",
    "classifier": "head",
}  # fmt: skip


def timms(model: Any) -> nn.Module:
    """Returns timm's model with the weights of one of transformers."""
    config = model.config
    kinds = [name for name in ("CLIP", "Dino", "Siglip", "For") if name in type(model).__name__]
    acts = {"quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh"}
    twin = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=16, depth=3, num_heads=2, mlp_ratio=4 if "Dino" in kinds else 1.5,
        norm_layer=partial(nn.LayerNorm, eps=config.layer_norm_eps), act_layer=acts.get(config.hidden_act, "gelu"),
        pre_norm="CLIP" in kinds, class_token="Siglip" not in kinds, init_values=0.5 if "Dino" in kinds else None,
        num_classes=5 if "For" in kinds else 0, global_pool="token" if "For" in kinds else "",
    ).eval()  # fmt: skip
    state: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        state[_timms_key(key)] = value
    for key in [key for key in state if ".q_proj." in key]:
        parts = [state.pop(key.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")]
        state[key.replace("q_proj", "qkv")] = torch.cat(parts)
    own = twin.state_dict()
    twin.load_state_dict({key: state[key].reshape(value.shape) for key, value in own.items()})
    return twin


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize(
    "name", ["ViTModel", "ViTForImageClassification", "Dinov2Model", "CLIPVisionModel", "SiglipVisionModel"]
)
def test_the_same_tokens_merge_as_in_timms_model_of_the_same_weights(name: str, masked: bool) -> None:
    ours = create(name)
    theirs = timms(ours)
    if masked:
        for model in (ours, theirs):
            add_lam(model, CONFIGS[1])
        state = {_timms_key(key): value for key, value in lamzoo.lam_state_dict(ours).items()}
        lamzoo.load_lam_state_dict(theirs, state, config=CONFIGS[1])
    x = inputs(name)
    for keep in (1.0, 0.4):
        for model in (ours, theirs):
            merge_tokens(model, keep=keep)
        found = run(ours, x)
        if name == "CLIPVisionModel":  # whose output has no norm
            found = ours.post_layernorm(found)
        assert_close(found, theirs(x), atol=1e-5, rtol=1e-5)


def _timms_key(key: str) -> str:
    for old, new in _NAMES.items():
        key = key.replace(old, new)
    return key


def test_every_hidden_state_has_the_tokens_of_the_host() -> None:
    model, x = create("ViTForImageClassification"), inputs("ViTForImageClassification")
    model(x, output_hidden_states=True)  # registers the hooks by which transformers records them
    merge_tokens(model, keep=0.4)
    outputs = model(x, output_hidden_states=[1, 3])
    assert [None if each is None else each.shape for each in outputs.hidden_states] == [
        None, (2, 17, 16), None, (2, 17, 16),
    ]  # fmt: skip
    assert_close(outputs.logits, model(x).logits)
    normed = model.vit.layernorm(outputs.hidden_states[3])
    assert_close(model.classifier(normed[:, 0]), outputs.logits)
    for wanted in (True, [-4], -4):
        with pytest.raises(UnsupportedHostError, match=r"input of the first block.*output_hidden_states=\[2, 3\]"):
            model(x, output_hidden_states=wanted)


def test_a_model_masked_in_part_computes_and_is_not_merged() -> None:
    model, x = create("ViTModel"), inputs("ViTModel")
    before = run(model, x)
    add_lam(model.layers[1], CONFIGS[0])
    assert not torch.allclose(run(model, x), before, atol=1e-4)
    with pytest.raises(UnsupportedHostError, match=r"in layers: masks were added to some of its blocks.*on the whole"):
        merge_tokens(model, keep=0.5)
    assert torch.equal(run(lamzoo.remove_lam(model), x), before)


def test_an_attention_mask_of_all_tokens_is_refused() -> None:
    model, x = merge_tokens(create("ViTModel"), keep=0.5), inputs("ViTModel")
    mask = torch.ones(2, 17, dtype=torch.long)
    mask[0, 3] = 0
    with pytest.raises(UnsupportedHostError, match="ViTLayer while it is called with argument 2"):
        model(x, attention_mask=mask)


def test_the_image_tower_of_a_clip_model_is_merged_and_its_text_tower_is_not() -> None:
    torch.manual_seed(0)
    model: Any = transformers.CLIPModel(transformers.CLIPConfig(**_CLIP)).eval()
    x, text = inputs("CLIPVisionModel"), {"input_ids": torch.randint(3, 39, (2, 6))}
    add_lam(model, CONFIGS[0])
    with torch.no_grad():
        image, words = model.get_image_features(x).pooler_output, model.get_text_features(**text).pooler_output
        merge_tokens(model, keep=0.4)
        assert not torch.allclose(model.get_image_features(x).pooler_output, image, atol=1e-5)
        assert torch.equal(model.get_text_features(**text).pooler_output, words)


def test_weights_of_merged_tokens_are_recorded() -> None:
    model, x = create("Dinov2WithRegistersModel", True), inputs("ViTModel")
    model.set_attn_implementation("eager")
    merge_tokens(model, keep=0.5)
    weights = model(x, output_attentions=True).attentions
    with lamzoo.capture_masks(model) as records:
        model(x)
    for found, record in zip(weights, records.values(), strict=True):
        assert_close(found, record.attention)
        assert_close(found.sum(-1), torch.ones(found.shape[:-1]))
    assert weights[0].shape == (2, 2, 17, 19)  # of 16 patches and three prefix tokens
