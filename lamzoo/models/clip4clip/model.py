"""Text-video retrieval: CLIP4Clip on open_clip's towers, with optional learnable masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from importlib.util import find_spec
from typing import Any, ClassVar, Literal, Self, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamzoo.data.video.sampling import FrameSampling
from lamzoo.errors import ConfigError, MissingExtraError, class_name
from lamzoo.lam import LamConfig
from lamzoo.reduction import TokenReduction
from lamzoo.reduction.frames import merge_frames
from lamzoo.reduction.matching import full_precision

if find_spec("open_clip") is None:
    raise MissingExtraError("CLIP4Clip needs open_clip, which is not installed; pip install 'lamzoo[clip]'.")

import open_clip
from open_clip.convert import convert_state_dict
from open_clip.hf_model import HFTextEncoder
from open_clip.model import CLIP, resize_pos_embed, resize_text_pos_embed

from lamzoo.models.clip4clip.heads import MeanHead, SequentialHead, TightHead, initial_state, mean_of_frames
from lamzoo.models.clip4clip.tower_states import (
    check_freezable,
    check_text,
    check_vision,
    embed_text,
    embed_vision,
    gives_words,
    prefixes_of,
    text_states,
    text_width,
    vision_states,
    vision_width,
)
from lamzoo.models.clip4clip.towers import Towers
from lamzoo.models.tokenizers import HfTokenizer, SmallTokenizer, read_to_save

Similarity = Literal["mean", "seq", "tight"]
Tower = Literal["vision", "text"]


class Clip4Clip(nn.Module):
    """Two towers and a head that compares a text with the frames of a video (arXiv 2104.08860).

    Attributes:
        clip: the towers, a model of open_clip; the vision tower encodes each frame separately.
        head: ``mean``, ``seq`` or ``tight``, sections 3.3.1 to 3.3.3 of the paper.
        max_frames: number of frames that the head has positions for.
        sampling: frame sampling that the model expects.
        context_length: maximum tokens of a text.
        num_features: width of the embeddings.
        patch_grid: patches per side and frame that the head compares; 0 for none.
        words: whether the head compares words.
        frozen_towers: the towers that :meth:`freeze_towers` froze.
        encodes_alone: whether they encode each text and each video alone on a CPU; see there.
        tower_files: pretrained weights of towers, by the path of the tower in the model, for ``create_model``.
        tower_preprocessing: keys of timm's ``PretrainedCfg`` that the vision tower states; empty for open_clip's own.
        resolved_args: arguments that build the same model without these files, in place of the given ones.

    Args:
        clip: the towers, as created by ``open_clip.create_model``, or with their origin, as a :class:`Towers`.
        similarity: the head.
        max_frames: maximum frames of a video.
        fps: frames per second that a video is sampled at; 0 for all frames.
        head_layers: transformer layers of the head.
        head_mlp_ratio: hidden width of their MLPs, relative to that of the embeddings.
        patch_grid: the head also compares the patches of each frame, averaged over ``patch_grid`` by ``patch_grid``
            equal areas; 0 for none. Only with ``similarity="tight"``.
        words: the head also compares the words of the text. Only with ``similarity="tight"``.
        modality_bias: a learned bias for each pair of modalities in the head; the control for masks there. Likewise.
        tokenizer_name: open_clip model whose tokenizer is used; None for that of the towers, or the zoo's small one.
    """

    task: ClassVar[str] = "retrieval"
    #: Whether :func:`lamzoo.merge_tokens` can merge alike frames.
    merges_frames: ClassVar[bool] = True
    clip: Any
    head: Any
    lam_config: LamConfig | None
    #: Parameters (patterns) to the argument that determines their size, for error messages.
    sized_by: ClassVar[Mapping[str, str]] = {
        "head.embedding": "max_frames",
        "head.*.table.*": "max_frames",
        "head.word_projection.*": "clip",
        "head.patch_projection.*": "clip",
        "head.*.mlp.*": "head_mlp_ratio",
        "clip.positional_embedding": "context_length",
        "clip.text.positional_embedding": "context_length",
        "clip.transformer.*.table.*": "context_length",
        "clip.text.*.table.*": "context_length",
        "clip.visual.positional_embedding": "img_size",
    }

    def __init__(
        self,
        clip: Any,
        *,
        similarity: Similarity = "seq",
        max_frames: int = 12,
        fps: float = 1.0,
        head_layers: int = 4,
        head_mlp_ratio: float = 4.0,
        patch_grid: int = 0,
        words: bool = False,
        modality_bias: bool = False,
        tokenizer_name: str | None = None,
    ) -> None:
        super().__init__()
        if similarity not in get_args(Similarity):
            known = ", ".join(map(repr, get_args(Similarity)))
            raise ConfigError(f"The similarity of CLIP4Clip is {similarity!r}; it must be one of {known}.")
        if max_frames < 1 or head_layers < 1:
            raise ConfigError(
                f"CLIP4Clip has {max_frames} frames and {head_layers} layers in its head; both must be at least 1."
            )
        if (patch_grid or words or modality_bias) and similarity != "tight":
            raise ConfigError(
                "patch_grid, words and modality_bias are for similarity='tight', which compares tokens, and it is "
                f"{similarity!r}; leave them out."
            )
        towers = clip if isinstance(clip, Towers) else Towers(clip)
        self.clip = clip = towers.clip
        self.context_length: int = clip.context_length
        self.num_features: int = _embed_dim(clip)
        self.num_classes = 0
        self.similarity_type = similarity
        self.max_frames = max_frames
        self.sampling = FrameSampling(fps or None, max_frames)
        self.lam_config = None
        self.patch_grid, self.words = patch_grid, words
        self.frozen_towers: tuple[Tower, ...] = ()
        self.encodes_alone = False
        sizes = self.num_features, max_frames, head_layers, head_mlp_ratio, _activation(clip)
        if similarity == "tight":
            self.head: Any = TightHead(*sizes, **self._tokens(), modality_bias=modality_bias)
        else:
            self.head = SequentialHead(*sizes) if similarity == "seq" else MeanHead()
        self.tower_files = {f"clip.{path}": file for path, file in towers.files.items()}
        self.tower_preprocessing = dict(towers.preprocessing)
        self.resolved_args = {} if towers.args is None else {"clip": towers.args}
        self.fresh_layers = tuple(f"clip.{prefix}" for prefix in towers.fresh)
        self._tokenizer_name, self._tokenizer_source = tokenizer_name, towers.tokenizer

    def _tokens(self) -> dict[str, Any]:
        """Returns the numbers and widths of the words of a text and the patches of a frame, for the head."""
        sizes: dict[str, Any] = {}
        if self.words:
            check_text(self.clip)
            sizes["words"] = (self.context_length, text_width(self.clip))
        if self.patch_grid:
            check_vision(self.clip.visual, self.patch_grid)
            sizes["patches"] = (self.patch_grid**2, vision_width(self.clip.visual))
        return sizes

    def tokenizer_to_save(self) -> tuple[str, str] | None:
        """Returns the tokenizer that is saved with the model, as :func:`lamzoo.models.tokenizers.read_to_save`."""
        return read_to_save("clip.text_cfg.hf_tokenizer_name", self._tokenizer_source)

    @cached_property
    def tokenizer(self) -> Any:
        """Encodes a list of texts to token ids ``(B, context_length)``, int64."""
        if self._tokenizer_name is not None:
            return open_clip.get_tokenizer(self._tokenizer_name, context_length=self.context_length)
        if self._tokenizer_source is not None:
            padding = self.clip.text.config.pad_token_id
            return HfTokenizer(self._tokenizer_source, self.context_length, self.clip.vocab_size, padding)
        return SmallTokenizer(self.clip.vocab_size, self.context_length)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the frames."""
        size = self.clip.visual.image_size
        return (size, size) if isinstance(size, int) else tuple(size)

    def forward(self, frames: Tensor, text: Tensor, frame_mask: Tensor | None = None) -> Tensor:
        """Compares every text with every video: :meth:`similarity` of :meth:`encode_text` and :meth:`encode_video`."""
        return self.similarity(self.encode_text(text), self.encode_video(frames, frame_mask), frame_mask)

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Returns embeddings of texts ``(B, context_length)``; tokens after the end of a text are ignored.

        Args:
            text: token ids, int64, of :attr:`tokenizer`.
            normalize: normalise to length 1, as in open_clip.

        Returns:
            ``(B, D)``; with :attr:`words` ``(B, 1 + context_length, D)``, the embedding of the text and those of its
            words, zeros for padding.
        """
        if self.words or "text" in self.frozen_towers:
            return self.embed_text(self.text_states(text), normalize)
        return self.clip.encode_text(text, normalize=normalize)

    def text_states(self, text: Tensor) -> Tensor:
        """Returns the states of the text tower that :meth:`embed_text` takes, before all projections.

        Args:
            text: token ids ``(B, context_length)``, int64.

        Returns:
            ``(B, 1, C)``, pooled; with :attr:`words` ``(B, 1 + context_length, C)``.
        """
        with self._frozen("text"):
            if not self._apart("text", text):
                return text_states(self.clip, text, self.words)
            return torch.cat([text_states(self.clip, one, self.words) for one in text.split(1)])

    @property
    def gives_words(self) -> bool:
        """Whether :meth:`word_states` is possible."""
        return gives_words(self.clip)

    def word_states(self, text: Tensor) -> Tensor:
        """Returns the states of words, after the last norm of the text tower and before its projection.

        Args:
            text: token ids ``(B, W)``, int64.

        Returns:
            ``(B, W, C)``, zeros for padding.

        Raises:
            ConfigError: the text tower gives no states of words.
        """
        check_text(self.clip)
        return text_states(self.clip, text, words=True)[:, 1:]

    def embed_text(self, states: Tensor, normalize: bool = False) -> Tensor:
        """Projects states of :meth:`text_states`; returns what :meth:`encode_text` does."""
        embeddings = embed_text(self.clip, states[:, 0])
        if self.words:
            words = states[:, 1:]
            there = words.any(dim=-1, keepdim=True)
            words = self.head.word_projection(words).masked_fill(~there, 0.0)
            embeddings = torch.cat([embeddings[:, None], words], dim=1)
        return F.normalize(embeddings, dim=-1) if normalize else embeddings

    def encode_video(self, frames: Tensor, frame_mask: Tensor | None = None, normalize: bool = False) -> Tensor:
        """Returns video embeddings for :meth:`similarity`.

        Args:
            frames: ``(B, F, 3, H, W)``, float, preprocessed; ``F`` is at most ``max_frames``, except for ``"mean"``.
            frame_mask: ``(B, F)``, bool, True where there is a frame, at least one per video; None for all.
            normalize: normalise to length 1.

        Returns:
            ``(B, D)``; with ``similarity="tight"`` ``(B, F, D)`` or, with a :attr:`patch_grid`, ``(B, F, 1 + P, D)``:
            the embedding of each frame and those of its patches. Zeros for missing frames.

        Raises:
            ConfigError: there are more frames than the head has positions for.
        """
        if frames.shape[1] > self.max_frames and self.similarity_type != "mean":
            raise ConfigError(
                f"The videos have {frames.shape[1]} frames and this CLIP4Clip has positions for {self.max_frames}; "
                "sample fewer frames, or create the model with a larger max_frames."
            )
        if self.patch_grid or "vision" in self.frozen_towers:
            return self.embed_video(self.frame_states(frames, frame_mask), frame_mask, normalize)
        return self._compared(self.encode_frames(frames, frame_mask), frame_mask, normalize)

    def frame_states(self, frames: Tensor, frame_mask: Tensor | None = None) -> Tensor:
        """Returns the states of the vision tower that :meth:`embed_video` takes, before all projections.

        Args:
            frames: ``(B, F, 3, H, W)``, float, preprocessed.
            frame_mask: ``(B, F)``, bool; None for all.

        Returns:
            ``(B, F, 1, C)``, pooled; with a :attr:`patch_grid` ``(B, F, 1 + P, C)``. Zeros for missing frames.
        """
        tokens = 1 + self.patch_grid**2

        def encode(images: Tensor) -> Tensor:
            return vision_states(self.clip.visual, images, self.patch_grid).flatten(1)

        with self._frozen("vision"):
            if not self._apart("vision", frames):
                return self._encode_frames(encode, frames, frame_mask).unflatten(-1, (tokens, -1))
            masks = (frames.new_ones(frames.shape[:2]).bool() if frame_mask is None else frame_mask).split(1)
            pairs = zip(frames.split(1), masks, strict=True)
            states = torch.cat([self._encode_frames(encode, *pair) for pair in pairs])
            return states.unflatten(-1, (tokens, -1))

    def embed_video(self, states: Tensor, frame_mask: Tensor | None = None, normalize: bool = False) -> Tensor:
        """Projects and compares states of :meth:`frame_states`; returns what :meth:`encode_video` does."""
        seen = _whole(states) if frame_mask is None else frame_mask
        video = embed_vision(self.clip.visual, states[:, :, 0])
        if self.patch_grid:
            video = torch.cat([video[:, :, None], self.head.patch_projection(states[:, :, 1:])], dim=2)
        video = video.masked_fill(~seen.view(*seen.shape, *[1] * (video.ndim - 2)), 0.0)
        return self._compared(video, frame_mask, normalize)

    def _compared(self, video: Tensor, frame_mask: Tensor | None, normalize: bool) -> Tensor:
        """Returns video embeddings of frame embeddings ``(B, F, D)``; the tight head compares them later."""
        if not isinstance(self.head, TightHead):
            video = self.head(video, _whole(video) if frame_mask is None else frame_mask)
        return F.normalize(video, dim=-1) if normalize else video

    def encode_frames(self, frames: Tensor, frame_mask: Tensor | None = None) -> Tensor:
        """Returns the vision tower's embedding of each frame, ``(B, F, D)``; zeros for missing frames.

        Frames that :func:`lamzoo.merge_tokens` merges have the same embedding, that of their mean.

        Args:
            frames: ``(B, F, 3, H, W)``, float.
            frame_mask: ``(B, F)``, bool.
        """
        return self._encode_frames(self.clip.encode_image, frames, frame_mask)

    def _encode_frames(self, encode: Callable[[Tensor], Tensor], frames: Tensor, frame_mask: Tensor | None) -> Tensor:
        """Returns what ``encode`` makes of each image, ``(B, F, D)``; zeros for missing frames."""
        reduction: TokenReduction | None = getattr(self, "token_reduction", None)
        share = 1.0 if reduction is None else reduction.frames
        if frame_mask is None or bool(frame_mask.all()):
            return _encode(encode, [frames], share)[0]
        if share == 1:
            places, videos = [frame_mask], [frames[frame_mask].unsqueeze(0)]  # padding isn't encoded
        else:  # videos of the same length together, so that each is merged as if it were alone
            lengths = frame_mask.sum(dim=1, keepdim=True)
            chosen = [length for length in lengths.unique().tolist() if length > 0]
            places = [frame_mask & (lengths == length) for length in chosen]
            videos = [frames[here].unflatten(0, (-1, length)) for here, length in zip(places, chosen, strict=True)]
        parts = _encode(encode, videos, share)
        seen = parts[0].new_zeros(*frames.shape[:2], parts[0].shape[-1])
        for here, part in zip(places, parts, strict=True):
            seen = seen.masked_scatter(here[..., None], part)
        return seen

    def similarity(self, text: Tensor, video: Tensor, frame_mask: Tensor | None = None) -> Tensor:
        """Compares every text with every video.

        Args:
            text: ``(T, D)`` or ``(T, 1 + W, D)``, from :meth:`encode_text`.
            video: ``(V, D)``, ``(V, F, D)`` or ``(V, F, 1 + P, D)``, from :meth:`encode_video`.
            frame_mask: ``(V, F)``, bool, as for :meth:`encode_video`; only used with ``similarity="tight"``. None for
                all frames with a non-zero embedding.

        Returns:
            ``(T, V)``: cosines times the learned temperature, or the logits of the tight head. Float32 also under
            autocast, since many videos would have equal scores in bfloat16.
        """
        if isinstance(self.head, TightHead):
            return self.head(text, video, _seen(video.flatten(2)) if frame_mask is None else frame_mask)
        return self.dual_similarity(text, video, frame_mask)

    def dual_similarity(self, text: Tensor, video: Tensor, frame_mask: Tensor | None = None) -> Tensor:
        """Compares every text with every video by their embeddings alone, without the joint transformer.

        This is the first stage of two-stage retrieval; :meth:`match` is the second one. Arguments and result are those
        of :meth:`similarity`; with ``similarity="tight"`` videos have the embeddings of :meth:`pool_frames`.
        """
        text = text[:, 0] if text.ndim == 3 else text
        if video.ndim > 2:
            video = self.pool_frames(video, frame_mask)
        with full_precision(text.device):
            scale = self.clip.logit_scale.float().exp()
            return scale * F.normalize(text.float(), dim=-1) @ F.normalize(video.float(), dim=-1).T

    def pool_frames(self, video: Tensor, frame_mask: Tensor | None = None) -> Tensor:
        """Returns the mean ``(V, D)`` of the normalised frames of each video, as with ``similarity="mean"``.

        Args:
            video: ``(V, F, D)``, or with patches ``(V, F, 1 + P, D)``, which are left out, from :meth:`encode_video`.
            frame_mask: ``(V, F)``, bool; None for all frames with a non-zero embedding.
        """
        seen = _seen(video.flatten(2)) if frame_mask is None else frame_mask
        return mean_of_frames(video if video.ndim == 3 else video[:, :, 0], seen)

    def match(self, text: Tensor, video: Tensor, frame_mask: Tensor | None = None) -> Tensor:
        """Compares each text with one video by the joint transformer of ``similarity="tight"``.

        Args:
            text: ``(P, D)``, from :meth:`encode_text`.
            video: ``(P, F, D)``, from :meth:`encode_video`.
            frame_mask: ``(P, F)``, bool, as for :meth:`similarity`.

        Returns:
            Logits ``(P,)``, float32.

        Raises:
            ConfigError: the model has another similarity.
        """
        if not isinstance(self.head, TightHead):
            raise ConfigError(
                f"similarity={self.similarity_type!r} has no joint transformer that matches a text with a video; "
                "create the model with similarity='tight'."
            )
        return self.head.match(text, video, _seen(video.flatten(2)) if frame_mask is None else frame_mask)

    def example_inputs(self, batch_size: int = 1) -> tuple[Tensor, Tensor]:
        """Returns random videos of ``max_frames`` frames and as many texts, for profiling."""
        like = next(self.parameters())
        frames = torch.rand(batch_size, self.max_frames, 3, *self.image_size, device=like.device)
        text = torch.ones(batch_size, self.context_length, dtype=torch.int64, device=like.device)
        text[:, -1] = self.clip.vocab_size - 1  # the end token
        return frames.to(like.dtype), text

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Switches gradient checkpointing on or off, in the towers and the head."""
        self.clip.set_grad_checkpointing(enable)
        text = getattr(self.clip, "text", None)
        if isinstance(text, HFTextEncoder) and not enable:  # open_clip 3.3 switches it on in either case
            text.transformer.gradient_checkpointing_disable()
        for module in self.head.modules():
            if hasattr(module, "grad_checkpointing"):
                module.grad_checkpointing = enable

    def lock_image_tower(self, unlocked_groups: int = 0, freeze_bn_stats: bool = False) -> None:
        """Freezes the vision tower except its last groups of layers, as in open_clip; masks stay trainable."""
        self.clip.lock_image_tower(unlocked_groups=unlocked_groups, freeze_bn_stats=freeze_bn_stats)
        for name, parameter in self.clip.visual.named_parameters():
            if ".lam." in name:
                parameter.requires_grad = True

    def freeze_towers(self, towers: Sequence[Tower], *, one_by_one: bool = False) -> None:
        """Freezes whole towers, which then stay in evaluation mode ("LiT", arXiv 2111.07991).

        Their masks stay trainable, and so do the projections of towers of timm and transformers, which are new. States
        of a tower that :meth:`is_cacheable` can be computed once.

        Args:
            towers: ``"vision"``, ``"text"`` or both.
            one_by_one: encode each text and each video of a frozen tower alone on a CPU, so that its states don't
                depend on its batch in the last digits.

        Raises:
            ConfigError: there is no such tower, or it pools by layers that have to be trained.
        """
        if not set(towers) <= set(get_args(Tower)):
            raise ConfigError(f"freeze_towers was given {tuple(towers)}; it takes {' and '.join(get_args(Tower))}.")
        for tower in towers:
            check_freezable(self.clip, tower)
        self.frozen_towers, self.encodes_alone = tuple(dict.fromkeys(towers)), one_by_one
        for tower in self.frozen_towers:
            for name, parameter in self.named_parameters():
                if self._is_part(name, tower) and ".lam." not in name:
                    parameter.requires_grad = False
        self.train(self.training)

    def is_cacheable(self, tower: Tower) -> bool:
        """Returns whether the states of a tower never change in training: it is frozen and has no masks."""
        return tower in self.frozen_towers and not any(
            parameter.requires_grad for name, parameter in self.named_parameters() if self._is_part(name, tower)
        )

    def tower_state(self, tower: Tower) -> dict[str, Tensor]:
        """Returns the part of the state dict on which the states of a tower depend."""
        return {name: value for name, value in self.state_dict().items() if self._is_part(name, tower)}

    @property
    def tower_facts(self) -> dict[str, Any]:
        """What the towers compute with besides their weights: open_clip's name or the arguments, and their modules."""
        arguments: Mapping[str, Any] = getattr(self, "_model_args", {})  # timm's name for those of create_model
        kept = {key: arguments.get(key) for key in ("clip", "quick_gelu", "context_length", "img_size")}
        return {**kept, "open_clip": self._tokenizer_name, "modules": repr(self.clip)}

    def train(self, mode: bool = True) -> Self:
        """Sets the training mode; frozen towers stay in evaluation mode."""
        super().train(mode)
        for name, module in self.named_modules():
            if any(self._is_part(f"{name}.", tower) for tower in self.frozen_towers):
                module.training = False
        return self

    def _is_part(self, name: str, tower: Tower) -> bool:
        return name.startswith(tuple(f"clip.{prefix}" for prefix in prefixes_of(self.clip, tower)))

    def _frozen(self, tower: Tower) -> AbstractContextManager[Any]:
        return torch.no_grad() if self.is_cacheable(tower) else nullcontext()

    def _apart(self, tower: Tower, inputs: Tensor) -> bool:
        return self.encodes_alone and tower in self.frozen_towers and inputs.device.type == "cpu"

    def freeze_layers(self, count: int) -> None:
        """Freezes the embeddings and the first ``count`` blocks of both towers (the paper's ``freeze_layer_num``).

        The layers after the blocks, the masks and the head stay trainable.

        Raises:
            ConfigError: the towers aren't open_clip's own transformers, or have fewer blocks.
        """
        if not isinstance(self.clip, CLIP) or not hasattr(self.clip.visual, "transformer"):
            raise ConfigError(
                f"freeze_layers needs open_clip's own transformers, and the vision tower is "
                f"{class_name(self.clip.visual)}; use lock_image_tower."
            )
        depth = min(len(self.clip.visual.transformer.resblocks), len(self.clip.transformer.resblocks))
        if not 0 <= count <= depth:
            raise ConfigError(f"freeze_layers was given {count} blocks; the towers have {depth}.")
        ends = ("ln_final.", "text_projection", "logit_scale", "visual.ln_post.", "visual.attn_pool.", "visual.proj")
        for name, parameter in self.clip.named_parameters():
            block = name.partition("resblocks.")[2].partition(".")[0]
            late = int(block) >= count if block else name.startswith(ends)
            parameter.requires_grad = late or ".lam." in name

    def no_weight_decay(self) -> set[str]:
        """Returns the names of parameters without weight decay, for timm's optimisers."""
        towers = {f"clip.{name}" for name in self.clip.no_weight_decay()}
        trunk: Any = getattr(self.clip.visual, "trunk", None)  # of timm, for which open_clip states none
        if hasattr(trunk, "no_weight_decay"):
            towers |= {f"clip.visual.trunk.{name}" for name in trunk.no_weight_decay()}
        names = (name for name, _ in self.named_parameters() if name.startswith("head."))
        return towers | {name for name in names if name.startswith("head.embedding") or name.endswith(".modality.bias")}


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: Clip4Clip) -> dict[str, Tensor]:
    """Converts weights of open_clip to a state dict of the model; the head is initialised from the text tower.

    A state dict of the model itself is returned unchanged. Name and arguments are those of timm's converters.
    """
    if any(key.startswith(("clip.", "head.")) for key in state_dict):
        return state_dict
    weights = convert_state_dict(model.clip, dict(state_dict))
    # Else open_clip interpolates them. The last position of CoCa is that of a class token.
    key = "positional_embedding" if isinstance(model.clip, CLIP) else "text.positional_embedding"
    has_class_token = getattr(getattr(model.clip, "text", None), "cls_emb", None) is not None
    if key in weights and not has_class_token and len(weights[key]) > model.context_length:
        weights[key] = weights[key][: model.context_length]
    resize_pos_embed(weights, model.clip)
    resize_text_pos_embed(weights, model.clip)
    if "logit_bias" in weights and getattr(model.clip, "logit_bias", None) is None:
        del weights["logit_bias"]
    head = initial_state(model.head, weights)
    return {f"clip.{key}": value for key, value in weights.items()} | {f"head.{key}": head[key] for key in head}


