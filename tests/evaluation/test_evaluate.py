import json
import os
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import timm
import timm.data
import torch
from timm.utils import accuracy
from torch import nn

from lamzoo.data import create_dataset, relabel
from lamzoo.errors import ConfigError, DataError, UnsupportedHostError
from lamzoo.evaluation import EvalProgress, evaluate, label_names
from lamzoo.registry.factory import create_model
from tests.images import CLASSES, encoded, write_folder, write_npz


class Killed(Exception):
    pass


def small(num_classes: int = 3) -> nn.Module:
    return create_model("lam_vit_micro", num_classes=num_classes)


class Reads(nn.Module):
    """Scores the classes by how near an image's mean is to each class colour: right by construction."""

    def __init__(self, label_names: list[str] | None = None) -> None:
        super().__init__()
        self.num_classes = 3
        self.pretrained_cfg = {"input_size": (3, 32, 32), "mean": (0, 0, 0), "std": (1, 1, 1), "crop_pct": 1.0}
        self.pretrained_cfg["label_names"] = label_names
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * x.mean(dim=(2, 3)).flip(1)  # classes are blue, green, red


@pytest.fixture
def data(tmp_path: Path):
    return create_dataset(str(write_npz(tmp_path / "data", each=7)), "test")


def test_a_classifier_that_is_right_scores_100_and_counts_every_image(data) -> None:
    result = evaluate(Reads(), data, batch_size=4)
    assert (result.top1, result.samples) == (100.0, 21)
    assert result.images_per_s > 0


def test_the_score_is_timms(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "pictures", splits=(), each=7)
    model = small(10).eval()
    config = timm.data.resolve_model_data_config(model)
    theirs = timm.data.create_dataset("", root=str(root))
    loader = timm.data.create_loader(theirs, batch_size=21, use_prefetcher=False, num_workers=0, **config)
    ((images, labels),) = list(loader)
    with torch.inference_mode():
        expected = accuracy(model(images), labels, topk=(1, 5))
    ours = create_dataset(str(root), "all")
    ours.classes = None  # ten outputs for three classes
    result = evaluate(model, ours, batch_size=8)
    assert [result.top1, result.top5] == pytest.approx([float(value) for value in expected], abs=1e-4)


def test_top5_is_none_below_five_classes(data) -> None:
    assert evaluate(Reads(), data).top5 is None


@pytest.mark.parametrize("each_batch_saved", [True, False])
def test_a_killed_evaluation_goes_on_to_exactly_the_same_score(data, tmp_path: Path, each_batch_saved: bool) -> None:
    model, state = small(), tmp_path / "state.json"
    whole = evaluate(model, data, batch_size=4, precision="bfloat16")

    def kill(progress: EvalProgress) -> None:
        if progress.seen >= 12:
            raise Killed

    arguments = {"batch_size": 4, "precision": "bfloat16", "state": state, "save_every": 1 if each_batch_saved else 2}
    with pytest.raises(Killed):
        evaluate(model, data, progress=kill, **arguments)
    partial = json.loads(state.read_text())["partial"]
    assert partial["seen"] == (12 if each_batch_saved else 8)
    seen: list[int] = []
    resumed = evaluate(model, data, resume=True, progress=lambda progress: seen.append(progress.seen), **arguments)
    assert seen[0] == partial["seen"] + 4
    assert (resumed.top1, resumed.top5, resumed.samples) == (whole.top1, whole.top5, 21)
    assert not state.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]  # no temporary file is left


def test_a_state_of_another_run_is_refused_and_left_alone(data, tmp_path: Path) -> None:
    model, state = Reads(), tmp_path / "state.json"

    def kill(progress: EvalProgress) -> None:
        raise Killed

    with pytest.raises(Killed):
        evaluate(model, data, batch_size=4, state=state, save_every=1, progress=kill)
    before = state.read_bytes()
    with pytest.raises(DataError, match="batch size was 4, now 5"):
        evaluate(model, data, batch_size=5, state=state, resume=True)
    model.scale.data *= 2
    with pytest.raises(DataError, match="sha256 of the weights"):
        evaluate(model, data, batch_size=4, state=state, resume=True)
    model.scale.data /= 2
    relabelled = write_npz(tmp_path / "data", each=7, labels=np.arange(21, dtype=np.int16) % 3)
    with pytest.raises(DataError, match="fingerprint of the images"):
        evaluate(model, create_dataset(str(relabelled), "test"), batch_size=4, state=state, resume=True)
    assert state.read_bytes() == before
    assert evaluate(model, data, batch_size=5, state=state).samples == 21  # without resume it starts over


