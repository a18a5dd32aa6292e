"""Masks in a folder of their own: saved, loaded into their base, refused elsewhere, and several sets for one model."""

from __future__ import annotations

import copy
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lamzoo
from lamzoo import LamConfig
from lamzoo.errors import (
    ConfigError,
    LamzooError,
    StateDictError,
    UnsupportedHostError,
    WeightsError,
    WeightsNotFoundError,
)
from lamzoo.lam import Lam
from lamzoo.models.describer.model import describer
from lamzoo.weights import file_sha256, mask_folder
from tests.adapters.timm_hosts import HOSTS
from tests.weights.hub_server import HubServer

VIT = HOSTS["vit_tiny_patch16_224"]
IMAGES = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)
OTHER = LamConfig(rank=3, layers="single")


def vit(**kwargs: Any) -> Any:
    torch.manual_seed(0)
    return VIT.create(**kwargs).eval()


def encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


def clip() -> nn.Module:
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")
    torch.manual_seed(0)
    small = {"width": 16, "layers": 1}
    return open_clip.model.CLIP(
        16,
        {**small, "head_width": 8, "image_size": 32, "patch_size": 8},
        {**small, "heads": 2, "vocab_size": 50, "context_length": 9},
    ).eval()


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model: nn.Module = transformers.BertModel(transformers.BertConfig(vocab_size=50, **sizes))
    return model.eval()


def audio_describer() -> nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"width": 8, "heads": 2, "encoder_layers": 2, "text_layers": 1, "decoder_layers": 1}
    return describer({"features": {"audio": 4}, "vocabulary": ["bin"], **sizes}, lam=None).eval()


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


def randomize(model: nn.Module, seed: int = 1) -> Any:
    """Gives the masks random values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lamzoo.lam_parameters(model):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return model


def masked(seed: int = 1, config: LamConfig | None = None, **kwargs: Any) -> Any:
    return randomize(lamzoo.add_lam(vit(**kwargs), config), seed)


def out(model: nn.Module) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(IMAGES)
    return result


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Masks and head of a small ViT."""
    model = masked()
    with torch.no_grad():
        model.head.weight.add_(1)
    return lamzoo.save_lam(model, tmp_path / "saved", also=["head"], label_names=list("abcde"))


# One base and one set of masks.


WORDS, TEXTS = torch.arange(12).reshape(2, 6), torch.arange(18).reshape(2, 9)
TOKENS = torch.linspace(-1, 1, 2 * 6 * 16).reshape(2, 6, 16)
HOST_MODELS: dict[str, tuple[Callable[[], nn.Module], LamConfig, Callable[[Any], Tensor]]] = {
    "timm": (vit, LamConfig(), lambda model: model(IMAGES)),
    "timm, one mask for all layers": (vit, OTHER, lambda model: model(IMAGES)),
    "timm, positions": (vit, LamConfig(keys="position", op="mul"), lambda model: model(IMAGES)),
    "open_clip": (clip, LamConfig(), lambda model: model.encode_image(IMAGES) + model.encode_text(TEXTS)),
    "MultiheadAttention": (encoder, LamConfig(keys="position", max_length=6), lambda model: model(TOKENS)),
    "transformers": (bert, LamConfig(), lambda model: model(WORDS).last_hidden_state),
}


@pytest.mark.parametrize("host", HOST_MODELS)
def test_saved_masks_come_back_into_another_copy_of_their_base(host: str, tmp_path: Path) -> None:
    build, config, run = HOST_MODELS[host]
    model = randomize(lamzoo.add_lam(build(), config))
    folder = lamzoo.save_lam(model, tmp_path / "masks")
    assert sorted(path.name for path in folder.iterdir()) == ["lam_config.json", "lam_model.safetensors"]
    assert load_file(folder / "lam_model.safetensors").keys() == lamzoo.lam_state_dict(model).keys()
    for base in (build(), lamzoo.add_lam(build(), config)):
        assert lamzoo.load_lam(base, folder) is base
        assert base.lam_config == config  # type: ignore[comparison-overlap]
        with torch.no_grad():
            assert torch.equal(run(base), run(model))


