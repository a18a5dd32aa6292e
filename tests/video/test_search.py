"""A folder of videos is embedded once, whatever happens meanwhile, and the best answers to a query come first."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm.data
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

import lamzoo
from lamzoo.data.retrieval.clips import EachFrame
from lamzoo.data.video.sampling import FrameSampling
from lamzoo.errors import ConfigError, DataError, UnsupportedHostError
from lamzoo.evaluation.retrieval.evaluate import frames_config, preprocessing_of
from lamzoo.video import search
from lamzoo.video.index import part_path
from lamzoo.video.search import Match, VideoIndex, load_index
from tests.videos import pictures, write_clip

pytest.importorskip("open_clip")
from lamzoo.data.video.reader import read_video

QUERIES = ("a cup of coffee", "a rocket starts", "a woman in front of a flag")
TOWERS: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "head_width": 16, "layers": 1},
    "text_cfg": {"context_length": 16, "vocab_size": 600, "width": 32, "heads": 2, "layers": 1},
}


def build(similarity: str = "seq", seed: int = 0, **more: Any) -> Any:
    torch.manual_seed(seed)
    return lamzoo.create_model(
        "lam_clip4clip_micro", clip=TOWERS, similarity=similarity, head_layers=1, max_frames=4, fps=1, lam=False, **more
    )


@pytest.fixture(scope="module")
def filmed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five videos of different lengths, in folders."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "more").mkdir()
    names = ("astronaut.mp4", "coffee.mkv", "rocket.mp4", "more/chelsea.mp4", "more/астронавт 月 $x$.mp4")
    for number, name in enumerate(names):
        photograph = Path(name).stem if name.isascii() else "retina"
        write_clip(folder / name, pictures(6 + 5 * number, name=photograph), fps=5)
    return folder


@pytest.fixture
def folder(filmed: Path, tmp_path: Path) -> Path:
    return shutil.copytree(filmed, tmp_path / "videos")


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model that counts in ``seen`` how many videos it embedded."""
    built = build()
    built.seen = 0
    whole = built.encode_video

    def counting(frames: Tensor, *args: Any) -> Tensor:
        built.seen += len(frames)
        return whole(frames, *args)

    monkeypatch.setattr(built, "encode_video", counting)
    return built


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The test's own folder for indexes; matplotlib keeps its cache of fonts."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(search, "cache_folder", lambda: folder)
    return folder / "search"


def index(folder: Path, model: Any, **options: Any) -> VideoIndex:
    model.seen = 0
    return lamzoo.index_videos(folder, model, device="cpu", **{"batch_size": 2, "index": file_of(folder), **options})


def names(found: VideoIndex) -> list[str]:
    return [path.name for path in found.videos]


def file_of(folder: Path) -> Path:
    return folder / "index.safetensors"


def brute_force(model: Any, paths: list[Path], query: str, sampling: FrameSampling) -> list[float]:
    """The scores, video by video."""
    transform = EachFrame(timm.data.create_transform(**frames_config(model)))
    model.eval()
    scores = []
    with torch.no_grad():
        text = model.encode_text(model.tokenizer([query]))
        for path in paths:
            video = model.encode_video(transform(read_video(path, sampling).frames)[None])
            score = model.similarity(text, video)[0, 0]
            scores.append(float(score if model.similarity_type == "tight" else score / model.clip.logit_scale.exp()))
    return scores


@pytest.mark.parametrize("similarity", ["mean", "seq", "tight"])
def test_the_order_is_that_of_comparing_one_by_one(folder: Path, similarity: str) -> None:
    model = build(similarity)
    for sampling in (None, FrameSampling(fps=None, max_frames=3, slicing="head")):
        found = lamzoo.index_videos(folder, model, sampling=sampling, batch_size=2, device="cpu", force=True)
        used = sampling or FrameSampling(max_frames=4)
        for query in QUERIES:
            expected = brute_force(model, found.videos, query, used)
            best = sorted(range(5), key=lambda i: -expected[i])
            matches = found.search(query, top=10)
            assert [match.path for match in matches] == [found.videos[i] for i in best]
            scores = [match.score for match in matches]  # of other batches than those expected
            assert scores == pytest.approx(sorted(expected, reverse=True), abs=1e-6)
            assert found.search(query, top=2) == matches[:2]
    assert [match.duration for match in matches] == [found.durations[i] for i in best]
    assert sorted(found.durations) == pytest.approx([1.2, 2.2, 3.2, 4.2, 5.2])


