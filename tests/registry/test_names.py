"""Names: listing, look-up, registration and plug-ins."""

from __future__ import annotations

import dataclasses
import logging
import re
from importlib.metadata import EntryPoint
from typing import Any

import pytest
import timm
from torch import nn

from lamzoo.errors import DuplicateModelError, RegistryError, UnknownModelError
from lamzoo.lam import LamConfig
from lamzoo.registry import catalog
from lamzoo.registry.catalog import (
    builder_of,
    find_spec,
    get_pretrained_cfg,
    list_models,
    list_tags,
    model_info,
    register_cards,
    register_model,
)
from lamzoo.registry.factory import create_model


def plugins(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    found = [EntryPoint(name, value, catalog.ENTRY_POINT_GROUP) for name, value in values.items()]
    monkeypatch.setattr(catalog, "entry_points", lambda group: found)
    monkeypatch.setattr(catalog, "_loaded", False)


def test_listing_filters_as_timm_does() -> None:
    sizes = ["lam_vit_base", "lam_vit_large", "lam_vit_micro", "lam_vit_small", "lam_vit_tiny"]
    assert list_models("lam_vit*", exclude_filters="*_patch*") == sizes
    assert list_models("lam_vit*", exclude_filters=["*base", "*large", "*_patch*"]) == sizes[2:]
    assert list_models(["lam_vit_b*", "vit_micro"]) == ["lam_vit_base", "vit_micro"]
    assert "lam_vit_base.augreg2_in21k_ft_in1k" in list_models("lam_vit_base", pretrained=True)
    assert all("." in name for name in list_models(pretrained=True))
    assert list_models("*.augreg2*", include_tags=True) == ["lam_vit_base.augreg2_in21k_ft_in1k"]
    assert list_models("no_such*") == []
    assert list_models(family=["lam_vit", "lam_clip4clip", "lam_moment_detr", "lam_describer"]) == list_models()
    assert "clip4clip" not in list_models(family="lam_vit")


def test_timms_names_are_listed_on_request() -> None:
    assert not any(name.startswith("timm/") for name in list_models())
    ours = list_models("timm/vit_tiny_patch16_224*", pretrained=True)
    theirs = timm.list_models("vit_tiny_patch16_224*", pretrained=True, module="vision_transformer")
    assert ours == [f"timm/{name}" for name in theirs]


def test_info_is_a_record_that_cannot_be_changed() -> None:
    info = model_info("lam_vit_base.augreg_in1k")
    assert (info.name, info.family, info.lam) == ("lam_vit_base", "lam_vit", LamConfig(keys="position", rank=7))
    assert info.tag is not None
    assert info.tag.name == "augreg_in1k"
    assert model_info("lam_vit_base").tag == next(iter(info.tags.values()))
    assert model_info("timm/test_vit").lam is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        info.name = "other"  # type: ignore[misc]


def test_tags_are_listed_default_first() -> None:
    assert list_tags("lam_vit_base")[0] == "augreg2_in21k_ft_in1k"
    assert list_tags("timm/vit_base_patch16_224")[0] == "augreg2_in21k_ft_in1k"


def test_the_cfg_is_timms_with_the_cards_own_keys_over_it() -> None:
    cfg = get_pretrained_cfg("lam_vit_tiny.augreg_in21k_ft_in1k")
    theirs = timm.get_pretrained_cfg("vit_tiny_patch16_224.augreg_in21k_ft_in1k")
    assert cfg.architecture == "lam_vit_tiny"
    assert (cfg.tag, cfg.mean, cfg.hf_hub_id) == (theirs.tag, theirs.mean, theirs.hf_hub_id)
    assert get_pretrained_cfg("vit_micro").input_size == (3, 32, 32)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("lam_vit_mikro", "did you mean lam_vit_micro"),
        ("vit_tiny_patch16_224", "did you mean timm/vit_tiny_patch16_224"),
        ("timm/vit_tny_patch16_224", "did you mean timm/vit_tiny_patch16_224"),
        ("lam_vit_base.augreg2_in21k_ft", "did you mean lam_vit_base.augreg2_in21k_ft_in1k"),
        ("lam_vit_base.x", "its tags are augreg2_in21k_ft_in1k"),
        ("x" * 30, "list_models"),
    ],
)
def test_an_unknown_name_raises_with_the_closest(name: str, says: str) -> None:
    for look in (model_info, get_pretrained_cfg, create_model):
        with pytest.raises(UnknownModelError) as caught:
            look(name)
        assert says in str(caught.value)


def test_a_registered_function_is_called_with_what_the_caller_gave() -> None:
    seen: dict[str, Any] = {}

    @register_model
    def a_model_of_mine(num_classes: int = 3, **kwargs: Any) -> nn.Module:
        """Mine."""
        seen.update(kwargs, num_classes=num_classes)
        return timm.create_model("test_vit", img_size=32, num_classes=num_classes)

    assert "a_model_of_mine" in list_models()
    assert model_info("a_model_of_mine").description == "Mine."
    model = create_model("a_model_of_mine", drop_path_rate=0.1, lam=LamConfig(rank=2))
    assert seen == {"num_classes": 3, "drop_path_rate": 0.1}
    assert model.lam_config == LamConfig(rank=2)
    assert model.pretrained_cfg["architecture"] == "a_model_of_mine"