@pytest.mark.parametrize("keys", ["content", "position"])
def test_masks_in_parts_of_a_model_of_the_zoo_come_back_into_these_parts(keys: Any, tmp_path: Path) -> None:
    build = audio_describer
    length = 1 + sum(build().example_lengths().values())  # type: ignore[operator, union-attr]
    model: Any = lamzoo.adapters.add_lam_to(build(), {"encoder": length}, LamConfig(keys=keys))
    folder = lamzoo.save_lam(randomize(model), tmp_path)
    base = lamzoo.load_lam(build(), folder)
    expected, found = lamzoo.lam_state_dict(model), lamzoo.lam_state_dict(base)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_a_folder_says_what_its_masks_are_and_belong_to(saved: Path) -> None:
    stated = json.loads((saved / "lam_config.json").read_text())
    assert LamConfig.from_dict(stated["lam_config"]) == LamConfig()
    assert stated["layers"] == ["blocks.0.attn", "blocks.1.attn"]
    base = stated["base_model"]
    assert (base["model_class"], base["name"]) == (
        "timm.VisionTransformer",
        "timm/vit_tiny_patch16_224",  # its weights are random, whatever tag timm notes
    )
    assert len(base["attention_sha256"]) == 64
    assert (stated["also"], stated["label_names"]) == (["head.weight", "head.bias"], list("abcde"))
    assert stated["lamzoo"] == {"version": lamzoo.__version__, "sha256": file_sha256(saved / "lam_model.safetensors")}
    with safe_open(saved / "lam_model.safetensors", framework="pt") as file:
        assert LamConfig.from_json(file.metadata()["lam_config"]) == LamConfig()


def test_the_same_masks_are_written_as_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    again = lamzoo.save_lam(
        lamzoo.load_lam(vit(), saved), tmp_path / "again"
    )  # what it was loaded with is stored again
    for name in ("lam_config.json", "lam_model.safetensors"):
        assert (again / name).read_bytes() == (saved / name).read_bytes()


def test_a_classifier_is_loaded_with_its_class_names(saved: Path) -> None:
    model, base = masked(), vit()
    with torch.no_grad():
        model.head.weight.add_(1)
    assert torch.equal(out(lamzoo.load_lam(base, saved)), out(model))
    assert base.pretrained_cfg["label_names"] == tuple("abcde")


def test_tables_of_another_image_size_are_resized(tmp_path: Path) -> None:
    folder = lamzoo.save_lam(masked(config=LamConfig(keys="position")), tmp_path)
    base = lamzoo.load_lam(vit(img_size=64), folder)
    assert base.blocks[0].attn.lam.network.table.weight.shape[1] == 65


def test_parameters_that_seem_trained_and_are_not_stored_are_named(tmp_path: Path, caplog: Any) -> None:
    model = masked().requires_grad_(False)
    for parameter in (*lamzoo.lam_parameters(model), *model.head.parameters()):
        parameter.requires_grad_(True)
    lamzoo.save_lam(model, tmp_path)
    assert re.search(r"doesn't store head\.weight, head\.bias, which require gradients", caplog.text)
    caplog.clear()
    lamzoo.save_lam(model, tmp_path, also=["head.weight", "head.bias"])
    assert not caplog.text


def test_a_model_of_half_precision_or_another_image_size_is_the_same_base(saved: Path, caplog: Any) -> None:
    lamzoo.load_lam(vit().to(torch.bfloat16), saved)
    large = vit(img_size=64)
    large.load_state_dict(
        {key: value for key, value in vit().state_dict().items() if "pos_embed" not in key}, strict=False
    )
    lamzoo.load_lam(large, saved)
    assert not caplog.text


def test_the_sign_of_a_zero_is_no_other_base(tmp_path: Path, caplog: Any) -> None:
    trained, base = vit(), vit()
    for model, zero in ((trained, 0.0), (base, -0.0)):  # averaging weights loses the sign
        model.blocks[0].attn.qkv.weight.data[0] = zero
    lamzoo.save_lam(lamzoo.add_lam(trained), tmp_path / "masks")
    lamzoo.load_lam(base, tmp_path / "masks")
    assert not caplog.records