@pytest.mark.parametrize("tokens", [{}, {"words": True, "patch_grid": 2}], ids=["embeddings", "tokens"])
def test_in_two_stages_the_head_orders_the_best_embeddings(folder: Path, tokens: dict[str, Any]) -> None:
    model = build("tight", **tokens)
    found = index(folder, model)
    for query in QUERIES:
        exact = found.search(query)
        paths = [match.path for match in exact]
        staged = found.search(query, rerank=10)
        assert [match.path for match in staged] == paths
        assert [match.score for match in staged] == pytest.approx([match.score for match in exact], abs=1e-6)
        with torch.no_grad():
            text = model.encode_text(model.tokenizer([query]))
            first = model.dual_similarity(text, found.embeddings, found.frame_mask)[0]
        near = {found.videos[i] for i in first.topk(3).indices}
        two = [match.path for match in found.search(query, top=2, rerank=3)]
        assert two == [path for path in paths if path in near][:2]
    with pytest.raises(ConfigError, match="rerank is 3 candidates; it must be at least 10"):
        found.search(QUERIES[0], rerank=3)
    with pytest.raises(ConfigError, match='similarity="tight", and that of this model is "seq"; leave it out'):
        index(folder, build("seq"), force=True).search(QUERIES[0], rerank=10)


@pytest.mark.parametrize("similarity", ["seq", "tight"])
def test_an_index_that_was_loaded_answers_like_the_one_that_was_made(folder: Path, similarity: str) -> None:
    model = build(similarity)
    made = index(folder, model)
    loaded = load_index(file_of(folder), model, device="cpu")
    assert loaded.embeddings.shape[1:] == ((32,) if similarity == "seq" else (4, 32))
    assert [made.search(query) for query in QUERIES] == [loaded.search(query) for query in QUERIES]
    moved = folder.rename(folder.with_name("moved"))
    assert load_index(file_of(moved), model).search(QUERIES[0])[0].path.is_relative_to(moved)


def test_an_index_has_the_patches_that_the_head_compares(folder: Path) -> None:
    torch.manual_seed(0)
    model: Any = lamzoo.create_model(
        "lam_clip4clip_micro", clip=TOWERS, similarity="tight", patch_grid=2, words=True, head_layers=1, max_frames=4,
        fps=1, lam=False,
    )  # fmt: skip
    made = index(folder, model)
    loaded = load_index(file_of(folder), model, device="cpu")
    assert loaded.embeddings.shape == (5, 4, 5, 32)
    assert [made.search(query) for query in QUERIES] == [loaded.search(query) for query in QUERIES]
    expected = brute_force(model, made.videos, QUERIES[0], FrameSampling(max_frames=4))
    scores = [match.score for match in made.search(QUERIES[0], top=10)]
    assert scores == pytest.approx(sorted(expected, reverse=True), abs=1e-6)


def test_the_second_run_embeds_only_what_is_new(folder: Path, model: Any) -> None:
    first = index(folder, model)
    assert (model.seen, first.embedded, len(first)) == (5, 5, 5)
    before = file_of(folder).stat().st_mtime_ns
    again = index(folder, model)
    assert (model.seen, again.embedded) == (0, 0)
    assert file_of(folder).stat().st_mtime_ns == before, "nothing to write"
    torch.testing.assert_close(again.embeddings, first.embeddings, rtol=0, atol=0)
    write_clip(folder / "more" / "boat.mp4", 8, fps=5)
    more = index(folder, model)
    assert (model.seen, more.embedded) == (1, 1)
    assert sorted(names(more)) == sorted([*names(first), "boat.mp4"])
    whole = index(folder, model, force=True)
    assert (model.seen, whole.embedded) == (6, 6), "force embeds everything"
    torch.testing.assert_close(more.embeddings, whole.embeddings, rtol=0, atol=1e-5)


