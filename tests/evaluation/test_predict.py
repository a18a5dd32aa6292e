from pathlib import Path

import pytest
import timm
from PIL import Image
from torch import nn

from lamzoo.errors import ConfigError, DataError
from lamzoo.evaluation import class_names, predict, preprocess
from lamzoo.registry.factory import create_model
from tests.images import image, sideways


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return create_model("lam_vit_micro", num_classes=3)


def test_guesses_are_sorted_and_sum_to_one(model: nn.Module) -> None:
    (guesses,) = predict(model, [image(0, 0)], topk=5)
    assert [guess.index for guess in guesses] != [0, 0, 0]
    assert sorted(guess.index for guess in guesses) == [0, 1, 2]
    probabilities = [guess.probability for guess in guesses]
    assert probabilities == sorted(probabilities, reverse=True)
    assert sum(probabilities) == pytest.approx(1, abs=1e-5)


def test_batches_and_paths_change_nothing(model: nn.Module, tmp_path: Path) -> None:
    images = [image(label, label, size=40) for label in range(3)]
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for path, picture in zip(paths, images, strict=True):
        picture.save(path)
    together = predict(model, images, topk=1)
    apart = predict(model, paths, topk=1, batch_size=2)
    assert [guess.index for (guess,) in together] == [guess.index for (guess,) in apart]
    for (one,), (other,) in zip(together, apart, strict=True):
        assert one.probability == pytest.approx(other.probability, abs=1e-5)


def test_images_are_preprocessed_upright_from_files_and_from_memory(model: nn.Module, tmp_path: Path) -> None:
    inputs = []
    for orientation in (1, 6):
        (tmp_path / "a.jpg").write_bytes(sideways(orientation))
        with Image.open(tmp_path / "a.jpg") as opened:
            inputs += [preprocess(model, [tmp_path / "a.jpg"]), preprocess(model, [opened])]
    assert all((images - inputs[0]).abs().max() < 0.1 for images in inputs)  # JPEG is lossy


def test_names_come_from_the_weights_else_from_imagenet(model: nn.Module) -> None:
    assert class_names(model, 3) == ["class 0", "class 1", "class 2"]
    model.pretrained_cfg["label_names"] = ["a", "b", "c"]
    assert class_names(model, 3) == ["a", "b", "c"]
    assert class_names(model, 4) == ["class 0", "class 1", "class 2", "class 3"]
    names = class_names(timm.create_model("test_vit"), 1000)
    assert len(names) == 1000
    assert names[281].startswith("tabby")


def test_impossible_arguments_and_broken_images_are_named(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="topk is 0"):
        predict(model, [image(0, 0)], topk=0)
    (tmp_path / "a.jpg").write_text("text")
    with pytest.raises(DataError, match=r"a\.jpg"):
        predict(model, [tmp_path / "a.jpg"])
    assert predict(model, []) == []