@pytest.mark.parametrize(
    "text",
    [
        "# Notes\n", "{}", "[1, 2]", "[" * 100_000, '{"kind": "lamzoo evaluation", "key": {}, "partial": {"a": 1}}',
        '{"kind": "lamzoo evaluation", "key": {}, "partial": {"seen": "20"}}',
        '{"kind": "lamzoo evaluation", "key": {}, "partial": {"seen": 20, "correct1": 21}}',
    ],
)  # fmt: skip
def test_a_file_that_is_no_state_is_never_overwritten(data, tmp_path: Path, text: str) -> None:
    state = tmp_path / "notes.md"
    state.write_text(text)
    with pytest.raises(DataError, match="is not an evaluation state"):
        evaluate(Reads(), data, state=state)
    assert state.read_text() == text


def test_a_state_that_cannot_be_written_is_refused_in_advance_and_costs_no_score_later(
    data, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(DataError, match="state /dev/null/state.json can't be written"):
        evaluate(Reads(), data, state="/dev/null/state.json")
    folder = tmp_path / "states"

    def lose_the_folder(progress: EvalProgress) -> None:
        if not folder.is_file():
            shutil.rmtree(folder, ignore_errors=True)
            folder.write_text("a file")

    result = evaluate(Reads(), data, batch_size=4, state=folder / "state.json", save_every=2, progress=lose_the_folder)
    assert result.samples == 21
    assert caplog.text.count("can't be resumed from here") == 1


def test_two_evaluations_do_not_share_a_state(data, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state, inner = tmp_path / "state.json", []

    def begin_another(progress: EvalProgress) -> None:
        if not inner:
            with pytest.raises(DataError, match="in use by another evaluation; wait"):
                evaluate(Reads(), data, state=state, resume=True)
            inner.append(evaluate(Reads(), data, batch_size=21, state=state, save_every=1))
            assert "can't be resumed" in caplog.text
            assert json.loads(state.read_text())["key"]["batch size"] == 4
        elif progress.seen > 8:
            raise Killed

    arguments = {"batch_size": 4, "state": state, "save_every": 1}
    with pytest.raises(Killed):
        evaluate(Reads(), data, progress=begin_another, **arguments)
    assert evaluate(Reads(), data, resume=True, **arguments).top1 == inner[0].top1


def test_a_limit_spreads_over_the_classes(data) -> None:
    seen: list[EvalProgress] = []
    result = evaluate(Reads(), data, limit=6, batch_size=4, progress=seen.append)
    assert result.samples == 6
    assert [progress.seen for progress in seen] == [4, 6]
    assert {progress.total for progress in seen} == {6}
    assert evaluate(Reads(), data, limit=100).samples == 21


def test_workers_do_not_change_the_score(data) -> None:
    model = small()
    assert evaluate(model, data, workers=1, batch_size=8).top1 == evaluate(model, data, batch_size=8).top1


def test_the_model_keeps_its_mode_and_the_data_its_transform(data) -> None:
    model = small().train()
    model.blocks[0].eval()
    evaluate(model, data, limit=2)
    assert model.training
    assert not model.blocks[0].training
    assert data.transform is None


def test_class_names_are_compared_in_one_spelling(data) -> None:
    written = ["Café", "green", "zoo"]
    stored = [unicodedata.normalize("NFD", name) for name in written]
    data.classes = written
    assert evaluate(Reads(stored), data, limit=3).samples == 3
    with pytest.raises(DataError, match="another order"):
        evaluate(Reads(stored[::-1]), data)


def test_classes_that_do_not_fit_are_refused(data) -> None:
    with pytest.raises(DataError, match="has 3 classes and the model 10"):
        evaluate(small(10), data)
    with pytest.raises(DataError, match="another order"):
        evaluate(Reads(CLASSES[::-1]), data)
    data.classes = None
    with pytest.raises(DataError, match="label 2 and the model has 2 classes"):
        evaluate(small(2), data)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch size is 0"),
        ({"workers": -1}, "workers is -1"),
        ({"precision": "int4"}, "precision is 'int4'"),
        ({"limit": 0}, "limit is 0"),
        ({"save_every": 0}, "save_every is 0"),
        ({"device": "tpu9"}, "no device 'tpu9'"),
        ({"device": "meta"}, "computes nothing"),
        ({"device": "cuda:99"}, "no device 'cuda:99'"),
    ],
)
def test_impossible_arguments_are_named(data, arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate(Reads(), data, **arguments)


def test_a_model_without_classes_or_of_five_channels_is_refused(data) -> None:
    with pytest.raises(UnsupportedHostError, match="no classes"):
        evaluate(small(0), data)
    with pytest.raises(UnsupportedHostError, match="5 channels"):
        evaluate(create_model("lam_vit_micro", in_chans=5, num_classes=3), data)


def test_outputs_that_are_not_finite_are_no_score(data) -> None:
    model = Reads()
    model.scale.data.fill_(float("nan"))
    with pytest.raises(ConfigError, match="not finite"):
        evaluate(model, data)


def test_a_broken_image_ends_the_evaluation(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "pictures", splits=("test",))
    (root / "test" / "red" / "1.jpg").write_text("nothing")
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"1\.jpg: it is not an image") as caught:
            evaluate(Reads(), create_dataset(str(root), "test"), workers=workers)
        assert "\n" not in str(caught.value)


