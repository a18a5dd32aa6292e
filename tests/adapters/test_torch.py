"""A masked model goes through torch's own machinery like the host it was: copies, precisions, compilers, replicas."""

import copy
import io
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torchvision.models.feature_extraction import create_feature_extractor

import lamzoo
from lamzoo.adapters import add_lam, capture_masks
from lamzoo.errors import ExportError, UnsupportedHostError
from lamzoo.lam import LamConfig
from lamzoo.layers.attention import HeadAttention
from tests.adapters.timm_hosts import FEW, HOSTS, Host

few_hosts = pytest.mark.parametrize("host", [HOSTS[name] for name in FEW], ids=FEW)
layers = pytest.mark.parametrize("layers", ["multi", "single"])


def masked(host: Host, layers: str, **kwargs: object) -> nn.Module:
    keys = "position" if host.positions else "content"
    return add_lam(host.create(**kwargs).eval(), LamConfig(layers=layers, keys=keys, init="paper", rank=3))


@few_hosts
@layers
def test_state_dict_deepcopy_and_pickle_give_the_same_model(host: Host, layers: str) -> None:
    model, x = masked(host, layers), host.images()
    expected = model(x)
    loaded = masked(host, layers)
    loaded.load_state_dict(model.state_dict())
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    copies = [
        loaded,
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(saved, weights_only=False),
    ]
    for again in copies:
        assert torch.equal(again(x), expected)
        assert again.lam_config == model.lam_config


@few_hosts
def test_a_copy_shares_nothing_with_its_original(host: Host) -> None:
    model, x = masked(host, "single"), host.images()
    twin = copy.deepcopy(model)
    expected = twin(x).detach()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(twin(x), expected)


@few_hosts
@layers
def test_autocast_and_half_precision_stay_close_to_float32(host: Host, layers: str) -> None:
    model, x = masked(host, layers), host.images()
    with torch.no_grad():
        expected = model(x)
        scale = expected.abs().max()
        with torch.autocast("cpu", torch.bfloat16):
            assert (model(x).float() - expected).abs().max() < 0.1 * scale + 0.05
        for dtype in (torch.bfloat16, torch.float16):
            out = copy.deepcopy(model).to(dtype)(x.to(dtype))
            assert out.dtype == dtype
            assert (out.float() - expected).abs().max() < 0.1 * scale + 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_masks_take_the_dtype_of_the_host(dtype: torch.dtype) -> None:
    model = add_lam(HOSTS["vit_tiny_patch16_224"].create().to(dtype))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


# Tracing takes seconds a model: by default one host for each attention class and way of sharing.
_TRACED = [
    ("vit_tiny_patch16_224", "single"),
    ("eva_giant_patch14_224", "multi"),
    ("naflexvit_base_patch16_gap", "single"),
]
_ALSO_TRACED = [
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256",
    "samvit_base_patch16",
    "maxvit_tiny_tf_224",
    "coatnet_0_224",
    "vit_base_patch16_xp_224",
    "vit_dwee_patch16_reg1_gap_256",
]
traced = pytest.mark.parametrize(
    ("host", "layers"),
    [
        pytest.param(HOSTS[name], kind, id=f"{name}-{kind}", marks=[] if (name, kind) in _TRACED else pytest.mark.slow)
        for name in (*FEW, *_ALSO_TRACED)
        for kind in HOSTS[name].kinds_of_layers()
    ],
)


@traced
def test_compile_keeps_outputs_and_gradients_in_one_graph(host: Host, layers: str) -> None:
    model, x = masked(host, layers), host.images()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph="naflex" not in host.name)
    expected, out = model(x), compiled(x)
    assert_close(out, expected, rtol=1e-4, atol=1e-5)
    parameters = [p for p in model.parameters() if p.requires_grad]
    ours, theirs = (torch.autograd.grad(y.square().sum(), parameters, allow_unused=True) for y in (out, expected))
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert_close(one, other, rtol=1e-3, atol=1e-5)


@layers
def test_compile_of_single_blocks_sees_the_patch_grid(layers: str) -> None:
    host = HOSTS["vit_tiny_patch16_224"]
    model, x = masked(host, layers, dynamic_img_size=True), torch.randn(1, 3, 64, 16)
    expected = model(x)
    torch.compiler.reset()
    for block in model.blocks:
        block.compile(backend="eager", fullgraph=True)
    assert_close(model(x), expected)


@pytest.mark.slow
@layers
def test_compile_with_gradient_checkpointing_keeps_gradients(layers: str) -> None:
    host = HOSTS["vit_tiny_patch16_224"]
    model, x = masked(host, layers), host.images()
    parameters = list(model.parameters())
    expected = torch.autograd.grad(model(x).sum(), parameters)
    model.set_grad_checkpointing(True)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager")
    for one, other in zip(torch.autograd.grad(compiled(x).sum(), parameters), expected, strict=True):
        assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@layers
def test_inductor_keeps_outputs(layers: str) -> None:
    host = HOSTS["vit_tiny_patch16_224"]
    model, x = masked(host, layers), host.images()
    torch.compiler.reset()
    with torch.no_grad():
        assert_close(torch.compile(model)(x), model(x), rtol=1e-4, atol=1e-5)


