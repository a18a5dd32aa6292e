"""Fused attention computes what the unfused does, with fewer operators, and is never out of date."""

import copy
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import open_clip
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.nn.utils.prune import l1_unstructured
from torch.testing import assert_close

import lamzoo
from lamzoo.adapters import add_lam, capture_masks, fuse, lam_parameters, lam_state_dict, load_lam_state_dict, unfuse
from lamzoo.adapters.deploy import fuse_layers, is_fused
from lamzoo.errors import UnsupportedHostError
from lamzoo.lam import LamConfig, attention_backend
from lamzoo.lam import fused as forms
from lamzoo.lam.fused import FusedAttention, pinned_form
from tests.adapters.timm_hosts import FEW, HOSTS, Host
from tests.operators import Operators

VIT = HOSTS["vit_tiny_patch16_224"]
EXACT = {"rtol": 0.0, "atol": 5e-6}
POSITION = LamConfig(keys="position", rank=7, init="paper")
CONTENT = LamConfig(rank=3, init="paper")
SINGLE = LamConfig(keys="position", layers="single", heads="shared", init="paper")
IMAGE_MODELS = [
    name for name in lamzoo.list_models(["lam_vit_*", "lam_single_vit_*"]) if lamzoo.model_info(name).lam.op == "add"
]
# Hosts with a bias of positions, or without one linear layer for queries, keys and values.
UNFUSED = ("vit_5b_patch16_sapiens2", "beit_base_patch16_224", "vit_srelpos_small_patch16_224")


def spread(model: nn.Module) -> Any:
    """Gives masks and attention weights that show in the output."""
    with torch.no_grad():
        for parameter in lam_parameters(model):
            parameter.normal_(std=0.2)
    return model.eval()


def masked(host: Host = VIT, config: LamConfig = POSITION, **kwargs: Any) -> Any:
    return spread(add_lam(host.create(**kwargs), config))


@pytest.fixture(autouse=True)
def fused_form() -> Iterator[None]:
    """Takes the fused form whatever was measured."""
    with pinned_form(True):
        yield


@torch.no_grad()
def calls(model: nn.Module, *inputs: Any) -> int:
    """Counts the layers that take their fused form."""
    count = Counter[str]()
    parts = [part for part in model.modules() if isinstance(part, FusedAttention)]
    handles = [part.register_forward_hook(lambda *_: count.update(["fused"])) for part in parts]
    model(*inputs)
    for handle in handles:
        handle.remove()
    return count["fused"]


def check_same(model: nn.Module, other: nn.Module, *inputs: Any, layers: int = 2) -> None:
    assert calls(other, *inputs) == layers
    with torch.no_grad():
        assert_close(other(*inputs), model(*inputs), **EXACT)


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_image_models_of_the_zoo_compute_the_same(name: str) -> None:
    model = spread(lamzoo.create_model(name, depth=2 if "tiny" in name else 1, img_size=32, num_classes=5))
    other = fuse(copy.deepcopy(model))
    for batch in (1, 3):
        check_same(model, other, torch.randn(batch, 3, 32, 32), layers=len(model.blocks))


def check_host(host: Host, config: LamConfig) -> None:
    if config.has_positions and not host.positions:
        pytest.skip("tokens without fixed positions have no mask with keys='position'")
    model = masked(host, config)
    layers = sum(module is not model and hasattr(module, "lam") for module in model.modules())
    check_same(model, fuse(copy.deepcopy(model)), host.images(), layers=layers)


@pytest.mark.parametrize("name", [name for name, host in HOSTS.items() if host.fuses])
def test_timm_hosts_compute_the_same(name: str) -> None:
    check_host(HOSTS[name], POSITION if HOSTS[name].positions else CONTENT)


@pytest.mark.parametrize(
    "config",
    [
        CONTENT,
        LamConfig(heads="shared", init="paper"),
        LamConfig(layers="single", init="paper", rank=5),
        LamConfig(layers="single", heads="shared", keys="position", init="paper"),
    ],
    ids=["content", "shared", "single", "single-position"],
)
@pytest.mark.parametrize("name", FEW)
def test_other_masks_compute_the_same(name: str, config: LamConfig) -> None:
    check_host(HOSTS[name], config)