@pytest.fixture
def damaged(tmp_path: Path):
    """Two of nine images are broken: one of the first batch of four, one of the second."""
    root = write_folder(tmp_path / "pictures", splits=("test",))
    (root / "test" / "blue" / "1.jpg").write_text("nothing")
    (root / "test" / "green" / "2.jpg").write_bytes(b"")
    return create_dataset(str(root), "test")


@pytest.mark.parametrize("workers", [0, 1])
def test_skip_leaves_broken_images_out_and_names_them(damaged, caplog: pytest.LogCaptureFixture, workers: int) -> None:
    result = evaluate(Reads(), damaged, batch_size=4, workers=workers, on_bad_input="skip")
    assert (result.top1, result.samples, result.skipped) == (100.0, 7, 2)
    assert [(image.index, Path(image.filename).parent.name) for image in result.bad_images] == [
        (1, "blue"),
        (5, "green"),
    ]
    assert "1.jpg: it is not an image" in caplog.text
    with pytest.raises(ConfigError, match="on_bad_input is 'ignore'"):
        evaluate(Reads(), damaged, on_bad_input="ignore")


def test_skipped_images_survive_a_resumption(damaged, tmp_path: Path) -> None:
    def kill(progress: EvalProgress) -> None:
        raise Killed

    arguments = {"batch_size": 4, "state": tmp_path / "state.json", "save_every": 1, "on_bad_input": "skip"}
    with pytest.raises(Killed):
        evaluate(Reads(), damaged, progress=kill, **arguments)
    result = evaluate(Reads(), damaged, resume=True, **arguments)
    assert (result.top1, result.samples, [image.index for image in result.bad_images]) == (100.0, 7, [1, 5])


def test_missing_images_stop_an_evaluation_before_it_starts_or_are_counted(damaged, tmp_path: Path) -> None:
    folder = tmp_path / "pictures" / "test"
    (folder / "blue" / "0.jpg").unlink()
    (folder / "blue" / "0.jpg").symlink_to("/nowhere")
    dataset = create_dataset(str(tmp_path / "pictures"), "test")
    with pytest.raises(DataError, match=r"1 of the 9 images .*0\.jpg \(it is a link that leads nowhere\); replace"):
        evaluate(Reads(), dataset)
    result = evaluate(Reads(), dataset, on_bad_input="skip")
    assert (result.top1, result.samples, result.skipped) == (100.0, 6, 3)
    assert [image.index for image in result.bad_images] == [0, 1, 5]


def test_a_score_of_no_image_is_none(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "pictures", splits=("test",))
    for path in root.rglob("*.jpg"):
        path.write_text("nothing")
    with pytest.raises(DataError, match="none of the 9 images"):
        evaluate(Reads(), create_dataset(str(root), "test"), on_bad_input="skip")


def test_a_part_of_the_classes_is_scored_by_a_class_map(data) -> None:
    names = ["violet", *CLASSES, "yellow"]
    with pytest.raises(DataError, match="a class map assigns them"):
        evaluate(small(5), data)

    class Shifted(Reads):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.pad(super().forward(x), (1, 1), value=-9.0)

    model = Shifted(names)
    model.num_classes = 5
    assert label_names(model) == names
    result = evaluate(model, relabel(data, label_names(model)))
    assert (result.top1, result.top5) == (100.0, 100.0)


