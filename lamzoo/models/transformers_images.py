"""Image models of Hugging Face transformers with timm's interface: images in, one tensor out."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed, to_2tuple
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lamzoo.adapters import add_lam, lam_state_dict, load_lam_state_dict
from lamzoo.adapters.pretrained import saved_class
from lamzoo.errors import ConfigError, MissingExtraError, StateDictError, UnsupportedHostError, class_name
from lamzoo.lam import LamConfig

_MASK = "attention_mask"
_OUTPUTS = ("logits", "image_embeds", "pooler_output", "last_hidden_state")


class TransformersImages(nn.Module):
    """An image model of transformers that timm's conventions apply to.

    Args:
        host: the model, of a class that :func:`image_class` accepts.
        size: height and width of its images, if it takes others than its configuration says.

    Attributes:
        host: likewise.
        image_size: height and width of its images; None if neither its configuration nor its preprocessing says it.
    """

    def __init__(self, host: nn.Module, size: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.host: Any = host
        config: Any = host.config
        vision: Any = getattr(config, "vision_config", config)  # of CLIP and SigLIP
        self.image_size = size or image_size_of(config)
        heads = self._heads()
        if _is_classifier(type(host)) and config.num_labels and not heads:
            raise ConfigError(
                f"The layer of {type(host).__name__} that makes logits is unknown; call the model itself in Python."
            )
        widths = [*getattr(vision, "hidden_sizes", ()), getattr(vision, "hidden_size", 0)]
        self._linear = {path: (head.in_features, head.bias is not None) for path, head in heads.items()}
        self.num_features: int = next((head.in_features for head in heads.values()), widths[-1] or widths[-2:][0])
        self.lam_config: LamConfig | None = getattr(host, "lam_config", None)

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 for a model without a classifier."""
        return int(self.host.config.num_labels) if self._heads() else 0

    @property
    def classifier_names(self) -> tuple[str, ...]:
        """Paths of the layers that make the logits: one, two of a distilled model, or none."""
        return tuple(f"host.{path}" for path in self._heads())

    def _heads(self) -> dict[str, nn.Linear]:
        if not _is_classifier(type(self.host)):
            return {}
        return {
            path: layer
            for path, layer in self.host.named_modules()
            if re.search("classifier|head", path.partition(".")[0])
            and isinstance(layer, nn.Linear)
            and layer.out_features == self.host.config.num_labels
        }

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits of images ``(B, C, H, W)``, ``(B, classes)``.

        Without a classifier, they are embeddings ``(B, D)``, or tokens ``(B, N, C)`` of models that pool none.
        """
        handles = _leave_out_masks(self.host) if torch.compiler.is_exporting() else []
        try:
            outputs = self.host(pixel_values=x)
        finally:
            for handle in handles:
                handle.remove()
        found: Tensor = next(outputs[name] for name in _OUTPUTS if outputs.get(name) is not None)
        return found

    def takes(self, size: tuple[int, int]) -> bool:
        """Returns whether the model takes images of a height and width, as those that interpolate positions do."""
        if size == image_size_of(self.host.config):
            return True
        vision: Any = getattr(self.host.config, "vision_config", self.host.config)
        with torch.device("meta"), torch.no_grad():
            host = type(self.host)(self.host.config)
            try:
                host(pixel_values=torch.empty(1, getattr(vision, "num_channels", 3), *size))
            except (ValueError, RuntimeError):  # what transformers and torch raise for sizes that don't fit
                return False
        return True

    def get_classifier(self) -> nn.Module | tuple[nn.Module, ...]:
        """Returns the classifier, both of a distilled model as timm does; ``nn.Identity`` without one."""
        heads = tuple(self._heads().values())
        return heads if len(heads) > 1 else (*heads, nn.Identity())[0]

    def reset_classifier(self, num_classes: int) -> None:
        """Replaces the classifier by a fresh one; 0 classes for none, as timm does.

        Raises:
            UnsupportedHostError: the model has none.
        """
        if not self._linear:
            raise UnsupportedHostError(
                f"{type(self.host).__name__} has no linear classifier; name a model that has one, such as "
                "ViTForImageClassification."
            )
        self.host.config.num_labels = self.host.num_labels = num_classes
        like = next(self.host.parameters())
        for path, (width, bias) in self._linear.items():
            new = nn.Linear(width, num_classes, bias).to(like) if num_classes else nn.Identity()
            self.host.set_submodule(path, new)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Turns gradient checkpointing on or off."""
        if enable:
            self.host.activation_checkpointing_enable()
        else:
            self.host.activation_checkpointing_disable()

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Returns the names of the parameters that are not decayed: those of the masks."""
        own = getattr(self.host, "no_weight_decay", None)
        return set() if own is None else {f"host.{name}" for name in own()}


def _leave_out_masks(host: nn.Module) -> list[RemovableHandle]:
    """Leaves the masks of all tokens out of its blocks, which transformers makes of images while it is exported."""
    from lamzoo.adapters.transformers_vision import tower_layouts  # with transformers, which is optional

    def without_mask(
        block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (args[0], *(None for _ in args[1:])), {name: value for name, value in kwargs.items() if name != _MASK}

    return [
        block.register_forward_pre_hook(without_mask, with_kwargs=True, prepend=True)
        for layout in tower_layouts(host)
        # The masks of others hold biases and padding.
        if layout.pooling is not None and layout.pooling.no_merging is None and layout.pooling.padding is None
        for block in host.get_submodule(layout.pooling.blocks).children()
    ]


def transformers_images(
    config: Mapping[str, Any],
    *,
    hf_config: Mapping[str, Any],
    lam: LamConfig | None = None,
    num_classes: int | None = None,
    in_chans: int | None = None,
    img_size: int | tuple[int, int] | None = None,
) -> TransformersImages:
    """Builds an image model of transformers with fresh weights.

    Args:
        config: of the card; unused.
        hf_config: the ``config.json`` of transformers.
        lam: masks; None for none.
        num_classes: replaces the number of classes; 0 for no classifier.
        in_chans: replaces the number of channels.
        img_size: replaces the image size.

    Raises:
        MissingExtraError: transformers is not installed.
        ConfigError: the configuration is not that of an image model.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("This model needs transformers; pip install 'lamzoo[transformers]'.") from error
    fields = dict(hf_config)
    if num_classes and len(fields.get("id2label", ())) != num_classes:
        fields = {key: value for key, value in fields.items() if key not in ("id2label", "label2id")}
        fields["num_labels"] = num_classes
    parsed = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    vision: Any = getattr(parsed, "vision_config", parsed)  # of CLIP and SigLIP
    if in_chans is not None:
        vision.num_channels = in_chans
    cls = image_class("This model", parsed)
    size = None if img_size is None else to_2tuple(img_size)
    if size is not None and size != image_size_of(parsed):
        with torch.device("meta"):
            takes = TransformersImages(cls(parsed)).takes(size)
        if not takes:
            set_image_size(parsed, size)
    host = cls(parsed)
    model = TransformersImages(host if lam is None else add_lam(host, lam), size)
    if num_classes == 0 and model.num_classes:
        model.reset_classifier(0)
    return model


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: TransformersImages) -> dict[str, Tensor]:
    """Resizes position embeddings ``(1, N, C)`` or ``(N, C)`` of a saved model to the image size of ``model``."""
    return _with_resized_positions(state_dict, model.host, prefix="host.")