def test_masks_that_come_with_lamzoo_have_a_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(mask_folder, "data_dir", lambda kind: tmp_path / kind)
    monkeypatch.chdir(tmp_path)
    lamzoo.save_lam(lamzoo.add_lam(vit(), OTHER), tmp_path / "weights" / "adapters" / "vit.photos")
    assert mask_folder.bundled_masks() == ["vit.photos"]
    assert lamzoo.load_lam(vit(), "vit.photos").lam_config == OTHER
    with pytest.raises(WeightsNotFoundError, match=r"no such folder; .* Bundled masks: vit\.photos\.$"):
        lamzoo.load_lam(vit(), "vit.photo")
    with pytest.raises(WeightsNotFoundError, match="no such folder"):
        lamzoo.load_lam(vit(), "x" * 300)
    (tmp_path / "vit.photos").mkdir()
    lamzoo.load_lam(vit(), "vit.photos")  # an empty folder of that name is none of masks


# Another base, and damaged folders.


def changed(**config: Any) -> Callable[[Path], None]:
    """Changes keys of the configuration."""

    def change(folder: Path) -> None:
        path = folder / "lam_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))

    return change


def retensored(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    """Changes the tensors, and states the hash of the new file."""

    def write(folder: Path) -> None:
        path = folder / "lam_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)
        changed(lamzoo={"sha256": file_sha256(path)})(folder)

    return write


KEY = "blocks.1.attn.lam.network.query.0.weight"
DAMAGES: dict[str, tuple[Callable[[Path], object], type[LamzooError], str]] = {
    "no configuration": (
        lambda folder: (folder / "lam_config.json").unlink(),
        WeightsError,
        "no masks in .*no lam_config.json",
    ),
    "no weights": (
        lambda folder: (folder / "lam_model.safetensors").unlink(),
        WeightsError,
        "it has no lam_model.safetensors",
    ),
    "not JSON": (
        lambda folder: (folder / "lam_config.json").write_text("{"),
        WeightsError,
        "lam_config.json is not the config",
    ),
    "no table": (lambda folder: (folder / "lam_config.json").write_text("[]"), WeightsError, "it must be a table"),
    "no base": (changed(base_model=None), WeightsError, "its key base_model is missing"),
    "a config of another type": (changed(lam_config=[1]), WeightsError, "its key lam_config"),
    "an invalid config": (changed(lam_config={"rank": -1}), WeightsError, "lam_config.json is not .*LamConfig.rank"),
    "a wrong hash": (changed(lamzoo={"sha256": "0"}), WeightsError, "no sha256"),
    "other bytes": (
        lambda folder: (folder / "lam_model.safetensors").write_bytes(b"0" * 99),
        WeightsError,
        "has sha256",
    ),
    "another hash": (changed(lamzoo={"sha256": "0" * 64}), WeightsError, "0{64} is expected"),
    "a pickle": (
        lambda folder: (torch.save({}, folder / "lam_model.safetensors"), changed(lamzoo={})(folder)),
        WeightsError,
        "is a pickle",
    ),
    "a missing mask": (retensored(lambda tensors: tensors.pop(KEY)), StateDictError, f"lacks {KEY}"),
    "an unexpected key": (
        retensored(lambda tensors: tensors.update({"norm.weight": torch.ones(24)})),
        StateDictError,
        r"unexpected norm\.weight",
    ),
    "a missing classifier": (
        retensored(lambda tensors: tensors.pop("head.bias")),
        StateDictError,
        r"lacks head\.bias, which",
    ),
    "another shape": (
        retensored(lambda tensors: tensors.update({KEY: torch.ones(2, 2)})),
        StateDictError,
        f"{KEY} of shape \\(2, 2\\)",
    ),
    "whole numbers": (
        retensored(lambda tensors: tensors.update({KEY: tensors[KEY].long()})),
        StateDictError,
        f"whole numbers .*{KEY}",
    ),
    "another config in the weights": (
        changed(lam_config=LamConfig(rank=3).to_dict()),
        StateDictError,
        "has masks with rank=8 and the model has rank=3",
    ),
    "masks larger than the memory": (
        changed(lam_config=LamConfig(rank=10_000_000, hidden=(10_000_000,)).to_dict()),
        StateDictError,
        "has no mask as large as its lam_config.json says, rank=10000000",
    ),
    "masks larger than the memory beside an empty tensor": (
        lambda folder: (
            retensored(lambda tensors: tensors.update({f"{KEY}.0": torch.ones(0, 10_000_000)}))(folder),
            changed(lam_config=LamConfig(rank=10_000_000).to_dict())(folder),
        ),
        StateDictError,
        "has no mask as large as its lam_config.json says, rank=10000000",
    ),
    "masks larger than the memory in all": (
        lambda folder: (
            retensored(lambda tensors: tensors.update({f"{KEY}.0": torch.ones(200_000)}))(folder),
            changed(lam_config=LamConfig(hidden=(200_000, 200_000)).to_dict())(folder),
        ),
        StateDictError,
        r"has no mask as large as its LamConfig says: at least \d{12} numbers",
    ),
    "parts larger than the memory": (
        changed(lam_config=LamConfig(keys="position").to_dict(), parts={"": 10**9}),
        StateDictError,
        "has no mask as large",
    ),
    "parts that the model lacks": (changed(parts={"neck": None}), UnsupportedHostError, "has no part 'neck'"),
    "masks listed beside masks": (
        changed(also=[KEY]),
        StateDictError,
        "has .*lam.* which this timm.VisionTransformer lacks",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_named_in_a_sentence_and_changes_nothing(damage: str, saved: Path) -> None:
    change, error, message = DAMAGES[damage]
    change(saved)
    for model in (vit(), masked(2), masked(2, OTHER)) if damage == "a missing mask" else (vit(),):
        before, expected = lamzoo.lam.layer.carried_configs(model.state_dict()), out(model)
        with pytest.raises(error, match=message) as caught:
            lamzoo.load_lam(model, saved)
        assert str(caught.value).count("\n") == 0
        assert lamzoo.lam.layer.carried_configs(model.state_dict()) == before
        assert torch.equal(out(model), expected)
        assert getattr(model, "lam_sets", None) is None


OTHER_BASES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "another class": (encoder, r"were trained on timm/vit_tiny.* and this model is a torch\.TransformerEncoder"),
    "fewer layers": (lambda: vit(depth=1), r"has no blocks\.1\.attn"),
    "more layers": (lambda: vit(depth=3), r"lacks blocks\.2\.attn\.lam"),
    "another width": (lambda: vit(embed_dim=48), r"head\.weight of shape \(5, 24\), and the model's has \(5, 48\)"),
    "other heads": (lambda: vit(num_heads=2), r"has blocks\.0\.attn\.lam.* of shape .*a host of the same widths"),
    "another classifier": (lambda: vit(num_classes=7), r"head\.weight of shape \(5, 24\).*\(7, 24\).*num_classes=5"),
    "no classifier": (lambda: vit(num_classes=0), r"has head\.weight, which .* lacks; create"),
}


@pytest.mark.parametrize("base", OTHER_BASES)
def test_another_base_is_refused_by_name_and_left_unchanged(base: str, saved: Path) -> None:
    build, message = OTHER_BASES[base]
    model = build()
    keys = list(model.state_dict())
    with pytest.raises(StateDictError, match=message) as caught:
        lamzoo.load_lam(model, saved)
    assert str(saved) in str(caught.value)
    assert list(model.state_dict()) == keys


def test_a_base_with_other_weights_is_a_warning(saved: Path, caplog: Any) -> None:
    model = vit()
    with torch.no_grad():
        model.blocks[1].attn.qkv.weight.add_(1)
    lamzoo.load_lam(model, saved)
    assert re.search(
        r"were trained on timm/vit_tiny\S+ \(timm\.VisionTransformer\), and the attention layers", caplog.text
    )


def test_what_cannot_be_saved_is_said_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedHostError, match="has no learnable masks"):
        lamzoo.save_lam(vit(), tmp_path / "a")
    with pytest.raises(ConfigError, match="also has 'classifier'"):
        lamzoo.save_lam(masked(), tmp_path / "a", also=["classifier"])
    for names, also, message in (
        ("abcde", ["head"], "is the string 'abcde'; pass a list"),
        (["cat", "dog"], ["head"], "2 label names were given for a head of 5 classes"),
        (list("abcde"), None, "no.* is stored; use also="),
    ):
        with pytest.raises(ConfigError, match=message):
            lamzoo.save_lam(masked(), tmp_path / "a", also=also, label_names=names)
    part = encoder()
    lamzoo.add_lam(part.layers[0])  # type: ignore[index, arg-type]
    for use in (lambda: lamzoo.save_lam(part, tmp_path / "a"), lambda: lamzoo.set_lam(part, None)):
        with pytest.raises(UnsupportedHostError, match="part"):
            use()
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightsError, match="cannot be written"):
        lamzoo.save_lam(masked(), tmp_path / "file" / "a")
    assert not (tmp_path / "a").exists()