@pytest.mark.parametrize("block", ["default", "custom", "cosine"])
@pytest.mark.parametrize("config", [POSITION, CONTENT])
def test_open_clip_towers_compute_the_same(block: str, config: LamConfig) -> None:
    extra = {"default": {}, "custom": {"block_type": "custom"}, "cosine": {"scaled_cosine_attn": True}}[block]
    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8, **extra}
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 2}
    model = spread(add_lam(open_clip.model.CLIP(16, vision, text), config))
    other, images, words = fuse(copy.deepcopy(model)), torch.randn(2, 3, 32, 32), torch.randint(50, (2, 8))
    assert calls(other, images, words) == 2  # those of the image tower: text has a causal mask
    with torch.no_grad():
        for mine, theirs in zip(other(images, words)[:2], model(images, words)[:2], strict=True):
            assert_close(mine, theirs, **EXACT)


@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention_computes_the_same(batch_first: bool) -> None:
    config = LamConfig(keys="position", max_length=9, init="paper")
    model = spread(add_lam(nn.ModuleDict({"attn": nn.MultiheadAttention(32, 2, batch_first=batch_first)}), config))
    other, x = fuse(copy.deepcopy(model)), torch.randn(9, 9, 32)
    check_same(model.attn, other.attn, x, x, x, layers=0)  # weights are wanted
    with torch.no_grad():
        for tokens in (x, x[0], torch.randn(12, 12, 32)):
            mine, theirs = (m.attn(tokens, tokens, tokens, need_weights=False)[0] for m in (other, model))
            assert_close(mine, theirs, **EXACT)
            padding = torch.zeros(tokens.shape[:-1], dtype=torch.bool)
            mine, theirs = (
                m.attn(tokens, tokens, tokens, padding if batch_first else padding.t(), need_weights=False)[0]
                for m in (other, model)
            )
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", [POSITION, CONTENT])
def test_other_dtypes_are_as_exact_as_the_unfused_layer(dtype: torch.dtype, config: LamConfig) -> None:
    model, x = masked(config=config).double(), VIT.images().double()
    with torch.no_grad():
        exact = model(x)
        plain = copy.deepcopy(model).to(dtype)
        for other in (fuse(copy.deepcopy(model)).to(dtype), fuse(copy.deepcopy(plain))):  # before and after the cast
            assert calls(other, x.to(dtype)) == 2
            error, known = ((m(x.to(dtype)).double() - exact).abs().max() for m in (other, plain))
            assert error <= 2 * known + 1e-12


def test_autocast_computes_the_same() -> None:
    model = masked()
    other, x = fuse(copy.deepcopy(model)), VIT.images()
    with torch.no_grad():
        exact = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            error, known = ((m(x).float() - exact).abs().max() for m in (other, model))
    assert error <= 2 * known


def test_position_tables_follow_the_patch_grid() -> None:
    model = masked(dynamic_img_size=True)
    other = fuse(copy.deepcopy(model))
    for shape in ((32, 32), (48, 32), (32, 48), (48, 32), (64, 24), (32, 32)):
        check_same(model, other, torch.randn(1, 3, *shape))


def test_an_empty_batch_has_an_empty_output() -> None:
    model, images = masked(), VIT.images()[:0]
    with torch.no_grad():
        assert fuse(copy.deepcopy(model))(images).shape == model(images).shape