def test_a_changed_file_is_embedded_again_and_a_vanished_one_is_forgotten(folder: Path, model: Any) -> None:
    index(folder, model)
    (folder / "rocket.mp4").unlink()
    write_clip(folder / "astronaut.mp4", pictures(6, name="coffee"), fps=5)
    changed = index(folder, model)
    assert (model.seen, len(changed)) == (1, 4)
    assert "rocket.mp4" not in names(changed)
    stat = (folder / "coffee.mkv").stat()
    os.utime(folder / "coffee.mkv", ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    index(folder, model)
    assert model.seen == 1
    (folder / "coffee.mkv").unlink()
    assert len(index(folder, model)) == 3
    assert model.seen == 0
    assert len(load_index(file_of(folder), model)) == 3


def test_a_killed_run_goes_on_from_what_it_saved(
    folder: Path, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "_SAVE_EVERY", 2)
    files: list[Path] = []
    steps: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        steps.append((done, total))
        files.append(shutil.copy(file_of(folder), tmp_path / f"{done}"))

    whole = index(folder, model, batch_size=1, progress=progress)
    assert steps == [(done, 5) for done in range(1, 6)]
    for done, known in ((1, 0), (2, 2), (3, 2), (4, 4)):  # what a kill after so many videos would leave
        shutil.copy(files[done - 1], file_of(folder))
        rest = index(folder, model)
        assert model.seen == rest.embedded == 5 - known
        assert rest.search(QUERIES[1]) == [
            Match(match.path, pytest.approx(match.score, abs=1e-5), match.duration)
            for match in whole.search(QUERIES[1])
        ]


def test_an_interrupted_run_keeps_what_it_embedded(folder: Path, model: Any) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index(folder, model, batch_size=1, progress=interrupt)
    assert len(load_index(file_of(folder), model)) == 3
    index(folder, model)
    assert model.seen == 2
    assert [path.name for path in folder.iterdir() if path.suffix == ".tmp"] == []


def test_unreadable_videos_are_named_and_left_out_or_stop(
    folder: Path, model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "broken.mp4").write_bytes((folder / "rocket.mp4").read_bytes()[:700])
    (folder / "empty.mkv").touch()
    with pytest.raises(DataError, match=r"broken.mp4.*--on-bad-input skip"):
        index(folder, model, on_bad_input="stop")
    found = index(folder, model, workers=1)
    assert len(found) == 5
    assert {path.name: reason for path, reason in found.unreadable.items()} == {
        "broken.mp4": "it is an MP4 without its index (moov), as from an interrupted recording or download",
        "empty.mkv": "it is empty",
    }
    assert [name for name in ("broken.mp4", "empty.mkv") if name in caplog.text] == ["broken.mp4", "empty.mkv"]
    caplog.clear()
    again = index(folder, model)
    assert (model.seen, again.unreadable, caplog.text) == (0, found.unreadable, "")
    with pytest.raises(DataError, match=r"broken.mp4"):
        index(folder, model, on_bad_input="stop")
    shutil.copy(folder / "rocket.mp4", folder / "broken.mp4")
    (folder / "empty.mkv").unlink()
    mended = index(folder, model)
    assert (model.seen, len(mended), mended.unreadable) == (1, 6, {})


def test_what_the_disk_refused_is_tried_again(folder: Path, model: Any) -> None:
    (folder / "later.mp4").symlink_to(folder.parent / "elsewhere.mp4")
    found = index(folder, model)
    assert [path.name for path in found.unreadable] == ["later.mp4"]
    assert "no such video" in found.unreadable[folder / "later.mp4"]
    shutil.copy(folder / "rocket.mp4", folder.parent / "elsewhere.mp4")
    assert len(index(folder, model)) == 6
    assert model.seen == 1


def test_a_folder_without_a_usable_video_is_one_sentence(tmp_path: Path, model: Any) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DataError, match="has no video"):
        index(tmp_path, model)
    with pytest.raises(DataError, match="no such video or folder"):
        index(tmp_path / "nowhere", model)
    with pytest.raises(DataError, match="is a file; give the folder"):
        index(tmp_path / "notes.txt", model)
    (tmp_path / "a.mp4").write_text("nothing")
    (tmp_path / "b.mp4").write_text("nothing")
    for _ in range(2):
        with pytest.raises(DataError, match=r"none of the 2 videos in .* can be read: .*a.mp4 \(it is not a video"):
            index(tmp_path, model)
    with pytest.raises(DataError, match="is still empty"):
        load_index(file_of(tmp_path), model)


def test_an_index_of_something_else_is_refused_with_the_way_out(folder: Path, model: Any, tmp_path: Path) -> None:
    index(folder, model)
    other = build(seed=1)
    content = file_of(folder).read_bytes()
    with pytest.raises(DataError, match=r"other weights of lam_clip4clip_micro;.*--index.*--force"):
        index(folder, other)
    with pytest.raises(DataError, match="other weights"):
        load_index(file_of(folder), other)
    with pytest.raises(DataError, match="with fps 1, max_frames 4, slicing uniform, not fps 2, max_frames 3"):
        index(folder, model, sampling=FrameSampling(fps=2.0, max_frames=3))
    shutil.copytree(folder, tmp_path / "others")
    for path in (tmp_path / "others").rglob("*.m*"):
        os.utime(path)
    with pytest.raises(DataError, match="an index of other videos"):
        index(tmp_path / "others", model, index=file_of(folder))
    assert file_of(folder).read_bytes() == content
    assert len(index(folder, other, force=True)) == 5
    with pytest.raises(DataError, match="--force"):
        index(folder, model)