# Several sets of masks.


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Sets a and b of one configuration, c of another, and d with a head."""
    models = {"a": masked(1), "b": masked(2), "c": masked(3, OTHER), "d": masked(4)}
    with torch.no_grad():
        models["d"].head.weight.mul_(2)
    also = {"d": ["head"]}
    names = {"d": list("vwxyz")}
    folder = tmp_path_factory.mktemp("sets")
    return {
        name: lamzoo.save_lam(model, folder / name, also=also.get(name, ()), label_names=names.get(name))
        for name, model in models.items()
    }


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> dict[str | None, Tensor]:
    return {None: out(vit())} | {name: out(lamzoo.load_lam(vit(), folder)) for name, folder in folders.items()}


@pytest.mark.parametrize(("built", "now"), [((16, 64), (32, 32)), ((32, 64), (64, 32)), ((48, 32), (32, 32))])
def test_masks_of_a_model_of_another_image_size_keep_their_places(
    built: tuple[int, int], now: tuple[int, int], tmp_path: Path
) -> None:
    config = LamConfig(keys="position", rank=2, init="paper")
    model = lamzoo.add_lam(vit(img_size=built), config)
    model.set_input_size(now)
    images = torch.randn(2, 3, *now)
    with torch.no_grad():
        expected = model(images)
        other = lamzoo.add_lam(vit(img_size=now), config)
        lamzoo.load_lam_state_dict(other, lamzoo.lam_state_dict(model))
        third = lamzoo.load_lam(lamzoo.remove_lam(copy.deepcopy(other)), lamzoo.save_lam(model, tmp_path / "masks"))
        lamzoo.load_lam_state_dict(model, lamzoo.lam_state_dict(model))
        assert torch.equal(model(images), expected)
        for name in (None, "default"):
            lamzoo.set_lam(model, name)
        host = copy.deepcopy(model)
        for masked in (other, third):
            masked.load_state_dict({k: v for k, v in host.state_dict().items() if ".lam." not in k}, strict=False)
            torch.testing.assert_close(masked(images), expected)
        torch.testing.assert_close(host(images), expected)


def test_masks_that_were_never_loaded_stay_fresh_when_sets_are_switched() -> None:
    model = lamzoo.add_lam(vit(), LamConfig(rank=3))
    for name in (None, "default"):
        lamzoo.set_lam(model, name)
    masks = [module for module in model.modules() if isinstance(module, Lam)]
    assert masks and all(mask.is_fresh for mask in masks)


def test_sets_are_switched_at_run_time(folders: dict[str, Path], expected: dict[str | None, Tensor]) -> None:
    model = vit()
    keys = list(model.state_dict())
    for name, folder in folders.items():
        assert torch.equal(out(lamzoo.load_lam(model, folder, name=name)), expected[name])
    for name in ("a", None, "b", "c", "d", "a", "c", None, "d"):
        assert lamzoo.set_lam(model, name) is model
        assert torch.equal(out(model), expected[name])
        assert (model.pretrained_cfg.get("label_names") or None) == (tuple("vwxyz") if name == "d" else None)
    lamzoo.set_lam(model, None)
    assert list(model.state_dict()) == keys
    assert not any(isinstance(module, lamzoo.lam.Lam) for module in model.modules())
    lamzoo.set_lam(model, "b")
    with pytest.raises(ConfigError, match="no set of masks named 'e', only 'a', 'b', 'c', 'd'; load it"):
        lamzoo.set_lam(model, "e")
    assert torch.equal(out(model), expected["b"])
    assert lamzoo.lam_state_dict(model).keys() <= model.state_dict().keys()
    assert sum(".lam." in key for key in model.state_dict()) == len(lamzoo.lam_state_dict(model))


def test_a_set_keeps_what_it_learned(folders: dict[str, Path]) -> None:
    model = lamzoo.load_lam(lamzoo.load_lam(vit(), folders["a"], name="a"), folders["d"], name="d")
    with torch.no_grad():
        model.head.weight.add_(1)
        next(lamzoo.lam_parameters(model)).add_(1)
    learned = out(model)
    lamzoo.set_lam(lamzoo.set_lam(model, "a"), "d")
    assert torch.equal(out(model), learned)


def test_a_classifier_that_no_set_brings_is_the_bases_own(folders: dict[str, Path]) -> None:
    model = lamzoo.load_lam(lamzoo.load_lam(vit(), folders["d"], name="d"), folders["a"], name="a")
    with torch.no_grad():
        model.head.weight.add_(1)
    lamzoo.set_lam(lamzoo.set_lam(model, "d"), None)
    assert torch.equal(model.head.weight, vit().head.weight + 1)


def test_loading_under_the_name_of_a_set_replaces_it(
    folders: dict[str, Path], expected: dict[str | None, Tensor]
) -> None:
    model = lamzoo.load_lam(vit(), folders["d"])
    assert torch.equal(out(lamzoo.load_lam(model, folders["c"])), expected["c"])  # without the head of d
    assert list(model.lam_sets.stored) == [None, "default"]
    assert torch.equal(out(lamzoo.load_lam(model, folders["b"])), expected["b"])


def test_masks_that_were_added_before_are_the_default_set(
    folders: dict[str, Path], expected: dict[str | None, Tensor]
) -> None:
    model = masked(7, LamConfig(rank=2))
    own = out(model)
    assert torch.equal(out(lamzoo.load_lam(model, folders["a"], name="a")), expected["a"])
    assert torch.equal(out(lamzoo.set_lam(model, "default")), own)
    model = masked(7)
    assert torch.equal(out(lamzoo.set_lam(model, None)), expected[None])
    assert torch.equal(out(lamzoo.set_lam(model, "default")), out(masked(7)))


def test_removing_masks_forgets_the_sets(folders: dict[str, Path], expected: dict[str | None, Tensor]) -> None:
    model = lamzoo.load_lam(lamzoo.load_lam(vit(), folders["a"], name="a"), folders["c"], name="c")
    assert torch.equal(out(lamzoo.remove_lam(model)), expected[None])
    with pytest.raises(UnsupportedHostError, match="has no learnable masks"):
        lamzoo.set_lam(model, "a")
    lamzoo.load_lam(lamzoo.load_lam(model, folders["a"]), folders["b"], name="b")
    lamzoo.add_lam(lamzoo.set_lam(model, None))
    with pytest.raises(UnsupportedHostError, match="got masks besides its set 'default'"):
        lamzoo.set_lam(model, "b")


def test_masks_of_one_configuration_are_switched_in_place(folders: dict[str, Path]) -> None:
    model = lamzoo.load_lam(lamzoo.load_lam(vit(), folders["a"], name="a"), folders["b"], name="b")
    before = list(lamzoo.lam_parameters(model))
    with torch.no_grad(), lamzoo.capture_masks(model) as masks:
        out(model)
        first = masks["blocks.0.attn"].importance
        out(lamzoo.set_lam(model, "a"))
        assert not torch.equal(masks["blocks.0.attn"].importance, first)
        lamzoo.load_lam(model, folders["b"])
    assert all(old is new for old, new in zip(before, lamzoo.lam_parameters(model), strict=True))


def test_masks_of_another_configuration_are_not_switched_while_they_are_captured_or_tokens_merged(
    folders: dict[str, Path], expected: dict[str | None, Tensor]
) -> None:
    model = lamzoo.load_lam(vit(), folders["a"], name="a")
    for name in ("b", "c"):
        lamzoo.set_lam(lamzoo.load_lam(model, folders[name], name=name), "a")
    with lamzoo.capture_masks(model), pytest.raises(UnsupportedHostError, match="while capture_masks records them"):
        lamzoo.set_lam(model, "c")
    lamzoo.merge_tokens(model, keep=0.5)
    merged = out(lamzoo.set_lam(model, "b"))
    assert torch.equal(merged, out(lamzoo.merge_tokens(lamzoo.load_lam(vit(), folders["b"]), keep=0.5)))
    for other in ("c", None):
        with pytest.raises(UnsupportedHostError, match="while its tokens are merged or pruned; call remove_reduction"):
            lamzoo.set_lam(model, other)
    with pytest.raises(UnsupportedHostError, match="call remove_reduction"):
        lamzoo.load_lam(model, folders["c"])
    assert torch.equal(out(model), merged)
    assert torch.equal(out(lamzoo.set_lam(lamzoo.remove_reduction(model), "c")), expected["c"])


def test_a_fused_model_stays_fused_and_frozen_masks_stay_frozen(folders: dict[str, Path], tmp_path: Path) -> None:
    from lamzoo.adapters.deploy import is_fused
    from lamzoo.lam.fused import pinned_form

    wide = lamzoo.save_lam(masked(5, LamConfig(rank=4)), tmp_path / "wide")
    model = lamzoo.fuse(lamzoo.load_lam(vit(), folders["a"], name="a")).requires_grad_(False)
    for folder in (folders["b"], wide):
        lamzoo.load_lam(model, folder, name="other")
        assert is_fused(model)
        assert not any(parameter.requires_grad for parameter in model.parameters())
        with pinned_form(True):
            assert torch.allclose(out(model), out(lamzoo.load_lam(vit(), folder)), atol=1e-5)


@pytest.mark.parametrize("between", [None, "mul", "broken"])
def test_fused_and_frozen_masks_come_back_so_after_another_set(
    between: str | None, folders: dict[str, Path], tmp_path: Path
) -> None:
    from lamzoo.adapters.deploy import is_fused

    model = lamzoo.fuse(lamzoo.load_lam(vit(), folders["a"], name="a")).requires_grad_(False)
    if between is None:
        lamzoo.set_lam(model, None)
    else:
        folder = lamzoo.save_lam(masked(5, LamConfig(op="mul")), tmp_path / "mul")
        if between == "mul":
            assert not is_fused(lamzoo.load_lam(model, folder, name="mul"))
        else:
            retensored(lambda tensors: tensors.pop(KEY))(folder)
            with pytest.raises(StateDictError, match=f"lacks {KEY}"):
                lamzoo.load_lam(model, folder, name="mul")
    lamzoo.set_lam(model, "a")
    assert is_fused(model)
    assert not any(parameter.requires_grad for parameter in lamzoo.lam_parameters(model))
    lamzoo.set_lam(lamzoo.set_lam(lamzoo.unfuse(model).requires_grad_(True), None), "a")
    assert not is_fused(model)
    assert all(parameter.requires_grad for parameter in lamzoo.lam_parameters(model))


def test_a_switch_that_fails_leaves_the_masks_that_the_model_had(
    folders: dict[str, Path], expected: dict[str | None, Tensor]
) -> None:
    model = lamzoo.load_lam(lamzoo.load_lam(vit(), folders["a"], name="a"), folders["c"], name="c")
    block, masks = model.blocks[0], model.lam_sets.stored["a"].masks
    removed = masks.pop(KEY)
    with pytest.raises(StateDictError, match=f"lacks {KEY}"):
        lamzoo.set_lam(model, "a")
    assert torch.equal(out(model), expected["c"])
    masks[KEY] = removed
    model.blocks[0] = compiled(block)
    for fail in (lambda: lamzoo.set_lam(model, "a"), lambda: lamzoo.load_lam(model, folders["b"])):
        with pytest.raises(UnsupportedHostError, match=r"while blocks\.0 is compiled; compile the whole model"):
            fail()
    assert lamzoo.lam_state_dict(model).keys() == model.lam_sets.stored["c"].masks.keys()
    model.blocks[0] = block
    assert torch.equal(out(model), expected["c"])
    assert torch.equal(out(lamzoo.set_lam(model, "a")), expected["a"])


@pytest.mark.parametrize("classes", [7, 0])
def test_a_classifier_of_another_size_is_not_switched(
    classes: int, folders: dict[str, Path], expected: dict[str | None, Tensor]
) -> None:
    model = lamzoo.load_lam(lamzoo.load_lam(vit(), folders["d"], name="d"), folders["c"], name="c")
    model.reset_classifier(classes)
    before = out(model)
    for name in ("d", None):
        with pytest.raises(UnsupportedHostError, match=r"have head\.weight of shape \(5, 24\).*reset_classifier"):
            lamzoo.set_lam(model, name)
    assert torch.equal(out(model), before)
    model.reset_classifier(5)
    assert torch.equal(out(lamzoo.set_lam(model, "d")), expected["d"])


def test_copies_and_pickles_have_the_sets(folders: dict[str, Path], expected: dict[str | None, Tensor]) -> None:
    model = lamzoo.load_lam(lamzoo.load_lam(vit(), folders["a"], name="a"), folders["c"], name="c")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(out(lamzoo.set_lam(other, "a")), expected["a"])
    assert torch.equal(out(model), expected["c"])


@pytest.mark.parametrize("wrap", [nn.DataParallel, pytest.param(compiled, marks=pytest.mark.slow)])
def test_sets_of_a_wrapped_model_are_switched(
    wrap: Any, folders: dict[str, Path], expected: dict[str | None, Tensor]
) -> None:
    model = wrap(vit())
    for name in ("a", "b", "c"):
        assert torch.allclose(out(lamzoo.load_lam(model, folders[name], name=name)), expected[name], atol=1e-6)
    assert torch.allclose(out(lamzoo.set_lam(model, "a")), expected["a"], atol=1e-6)
    with pytest.raises(ConfigError, match="name is None"):
        lamzoo.load_lam(model, folders["a"], name=None)


def test_a_switched_model_of_transformers_is_saved_with_its_active_masks(tmp_path: Path) -> None:
    model: Any = randomize(lamzoo.add_lam(bert()))
    lamzoo.save_lam(model, tmp_path / "a")
    base: Any = bert()
    lamzoo.load_lam(lamzoo.load_lam(base, tmp_path / "a", name="a"), tmp_path / "a", name="b")
    base.save_pretrained(tmp_path / "whole")
    again = lamzoo.from_pretrained(tmp_path / "whole")
    assert torch.equal(again(WORDS).last_hidden_state, model(WORDS).last_hidden_state)
    lamzoo.set_lam(base, None).save_pretrained(tmp_path / "plain")
    assert "lam_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())


# The hub.


def test_masks_are_pushed_to_the_hub_and_loaded_from_there(server: HubServer, saved: Path, tmp_path: Path) -> None:
    (saved / "README.md").write_text("---\nlicense: mit\n---\n# Masks\n")
    (saved / "notes.txt").write_text("mine")
    url = lamzoo.push_to_hub(saved, "user/masks", private=True, message="First")
    assert url == f"{server.url}/user/masks"
    assert server.repos["user/masks"].keys() == {"README.md", "lam_config.json", "lam_model.safetensors"}
    assert server.messages == ["First"]
    with pytest.raises(WeightsError, match=r"has masks without their model.*load_lam\(model, 'hf-hub:user/masks'\)"):
        lamzoo.create_model("hf-hub:user/masks", pretrained=True, cache_dir=tmp_path)
    base = lamzoo.load_lam(vit(), "hf-hub:user/masks", cache_dir=tmp_path)
    assert torch.equal(out(base), out(lamzoo.load_lam(vit(), saved)))
    lamzoo.push_to_hub(saved, "user/masks")  # the repository exists
    lamzoo.push_to_hub(saved, "user/others")
    assert server.private == {"user/masks": True, "user/others": False}


@pytest.mark.parametrize(
    ("repo", "status", "message"),
    [
        ("user/masks", 401, "this login may not write there; log in"),
        ("user/masks", 403, "this login may not write there"),
        ("user/masks", 500, "the hub answered 500"),
        ("a/b/c", None, "is not the name of a hub repository"),
    ],
)
def test_an_upload_that_the_hub_refuses_is_one_error(
    server: HubServer, saved: Path, repo: str, status: int | None, message: str
) -> None:
    server.status = status
    with pytest.raises(WeightsError, match=message) as caught:
        lamzoo.push_to_hub(saved, repo)
    assert str(caught.value).startswith(f"{saved} cannot be uploaded to {repo!r}")


def test_an_upload_that_cannot_be_read_or_transferred_is_one_error(
    server: HubServer, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.large = True
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # whose server this one isn't
    with pytest.raises(WeightsError, match=r"cannot be uploaded to .*the transfer of a large file failed \(.*413"):
        lamzoo.push_to_hub(saved, "user/masks")
    (saved / "model.safetensors").symlink_to(saved / "none")
    with pytest.raises(WeightsError, match=r"a file cannot be read \(.*model\.safetensors"):
        lamzoo.push_to_hub(saved, "user/others")
    assert "user/others" not in server.repos


def test_an_upload_without_hub_or_masks_is_one_error(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(WeightsError, match=r"127\.0\.0\.1:9 does not answer"):
        lamzoo.push_to_hub(saved, "user/masks")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(WeightsError, match="HF_HUB_OFFLINE is set"):
        lamzoo.push_to_hub(saved, "user/masks")
    with pytest.raises(WeightsError, match="no model and there are no masks"):
        lamzoo.push_to_hub(tmp_path / "none", "user/masks")
