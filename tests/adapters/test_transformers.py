"""Models of Hugging Face transformers are refused by name, wherever they are, since only a part would be masked."""

from collections.abc import Callable

import pytest
import timm
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from lamzoo.adapters import add_lam  # noqa: E402
from lamzoo.errors import UnsupportedHostError  # noqa: E402
from lamzoo.lam import Lam  # noqa: E402

TINY = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 48}


def siglip() -> nn.Module:
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**TINY, image_size=32, patch_size=16))


def bert() -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(**TINY, vocab_size=50))


def vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=2)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (siglip, r"The model \([a-z_.]+\.SiglipVisionModel\) belongs to Hugging Face transformers"),
        (lambda: siglip().head, r"The model \([a-z_.]+\.SiglipMultiheadAttentionPoolingHead\) belongs"),
        (bert, r"The model \([a-z_.]+\.BertModel\) belongs"),
        (lambda: nn.ModuleDict({"visual": vit(), "text": bert()}), r"text \([a-z_.]+\.BertModel\) belongs"),
        (
            lambda: nn.ModuleDict({"layer": nn.TransformerEncoderLayer(24, 3), "image": siglip()}),
            "image .*Siglip",
        ),
    ],
)
def test_models_of_transformers_are_refused_and_left_alone(build: Callable[[], nn.Module], message: str) -> None:
    model = build()
    with pytest.raises(UnsupportedHostError, match=f"{message}.*give add_lam a part of the model without it"):
        add_lam(model)
    assert not any(isinstance(module, Lam) for module in model.modules())


def test_a_tower_beside_a_model_of_transformers_can_be_masked() -> None:
    model = nn.ModuleDict({"visual": vit(), "text": bert()})
    add_lam(model["visual"])
    assert isinstance(model["visual"].blocks[0].attn.lam, Lam)


def test_a_timm_model_in_the_wrapper_of_transformers_is_served() -> None:
    settings = {"img_size": 32, "depth": 1}
    config = transformers.TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=settings)
    model = transformers.TimmWrapperModel(config).eval()
    x = torch.randn(1, 3, 32, 32)
    expected = model(x).last_hidden_state
    torch.testing.assert_close(add_lam(model)(x).last_hidden_state, expected, atol=1e-5, rtol=1e-5)
    assert isinstance(model.timm_model.blocks[0].attn.lam, Lam)