def _encode(encode: Callable[[Tensor], Tensor], videos: Sequence[Tensor], share: float) -> list[Tensor]:
    """Returns the embeddings of whole videos of several lengths, each ``(B, F, 3, H, W)``, in one pass."""
    merged = [merge_frames(video, share) for video in videos]
    few = [frames.flatten(0, 1) for frames, _ in merged]
    embedded = encode(torch.cat(few) if len(few) > 1 else few[0]).split([len(part) for part in few])
    whole = []
    for part, (frames, token_map) in zip(embedded, merged, strict=True):
        seen = part.unflatten(0, frames.shape[:2])
        whole.append(seen if token_map is None else token_map.spread(seen))
    return whole


def _embed_dim(clip: Any) -> int:
    projection = clip.text_projection if isinstance(clip, CLIP) else getattr(clip.text, "text_projection", None)
    if projection is None:
        return int(getattr(clip.text, "output_dim", None) or clip.visual.output_dim)
    return int(projection.out_features if isinstance(projection, nn.Linear) else projection.shape[1])


def _activation(clip: Any) -> type[nn.Module]:
    quick = any(isinstance(module, open_clip.transformer.QuickGELU) for module in clip.modules())
    return open_clip.transformer.QuickGELU if quick else nn.GELU


def _seen(video: Tensor) -> Tensor:
    """Returns which frames of ``(V, F, D)`` aren't zero padding, bool ``(V, F)``; all frames of an all-zero video."""
    seen = video.any(dim=-1)
    return seen | ~seen.any(dim=-1, keepdim=True)


def _whole(tokens: Tensor) -> Tensor:
    return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