def test_the_classes_are_those_of_the_weights_or_imagenets() -> None:
    assert label_names(timm.create_model("vit_tiny_patch16_224"))[:2] == ["n01440764", "n01443537"]
    with pytest.raises(DataError, match="the model's 7 classes are unknown"):
        label_names(small(7))


@pytest.fixture
def imagenet(tmp_path: Path):
    """Three classes, four images of each, named as ImageNet's validation images are."""
    numbers = iter(range(1, 13))
    for label, wnid in enumerate(("n01440764", "n01443537", "n01484850")):
        (tmp_path / "val" / wnid).mkdir(parents=True)
        for number in range(4):
            name = f"ILSVRC2012_val_{next(numbers):08}.JPEG"
            (tmp_path / "val" / wnid / name).write_bytes(encoded(label, number))
    return create_dataset(f"imagefolder:{tmp_path / 'val'}", "all")


def test_real_labels_score_as_timms_evaluator_does(imagenet, tmp_path: Path) -> None:
    from timm.data import RealLabelsImagenet

    labels = [[0], [1], [], [0, 2], [1], [0], [2, 1], [], [2], [2], [0], [1]]
    (tmp_path / "real.json").write_text(json.dumps(labels))
    result = evaluate(Reads(), imagenet, batch_size=5, real_labels=tmp_path / "real.json")
    names = [imagenet.filename(index) for index in range(len(imagenet))]
    timms = RealLabelsImagenet(names, tmp_path / "real.json", topk=(1,))
    timms.add_result(torch.eye(3).repeat_interleave(4, dim=0))  # Reads is right about the colours
    assert result.top1 == 100.0
    assert result.real_top1 == pytest.approx(timms.get_accuracy(1)) == 60.0
    assert (result.real_samples, result.real_top5) == (10, None)


def test_timms_copy_of_the_real_labels_needs_no_file(imagenet) -> None:
    model = small(1000)
    result = evaluate(model, relabel(imagenet, list(timm.data.ImageNetInfo().label_names())), real_labels="timm")
    assert 0 < result.real_samples <= 12
    assert result.real_top5 is not None


def test_real_labels_of_other_images_or_models_are_refused(data, imagenet, tmp_path: Path) -> None:
    path = tmp_path / "real.json"
    path.write_text("[[0], [1]]")
    with pytest.raises(DataError, match=r"test\.npz\[0\] is not one of the 2 images"):
        evaluate(Reads(), data, real_labels=path)
    with pytest.raises(DataError, match=r"00000003\.JPEG is not one of the 2 images"):
        evaluate(Reads(), imagenet, real_labels=path)
    path.write_text("[[0], [999]]")
    with pytest.raises(DataError, match="up to 999 and the model has 3 classes"):
        evaluate(Reads(), data, real_labels=path)
    for text in ("{}", "[]", "[0, 1]", "no JSON"):
        path.write_text(text)
        with pytest.raises(DataError, match=r"real\.json"):
            evaluate(Reads(), data, real_labels=path)


@pytest.mark.gpu
def test_a_gpu_skips_as_the_cpu_does(damaged) -> None:
    result = evaluate(Reads(), damaged, batch_size=4, device="cuda", on_bad_input="skip")
    assert (result.top1, result.samples, result.skipped) == (100.0, 7, 2)


@pytest.mark.gpu
def test_a_gpu_scores_as_the_cpu_does(data) -> None:
    model = small()
    cpu = evaluate(model, data, device="cpu")
    gpu = evaluate(model, data, device="cuda", batch_size=4)
    assert abs(cpu.top1 - gpu.top1) <= 100 / 21


def test_class_names_that_are_not_utf8_are_scored(tmp_path: Path) -> None:
    write_folder(tmp_path / "data", ("test",))
    odd = os.fsdecode(b"caf\xe9")
    (tmp_path / "data" / "test" / CLASSES[0]).rename(tmp_path / "data" / "test" / odd)
    dataset = create_dataset(f"imagefolder:{tmp_path / 'data'}", split="test")
    assert dataset.classes is not None
    assert odd in dataset.classes
    assert evaluate(small(), dataset, device="cpu", state=tmp_path / "state").samples == len(dataset)