def set_image_size(config: Any, size: tuple[int, int]) -> None:
    """Sets the height and width of the images in a ``PretrainedConfig`` or, of CLIP and others, its vision tower's.

    Raises:
        ConfigError: no patch fits into the images, or they are not square and the model's have to be.
    """
    vision: Any = getattr(config, "vision_config", config)
    model = type(config).__name__.removesuffix("Config")
    patch = to_2tuple(_patch_size(vision))
    if any(side < of_patch for side, of_patch in zip(size, patch, strict=True)):
        raise ConfigError(f"img_size={size}: {model} has patches of {patch} pixels; the images must have one at least.")
    if size[0] != size[1] and "vision" in type(vision).__name__.lower():  # whose classes count a square's patches
        raise ConfigError(f"img_size={size}: {model} takes square images; give a single number.")
    vision.image_size = size[0] if size[0] == size[1] and isinstance(vision.image_size, int) else list(size)


def resized_model(host: Any, size: tuple[int, int]) -> nn.Module:
    """Builds a model of transformers for images of another size, with the weights and masks of the model given.

    Position embeddings are interpolated as the model's own ``interpolate_pos_encoding`` does; tables of masks with
    ``keys="position"`` are resized as :func:`lamzoo.load_lam_state_dict` does.

    Args:
        host: the model, which stays unchanged.
        size: height and width of the images in pixels.

    Raises:
        ConfigError: the model can't have images of this size.
        StateDictError: the shape of another tensor depends on the image size; names it.
    """
    config = copy.deepcopy(host.config)
    set_image_size(config, size)
    vars(config).pop("lam_config", None)
    model: Any = type(host)._from_config(config, dtype=host.dtype)
    if host.can_generate():
        model.generation_config = copy.deepcopy(host.generation_config)
    state = {key: value for key, value in host.state_dict().items() if ".lam." not in key}
    state = _with_resized_positions(state, model, old=image_size_of(host.config))
    for key, value in model.state_dict().items():
        if value.shape != state[key].shape:
            raise StateDictError(
                f"{key} has the shape {tuple(state[key].shape)} in the weights and {tuple(value.shape)} at "
                f"img_size={size}, and {type(host).__name__} has no rule to resize it; leave img_size out."
            )
    model.load_state_dict(state)
    if getattr(host, "lam_config", None) is not None:
        model.lam_config = host.lam_config
        load_lam_state_dict(add_lam(model, host.lam_config), lam_state_dict(host))
    return model.train(host.training)