def test_the_sampling_of_the_index_is_taken_over(folder: Path, model: Any) -> None:
    first = index(folder, model, sampling=FrameSampling(fps=2.0, max_frames=3, slicing="tail"))
    again = index(folder, model)
    assert model.seen == 0
    assert again.search(QUERIES[2]) == first.search(QUERIES[2])


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty", "metadata", "shape", "nan", "list"])
def test_a_damaged_index_is_refused_and_force_replaces_it(folder: Path, model: Any, damage: str) -> None:
    index(folder, model)
    path = file_of(folder)
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - it is no dict
        metadata = file.metadata()
    match damage:
        case "cut":
            path.write_bytes(path.read_bytes()[:-100])
        case "garbage":
            path.write_bytes(b"\xff" * 1000)
        case "empty":
            path.write_bytes(b"")
        case "metadata":
            save_file(tensors, path, {key: value[:-5] for key, value in metadata.items()})
        case "shape":
            save_file(tensors | {"embeddings": tensors["embeddings"][1:]}, path, metadata)
        case "nan":
            save_file(tensors | {"embeddings": tensors["embeddings"] * torch.nan}, path, metadata)
        case "list":
            save_file(tensors | {"videos": tensors["videos"][:-3]}, path, metadata)
    content = path.read_bytes()
    with pytest.raises(DataError, match=r"not a video index, or is damaged;.*--force"):
        index(folder, model)
    with pytest.raises(DataError, match="damaged"):
        load_index(path, model)
    assert path.read_bytes() == content
    assert len(index(folder, model, force=True)) == 5


def test_other_files_are_never_overwritten(folder: Path, model: Any, tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(2)}, weights)
    content = weights.read_bytes()
    for force in (False, True):
        with pytest.raises(DataError, match="contains tensors that are not a video index"):
            index(folder, model, index=weights, force=force)
        with pytest.raises(ConfigError, match=r"end in \.safetensors"):
            index(folder, model, index=folder / "rocket.mp4", force=force)
    assert weights.read_bytes() == content
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(DataError, match="is a folder"):
        index(folder, model, index=tmp_path / "folder.safetensors", force=True)


def test_the_index_may_lie_elsewhere_and_move_with_its_folder(folder: Path, model: Any, tmp_path: Path) -> None:
    path = tmp_path / "made" / "here.safetensors"
    found = index(folder, model, index=path)
    assert not file_of(folder).exists()
    assert found.path == path
    assert load_index(path, model).search(QUERIES[0], 1)[0].path.resolve() == found.search(QUERIES[0], 1)[0].path
    moved = folder.rename(tmp_path / "moved")
    assert len(index(moved, model, index=path)) == 5
    assert model.seen == 0


def test_the_index_lies_in_the_cache_one_for_each_folder_and_weights(folder: Path, cache: Path) -> None:
    before = sorted(folder.rglob("*"))
    first, other = build(), build(seed=1)
    found = lamzoo.index_videos(folder, first, device="cpu")
    assert found.path.parent == cache
    assert found.path.name.startswith("videos.lam_clip4clip_micro.")
    assert sorted(folder.rglob("*")) == before, "nothing is written beside the videos"
    again = lamzoo.index_videos(folder / "more" / "..", first, device="cpu")
    assert (again.path, again.embedded) == (found.path, 0)
    elsewhere = lamzoo.index_videos(folder, other, device="cpu")
    assert (elsewhere.embedded, len(elsewhere)) == (5, 5)
    assert lamzoo.index_videos(folder, first, device="cpu").search(QUERIES[0]) == found.search(QUERIES[0])
    inside = lamzoo.index_videos(folder / "more", first, device="cpu")
    assert (inside.embedded, len(inside)) == (2, 2)
    assert len({found.path, elsewhere.path, inside.path}) == len(list(cache.iterdir())) == 3


def test_another_preprocessing_or_head_has_an_index_of_its_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("mean")
    first = lamzoo.index_videos(folder, model, device="cpu")
    monkeypatch.setattr(search, "preprocessing_of", lambda model: preprocessing_of(model) | {"crop_pct": 0.5})
    assert lamzoo.index_videos(folder, model, device="cpu").embedded == 5
    monkeypatch.undo()
    monkeypatch.setattr(model, "similarity_type", "seq")
    with pytest.raises(DataError, match="with another head or preprocessing"):
        load_index(first.path, model, device="cpu")


