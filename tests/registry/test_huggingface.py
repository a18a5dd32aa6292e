"""Models of transformers by name: what create_model("hf/OWNER/NAME") promises, on a hub of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the extra transformers")

from lamzoo.adapters import add_lam  # noqa: E402
from lamzoo.errors import (  # noqa: E402
    ConfigError,
    HubUnreachableError,
    StateDictError,
    UnsafeWeightsError,
)
from lamzoo.lam import Lam, LamConfig  # noqa: E402
from lamzoo.registry.catalog import model_ref  # noqa: E402
from lamzoo.registry.factory import create_model  # noqa: E402
from lamzoo.registry.huggingface import find_transformers_spec  # noqa: E402
from tests.adapters.transformers_hosts import HOSTS, words  # noqa: E402
from tests.weights.hub_server import COMMIT, HubServer  # noqa: E402

PLAIN, MASKED, PICKLED = "hf/me/plain", "hf/me/masked", "hf/me/pickled"
MASKS = LamConfig(rank=2, init="paper")


@pytest.fixture
def create(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """``create_model`` with a cache of its own, and a hub with a BERT, one with masks and one that is a pickle."""
    bert: Any = HOSTS["bert"].create()
    bert.save_pretrained(tmp_path / "plain")
    add_lam(bert, MASKS).save_pretrained(tmp_path / "masked")
    repos = {f"me/{name}": _files(tmp_path / name) for name in ("plain", "masked")}
    repos["me/pickled"] = {"config.json": repos["me/plain"]["config.json"], "pytorch_model.bin": b"pickle"}
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with HubServer(repos) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield lambda *args, **kwargs: create_model(*args, cache_dir=tmp_path / "cache", **kwargs)


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _output(model: Any) -> torch.Tensor:
    return model.eval()(**words()).last_hidden_state


def _masks(model: Any) -> list[Lam]:
    return [module for module in model.modules() if isinstance(module, Lam)]


def test_a_model_of_the_hub_is_built_with_and_without_its_weights(create: Any) -> None:
    model = create(PLAIN, pretrained=True)
    assert model.training
    assert (model.registry_name, model.weights_source, model.lam_config) == (PLAIN, PLAIN, None)
    assert torch.equal(_output(model), _output(HOSTS["bert"].create()))
    assert not torch.equal(_output(create(f"{PLAIN}@{COMMIT}")), _output(model))


def test_masks_are_added_to_a_plain_model(create: Any) -> None:
    plain, masked = create(PLAIN, pretrained=True), create(PLAIN, pretrained=True, lam={"rank": 3})
    assert masked.lam_config == LamConfig(rank=3)
    torch.testing.assert_close(_output(masked), _output(plain), atol=2e-6, rtol=2e-6)
    assert create(PLAIN, lam=True).lam_config == LamConfig()


def test_saved_masks_come_back_unless_they_are_not_wanted(create: Any) -> None:
    plain, masked = create(PLAIN, pretrained=True), create(MASKED, pretrained=True)
    assert masked.lam_config == MASKS
    assert not torch.allclose(_output(masked), _output(plain), atol=1e-3)
    bare = create(MASKED, pretrained=True, lam=False)
    assert not _masks(bare)
    assert torch.equal(_output(bare), _output(plain))
    with pytest.raises(StateDictError, match=r"rank=2.*leave lam out, or pass lam_weights='fresh'"):
        create(MASKED, pretrained=True, lam={"rank": 3})
    fresh = create(MASKED, pretrained=True, lam={"rank": 3}, lam_weights="fresh")
    torch.testing.assert_close(_output(fresh), _output(plain), atol=2e-6, rtol=2e-6)
    assert all(lam.is_fresh for lam in _masks(create(MASKED)))


def test_arguments_are_fields_of_the_configuration(create: Any) -> None:
    model = create(PLAIN, num_classes=7, num_hidden_layers=1)
    assert (model.config.num_labels, len(model.encoder.layer)) == (7, 1)
    with pytest.raises(ConfigError, match="takes no argument 'img_size'; .* fields of BertConfig"):
        create(PLAIN, img_size=32)
    with pytest.raises(ConfigError, match="takes no checkpoint_path"):
        create(PLAIN, checkpoint_path="file.safetensors")


def test_missing_models_and_pickles_are_refused(create: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsafeWeightsError, match="only the pickle pytorch_model.bin"):
        create(PICKLED, pretrained=True)
    with pytest.raises(ConfigError, match=r"hf/me/plain is a BertModel, .* build others with lamzoo.create_model"):
        find_transformers_spec(model_ref(PLAIN), tmp_path / "cache")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubUnreachableError, match="me/other/config.json is not in the cache"):
        create("hf/me/other")
