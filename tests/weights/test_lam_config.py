"""Weights of one kind of mask never load into another silently, wherever they come from."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from lamzoo.adapters import add_lam, lam_parameters, lam_state_dict, load_lam_state_dict
from lamzoo.errors import ConfigError, StateDictError, WeightsError
from lamzoo.lam import LamConfig
from lamzoo.registry.cards import ModelSpec, PretrainedWeights
from lamzoo.registry.catalog import model_info
from lamzoo.registry.factory import create_model
from lamzoo.registry.saving import save_pretrained
from lamzoo.weights.files import file_sha256, join, read_state_dict, shard, write_state_dict

ADD = LamConfig(rank=2)
#: Each has tensors of the same shapes as one of the others, and means something else.
KINDS = [ADD, LamConfig(op="mul", rank=2), LamConfig(op="mul", sign="positive", rank=2)]
pairs = pytest.mark.parametrize(
    ("trained", "asked", "named"),
    [(KINDS[0], KINDS[1], "op='add'.*op='mul'"), (KINDS[2], KINDS[1], "sign='positive'.*sign='free'")],
)


def create(lam: LamConfig, **kwargs: Any) -> nn.Module:
    return create_model("timm/test_vit", lam=lam, img_size=32, num_classes=3, **kwargs)


def trained_model(lam: LamConfig) -> nn.Module:
    model = create(lam)
    with torch.no_grad():
        for parameter in lam_parameters(model):
            parameter.normal_(std=0.1)
    return model


def masks_equal(left: nn.Module, right: nn.Module) -> bool:
    ours, theirs = lam_state_dict(left), lam_state_dict(right)
    return all(torch.equal(value, theirs[key]) for key, value in ours.items())


@pairs
def test_a_bare_file_carries_its_masks_kind(
    trained: LamConfig, asked: LamConfig, named: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = trained_model(trained)
    file = write_state_dict(model.state_dict(), tmp_path / "bare.safetensors").path
    with safe_open(file, framework="pt") as opened:
        assert LamConfig.from_json(opened.metadata()["lam_config"]) == trained
    assert masks_equal(create(trained, checkpoint_path=file), model)
    assert not caplog.records
    with pytest.raises(StateDictError, match=f"{named}; pass lam=LamConfig.*lam_weights='fresh'"):
        create(asked, checkpoint_path=file)


@pairs
def test_a_saved_folder_refuses_masks_of_another_kind(
    trained: LamConfig, asked: LamConfig, named: str, tmp_path: Path
) -> None:
    save_pretrained(trained_model(trained), tmp_path)
    with pytest.raises(StateDictError, match=f"{named}; omit lam="):
        create_model(f"local-dir:{tmp_path}", pretrained=True, lam=asked)


def test_an_older_folder_says_by_its_config_what_its_file_does_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = trained_model(ADD)
    save_pretrained(model, tmp_path)
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")  # as lamzoo 0.1.0 wrote it
    config = (tmp_path / "config.json").read_text().split('"sha256"')
    (tmp_path / "config.json").write_text(f'{config[0]}"sha256": {{}}}}}}')
    assert masks_equal(create_model(f"local-dir:{tmp_path}", pretrained=True), model)
    assert not caplog.records
    with pytest.raises(StateDictError, match="op='add'"):
        create_model(f"local-dir:{tmp_path}", pretrained=True, lam=KINDS[1])


def test_a_bare_file_that_does_not_say_its_kind_is_loaded_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = trained_model(ADD)
    save_file(dict(model.state_dict()), tmp_path / "old.safetensors")
    assert masks_equal(create(ADD, checkpoint_path=tmp_path / "old.safetensors"), model)
    (warning,) = caplog.records
    assert "old.safetensors doesn't contain the LamConfig" in warning.getMessage()
    assert "lam_weights='fresh' in create_model" in warning.getMessage()


def test_a_bundled_tag_loads_silently_and_refuses_other_masks(caplog: pytest.LogCaptureFixture) -> None:
    name = "lam_vit_micro.cifar10_mul"
    create_model(name, pretrained=True)
    assert not caplog.records
    with pytest.raises(StateDictError, match=r"cifar10.*op='mul', sign='positive'.*op='add', sign='free'"):
        create_model(name, pretrained=True, lam=LamConfig())


def test_loading_says_where_the_earlier_weights_of_a_tag_are(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "lamzoo"):
        model: Any = create_model("lam_vit_micro", pretrained=True)
    assert "the earlier ones are lam_vit_micro.cifar10_mul" in caplog.text
    earlier: Any = create_model("lam_vit_micro.cifar10_mul", pretrained=True)
    assert (model.lam_config.op, earlier.lam_config.op) == ("add", "mul")


def test_a_file_with_the_masks_of_another_tag_is_refused_with_its_name(tmp_path: Path) -> None:
    earlier: Any = create_model("lam_vit_micro.cifar10_mul", pretrained=True)
    save_file(dict(earlier.state_dict()), tmp_path / "old.safetensors")  # as a training script of 0.1.0 left it
    with pytest.raises(StateDictError, match=r"It has the masks of lam_vit_micro\.cifar10_mul: use that name\.$"):
        create_model("lam_vit_micro", checkpoint_path=tmp_path / "old.safetensors")
    with pytest.raises(StateDictError, match=r"(?s)does not fit(?!.*use that name)"):
        create_model("lam_vit_micro", depth=3, checkpoint_path=tmp_path / "old.safetensors")
    assert masks_equal(create_model("lam_vit_micro.cifar10_mul", checkpoint_path=tmp_path / "old.safetensors"), earlier)


def test_fresh_masks_leave_the_files_out_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "lamzoo"):
        model = create_model("lam_vit_micro.cifar10", pretrained=True, lam=LamConfig(), lam_weights="fresh").eval()
    assert "mask tensors ignored, because of lam_weights='fresh'" in caplog.text
    plain = create_model("lam_vit_micro.cifar10", pretrained=True, lam=False).eval()
    x = torch.rand(1, 3, 32, 32)
    assert torch.allclose(model(x), plain(x), atol=1e-5)
    with pytest.raises(ConfigError, match="'pretrained' or 'fresh'"):
        create_model("lam_vit_micro", lam_weights="new")


def test_a_checkpoint_brings_masks_of_another_kind_than_the_tag(tmp_path: Path) -> None:
    model = create_model("lam_vit_micro", lam=ADD)
    file = write_state_dict(model.state_dict(), tmp_path / "m.safetensors")
    assert masks_equal(create_model("lam_vit_micro", pretrained=True, lam=ADD, checkpoint_path=file.path), model)


def test_shards_and_what_is_joined_of_them_carry_the_kind(tmp_path: Path) -> None:
    file = write_state_dict(trained_model(KINDS[2]).state_dict(), tmp_path / "m.safetensors")
    index = shard(file.path, 400_000, tmp_path / "shards")
    with pytest.raises(StateDictError, match="sign='positive'"):
        create(KINDS[1], checkpoint_path=index)
    assert file_sha256(join(index, tmp_path / "joined.safetensors")) == file.sha256


def test_the_bytes_of_a_file_depend_on_its_contents_alone(tmp_path: Path) -> None:
    state = trained_model(ADD).state_dict()
    hashes = {write_state_dict(state, tmp_path / f"{i}.safetensors").sha256 for i in range(8)}
    assert len(hashes) == 1


def test_metadata_that_is_no_lam_config_is_refused(tmp_path: Path) -> None:
    save_file({"a.lam.b": torch.zeros(1)}, tmp_path / "m.safetensors", {"lam_config": '{"op": "divide"}'})
    with pytest.raises(WeightsError, match=r"m\.safetensors is not a LamConfig"):
        read_state_dict(tmp_path / "m.safetensors")


@pairs
def test_a_state_dict_in_memory_carries_the_kind_too(
    trained: LamConfig, asked: LamConfig, named: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, other = trained_model(trained), create(asked)
    before = {key: value.clone() for key, value in lam_state_dict(other).items()}
    torch.save(lam_state_dict(model), tmp_path / "masks.pt")
    for state in (lam_state_dict(model), torch.load(tmp_path / "masks.pt", weights_only=True)):
        with pytest.raises(StateDictError, match=f"{named}; give the model masks of LamConfig"):
            load_lam_state_dict(other, state)
    assert all(torch.equal(value, before[key]) for key, value in lam_state_dict(other).items())
    with pytest.raises(RuntimeError, match=r"blocks\.0\.attn\.lam was saved with LamConfig"):
        other.load_state_dict(model.state_dict(), strict=False)
    assert all(torch.equal(value, before[key]) for key, value in lam_state_dict(other).items())
    assert not caplog.records


def test_a_plain_dictionary_of_masks_needs_its_config_or_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    model = trained_model(KINDS[1])
    state = dict(lam_state_dict(model))
    with pytest.raises(StateDictError, match="op='mul'"):
        load_lam_state_dict(create(ADD), state, config=KINDS[1])
    again = create(KINDS[1])
    load_lam_state_dict(again, state, config=KINDS[1])
    assert masks_equal(again, model)
    assert not caplog.records
    load_lam_state_dict(again, state)
    assert re.search("doesn't contain the LamConfig.*config= to load_lam_state_dict", caplog.text)


def test_tables_of_another_length_are_no_other_kind() -> None:
    short, long = (
        add_lam(nn.TransformerEncoderLayer(8, 2, 8), LamConfig(keys="position", max_length=length, init=init))
        for length, init in ((4, "paper"), (6, "identity"))
    )
    assert len(load_lam_state_dict(long, lam_state_dict(short))) == 2


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("name", ["lam_vit_tiny", "lam_vit_micro"])
def test_a_bare_file_of_another_rank_than_the_cards_is_loaded_with_its_own(
    name: str, recorded: bool, tmp_path: Path
) -> None:
    card = model_info(name).lam
    assert card is not None
    model = create_model(name, lam=replace(card, rank=5), depth=1)
    with torch.no_grad():
        for parameter in lam_parameters(model):
            parameter.normal_(std=0.1)
    file = tmp_path / "bare.safetensors"
    write_state_dict(model.state_dict(), file) if recorded else save_file(model.state_dict(), file)
    loaded: Any = create_model(name, depth=1, checkpoint_path=file)
    assert loaded.lam_config == replace(card, rank=5)
    assert masks_equal(loaded, model)
    assert create_model(name, depth=1, checkpoint_path=file, lam_weights="fresh").lam_config == card
    with pytest.raises(StateDictError, match="lam_weights='fresh'"):
        create_model(name, depth=1, checkpoint_path=file, lam=card)


def test_a_tag_has_its_own_masks_and_a_bare_name_without_weights_those_of_the_card() -> None:
    name = "lam_vit_tiny_patch8_64"
    info = model_info(f"{name}.tinyimagenet100")
    assert info.tag is not None
    assert info.tag.lam is not None
    loaded: Any = create_model(name, pretrained=True)
    kept = read_state_dict(Path(str(info.weights_dir)) / str(info.tag.file))
    assert all(torch.equal(value, kept[key].to(value.dtype)) for key, value in loaded.state_dict().items())
    with torch.device("meta"):
        named, bare = create_model(info.name + ".tinyimagenet100"), create_model(name)
    assert loaded.lam_config == named.lam_config == info.lam == info.tag.lam
    assert bare.lam_config == model_info(name).lam
    assert bare.lam_config.rank == 7


def test_a_tag_names_its_plain_weights() -> None:
    tag = PretrainedWeights("a_mul", file="x", plain="b.a")
    spec = ModelSpec("m", "f", "x:y", lam=ADD, plain="b", tags={"a_mul": tag})
    assert [spec.plain_of(each) for each in (None, tag, replace(tag, plain=None))] == ["b", "b.a", "b.a_mul"]
