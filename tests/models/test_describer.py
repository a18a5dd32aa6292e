"""The describer: what it computes, what masks and missing modalities change, and how it writes."""

from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.coca_model import CoCa
from torch import Tensor
from torch.testing import assert_close

import lamzoo
from lamzoo import LamConfig
from lamzoo.adapters.state import masks_of
from lamzoo.errors import ConfigError, DataError, UnsupportedHostError
from lamzoo.evaluation.captions.evaluate import context_tokens
from lamzoo.models.describer.decoder import CaptionDecoder, DecoderCache, from_coca
from lamzoo.models.describer.encoder import JointEncoder, StreamBatch, time_waves
from lamzoo.models.describer.generation import GenerationConfig
from lamzoo.models.tokenizers import SmallTokenizer, WordTokenizer
from lamzoo.profiling.latency import compare_latency
from lamzoo.weights.loading import load_into

WORDS = ["bin", "blue", "now", "set"]
SMALL = {
    "features": {"video": 12, "audio": 6}, "rates": {"audio": 50.0}, "seconds": 0.4, "width": 16, "heads": 2,
    "hidden": 32, "encoder_layers": 2, "text_layers": 1, "decoder_layers": 2, "vocabulary": WORDS, "context_length": 7,
}  # fmt: skip


def model(name: str = "lam_describer_micro", **options: Any) -> Any:
    torch.manual_seed(0)
    return lamzoo.create_model(name, **{**SMALL, **options}).eval()


