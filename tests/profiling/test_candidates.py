from pathlib import Path
from typing import Any

import pytest

from lamzoo.errors import UnknownModelError, WeightsNotFoundError
from lamzoo.lam import LamConfig
from lamzoo.profiling.candidates import Candidate, select_models
from lamzoo.registry.factory import create_model
from lamzoo.registry.saving import save_pretrained


def names(*patterns, weights=False, plain=True):
    return [candidate.name for candidate in select_models(patterns, weights=weights, plain=plain)]


def test_a_plain_twin_stands_behind_its_model_once():
    assert names("lam_vit_micro") == ["lam_vit_micro", "vit_micro"]
    assert names("lam_vit_micro", "vit_micro", "lam_vit_micro") == ["lam_vit_micro", "vit_micro"]
    assert names("lam_vit_micro", plain=False) == ["lam_vit_micro"]
    assert names("vit_micro") == ["vit_micro"]


def test_without_weights_a_name_means_the_architecture_and_with_them_its_tags():
    assert names("lam_vit_tiny") == ["lam_vit_tiny", "timm/vit_tiny_patch16_224"]
    tagged = ["lam_vit_micro.cifar10", "vit_micro.cifar10"]
    assert names("lam_vit_micro", weights=True) == names("lam_vit_micro.cifar10") == tagged
    assert names("lam_vit_micro.cifar10_mul") == ["lam_vit_micro.cifar10_mul", "vit_micro.cifar10_mul"]
    assert names("lam_vit_small.augreg_in1k") == [
        "lam_vit_small.augreg_in1k",
        "timm/vit_small_patch16_224.augreg_in1k",
    ]


def test_patterns_are_those_of_the_list_command():
    every = names("lam_vit_*", plain=False)
    assert {"lam_vit_micro", "lam_vit_tiny", "lam_vit_large"} <= set(every)
    assert not any("." in name for name in every)
    assert "lam_vit_small.augreg_in1k" in names("lam_vit_*", weights=True)
    assert names("lam_vit_mic", plain=False) == ["lam_vit_micro"]
    assert names("timm/vit_tiny_patch16_224") == ["timm/vit_tiny_patch16_224"]
    assert set(names("*.cifar10")) >= {"lam_vit_micro.cifar10", "vit_micro.cifar10"}


def test_what_a_candidate_knows():
    (masked, plain) = select_models(["lam_vit_micro"], weights=True, plain=True)
    assert masked == Candidate("lam_vit_micro", "cifar10", plain="vit_micro.cifar10", img_size="32", fusible=True)
    assert plain == Candidate("vit_micro", "cifar10", plain=None, img_size="32")


def test_saved_models_are_candidates(tmp_path: Path):
    save_pretrained(create_model("lam_vit_micro", img_size=16, embed_dim=32, depth=1), tmp_path / "m")
    (saved,) = select_models([f"local-dir:{tmp_path / 'm'}"], weights=True, plain=True)
    assert saved == Candidate(f"local-dir:{tmp_path / 'm'}", None, None, "16", fusible=True)
    with pytest.raises(WeightsNotFoundError, match="no such folder"):
        names("local-dir:nowhere")


@pytest.mark.parametrize("refused", [{"op": "mul"}, {"hidden": (8,)}, {"keys": "content", "modalities": 2}])
def test_masks_without_a_fused_form_are_not_to_be_fused(refused: dict[str, Any], tmp_path: Path):
    lam = LamConfig(**refused)
    model = create_model("lam_clip4clip_micro", similarity="tight", lam=lam, lam_in=["head"])
    save_pretrained(model, tmp_path / "m")
    (saved,) = select_models([f"local-dir:{tmp_path / 'm'}"], weights=True, plain=True)
    assert not saved.fusible


@pytest.mark.parametrize("pattern", ["lam_vot_*", "nothing_like_it", "lam_vit_micro.imagenet", "timm/vot", "ftp:x"])
def test_a_pattern_that_matches_nothing_is_refused(pattern: str):
    with pytest.raises(UnknownModelError):
        names(pattern)