def _with_resized_positions(
    state: Mapping[str, Tensor], model: nn.Module, *, prefix: str = "", old: tuple[int, int] | None = None
) -> dict[str, Tensor]:
    """Resizes the position embeddings in a state dict to those of a model, in its vision towers of known classes.

    Args:
        state: weights of a model of this class.
        model: the model of transformers.
        prefix: of the names in ``state``.
        old: height and width of the images that the weights are for; None takes a square of patches.
    """
    from lamzoo.adapters.transformers_vision import find_towers  # with transformers, which is optional

    resized, own = dict(state), model.state_dict()
    for path, tower in find_towers(model):
        if image_size_of(tower.config) is None:  # of SigLIP 2, which takes images of any size
            continue
        patch = to_2tuple(_patch_size(tower.config))
        height, width = to_2tuple(tower.config.image_size)
        rows, columns = height // patch[0], width // patch[1]
        for name in _POSITIONS:
            inner = f"{path}.{name}" if path else name
            table, target = state.get(prefix + inner), own.get(inner)
            if table is None or target is None or table.shape == target.shape or table.shape[-1] != target.shape[-1]:
                continue
            special = target.shape[-2] - rows * columns  # class tokens, which come first
            count = table.shape[-2] - special
            grid = (math.isqrt(max(count, 0)),) * 2
            if old is not None:
                grid = (old[0] // patch[0], old[1] // patch[1])
            if special < 0 or hasattr(tower.config, "num_frames") or grid[0] * grid[1] != count:
                continue
            known = table.reshape(1, *table.shape[-2:])
            fitted = resample_abs_pos_embed(known, (rows, columns), grid, num_prefix_tokens=special, antialias=False)
            resized[prefix + inner] = fitted.reshape(*table.shape[:-2], *fitted.shape[-2:])
    return resized


# Where the vision towers have their position embeddings.
_POSITIONS = ("embeddings.position_embeddings", "embeddings.position_embedding.weight")


def _patch_size(vision: Any) -> Any:
    tubelet = getattr(vision, "tubelet_size", None)  # ViViT's has the patch size in it
    return tuple(tubelet[1:]) if isinstance(tubelet, (list, tuple)) else getattr(vision, "patch_size", 1)


def as_image_model(model: nn.Module) -> nn.Module:
    """Returns a model with one tensor as its output: of an image model of transformers, a wrapper around it.

    Raises:
        ConfigError: a model of transformers that takes more than images.
    """
    if all(class_name(cls) != "transformers.modeling_utils.PreTrainedModel" for cls in type(model).__mro__):
        return model
    _check_image_class("The model", type(model))
    return TransformersImages(model)


def image_size_of(config: Any) -> tuple[int, int] | None:
    """Returns the height and width of the images of a ``PretrainedConfig``; None if it has none."""
    size = getattr(getattr(config, "vision_config", config), "image_size", None)
    return None if size is None else to_2tuple(size)


def image_class(name: str, config: Any) -> type[nn.Module]:
    """Returns the class of an image classifier or of a plain image model, by the configuration that it was saved with.

    Args:
        name: of the model, for messages.
        config: a ``PretrainedConfig``.

    Raises:
        WeightsError: the class is none of transformers.
        ConfigError: it is another kind of model.
    """
    cls = saved_class(name, config)
    _check_image_class(name, cls)
    return cls


def _is_classifier(cls: type) -> bool:
    return "ForImageClassification" in cls.__name__


def _check_image_class(name: str, cls: Any) -> None:
    reads_images = cls.main_input_name == "pixel_values" and tuple(cls.input_modalities or ()) == ("image",)
    if not (reads_images and (_is_classifier(cls) or cls.__name__.endswith("Model"))):
        raise ConfigError(
            f"{name} is a {cls.__name__}, and lamzoo's commands take image classifiers and plain image models of "
            "transformers, which are called with images alone; build others with lamzoo.create_model in Python."
        )
