"""Promises of learnable masks in torch.nn.MultiheadAttention and in the models that are built on it."""

import copy
import math
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torchvision.models import VisionTransformer

from lamzoo.adapters import add_lam
from lamzoo.adapters.mha import LamMultiheadAttention
from lamzoo.errors import ConfigError, MaskShapeError, UnsupportedHostError
from lamzoo.lam import Lam, LamConfig

PAPER = LamConfig(init="paper", rank=4)
WIDTH, HEADS = 16, 4
CAUSAL = torch.ones(5, 5, dtype=torch.bool).triu(1)


class Holder(nn.Module):
    """A model with one attention, called with whatever it takes."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, **kwargs)
        if self.attn.in_proj_bias is not None:  # zero in a fresh layer, where a mistake would not show
            nn.init.normal_(self.attn.in_proj_bias)
            nn.init.normal_(self.attn.out_proj.bias)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.attn(*args, **kwargs)


class DetrLayer(nn.Module):
    """Positions added to queries and keys, memory of another width, as Moment-DETR and its kin have it."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(WIDTH, HEADS)
        self.cross_attn = nn.MultiheadAttention(WIDTH, HEADS, kdim=12, vdim=12)

    def forward(self, x: Tensor, pos: Tensor, memory: Tensor) -> Tensor:
        x = x + self.self_attn(x + pos, x + pos, x)[0]
        return x + self.cross_attn(x + pos, memory, memory)[0]


def _encoder(layers: int = 2, **kwargs: Any) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, dropout=0.0, **kwargs)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=not kwargs.get("norm_first", False))


def _decoder() -> nn.TransformerDecoder:
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, HEADS, 32, dropout=0.0, batch_first=True), 2)


class Host(NamedTuple):
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    attentions: int


HOSTS = {
    "encoder": Host(lambda: _encoder(batch_first=True), lambda: (torch.randn(2, 5, WIDTH),), 2),
    "encoder_sequence_first": Host(lambda: _encoder(norm_first=True), lambda: (torch.randn(5, 2, WIDTH),), 2),
    "decoder": Host(_decoder, lambda: (torch.randn(2, 5, WIDTH), torch.randn(2, 7, WIDTH), CAUSAL), 4),
    "transformer": Host(
        lambda: nn.Transformer(WIDTH, HEADS, 1, 1, 32, dropout=0.0, batch_first=True),
        lambda: (torch.randn(2, 7, WIDTH), torch.randn(2, 5, WIDTH)),
        3,
    ),
    "detr": Host(
        lambda: nn.Sequential(DetrLayer())[0],
        lambda: (torch.randn(5, 2, WIDTH), torch.randn(5, 2, WIDTH), torch.randn(7, 2, 12)),
        2,
    ),
    "torchvision_vit": Host(
        lambda: VisionTransformer(16, 8, 2, HEADS, WIDTH, 32, num_classes=3), lambda: (torch.randn(2, 3, 16, 16),), 2
    ),
}


@pytest.fixture(params=HOSTS)
def host(request: pytest.FixtureRequest) -> Host:
    return HOSTS[request.param]


def _plain(host: Host) -> nn.Module:
    model = host.build()
    for parameter in model.parameters():  # torchvision's head starts at zero
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def _served(host: Host, config: LamConfig = PAPER) -> nn.Module:
    return add_lam(_plain(host), config)


def test_identity_lam_keeps_outputs(host: Host) -> None:
    model, inputs = _plain(host), host.inputs()
    expected = model(*inputs)
    torch.testing.assert_close(add_lam(model)(*inputs), expected, atol=1e-5, rtol=1e-5)
    assert sum(isinstance(module, Lam) for module in model.modules()) == host.attentions


def test_host_state_dict_keys_stay(host: Host) -> None:
    model = _plain(host)
    before = list(model.state_dict())
    add_lam(model)
    assert [key for key in model.state_dict() if ".lam." not in key] == before