def test_one_layer_has_these_operators_and_copies() -> None:
    counts: dict[str, Counter[str]] = {}
    single = LamConfig(keys="position", layers="single", init="paper")
    for name, config, index in (("position", POSITION, 0), ("content", CONTENT, 0), ("shared", single, 1)):
        blocks, x = fuse(masked(config=config)).blocks, torch.randn(2, 17, 24)
        with torch.no_grad():
            for block in blocks[:index]:
                block.attn(x)
            with Operators() as seen:
                blocks[index].attn(x)
        counts[name] = seen.counts
    assert [sum(found.values()) for found in counts.values()] == [20, 18, 21]
    views = {"view", "_unsafe_view", "t", "select", "slice", "transpose", "unbind", "permute", "as_strided"}
    work = {name: {op: n for op, n in found.items() if op not in views} for name, found in counts.items()}
    plain = {"addmm": 2, "_scaled_dot_product_flash_attention_for_cpu": 1, "clone": 1}
    assert work == {
        "position": plain | {"relu_": 1, "add_": 1},
        "content": plain | {"relu_": 1},
        "shared": plain | {"div": 1, "copy_": 2},
    }


def _load(model: nn.Module, state: dict[str, Tensor]) -> None:
    model.load_state_dict(state)


def _load_masks(model: nn.Module, state: dict[str, Tensor]) -> None:
    load_lam_state_dict(model, {key: value for key, value in state.items() if ".lam." in key}, config=POSITION)


def _step(model: nn.Module, state: dict[str, Tensor]) -> None:
    model(VIT.images()).square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def _train(model: nn.Module, state: dict[str, Tensor]) -> None:
    _step(model.train(), state)
    model.eval()


def _assign(model: nn.Module, state: dict[str, Tensor]) -> None:
    model.load_state_dict(state, assign=True)


def _move(model: nn.Module, state: dict[str, Tensor]) -> None:
    model.half().float()


def _assign_data(model: nn.Module, state: dict[str, Tensor]) -> None:
    for _ in range(2):  # the second time, torch may take the memory of the first weights again
        vector_to_parameters(parameters_to_vector(model.parameters()).detach() * 1.5, model.parameters())


def _round(model: Any, state: dict[str, Tensor]) -> None:
    model.blocks[0].attn.qkv.bfloat16().float()


def _replace(model: Any, state: dict[str, Tensor]) -> None:
    for block in model.blocks:
        query = block.attn.lam.network.query
        query[0] = nn.Linear(query[0].in_features, query[0].out_features)


def _replace_networks(model: Any, state: dict[str, Tensor]) -> None:
    for block in model.blocks:
        block.attn.lam.network = copy.deepcopy(block.attn.lam.network)
        nn.init.normal_(block.attn.lam.network.query[0].weight)


@pytest.mark.parametrize(
    "change",
    [_load, _load_masks, _step, _train, _assign, _move, _assign_data, _round, _replace, _replace_networks],
)
def test_changed_weights_are_seen(change: Callable[[nn.Module, dict[str, Tensor]], None]) -> None:
    model, state = fuse(masked()), {key: value.clone() for key, value in masked().state_dict().items()}
    x = VIT.images()
    calls(model, x)
    change(model, state)
    check_same(unfuse(copy.deepcopy(model)), model, x)
    check_same(unfuse(copy.deepcopy(model)), copy.deepcopy(model), x)


def test_other_weights_of_a_functional_call_are_used() -> None:
    model, x = fuse(masked()), VIT.images()
    weights = dict(masked().named_parameters())
    with torch.no_grad():
        expected = torch.func.functional_call(unfuse(copy.deepcopy(model)), weights, x)
        assert_close(torch.func.functional_call(model, weights, x), expected, **EXACT)
        stacked = {name: torch.stack([weight, weight]) for name, weight in weights.items()}
        several = torch.vmap(lambda each: torch.func.functional_call(model, each, x))(stacked)
    assert_close(several, torch.stack([expected, expected]), **EXACT)


def _wrap(holder: Any, name: str) -> None:
    setattr(holder, name, nn.Sequential(getattr(holder, name)))  # as an adapter such as LoRA does


def _prune(holder: Any, name: str) -> None:
    l1_unstructured(getattr(holder, name), "weight", 0.5)


def _quantize(holder: Any, name: str) -> None:
    torch.ao.quantization.quantize_dynamic(holder, {name: torch.ao.quantization.default_dynamic_qconfig}, inplace=True)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("adapt", [_wrap, _prune, _quantize])
