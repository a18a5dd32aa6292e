"""Models of grey and RGBA images: every command reads what they take."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import timm.data
import torch
from PIL import Image
from torch import nn

import lamzoo
from lamzoo.data import LabelledImages, create_dataset, relabel, select
from lamzoo.errors import RecipeError, UnsupportedHostError
from lamzoo.evaluation import evaluate, predict, preprocess
from lamzoo.report.model_view import view
from lamzoo.training import complete_recipe, parse_recipe, train

MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def small(in_chans: int) -> Any:
    torch.manual_seed(0)
    return lamzoo.create_model("lam_vit_micro", in_chans=in_chans, embed_dim=16, depth=1, num_classes=2)


def pixels(in_chans: int, index: int) -> np.ndarray:
    values = np.random.default_rng(index).integers(0, 256, (32, 32, in_chans), np.uint8)
    return values[..., 0] if in_chans == 1 else values


@pytest.fixture(params=[1, 4])
def in_chans(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture
def data(tmp_path: Path, in_chans: int) -> Path:
    """Grey or RGBA noise, 8 images to train on and 4 to test, of two classes."""
    for index in range(12):
        folder = tmp_path / "data" / ("train" if index < 8 else "test") / ("a", "b")[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(in_chans, index)).save(folder / f"{index}.png")
    return tmp_path / "data"


def test_the_input_is_the_image_as_it_is_stored(data: Path, in_chans: int) -> None:
    model = small(in_chans)
    images = preprocess(model, [data / "test" / "a" / "8.png"])
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(-1, 1, 1) for key in ("mean", "std"))
    expected = torch.tensor(pixels(in_chans, 8)).view(32, 32, in_chans).permute(2, 0, 1) / 255
    torch.testing.assert_close(images[0], (expected - mean) / std)


def test_eval_and_predict_agree(data: Path, in_chans: int) -> None:
    model, dataset = small(in_chans), create_dataset(str(data), "test")
    paths = [Path(dataset.filename(index)) for index in range(4)]
    guesses = [guess.index for (guess,) in predict(model, paths, topk=1)]
    share = 25 * sum(guess == label for guess, label in zip(guesses, dataset.labels(), strict=True))
    assert evaluate(model, dataset).top1 == share
    assert dataset.mode == "RGB"  # the caller's data set is left as it was


@pytest.mark.parametrize("in_chans", [1], indirect=True)
def test_exported_programs_read_grey_images(data: Path, tmp_path: Path) -> None:
    model = small(1)
    paths = sorted((data / "test").rglob("*.png"))
    lamzoo.export_model(model, tmp_path / "a.pt2", images=preprocess(model, paths))
    program = lamzoo.load_exported(tmp_path / "a.pt2")
    expected = [guess.index for (guess,) in predict(model, paths, topk=1)]
    assert [guess.index for (guess,) in predict(program, paths, topk=1)] == expected


def test_broken_images_are_skipped(data: Path, in_chans: int) -> None:
    (data / "test" / "a" / "8.png").write_bytes(b"no image")
    result = evaluate(small(in_chans), create_dataset(str(data), "test"), on_bad_input="skip")
    assert (result.samples, result.skipped) == (3, 1)


def test_masks_are_drawn_over_the_image(data: Path, in_chans: int) -> None:
    shown = view(small(in_chans), data / "test" / "a" / "8.png")
    assert shown.images.shape == (1, in_chans, 32, 32)
    assert shown.sharp.shape[2] == 3
    colours = np.broadcast_to(pixels(in_chans, 8).reshape(32, 32, in_chans), (32, 32, 4 if in_chans == 4 else 3))
    np.testing.assert_allclose(shown.seen, colours[..., :3] / 255, atol=1e-6)


def test_train_reads_them_and_leaves_a_model_that_does(data: Path, in_chans: int, tmp_path: Path) -> None:
    table = {
        "model": {"name": "lam_vit_micro", "kwargs": {"in_chans": in_chans, "embed_dim": 16, "depth": 1}},
        "data": {"source": str(data), "eval_split": "test", "workers": 0},
        "schedule": {"epochs": 1, "warmup_epochs": 0},
        "run": {"output": str(tmp_path / "run"), "batch_size": 4, "device": "cpu", "report": False},
    }
    result = train(complete_recipe(table))
    model: Any = lamzoo.create_model(f"local-dir:{result.model}", pretrained=True)
    assert len(model.pretrained_cfg["mean"]) == in_chans
    assert evaluate(model, create_dataset(str(data), "test")).top1 == result.scores["test"].top1


def test_policies_that_cannot_change_rgba_are_refused(data: Path, in_chans: int, tmp_path: Path) -> None:
    table: dict[str, Any] = {
        "model": {"name": "lam_vit_micro", "kwargs": {"in_chans": in_chans, "embed_dim": 16, "depth": 1}},
        "data": {"source": str(data), "eval_split": "test"},
        "augment": {"auto_augment": "rand-m6-n2"},
        "optimizer": {"lr": 1e-3},
        "schedule": {"epochs": 1, "warmup_epochs": 0},
        "run": {"output": str(tmp_path / "run"), "batch_size": 4, "device": "cpu", "report": False},
    }
    if in_chans == 4:
        with pytest.raises(RecipeError, match="do not support 4 channels; set it to ''"):
            train(parse_recipe(table))
        table["augment"]["auto_augment"] = ""
    assert len(train(parse_recipe(table)).history) == 1


@pytest.mark.parametrize("build", [small, lambda in_chans: timm.create_model("test_vit", in_chans=in_chans)])
def test_mean_and_deviation_are_as_long_as_the_channels(build: Any, in_chans: int) -> None:
    model: nn.Module = build(in_chans)
    image = Image.new("RGB", (64, 64), (255, 0, 0))
    assert preprocess(model, [image]).shape[1] == in_chans
    if build is small:  # and timm's own code finds them
        config = timm.data.resolve_model_data_config(model)
        assert (config["input_size"][0], len(config["mean"]), len(config["std"])) == (in_chans,) * 3
        assert timm.data.create_transform(**config)(image.convert(MODES[in_chans])).shape[0] == in_chans


def test_a_folder_whose_record_is_of_other_channels_is_read(in_chans: int, tmp_path: Path) -> None:
    lamzoo.save_pretrained(small(in_chans), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["pretrained_cfg"] |= {"input_size": [3, 32, 32], "mean": [0.1, 0.2, 0.3], "std": [0.5] * 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model: Any = lamzoo.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert model.pretrained_cfg["mean"] == pytest.approx([0.2] * in_chans)
    assert model.pretrained_cfg["std"] == pytest.approx([0.5] * in_chans)


def test_parts_of_a_data_set_keep_its_mode(data: Path) -> None:
    dataset: LabelledImages = create_dataset(str(data), "train")
    dataset.mode = "L"
    for part in (select(dataset, [1]), relabel(dataset, ["b", "a"])):
        assert part[0][0].mode == "L"


def test_channels_that_pillow_has_no_mode_for_are_refused() -> None:
    with pytest.raises(UnsupportedHostError, match=r"5 channels, but images have 1 \(grey\), 3 \(RGB\) or 4"):
        preprocess(small(5), [Image.new("RGB", (32, 32))])