def test_paper_lam_changes_outputs_in_evaluation_without_gradients(host: Host) -> None:
    """Torch's fused layers, which read the weights and call no module, must not pass the mask by."""
    model, inputs = _plain(host), host.inputs()
    served = add_lam(copy.deepcopy(model), PAPER)
    with torch.no_grad():
        difference = (served(*inputs) - model(*inputs)).abs().max()
        torch.testing.assert_close(served(*inputs), served.train()(*inputs))
    assert difference > 1e-3


def test_every_parameter_gets_a_gradient(host: Host) -> None:
    model = _served(host).train()
    model(*host.inputs()).square().sum().backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing
    assert all(p.grad.abs().max() > 0 for name, p in model.named_parameters() if ".lam." in name)


def test_copies_and_pickles_compute_the_same(host: Host) -> None:
    model, inputs = _served(host), host.inputs()
    expected = model(*inputs)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), nn.DataParallel(model)):
        assert torch.equal(copied(*inputs), expected)


def test_state_dict_round_trip(host: Host) -> None:
    model, other, inputs = _served(host), _served(host), host.inputs()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(*inputs), model(*inputs))


def test_autocast_and_bfloat16(host: Host) -> None:
    model, inputs = _served(host), host.inputs()
    expected = model(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(*inputs).float(), expected, atol=0.1, rtol=0.1)
    halves = [x.bfloat16() if x.is_floating_point() else x for x in inputs]
    torch.testing.assert_close(model.bfloat16()(*halves).float(), expected, atol=0.2, rtol=0.1)


# A decoder looks at the values of its causal mask, which torch itself can't trace.
@pytest.mark.parametrize(
    "name", ["encoder", *(pytest.param(x, marks=pytest.mark.slow) for x in ("transformer", "torchvision_vit"))]
)
def test_exported_program_computes_the_same(name: str) -> None:
    model, inputs = _served(HOSTS[name]), HOSTS[name].inputs()
    exported = torch.export.export(model, inputs).module()
    torch.testing.assert_close(exported(*inputs), model(*inputs))


@pytest.mark.parametrize("name", ["encoder", pytest.param("transformer", marks=pytest.mark.slow)])
def test_compiled_model_computes_the_same(name: str) -> None:
    model, inputs = _served(HOSTS[name]), HOSTS[name].inputs()
    model.requires_grad_(name != "encoder")  # with an encoder, the inference path
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), model(*inputs))


@pytest.mark.parametrize("layers", ["multi", "single"])
def test_gradient_checkpointing_gives_the_same_gradients(layers: Any) -> None:
    config = LamConfig(layers=layers, init="paper")
    model = add_lam(_encoder(layers=3, batch_first=True), config)
    images = torch.randn(2, 5, WIDTH), torch.randn(2, 5, WIDTH)

    def gradients(run: Callable[[nn.Module, Tensor], Tensor]) -> list[Tensor]:
        total = torch.zeros(())
        for x in images:  # two passes before one backward, as in contrastive training
            for layer in model.layers:
                x = run(layer, x)
            total = total + x.square().sum()
        return list(torch.autograd.grad(total, list(model.parameters())))

    plain = gradients(lambda layer, x: layer(x))
    again = gradients(lambda layer, x: checkpoint(layer, x, use_reentrant=False))
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b)


MASKS: dict[str, Callable[[], dict[str, Tensor]]] = {
    "none": dict,
    "bool": lambda: {"attn_mask": _bool_mask(5, 7)},
    "float": lambda: {"attn_mask": torch.randn(5, 7)},
    "per_head": lambda: {"attn_mask": _bool_mask(3 * HEADS, 5, 7)},
    "padding": lambda: {"key_padding_mask": _bool_mask(3, 7)},
    "float_padding": lambda: {"key_padding_mask": torch.randn(3, 7), "attn_mask": torch.randn(3 * HEADS, 5, 7)},
    "both": lambda: {"attn_mask": _bool_mask(5, 7), "key_padding_mask": _bool_mask(3, 7)},
}


