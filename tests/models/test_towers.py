"""CLIP4Clip's towers from other libraries: models of timm and transformers, their files, tokens and preprocessing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor

import lamzoo
from lamzoo.errors import ConfigError, StateDictError
from lamzoo.evaluation.retrieval.evaluate import frames_config, join_videos
from lamzoo.models.clip4clip.model import checkpoint_filter_fn
from lamzoo.profiling import analytic_macs
from lamzoo.registry import catalog
from lamzoo.video.extractor import FeatureExtractor

WORDS = ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "dog", "runs", "two", "red", "birds")
BERT: dict[str, Any] = {
    "model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "vocab_size": 600, "max_position_embeddings": 40, "pad_token_id": 0,
}  # fmt: skip
VISION = {"timm_model_name": "test_vit", "image_size": 64, "timm_pool": "token"}
TEXT = {"hf_model_name": "bert", "hf_config": BERT, "hf_pooler_type": "mean_pooler", "context_length": 12}


def create(vision: Any = None, text: Any = None, name: str = "lam_clip4clip_micro", **kwargs: Any) -> Any:
    torch.manual_seed(0)
    clip = {"embed_dim": 48, "vision_cfg": {**VISION, **(vision or {})}, "text_cfg": {**TEXT, **(text or {})}}
    given = {"max_frames": 2, "head_layers": 1, "similarity": "tight", **kwargs}
    return lamzoo.create_model(name, clip=clip, **given).eval()


def folder_of_bert(path: Path, **changes: Any) -> Path:
    """Writes a BERT and its tokenizer as transformers does."""
    torch.manual_seed(5)
    model = transformers.AutoModel.from_config(transformers.BertConfig(**{**BERT, **changes}))
    model.save_pretrained(path)
    encoder = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, "[UNK]"))
    encoder.pre_tokenizer = pre_tokenizers.Whitespace()
    encoder.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    encoder.save(str(path / "tokenizer.json"))
    return path


def inputs(model: Any) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    frames = torch.randn(3, 2, 3, *model.image_size)
    text = torch.randint(5, 500, (4, model.context_length))
    text[0, 4:] = text[1, 9:] = 0
    return frames, text, torch.tensor([[True, True], [True, False], [True, True]])


def test_towers_of_timm_and_transformers_are_these_models() -> None:
    model = create(similarity="mean", lam=False)
    frames, text, mask = inputs(model)
    trunk, bert = model.clip.visual.trunk, model.clip.text.transformer
    seen = model.clip.visual.head(trunk.forward_head(trunk.forward_features(frames[0])))
    torch.testing.assert_close(model.encode_frames(frames, mask)[0], seen)
    assert not model.encode_frames(frames, mask)[1, 1].any()
    states = bert(input_ids=text[:1, :4]).last_hidden_state.mean(dim=1)
    torch.testing.assert_close(model.encode_text(text[:1]), model.clip.text.proj(states), rtol=1e-4, atol=1e-5)
    assert model.context_length == 12


def test_a_length_of_the_card_that_replaces_that_of_the_tower_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    assert create(name="lam_clip4clip").context_length == 32
    assert "context_length=32 replaces the 12 of clip.text_cfg" in caplog.text
    caplog.clear()
    assert create(name="lam_clip4clip", context_length=12).context_length == create().context_length == 12
    assert "replaces" not in caplog.text


def test_checkpointing_of_a_text_tower_of_transformers_is_switched_off_again() -> None:
    model = create()
    for enable in (True, False):
        model.set_grad_checkpointing(enable)
        assert model.clip.text.transformer.is_gradient_checkpointing is enable


def test_weights_of_a_text_tower_for_longer_texts_give_their_first_positions() -> None:
    text = {"vocab_size": 600, "width": 32, "heads": 2, "layers": 1}

    def of_length(length: int) -> Any:
        clip = {"embed_dim": 48, "vision_cfg": VISION, "text_cfg": text | {"context_length": length}}
        return lamzoo.create_model("clip4clip_micro", clip=clip, context_length=length)

    short, long = of_length(8), of_length(12)
    given = long.clip.state_dict()
    assert torch.equal(
        checkpoint_filter_fn(given, short)["clip.text.positional_embedding"], given["text.positional_embedding"][:8]
    )


def test_both_towers_begin_as_their_files(tmp_path: Path) -> None:
    torch.manual_seed(2)
    vit: Any = timm.create_model("test_vit", num_classes=7).eval()
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    folder = folder_of_bert(tmp_path / "bert")
    vision = {"timm_model_pretrained": str(tmp_path / "vit.safetensors"), "image_size": 160}
    text = {"hf_model_name": str(folder), "hf_config": None}  # as the folder says
    model = create(vision, text, lam={"rank": 2}, lam_in=["vision", "text", "head"])
    bert = transformers.AutoModel.from_pretrained(folder).eval()
    frames, _, _ = inputs(model)
    expected = vit.forward_features(frames[0])[:, 0]
    torch.testing.assert_close(model.frame_states(frames)[0, :, 0], expected, rtol=1e-4, atol=1e-4)
    tokens = model.tokenizer(["two red birds", "a dog runs"])
    assert tokens[0].tolist() == [1, 7, 8, 9, 2] + 7 * [0]
    states = bert(input_ids=tokens[:, :5]).last_hidden_state.mean(dim=1)
    torch.testing.assert_close(model.text_states(tokens)[:, 0], states, rtol=1e-4, atol=1e-4)


def test_a_saved_model_needs_the_files_of_its_towers_no_more(tmp_path: Path) -> None:
    folder = folder_of_bert(tmp_path / "bert")
    vit = timm.create_model("test_vit")
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    model = create(
        {"timm_model_pretrained": str(tmp_path / "vit.safetensors")},
        {"hf_model_name": str(folder), "hf_config": None}, patch_grid=2, words=True,
    )  # fmt: skip
    lamzoo.save_pretrained(model, tmp_path / "saved")
    (tmp_path / "vit.safetensors").unlink()
    shutil.rmtree(folder)
    again: Any = lamzoo.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval()
    frames, text, mask = inputs(model)
    assert torch.equal(again(frames, text, mask), model(frames, text, mask))
    assert frames_config(again) == frames_config(model)
    assert again.tokenizer(["two red birds"])[0].tolist() == [1, 7, 8, 9, 2] + 7 * [0]
    assert str(folder) not in (tmp_path / "saved" / "config.json").read_text()


@pytest.mark.parametrize(
    ("tower", "changes"),
    [
        ("vision_cfg", {"timm_model_pretrained": "secret.safetensors"}),
        ("vision_cfg", {"timm_model_pretrained": "nowhere.safetensors"}),
        ("text_cfg", {"hf_model_pretrained": "nowhere.safetensors"}),
        ("text_cfg", {"hf_model_name": "folder", "hf_config": None, "hf_model_pretrained": False}),
    ],
)
def test_the_configuration_of_a_saved_model_names_no_other_files(
    tmp_path: Path, tower: str, changes: dict[str, Any]
) -> None:
    lamzoo.save_pretrained(create(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    save_file({}, tmp_path / "secret.safetensors")
    there = config["model_args"]["clip"][tower]
    for key, value in changes.items():
        if value is None:
            there.pop(key, None)
        else:
            there[key] = str(tmp_path / value) if isinstance(value, str) else value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"config\.json names files of towers"):
        lamzoo.create_model(f"local-dir:{tmp_path}")


@pytest.mark.parametrize("lam", [False, {"rank": 2}, {"rank": 2, "layers": "single"}], ids=["plain", "multi", "single"])
@pytest.mark.parametrize("layers", [1, 2])
def test_the_cost_of_words_and_patches_is_counted(layers: int, lam: Any) -> None:
    vision = {"image_size": 16, "patch_size": 4, "width": 32, "head_width": 16, "layers": 1}
    text = {"context_length": 10, "vocab_size": 600, "width": 40, "heads": 2, "layers": 1}
    clip = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
    model = lamzoo.create_model(
        "lam_clip4clip_micro", clip=clip, similarity="tight", patch_grid=2, words=True, max_frames=2, lam=lam,
        lam_in=["head"], head_layers=layers,
    )  # fmt: skip
    assert analytic_macs(model).gmacs == pytest.approx(lamzoo.profile(model).gmacs, rel=1e-6)


def test_videos_of_several_lengths_are_joined_with_their_patches() -> None:
    parts = [torch.ones(1, 2, 5, 3), torch.ones(2, 4, 5, 3)]
    videos, masks = join_videos(parts, [torch.ones(part.shape[:2], dtype=torch.bool) for part in parts])
    assert videos.shape == (3, 4, 5, 3)
    assert int(masks.sum()) == 10
    assert not videos[0, 2:].any()


def test_frames_are_prepared_as_the_vision_tower_expects() -> None:
    config = frames_config(create())
    cfg: Any = timm.create_model("test_vit").pretrained_cfg
    assert config["mean"] == cfg["mean"]
    assert config["std"] == cfg["std"]
    assert config["crop_pct"] == cfg["crop_pct"]
    assert config["input_size"] == (3, 64, 64)


def test_the_tight_head_compares_words_and_patches() -> None:
    model = create(patch_grid=2, words=True, lam=False)
    frames, text, mask = inputs(model)
    similarity = model(frames, text, mask)
    head = model.head
    for i in range(len(text)):
        count = int((text[i] != 0).sum())
        bert = model.clip.text.transformer(input_ids=text[i : i + 1, :count]).last_hidden_state[0]
        sentence = [model.clip.encode_text(text[i : i + 1]), head.word_projection(bert)]
        for j in range(len(frames)):
            tokens = [part + head.embedding_type[0] for part in sentence]
            places = [*range(1 + count), *range(13, 13 + 5 * int(mask[j].sum()))]
            for frame in frames[j][mask[j]]:
                features = model.clip.visual.trunk.forward_features(frame[None])
                patches = features[0, 1:].unflatten(0, (2, 2, 2, 2)).mean(dim=(1, 3)).flatten(0, 1)
                tokens.append(model.clip.encode_image(frame[None]) + head.embedding_type[1])
                tokens.append(head.patch_projection(patches) + head.embedding_type[1])
            joint = torch.cat(tokens) + head.embedding[places]
            joint = head.transformer(head.norm_pre(joint)[None])[0]
            expected = head.score(head.activation(head.pooler(head.norm(joint[0]))))[0]
            torch.testing.assert_close(similarity[i, j], expected, rtol=1e-4, atol=1e-5)


def test_padded_words_and_missing_frames_never_count() -> None:
    model = create(patch_grid=2, words=True, lam={"rank": 2})
    frames, text, mask = inputs(model)
    other = frames.clone()
    other[~mask] = float("nan")
    assert torch.equal(model(other, text, mask), model(frames, text, mask))
    texts, videos = model.encode_text(text, normalize=True), model.encode_video(frames, mask, normalize=True)
    assert (texts.shape, videos.shape) == ((4, 13, 48), (3, 2, 5, 48))
    assert not texts[0, 5:].any()
    torch.testing.assert_close(model.similarity(texts, videos), model.similarity(texts, videos, mask))


@pytest.mark.parametrize("kind", ["clip", "custom"])
def test_open_clips_own_towers_give_their_words_and_patches(kind: str) -> None:
    vision = {"image_size": 16, "patch_size": 4, "width": 32, "head_width": 16, "layers": 1}
    text = {"context_length": 10, "vocab_size": 600, "width": 40, "heads": 2, "layers": 1}
    clip: dict[str, Any] = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
    if kind == "custom":
        clip["vision_cfg"] = VISION
    model: Any = lamzoo.create_model(
        "lam_clip4clip_micro", clip=clip, similarity="tight", patch_grid=2, words=True, max_frames=2, head_layers=1
    ).eval()
    frames, tokens, mask = inputs(model)
    tokens = torch.where(torch.arange(10) == 6, 599, tokens).masked_fill(torch.arange(10) > 6, 0)
    texts, videos = model.encode_text(tokens), model.encode_video(frames, mask)
    torch.testing.assert_close(texts[:, 0], model.clip.encode_text(tokens))
    torch.testing.assert_close(videos[0, :, 0], model.clip.encode_image(frames[0]))
    assert texts[:, 7].any()
    assert not texts[:, 8:].any()
    assert videos[0].any(dim=-1).all()


def test_a_file_of_another_tower_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"layer.weight": torch.zeros(3)}, path)
    with pytest.raises(StateDictError, match=r"other\.safetensors does not fit"):
        create({"timm_model_pretrained": str(path)})


def test_a_masked_language_model_gives_its_encoder(tmp_path: Path) -> None:
    folder = folder_of_bert(tmp_path)
    head = transformers.BertForMaskedLM(transformers.BertConfig(**BERT))
    state = {key: value.clone() for key, value in head.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    model = create(text={"hf_model_name": str(folder), "hf_config": None})
    assert torch.equal(model.clip.text.transformer.embeddings.word_embeddings.weight,
                       head.bert.embeddings.word_embeddings.weight)  # fmt: skip


def test_a_convolutional_tower_has_patches_too() -> None:
    model = create({"timm_model_name": "test_resnet", "timm_pool": "avg"}, patch_grid=2)
    frames, _, _ = inputs(model)
    states = model.frame_states(frames)
    torch.testing.assert_close(states[:, :, 0], states[:, :, 1:].mean(dim=2))  # 2 x 2 of 2 x 2


@pytest.mark.parametrize(
    ("vision", "text", "says"),
    [
        ({"timm_model_name": "no_such_vit"}, {}, "timm has no such model"),
        ({"timm_model_pretrained": True}, {}, "the weights of a vision model of timm are not downloaded"),
        ({"timm_model_pretrained": "absent.safetensors"}, {}, "there is no such file"),
        ({}, {"hf_model_name": "bert-base-uncased", "hf_config": None}, "no folder with a config.json"),
        ({}, {"hf_model_pretrained": True}, "the weights of a text model of transformers are not downloaded"),
        ({}, {"hf_config": {**BERT, "model_type": "gpt2"}}, "is of the type 'gpt2'; open_clip takes bert, "),
        ({}, {"hf_config": {**BERT, "pad_token_id": None}}, "has no pad_token_id"),
    ],
)
def test_towers_that_cannot_be_are_refused_in_a_sentence(vision: Any, text: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        create(vision, text)


def test_a_pretrained_text_tower_needs_its_tokenizer(tmp_path: Path) -> None:
    folder = folder_of_bert(tmp_path)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="set text_cfg.hf_tokenizer_name to a folder"):
        create(text={"hf_model_name": str(folder), "hf_config": None})


@pytest.mark.parametrize("kwargs", [{"patch_grid": 2}, {"words": True}])
def test_tokens_are_compared_by_the_tight_head_alone(kwargs: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="are for similarity='tight'"):
        create(similarity="seq", **kwargs)


def test_patches_are_compared_after_merging_too() -> None:
    model = create(patch_grid=2, lam=False)
    frames, _, mask = inputs(model)
    plain = model.encode_video(frames, mask)
    lamzoo.merge_tokens(model, keep=0.5)
    merged = model.encode_video(frames, mask)
    assert not torch.allclose(merged, plain)
    torch.testing.assert_close(merged[0, :, 0], model.clip.encode_image(frames[0]), rtol=1e-4, atol=1e-5)


def test_words_of_a_text_tower_of_transformers_are_features(tmp_path: Path) -> None:
    folder = folder_of_bert(tmp_path)
    model = create(text={"hf_model_name": str(folder), "hf_config": None}, similarity="mean", lam=False)
    found = FeatureExtractor(model, device="cpu").texts(["two red birds", "a dog runs fast"])
    assert [part.shape for part in found] == [(5, 32), (6, 32)]
    states = model.clip.text.transformer(input_ids=model.tokenizer(["two red birds"])[:, :5]).last_hidden_state
    torch.testing.assert_close(torch.from_numpy(found[0]), states[0], rtol=1e-4, atol=1e-5)


def test_frozen_towers_run_without_dropout_and_gradients() -> None:
    model = create(words=True)
    model.freeze_towers(["text"], one_by_one=True)
    model.train()
    assert not model.clip.text.transformer.encoder.layer[0].attention.self.dropout.training
    assert model.clip.text.proj.training
    assert model.clip.visual.trunk.blocks[0].training
    _, text, _ = inputs(model)
    assert torch.equal(model.text_states(text)[1:2], model.text_states(text[1:2]))
    assert not model.text_states(text).requires_grad
    assert model.encode_text(text).requires_grad
    assert [model.is_cacheable(tower) for tower in ("vision", "text")] == [False, True]
    with pytest.raises(ConfigError, match="it takes vision and text"):
        model.freeze_towers(["audio"])


@pytest.mark.parametrize("pool", ["abs_attn", "rot_attn"])
def test_a_tower_that_pools_by_new_layers_is_not_frozen(pool: str) -> None:
    model = create({"timm_model_name": "resnet10t", "timm_pool": pool, "timm_proj": ""})
    with pytest.raises(ConfigError, match=r"new layers of open_clip \(timm_pool\)"):
        model.freeze_towers(["vision"])
    model.freeze_towers(["text"])


CARD = """
family = "photo_towers"
task = "retrieval"

