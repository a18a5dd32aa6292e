"""Models that transformers' own save_pretrained stored come back with their masks, or an error says why."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the extra transformers")

import lamzoo  # noqa: E402
from lamzoo.adapters import add_lam, lam_state_dict, remove_lam  # noqa: E402
from lamzoo.errors import ConfigError, MissingExtraError, StateDictError, WeightsError  # noqa: E402
from lamzoo.lam import LamConfig  # noqa: E402
from tests.adapters.transformers_hosts import HOSTS, inputs_of, masks, run, words  # noqa: E402

RANDOM = LamConfig(init="paper", rank=3)


@pytest.mark.parametrize("name", ["bert", "clip"])
def test_saved_models_come_back_with_their_masks(name: str, tmp_path: Path) -> None:
    host = HOSTS[name]
    model: Any = add_lam(host.create(), RANDOM)
    model.save_pretrained(tmp_path)
    loaded = lamzoo.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert loaded.lam_config == RANDOM
    assert not any(lam.is_fresh for lam in masks(loaded).values())
    assert torch.equal(run(loaded, inputs_of(host)), run(model, inputs_of(host)))
    plain = type(model).from_pretrained(tmp_path)
    assert not masks(plain)
    lamzoo.remove_reduction(model)
    assert model.config.lam_config == RANDOM.to_dict()
    assert torch.equal(run(plain, inputs_of(host)), run(remove_lam(model), inputs_of(host)))


@pytest.mark.parametrize("name", ["llama", "clip"])
def test_models_of_one_configuration_have_masks_of_their_own(name: str, tmp_path: Path) -> None:
    host = HOSTS[name]
    config, cls = host.config(), getattr(transformers, host.model)
    ours, others = RANDOM, LamConfig(rank=2, op="mul")
    model, other = add_lam(cls(config), ours), add_lam(cls(config), others)
    plain = cls(config)
    for each, expected in ((model, ours), (copy.deepcopy(other), others)):
        each.save_pretrained(tmp_path)
        assert lamzoo.from_pretrained(tmp_path).lam_config == expected
    remove_lam(other)
    assert model.config.lam_config == ours.to_dict()
    for each in (other, plain):
        parts = [module.config for module in each.modules() if hasattr(module, "config")]
        assert not any(hasattr(part, "lam_config") for part in [*parts, config])


def test_arguments_of_transformers_reach_a_loaded_model(tmp_path: Path) -> None:
    model: Any = add_lam(HOSTS["bert"].create(), RANDOM)
    model.save_pretrained(tmp_path)
    loaded = lamzoo.from_pretrained(
        tmp_path, model_class=transformers.BertForSequenceClassification, num_labels=3, dtype=torch.bfloat16
    )
    assert loaded(**words()).logits.shape == (2, 3)
    assert {each.dtype for each in loaded.parameters()} == {torch.bfloat16}
    ours, theirs = lam_state_dict(loaded.bert), lam_state_dict(model)
    assert all(torch.equal(ours[key], theirs[key].bfloat16()) for key in theirs)


def test_an_auto_class_stands_for_the_class_of_the_model(tmp_path: Path) -> None:
    model: Any = add_lam(HOSTS["llama"].create(), RANDOM)
    model.save_pretrained(tmp_path)
    for auto, expected in (("AutoModelForCausalLM", "LlamaForCausalLM"), ("AutoModel", "LlamaModel")):
        loaded = lamzoo.from_pretrained(tmp_path, model_class=getattr(transformers, auto))
        assert type(loaded) is getattr(transformers, expected)
        assert loaded.lam_config == RANDOM and loaded.device.type == "cpu"
    with pytest.raises(ConfigError, match=r"AutoModelForCTC has no class for .* is LlamaConfig; leave model_class out"):
        lamzoo.from_pretrained(tmp_path, model_class=transformers.AutoModelForCTC)
    with pytest.raises(ConfigError, match=r"Linear'> is no class of transformers' models"):
        lamzoo.from_pretrained(tmp_path, model_class=torch.nn.Linear)


def test_saved_models_without_masks_are_refused(tmp_path: Path) -> None:
    model: Any = HOSTS["llama"].create()
    model.save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=r"has no lam_config in .* lamzoo\.load_lam for masks of a part"):
        lamzoo.from_pretrained(tmp_path)
    add_lam(model, RANDOM).save_pretrained(tmp_path)
    plain = type(model).from_pretrained(tmp_path)
    plain.save_pretrained(tmp_path)
    with pytest.raises(StateDictError, match=r"names masks .* the weights have none.* del model\.config\.lam_config"):
        lamzoo.from_pretrained(tmp_path)
    del plain.config.lam_config
    plain.save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="has no lam_config"):
        lamzoo.from_pretrained(tmp_path)


def test_saved_models_with_a_part_of_their_masks_are_refused(tmp_path: Path) -> None:
    model: Any = add_lam(HOSTS["clip"].create(), RANDOM)
    remove_lam(model.text_model)
    model.save_pretrained(tmp_path)
    with pytest.raises(StateDictError, match=r"lack text_model\.encoder\.layers\.0.* only a part of CLIPModel"):
        lamzoo.from_pretrained(tmp_path)
    loaded = lamzoo.from_pretrained(tmp_path, model_class=transformers.CLIPVisionModel)
    assert len(masks(loaded)) == 2


@pytest.mark.parametrize("other", [{"layers": "single"}, {"keys": "position", "max_length": 8}])
def test_masks_of_another_kind_than_the_saved_configuration_are_refused(other: dict[str, Any], tmp_path: Path) -> None:
    model: Any = add_lam(HOSTS["llama"].create(), RANDOM)
    model.config.lam_config |= other
    model.save_pretrained(tmp_path)
    with pytest.raises(StateDictError, match=r"have model\.layers\.\d\.self_attn\.lam\..* write the LamConfig"):
        lamzoo.from_pretrained(tmp_path)


def test_a_class_that_transformers_lacks_is_refused(tmp_path: Path) -> None:
    config: Any = add_lam(HOSTS["bert"].create(), RANDOM).config
    config.architectures = ["Mine"]
    config.save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=r"The class Mine of .* pass it as model_class"):
        lamzoo.from_pretrained(tmp_path)


def test_lamzoos_own_files_and_those_of_transformers_are_not_mistaken(tmp_path: Path) -> None:
    model: Any = add_lam(HOSTS["bert"].create(), RANDOM)
    with pytest.raises(ConfigError, match="call its own save_pretrained"):
        lamzoo.save_pretrained(model, tmp_path / "lamzoo")
    model.save_pretrained(tmp_path / "theirs")
    with pytest.raises(WeightsError, match=r"load it with lamzoo\.from_pretrained"):
        lamzoo.create_model(tmp_path / "theirs", pretrained=True)


def test_from_pretrained_without_transformers_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"lamzoo\[transformers\]"):
        lamzoo.from_pretrained("anything")
