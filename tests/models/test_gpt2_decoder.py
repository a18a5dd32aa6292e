"""GPT-2 as the describer's decoder: what it computes, what padding and caches change, its tokens, its weights."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import lamzoo
from lamzoo import LamConfig
from lamzoo.errors import ConfigError, DataError, MissingExtraError, StateDictError, WeightsNotFoundError
from lamzoo.evaluation.captions.evaluate import context_tokens
from lamzoo.models.describer.encoder import StreamBatch
from lamzoo.models.describer.generation import GenerationConfig
from lamzoo.profiling import analytic_macs, profile
from lamzoo.training.captions.batches import caption_losses
from lamzoo.training.captions.recipe import CaptionWeights
from lamzoo.weights.loading import load_into

transformers = pytest.importorskip("transformers", reason="the extra gpt2")

from lamzoo.models.describer.gpt2 import Gpt2Decoder, Gpt2Settings, from_gpt2  # noqa: E402
from lamzoo.models.tokenizers import Gpt2Tokenizer  # noqa: E402
from tests.byte_pairs import write_byte_pairs  # noqa: E402
from tests.weights.hub_server import COMMIT, HubServer  # noqa: E402

TINY = {"vocab_size": 300, "positions": 64, "width": 24, "layers": 2, "heads": 3}
READS = pytest.mark.parametrize("reads", ["cross", "prefix"])


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_byte_pairs(tmp_path_factory.mktemp("pairs")))


def decoder(reads: Any = "cross", **options: Any) -> Gpt2Decoder:
    torch.manual_seed(0)
    found = Gpt2Decoder(Gpt2Settings(reads=reads, **{**TINY, **options}), context_length=9, memory_width=16).eval()
    for parameter in found.parameters():
        parameter.data.mul_(3)
    return found


def model(reads: str = "cross", name: str = "lam_describer_gpt2", **options: Any) -> Any:
    torch.manual_seed(0)
    small = {
        "features": {"video": 12, "audio": 6}, "rates": {"audio": 50.0}, "seconds": 0.4, "width": 16, "heads": 2,
        "hidden": 32, "encoder_layers": 2, "context_length": 9, "context_tokens": 8,
        "gpt2": {**TINY, "reads": reads, **options.pop("gpt2", {})},
    }  # fmt: skip
    found: Any = lamzoo.create_model(name, **{**small, **options}).eval()
    for name, parameter in found.decoder.named_parameters():  # far from the beginning, where all that is read is small
        parameter.data.mul_(9 if "cross" in name or "projection" in name else 3)
    return found


def streams(size: int = 3) -> dict[str, StreamBatch]:
    """Clips of two modalities; but for the first sample, the last features are padding, more in each sample."""
    generator, found = torch.Generator().manual_seed(0), {}
    for name, count, width in (("video", 10, 12), ("audio", 20, 6)):
        mask = torch.arange(count).expand(size, -1) < count - 2 * torch.arange(size).unsqueeze(1)
        times = torch.arange(count).expand(size, -1) * 0.4 / count
        found[name] = StreamBatch(torch.randn(size, count, width, generator=generator), times, mask)
    return found


def alone(batch: dict[str, StreamBatch], row: int) -> dict[str, StreamBatch]:
    """One sample of a batch without its padding."""
    return {
        name: StreamBatch(*(part[row : row + 1, stream.mask[row]] for part in stream)) for name, stream in batch.items()
    }


def text(size: int = 3, length: int = 9) -> Tensor:
    return torch.randint(1, 301, (size, length), generator=torch.Generator().manual_seed(1))


def memory() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 0, 0], [1, 1, 0, 0, 1]]).bool()
    return torch.randn(3, 5, 16, generator=generator), mask


def published(**options: Any) -> Any:
    torch.manual_seed(3)
    config = transformers.GPT2Config(
        vocab_size=300, n_positions=64, n_embd=24, n_layer=2, n_head=3, bos_token_id=None, eos_token_id=None, **options
    )
    found = transformers.GPT2LMHeadModel(config).eval()
    for parameter in found.parameters():
        parameter.data.mul_(3)
    return found


# --- the decoder


def test_by_a_silent_cross_attention_it_is_gpt2_with_its_weights() -> None:
    theirs, mine = published(), decoder()
    missing, unexpected = mine.load_state_dict(from_gpt2(theirs.state_dict()), strict=False)
    assert not unexpected
    assert all("cross" in name or name.startswith("projection.") for name in missing)
    for block in mine.gpt2.h:
        torch.nn.init.zeros_(block.crossattention.c_proj.weight)
        torch.nn.init.zeros_(block.crossattention.c_proj.bias)
    assert_close(mine(text(), *memory())[..., 1:], theirs(text() - 1).logits, atol=1e-5, rtol=1e-5)


def test_behind_a_prefix_it_is_gpt2_with_its_weights() -> None:
    theirs, mine = published(), decoder("prefix")
    mine.load_state_dict(mine.state_dict() | from_gpt2(theirs.state_dict()))
    words, (prefix, _) = theirs.transformer.wte(text() - 1), memory()
    expected = theirs(inputs_embeds=torch.cat([mine.projection(prefix), words], dim=1)).logits[:, 5:]
    assert_close(mine(text(), prefix)[..., 1:], expected, atol=1e-5, rtol=1e-5)
    nothing = torch.zeros(3, 0, 16)
    assert_close(mine(text(), nothing)[..., 1:], theirs(text() - 1).logits, atol=1e-5, rtol=1e-5)


def test_cross_attention_is_transformers_own() -> None:
    theirs, mine = published(add_cross_attention=True), decoder()
    mine.load_state_dict(from_gpt2(theirs.state_dict()), strict=False)
    (seen, mask), wanted = memory(), text() - 1
    expected = theirs(wanted, encoder_hidden_states=mine.projection(seen), encoder_attention_mask=mask.long()).logits
    assert_close(mine(text(), seen, mask)[..., 1:], expected, atol=1e-5, rtol=1e-5)


@READS
def test_a_padded_memory_is_read_as_the_short_one(reads: str) -> None:
    found, (seen, mask) = decoder(reads), memory()
    together = found(text(), seen, mask)
    for row in range(3):
        single = found(text()[row : row + 1], seen[row : row + 1, mask[row]])
        assert_close(single, together[row : row + 1], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found(text(), seen), together)


@READS
@pytest.mark.parametrize("steps", [(1,) * 9, (3, 1, 4, 1), (9,)])
def test_the_cache_changes_nothing(reads: str, steps: tuple[int, ...]) -> None:
    found, (seen, mask) = decoder(reads), memory()
    cache = found.new_cache()
    logits = [found(piece, seen, mask, cache) for piece in text().split(steps, dim=1)]
    assert_close(torch.cat(logits, dim=1), found(text(), seen, mask), atol=1e-5, rtol=1e-5)


@READS
def test_a_selected_cache_is_that_of_other_rows_and_leaves_the_first_one_alone(reads: str) -> None:
    found, (seen, mask) = decoder(reads), memory()
    seen, mask = (part[1:2].expand(3, *part.shape[1:]) for part in (seen, mask))  # three beams of one sample
    cache, rows = found.new_cache(), torch.tensor([2, 0, 2])
    found(text()[:, :4], seen, mask, cache)
    other = found(text()[:, 4:5], seen, mask, cache.select(rows))
    mixed = torch.cat([text()[rows, :4], text()[:, 4:5]], dim=1)
    assert_close(other[:, 0], found(mixed, seen, mask)[:, -1], atol=1e-5, rtol=1e-5)
    assert_close(found(text()[:, 4:5], seen, mask, cache)[:, 0], found(text()[:, :5], seen, mask)[:, -1])


@READS
def test_where_it_looks_are_weights_of_what_is_there(reads: str) -> None:
    found, (seen, mask) = decoder(reads), memory()
    looks = found.memory_attention(text(), seen, mask)
    assert looks.shape == (3, 9, 5)
    assert_close(looks.sum(dim=-1), torch.ones(3, 9))
    assert (looks.masked_select(~mask.unsqueeze(1)) == 0).all()
    layers = found.attention_scores(text(), seen, mask)
    own = [scores.attention() for path, scores in layers.items() if "cross" not in path]
    found.gpt2.set_attn_implementation("eager")
    if reads == "cross":
        theirs = found.gpt2(
            inputs_embeds=found.token_embedding(text()), encoder_hidden_states=found.projection(seen),
            encoder_attention_mask=mask.long(), output_attentions=True,
        )  # fmt: skip
        assert_close(looks, torch.stack(theirs.cross_attentions).mean(dim=(0, 2)), atol=1e-5, rtol=1e-5)
        assert_close(torch.stack(own), torch.stack(theirs.attentions), atol=1e-5, rtol=1e-5)
    else:
        shares = torch.stack(own)[..., :5].sum(dim=-1, keepdim=True)
        assert_close((torch.stack(own)[..., :5] / shares).mean(dim=(0, 2)), looks, atol=1e-5, rtol=1e-5)


def test_a_prefix_that_leaves_no_room_for_the_text_is_refused_by_number() -> None:
    long, mask = torch.randn(2, 60, 16), torch.arange(60).expand(2, -1) < torch.tensor([[55], [40]])
    assert decoder("prefix")(text(2), long, mask).isfinite().all()  # of the 60, no sample has more than 55
    with pytest.raises(DataError, match=r"a clip has 60 tokens, and GPT-2's 64 positions have room for 55 .* 9"):
        decoder("prefix")(text(2), long)
    assert decoder("cross")(text(2), long).isfinite().all()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"gpt2": {"reads": "aloud"}}, "gpt2.reads='aloud'"),
        ({"gpt2": {"heads": 5}}, "width divisible by heads"),
        ({"gpt2": {"layer": 5}}, "gpt2 has no field 'layer'; its fields are dropout, heads"),
        ({"context_length": 65}, "context_length=65: GPT-2 has 64 positions"),
        ({"vocabulary": ["a", "b"]}, "GPT-2 has its own vocabulary"),
        ({"align": True}, "align needs a vocabulary of words"),
    ],
)
def test_impossible_models_are_named(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        model(**options)


# --- the describer


@READS
def test_formula_and_counter_agree(reads: str) -> None:
    with torch.device("meta"):
        found = model(reads)
    assert profile(found).gmacs == pytest.approx(analytic_macs(found).gmacs, rel=1e-9)


@READS
def test_a_fresh_mask_changes_no_bit_and_a_trained_one_does(reads: str) -> None:
    plain, masked = model(reads, "describer_gpt2"), model(reads, lam=LamConfig(rank=3))
    masked.load_state_dict(masked.state_dict() | plain.state_dict())
    assert torch.equal(masked(streams(), text()).logits, plain(streams(), text()).logits)
    trained = model(reads, lam=LamConfig(init="paper"))
    trained.load_state_dict(trained.state_dict() | plain.state_dict())
    assert not torch.allclose(trained(streams(), text()).logits, plain(streams(), text()).logits)


@READS
@pytest.mark.parametrize("generation", [GenerationConfig(), GenerationConfig(beams=3), GenerationConfig(top_p=0.8)])
def test_a_batch_is_written_as_one_by_one(pairs: str, reads: str, generation: GenerationConfig) -> None:
    found, batch = model(reads, tokenizer_name=pairs), streams()
    together = found.generate(batch, generation=generation, seeds=[7, 8, 9])
    assert len({tuple(each.tokens) for each in together}) > 1
    for row, each in enumerate(together):
        (single,) = found.generate(alone(batch, row), generation=generation, seeds=[7 + row])
        assert single.tokens == each.tokens
        assert single.score == pytest.approx(each.score, abs=1e-4)


@READS
def test_a_text_begins_and_ends_with_the_same_token(pairs: str, reads: str) -> None:
    found, batch = model(reads, tokenizer_name=pairs), streams(1)
    end = found.tokenizer.eot_token_id
    tokens = [found.tokenizer.sot_token_id]
    while len(tokens) < 9 and (len(tokens) == 1 or tokens[-1] != end):
        tokens.append(found(batch, torch.tensor([tokens])).logits[0, -1].argmax().item())
    assert found.generate(batch)[0].tokens == [token for token in tokens[1:] if token != end]
    assert 0 not in tokens
    with torch.no_grad():  # an end that is always likeliest
        found.decoder.gpt2.ln_f.weight.zero_()
        found.decoder.gpt2.ln_f.bias.fill_(1.0)
        found.decoder.gpt2.wte.weight[end - 1] = 100.0
    assert found.describe(batch) == [""]


@READS
def test_context_is_read_and_its_padding_is_not(pairs: str, reads: str) -> None:
    found, batch = model(reads, tokenizer_name=pairs), streams(2)
    context = context_tokens(found, [["she waits."], []])
    assert context is not None
    assert context[0, 0] == found.tokenizer.sot_token_id
    expected = found(batch, text(2), context).logits
    without = found(batch, text(2)).logits
    assert not torch.allclose(without[0], expected[0])
    assert_close(without[1], expected[1], atol=1e-5, rtol=1e-5)


def test_the_loss_counts_the_end_and_no_padding(pairs: str) -> None:
    found, batch = model(tokenizer_name=pairs), streams(1)
    tokens = found.tokenizer(["she"])
    logits = found(batch, tokens).logits
    ended = int((tokens[0] > 0).sum())
    chances = logits[0, : ended - 1].log_softmax(dim=-1)
    expected = -chances.gather(1, tokens[0, 1:ended, None]).mean()
    losses = caption_losses(found(batch, tokens), {"text": tokens}, CaptionWeights())
    assert_close(losses["caption"], expected)
    smoothed = caption_losses(found(batch, tokens), {"text": tokens}, CaptionWeights(label_smoothing=0.1))
    assert smoothed["caption"].isfinite()


@READS
def test_saved_models_come_back(pairs: str, tmp_path: Path, reads: str) -> None:
    saved = model(reads, tokenizer_name=pairs, lam=LamConfig(init="paper"))
    lamzoo.save_pretrained(saved, tmp_path / "m")
    loaded: Any = lamzoo.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True).eval()
    assert torch.equal(loaded(streams(), text()).logits, saved(streams(), text()).logits)
    assert loaded.describe(streams()) == saved.describe(streams())


def test_a_saved_model_has_its_tokenizer_or_takes_another(
    pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gone = shutil.copytree(pairs, tmp_path / "gone")
    found = model("prefix", tokenizer_name=str(gone))
    lamzoo.save_pretrained(found, tmp_path / "m")
    shutil.rmtree(gone)
    (tmp_path / "m").rename(tmp_path / "moved")
    saved = f"local-dir:{tmp_path / 'moved'}"
    monkeypatch.chdir(tmp_path)
    loaded: Any = lamzoo.create_model("local-dir:moved", pretrained=True)
    monkeypatch.chdir(tmp_path.parent)
    assert loaded.decoder.settings.reads == "prefix"
    assert loaded.tokenizer.decode(loaded.tokenizer("she waits!")[0].tolist()) == "she waits!"
    lamzoo.save_pretrained(loaded, tmp_path / "moved")  # onto itself
    assert (tmp_path / "moved" / "tokenizer.json").read_bytes() == (Path(pairs) / "tokenizer.json").read_bytes()
    (tmp_path / "moved" / "tokenizer.json").unlink()
    with pytest.raises(WeightsNotFoundError, match=r"moved has no tokenizer\.json"):
        lamzoo.create_model(saved, pretrained=True)
    other: Any = lamzoo.create_model(saved, pretrained=True, tokenizer_name=pairs)
    assert other.tokenizer.decode(other.tokenizer("she waits!")[0].tolist()) == "she waits!"
    lamzoo.save_pretrained(found, tmp_path / "without")
    assert "saved without its tokenizer" in caplog.text
    assert not (tmp_path / "without" / "tokenizer.json").exists()


def test_the_hub_gives_the_tokenizer_with_the_model(
    pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = lamzoo.save_pretrained(model(tokenizer_name=pairs), tmp_path / "m")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        lamzoo.push_to_hub(folder, "zoo/teller")
        loaded: Any = lamzoo.create_model("hf-hub:zoo/teller", pretrained=True, cache_dir=tmp_path / "cache")
    assert f"/resolve/{COMMIT}/tokenizer.json" in str(server.seen)
    assert loaded.tokenizer.decode(loaded.tokenizer("she waits!")[0].tolist()) == "she waits!"  # without the hub
    lamzoo.save_pretrained(loaded, tmp_path / "again")
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_a_folder_named_like_a_repository_is_saved_too(
    pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(pairs, tmp_path / "openai-community" / "gpt2")
    monkeypatch.chdir(tmp_path)
    lamzoo.save_pretrained(model(tokenizer_name="openai-community/gpt2"), "m")
    shutil.rmtree("openai-community")
    loaded: Any = lamzoo.create_model("local-dir:m", pretrained=True)
    assert loaded.tokenizer.decode(loaded.tokenizer("she waits!")[0].tolist()) == "she waits!"


@pytest.mark.parametrize("name", ["/no/such/folder", "./gpt2", "gone", "~/gpt2", "a/b/c"])
def test_a_tokenizer_folder_that_is_not_there_is_refused_when_the_model_is_created(name: str) -> None:
    with pytest.raises(WeightsNotFoundError, match=f"tokenizer_name='{name}' is neither a local folder nor"):
        model(tokenizer_name=name)


def test_a_model_without_gpt2_has_no_use_for_its_tokenizer() -> None:
    with pytest.raises(ConfigError, match="tokenizer_name='a' is an option of GPT-2; leave it out"):
        lamzoo.create_model("lam_describer_micro", tokenizer_name="a")


@pytest.mark.parametrize("head", [True, False])
@READS
def test_a_describer_begins_with_gpt2(reads: str, head: bool) -> None:
    begun, theirs = model(reads), published()
    state = theirs.state_dict()
    if not head:  # as the published file is
        masks = {"h.0.attn.bias": torch.ones(1, 1, 64, 64), "h.1.attn.masked_bias": torch.ones(1)}
        state = theirs.transformer.state_dict() | masks
    encoder = {name: value.clone() for name, value in begun.encoder.state_dict().items()}
    load_into(begun, state, source="gpt2")
    for name, value in theirs.transformer.state_dict().items():
        assert torch.equal(begun.decoder.gpt2.state_dict()[name], value), name
    assert all(torch.equal(begun.encoder.state_dict()[name], value) for name, value in encoder.items())
    with pytest.raises(StateDictError, match=r"wrong shapes decoder\.gpt2\.wpe\.weight"):
        load_into(model(reads, gpt2={"positions": 32}), state, source="gpt2")


def test_a_file_that_transformers_wrote_is_a_beginning(tmp_path: Path) -> None:
    theirs = published()
    theirs.save_pretrained(tmp_path)
    begun = model(checkpoint_path=tmp_path / "model.safetensors")
    assert torch.equal(begun.decoder.gpt2.wte.weight, 3 * theirs.transformer.wte.weight)  # model() multiplies by 3


def test_the_cards_weights_are_looked_for_on_the_hub(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        WeightsNotFoundError, match=r"hf download openai-community/gpt2 model\.safetensors --revision 607a"
    ):
        model(pretrained=True, cache_dir=tmp_path)


def test_without_transformers_the_extra_is_named(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "lamzoo.models.describer.gpt2")
    with pytest.raises(MissingExtraError, match=r"lamzoo\[gpt2\]"):
        model()
    assert lamzoo.create_model("describer_micro") is not None


# --- its tokens


def test_tokens_are_byte_pairs_and_zero_pads(pairs: str) -> None:
    tokenizer = Gpt2Tokenizer(pairs, 9, 301)
    theirs = transformers.AutoTokenizer.from_pretrained(pairs)
    row = tokenizer("she waits!")[0].tolist()
    assert row[0] == tokenizer.sot_token_id == tokenizer.eot_token_id == theirs.eos_token_id + 1
    assert [token - 1 for token in row[1 : row.index(0) - 1]] == theirs("she waits!")["input_ids"]
    assert row[row.index(0) - 1] == tokenizer.eot_token_id
    assert tokenizer.decode(row) == "she waits!"
    assert tokenizer.decode(tokenizer(["Zürich, 日"], context_length=40)[0].tolist()) == "Zürich, 日"
    long = tokenizer(["she waits by the door of the house", ""])
    assert long.shape == (2, 9)
    assert long[0, -1] == tokenizer.eot_token_id
    assert long[1].tolist() == [tokenizer.sot_token_id, tokenizer.eot_token_id, *[0] * 7]


def test_the_first_token_of_gpt2_is_none_of_padding(pairs: str) -> None:
    tokenizer = Gpt2Tokenizer(pairs, 4, 301)
    (first,) = (tokenizer("!")[0, 1:2] - 1).tolist()
    assert first == 0  # which GPT-2, too, has in this place
    assert tokenizer("!").count_nonzero() == 3


def test_a_tokenizer_that_is_not_here_is_named(pairs: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(WeightsNotFoundError, match=r"tokenizer\.json\.\n.*hf download some/gpt tokenizer.json`"):
        model(tokenizer_name="some/gpt").describe(streams(1))
    with pytest.raises(WeightsNotFoundError, match="has no tokenizer.json"):
        Gpt2Tokenizer(str(tmp_path), 9, 301)
    with pytest.raises(ConfigError, match="has 300 tokens, with .*built for 200"):
        Gpt2Tokenizer(pairs, 9, 201)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="is not a tokenizer file"):
        Gpt2Tokenizer(str(tmp_path), 9, 301)