@pytest.mark.parametrize("part", ["qkv", "query", "key"])
def test_an_adapted_layer_is_not_passed_over(part: str, adapt: Callable[[Any, str], None]) -> None:
    model, x = fuse(masked(config=CONTENT)), VIT.images()
    for block in model.blocks:
        holder = block.attn if part == "qkv" else getattr(block.attn.lam.network, part)
        adapt(holder, "qkv" if part == "qkv" else "0")
    assert calls(model, x) == 0
    assert not is_fused(model)


def test_weights_whose_changes_are_not_counted_are_refused() -> None:
    with torch.inference_mode():
        model = masked()
        with pytest.raises(UnsupportedHostError, match=r"made under torch\.inference_mode\(\)"):
            fuse(model)


def test_the_state_dict_is_that_of_the_unfused_model() -> None:
    model = masked()
    other = fuse(copy.deepcopy(model))
    assert list(other.state_dict()) == list(model.state_dict())
    assert [name for name, _ in other.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert lam_state_dict(other).keys() == lam_state_dict(model).keys()


@pytest.mark.parametrize("tuned", ["all", "lam"])
@pytest.mark.parametrize("layers", ["multi", "single"])
def test_parameters_get_their_gradients(layers: Any, tuned: str) -> None:
    model = masked(config=LamConfig(layers=layers, init="paper")).requires_grad_(tuned == "all")
    for parameter in lam_parameters(model):
        parameter.requires_grad_(True)
    other, x = fuse(copy.deepcopy(model)), VIT.images()
    for each in (model, other):
        each(x).square().sum().backward()
    for mine, theirs in zip(lam_parameters(other), lam_parameters(model), strict=True):
        assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None)


def test_frozen_models_give_their_inputs_gradients() -> None:
    model = masked(HOSTS["vit_tiny_patch16_224-qk_norm"]).requires_grad_(False)
    other, gradients = fuse(copy.deepcopy(model)), []
    for each in (model, other):
        x = torch.ones(1, 3, 32, 32, requires_grad=True)
        each(x).square().sum().backward()
        gradients.append(x.grad)
    assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_training_mode_computes_as_before() -> None:
    model = masked(drop_path_rate=0.0)
    other, x = fuse(copy.deepcopy(model)), VIT.images()
    assert calls(other.train(), x) == 0
    assert torch.equal(other(x), model.train()(x))
    assert calls(other.eval(), x) == 2


def test_timm_reparameterizes_a_copy() -> None:
    model, x = masked(), VIT.images()
    other = timm.utils.reparameterize_model(model)
    check_same(model, other, x)
    assert not is_fused(model)
    assert calls(other.eval(), x) == 2


@pytest.mark.slow
@pytest.mark.parametrize("config", [POSITION, LamConfig(layers="single", init="paper")])
def test_models_compile_without_graph_breaks_for_any_batch_and_size(config: LamConfig) -> None:
    model = fuse(masked(config=config, dynamic_img_size=True))
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for shape in ((2, 3, 32, 32), (5, 3, 32, 32), (1, 3, 48, 32)):
            x = torch.randn(*shape)
            assert_close(compiled(x), model(x), **EXACT)


@pytest.mark.slow
def test_a_compiled_model_can_be_fused_and_sees_new_weights() -> None:
    model, x = masked(), VIT.images()
    state = {key: value.clone() for key, value in masked().state_dict().items()}
    compiled = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(x), model(x), **EXACT)
        fuse(compiled)
        before = model(x)
        assert_close(compiled(x), before, **EXACT)
        compiled.load_state_dict({f"_orig_mod.{key}": value for key, value in state.items()})
        model.load_state_dict(state)
        assert_close(compiled(x), model(x), **EXACT)
        assert not torch.allclose(model(x), before)


def test_a_trace_computes_the_same_for_any_batch() -> None:
    model = fuse(masked())
    with torch.no_grad():
        traced = torch.jit.trace(model, VIT.images(), check_trace=False)
        x = VIT.images(5)
        assert_close(traced(x), model(x), **EXACT)


