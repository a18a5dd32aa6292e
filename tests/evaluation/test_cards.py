"""The scores on the cards, measured again where the data is at hand."""

from pathlib import Path

import pytest

from lamzoo.data import create_dataset
from lamzoo.data.captions import create_caption_dataset
from lamzoo.data.moments import create_moment_dataset
from lamzoo.data.retrieval import create_retrieval_dataset
from lamzoo.evaluation import evaluate, evaluate_moments
from lamzoo.evaluation.captions.evaluate import evaluate_captions
from lamzoo.evaluation.retrieval.evaluate import evaluate_retrieval
from lamzoo.evaluation.retrieval.metrics import WAYS
from lamzoo.registry.catalog import list_models, model_info
from lamzoo.registry.factory import create_model

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
SPLITS = {"cifar10": "test", "tinyimagenet100": "val"}  # of what is bundled, by how its tag begins
VIDEOS = {"grid": "grid:{data}/grid_s1:motion"}
SPEECH = {"captions": "grid:{data}/grid_s1:mouth+audio", "moments": "grid:{data}/grid_s1"}


def scored_names(metric: str) -> list[str]:
    """Every ``arch.tag`` with a bundled file and this metric."""
    tags = {name: model_info(name).tag for name in list_models(pretrained=True)}
    return [name for name, tag in tags.items() if tag is not None and tag.file is not None and metric in tag.metrics]


def test_there_are_scores_to_measure_again() -> None:
    images, videos = (
        {name.rpartition(".")[2].partition("_")[0] for name in scored_names(metric)} for metric in ("top1", "t2v_R1")
    )
    assert (images, videos) == (set(SPLITS), set(VIDEOS))


@pytest.mark.slow
@pytest.mark.parametrize("name", scored_names("t2v_R1"))
def test_the_cards_ranks_are_measured_again(name: str) -> None:
    tag = model_info(name).tag
    assert f"--data {VIDEOS[tag.name].format(data='../shared/data')} --split test" in tag.metrics["command"]
    if not DATA.is_dir():
        pytest.skip(f"{DATA} is not here")
    dataset = create_retrieval_dataset(VIDEOS[tag.name].format(data=DATA), "test")
    result = evaluate_retrieval(create_model(name, pretrained=True), dataset)
    for way in WAYS:
        for key in ("R1", "R5", "R10", "MedianR"):
            assert result.metrics[way][key] == pytest.approx(tag.metrics[f"{way}_{key}"], abs=0.5)  # one clip of 200


@pytest.mark.slow
@pytest.mark.parametrize("name", [*scored_names("WER"), *scored_names("R1_07")])
def test_the_cards_words_and_moments_are_measured_again(name: str) -> None:
    tag = model_info(name).tag
    task = "captions" if "WER" in tag.metrics else "moments"
    source = SPEECH[task]
    assert f"--task {task} --data {source.format(data='../shared/data')} --split test" in tag.metrics["command"]
    if not DATA.is_dir():
        pytest.skip(f"{DATA} is not here")
    model, data = create_model(name, pretrained=True), source.format(data=DATA)
    if task == "captions":
        metrics = evaluate_captions(model, create_caption_dataset(data, "test")).metrics
        for key, tolerance in {"WER": 0.1, "sentence_accuracy": 0.5, "CIDEr": 0.05}.items():  # a word, a clip
            assert metrics[key] == pytest.approx(tag.metrics[key], abs=tolerance)
        return
    brief = evaluate_moments(model, create_moment_dataset(data, "test")).metrics["brief"]
    for key in ("R1@0.5", "R1@0.7"):  # two queries of 769
        assert brief[f"MR-full-{key}"] == pytest.approx(tag.metrics[key.replace("@0.", "_0")], abs=0.27)


@pytest.mark.slow
@pytest.mark.parametrize("name", scored_names("top1"))
def test_the_cards_accuracy_is_measured_again(name: str) -> None:
    tag = model_info(name).tag
    data = tag.name.partition("_")[0]
    folder, split = DATA / data, SPLITS[data]
    assert f"--data npz:../shared/data/{data} --split {split}" in tag.metrics["command"]
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here")
    result = evaluate(
        create_model(name, pretrained=True), create_dataset(f"npz:{folder}", split), batch_size=250, workers=1
    )
    assert result.top1 == pytest.approx(tag.metrics["top1"], abs=0.05)
    assert result.top5 == pytest.approx(tag.metrics["top5"], abs=0.05)