def streams(size: int = 3, seed: int = 0) -> dict[str, StreamBatch]:
    """Clips of two modalities; but for the first sample, the last features are padding."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for name, count, width in (("video", 10, 12), ("audio", 20, 6)):
        mask = torch.ones(size, count, dtype=torch.bool)
        mask[1:, count - 3 :] = False
        times = torch.arange(count).expand(size, -1) * 0.4 / count
        found[name] = StreamBatch(torch.randn(size, count, width, generator=generator), times, mask)
    return found


def rows(batch: dict[str, StreamBatch], *which: int) -> dict[str, StreamBatch]:
    return {name: StreamBatch(*(part[list(which)] for part in stream)) for name, stream in batch.items()}


def text(size: int = 3, length: int = 7) -> Tensor:
    return torch.randint(1, 5, (size, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("op", ["add", "mul"])
@pytest.mark.parametrize("layers", ["multi", "single"])
@pytest.mark.parametrize("keys", ["content", "position"])
def test_a_fresh_mask_changes_no_bit(keys: Any, layers: Any, op: Any) -> None:
    plain, masked = model("describer_micro"), model(lam=LamConfig(keys=keys, layers=layers, op=op, rank=3))
    masked.load_state_dict(masked.state_dict() | plain.state_dict())
    assert torch.equal(masked(streams(), text()).logits, plain(streams(), text()).logits)


def test_masks_are_added_only_where_they_have_an_effect() -> None:
    plain = model(name="describer_micro")
    lamzoo.add_lam(plain)
    assert list(masks_of(plain)) == [f"encoder.layers.{number}.attn.lam" for number in range(2)]
    with pytest.raises(UnsupportedHostError):
        lamzoo.add_lam(plain.decoder)


def test_a_trained_mask_does() -> None:
    plain, masked = model("describer_micro"), model(lam=LamConfig(init="paper"))
    plain.load_state_dict({key: value for key, value in masked.state_dict().items() if ".lam." not in key})
    assert not torch.allclose(masked(streams(), text()).logits, plain(streams(), text()).logits)


def test_padding_is_not_seen() -> None:
    masked, batch = model(lam=LamConfig(init="paper")), streams()
    before = masked(batch, text()).logits
    for stream in batch.values():
        stream.features[~stream.mask] = 1e3
        stream.times[~stream.mask] = -50.0
    assert_close(masked(batch, text()).logits, before)
    cut = {name: StreamBatch(*(part[1:2, :-3] for part in stream)) for name, stream in batch.items()}
    assert_close(masked(cut, text()[1:2]).logits, before[1:2], atol=1e-5, rtol=1e-5)


def test_a_missing_modality_is_one_that_is_all_padding() -> None:
    masked, batch = model(lam=LamConfig(init="paper")), streams()
    without = batch | {"audio": batch["audio"]._replace(mask=torch.zeros_like(batch["audio"].mask))}
    expected = masked(without, text()).logits
    assert expected.isfinite().all()
    assert_close(masked({"video": batch["video"]}, text()).logits, expected, atol=1e-5, rtol=1e-5)
    none = {name: stream._replace(mask=torch.zeros_like(stream.mask)) for name, stream in batch.items()}
    assert masked(none, text()).logits.isfinite().all()  # silent and dark clips break no batch


def test_time_and_modality_are_what_marks_a_token() -> None:
    plain, batch = model("describer_micro"), rows(streams(), 0)
    expected = plain(batch, text(1)).logits
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    audio = StreamBatch(*(part[:, order] for part in batch["audio"]))
    assert_close(plain(batch | {"audio": audio}, text(1)).logits, expected, atol=1e-5, rtol=1e-5)
    later = batch["audio"]._replace(times=batch["audio"].times + 0.1)
    assert not torch.allclose(plain(batch | {"audio": later}, text(1)).logits, expected)


def test_the_same_moment_has_the_same_waves_in_every_modality() -> None:
    slow, fast = time_waves(torch.arange(5) / 5, 32), time_waves(torch.arange(100) / 100, 32)
    assert_close(slow, fast[::20])


def test_training_hides_one_modality_and_never_the_last() -> None:
    torch.manual_seed(0)
    encoder = JointEncoder({"video": 12, "audio": 6}, 16, 2, 32, 1, 0.0, 0.0, modality_dropout=1.0).train()
    batch = streams(64)
    batch["audio"].mask[:8] = False
    hidden = encoder._dropped(batch)
    there = torch.stack([stream.mask.any(dim=1) for stream in hidden.values()])
    assert (there.sum(dim=0) == 1).all()
    assert there[0, :8].all()
    assert there[:, 8:].any(dim=1).all()
    encoder.modality_dropout = 0.5
    kept = torch.stack([stream.mask.any(dim=1) for stream in encoder._dropped(streams(400)).values()]).all(dim=0)
    assert 0.4 < kept.float().mean() < 0.6


def test_context_is_read_and_its_padding_is_not() -> None:
    masked, batch = model(context_tokens=4), streams(1)
    context = torch.tensor([[5, 1, 2, 0]])
    expected = masked(batch, text(1), context).logits
    assert not torch.allclose(masked(batch, text(1)).logits, expected)
    assert_close(masked(batch, text(1), context[:, :3]).logits, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match="5 tokens and the model takes 4"):
        masked(batch, text(1), torch.ones(1, 5, dtype=torch.int64))


def test_a_token_of_number_zero_is_read_where_text_follows() -> None:
    masked, batch = model(context_tokens=4), streams(1)
    contexts = [torch.tensor([ids]) for ids in ([5, 0, 2, 0], [5, 2, 0, 0], [0, 0, 0, 0])]
    first, second, none = (masked(batch, text(1), context).logits for context in contexts)
    assert not torch.allclose(first, second)
    assert_close(none, masked(batch, text(1)).logits, atol=1e-5, rtol=1e-5)
    assert_close(model()(batch, text(1), contexts[0][:, :0]).logits, model()(batch, text(1)).logits)


@given(st.lists(st.lists(st.sampled_from(WORDS), max_size=5), max_size=5), st.integers(3, 9))
def test_the_context_is_the_last_captions_that_fit(captions: list[list[str]], room: int) -> None:
    found: Any = SimpleNamespace(tokenizer=WordTokenizer(WORDS, 7), context_tokens=room)
    texts = [" ".join(words) for words in captions]
    tokens = context_tokens(found, [texts, []])
    said = [words for words in captions if words]
    if not said:
        assert tokens is None
        return
    assert tokens is not None
    assert tokens.shape == (2, room)
    assert not tokens[1].any()
    kept = [said.pop()]
    while said and sum(map(len, [said[-1], *kept])) <= room - 2:  # start and end need a place too
        kept.insert(0, said.pop())
    words = [word for caption in kept for word in caption][-(room - 2) :]
    start, end = found.tokenizer.sot_token_id, found.tokenizer.eot_token_id
    numbers = [start, *(WORDS.index(word) + 1 for word in words), end]
    assert tokens[0].tolist() == numbers + [0] * (room - len(numbers))


def test_a_caption_that_is_too_long_keeps_its_end() -> None:
    found: Any = SimpleNamespace(tokenizer=SmallTokenizer(600, 7), context_tokens=9)
    (tokens,) = context_tokens(found, [["she opens the door", "he waits " * 20 + "and goes away"]])
    assert tokens[0] == found.tokenizer.sot_token_id
    assert tokens[-1] == found.tokenizer.eot_token_id
    assert "he waits and goes away".endswith(found.tokenizer.decode(tokens[1:-1].tolist()).strip())


def test_aligned_tokens_say_words() -> None:
    aligned = model(align=True)
    assert aligned(streams(), text()).words.shape == (3, 31, 7)
    assert model(align=False)(streams(), text()).words is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda batch: {}, "the streams are none; the model reads 'video', 'audio'"),
        (lambda batch: {"smell": batch["video"]}, "'smell'; the model reads"),
        (lambda batch: {"video": batch["audio"]}, r"'video' has features \(3, 20, 6\).*\(B, N, 12\)"),
        (lambda batch: {"video": batch["video"]._replace(mask=batch["audio"].mask)}, r"a mask \(3, 20\)"),
    ],
)
def test_streams_that_do_not_fit_are_named(change: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        model()(change(streams()), text())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"features": {}}, "features is empty"),
        ({"vocabulary": "german"}, "vocabulary='german'"),
        ({"vocabulary": 514, "align": True}, "align needs a vocabulary of words"),
        ({"vocabulary": ["a", "a"]}, "distinct words without spaces"),
        ({"num_classes": 3}, "leave num_classes out"),
    ],
)
def test_impossible_models_are_named(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        model(**options)


def test_latency_is_measured_on_streams() -> None:
    plain, masked = model("describer_micro"), model()
    times = compare_latency(masked, plain, masked.example_inputs(2), repeats=2, warmup=0)
    assert times.input_shape == (2, 10, 12)
    assert times.ratio > 0


def test_saved_models_come_back(tmp_path: Any) -> None:
    saved = model(lam=LamConfig(init="paper"), align=True)
    lamzoo.save_pretrained(saved, tmp_path / "m")
    loaded = lamzoo.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True).eval()
    assert torch.equal(loaded(streams(), text()).logits, saved(streams(), text()).logits)
    assert loaded.describe(streams()) == saved.describe(streams())


# --- the decoder


def coca() -> CoCa:
    torch.manual_seed(0)
    tower = {"context_length": 9, "vocab_size": 40, "width": 16, "heads": 2, "layers": 2}
    found = CoCa(
        embed_dim=16, multimodal_cfg=tower, text_cfg={**tower, "embed_cls": True, "output_tokens": True},
        vision_cfg={"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8, "output_tokens": True,
                    "attentional_pool": True, "attn_pooler_heads": 2},
    ).eval()  # fmt: skip
    torch.nn.init.normal_(found.text_decoder.text_projection)  # which open_clip leaves to its weights
    return found


def test_the_decoder_is_cocas_with_its_weights() -> None:
    theirs = coca()
    mine = CaptionDecoder(vocab_size=40, context_length=9, width=16, heads=2, text_layers=2, layers=2).eval()
    mine.load_state_dict(from_coca(theirs.state_dict(), 9))
    images, tokens = torch.randn(2, 3, 16, 16), torch.randint(1, 40, (2, 9))
    memory = theirs._encode_image(images)[1]
    expected = theirs.text_decoder(memory, theirs._encode_text(tokens)[1])
    assert_close(mine(tokens, memory), expected, atol=1e-5, rtol=1e-5)


def test_a_describer_begins_with_cocas_decoder() -> None:
    begun = model(width=16, text_layers=2, decoder_layers=2, context_length=9, vocabulary=[f"w{n}" for n in range(37)])
    theirs = coca().state_dict()
    load_into(begun, theirs, source="coca", external=True)
    for name, value in from_coca(theirs, 9).items():
        assert torch.equal(begun.decoder.state_dict()[name], value), name


@pytest.mark.parametrize("steps", [(1,) * 7, (3, 1, 2, 1), (7,)])
def test_the_cache_changes_nothing(steps: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    decoder = CaptionDecoder(30, 7, 16, 2, text_layers=1, layers=2).eval()
    tokens, memory = torch.randint(0, 30, (3, 7)), torch.randn(3, 5, 16)
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1, 2:] = False
    cache, logits = DecoderCache(), []
    for piece in tokens.split(steps, dim=1):
        logits.append(decoder(piece, memory, mask, cache))
    assert_close(torch.cat(logits, dim=1), decoder(tokens, memory, mask), atol=1e-5, rtol=1e-5)


# --- writing


@pytest.mark.parametrize(
    "generation",
    [
        GenerationConfig(),
        GenerationConfig(beams=3),
        GenerationConfig(beams=4, length_penalty=0.0),
        GenerationConfig(top_p=0.8),
    ],
)
def test_a_batch_is_written_as_one_by_one(generation: GenerationConfig) -> None:
    masked, batch = model(lam=LamConfig(init="paper")), streams(5)
    together = masked.generate(batch, generation=generation, seeds=[7, 8, 9, 10, 11])
    for sample, found in enumerate(together):
        (alone,) = masked.generate(rows(batch, sample), generation=generation, seeds=[7 + sample])
        assert alone.tokens == found.tokens
        assert alone.score == pytest.approx(found.score, abs=1e-4)


def score(
    described: Any, batch: dict[str, StreamBatch], tokens: tuple[int, ...], generation: GenerationConfig
) -> float:
    tokenizer = described.tokenizer
    row = torch.tensor([[tokenizer.sot_token_id, *tokens]])
    chances = described(batch, row[:, :-1]).logits.log_softmax(dim=-1)[0]
    return sum(chances[i, token].item() for i, token in enumerate(tokens)) / len(tokens) ** generation.length_penalty


@settings(derandomize=True, max_examples=8, deadline=None)
@given(seed=st.integers(0, 1000), penalty=st.sampled_from([0.0, 0.7, 1.0]))
def test_enough_beams_find_the_best_of_all_texts(seed: int, penalty: float) -> None:
    torch.manual_seed(seed)
    described = lamzoo.create_model(
        "describer_micro", **{**SMALL, "vocabulary": ["a", "b"], "context_length": 4}
    ).eval()
    with torch.no_grad():
        described.decoder.text_decoder.text_projection.mul_(4)  # chances that differ
    generation, batch, end = (
        GenerationConfig(beams=60, length_penalty=penalty),
        streams(1),
        described.tokenizer.eot_token_id,
    )
    others = [token for token in range(5) if token != end]
    ended = [(*body, end) for length in range(3) for body in product(others, repeat=length)]
    cut = list(product(others, repeat=3))
    best = max(score(described, batch, tokens, generation) for tokens in [*ended, *cut])
    (found,) = described.generate(batch, generation=generation)
    assert found.score == pytest.approx(best, abs=1e-4)


def test_greedy_takes_the_likeliest_token_each_time() -> None:
    described, batch = model("describer_micro"), streams(1)
    tokens = [described.tokenizer.sot_token_id]
    while len(tokens) < 7 and tokens[-1] != described.tokenizer.eot_token_id:
        tokens.append(described(batch, torch.tensor([tokens])).logits[0, -1].argmax().item())
    (found,) = described.generate(batch)
    assert found.tokens == [token for token in tokens[1:] if token != described.tokenizer.eot_token_id]


def test_the_old_name_of_the_decoding_settings_still_works() -> None:
    described, batch = model("describer_micro"), streams(1)
    with pytest.warns(DeprecationWarning, match="use generation="):
        found = described.generate(batch, how=GenerationConfig(max_length=4))
    assert found == described.generate(batch, generation=GenerationConfig(max_length=4))


def test_a_small_nucleus_is_greedy_and_seeds_decide_a_large_one() -> None:
    described, batch = model("describer_micro"), streams(2)
    assert [t.tokens for t in described.generate(batch, generation=GenerationConfig(top_p=1e-6))] == [
        t.tokens for t in described.generate(batch)
    ]
    drawn = [
        [t.tokens for t in described.generate(batch, generation=GenerationConfig(top_p=1.0), seeds=[seed, seed + 1])]
        for seed in (0, 0, 5)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"beams": 0}, "beams must be at least 1"),
        ({"temperature": 0.0}, "temperature above 0"),
        ({"top_p": 1.5}, "0 < top_p <= 1"),
        ({"top_p": 0.5, "beams": 2}, "one beam"),
        ({"max_length": 1}, "a start and an end"),
        ({"max_length": 99}, "built for 7 tokens"),
    ],
)
def test_impossible_ways_of_writing_are_named(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        model().generate(streams(1), generation=GenerationConfig(**options))


def test_words_are_tokens() -> None:
    tokenizer = WordTokenizer(WORDS, 6)
    assert tokenizer(["bin blue now", "Set"]).tolist() == [[5, 1, 2, 3, 6, 0], [5, 4, 6, 0, 0, 0]]
    assert tokenizer("bin blue now set set set").tolist() == [[5, 1, 2, 3, 4, 6]]
    assert tokenizer.decode([1, 2, 3]) == "bin blue now"
    with pytest.raises(DataError, match="'green' is not among the 4 known words"):
        tokenizer(["bin green"])