def test_fusing_twice_and_unfusing() -> None:
    model, x = masked(), VIT.images()
    other = copy.deepcopy(model)
    assert fuse(fuse(other)) is other
    check_same(model, other, x)
    assert unfuse(other) is other
    assert not is_fused(other)
    assert repr(other) == repr(model)
    assert torch.equal(other(x), model(x))
    assert not any(module._load_state_dict_post_hooks for module in other.modules())


def test_a_fused_model_can_be_pickled() -> None:
    model = fuse(masked())
    check_same(model, pickle.loads(pickle.dumps(model)), VIT.images())


def test_reset_weights_of_multihead_attention_are_seen() -> None:
    config = LamConfig(max_length=9, keys="position", init="paper")
    model = fuse(spread(add_lam(nn.ModuleDict({"attn": nn.MultiheadAttention(32, 2)}), config)))
    model.attn._reset_parameters()
    assert is_fused(model)
    x = torch.randn(9, 2, 32)
    with torch.no_grad():
        mine, theirs = (m.attn(x, x, x, need_weights=False)[0] for m in (model, unfuse(copy.deepcopy(model))))
    assert_close(mine, theirs, **EXACT)


def test_removing_the_masks_removes_the_fused_form() -> None:
    plain, x = VIT.create().eval(), VIT.images()
    model = fuse(spread(add_lam(copy.deepcopy(plain), POSITION)))
    assert torch.equal(lamzoo.remove_lam(model)(x), plain(x))
    assert repr(model) == repr(plain)


def test_captured_masks_are_those_of_the_unfused_model() -> None:
    model = masked()
    other, x = fuse(copy.deepcopy(model)), VIT.images()
    with torch.no_grad(), capture_masks(model) as expected, capture_masks(other) as found:
        assert torch.equal(other(x), model(x))
    assert list(found) == list(expected)
    assert all(torch.equal(found[path].attention, expected[path].attention) for path in found)
    assert calls(other, x) == 2


def merge(model: Any) -> Any:
    return lamzoo.merge_tokens(model, keep=0.6)


def prune(model: Any) -> Any:
    return lamzoo.prune_tokens(model, 0.5, at=(0,))


@pytest.mark.parametrize("reduce", [merge, prune])
@pytest.mark.parametrize("config", [POSITION, CONTENT, SINGLE])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_rope_224", "eva_giant_patch14_224"])
def test_reduced_tokens_are_those_of_the_unfused_model(
    name: str, config: LamConfig, reduce: Callable[[Any], Any]
) -> None:
    model, x = masked(HOSTS[name], config), HOSTS[name].images()
    expected = reduce(copy.deepcopy(model))
    layers = 2 if reduce is merge else 1  # scores of pruning are made of the unfused layer
    for other in (fuse(reduce(copy.deepcopy(model))), reduce(fuse(copy.deepcopy(model)))):
        check_same(expected, other, x, layers=layers)
        check_same(expected, other, x[:1], layers=layers)
    check_same(model, lamzoo.remove_reduction(other), x)
    assert torch.equal(unfuse(reduce(other))(x), expected(x))


@pytest.mark.parametrize("layers", ["multi", "single"])
def test_merged_tokens_of_padded_samples_are_those_of_the_unfused_model(layers: Any) -> None:
    host = HOSTS["naflexvit_base_patch16_gap"]
    model = merge(masked(host, LamConfig(layers=layers, init="paper")))
    places = torch.cartesian_prod(torch.arange(3), torch.arange(4)).expand(2, -1, -1)
    valid = torch.arange(12) < torch.tensor([[12], [7]])
    batch = {"patches": torch.randn(2, 12, 192), "patch_coord": places, "patch_valid": valid}
    other = fuse(copy.deepcopy(model)).requires_grad_(False)
    check_same(model, other, batch)
    batch["patches"].requires_grad_(True)
    with torch.enable_grad():  # in which nothing is changed in place
        out = other(batch)
    assert out.requires_grad
    assert_close(out, model(batch), **EXACT)


