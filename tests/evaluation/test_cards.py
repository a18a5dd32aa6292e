"""The accuracies on the cards, measured again where the data is at hand."""

from pathlib import Path

import pytest

from lamzoo.data import create_dataset
from lamzoo.evaluation import evaluate
from lamzoo.names import list_models, model_info
from lamzoo.registry import create_model

ROOT = Path(__file__).resolve().parents[2]
CIFAR10 = "../shared/data/cifar10"


def scored_tags() -> list[str]:
    """Every ``arch.tag`` with a bundled file and a top-1 on the data in ``../shared/data/cifar10``."""
    names = []
    for name in list_models(pretrained=True):
        tag = model_info(name).tag
        if (
            tag is not None
            and tag.file is not None
            and "top1" in tag.metrics
            and CIFAR10 in tag.metrics.get("command", "")
        ):
            names.append(name)
    return names


@pytest.mark.slow
@pytest.mark.parametrize("name", scored_tags())
def test_the_cards_accuracy_is_measured_again(name: str) -> None:
    folder = ROOT / CIFAR10
    if not folder.is_dir():
        pytest.skip(f"{CIFAR10} is not here")
    metrics = model_info(name).tag.metrics
    result = evaluate(
        create_model(name, pretrained=True), create_dataset(f"npz:{folder}", "test"), batch_size=250, workers=1
    )
    assert result.samples == 10_000
    assert result.top1 == pytest.approx(metrics["top1"], abs=0.05)
    if "top5" in metrics:
        assert result.top5 == pytest.approx(metrics["top5"], abs=0.05)