[models.photo_towers]
builder = "lamzoo.models.clip4clip:clip4clip"
description = "Towers of two libraries."

[models.photo_towers.pretrained_cfg]
num_classes = 0

[models.photo_towers.backbone]
similarity = "tight"
max_frames = 1
head_layers = 1
patch_grid = 2
words = true

[models.photo_towers.backbone.clip]
embed_dim = 32
vision_cfg = { timm_model_name = "test_vit", image_size = 64 }

[models.photo_towers.backbone.clip.text_cfg]
hf_model_name = "bert"
hf_pooler_type = "mean_pooler"
context_length = 12

[models.photo_towers.backbone.clip.text_cfg.hf_config]
model_type = "bert"
hidden_size = 32
num_hidden_layers = 1
num_attention_heads = 2
intermediate_size = 64
vocab_size = 600
"""


def test_a_card_names_towers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "_specs", dict(catalog._registered()))
    (tmp_path / "card.toml").write_text(CARD)
    catalog.register_cards(tmp_path / "card.toml")
    model: Any = lamzoo.create_model("photo_towers").eval()
    assert model.image_size == (64, 64)
    assert frames_config(model)["mean"] == model.clip.visual.trunk.pretrained_cfg["mean"]
    given = model.example_inputs(2)
    lamzoo.save_pretrained(model, tmp_path / "saved")
    again: Any = lamzoo.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval()
    assert torch.equal(again(*given), model(*given))


def test_the_configuration_of_a_saved_model_is_json(tmp_path: Path) -> None:
    lamzoo.save_pretrained(create(), tmp_path)
    args = json.loads((tmp_path / "config.json").read_text())["model_args"]
    assert args["clip"]["text_cfg"]["hf_config"] == BERT