def _bool_mask(*shape: int) -> Tensor:
    mask = torch.rand(shape) < 0.4
    mask[..., 0] = False  # no row without a key, where torch returns NaN
    return mask


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("kwargs", [{"batch_first": True}, {"kdim": 12, "vdim": 10}, {"bias": False}])
def test_cross_attention_under_every_kind_of_mask_equals_torch(kwargs: dict[str, Any], masks: str) -> None:
    model = Holder(**kwargs)
    query = torch.randn(3, 5, WIDTH)
    key, value = torch.randn(3, 7, kwargs.get("kdim", WIDTH)), torch.randn(3, 7, kwargs.get("vdim", WIDTH))
    if not kwargs.get("batch_first"):
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    given = MASKS[masks]()
    served = add_lam(copy.deepcopy(model))
    for wanted in ({"need_weights": False}, {}, {"average_attn_weights": False}):
        expected, weights = model(query, key, value, **given, **wanted)
        got, got_weights = served(query, key, value, **given, **wanted)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(got_weights, weights, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("batch_first", [True, False])
def test_unbatched_tokens_equal_torch(batch_first: bool) -> None:
    model = Holder(batch_first=batch_first)
    served = add_lam(copy.deepcopy(model))
    query, key = torch.randn(5, WIDTH), torch.randn(7, WIDTH)
    masks = {"attn_mask": _bool_mask(HEADS, 5, 7), "key_padding_mask": _bool_mask(7)}
    for average in (True, False):
        expected = model(query, key, key, **masks, average_attn_weights=average)
        torch.testing.assert_close(served(query, key, key, **masks, average_attn_weights=average), expected)


@pytest.mark.parametrize("need_weights", [True, False])
def test_causal_hint_equals_torch(need_weights: bool) -> None:
    model = Holder(batch_first=True)
    served = add_lam(copy.deepcopy(model))
    x = torch.randn(2, 5, WIDTH)
    expected = model(x, x, x, attn_mask=CAUSAL, is_causal=True, need_weights=need_weights)
    torch.testing.assert_close(served(x, x, x, attn_mask=CAUSAL, is_causal=True, need_weights=need_weights), expected)
    with pytest.raises(MaskShapeError, match="hint about attn_mask"):
        served(x, x, x, is_causal=True)


def test_returned_weights_carry_gradients_of_the_mask() -> None:
    model = add_lam(Holder(batch_first=True), PAPER)
    x = torch.randn(2, 5, WIDTH)
    model(x, x, x)[1].square().sum().backward()
    assert all(p.grad is not None for p in model.attn.lam.parameters())


def test_mask_network_reads_query_and_key_tokens() -> None:
    model = add_lam(Holder(batch_first=True, kdim=12, vdim=10), PAPER)
    network = model.attn.lam.network
    assert network.query[0].in_features == WIDTH
    assert network.key[0].in_features == 12


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype:UserWarning")
def test_padded_tokens_change_nothing() -> None:
    model = add_lam(_encoder(batch_first=True), PAPER).eval()
    x = torch.randn(1, 7, WIDTH)
    padding = torch.arange(7)[None] >= 5
    short = model(x[:, :5])
    torch.testing.assert_close(model(x, src_key_padding_mask=padding)[:, :5], short)
    with torch.no_grad():
        torch.testing.assert_close(model(x, src_key_padding_mask=padding)[:, :5], short)


@pytest.mark.parametrize("form", ["bool", "float", "attn_mask", "both"])
@pytest.mark.parametrize("least", [-math.inf, -1e9, torch.finfo(torch.float32).min])
def test_position_keys_count_no_padding_wherever_it_is(form: str, least: float) -> None:
    model = add_lam(Holder(batch_first=True), replace(PAPER, keys="position", max_length=7)).eval()
    key = torch.randn(2, 7, WIDTH)
    padding = torch.tensor([[True, True, False, False, False, True, False], [False] * 7])
    hidden = torch.zeros(2, 7).masked_fill(padding, least)
    of_sample = hidden[:, None, None].expand(2, HEADS, 5, 7).flatten(0, 1)
    masks: dict[str, Tensor] = {
        "bool": {"key_padding_mask": padding},
        "float": {"key_padding_mask": hidden},
        "attn_mask": {"attn_mask": of_sample},
        "both": {"key_padding_mask": hidden, "attn_mask": of_sample},
    }[form]
    query = torch.randn(2, 5, WIDTH)
    out, _ = model(query, key, key, **masks)
    alone = key[:1, ~padding[0]]
    torch.testing.assert_close(out[:1], model(query[:1], alone, alone)[0])
    torch.testing.assert_close(out[1:], model(query[1:], key[1:], key[1:])[0])


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype:UserWarning")
def test_nested_tensor_path_of_the_encoder_equals_torch() -> None:
    """In evaluation nn.TransformerEncoder packs a padded batch into a nested tensor, and zeroes the padding."""
    model = _encoder(batch_first=True).eval()
    served, paper = add_lam(copy.deepcopy(model)), add_lam(copy.deepcopy(model), PAPER)
    x, padding = torch.randn(3, 7, WIDTH), torch.arange(7) >= torch.tensor([[7], [5], [2]])
    with torch.no_grad():
        packed = paper(x, src_key_padding_mask=padding)
        torch.testing.assert_close(
            served(x, src_key_padding_mask=padding), model(x, src_key_padding_mask=padding), atol=1e-5, rtol=1e-5
        )
    assert (packed[padding] == 0).all()
    torch.testing.assert_close(packed[~padding], paper.train()(x, src_key_padding_mask=padding)[~padding])


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype:UserWarning")
def test_nested_tensors_with_masks_are_refused() -> None:
    model = add_lam(Holder())
    nested = torch.nested.as_nested_tensor([torch.randn(3, WIDTH), torch.randn(2, WIDTH)])
    with pytest.raises(MaskShapeError, match="batch_first=True"):
        model(nested, nested, nested)


def test_row_without_any_allowed_key_is_finite() -> None:
    model = add_lam(Holder(batch_first=True), PAPER)
    x = torch.randn(2, 5, WIDTH, requires_grad=True)
    padding = torch.tensor([[False] * 5, [True] * 5])
    out, weights = model(x, x, x, key_padding_mask=padding)
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert (weights[1] == 0).all()
    torch.testing.assert_close(out[1], model.attn.out_proj.bias.expand(5, -1))


@pytest.mark.parametrize(
    "masks",
    [
        {"attn_mask": torch.zeros(1, 5)},
        {"attn_mask": torch.zeros(2, 5, 5)},
        {"attn_mask": torch.zeros(5, 5, dtype=torch.long)},
        {"key_padding_mask": torch.zeros(1, 5)},
        {"key_padding_mask": torch.zeros(2, 5, dtype=torch.uint8)},
    ],
    ids=lambda masks: "-".join(f"{name}_{tuple(mask.shape)}_{mask.dtype}" for name, mask in masks.items()),
)
def test_masks_that_do_not_fit_are_refused_by_name(masks: dict[str, Tensor]) -> None:
    x = torch.randn(2, 5, WIDTH)
    with pytest.raises(MaskShapeError, match=next(iter(masks))):
        add_lam(Holder(batch_first=True))(x, x, x, **masks)


def test_dropout_acts_in_training_alone() -> None:
    model = add_lam(Holder(batch_first=True, dropout=0.5))
    x = torch.randn(2, 5, WIDTH)
    assert not torch.equal(model(x, x, x)[0], model(x, x, x)[0])
    model.eval()
    assert torch.equal(model(x, x, x)[0], model(x, x, x)[0])


def test_position_keys_equal_a_dense_mask_and_need_a_length() -> None:
    model = Holder(batch_first=True)
    with pytest.raises(ConfigError, match="max_length"):
        add_lam(model, LamConfig(keys="position"))
    assert type(model.attn) is nn.MultiheadAttention  # as it was
    add_lam(model, LamConfig(keys="position", op="mul", heads="shared", max_length=7, init="paper"))
    query, key = torch.randn(2, 5, WIDTH), torch.randn(2, 7, WIDTH)
    out, _ = model(query, key, key)
    attn, network = model.attn, model.attn.lam.network
    last_linear = network.table
    mask = F.relu(network.query[0](query)) @ last_linear.weight[0].mT + last_linear.bias[0]
    projected = [
        F.linear(x, w, b).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        for x, w, b in zip((query, key, key), attn.in_proj_weight.chunk(3), attn.in_proj_bias.chunk(3), strict=True)
    ]
    scores = projected[0] @ projected[1].mT / 2 * mask[:, None]
    expected = attn.out_proj((scores.softmax(-1) @ projected[2]).transpose(1, 2).flatten(2))
    torch.testing.assert_close(out, expected)


def test_single_layer_lam_has_one_network_for_each_kind_of_attention() -> None:
    model = nn.Transformer(WIDTH, HEADS, 2, 3, 32, dropout=0.0, batch_first=True).eval()
    add_lam(model, LamConfig(layers="single", init="paper"))
    owners = [name for name, module in model.named_modules() if isinstance(module, Lam) and module.network is not None]
    assert owners == [
        "encoder.layers.0.self_attn.lam",
        "decoder.layers.0.self_attn.lam",
        "decoder.layers.0.multihead_attn.lam",
    ]
    source, target = torch.randn(2, 7, WIDTH), torch.randn(2, 5, WIDTH)
    assert model(source, target).isfinite().all()
    assert model(source[:1, :4], target[:1, :3]).shape == (1, 3, WIDTH)


def test_layer_used_twice_is_masked_in_both_places() -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, dropout=0.0, batch_first=True)
    model = nn.ModuleDict({"first": layer, "second": layer, "attention": layer.self_attn})
    add_lam(model, PAPER)
    assert model["first"].self_attn is model["second"].self_attn is model["attention"]
    assert isinstance(model["attention"], LamMultiheadAttention)


