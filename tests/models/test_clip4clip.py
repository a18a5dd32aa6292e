"""CLIP4Clip: its heads are the paper's, its masks change nothing until trained, and padding never counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn
from torch.nn import functional as F

import lamzoo
from lamzoo.data.video.sampling import FrameSampling
from lamzoo.errors import ConfigError, StateDictError
from lamzoo.lam import LamConfig
from lamzoo.models.clip4clip import clip4clip
from lamzoo.models.clip4clip.heads import initial_state
from lamzoo.models.clip4clip.model import Clip4Clip, checkpoint_filter_fn

TOWERS: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2},
    "text_cfg": {"context_length": 10, "vocab_size": 600, "width": 64, "heads": 2, "layers": 3},
}
HEADS = ("mean", "seq", "tight")
FRAMES = 5
MATCHED: dict[str, Any] = {"head_mlp_ratio": 4.1328125}


def build(similarity: str = "seq", lam: LamConfig | None = None, seed: int = 0, **kwargs: Any) -> Any:
    torch.manual_seed(seed)
    config = {"clip": TOWERS, "max_frames": FRAMES, "head_layers": 2}
    return clip4clip(config, lam=lam, similarity=similarity, **kwargs).eval()


def trained(model: nn.Module) -> Any:
    """A model whose masks are no longer identity."""
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in lamzoo.lam_parameters(model):
            parameter.add_(torch.randn_like(parameter) * 0.5)
    return model


def inputs(videos: int = 3, texts: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    frames = torch.randn(videos, FRAMES, 3, 16, 16)
    text = torch.randint(1, 500, (texts, 10))
    text[:, 6] = 599  # the end of the text
    text[:, 7:] = 0
    mask = torch.ones(videos, FRAMES, dtype=torch.bool)
    mask[1, 3:] = False
    mask[2, 1:] = False
    return frames, text, mask


def places(similarity: str) -> list[tuple[str, ...]]:
    return [("vision",), ("text",), *([] if similarity == "mean" else [("head",), ("head", "vision", "text")])]


CASES = [(similarity, where) for similarity in HEADS for where in places(similarity)]


@pytest.mark.parametrize("where", [("vision",), ("text",), ("vision", "text")])
@pytest.mark.parametrize("quick_gelu", [False, True])
def test_a_fresh_mask_gives_plain_clip4clips_mean_pooled_similarity(where: tuple[str, ...], quick_gelu: bool) -> None:
    model = build("mean", LamConfig(), lam_in=where, quick_gelu=quick_gelu)
    plain = build("mean", quick_gelu=quick_gelu).clip
    frames, text, mask = inputs()
    similarity = model(frames, text, mask)
    for i in range(len(text)):
        sentence = F.normalize(plain.encode_text(text[i : i + 1])[0], dim=0)
        for j in range(len(frames)):
            units = F.normalize(plain.encode_image(frames[j][mask[j]]), dim=-1)
            expected = plain.logit_scale.exp() * sentence @ F.normalize(units.mean(dim=0), dim=0)
            torch.testing.assert_close(similarity[i, j], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("similarity", "where"), CASES)
@pytest.mark.parametrize("op", ["mul", "add"])
def test_a_fresh_mask_keeps_the_similarity(similarity: str, where: tuple[str, ...], op: Any) -> None:
    frames, text, mask = inputs()
    plain = build(similarity)
    model = build(similarity, LamConfig(op=op), lam_in=where)
    model.load_state_dict(plain.state_dict(), strict=False)
    torch.testing.assert_close(model(frames, text, mask), plain(frames, text, mask), rtol=0, atol=1e-5)


def block(layer: Any, tokens: Tensor) -> Tensor:
    """A pre-norm transformer layer, written out, on ``(N, D)``."""
    attn, width = layer.attn, tokens.shape[1]
    query, key, value = F.linear(layer.ln_1(tokens), attn.in_proj_weight, attn.in_proj_bias).split(width, dim=1)
    mixed = []
    for head in range(attn.num_heads):
        part = slice(head * attn.head_dim, (head + 1) * attn.head_dim)
        scores = query[:, part] @ key[:, part].T / attn.head_dim**0.5
        mixed.append(scores.softmax(dim=1) @ value[:, part])
    tokens = tokens + attn.out_proj(torch.cat(mixed, dim=1))
    return tokens + layer.mlp(layer.ln_2(tokens))


def test_the_sequential_head_is_the_papers() -> None:
    model = build("seq")
    frames, text, mask = inputs()
    similarity = model(frames, text, mask)
    for j in range(len(frames)):
        seen = model.clip.encode_image(frames[j][mask[j]])
        tokens = seen + model.head.embedding[: len(seen)]
        for layer in model.head.transformer.resblocks:
            tokens = block(layer, tokens)
        video = F.normalize(F.normalize(seen + tokens, dim=1).mean(dim=0), dim=0)
        expected = model.clip.logit_scale.exp() * F.normalize(model.clip.encode_text(text), dim=1) @ video
        torch.testing.assert_close(similarity[:, j], expected, rtol=1e-4, atol=1e-4)


def test_the_tight_head_is_the_papers() -> None:
    model = build("tight")
    frames, text, mask = inputs()
    similarity = model(frames, text, mask)
    head = model.head
    for i, sentence in enumerate(model.clip.encode_text(text)):
        for j in range(len(frames)):
            seen = model.clip.encode_image(frames[j][mask[j]])
            tokens = torch.cat([sentence[None] + head.embedding_type[0], seen + head.embedding_type[1]])
            tokens = tokens + head.embedding[: len(tokens)]
            for layer in head.transformer.resblocks:
                tokens = block(layer, tokens)
            expected = head.score(head.activation(head.pooler(head.norm(tokens[0]))))[0]
            torch.testing.assert_close(similarity[i, j], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("similarity", "where"), CASES)
@pytest.mark.parametrize("keys", ["content", "position"])
def test_frames_that_are_not_there_never_count(similarity: str, where: tuple[str, ...], keys: Any) -> None:
    model = trained(build(similarity, LamConfig(keys=keys), lam_in=where))
    frames, text, mask = inputs()
    other = frames.clone()
    other[~mask] = float("nan")
    torch.testing.assert_close(model(other, text, mask), model(frames, text, mask), rtol=0, atol=0)
    alone = model(frames[2:, :1], text)
    torch.testing.assert_close(model(frames, text, mask)[:, 2:], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("keys", ["content", "position"])
def test_what_stands_behind_a_texts_end_never_counts(keys: Any) -> None:
    model = trained(build("seq", LamConfig(keys=keys), lam_in=("text",)))
    _, text, _ = inputs()
    other = text.clone()
    other[:, 7:] = 5
    torch.testing.assert_close(model.encode_text(other), model.encode_text(text), rtol=0, atol=0)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("similarity", HEADS)
def test_padding_is_no_frame_though_similarity_gets_no_mask(similarity: str, normalize: bool) -> None:
    model = build(similarity)
    frames, text, mask = inputs()
    assert not mask.all()
    texts, videos = model.encode_text(text), model.encode_video(frames, mask, normalize=normalize)
    torch.testing.assert_close(model.similarity(texts, videos), model.similarity(texts, videos, mask))


@pytest.mark.parametrize("max_pairs", [1, 2, 7])
def test_the_tight_head_in_blocks_is_the_tight_head_at_once(max_pairs: int) -> None:
    model = trained(build("tight", LamConfig()))
    frames, text, mask = inputs()
    at_once = model(frames, text, mask)
    model.head.max_pairs = max_pairs
    with torch.no_grad():
        torch.testing.assert_close(model(frames, text, mask), at_once, rtol=1e-5, atol=1e-5)


def test_a_match_is_the_similarity_of_that_pair() -> None:
    model = trained(build("tight", LamConfig()))
    frames, text, mask = inputs(videos=3, texts=3)
    with torch.no_grad():
        texts, videos = model.encode_text(text), model.encode_video(frames, mask)
        pairs = torch.tensor([0, 1, 2, 2]), torch.tensor([2, 1, 0, 1])
        expected = model.similarity(texts, videos, mask)[pairs]
        for model.head.max_pairs in (4096, 3):
            matched = model.match(texts[pairs[0]], videos[pairs[1]], mask[pairs[1]])
            torch.testing.assert_close(matched, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match="no joint transformer"):
        build("mean").match(texts, videos[:, 0])


@pytest.mark.parametrize("similarity", HEADS)
def test_the_first_stage_of_a_tight_head_is_the_mean_head(similarity: str) -> None:
    model, mean = (
        trained(build(similarity, LamConfig(), lam_in=["vision"])),
        build("mean", LamConfig(), lam_in=["vision"]),
    )
    frames, text, mask = inputs()
    with torch.no_grad():
        texts, videos = model.encode_text(text), model.encode_video(frames, mask)
        first = model.dual_similarity(texts, videos, mask)
        if similarity == "tight":
            mean.clip.load_state_dict(model.clip.state_dict())
            torch.testing.assert_close(first, mean.eval()(frames, text, mask))
            torch.testing.assert_close(model.dual_similarity(texts, videos), first)
        else:
            assert torch.equal(first, model.similarity(texts, videos, mask))


def pair_biased(model: Any, bias: Tensor) -> Any:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("modality.bias"):
                parameter.copy_(bias)
    return model


@pytest.mark.parametrize("tokens", [{}, {"words": True, "patch_grid": 2}], ids=["embeddings", "tokens"])
def test_masks_that_know_modalities_add_a_number_for_each_pair_as_the_control_does(tokens: dict[str, Any]) -> None:
    frames, text, mask = inputs()
    plain, control = build("tight", **tokens), build("tight", modality_bias=True, **tokens)
    masked = build("tight", LamConfig(modalities=2, rank=2), **tokens)
    with torch.no_grad():
        expected = plain(frames, text, mask)
        for other in (control, masked):
            missing, unexpected = other.load_state_dict(plain.state_dict(), strict=False)
            assert not unexpected and any(key.endswith("modality.bias") for key in missing)
            torch.testing.assert_close(other(frames, text, mask), expected)  # zeros at the start
        pairs = torch.tensor([[0.5, -2.0], [1.0, 3.0]])
        biased = pair_biased(control, pairs)(frames, text, mask)
        assert not torch.allclose(biased, expected, atol=1e-4)
        for name, value in initial_state(plain.head, plain.clip.state_dict()).items():
            assert torch.equal(initial_state(control.head, plain.clip.state_dict())[name], value), name
        torch.testing.assert_close(pair_biased(masked, pairs)(frames, text, mask), biased)
    control.set_grad_checkpointing()
    torch.testing.assert_close(control.train()(frames, text, mask).detach(), biased)
    exempt = masked.no_weight_decay() | control.no_weight_decay()
    assert all(name in exempt for name, _ in masked.named_parameters() if name.endswith("modality.bias"))


@pytest.mark.parametrize(
    ("lam", "kwargs"),
    [
        (None, {}),
        (None, {"modality_bias": True}),
        (LamConfig(modalities=2), {}),
        (LamConfig(op="mul", sign="positive"), {}),
        (LamConfig(keys="position", op="mul", heads="shared"), {}),
        (LamConfig(layers="single"), {}),
    ],
    ids=["plain", "bias", "modalities", "positive", "paper", "single"],
)
def test_the_last_block_of_a_tight_head_computes_what_the_head_reads(lam: Any, kwargs: dict[str, Any]) -> None:
    model = build("tight", lam, words=True, patch_grid=2, **kwargs)
    model = model if lam is None else trained(model)
    frames, text, mask = inputs()
    last = model.head.transformer.resblocks[-1]
    lengths: list[int] = []
    last.register_forward_hook(lambda block, args, output: lengths.append(output.shape[1]))
    found = model(frames, text, mask)
    found.sum().backward()
    gradients = {name: weight.grad for name, weight in model.head.named_parameters()}
    model.zero_grad()
    last.__class__ = ResidualAttentionBlock
    expected = model(frames, text, mask)
    expected.sum().backward()
    assert lengths == [model.head.length if lam and lam.layers == "single" else 1, model.head.length]
    torch.testing.assert_close(found, expected)
    for name, weight in model.head.named_parameters():
        torch.testing.assert_close(gradients[name], weight.grad, msg=name)


def test_masks_that_know_modalities_are_saved_and_loaded(tmp_path: Path) -> None:
    model = trained(build("tight", LamConfig(modalities=2, rank=2)))
    frames, text, mask = inputs()
    with torch.no_grad():
        expected = model(frames, text, mask)
        plain = build("tight")
        lamzoo.load_lam(plain, lamzoo.save_lam(model, tmp_path / "masks"))
        plain.load_state_dict(model.state_dict())
        assert torch.equal(plain(frames, text, mask), expected)


def test_modalities_need_tokens_of_as_many() -> None:
    with pytest.raises(ConfigError, match="modalities=3, and the tokens of this model have 2 modalities; set it to 2"):
        build("tight", LamConfig(modalities=3))
    with pytest.raises(ConfigError, match="modalities=2, and the tokens of this model have one; leave it out"):
        lamzoo.create_model("lam_vit_micro", lam=LamConfig(modalities=2))
    with pytest.raises(ConfigError, match="modality_bias are for similarity='tight'"):
        build("seq", modality_bias=True)
    for wrong in (1, True, -2, "two"):
        with pytest.raises(ConfigError, match="LamConfig.modalities is"):
            LamConfig(modalities=wrong)
    with pytest.raises(ConfigError, match="use sign='free', or modalities=0"):
        LamConfig(modalities=2, op="mul", sign="positive")


def test_masks_are_where_they_were_asked_for() -> None:
    for similarity, where in CASES:
        model = build(similarity, LamConfig(), lam_in=where)
        paths = {key.partition(".lam.")[0] for key in model.state_dict() if ".lam." in key}
        prefixes = {"head": "head.transformer", "vision": "clip.visual", "text": "clip.transformer"}
        assert {path for path in paths if path.startswith(tuple(prefixes[place] for place in where))} == paths
        assert len(paths) == sum({"head": 2, "vision": 2, "text": 3}[place] for place in where)


def test_masks_can_be_looked_at() -> None:
    model = build("seq", LamConfig())
    frames, text, mask = inputs()
    with lamzoo.capture_masks(model) as masks:
        model(frames, text, mask)
    record = masks["head.transformer.resblocks.0.attn"]
    assert record.attention.shape == (3, 1, FRAMES, FRAMES)
    assert float(record.attention[1, 0, :, 3:].abs().max()) == 0


@pytest.mark.parametrize("similarity", HEADS)
def test_gradient_checkpointing_keeps_the_gradients(similarity: str) -> None:
    frames, text, mask = inputs()
    grads = []
    for checkpointing in (False, True):
        model = build(similarity, LamConfig(layers="single"), lam_in=places(similarity)[-1]).train()
        model.set_grad_checkpointing(checkpointing)
        model(frames, text, mask).square().mean().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name)


@pytest.mark.parametrize("similarity", HEADS)
def test_it_runs_in_bfloat16(similarity: str) -> None:
    frames, text, mask = inputs()
    model = build(similarity, LamConfig(), lam_in=places(similarity)[-1])
    exact = model(frames, text, mask)
    rough = model.bfloat16()(frames.bfloat16(), text, mask)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0.1, atol=0.3)


@pytest.mark.parametrize("similarity", HEADS)
def test_similarities_are_fine_grained_under_autocast(similarity: str) -> None:
    frames, text, mask = inputs()
    model = build(similarity)
    with torch.autocast("cpu", torch.bfloat16):
        scores = model(frames, text, mask)
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, scores.bfloat16().float())


@pytest.mark.parametrize(("count", "frozen"), [(0, ()), (1, ("0",)), (2, ("0", "1"))])
def test_freeze_layers_freezes_the_embeddings_and_the_first_blocks(count: int, frozen: tuple[str, ...]) -> None:
    model = build("seq", LamConfig(), lam_in=("head", "vision", "text"))
    model.freeze_layers(count)
    for name, parameter in model.named_parameters():
        tower = name.startswith("clip.") and ".lam." not in name
        number = name.partition("resblocks.")[2].partition(".")[0]
        late = ("ln_final", "text_projection", "logit_scale", "ln_post", "visual.proj")
        trains = not tower or (number not in frozen if number else any(end in name for end in late))
        assert parameter.requires_grad == trains, name


def test_a_locked_image_tower_still_trains_its_masks() -> None:
    model = build("seq", LamConfig(), lam_in=("vision",))
    model.lock_image_tower()
    trains = {name for name, p in model.clip.visual.named_parameters() if p.requires_grad}
    assert trains
    assert all(".lam." in name for name in trains)


def test_freezing_more_blocks_than_there_are_is_refused() -> None:
    with pytest.raises(ConfigError, match="given 3 blocks; the towers have 2"):
        build().freeze_layers(3)


def towers() -> Any:
    torch.manual_seed(3)
    return open_clip.CLIP(**TOWERS)


@pytest.mark.parametrize("similarity", HEADS)
def test_open_clips_weights_fit_and_the_head_begins_as_the_text_towers_first_layers(similarity: str) -> None:
    source = towers()
    model = build(similarity, LamConfig(), lam_in=places(similarity)[-1])
    lamzoo_keys = checkpoint_filter_fn(source.state_dict(), model)
    missing, unexpected = model.load_state_dict(lamzoo_keys, strict=False)
    assert not unexpected
    assert all(".lam." in key for key in missing)
    _, text, _ = inputs()
    torch.testing.assert_close(model.encode_text(text), source.encode_text(text))
    if similarity != "mean":
        for index in range(2):
            mine, theirs = model.head.transformer.resblocks[index], source.transformer.resblocks[index]
            assert torch.equal(mine.mlp.c_fc.weight, theirs.mlp.c_fc.weight)
            assert torch.equal(mine.attn.in_proj_weight, theirs.attn.in_proj_weight)
        assert torch.equal(model.head.embedding, source.positional_embedding[: len(model.head.embedding)])


def test_weights_for_longer_texts_give_their_first_positions() -> None:
    source = towers()
    model = build(context_length=8)
    model.load_state_dict(checkpoint_filter_fn(source.state_dict(), model))
    _, text, _ = inputs()
    torch.testing.assert_close(model.encode_text(text[:, :8]), source.encode_text(text))


def test_a_missing_key_of_a_tower_is_an_error(tmp_path: Path) -> None:
    model = lamzoo.create_model("clip4clip_micro")
    state = {key.removeprefix("clip."): value for key, value in model.clip.state_dict().items()}
    del state["visual.proj"]
    file = tmp_path / "towers.safetensors"
    lamzoo.weights.write_state_dict(state, file)
    with pytest.raises(StateDictError, match=r"missing keys clip\.visual\.proj"):
        lamzoo.create_model("clip4clip_micro", checkpoint_path=file)


@pytest.mark.parametrize("similarity", HEADS)
def test_a_saved_model_comes_back(similarity: str, tmp_path: Path) -> None:
    model = lamzoo.create_model("lam_clip4clip_micro", similarity=similarity, lam_in=["text"], max_frames=4).eval()
    lamzoo.save_pretrained(model, tmp_path / "saved")
    again: Any = lamzoo.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval()
    assert isinstance(again, Clip4Clip)
    frames, text = model.example_inputs(2)
    torch.testing.assert_close(again(frames, text), model(frames, text), rtol=0, atol=0)


def test_a_wider_mlp_has_the_masks_parameters_within_two_percent() -> None:
    masked, plain, wider = (
        sum(p.numel() for p in lamzoo.create_model(name, **kwargs).parameters())
        for name, kwargs in (("lam_clip4clip_micro", {}), ("clip4clip_micro", {}), ("clip4clip_micro", MATCHED))
    )
    assert wider - plain == pytest.approx(masked - plain, rel=0.02)


def test_a_saved_model_knows_its_frames(tmp_path: Path) -> None:
    for fps, expected in ((12.5, 12.5), (0, None)):
        model: Any = lamzoo.create_model("clip4clip_micro", fps=fps, max_frames=9)
        assert model.sampling == FrameSampling(expected, 9)
        lamzoo.save_pretrained(model, tmp_path / str(fps))
        again: Any = lamzoo.create_model(f"local-dir:{tmp_path / str(fps)}")
        assert again.sampling == model.sampling


def test_a_tag_of_openai_brings_its_activation() -> None:
    with torch.device("meta"):
        quick: Any = lamzoo.create_model("lam_clip4clip.openai")
        plain: Any = lamzoo.create_model("lam_clip4clip.laion2b_s34b_b79k")
    assert isinstance(quick.clip.visual.transformer.resblocks[0].mlp.gelu, open_clip.transformer.QuickGELU)
    assert isinstance(quick.head.transformer.resblocks[0].mlp.gelu, open_clip.transformer.QuickGELU)
    assert type(plain.clip.visual.transformer.resblocks[0].mlp.gelu) is nn.GELU


@pytest.mark.parametrize("name", ["open_clip/ViT-B-16:openai", "open_clip/ViT-B-16.openai", "open_clip/RN50"])
def test_any_model_of_open_clip_is_a_base(name: str) -> None:
    with torch.device("meta"):
        model: Any = lamzoo.create_model(name, similarity="tight", lam=LamConfig(), max_frames=3)
    assert model.similarity_type == "tight"
    assert {path.partition(".")[0] for path in model.state_dict() if ".lam." in path} == {"head"}
    assert model.pretrained_cfg["input_size"] == (3, 224, 224)


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"similarity": "sum"}, "similarity of CLIP4Clip is 'sum'"),
        ({"lam_in": ("heads",)}, r"lam_in is \('heads',\)"),
        ({"similarity": "mean", "lam_in": ("head",)}, "no transformer in its head"),
        ({"num_classes": 3}, "has no classes"),
        ({"max_frames": 0}, "has 0 frames"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(kwargs: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        clip4clip({"clip": TOWERS}, lam=LamConfig(), **kwargs)


def test_more_frames_than_positions_are_refused() -> None:
    with pytest.raises(ConfigError, match="have 6 frames and this CLIP4Clip has positions for 5"):
        build("seq").encode_video(torch.zeros(1, 6, 3, 16, 16))
