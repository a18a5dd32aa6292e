"""The explorer page of retrieval models and describers: frames, patches, words and sound over time."""

import base64
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

import lamzoo
from lamzoo import LamConfig
from lamzoo.adapters import capture_masks
from lamzoo.errors import ConfigError, DataError, UnsupportedHostError
from tests.report.explorer_data import PageLayer, read_page
from tests.speech import write_speech

pytest.importorskip("open_clip")
from lamzoo.data.captions import CaptionDataset, create_caption_dataset
from lamzoo.data.captions.base import CaptionItem, CaptionSource, Stream
from lamzoo.data.retrieval import create_retrieval_dataset
from lamzoo.data.retrieval.clips import EachFrame
from lamzoo.data.video.reader import VideoClip
from lamzoo.evaluation.captions.evaluate import pad_streams
from lamzoo.evaluation.retrieval.evaluate import frames_config
from lamzoo.models.clip4clip import clip4clip
from lamzoo.report import explore_description, explore_retrieval, explore_video

TOWERS: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "head_width": 16, "layers": 1},
    "text_cfg": {"context_length": 10, "vocab_size": 600, "width": 64, "heads": 2, "layers": 1},
}
EVERYWHERE = ("head", "vision", "text")
PAPER = LamConfig(init="paper", op="mul", heads="per-head")


def retriever(similarity: str = "seq", lam_in: Any = EVERYWHERE, lam: LamConfig | None = PAPER) -> Any:
    torch.manual_seed(0)
    config = {"clip": TOWERS, "max_frames": 6, "head_layers": 1, "fps": 0}
    return clip4clip(config, lam=lam, similarity=similarity, lam_in=lam_in).eval()


def clip(count: int = 5) -> VideoClip:
    draw = np.random.default_rng(0)
    frames = [Image.fromarray(draw.integers(0, 256, (20, 30, 3), dtype=np.uint8)) for _ in range(count)]
    return VideoClip(frames, [0.5 * number for number in range(count)], 0.5 * count)


def names(page: dict[str, Any], layer: PageLayer) -> list[str]:
    return [page["runs"][run]["name"] for run in page["sequences"][layer.data["queries"]]]


def check(layer: PageLayer, record: Any, sample: int) -> None:
    mask = record.mask.dense()[sample].numpy()
    np.testing.assert_allclose(layer.mask, mask, atol=2e-4 * np.abs(mask).max())
    np.testing.assert_allclose(layer.masked, record.attention[sample], atol=1e-3)


