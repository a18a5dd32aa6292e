"""The accuracies on the cards, measured again where the data is at hand."""

from pathlib import Path

import pytest

from lamzoo.data import create_dataset
from lamzoo.evaluation import evaluate
from lamzoo.names import list_models, model_info
from lamzoo.registry import create_model

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
SPLITS = {"cifar10": "test", "tinyimagenet100": "val"}  # of what is bundled, by tag


def scored_names() -> list[str]:
    """Every ``arch.tag`` with a bundled file and a top-1."""
    tags = {name: model_info(name).tag for name in list_models(pretrained=True)}
    return [name for name, tag in tags.items() if tag is not None and tag.file is not None and "top1" in tag.metrics]


def test_there_are_scores_to_measure_again() -> None:
    assert {name.rpartition(".")[2] for name in scored_names()} == set(SPLITS)


@pytest.mark.slow
@pytest.mark.parametrize("name", scored_names())
def test_the_cards_accuracy_is_measured_again(name: str) -> None:
    tag = model_info(name).tag
    folder, split = DATA / tag.name, SPLITS[tag.name]
    assert f"--data npz:../shared/data/{tag.name} --split {split}" in tag.metrics["command"]
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here")
    result = evaluate(
        create_model(name, pretrained=True), create_dataset(f"npz:{folder}", split), batch_size=250, workers=1
    )
    assert result.top1 == pytest.approx(tag.metrics["top1"], abs=0.05)
    assert result.top5 == pytest.approx(tag.metrics["top5"], abs=0.05)