def test_merged_tokens_of_an_open_clip_tower_are_those_of_the_unfused_model() -> None:
    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
    for block in ("default", "custom"):
        model = open_clip.model.CLIP(16, vision | {"block_type": block}, text)
        model.visual = merge(spread(add_lam(model.visual, POSITION)))
        check_same(model.visual, fuse(copy.deepcopy(model.visual)), torch.randn(2, 3, 32, 32))


def test_straight_through_decisions_are_respected() -> None:
    model = prune(masked(drop_path_rate=0.0)).train()
    other, x = fuse(copy.deepcopy(model)), VIT.images()
    for each in (model, other):
        each.blocks[1].eval()
    with torch.no_grad():
        torch.manual_seed(0)
        expected = model(x)
        torch.manual_seed(0)
        assert torch.equal(other(x), expected)


def test_a_merging_layer_has_fewer_operators() -> None:
    counts = []
    for model in (masked(), fuse(masked())):
        with torch.no_grad(), Operators() as seen:
            merge(model)(VIT.images())
        counts.append(sum(seen.counts.values()))
    assert counts[1] < counts[0] - 2 * 25  # of two layers


@pytest.mark.slow
def test_a_merged_model_compiles_for_any_batch() -> None:
    model = fuse(merge(masked()))
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for batch in (2, 5):
            x = VIT.images(batch)
            assert_close(compiled(x), model(x), **EXACT)


def test_a_pinned_backend_is_used() -> None:
    model = masked()
    other, x = fuse(copy.deepcopy(model)), VIT.images()
    with attention_backend("eager"), torch.no_grad():
        assert torch.equal(other(x), model(x))


def test_an_attention_mask_is_respected() -> None:
    model = masked()
    other, x = fuse(copy.deepcopy(model)).blocks[0].attn, torch.randn(2, 17, 24)
    allowed = torch.rand(2, 1, 17, 17) > 0.3
    with torch.no_grad():
        assert torch.equal(other(x, attn_mask=allowed), model.blocks[0].attn(x, attn_mask=allowed))
        assert torch.equal(other(x, is_causal=True), model.blocks[0].attn(x, is_causal=True))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (LamConfig(op="mul"), "op='mul'"),
        (LamConfig(hidden=(4,)), r"hidden=\(4,\)"),
    ],
)
def test_a_model_without_fused_form_is_refused(config: LamConfig, reason: str) -> None:
    with pytest.raises(UnsupportedHostError, match=rf"blocks.0.attn.*{reason}.*use it as it is"):
        fuse(masked(config=config))


@pytest.mark.parametrize("name", UNFUSED)
def test_a_host_without_fused_form_stays_as_it_is(name: str) -> None:
    model = masked(HOSTS[name], CONTENT)
    assert "position bias" in fuse_layers(model)["blocks.0.attn"]
    assert not is_fused(model)


def test_a_model_of_transformers_is_refused() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    model = add_lam(transformers.BertModel(config))
    with pytest.raises(UnsupportedHostError, match=r"of encoder.layer.0.attention.self, the host computes queries"):
        fuse(model)


def test_a_model_without_masks_is_refused() -> None:
    with pytest.raises(UnsupportedHostError, match="add_lam"):
        fuse(VIT.create())


def test_the_nearest_measurement_decides(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    path = tmp_path / "fused.csv"
    path.write_text(
        "device,width,columns,tokens,batch,unfused,fused\n"
        "cpu (a CPU),192,8,65,1,1.2,1.1\ncpu (a CPU),192,8,65,32,1.0,1.1\ncpu (a CPU),768,8,197,1,1.05,1.05\n"
    )
    monkeypatch.setattr(forms, "MEASURED", path)
    forms._measured.cache_clear()
    forms.faster.cache_clear()
    try:
        assert forms.faster("cpu", 192, 8, 0, 65, 2)
        assert not forms.faster("cpu", 192, 8, 0, 65, 16)
        assert forms.faster("cpu", 1024, 16, 7, 197, 1)
        assert forms.faster("cuda", 384, 16, 7, 197, 1)  # not measured
        assert not forms.faster("cuda", 768, 16, 7, 197, 1)
    finally:
        forms._measured.cache_clear()
        forms.faster.cache_clear()