def test_unwrap_gives_torchs_own_layer_back() -> None:
    model = _plain(HOSTS["encoder"])
    x = torch.randn(2, 5, WIDTH)
    expected = model(x)
    attn = copy.deepcopy(model.layers[0].self_attn)
    served = add_lam(model, PAPER).layers[0].self_attn
    assert isinstance(served, nn.MultiheadAttention)
    for layer in model.layers:
        layer.self_attn = layer.self_attn.unwrap()
    assert type(model.layers[0].self_attn) is nn.MultiheadAttention
    assert model.layers[0].self_attn.__dict__.keys() == attn.__dict__.keys()
    assert model.layers[0].self_attn._qkv_same_embed_dim is True
    assert torch.equal(model(x), expected)


def test_hosts_parameters_can_be_initialised_again() -> None:
    model = add_lam(Holder())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.attn._reset_parameters()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj.bias"}


class Foreign(nn.MultiheadAttention):
    """A subclass, of which nobody knows what it computes."""


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            nn.Sequential(Holder(), Holder(add_bias_kv=True)),
            r"1.attn \([a-z_.]+MultiheadAttention\) has add_bias_kv",
        ),
        (nn.Sequential(Holder(add_zero_attn=True)), "0.attn .* add_zero_attn"),
        (nn.ModuleDict({"head": Foreign(WIDTH, HEADS)}), r"head \([a-z_.]+.Foreign\)"),
        (nn.MultiheadAttention(WIDTH, HEADS), "put it into a module"),
    ],
)
def test_unservable_attention_is_refused_by_name(model: nn.Module, message: str) -> None:
    before = [type(module) for module in model.modules()]
    with pytest.raises(UnsupportedHostError, match=message):
        add_lam(model)
    assert [type(module) for module in model.modules()] == before
