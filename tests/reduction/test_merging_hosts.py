"""What merge_tokens promises of every host that it supports; the table below lists them."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.testing import assert_close

import lamzoo
from lamzoo import LamConfig, add_lam, merge_tokens, prune_tokens, remove_reduction
from lamzoo.errors import ConfigError, UnsupportedHostError
from lamzoo.lam.unmasked import Unmasked
from lamzoo.reduction import plan
from lamzoo.reduction.stacks import find_stack
from tests.adapters.timm_hosts import HOSTS as TIMM_HOSTS
from tests.adapters.timm_hosts import Host as TimmHost

open_clip = pytest.importorskip("open_clip")

from open_clip.model import CLIP  # noqa: E402
from open_clip.timm_model import TimmModel  # noqa: E402
from open_clip.transformer import VisionTransformer  # noqa: E402

PATCHES = 16


@dataclass(frozen=True)
class Host:
    """A host of three blocks on a grid of 4 x 4 patches.

    Attributes:
        build: makes the model.
        size: image height and width.
        config: of its masks, where it has some.
        checkpointing: whether the library's own gradient checkpointing works.
    """

    build: Callable[[], nn.Module]
    size: int
    config: LamConfig
    checkpointing: bool = True

    def create(self, masked: bool) -> nn.Module:
        model = copy.deepcopy(_built(self))
        return add_lam(model, self.config) if masked else model

    def images(self, batch: int = 2) -> Tensor:
        return torch.randn(batch, 3, self.size, self.size, generator=torch.Generator().manual_seed(1))


@cache
def _built(host: Host) -> nn.Module:
    torch.manual_seed(0)
    return host.build().eval()


# Every kind of mask is some host's; those with position keys only where tokens have fixed positions.
CONFIGS = [
    LamConfig(rank=3, init="paper"),
    LamConfig(rank=3, init="paper", keys="position", layers="single"),
    LamConfig(rank=3, init="paper", op="add", layers="single"),
    LamConfig(rank=3, init="paper", op="add", keys="position"),
]


def _timm_host(index: int, name: str) -> Host:
    host = TIMM_HOSTS.get(name) or _FLEXIVIT
    config = CONFIGS[index % 4 if host.positions else 2 * (index % 2)]
    return Host(lambda: host.create(depth=3), host.size, config)


_SMALL = {"embed_dim": 24, "num_heads": 3, "num_classes": 5, "img_size": 32, "patch_size": 8}
_FLEXIVIT = TimmHost("flexivit_small", _SMALL)
_TIMM = [
    "deit_tiny_distilled_patch16_224",  # two prefix tokens
    "deit3_small_patch16_224",  # LayerScale
    "vit_small_patch14_reg4_dinov2",  # registers
    "vit_base_patch16_clip_224",  # a norm before the blocks
    "vit_base_patch16_siglip_224",  # attention pooling
    "vit_wee_patch16_reg1_gap_256",  # mean pooling
    "flexivit_small",
    "vit_tiny_patch16_224-qk_norm",
    "vit_tiny_r_s16_p8_224",  # a convolutional stem
    "eva_giant_patch14_224",  # biases of queries and values
    "eva02_tiny_patch14_224",  # rotary, separate projections
    "vit_small_patch16_rope_224",
    "vit_small_patch16_rope_mixed_224",  # other rotations in each block and head
    "vit_base_patch16_rope_reg1_gap_256",
    "vit_small_patch16_dinov3",
    "vit_pe_core_tiny_patch16_384",
    "vit_5b_patch16_sapiens2",  # grouped-query attention
    "naflexvit_base_patch16_gap",
    "naflexvit_base_patch16_siglip",
    "qwen3_vit_88m",  # without prefix tokens, whose output is a grid
    "deepseek_vit_412m",
]


def _tower(**kwargs: Any) -> VisionTransformer:
    options = {"image_size": 32, "patch_size": 8, "width": 16, "layers": 3, "heads": 4, "mlp_ratio": 2, "output_dim": 8}
    if kwargs.get("attentional_pool"):
        options |= {"attn_pooler_queries": 5, "attn_pooler_heads": 4}
    return VisionTransformer(**{**options, "ls_init_value": 0.5, **kwargs})


_CUSTOM = {"qk_norm": True, "scale_heads": True, "scale_attn_inner": True, "scale_attn": True, "scale_fc": True}
_OPEN_CLIP: dict[str, dict[str, Any]] = {
    "ViT": {},
    "ViT, mean": {"pool_type": "avg", "final_ln_after_pool": True},
    "ViT, custom blocks": _CUSTOM,
    "ViT, output_tokens": {"output_tokens": True},
    "CoCa": {"attentional_pool": True, "output_tokens": True},
    "CoCa, cascade": {"attentional_pool": "cascade", "output_tokens": True, "output_dim": 16},
}

HOSTS = {name: _timm_host(index, name) for index, name in enumerate(_TIMM)} | {
    f"open_clip {name}": Host(lambda kwargs=kwargs: _tower(**kwargs), 32, CONFIGS[index % 4], kwargs is not _CUSTOM)
    for index, (name, kwargs) in enumerate(_OPEN_CLIP.items())
}
each_host = pytest.mark.parametrize("name", HOSTS)
each_host_once = pytest.mark.parametrize(
    ("name", "masked"), [(name, index % 3 < 2) for index, name in enumerate(HOSTS)]
)
masked_or_not = pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def outputs(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    out = model(x)
    return out if isinstance(out, tuple) else (out,)


def from_features(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """Returns the output that the head makes of the features of every patch."""
    if not isinstance(model, VisionTransformer):
        features = getattr(model, "encoder", model).forward_features(x)
        assert features[0].numel() == (PATCHES + model.num_prefix_tokens) * model.num_features
        return (model.forward_head(features),)
    pooled, tokens = model._pool(model.transformer(model._embeds(x)))
    return (pooled @ model.proj, tokens) if model.output_tokens else (pooled @ model.proj,)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return list(find_stack(model, masked=False, verb="merged").blocks.values())


@each_host
@masked_or_not
def test_keeping_all_changes_nothing(name: str, masked: bool) -> None:
    model, x = HOSTS[name].create(masked), HOSTS[name].images()
    before = outputs(model, x)
    assert_close(outputs(merge_tokens(model, keep=1), x), before, atol=1e-5, rtol=1e-5)
    assert_close(from_features(model, x), before, atol=1e-5, rtol=1e-5)


@each_host
@masked_or_not
def test_the_output_is_the_head_of_the_features_of_every_patch(name: str, masked: bool) -> None:
    model, x = HOSTS[name].create(masked), HOSTS[name].images()
    before = outputs(model, x)
    merge_tokens(model, keep=0.4)
    after = outputs(model, x)
    assert_close(from_features(model, x), after, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(after[0], before[0], atol=1e-5)


@each_host
@masked_or_not
def test_equal_patches_merge_without_loss(name: str, masked: bool) -> None:
    """Patches that are equal in pairs, and have equal rotations: half of them are gone after the first layer."""
    model, x = HOSTS[name].create(False), HOSTS[name].images()
    if masked:
        add_lam(model, LamConfig(rank=3, init="paper", op=HOSTS[name].config.op))
    for index, block in enumerate(blocks_of(model)):
        block.register_forward_pre_hook(_EqualPairs(index == 0), with_kwargs=True)
    before = outputs(model, x)
    assert_close(outputs(merge_tokens(model, keep=0.5, at=(0,)), x), before, atol=1e-5, rtol=1e-5)


class _EqualPairs:
    """Forward pre-hook of a block: makes every second patch, or its rotation, that of the patch before."""

    def __init__(self, tokens: bool) -> None:
        self.tokens = tokens

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        tokens, *others = args
        if self.tokens:
            prefix = tokens.shape[1] - PATCHES
            tokens = torch.cat([tokens[:, :prefix], tokens[:, prefix::2].repeat_interleave(2, dim=1)], dim=1)
        if kwargs.get("rope") is not None:
            kwargs = {**kwargs, "rope": kwargs["rope"][..., ::2, :].repeat_interleave(2, dim=-2)}
        return (tokens, *others), kwargs


@each_host_once
def test_removing_gives_the_model_back(name: str, masked: bool) -> None:
    model, x = HOSTS[name].create(masked), HOSTS[name].images()
    before, keys, classes = outputs(model, x), list(model.state_dict()), [type(module) for module in model.modules()]
    merge_tokens(model, keep=0.5)
    assert list(model.state_dict()) == keys
    remove_reduction(model)
    assert all(map(torch.equal, outputs(model, x), before))
    assert [type(module) for module in model.modules()] == classes
    assert list(model.state_dict()) == keys


@each_host_once
def test_gradient_checkpointing_changes_no_gradient(name: str, masked: bool) -> None:
    if not HOSTS[name].checkpointing:
        pytest.skip("open_clip calls its custom blocks with too many arguments when it checkpoints them")
    model, x = merge_tokens(HOSTS[name].create(masked), keep=0.4).train(), HOSTS[name].images()
    gradients = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        torch.manual_seed(0)
        sum(output.square().sum() for output in (*outputs(model, x), *from_features(model, x))).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert_close(*gradients)


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "vit_small_patch16_rope_mixed_224"])
def test_a_merged_token_keeps_the_rotation_of_the_token_whose_place_it_takes(name: str) -> None:
    """Against a layer that rotates the merged tokens by hand."""
    model, x = merge_tokens(HOSTS[name].create(False), keep=0.5, at=(0,)), HOSTS[name].images()
    layer, seen = model.blocks[1].attn, {}
    layer.register_forward_pre_hook(lambda _, args, kwargs: seen.update(x=args[0], **kwargs), with_kwargs=True)
    layer.register_forward_pre_hook(lambda *_: seen.update(here=layer.lam.shared.current))
    layer.register_forward_hook(lambda _, args, out: seen.update(out=out))
    model(x)
    here, few, prefix = seen["here"], seen["x"], model.num_prefix_tokens
    places = here.token_map.kept[:, prefix:] - prefix
    rotation = torch.stack([seen["rope"].expand(layer.num_heads, -1, -1)[:, sample] for sample in places])
    assert rotation.shape[:3] == (2, layer.num_heads, PATCHES // 2)
    plain = layer.unwrap()
    sizes = here.sizes.log()[:, None, None, :]
    plain.fused_attn = True
    assert_close(plain(few, rope=rotation, attn_mask=sizes), seen["out"], atol=1e-5, rtol=1e-5)


def test_both_heads_of_a_distilled_model_are_those_of_the_features_of_every_patch() -> None:
    model = merge_tokens(HOSTS["deit_tiny_distilled_patch16_224"].create(False), keep=0.4).train()
    model.set_distilled_training()
    x = HOSTS["deit_tiny_distilled_patch16_224"].images()
    for head, from_all in zip(model(x), model.forward_head(model.forward_features(x)), strict=True):
        assert_close(head, from_all)


def test_the_pooling_may_change_after_merging() -> None:
    model, x = merge_tokens(HOSTS["deit3_small_patch16_224"].create(False), keep=0.4), images()
    model.reset_classifier(5, global_pool="avg")
    assert_close(model(x), model.forward_head(model.forward_features(x)))


def test_a_model_with_its_own_head_gets_every_patch() -> None:
    class Patches(timm.models.VisionTransformer):
        def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
            return x[:, 1:].mean(dim=1)

    model = merge_tokens(Patches(img_size=32, patch_size=8, embed_dim=16, depth=3, num_heads=2).eval(), keep=0.4)
    x = images()
    assert_close(model(x), model.forward_features(x)[:, 1:].mean(dim=1))


def _clip(text: nn.Module | None = None, **vision: Any) -> Any:
    torch.manual_seed(0)
    small = {"width": 16, "layers": 3}
    vision = {**small, "head_width": 4, "image_size": 32, "patch_size": 8, **vision}
    return CLIP(8, vision, {**small, "heads": 4, "vocab_size": 50, "context_length": 9}).eval()


@pytest.mark.parametrize("masked", ["", "visual", "transformer", "both"])
def test_the_image_tower_of_a_clip_model_is_merged_whatever_is_masked(masked: str) -> None:
    clip, x, text = _clip(), images(), torch.randint(1, 49, (2, 9))
    for part in {"": [], "both": [clip]}.get(masked, [getattr(clip, masked, clip)]):
        add_lam(part, LamConfig(rank=3, init="paper"))
    image, words = clip.encode_image(x), clip.encode_text(text)
    merge_tokens(clip, keep=0.4)
    assert not torch.allclose(clip.encode_image(x), image, atol=1e-5)
    assert_close(clip.visual.forward_intermediates(x)["image_features"], clip.encode_image(x))
    assert torch.equal(clip.encode_text(text), words)
    remove_reduction(clip)
    assert torch.equal(clip.encode_image(x), image)


def test_the_image_tower_is_found_beside_a_text_tower_of_transformers() -> None:
    text = open_clip.hf_model.HFTextEncoder.__new__(open_clip.hf_model.HFTextEncoder)  # its constructor downloads
    nn.Module.__init__(text)
    model = nn.ModuleDict({"visual": _tower(), "text": text})
    assert merge_tokens(model, keep=0.5) is model
    assert any(isinstance(module, Unmasked) for module in model["visual"].modules())


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224-qk_norm", "eva02_tiny_patch14_224"])
def test_a_trunk_of_timm_in_open_clip_is_merged(name: str) -> None:
    host = HOSTS[name]
    tower = TimmModel.__new__(TimmModel)  # its constructor takes no arguments for the trunk's size
    nn.Module.__init__(tower)
    tower.trunk, tower.head = host.create(False), nn.Identity()
    merge_tokens(tower, keep=0.4)
    every = tower.forward_intermediates(host.images(), normalize_intermediates=False)
    assert_close(every["image_features"], tower(host.images()))
    assert every["image_intermediates"][-1].shape[2:] == (4, 4)


def _timm(name: str, **kwargs: Any) -> nn.Module:
    return timm.create_model(name, **{**_SMALL, "num_heads": 2, "depth": 2, **kwargs})


def _batch_second() -> nn.Module:
    tower = _tower()
    tower.transformer.batch_first = False
    return tower


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: _timm("beit_base_patch16_224"), r"in blocks: timm.models.beit.Beit adds a bias for each pair"),
        (lambda: _timm("vit_srelpos_small_patch16_224"), r"VisionTransformerRelPos adds a bias for each pair"),
        (lambda: _timm("vit_base_patch16_xp_224"), r"blocks of .*ParallelScalingBlock, .*build it with one of these"),
        (lambda: _timm("vit_base_patch16_18x2_224"), r"blocks of .*ParallelThingsBlock, .*build it with one of these"),
        (lambda: _timm("vit_base_patch16_rpn_224", block_fn=_res_post()), r"blocks of .*ResPostBlock, .*prune_tokens"),
        (lambda: _timm("eva02_tiny_patch14_224", use_post_norm=True), r"blocks of .*EvaBlockPostNorm, .*prune_tokens"),
        (lambda: _timm("vit_dpwee_patch16_reg1_gap_256"), r"DiffParallelScalingBlock"),
        (lambda: _timm("vit_tiny_patch16_224", attn_layer="diff"), r"attention layers of .*DiffAttention; use "),
        (_batch_second, r"VisionTransformer takes tokens as \(N, B, C\); build .* batch_first=True"),
        (lambda: nn.ModuleList([_tower(), _timm("vit_tiny_patch16_224")]), r"blocks of .*, .*resblocks of .*; give"),
        (
            lambda: nn.TransformerEncoderLayer(8, 2),
            r"one VisionTransformer, Eva, NaFlexVit.* of timm, .* open_clip, .* of transformers or a describer, and",
        ),
    ],
)
def test_other_hosts_are_refused_by_name(build: Callable[[], nn.Module], message: str) -> None:
    model = build()
    with pytest.raises(UnsupportedHostError, match=message):
        merge_tokens(model, keep=0.5)
    assert not any(module._forward_pre_hooks or isinstance(module, Unmasked) for module in model.modules())


def _res_post() -> type[nn.Module]:
    return timm.models.vision_transformer.ResPostBlock


@pytest.mark.parametrize(
    "build",
    [
        lambda: _timm("vit_base_patch16_rpn_224", block_fn=_res_post()),
        lambda: _timm("eva02_tiny_patch14_224", use_post_norm=True),
        lambda: _timm("vit_small_patch16_dinov3"),
    ],
)
def test_what_the_refusals_name_as_a_way_out_works(build: Callable[[], nn.Module]) -> None:
    """And rotations of pruned tokens are their own, so that keeping all changes nothing."""
    model, x = add_lam(build(), LamConfig(rank=3, init="paper")).eval(), images()
    before = model(x)
    assert_close(prune_tokens(model, 1.0, (0,))(x), before, atol=1e-5, rtol=1e-5)
    features = prune_tokens(model, 0.5, (0,)).forward_features(x)
    assert features.shape[1] == PATCHES // 2 + model.num_prefix_tokens
    with pytest.raises(UnsupportedHostError, match=r"Beit adds a bias for each pair"):
        prune_tokens(add_lam(_timm("beit_base_patch16_224")), 0.5, (0,))


def test_an_attention_mask_of_all_tokens_is_refused_by_name() -> None:
    model, x = merge_tokens(_timm("vit_small_patch16_dinov3"), keep=0.5), images()
    with pytest.raises(UnsupportedHostError, match=r"EvaBlock while it is called with attn_mask"):
        model(x, attn_mask=torch.zeros(21, 21))
    biased = add_lam(_timm("vit_tiny_patch16_224"))
    for block in biased.blocks:
        block.attn.register_forward_pre_hook(
            lambda _, args, kwargs: (args, {"attn_mask": torch.zeros(17, 17)}), with_kwargs=True
        )
    with pytest.raises(UnsupportedHostError, match=r"Attention got an attention mask of all tokens after some"):
        merge_tokens(biased, keep=0.5)(x)


NAFLEX = {
    "mean": {},
    "class token": {"global_pool": "token", "class_token": True, "fc_norm": False},
    "attention": {"global_pool": "map", "fc_norm": False, "reg_tokens": 2},
    "mean, rotary": {"rope_type": "axial", "pos_embed": "none"},
    "class token, mixed rotary": {"global_pool": "token", "class_token": True, "fc_norm": False, "rope_type": "mixed"},
}
each_naflex = pytest.mark.parametrize("kind", NAFLEX)


@cache
def _built_naflex(kind: str) -> nn.Module:
    small = {"embed_dim": 24, "num_heads": 2, "num_classes": 5, "patch_size": 8, "depth": 3}
    torch.manual_seed(0)
    return TimmHost("naflexvit_base_patch16_gap").create(**small, **NAFLEX[kind]).eval()


def _naflex(kind: str, masked: bool) -> nn.Module:
    model = copy.deepcopy(_built_naflex(kind))
    return add_lam(model, LamConfig(rank=3, init="paper", op="add")) if masked else model


def _padded(grids: list[tuple[int, int]]) -> dict[str, Tensor]:
    """A batch as timm's NaFlex collator makes it, padded to the longest; a grid's patches are always the same."""
    longest = max(rows * columns for rows, columns in grids)
    samples = []
    for rows, columns in grids:
        length = rows * columns
        patches = torch.randn(length, 192, generator=torch.Generator().manual_seed(length))
        coord = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        fill = (0, 0, 0, longest - length)
        valid = torch.arange(longest) < length
        samples.append({"patches": F.pad(patches, fill), "patch_coord": F.pad(coord, fill), "patch_valid": valid})
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


GRIDS = [(3, 5), (2, 3), (1, 1), (4, 4), (1, 2), (3, 7)]


@each_naflex
@masked_or_not
def test_keeping_all_patches_of_a_padded_batch_changes_nothing(kind: str, masked: bool) -> None:
    model, batch = _naflex(kind, masked), _padded(GRIDS)
    before = model(batch)
    assert_close(merge_tokens(model, keep=1)(batch), before, atol=1e-5, rtol=1e-5)
    assert_close(model.forward_head(**model.forward_features(**batch)), before, atol=1e-5, rtol=1e-5)


@each_naflex
@masked_or_not
@pytest.mark.parametrize("keep", [0.6, 0.01])
def test_a_sample_of_a_padded_batch_is_merged_as_if_it_were_alone(kind: str, masked: bool, keep: float) -> None:
    model, batch = merge_tokens(_naflex(kind, masked), keep=keep), _padded(GRIDS)
    together = model(batch)
    assert_close(torch.cat([model(_padded([grid])) for grid in GRIDS]), together, atol=1e-5, rtol=1e-4)
    assert_close(model.forward_head(**model.forward_features(**batch)), together, atol=1e-5, rtol=1e-4)


@each_naflex
def test_a_padded_batch_gets_shorter(kind: str) -> None:
    model, lengths = merge_tokens(_naflex(kind, False), keep=0.3), []
    for block in model.blocks:
        block.norm2.register_forward_hook(lambda _, args, out: lengths.append(out.shape[1] - model.num_prefix_tokens))
    model(_padded(GRIDS))
    assert lengths == ([12, 7, 0] if "token" in kind else [15, 10, 7])


def test_a_plan_is_of_no_device_or_mode_in_which_it_was_made() -> None:
    with FakeTensorMode():
        plan.merges_by_length(9, 0.37, 3)
    with torch.inference_mode():
        plan.merges_by_length(8, 0.37, 3)
    made = [plan.merges_by_length(length, 0.37, 3) for length in (9, 8)]
    assert all(type(each) is torch.Tensor and not each.is_inference() for each in made)
    assert made[0][9].tolist() == list(plan.merges_per_layer(9, 0.37, 3))


def test_a_padded_batch_is_merged_alike_with_another_default_dtype() -> None:
    model, batch = merge_tokens(_naflex("mean", False), keep=0.3), _padded(GRIDS)
    expected = model(batch)
    try:
        torch.set_default_dtype(torch.float64)
        assert_close(model(batch), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@each_naflex
def test_padding_has_no_part_in_any_gradient(kind: str) -> None:
    model, batch = merge_tokens(_naflex(kind, True), keep=0.3).train(), _padded(GRIDS)
    gradients = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        patches = batch["patches"].clone().requires_grad_()
        model({**batch, "patches": patches}).square().sum().backward()
        assert patches.grad is not None
        gradients.append(patches.grad)
    assert_close(*gradients)
    assert gradients[0].isfinite().all()
    assert (gradients[0].abs().sum(dim=-1) > 0).eq(batch["patch_valid"]).all()


def test_an_attention_mask_that_hides_more_than_padding_is_refused() -> None:
    model, batch = merge_tokens(_naflex("mean", False), keep=0.5), _padded([(2, 2), (2, 3)])
    causal = torch.ones(2, 1, 10, 10, dtype=torch.bool).tril()  # four registers and six patches
    for mask in (causal, torch.randn(2, 1, 10, 10), torch.full((2, 1, 10, 10), -100.0), torch.zeros(10, 10)):
        with pytest.raises(UnsupportedHostError, match="Block while its attention mask hides or weights more than"):
            model({**batch, "attn_mask": mask})


@pytest.mark.parametrize("hidden", [-1e4, -1e9, torch.finfo(torch.float32).min, -torch.inf])
def test_an_attention_mask_of_ones_own_may_hide_padding(hidden: float) -> None:
    model, batch = merge_tokens(_naflex("mean", False), keep=0.5), _padded([(2, 2), (2, 3)])
    padding = torch.cat([torch.zeros(2, 4, dtype=torch.bool), ~batch["patch_valid"]], dim=1)  # after four registers
    mask = torch.zeros(2, 1, 1, 10).masked_fill(padding[:, None, None], hidden).expand(-1, -1, 10, -1)
    assert_close(model({**batch, "attn_mask": mask}), model(batch))


def test_a_rotary_host_compiles_as_one_graph() -> None:
    model, x = merge_tokens(_timm("vit_small_patch16_dinov3", global_pool="token").eval(), keep=0.5), images()
    torch._dynamo.reset()
    with torch.no_grad():
        assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))


def test_a_tower_of_open_clip_exports_with_any_batch() -> None:
    model = merge_tokens(_tower(layers=2, ls_init_value=None).eval(), keep=0.5)
    program = torch.export.export(model, (images(),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert_close(program.module()(images(5)), model(images(5)))


@pytest.mark.parametrize(
    "build", [lambda: _timm("vit_small_patch16_dinov3", depth=3, global_pool="token"), lambda: _clip()]
)
def test_a_budget_is_kept_on_other_hosts(build: Callable[[], nn.Module]) -> None:
    model = build()
    target = 0.7 * lamzoo.profile(model).gmacs
    assert 0.9 * target < lamzoo.profile(merge_tokens(model, target_gmacs=target)).gmacs <= target
    for _ in range(2):  # also of a model whose tokens are merged
        assert merge_tokens(model, r=2).token_reduction.keep == 1 - 2 * 2 / PATCHES


def test_the_size_of_a_naflex_model_is_not_known_and_a_share_is_asked_for() -> None:
    model = HOSTS["naflexvit_base_patch16_gap"].create(False)
    with pytest.raises(ConfigError, match="the number of patches of this model is not known; give keep"):
        merge_tokens(model, r=2)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("naflexvit_base_patch16_gap", "NaFlexVit may have padding.*lamzoo.merge_tokens"),
        ("qwen3_vit_88m", "Qwen3VitEncoder makes its tokens a grid again.*lamzoo.merge_tokens"),
    ],
)
def test_hosts_that_only_merge_are_refused_by_pruning(name: str, message: str) -> None:
    with pytest.raises(UnsupportedHostError, match=message):
        prune_tokens(HOSTS[name].create(True), 0.5, (0,))
