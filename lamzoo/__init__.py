"""lamzoo: a model zoo of learnable attention masks (LAM, arXiv 2406.02761)."""

from typing import TYPE_CHECKING

from lamzoo.lazy import install_aliases, submodules_of
from lamzoo.version import __version__ as __version__

if TYPE_CHECKING:
    from lamzoo.adapters import (
        add_lam,
        capture_masks,
        from_pretrained,
        fuse,
        lam_parameters,
        lam_state_dict,
        load_lam_state_dict,
        remove_lam,
        set_lam,
        unfuse,
    )
    from lamzoo.errors import LamzooError
    from lamzoo.export import export_model, load_exported
    from lamzoo.hub import push_to_hub
    from lamzoo.lam import FactoredMask, LamConfig, attention_backend, lam_attention
    from lamzoo.profiling import profile
    from lamzoo.reduction import (
        PruneConfig,
        TokenReduction,
        merge_tokens,
        prune_tokens,
        pruning_loss,
        remove_pruning,
        remove_reduction,
    )
    from lamzoo.registry.catalog import get_pretrained_cfg, list_models, list_tags, model_info, register_model
    from lamzoo.registry.factory import create_model
    from lamzoo.registry.saving import save_pretrained
    from lamzoo.video.describe import describe_video
    from lamzoo.video.described_folder import describe_videos
    from lamzoo.video.search import index_videos
    from lamzoo.weights import load_lam, save_lam

install_aliases()

# Imported when first asked for: torch and timm take seconds, and the command line's --help needs neither.
_HOMES = {
    "FactoredMask": "lamzoo.lam",
    "LamConfig": "lamzoo.lam",
    "LamzooError": "lamzoo.errors",
    "PruneConfig": "lamzoo.reduction",
    "TokenReduction": "lamzoo.reduction",
    "add_lam": "lamzoo.adapters",
    "attention_backend": "lamzoo.lam",
    "capture_masks": "lamzoo.adapters",
    "create_model": "lamzoo.registry",
    "describe_video": "lamzoo.video.describe",
    "describe_videos": "lamzoo.video.described_folder",
    "export_model": "lamzoo.export",
    "from_pretrained": "lamzoo.adapters",
    "fuse": "lamzoo.adapters",
    "get_pretrained_cfg": "lamzoo.registry",
    "index_videos": "lamzoo.video.search",
    "lam_attention": "lamzoo.lam",
    "lam_parameters": "lamzoo.adapters",
    "lam_state_dict": "lamzoo.adapters",
    "list_models": "lamzoo.registry",
    "list_tags": "lamzoo.registry",
    "load_exported": "lamzoo.export",
    "load_lam": "lamzoo.weights",
    "load_lam_state_dict": "lamzoo.adapters",
    "merge_tokens": "lamzoo.reduction",
    "model_info": "lamzoo.registry",
    "profile": "lamzoo.profiling",
    "prune_tokens": "lamzoo.reduction",
    "pruning_loss": "lamzoo.reduction",
    "push_to_hub": "lamzoo.hub",
    "register_model": "lamzoo.registry",
    "remove_lam": "lamzoo.adapters",
    "remove_pruning": "lamzoo.reduction",
    "remove_reduction": "lamzoo.reduction",
    "save_lam": "lamzoo.weights",
    "save_pretrained": "lamzoo.registry.saving",
    "set_lam": "lamzoo.adapters",
    "unfuse": "lamzoo.adapters",
}

__all__ = [
    "FactoredMask",
    "LamConfig",
    "LamzooError",
    "PruneConfig",
    "TokenReduction",
    "add_lam",
    "attention_backend",
    "capture_masks",
    "create_model",
    "describe_video",
    "describe_videos",
    "export_model",
    "from_pretrained",
    "fuse",
    "get_pretrained_cfg",
    "index_videos",
    "lam_attention",
    "lam_parameters",
    "lam_state_dict",
    "list_models",
    "list_tags",
    "load_exported",
    "load_lam",
    "load_lam_state_dict",
    "merge_tokens",
    "model_info",
    "profile",
    "prune_tokens",
    "pruning_loss",
    "push_to_hub",
    "register_model",
    "remove_lam",
    "remove_pruning",
    "remove_reduction",
    "save_lam",
    "save_pretrained",
    "set_lam",
    "unfuse",
]


if not TYPE_CHECKING:  # a type checker would believe any name
    __getattr__ = submodules_of(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
