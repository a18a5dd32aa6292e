"""Features are those of CLIP's own towers at QVHighlights' own frames, and each file of them is whole or not there."""

from __future__ import annotations

import json
import os
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import timm.data
import torch
from PIL import Image
from torch import Tensor

import lamzoo
from lamzoo import LamConfig
from lamzoo.data import moments
from lamzoo.data.feature_arrays import read_features, unit
from lamzoo.data.moments.feature_folder import FeatureFolder
from lamzoo.data.video.instants import ClipMiddles, Instants
from lamzoo.data.video.sampling import FrameSampling
from lamzoo.errors import ConfigError, DataError, UnsupportedHostError
from lamzoo.evaluation.retrieval.evaluate import frames_config
from lamzoo.video import extractor
from tests.videos import nearest, pictures, write_clip

pytest.importorskip("open_clip")
from lamzoo.data.video.reader import read_video
from lamzoo.video.extractor import FeatureExtractor
from lamzoo.video.features import extract_features

QUERIES = {3: "a cup of coffee", 11: "A rocket starts!"}
TOWERS: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "head_width": 16, "layers": 1},
    "text_cfg": {"context_length": 16, "vocab_size": 600, "width": 32, "heads": 2, "layers": 2},
}


def build(seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    return lamzoo.create_model("lam_clip4clip_micro", clip=TOWERS, similarity="mean", **{"lam": False, **options})


@pytest.fixture(scope="module")
def filmed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three videos, of 2.4, 5 and 7.6 seconds, one in a folder of its own."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "more").mkdir()
    for number, name in enumerate(("astronaut.mp4", "coffee.mkv", "more/rocket 月.mp4")):
        write_clip(folder / name, pictures(12 + 13 * number), fps=5)
    return folder


@pytest.fixture
def folder(filmed: Path, tmp_path: Path) -> Path:
    return shutil.copytree(filmed, tmp_path / "videos")


@pytest.fixture
def queries(tmp_path: Path) -> Path:
    path = tmp_path / "queries.jsonl"
    path.write_text("".join(json.dumps({"qid": qid, "query": text}) + "\n" for qid, text in QUERIES.items()))
    return path


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model that counts in ``seen`` the frames that it looked at."""
    built = build()
    built.seen = 0
    whole = built.encode_frames

    def counting(frames: Tensor, *args: Any) -> Tensor:
        built.seen += frames.shape[1]
        return whole(frames, *args)

    monkeypatch.setattr(built, "encode_frames", counting)
    return built


def extract(folder: Path, model: Any, out: Path, **options: Any) -> Any:
    model.seen = 0
    return extract_features([folder], out, model, **{"device": "cpu", "batch_size": 2, **options})


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def picked_by_ffmpeg(path: Path) -> list[Image.Image]:
    """The frames that FFmpeg's filter keeps at half a frame a second, as QVHighlights' extractor asked for them."""
    frames = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        graph = av.filter.Graph()
        nodes = [graph.add_buffer(template=stream), graph.add("fps", "fps=1/2"), graph.add("buffersink")]
        graph.link_nodes(*nodes).configure()
        for frame in [*container.decode(stream), None]:
            graph.push(frame)
            while True:
                try:
                    frames.append(graph.pull().to_image())
                except (av.error.BlockingIOError, av.error.EOFError):
                    break
    return frames


@pytest.mark.parametrize(
    ("count", "fps"), [(1, 5), (3, 5), (10, 5), (14, 5), (15, 5), (26, 5), (110, Fraction(30000, 1001))]
)
def test_the_frames_are_those_that_ffmpeg_picks(tmp_path: Path, count: int, fps: Any) -> None:
    shown = pictures(count)
    path = write_clip(tmp_path / "video.mp4", shown, fps=fps)
    chosen = [nearest(frame, shown) for frame in read_video(path, ClipMiddles(fps=0.5)).frames]
    expected = [nearest(frame, shown) for frame in picked_by_ffmpeg(path)]
    assert chosen == (expected or [count - 1]), "it drops a video of less than half a clip, which is one here"
    assert len(chosen) == max(1, int(count / fps / 2 + 0.5))


def test_each_clip_has_the_frame_before_its_middle() -> None:
    times = [number / 10 for number in range(95)]
    assert ClipMiddles(fps=0.5).pick(times, 9.5) == [9, 29, 49, 69, 89]
    assert ClipMiddles(fps=1 / 3).pick(times, 9.5) == [14, 44, 74]
    assert ClipMiddles(fps=0.5).pick(times[:4], 0.4) == [3], "a video of less than half a clip has one"
    assert ClipMiddles(fps=0.5, first=1, max_frames=2).pick(times, 9.5) == [29, 49]
    assert Instants(at=(0.0, 0.25, 3.0, 99.0)).pick(times, 9.5) == [0, 2, 30, 94]
    for wrong in ({"fps": None}, {"fps": 0.0}, {"first": -1}):
        with pytest.raises(ConfigError):
            ClipMiddles(**wrong)


def test_a_clips_feature_is_the_towers_embedding_of_its_frame(folder: Path) -> None:
    model = build()
    path = folder / "more" / "rocket 月.mp4"
    found = FeatureExtractor(model, device="cpu", batch_size=3).video(path)
    clip = read_video(path, FrameSampling(fps=None, max_frames=None))
    transform = timm.data.create_transform(**frames_config(model))
    frames = torch.stack([transform(clip.frames[number]) for number in (4, 14, 24, 34)])
    with torch.no_grad():
        expected = model.eval().clip.encode_image(frames)
    assert found.clips.shape == (4, 24) and found.clips.dtype == np.float32
    np.testing.assert_allclose(found.clips, expected.numpy(), atol=1e-5)
    assert found.duration == pytest.approx(7.6)


@pytest.mark.parametrize("lam", [False, LamConfig(init="paper")])
def test_a_sentences_features_are_the_text_towers_last_states(lam: Any) -> None:
    model = build(lam=lam, lam_in=None if lam is False else ["text"])
    texts = ["a cup", "a rocket starts and flies to the moon, and further than anybody ever went before", "!"]
    states: list[Tensor] = []
    hook = model.clip.ln_final.register_forward_hook(lambda module, args, output: states.append(output))
    tokens = model.tokenizer(texts)
    with torch.no_grad():
        model.eval().encode_text(tokens)
    hook.remove()
    found = FeatureExtractor(model, device="cpu", batch_size=2).texts(texts)
    for row, features in enumerate(found):
        length = int(tokens[row].argmax()) + 1
        assert features.shape == (length, 32), "from the start of the text to its end, not projected"
        np.testing.assert_allclose(features, states[0][row, :length].numpy(), atol=1e-5)
    assert len(found[1]) == 16, "a text that is too long is cut"


def test_the_files_are_those_that_the_readers_of_qvhighlights_read(folder: Path, queries: Path, tmp_path: Path) -> None:
    model = build()
    out = tmp_path / "data" / "features"
    made = extract(folder, model, out, queries=queries)
    assert (made.videos, made.new_videos, made.queries, made.new_queries, made.unreadable) == (3, 3, 2, 2, {})
    read = FeatureFolder(out.parent)
    extractor = FeatureExtractor(model, device="cpu")
    for path in (folder / "coffee.mkv", folder / "more" / "rocket 月.mp4"):
        np.testing.assert_allclose(read.video(path.stem), unit(extractor.video(path).clips), atol=1e-5)
    for qid, text in QUERIES.items():
        np.testing.assert_allclose(read.text(qid), unit(extractor.texts([text])[0]), atol=1e-5)
    assert sorted(contents(out)) == [
        "clip_features/astronaut.npz", "clip_features/coffee.npz", "clip_features/rocket 月.npz",
        "clip_text_features/qid11.npz", "clip_text_features/qid3.npz",
    ]  # fmt: skip
    line = {"qid": 3, "query": QUERIES[3], "vid": "coffee", "duration": 5.0, "relevant_windows": [[0, 2]]}
    (out.parent / "highlight_val_release.jsonl").write_text(json.dumps(line))
    dataset = moments.create_moment_dataset(f"qvhighlights:{out.parent}", "validation")
    assert dataset.read(0).video.shape == (3, 26)


def test_a_second_run_makes_only_what_is_missing(folder: Path, queries: Path, model: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    extract(folder, model, out, queries=queries)
    assert model.seen == 1 + 3 + 4
    before = contents(out)
    again = extract(folder, model, out, queries=queries)
    assert (model.seen, again.videos, again.new_videos, again.queries, again.new_queries) == (0, 3, 0, 2, 0)
    (out / "clip_features" / "coffee.npz").unlink()
    (out / "clip_text_features" / "qid3.npz").unlink()
    more = extract(folder, model, out, queries=queries)
    assert (model.seen, more.new_videos, more.new_queries) == (3, 1, 1)
    whole = extract(folder, model, out, queries=queries, force=True)
    assert (model.seen, whole.new_videos, whole.new_queries) == (8, 3, 2)
    assert contents(out) == before, "to the byte"


def test_a_killed_run_leaves_whole_files_alone_and_the_next_goes_on(folder: Path, model: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def interrupt(what: str, done: int, total: int) -> None:
        assert (what, total) == ("videos", 3)
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(folder, model, out, progress=interrupt)
    assert list(contents(out)) == ["clip_features/astronaut.npz", "clip_features/coffee.npz"]
    rest = extract(folder, model, out)
    assert (model.seen, rest.videos, rest.new_videos) == (4, 3, 1)


def test_a_file_that_cannot_be_written_leaves_no_half(
    folder: Path, model: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    out = tmp_path / "out"

    def full(file: Any, **arrays: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(DataError, match=r"astronaut.npz cannot be written .*No space"):
        extract(folder, model, out)
    assert not out.exists()


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "other array", "nan"])
def test_a_damaged_file_is_made_again(folder: Path, model: Any, tmp_path: Path, damage: str, caplog: Any) -> None:
    out = tmp_path / "out"
    extract(folder, model, out)
    path = out / "clip_features" / "coffee.npz"
    features = read_features(path, "features")
    match damage:
        case "cut":
            path.write_bytes(path.read_bytes()[:-40])
        case "empty":
            path.write_bytes(b"")
        case "garbage":
            path.write_bytes(b"\xff" * 500)
        case "other array":
            np.savez(path, frames=features)
        case "nan":
            np.savez(path, features=features * np.nan)
    again = extract(folder, model, out)
    assert (model.seen, again.new_videos) == (3, 1)
    assert "coffee.npz" in caplog.text
    np.testing.assert_array_equal(read_features(path, "features"), features)


def test_features_of_something_else_are_never_mixed_in(folder: Path, queries: Path, model: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    extract(folder, model, out, queries=queries)
    before = contents(out)
    for options, message in (
        ({"model": build(seed=1)}, r"astronaut.npz was made with other weights;.*--out.*--force"),
        ({"clip_seconds": 1.0}, "made of clips of 2 s, not 1 s"),
    ):
        with pytest.raises(DataError, match=message):
            extract(folder, **{"model": model, "out": out, **options})
    queries.write_text(json.dumps({"qid": 3, "query": "a cat"}))
    with pytest.raises(DataError, match="qid3.npz was made for the query 'a cup of coffee', not 'a cat'"):
        extract(folder, model, out, queries=queries)
    write_clip(folder / "coffee.mkv", 6, fps=5)
    with pytest.raises(DataError, match="coffee.npz was made of another video of this name"):
        extract(folder, model, out)
    assert contents(out) == before
    assert extract(folder, model, out, clip_seconds=1.0, force=True).new_videos == 3
    assert len(read_features(out / "clip_features" / "astronaut.npz", "features")) == 2


def test_published_features_are_kept_where_their_width_is_right(folder: Path, model: Any, tmp_path: Path) -> None:
    path = tmp_path / "out" / "clip_features" / "coffee.npz"
    path.parent.mkdir(parents=True)
    np.savez_compressed(path, features=np.ones((3, 24), dtype=np.float16))
    assert extract(folder, model, tmp_path / "out").new_videos == 2
    assert read_features(path, "features").tolist() == np.ones((3, 24)).tolist()
    np.savez_compressed(path, features=np.ones((3, 512), dtype=np.float16))
    with pytest.raises(DataError, match=r"coffee.npz has 512 features, and those of the model are 24"):
        extract(folder, model, tmp_path / "out")


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_videos_are_named_and_left_out_or_stop(
    folder: Path, model: Any, tmp_path: Path, caplog: Any, workers: int
) -> None:
    (folder / "broken.mp4").write_bytes((folder / "astronaut.mp4").read_bytes()[:700])
    (folder / "cut.mkv").write_bytes((folder / "coffee.mkv").read_bytes()[:-700])
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"broken.mp4.*--on-bad-input skip"):
        extract(folder, model, out, workers=workers)
    made = extract(folder, model, out, on_bad_input="skip", workers=workers)
    assert made.videos == 3 and {path.name for path in made.unreadable} == {"broken.mp4", "cut.mkv"}
    assert "moov" in made.unreadable[folder / "broken.mp4"]
    assert all(name in caplog.text for name in ("broken.mp4", "cut.mkv"))
    assert not (out / "clip_features" / "cut.npz").exists()
    shutil.copy(folder / "astronaut.mp4", folder / "broken.mp4")
    (folder / "cut.mkv").unlink()
    assert extract(folder, model, out).new_videos == 1, "what was mended is made"


def test_workers_and_pieces_change_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    extract(folder, model, tmp_path / "whole", batch_size=64)
    monkeypatch.setattr(extractor, "_AT_ONCE", 3)
    extract(folder, model, tmp_path / "pieces", workers=2, batch_size=3)
    for path in (tmp_path / "whole" / "clip_features").iterdir():
        other = tmp_path / "pieces" / "clip_features" / path.name
        np.testing.assert_allclose(read_features(path, "features"), read_features(other, "features"), atol=1e-5)


@pytest.mark.parametrize(
    ("batch_size", "batches", "batches_of_range"), [(2, [2, 2, 2, 1], [2, 2, 2]), (3, [3, 3, 1], [3, 3]), (9, [7], [7])]
)
def test_the_batches_of_a_video_and_of_a_part_of_it_are_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int, batches: list[int], batches_of_range: list[int]
) -> None:
    path = write_clip(tmp_path / "a.mp4", pictures(70), fps=5)
    monkeypatch.setattr(extractor, "_AT_ONCE", 5)
    towers = FeatureExtractor(build(), device="cpu", batch_size=batch_size)
    seen: list[int] = []
    encode = towers.model.encode_frames
    monkeypatch.setattr(towers.model, "encode_frames", lambda frames: seen.append(frames.shape[1]) or encode(frames))
    whole = towers.video(path).clips
    assert seen == batches
    seen.clear()
    np.testing.assert_array_equal(towers.video(path, range(1, 6)).clips, whole[1:6])
    assert seen == batches_of_range


def test_two_videos_of_one_name_are_refused_by_both_names(folder: Path, model: Any, tmp_path: Path) -> None:
    shutil.copy(folder / "astronaut.mp4", folder / "more" / "astronaut.mov")
    with pytest.raises(
        DataError, match=r"videos/astronaut.mp4 and .*videos/more/astronaut.mov would both be written to"
    ):
        extract(folder, model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (folder / "more" / "astronaut.mov").unlink()
    twice = extract_features([folder, folder / "coffee.mkv"], tmp_path / "out", model, device="cpu")
    assert twice.videos == 3, "one that is named twice is one"


def test_what_can_be_told_without_a_model_is_told_before_the_work(folder: Path, queries: Path, tmp_path: Path) -> None:
    missing = "open_clip/ViT-B-32:openai"  # would ask the hub for its weights
    (tmp_path / "file").touch()
    (tmp_path / "bare").mkdir()
    for videos, options, message in (
        (tmp_path / "nowhere", {}, "no such video or folder: .*nowhere"),
        (tmp_path / "bare", {}, "bare has no video"),
        (folder, {"out": tmp_path / "file"}, "can't be created"),
        (folder, {"queries": tmp_path / "none.jsonl"}, "cannot read .*none.jsonl: No such file"),
        (folder, {"clip_seconds": 0.0}, "a clip is 0.0 s long"),
        (folder, {"batch_size": 0}, "the batch size is 0"),
        (folder, {"on_bad_input": "ignore"}, "on_bad_input is 'ignore'"),
        (folder, {"device": "abacus"}, "no device 'abacus'"),
    ):
        with pytest.raises((ConfigError, DataError), match=message):
            extract_features([videos], **{"out": tmp_path / "out", "model": missing, **options})
    for text, message in (
        ("", "has no queries"),
        ("{", "line 1 of .* is not JSON"),
        ('{"qid": 1}', "has no 'query'"),
        ('{"qid": 1, "query": " "}', "empty query"),
        ('{"qid": 1, "query": "a"}\n{"qid": 1, "query": "b"}', "query 1 is listed twice"),
        ('{"qid": 1, "query": "a"}\n{"qid": "1", "query": "b"}', "would both be written to"),
        ('{"qid": "../1", "query": "a"}', "is not a valid file name"),
    ):
        queries.write_text(text)
        with pytest.raises(DataError, match=message):
            extract_features([folder], tmp_path / "out", missing, queries=queries)


def test_no_readable_video_at_all_is_one_sentence(tmp_path: Path, model: Any) -> None:
    (tmp_path / "videos").mkdir()
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / "videos" / name).write_text("nothing")
    with pytest.raises(DataError, match=r"none of the 2 videos can be read: .*a.mp4 \(it is not a video"):
        extract(tmp_path / "videos", model, tmp_path / "out", on_bad_input="skip")


def test_features_that_are_not_finite_are_not_written(folder: Path, tmp_path: Path) -> None:
    model = build()
    with torch.no_grad():
        model.clip.visual.proj.fill_(torch.nan)
    with pytest.raises(ConfigError, match=r"astronaut.mp4 are not finite in bfloat16"):
        extract(folder, model, tmp_path / "out", precision="bfloat16")
    assert contents(tmp_path / "out") == {}


def test_a_model_without_towers_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedHostError, match="lam_clip4clip"):
        extract_features([folder], tmp_path / "out", lamzoo.create_model("lam_vit_micro"))
    model = build()
    model.tokenizer = lambda texts: torch.ones(len(texts), 16, dtype=torch.int64)
    with pytest.raises(UnsupportedHostError, match="text tower of lam_clip4clip_micro"):
        FeatureExtractor(model)


def test_a_name_that_is_no_utf8_is_kept(folder: Path, model: Any, tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.mp4")
    shutil.copy(folder / "astronaut.mp4", folder / name)
    assert extract(folder, model, tmp_path / "out").videos == 4
    assert extract(folder, model, tmp_path / "out").new_videos == 0