@traced
def test_export_keeps_outputs_for_any_batch(host: Host, layers: str) -> None:
    model = masked(host, layers)
    shapes = {"x": {0: torch.export.Dim("batch", min=2, max=64)}}
    arguments = {"args": (host.images(),), "dynamic_shapes": shapes if "naflex" not in host.name else None}
    with torch.no_grad():
        program = torch.export.export(model, **arguments)
        x = host.images(batch=2 if "naflex" in host.name else 3)
        assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)
        assert torch.isfinite(model(x)).all()  # and the model itself runs as before


@layers
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_rope_224", "eva_giant_patch14_224"])
def test_symbolic_traces_compute_what_the_model_does(name: str, layers: str) -> None:
    model, x = masked(HOSTS[name], layers), HOSTS[name].images()
    traced = create_feature_extractor(model, {"blocks.0.attn": "first", "head": "logits"})
    head = create_feature_extractor(model, {"blocks.0.attn": "first"})  # a pass that ends in the middle of the stack
    with torch.no_grad(), capture_masks(model) as masks:
        assert torch.equal(head(x)["first"], traced(x)["first"])
        assert list(masks) == ["blocks.0.attn", "blocks.1.attn"]
        assert torch.equal(traced(x)["logits"], model(x))


def test_symbolic_traces_serve_every_kind_of_masked_layer() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
            self.heads = HeadAttention(8, 2, 8, 8, 0.0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = self.attn(x, x, x, need_weights=False)[0]
            return self.heads(x, out, out, x, out)

    model, x = add_lam(Attends().eval(), LamConfig(init="paper")), torch.randn(2, 5, 8)
    traced = torch.fx.symbolic_trace(model)
    with torch.no_grad():
        assert torch.equal(traced(x), model(x))
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["attn", "heads"]


def test_a_symbolic_trace_leaves_position_masks_as_they_were() -> None:
    model, x = masked(HOSTS["vit_tiny_patch16_224"], "multi"), HOSTS["vit_tiny_patch16_224"].images()
    expected = model(x)
    traced = torch.fx.symbolic_trace(model)
    assert torch.equal(traced(x), expected)
    assert torch.equal(model(x), expected)


def test_symbolic_traces_of_pruned_models_are_refused_with_a_way_out() -> None:
    model = lamzoo.prune_tokens(masked(HOSTS["vit_tiny_patch16_224"], "multi"), keep=0.5, at=[0])
    with pytest.raises(UnsupportedHostError, match="lamzoo.remove_reduction"):
        torch.fx.symbolic_trace(model)


@few_hosts
@pytest.mark.filterwarnings("ignore")  # that both are deprecated, and that traces take shapes as constants
def test_torch_script_is_refused_in_one_sentence_and_tracing_works(host: Host) -> None:
    model, x = masked(host, "single"), host.images()
    with pytest.raises(ExportError, match=r"use torch\.export"):
        torch.jit.script(model)
    with torch.no_grad():
        traced = torch.jit.trace(model, x, check_trace=False)
        assert_close(traced(x), model(x))


@few_hosts
@layers
def test_data_parallel_keeps_outputs(host: Host, layers: str) -> None:
    model, x = masked(host, layers), host.images()
    assert torch.equal(nn.DataParallel(model)(x), model(x))


@layers
def test_replicas_in_threads_do_not_see_each_other(layers: str) -> None:
    # What nn.DataParallel does on several devices: replicas that share hooks and state, each in a thread.
    host = HOSTS["vit_tiny_patch16_224"]
    model = masked(host, layers, dynamic_img_size=True)
    images = [torch.randn(1, 3, *size) for size in ((32, 32), (16, 64), (64, 16), (32, 64))]
    expected = [model(x) for x in images]
    outputs: dict[int, list[torch.Tensor]] = {}
    start = threading.Barrier(len(images))

    def work(index: int) -> None:
        start.wait()
        outputs[index] = [model(images[index]) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(images))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, one in enumerate(expected):
        for other in outputs[index]:
            assert_close(other, one)


@pytest.mark.gpu
@layers
@few_hosts
def test_cuda_agrees_with_cpu(host: Host, layers: str) -> None:
    model, x = masked(host, layers), host.images()
    expected = model(x)
    model.cuda()
    assert_close(model(x.cuda()).cpu(), expected, rtol=1e-3, atol=1e-4)
    if host.checkpointing:
        grads = torch.autograd.grad(model(x.cuda()).square().sum(), list(model.parameters()), allow_unused=True)
        model.set_grad_checkpointing(True)
        again = torch.autograd.grad(model(x.cuda()).square().sum(), list(model.parameters()), allow_unused=True)
        for one, other in zip(grads, again, strict=True):
            if one is not None:
                assert_close(other, one, rtol=1e-3, atol=1e-4)


def test_capture_works_on_a_compiled_model() -> None:
    host = HOSTS["vit_tiny_patch16_224"]
    model, x = masked(host, "multi"), host.images()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(x)
        with capture_masks(model) as masks:
            compiled(x)
    assert list(masks) == ["blocks.0.attn", "blocks.1.attn"]