@pytest.mark.parametrize(
    ("similarity", "merged"), [pytest.param("tight", False, marks=pytest.mark.slow), ("seq", True)]
)
def test_frames_patches_and_words_have_the_numbers_of_capture_masks(
    similarity: str, merged: bool, tmp_path: Path
) -> None:
    model, texts = retriever(similarity), ["a dog", "a cat"]
    if merged:
        lamzoo.merge_tokens(model, keep=1.0, frames=0.5)
    explore_video(model, clip(), texts, tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text()
    page = read_page(html)
    frames = EachFrame(create_transform(**frames_config(model)))(clip().frames)[None]
    with torch.no_grad(), capture_masks(model) as records:
        similarities = model(frames, model.tokenizer(texts))[:, 0]
    seen = []
    for index, data in enumerate(page["layers"]):
        layer, (path, _, frame) = PageLayer(page, index), data["name"].partition(", frame at ")
        record = records[f"{path}.attn"]
        runs = [page["runs"][run] for run in page["sequences"][data["keys"]]]
        if path.startswith("head."):
            assert names(page, layer) == (["text", "frame"] if similarity == "tight" else ["frame"])
            assert runs[-1]["labels"] == ["0.00 s", "0.50 s", "1.00 s", "1.50 s", "2.00 s"]
            assert (runs[-1]["frames"], runs[-1]["grid"][0] * runs[-1]["grid"][1] >= 5) == (5, True)
            check(layer, record, 0)
        elif frame:
            assert names(page, layer) == ["token", "patch"]
            seen.append(round(float(frame.removesuffix(" s")) / 0.5))
            if not merged:
                check(layer, record, seen[-1])
        else:
            assert (names(page, layer), "".join(runs[0]["labels"])) == (["word"], "<start_of_text>a dog <end_of_text>")
            check(layer, record, 0)
    assert page["layers"][0]["name"].startswith("head.")
    assert len(seen) == (2 if merged else 4)
    assert seen[0] == 0
    shares = [f"{share:.1%}" for share in similarities.softmax(dim=0).tolist()]
    assert all(f'<td class="number">{share}</td>' in html for share in shares)


def test_words_and_patches_that_the_head_compares_have_the_numbers_of_capture_masks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = {"clip": TOWERS, "max_frames": 2, "head_layers": 1, "fps": 0, "similarity": "tight"}
    model: Any = clip4clip(config, lam=PAPER, patch_grid=2, words=True).eval()
    explore_video(model, clip(2), "a dog", tmp_path / "page.html")
    page = read_page((tmp_path / "page.html").read_text())
    frames = EachFrame(create_transform(**frames_config(model)))(clip(2).frames)[None]
    with torch.no_grad(), capture_masks(model) as records:
        model(frames, model.tokenizer(["a dog"]))
    layer = PageLayer(page, 0)
    assert names(page, layer) == ["text", "word", "frame", "patch", "frame", "patch"]
    check(layer, records["head.transformer.resblocks.0.attn"], 0)


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_speech(tmp_path_factory.mktemp("speech"), copies=1)


def test_one_text_has_a_similarity_and_the_files_of_a_data_set_are_named(speech: Path, tmp_path: Path) -> None:
    model = retriever(lam_in=("head",))
    explore_video(model, clip(1), "a dog", tmp_path / "page.html")
    assert "similarity (cosine × temperature)" in (tmp_path / "page.html").read_text()
    dataset = create_retrieval_dataset(f"grid:{speech}", "test")
    explore_retrieval(model, dataset, "test0-lay-red-now", tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text()
    assert "on video test0-lay-red-now" in html
    assert "<th>this text: lay red now</th>" in html
    with pytest.raises(DataError, match="has no video 'x'; it has 'test0-bin-red-now'.* and 3 more"):
        explore_retrieval(model, dataset, "x", tmp_path / "other.html")
    with pytest.raises(ConfigError, match="a text is empty"):
        explore_video(model, clip(), " ", tmp_path / "other.html")
    with pytest.raises(UnsupportedHostError, match="no learnable masks"):
        explore_video(retriever(lam=None), clip(), "a dog", tmp_path / "other.html")
    assert not (tmp_path / "other.html").exists()


SMALL: dict[str, Any] = {
    "width": 16, "heads": 2, "hidden": 32, "encoder_layers": 1, "text_layers": 1, "decoder_layers": 1, "seconds": 3.0,
    "rates": {"audio": 50.0},
}  # fmt: skip


def describer(**options: Any) -> Any:
    torch.manual_seed(0)
    return lamzoo.create_model("lam_describer_micro", lam=PAPER, **{**SMALL, **options}).eval()


def picture(run: dict[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(run["picture"].partition(",")[2])))


def test_lips_and_sound_of_a_clip_are_shown_over_time(speech: Path, tmp_path: Path) -> None:
    dataset = create_caption_dataset(f"grid:{speech}", "test")
    model = describer(features=dict(dataset.modalities))
    explore_description(model, dataset, "test0-lay-red-now", tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text()
    page = read_page(html)
    token, mouth, audio, *_ = page["runs"]
    assert [run["name"] for run in page["runs"]] == ["token", "mouth", "audio", "generated word", "word so far"]
    assert (token["size"], mouth["size"], mouth["frames"], audio["size"]) == (1, 75, 12, 150)
    rows, columns = mouth["sheet"]
    assert picture(mouth).size == (80 * columns, 48 * rows)
    assert picture(audio).size == (300, 64)
    assert "in the data: “lay red now”" in html
    index = [item.id for item in dataset.items].index("test0-lay-red-now")
    with torch.no_grad(), capture_masks(model) as records:
        text = model.describe(pad_streams([dataset.read(index)]))[0]
    check(PageLayer(page, 0), next(iter(records.values())), 0)
    assert f'<th>sentence</th><td class="text">“{text}”</td>' in html
    with pytest.raises(DataError, match="has no clip 'x'"):
        explore_description(model, dataset, "x", tmp_path / "other.html")


def test_a_generated_word_has_its_attention_with_the_masks_and_with_neutral_ones(speech: Path, tmp_path: Path) -> None:
    dataset = create_caption_dataset(f"grid:{speech}", "test")
    masked, plain = (lamzoo.create_model("lam_describer_micro.grid", pretrained=True).eval() for _ in range(2))
    lamzoo.remove_lam(plain)
    explore_description(masked, dataset, None, tmp_path / "page.html")
    page = read_page((tmp_path / "page.html").read_text())
    batch = pad_streams([dataset.read(0)])
    with torch.no_grad():
        (written,) = masked.generate(batch)
        text = torch.tensor([[masked.tokenizer.sot_token_id, *written.tokens]])
        looks = []
        for model in (masked, plain):
            joint = model.encode(batch)
            looks.append(model.decoder.memory_attention(text, joint.tokens, joint.mask)[0].numpy())
    names = [layer["name"] for layer in page["layers"]]
    assert names[3:] == [
        "decoder.transformer.resblocks.0",
        *(f"decoder.text_decoder.{kind}.{n}" for n in range(2) for kind in ("resblocks", "cross_attn")),
    ]
    layers = [PageLayer(page, index) for index in range(len(names))]
    crosses = [layer for layer, name in zip(layers, names, strict=True) if "cross" in name]
    for kind, expected in zip(("masked", "plain"), looks, strict=True):
        shown = np.mean([getattr(layer, kind).mean(axis=0) for layer in crosses], axis=0)
        np.testing.assert_allclose(shown, expected, atol=1e-3)
    assert np.abs(looks[0] - looks[1]).max() > 0.01
    words = [masked.tokenizer.decode([number]).strip() for number in written.tokens]
    own = layers[3].data
    queries, keys = ([page["runs"][run] for run in page["sequences"][own[side]]] for side in ("queries", "keys"))
    assert [run["labels"] for run in queries] == [[*words, "<end>"]]
    assert [run["labels"] for run in keys] == [["<start>", *words]]
    assert (np.triu(layers[3].masked, 1) == 0).all()


class Film(CaptionSource):
    """Two sentences of one film, and a photograph in 2 x 2 patches."""

    split, modalities = "test", {"image": 8}
    items = tuple(CaptionItem(str(n), "film", float(n), n + 1.0, (text,)) for n, text in enumerate(("red now", "blue")))

    def streams(self, index: int) -> dict[str, Stream]:
        return {"image": Stream(np.random.default_rng(0).random((4, 8), np.float32), np.arange(4, dtype=np.float32))}

    def frames(self, index: int, count: int) -> list[Image.Image]:
        return [Image.new("RGB", (32, 32), "red")]


class Features(Film):
    """The same film, of which only features are at hand."""

    split, modalities = "test", {"video": 8}

    def streams(self, index: int) -> dict[str, Stream]:
        return {"video": super().streams(index)["image"]}

    def frames(self, index: int, count: int) -> list[Image.Image]:
        return []


def test_thumbnails_of_features_need_the_film(tmp_path: Path) -> None:
    pytest.importorskip("av")
    from tests.videos import write_clip

    model = describer(features={"video": 8}, vocabulary=["red", "blue", "now"], rates={}, seconds=0.16)
    dataset, path = CaptionDataset(Features(), "film:x"), tmp_path / "page.html"
    explore_description(model, dataset, "1", path)
    assert "give --videos DIR with film.mp4 in it" in path.read_text()
    write_clip(tmp_path / "film.mp4", [Image.new("RGB", (48, 32), c) for c in ("red", "blue")], fps=1, size=(48, 32))
    explore_description(model, dataset, "1", path, videos=tmp_path)
    _, video, *_ = read_page(path.read_text())["runs"]
    assert video["frames"] == 12
    red, _, blue = np.asarray(picture(video)).mean(axis=(0, 1))
    assert blue > 3 * red  # the second sentence is said in the second second
    assert "--videos" not in path.read_text()


def test_frames_of_the_data_come_before_those_of_a_folder(tmp_path: Path) -> None:
    model = describer(features={"image": 8}, vocabulary=["red", "blue", "now"], rates={}, seconds=0.16)
    explore_description(model, CaptionDataset(Film(), "film:x"), "1", tmp_path / "page.html", videos=tmp_path)
    assert picture(read_page((tmp_path / "page.html").read_text())["runs"][1])


def test_patches_of_a_photograph_and_earlier_words_are_shown(tmp_path: Path) -> None:
    words = ["red", "blue", "now"]
    model = describer(features={"image": 8}, context_tokens=5, vocabulary=words, rates={}, seconds=0.16)
    explore_description(model, CaptionDataset(Film(), "film:x"), "1", tmp_path / "page.html")
    page = read_page((tmp_path / "page.html").read_text())
    _, image, earlier, *_ = page["runs"]
    assert (image["grid"], earlier["name"]) == ([2, 2], "earlier word")
    assert [re.sub(r"\W", "", label) for label in earlier["labels"]][1:3] == ["red", "now"]
    with pytest.raises(UnsupportedHostError, match="does not generate captions"):
        explore_description(retriever(), CaptionDataset(Film(), "film:x"), "1", tmp_path / "other.html")


@pytest.mark.slow
@pytest.mark.parametrize("reads", ["cross", "prefix"])
@pytest.mark.parametrize("masked", [False, True])
def test_words_that_gpt2_generates_are_queries_with_masks_and_without(reads: str, masked: bool, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the extra gpt2")
    from tests.byte_pairs import write_byte_pairs

    decoder = {"vocab_size": 300, "positions": 64, "width": 24, "layers": 2, "heads": 3, "reads": reads}
    sizes = {"features": {"image": 8}, "rates": {}, "width": 16, "heads": 2, "hidden": 32, "encoder_layers": 1}
    torch.manual_seed(0)
    model = lamzoo.create_model(
        "lam_describer_gpt2", lam=PAPER, gpt2=decoder, seconds=0.16, context_length=9, context_tokens=5,
        tokenizer_name=str(write_byte_pairs(tmp_path)), **sizes,
    )  # fmt: skip
    if masked:
        lamzoo.add_lam(lamzoo.remove_lam(model), PAPER)
    explore_description(model, CaptionDataset(Film(), "film:x"), "1", tmp_path / "page.html")
    page = read_page((tmp_path / "page.html").read_text())
    joint, layers = 10, page["layers"][1:]  # tokens of the encoder
    words = layers[0]["queryCount"] - joint * (masked and reads == "prefix")
    assert {layer["op"] for layer in layers} == {"mul" if masked else None}
    shapes = [(layer["queryCount"], layer["keyCount"]) for layer in layers]
    if reads == "cross":
        assert shapes == [(words, words), (words, joint)] * 2
        assert [layer["name"].endswith("crossattention") for layer in layers] == [False, True] * 2
    else:
        assert shapes == [(words + joint * masked, joint + words)] * 2
    (generated,) = [run for run in page["runs"] if run["name"] == "generated word"]
    assert generated["size"] == words