def test_registering_with_arguments_shows_in_the_record() -> None:
    tags = {"mine": {"file": "mine.safetensors", "sha256": "0" * 64, "dataset": "my photographs"}}

    @register_model(tags=tags, lam={"rank": 1}, description="One sentence.")
    def another_model_of_mine() -> nn.Module:
        return timm.create_model("test_vit")

    assert list_models("another*", pretrained=True) == ["another_model_of_mine.mine"]
    info = model_info("another_model_of_mine")
    assert (info.description, info.lam, info.tag and info.tag.dataset) == (
        "One sentence.",
        LamConfig(rank=1),
        "my photographs",
    )
    assert create_model("another_model_of_mine", lam=False).lam_config is None


def test_two_registrations_of_one_name_raise_and_name_both(tmp_path: Any) -> None:
    with pytest.raises(DuplicateModelError, match=r"'vit_micro' .*test_names\.vit_micro is taken by the card lam_vit"):

        @register_model
        def vit_micro() -> nn.Module:
            raise NotImplementedError

    card = tmp_path / "mine.toml"
    card.write_text('[models.new]\nbuilder = "a:b"\n[models.vit_micro]\nbuilder = "a:b"\n')
    with pytest.raises(DuplicateModelError, match="vit_micro"):
        register_cards(card)
    assert "new" not in list_models()


@pytest.mark.parametrize(
    "arguments", [{"tags": {"t": {"fiel": "x"}}}, {"tags": {"t": {}}}, {"pretrained_cfg": {"croppct": 1}}]
)
def test_a_registration_that_means_nothing_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(RegistryError, match="a_bad_model"):

        @register_model(**arguments)
        def a_bad_model() -> nn.Module:
            raise NotImplementedError


def test_a_builder_that_cannot_be_imported_is_named(tmp_path: Any) -> None:
    (tmp_path / "mine.toml").write_text('[models.new]\nbuilder = "no_such_module:build"\n')
    register_cards(tmp_path / "mine.toml")
    with pytest.raises(RegistryError, match="no_such_module:build"):
        create_model("new")


@pytest.mark.parametrize("builder", ["no_such_module:build", "lamzoo.models.vit:no_such_function", "../vit:build"])
def test_a_builder_that_is_no_function_is_named(builder: str) -> None:
    with pytest.raises(RegistryError, match=re.escape(f"The builder {builder!r} of vit_micro cannot be imported")):
        builder_of(dataclasses.replace(find_spec("vit_micro"), builder=builder))


def test_a_plugin_that_fails_is_named_and_leaves_the_rest_usable(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plugins(monkeypatch, broken="no_such_package.models")
    with caplog.at_level(logging.WARNING, "lamzoo"):
        assert "vit_micro" in list_models()
    assert "'broken'" in caplog.text
    assert "no_such_package" in caplog.text
    with pytest.raises(UnknownModelError, match="The plug-in 'broken' .* failed to load"):
        create_model("a_model_of_the_plugin")


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("raise GeneratorExit('odd')", "GeneratorExit: odd"),
        ("class Odd(BaseException): pass\nraise Odd('very')", "Odd: very"),
    ],
    ids=["exit", "generator exit", "base exception"],
)
def test_a_plugin_that_ends_the_process_is_named_and_leaves_the_rest_usable(
    code: str, says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a_leaving_plugin.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    plugins(monkeypatch, leaving="a_leaving_plugin")
    with caplog.at_level(logging.WARNING, "lamzoo"):
        assert "vit_micro" in list_models()
    assert "'leaving'" in caplog.text and says in caplog.text


def test_a_plugin_that_takes_long_is_named_and_prints_nothing_to_stdout(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Any,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "a_slow_plugin.py").write_text("import time\nprint('loading')\ntime.sleep(0.2)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(catalog, "_SLOW_IMPORT_SECONDS", 0.01)
    plugins(monkeypatch, slow="a_slow_plugin")
    with caplog.at_level(logging.WARNING, "lamzoo"):
        assert "vit_micro" in list_models()
    assert "Still importing the lamzoo plug-in 'slow'" in caplog.text
    assert capsys.readouterr() == ("", "loading\n")


def test_ctrl_c_while_a_plugin_is_imported_names_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a_stopped_plugin.py").write_text("raise KeyboardInterrupt")
    monkeypatch.syspath_prepend(tmp_path)
    plugins(monkeypatch, hanging="a_stopped_plugin")
    with pytest.raises(KeyboardInterrupt), caplog.at_level(logging.WARNING, "lamzoo"):
        list_models()
    assert "Stopped while importing the lamzoo plug-in 'hanging'" in caplog.text


def test_a_plugin_that_takes_a_name_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "a_greedy_plugin.py").write_text(
        "from lamzoo.registry import register_model\n"
        "@register_model\ndef greedy_new():\n    pass\n"
        "@register_model\ndef vit_micro():\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    plugins(monkeypatch, greedy="a_greedy_plugin")
    for _ in range(2):
        with pytest.raises(DuplicateModelError, match=r"'greedy'.*vit_micro"):
            list_models()
    assert "greedy_new" not in catalog._specs
