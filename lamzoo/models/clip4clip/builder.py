"""The builder of CLIP4Clip for cards: towers, head and the places of masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from torch import nn

from lamzoo.adapters import add_lam_to
from lamzoo.errors import ConfigError
from lamzoo.lam import LamConfig
from lamzoo.models.clip4clip.model import Clip4Clip, Similarity
from lamzoo.models.clip4clip.towers import custom_towers, named_towers

Place = Literal["head", "vision", "text"]


def clip4clip(
    config: Mapping[str, Any],
    *,
    lam: LamConfig | None,
    clip: Mapping[str, Any] | None = None,
    similarity: Similarity | None = None,
    lam_in: Sequence[Place] | None = None,
    max_frames: int | None = None,
    fps: float | None = None,
    head_layers: int | None = None,
    head_mlp_ratio: float | None = None,
    patch_grid: int | None = None,
    words: bool | None = None,
    modality_bias: bool | None = None,
    context_length: int | None = None,
    quick_gelu: bool | None = None,
    img_size: int | tuple[int, int] | None = None,
    in_chans: int = 3,
    num_classes: int = 0,
) -> nn.Module:
    """Builds a :class:`Clip4Clip` without weights.

    Args:
        config: ``open_clip``: a model name of open_clip, or ``clip``: arguments of towers without a name; and defaults
            of the arguments below.
        lam: configuration of the masks; ``None`` for plain CLIP4Clip.
        clip: arguments of ``open_clip.CLIP``, for custom towers, which may be models of timm and transformers,
            pretrained from files; see :func:`lamzoo.models.clip4clip.towers.custom_towers`.
        similarity: the head: ``"mean"``, ``"seq"`` or ``"tight"``.
        lam_in: the parts that get masks: ``"head"`` (not with ``"mean"``), ``"vision"`` and ``"text"`` tower. By
            default the head, or with ``"mean"`` the vision tower.
        max_frames: maximum frames of a video.
        fps: frames per second that a video is sampled at; 0 for all frames.
        head_layers: transformer layers of the head.
        head_mlp_ratio: hidden width of their MLPs, relative to that of the embeddings; a larger one is the
            parameter-matched control without a mask.
        patch_grid: the tight head also compares the patches of each frame, averaged over ``patch_grid`` by
            ``patch_grid`` equal areas; 0 for none.
        words: the tight head also compares the words of the text.
        modality_bias: the tight head has a learned bias for each pair of modalities, layer and head; the control for
            masks there, above all for those with ``modalities=2``.
        context_length: maximum tokens of a text; positions of published weights are truncated to it.
        quick_gelu: use OpenAI's activation, which its weights need; tags set it themselves.
        img_size: size of the frames, pixels.
        in_chans: must be 3.
        num_classes: must be 0.

    Returns:
        The model.

    Raises:
        ConfigError: an argument, or a combination of arguments, is invalid.
    """
    if in_chans != 3 or num_classes != 0:
        raise ConfigError("CLIP4Clip takes RGB frames and has no classes; leave in_chans and num_classes out.")
    of_model = {
        "similarity": similarity, "max_frames": max_frames, "fps": fps, "head_layers": head_layers,
        "head_mlp_ratio": head_mlp_ratio, "patch_grid": patch_grid, "words": words, "modality_bias": modality_bias,
    }  # fmt: skip
    given = {**of_model, "clip": clip, "lam_in": lam_in, "context_length": context_length, "quick_gelu": quick_gelu}
    chosen = {**config, **{key: value for key, value in given.items() if value is not None}}
    build, towers = (custom_towers, "clip") if "clip" in chosen else (named_towers, "open_clip")
    model = Clip4Clip(
        build(chosen[towers], img_size, chosen.get("context_length"), bool(chosen.get("quick_gelu"))),
        tokenizer_name=None if "clip" in chosen else chosen["open_clip"],
        **{key: chosen[key] for key in of_model if key in chosen},
    )
    if lam is not None:
        _add_masks(model, lam, chosen.get("lam_in"))
    return model


def _add_masks(model: Clip4Clip, lam: LamConfig, places: Sequence[Place] | None) -> None:
    default: tuple[Place, ...] = ("vision",) if model.similarity_type == "mean" else ("head",)
    places = default if places is None else places
    if not places or not set(places) <= set(get_args(Place)):
        raise ConfigError(f"lam_in is {tuple(places)}; it must name some of {', '.join(get_args(Place))}.")
    if "head" in places and model.similarity_type == "mean":
        raise ConfigError("similarity='mean' has no transformer in its head; set lam_in to 'vision' or 'text'.")
    text = ("clip.text", None) if hasattr(model.clip, "text") else ("clip.transformer", model.context_length)
    parts = {"head": ("head", model.head.length), "vision": ("clip.visual", None), "text": text}
    add_lam_to(model, dict(parts[place] for place in places), lam)
