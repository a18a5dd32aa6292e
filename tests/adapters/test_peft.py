"""Masks beside LoRA: peft trains, saves and switches the masks of a model among its ``modules_to_save``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lamzoo
from lamzoo import LamConfig
from lamzoo.errors import UnsupportedHostError
from tests.adapters.timm_hosts import HOSTS

peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")

IMAGES = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)
WORDS = torch.arange(12).reshape(2, 6)


def vit() -> Any:
    torch.manual_seed(0)
    return HOSTS["vit_tiny_patch16_224"].create().eval()


def bert() -> Any:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=50, **sizes)).eval()


class Host:
    """A model, its query projection, its classifier and its forward pass."""

    def __init__(self, build: Callable[[], Any], query: str, head: str, run: Callable[[Any], Tensor]) -> None:
        self.build, self.query, self.head, self.run = build, query, head, run

    def masked(self) -> Any:
        return lamzoo.add_lam(self.build(), LamConfig(rank=2))

    def adapted(self) -> Any:
        """The masked model with LoRA, in training, all that peft trains moved from where it began."""
        config = peft.LoraConfig(r=2, target_modules=[self.query], modules_to_save=["lam", self.head])
        model = peft.get_peft_model(self.masked(), config)
        optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=1.0)
        for _ in range(2):  # LoRA's first factor has gradients after the second has moved
            optimizer.zero_grad()
            self.run(model.train()).square().sum().backward()
            optimizer.step()
        return model.eval()


HOST = {
    "timm": Host(vit, "qkv", "head", lambda model: model(IMAGES)),
    "transformers": Host(bert, "query", "classifier", lambda model: model(WORDS).logits),
}
hosts = pytest.mark.parametrize("host", HOST.values(), ids=HOST)


@hosts
def test_masks_and_lora_are_trained_saved_and_loaded_together(host: Host, tmp_path: Path) -> None:
    plain = host.build()
    model = host.adapted()
    trained = {
        name.split(".lam.")[0] for name, each in model.named_parameters() if ".lam." in name and each.requires_grad
    }
    moved = {name for name, each in model.named_parameters() if each.grad is not None and ".lam." in name}
    assert len(trained) == 2 and moved
    assert all(".modules_to_save.default." in name for name in moved)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected, base = host.run(model), host.run(plain)
        again = peft.PeftModel.from_pretrained(host.masked(), tmp_path).eval()
        assert torch.equal(host.run(again), expected)
        with model.disable_adapter():
            assert torch.allclose(host.run(model), base, atol=1e-6)  # the masks of the base are the identity
        merged = model.merge_and_unload()
        assert torch.allclose(host.run(merged), expected, atol=1e-5)
    assert merged.lam_config == LamConfig(rank=2)


@hosts
def test_masks_that_peft_holds_are_saved_by_peft_or_after_merging(host: Host, tmp_path: Path) -> None:
    model = host.adapted()
    inner = model.get_base_model()
    uses: list[Callable[[Any], object]] = [
        lambda it: lamzoo.save_lam(it, tmp_path / "a"), lambda it: lamzoo.set_lam(it, None),
        lambda it: lamzoo.load_lam(it, tmp_path / "a"),
    ]  # fmt: skip
    for use in uses:
        for each in (model, inner):
            with pytest.raises(UnsupportedHostError, match="are held by peft.*call merge_and_unload"):
                use(each)
    merged = model.merge_and_unload()
    with torch.no_grad():
        expected = host.run(merged)
        base = lamzoo.remove_lam(copy.deepcopy(merged))
        lamzoo.save_lam(merged, tmp_path / "masks")
        assert torch.equal(host.run(lamzoo.load_lam(base, tmp_path / "masks")), expected)


@pytest.mark.parametrize(
    ("settings", "wraps"),
    [({}, True), ({"modules_to_save": ["lam"]}, False), ({"exclude_modules": r".*\.lam\..*"}, False)],
    ids=["all linear layers", "masks are saved", "masks are excluded"],
)
def test_lora_on_all_linear_layers_wraps_the_masks_unless_they_are_named(settings: dict[str, Any], wraps: bool) -> None:
    config = peft.LoraConfig(r=2, target_modules="all-linear", **settings)
    names = [name for name, _ in peft.get_peft_model(HOST["transformers"].masked(), config).named_parameters()]
    assert any(".lam." in name and "lora_" in name for name in names) is wraps
    assert any(".query.lora_" in name for name in names)


@pytest.mark.parametrize("config", [LamConfig(rank=2, init="paper"), LamConfig(rank=2, init="paper", layers="single")])
@pytest.mark.parametrize("merged", ["before", "after", None])
def test_copies_of_the_masks_see_merged_tokens_and_each_other(config: LamConfig, merged: str | None) -> None:
    def build(order: str | None) -> Any:
        model = lamzoo.add_lam(vit(), config)
        if order == "before":
            lamzoo.merge_tokens(model, keep=0.5)
        return model

    torch.manual_seed(0)
    plain = build("before" if merged else None)
    torch.manual_seed(0)
    model = peft.get_peft_model(build(merged), peft.LoraConfig(target_modules=["fc1"], modules_to_save=["lam"])).eval()
    if merged == "after":
        lamzoo.merge_tokens(model, keep=0.5)
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES), plain(IMAGES))


def test_copies_of_position_masks_know_the_grid() -> None:
    model = lamzoo.add_lam(
        HOSTS["vit_tiny_patch16_224"].create(dynamic_img_size=True), LamConfig(keys="position", init="paper")
    ).eval()
    images = torch.randn(1, 3, 48, 32)
    with torch.no_grad():
        expected = model(images)
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["fc1"], modules_to_save=["lam"])).eval()
        torch.testing.assert_close(adapted(images), expected)


@hosts
def test_a_model_whose_masks_peft_holds_is_not_fused(host: Host) -> None:
    model = host.adapted()
    with pytest.raises(UnsupportedHostError, match=r"No layer of the model .* has a fused form"):
        lamzoo.fuse(model)


def test_a_fused_model_that_peft_wraps_follows_its_adapters() -> None:
    def config() -> Any:
        return peft.LoraConfig(target_modules=["fc1"], modules_to_save=["lam"])

    model = peft.get_peft_model(lamzoo.fuse(lamzoo.add_lam(vit())), config(), adapter_name="a").eval()
    with torch.no_grad():
        before = model(IMAGES)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
        assert (model(IMAGES) - before).abs().max() > 1e-3
        with model.disable_adapter():
            torch.testing.assert_close(model(IMAGES), before)


@hosts
def test_masks_are_added_before_peft(host: Host) -> None:
    model = peft.get_peft_model(host.build(), peft.LoraConfig(target_modules=[host.query]))
    with pytest.raises(
        UnsupportedHostError, match=r"before peft\.get_peft_model, and name them in its modules_to_save"
    ):
        lamzoo.add_lam(model)


@hosts
def test_masks_in_the_base_of_a_peft_model_are_added_with_a_warning(
    host: Host, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def lora() -> Any:
        torch.manual_seed(0)
        return peft.get_peft_model(host.build(), peft.LoraConfig(target_modules=[host.query], init_lora_weights=False))

    model = lora().eval()
    base = lamzoo.add_lam(model.get_base_model(), LamConfig(rank=2, init="paper"))
    (record,) = caplog.records
    assert "has layers of peft, whose save_pretrained stores no masks" in record.getMessage()
    lamzoo.save_lam(base, tmp_path)
    model.save_pretrained(tmp_path / "lora")
    again = peft.PeftModel.from_pretrained(host.build(), tmp_path / "lora").eval()
    lamzoo.load_lam(again.get_base_model(), tmp_path)
    with torch.no_grad():
        assert torch.equal(host.run(again), host.run(model))


def test_prefix_tuning_of_masked_decoders_is_refused() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.LlamaConfig(vocab_size=50, num_key_value_heads=2, **sizes)
    model = lamzoo.add_lam(transformers.LlamaForCausalLM(config), LamConfig(rank=2))
    prefix = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(UnsupportedHostError, match=r"with the factors of the masks they have .*: prefix tuning"):
        peft.get_peft_model(model, prefix)(input_ids=WORDS)