def test_the_same_weights_under_other_masks_have_an_index_of_their_own(folder: Path) -> None:
    added, multiplied = (
        lamzoo.create_model(
            "lam_clip4clip_micro",
            clip=TOWERS,
            head_layers=1,
            max_frames=4,
            lam=lamzoo.LamConfig(op=op, keys="position"),
        )
        for op in ("add", "mul")
    )
    with torch.no_grad():
        for mine, theirs in zip(multiplied.parameters(), added.parameters(), strict=True):
            mine.copy_(theirs)
    first = lamzoo.index_videos(folder, added, device="cpu")
    assert lamzoo.index_videos(folder, multiplied, device="cpu").embedded == 5
    with pytest.raises(DataError, match="with masks of another LamConfig of lam_clip4clip_micro"):
        index(folder, multiplied, index=first.path)


def test_an_index_of_0_1_0_says_nothing_of_masks_and_is_read(folder: Path, model: Any) -> None:
    index(folder, model)
    with safe_open(file_of(folder), "pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - it is no dict
        metadata = file.metadata()
    facts = json.loads(metadata["lamzoo.video-index"])
    del facts["masks"]
    save_file(tensors, file_of(folder), metadata | {"lamzoo.video-index": json.dumps(facts)})
    assert index(folder, model).embedded == 0


def test_an_index_that_an_earlier_release_left_in_the_folder_is_taken_over(
    folder: Path, model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    old = folder / "lamzoo-index.lam_clip4clip_micro.safetensors"
    sampling = FrameSampling(fps=2.0, max_frames=3)
    made = index(folder, model, index=old, sampling=sampling)
    found = index(folder, model, index=None)
    assert (model.seen, found.embedded, found.path.parent != folder) == (0, 0, True)
    assert found.search(QUERIES[0]) == made.search(QUERIES[0])
    caplog.set_level("INFO", logger="lamzoo.video.search")
    old.write_bytes(b"damaged")
    assert index(folder, model, index=None).embedded == 0
    assert not caplog.records, "it is not read again"
    old.unlink()
    assert index(folder, model, index=None).embedded == 0
    index(folder, model, index=old, sampling=sampling)
    assert lamzoo.index_videos(folder, build(seed=1), device="cpu").embedded == 5, "never of other weights"


def test_an_index_that_cannot_be_written_is_found_out_before_the_work(folder: Path, model: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written"):
        index(folder, model, index=tmp_path / "file" / "index.safetensors")
    assert model.seen == 0


def test_a_name_that_is_no_utf8_is_kept(folder: Path, model: Any) -> None:
    name = os.fsdecode(b"caf\xe9.mp4")
    shutil.copy(folder / "coffee.mkv", folder / name)
    assert name in names(index(folder, model))
    assert name in names(load_index(file_of(folder), model))
    index(folder, model)
    assert model.seen == 0


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_an_embedding_that_is_not_finite_names_the_video(folder: Path, precision: Any) -> None:
    model = build("mean")
    with torch.no_grad():
        model.clip.visual.proj.fill_(torch.nan)
    with pytest.raises(ConfigError, match=rf"astronaut.mp4 is not finite in {precision}"):
        lamzoo.index_videos(folder, model, device="cpu", precision=precision)


def test_impossible_arguments_are_one_sentence(folder: Path, model: Any) -> None:
    found = index(folder, model)
    for query, top in ((" \n", 3), ("a cup", 0)):
        with pytest.raises(ConfigError):
            found.search(query, top)
    with pytest.raises(ConfigError, match="max_frames is 6"):
        index(folder, model, sampling=FrameSampling(max_frames=6), index=folder / "x.safetensors")
    with pytest.raises(ConfigError, match="max_frames is all"):
        index(folder, model, sampling=FrameSampling(max_frames=None), index=folder / "x.safetensors")
    with pytest.raises(ConfigError, match="on_bad_input"):
        index(folder, model, on_bad_input="ignore")
    with pytest.raises(ConfigError, match="batch size"):
        index(folder, model, batch_size=0)
    with pytest.raises(UnsupportedHostError, match="lam_clip4clip"):
        lamzoo.index_videos(folder, lamzoo.create_model("lam_vit_micro"))


def test_a_query_takes_milliseconds_among_ten_thousand_videos(tmp_path: Path) -> None:
    torch.manual_seed(0)
    paths = [tmp_path / f"{number}.mp4" for number in range(10_000)]
    embeddings = F.normalize(torch.randn(10_000, 512), dim=-1)
    model = build()
    found = VideoIndex(model, tmp_path / "index.safetensors", paths, [1.0] * 10_000, embeddings)
    text = torch.randn(1, 512)
    model.encode_text = lambda tokens: text
    expected = embeddings @ F.normalize(text[0], dim=0)
    seconds = []
    for _ in range(5):
        start = time.process_time()
        matches = found.search("a rocket", 10)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.05
    assert [match.path for match in matches] == [paths[i] for i in expected.topk(10).indices]


def test_the_contact_sheet_shows_the_best_matches_whatever_their_names(
    folder: Path, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    from lamzoo.report import contact_sheet

    monkeypatch.setattr(contact_sheet, "MAX_ROWS", 6)
    (folder / "rocket.mp4").rename(folder / os.fsdecode(b"caf\xe9 \n $_ \xff.mp4"))
    query = "$x_{$ 月 \n — \N{GRINNING FACE} שלום " + "and so on " * 60
    matches = index(folder, model).search(query)
    heights = []
    for count in (1, 5, 9):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            contact_sheet.write_contact_sheet(tmp_path / "sheet.png", query, (matches * 2)[:count])
        with Image.open(tmp_path / "sheet.png") as image:
            image.load()
            heights.append(image.height)
    row = heights[2] - heights[1]
    assert heights[1] - heights[0] == 4 * row, "nine matches make six rows"
    assert row > 144
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sheet.png", "videos"]


def test_a_contact_sheet_that_cannot_be_drawn_is_one_sentence(folder: Path, model: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from lamzoo.report.contact_sheet import write_contact_sheet

    matches = index(folder, model).search(QUERIES[0])
    (tmp_path / "folder.png").mkdir()
    for name, message in (
        ("sheet.jpg", r"end in \.png"),
        ("nowhere/sheet.png", "does not exist"),
        ("folder.png", "choose another name"),
    ):
        with pytest.raises(DataError, match=message):
            write_contact_sheet(tmp_path / name, "a cup", matches)
    with pytest.raises(ConfigError, match="one match"):
        write_contact_sheet(tmp_path / "sheet.png", "a cup", [])
    matches[1].path.write_bytes(b"")
    with pytest.raises(DataError, match="it is empty"):
        write_contact_sheet(tmp_path / "sheet.png", "a cup", matches)
    assert not (tmp_path / "sheet.png").exists()


def test_an_index_is_searched_in_clusters(folder: Path, model: Any) -> None:
    pytest.importorskip("faiss")
    exact = index(folder, model)
    near = index(folder, model, approximate=True)
    assert near.clusters is not None and exact.clusters is None and near.embedded == 0
    assert {path.name for path in folder.glob("index*")} == {"index.safetensors", "index.safetensors.clusters"}
    for query in QUERIES:
        pairs = zip(near.search(query), exact.search(query), strict=True)
        assert all(a.path == b.path and a.score == pytest.approx(b.score, abs=1e-5) for a, b in pairs)
    assert load_index(file_of(folder), model, approximate=True).clusters is not None
    with pytest.raises(ConfigError, match="compares each frame"):
        index(folder, build("tight"), approximate=True, force=True)


@pytest.mark.skipif(sys.platform == "win32", reason="files are not locked")
def test_a_second_run_on_the_same_index_is_refused_while_the_first_one_runs(folder: Path, model: Any) -> None:
    part = part_path(file_of(folder), 1)

    def again(done: int, total: int) -> None:
        part.write_bytes(b"of another process")
        for force in (False, True):
            with pytest.raises(DataError, match="index.safetensors is in use by another run; wait"):
                lamzoo.index_videos(folder, model, index=file_of(folder), device="cpu", force=force)
        assert part.exists()
        part.unlink()

    assert index(folder, model, progress=again).embedded == 5
    assert {path.name for path in folder.glob("index*")} == {"index.safetensors"}


def test_a_part_of_other_weights_is_named(folder: Path, model: Any) -> None:
    other = index(folder, build(seed=1), index=folder / "other.safetensors")
    other.path.rename(part_path(file_of(folder), 1))
    with pytest.raises(DataError, match=r"the index .*index.safetensors.part1 was built with other weights"):
        index(folder, model)
    assert index(folder, model, force=True).embedded == 5
