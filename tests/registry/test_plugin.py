"""The example plug-in, really installed, is found through its entry point."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from lamzoo.lam import LamConfig
from lamzoo.registry import catalog
from lamzoo.registry.catalog import list_models, model_info
from lamzoo.registry.factory import create_model

EXAMPLE = Path(__file__).parents[1] / "plugin_example"


@pytest.mark.slow
def test_an_installed_plugin_is_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("pip") is None or importlib.util.find_spec("hatchling") is None:
        pytest.skip("pip and hatchling install the plug-in; get them by pip install lamzoo[test]")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*install, "--target", str(tmp_path), str(EXAMPLE)], check=True, timeout=240)
    list_models()
    monkeypatch.setattr(catalog, "_specs", dict(catalog._specs))
    monkeypatch.setattr(catalog, "_loaded", False)  # as in a fresh interpreter
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    assert "example_vit" in list_models("example*")
    info = model_info("example_vit")
    assert (info.source, info.family, info.lam) == ("plug-in", "lamzoo_example", LamConfig(rank=2))
    model = create_model("example_vit", num_classes=3)
    assert model.lam_config == LamConfig(rank=2)
    assert model.num_classes == 3
    assert model.pretrained_cfg["architecture"] == "example_vit"
    assert model.pretrained_cfg["input_size"] == (3, 32, 32)
