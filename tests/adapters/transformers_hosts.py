"""The models of Hugging Face transformers that the adapter's tests run over: real classes with small random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from lamzoo.lam import Lam

Inputs = dict[str, Tensor]

_IDS = [[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]]


def words() -> Inputs:
    return {"input_ids": torch.tensor(_IDS)}


def pairs() -> Inputs:
    return words() | {"decoder_input_ids": torch.tensor(_IDS)[:, :4]}


def images() -> Inputs:
    return {"pixel_values": torch.randn(2, 3, 16, 16)}


def clips() -> Inputs:
    return {"pixel_values": torch.randn(2, 4, 3, 16, 16)}


def both() -> Inputs:
    return words() | images()


@dataclass(frozen=True)
class Host:
    """A model class with the configuration that makes it small.

    Attributes:
        model: name of the class.
        config: returns its configuration.
        inputs: returns inputs of the forward pass.
        layers: number of its attention layers.
        generates: whether it generates text with a cache.
        pads: whether it takes an ``attention_mask`` with padding.
        passes_keywords: whether its layers pass keyword arguments on.
    """

    model: str
    config: Callable[[], Any]
    inputs: Callable[[], Inputs]
    layers: int = 2
    generates: bool = False
    pads: bool = False
    passes_keywords: bool = True

    def create(self, implementation: str | None = None) -> nn.Module:
        """Returns the model in evaluation, with weights large enough for every layer's attention to show."""
        torch.manual_seed(0)
        config = self.config()
        if implementation is not None:
            config._attn_implementation = implementation
        model: nn.Module = getattr(transformers, self.model)(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    nn.init.normal_(parameter, std=min(0.2, parameter.shape[1] ** -0.5))
                elif "lambda" in name or "layer_scale" in name or "gate" in name:
                    parameter.fill_(0.5)
        return model


def _config(name: str, *defaults: dict[str, Any], **settings: Any) -> Callable[[], Any]:
    merged: dict[str, Any] = {}
    for each in defaults:
        merged |= each
    return lambda: getattr(transformers, name)(**merged | settings)


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TEXT = SMALL | {"vocab_size": 40, "pad_token_id": 0, "max_position_embeddings": 32}
_IMAGE = SMALL | {"image_size": 16, "patch_size": 8}
LLAMA = TEXT | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2}
_SEQ2SEQ = {
    "vocab_size": 40, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
_T5 = {
    "vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "pad_token_id": 0,
    "decoder_start_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
_SPEECH = SMALL | {
    "conv_dim": (8,), "conv_stride": (4,), "conv_kernel": (8,), "num_feat_extract_layers": 1,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "feat_extract_norm": "layer", "vocab_size": 40,
    "mask_time_prob": 0.0,
}  # fmt: skip
_QWEN_VISION = {
    "depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "patch_size": 4,
    "spatial_merge_size": 2, "temporal_patch_size": 2,
}  # fmt: skip


def _qwen2_vl_inputs() -> Inputs:
    ids = torch.tensor([[5, 35, 37, 37, 37, 37, 36, 6, 7]])
    return {
        "input_ids": ids,
        "mm_token_type_ids": (ids == 37).long(),
        "pixel_values": torch.randn(16, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }


def _siglip2_inputs() -> Inputs:
    return words() | {
        "pixel_values": torch.randn(2, 4, 3 * 8 * 8),
        "pixel_attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
        "spatial_shapes": torch.tensor([[2, 2], [1, 2]]),
    }


def _mllama_inputs() -> Inputs:
    """Two words and an image of two tiles, of which the second sample sees one."""
    tiles = torch.ones(2, 6, 1, 2, dtype=torch.long)
    tiles[1, :, :, 1] = 0
    return words() | {
        "pixel_values": torch.randn(2, 1, 2, 3, 16, 16),
        "aspect_ratio_ids": torch.tensor([[2], [3]]),
        "aspect_ratio_mask": torch.ones(2, 1, 2, dtype=torch.long),
        "cross_attention_mask": tiles,
    }


def _llava_inputs() -> Inputs:
    return {"input_ids": torch.tensor([[5, 37, 37, 37, 37, 6, 7]]), "pixel_values": torch.randn(1, 3, 16, 16)}


HOSTS: dict[str, Host] = {
    "bert": Host("BertModel", _config("BertConfig", TEXT), words, pads=True),
    "roberta": Host("RobertaModel", _config("RobertaConfig", TEXT), words, pads=True),
    "modernbert": Host(
        "ModernBertModel",
        _config(
            "ModernBertConfig", TEXT, local_attention=4, cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2
        ),
        words,
        pads=True,
    ),
    "albert": Host("AlbertModel", _config("AlbertConfig", TEXT, embedding_size=8), words, layers=1, pads=True),
    "distilbert": Host(
        "DistilBertModel",
        _config("DistilBertConfig", vocab_size=40, dim=16, hidden_dim=24, n_layers=2, n_heads=2),
        words,
        pads=True,
    ),
    "mobilebert": Host(
        "MobileBertModel",
        _config("MobileBertConfig", TEXT, intra_bottleneck_size=16, embedding_size=16, num_feedforward_networks=1),
        words,
        pads=True,
    ),
    "vit": Host("ViTModel", _config("ViTConfig", _IMAGE), images),
    "deit": Host("DeiTModel", _config("DeiTConfig", _IMAGE), images),
    "dinov2": Host("Dinov2Model", _config("Dinov2Config", _IMAGE), images),
    "dinov3": Host("DINOv3ViTModel", _config("DINOv3ViTConfig", _IMAGE, num_register_tokens=2), images),
    "beit": Host("BeitModel", _config("BeitConfig", _IMAGE, use_relative_position_bias=True), images),
    "swin": Host(
        "SwinModel",
        _config("SwinConfig", image_size=16, patch_size=2, embed_dim=8, depths=[2, 1], num_heads=[2, 4], window_size=4),
        images,
        layers=3,
    ),
    "clip": Host(
        "CLIPModel",
        lambda: transformers.CLIPConfig(
            text_config=TEXT | {"bos_token_id": 1, "eos_token_id": 16}, vision_config=_IMAGE, projection_dim=8
        ),
        both,
        layers=4,
        pads=True,
    ),
    "siglip": Host(
        "SiglipModel",
        lambda: transformers.SiglipConfig(text_config=TEXT, vision_config=_IMAGE),
        both,
        layers=4,
        pads=True,
        passes_keywords=False,
    ),
    "siglip2": Host(
        "Siglip2Model",
        lambda: transformers.Siglip2Config(text_config=TEXT, vision_config=SMALL | {"patch_size": 8, "num_patches": 4}),
        _siglip2_inputs,
        layers=4,
        pads=True,
        passes_keywords=False,
    ),
    "videomae": Host(
        "VideoMAEModel",
        _config("VideoMAEConfig", _IMAGE, num_frames=4, tubelet_size=2),
        clips,
        passes_keywords=False,
    ),
    "vivit": Host("VivitModel", _config("VivitConfig", _IMAGE, num_frames=4, tubelet_size=[2, 8, 8]), clips),
    "wav2vec2": Host("Wav2Vec2Model", _config("Wav2Vec2Config", _SPEECH), lambda: {"input_values": torch.randn(2, 40)}),
    "gpt2": Host(
        "GPT2LMHeadModel",
        _config(
            "GPT2Config",
            vocab_size=40,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=32,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ),
        words,
        generates=True,
        pads=True,
    ),
    "llama": Host("LlamaForCausalLM", _config("LlamaConfig", LLAMA), words, generates=True, pads=True),
    "mistral": Host(
        "MistralForCausalLM", _config("MistralConfig", LLAMA, sliding_window=4), words, generates=True, pads=True
    ),
    "qwen3": Host("Qwen3ForCausalLM", _config("Qwen3Config", LLAMA), words, generates=True, pads=True),
    "gpt_neox": Host(
        "GPTNeoXForCausalLM",
        _config("GPTNeoXConfig", TEXT, bos_token_id=1, eos_token_id=2),
        words,
        generates=True,
        pads=True,
    ),
    "t5": Host("T5ForConditionalGeneration", _config("T5Config", _T5), pairs, layers=6, generates=True, pads=True),
    "bart": Host(
        "BartForConditionalGeneration",
        _config("BartConfig", _SEQ2SEQ, max_position_embeddings=32, forced_eos_token_id=None),
        pairs,
        layers=6,
        generates=True,
        pads=True,
    ),
    "whisper": Host(
        "WhisperForConditionalGeneration",
        _config("WhisperConfig", _SEQ2SEQ, num_mel_bins=8, max_source_positions=6, max_target_positions=32),
        lambda: {"input_features": torch.randn(2, 8, 12), "decoder_input_ids": torch.tensor(_IDS)[:, :4]},
        layers=6,
    ),
    "qformer": Host(
        "Blip2QFormerModel",
        _config("Blip2QFormerConfig", SMALL, encoder_hidden_size=12, cross_attention_frequency=2, vocab_size=40),
        lambda: {"query_embeds": torch.randn(2, 3, 16), "encoder_hidden_states": torch.randn(2, 5, 12)},
        layers=3,
    ),
    "blip2": Host("Blip2VisionModel", _config("Blip2VisionConfig", _IMAGE), images),
    "bridgetower": Host(  # its image tower has nn.MultiheadAttention with heads of 64
        "BridgeTowerModel",
        lambda: transformers.BridgeTowerConfig(
            hidden_size=64,
            num_attention_heads=2,
            num_hidden_layers=1,
            intermediate_size=24,
            text_config=TEXT | {"num_hidden_layers": 1, "hidden_size": 64},
            vision_config={"hidden_size": 64, "num_hidden_layers": 1, "patch_size": 8, "image_size": 16},
        ),
        both,
        layers=5,
        pads=True,
    ),
    "llava": Host(
        "LlavaForConditionalGeneration",
        lambda: transformers.LlavaConfig(
            text_config=transformers.LlamaConfig(**LLAMA),
            vision_config=transformers.CLIPVisionConfig(**_IMAGE),
            image_token_index=37,
            image_seq_length=4,
            vision_feature_layer=-1,
        ),
        _llava_inputs,
        layers=4,
        generates=True,
    ),
    "mllama": Host(
        "MllamaForConditionalGeneration",
        lambda: transformers.MllamaConfig(
            text_config=TEXT
            | {"num_key_value_heads": 1, "cross_attention_layers": [1], "bos_token_id": 1, "eos_token_id": 2},
            vision_config={
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_global_layers": 1,
                "attention_heads": 2,
                "intermediate_size": 24,
                "vision_output_dim": 32,
                "image_size": 16,
                "patch_size": 8,
                "max_num_tiles": 2,
                "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
                "intermediate_layers_indices": [0],
            },
            image_token_index=37,
        ),
        _mllama_inputs,
        layers=4,
        generates=True,
    ),
    "moonshine": Host(  # which pads keys behind the cache
        "MoonshineForConditionalGeneration",
        _config(
            "MoonshineConfig",
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            encoder_num_hidden_layers=1,
            decoder_num_hidden_layers=2,
            encoder_num_attention_heads=2,
            decoder_num_attention_heads=2,
            pad_head_dim_to_multiple_of=6,
            pad_token_id=0,
        ),
        lambda: {"input_values": torch.randn(2, 2000), "decoder_input_ids": torch.tensor(_IDS)[:, :4]},
        layers=5,
        generates=True,
    ),
    "qwen2_5_vl": Host(
        "Qwen2_5_VLForConditionalGeneration",
        lambda: transformers.Qwen2_5_VLConfig(
            text_config=LLAMA
            | {"num_attention_heads": 2, "num_key_value_heads": 1}
            | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
            vision_config=_QWEN_VISION | {"out_hidden_size": 16, "window_size": 8, "fullatt_block_indexes": [1]},
            vision_start_token_id=35,
            vision_end_token_id=36,
            image_token_id=37,
            video_token_id=38,
        ),
        _qwen2_vl_inputs,
        layers=4,
        generates=True,
    ),
}

# The tokens of its first decoder layer are zeros, from which no mask learns.
DETR = Host(
    "DetrModel",
    lambda: transformers.DetrConfig(
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=4,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        num_queries=5,
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone_config=transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], out_features=["stage2"]
        ),
    ),
    lambda: {"pixel_values": torch.randn(2, 3, 32, 32)},
    layers=3,
)


def run(model: nn.Module, inputs: Inputs, **kwargs: Any) -> Tensor:
    """Returns the main output of a model."""
    outputs = model(**inputs, **kwargs)
    names = ("logits", "logits_per_image", "last_hidden_state", "pooler_output")
    return next(outputs[name] for name in names if outputs.get(name) is not None)


def masks(model: nn.Module) -> dict[str, Lam]:
    return {path: module for path, module in model.named_modules() if isinstance(module, Lam)}


def inputs_of(host: Host) -> Inputs:
    """Returns inputs, padded where the host takes padding."""
    torch.manual_seed(1)
    inputs = host.inputs()
    if host.pads:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["attention_mask"][0, 4:] = 0
    return inputs
