"""Training of description: batches and losses, the curve of a run however it is cut, and what is refused."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import lamzoo
from lamzoo.data.captions import create_caption_dataset
from lamzoo.errors import LamzooError, UnsupportedHostError
from lamzoo.evaluation.captions.evaluate import caption_scores, describe_clips, evaluate_captions
from lamzoo.models.describer.generation import GenerationConfig
from lamzoo.training import TrainResult, load_recipe, parse_recipe, train
from lamzoo.training.captions.batches import Collate, Samples, caption_losses
from lamzoo.training.captions.recipe import CaptionWeights
from lamzoo.training.captions.run import CaptionRun
from tests.byte_pairs import write_byte_pairs
from tests.speech import ALL, write_speech
from tests.training.processes import train_in_two, train_killed

SMALL = {
    "width": 32, "heads": 2, "hidden": 64, "encoder_layers": 2, "text_layers": 1, "decoder_layers": 1,
    "vocabulary": ALL, "context_length": 5, "dropout": 0.0, "input_dropout": 0.0,
}  # fmt: skip
RECIPES = Path(__file__).resolve().parents[2] / "benchmarks" / "recipes"
HELD_BY_RECIPE = ("epoch", "update", "lr", "train_loss", "eval_WER", "eval_CIDEr")


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_speech(tmp_path_factory.mktemp("speech"))


@pytest.fixture
def table(speech: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "task": "captions",
        "model": {"name": "lam_describer_micro", "lam": {"rank": 2}, "kwargs": dict(SMALL)},
        "data": {"source": f"grid:{speech}:audio", "test_split": "test"},
        "augment": {"splice": 0.5},
        "optimizer": {"lr": 1e-3},
        "schedule": {"epochs": 2, "warmup_epochs": 0},
        "run": {"output": str(tmp_path / "out"), "batch_size": 8, "device": "cpu", "report": False},
    }


def run(table: dict[str, Any], output: Path, **changes: Any) -> TrainResult:
    return train(parse_recipe({**table, "run": {**table["run"], "output": str(output), **changes}}))


def curve(history: list[dict[str, float]]) -> torch.Tensor:
    return torch.tensor([[float(record[key]) for key in HELD_BY_RECIPE] for record in history])


def model(**options: Any) -> Any:
    torch.manual_seed(0)
    features = {"mouth": 384, "audio": 128}
    return lamzoo.create_model("describer_micro", **{**SMALL, "features": features, **options}).eval()


def test_a_batch_says_what_is_said_at_each_token(speech: Path) -> None:
    dataset, described = create_caption_dataset(f"grid:{speech}", "train"), model()
    samples = Samples(dataset)
    batch = Collate(described)([samples[0], samples[5]])
    assert described.tokenizer.decode(batch["text"][0].tolist()) == dataset.items[0].captions[0]
    for name, said in batch["words"].items():
        stream = batch["streams"][name]
        assert said.shape == stream.mask.shape
        for word, start, end in dataset.items[0].words:
            inside = (stream.times[0] >= start) & (stream.times[0] < end)
            assert inside.any()
            assert (said[0][inside] == described.tokenizer([word])[0, 1]).all()
        assert (said[0] == 0).any()
    assert "words" not in Collate(model(align=False))([samples[0]])


def test_a_missing_modality_is_padding(speech: Path) -> None:
    samples = Samples(create_caption_dataset(f"grid:{speech}", "train"))
    first, second = samples[0], samples[1]
    second = type(second)(second.item, {"audio": second.streams["audio"]}, second.caption, ())
    batch = Collate(model())([first, second])
    assert not batch["streams"]["mouth"].mask[1].any()
    assert (batch["words"]["mouth"][1] == -100).all()
    losses = caption_losses(model()(batch["streams"], batch["text"]), batch, CaptionWeights())
    assert all(value.isfinite() for value in losses.values())


def test_nothing_is_learned_of_a_modality_that_was_dropped(speech: Path) -> None:
    samples, described = Samples(create_caption_dataset(f"grid:{speech}", "train")), model(modality_dropout=1.0).train()
    batch = Collate(described)([samples[0], samples[5]])
    for stream in batch["streams"].values():
        stream.features.requires_grad_()
    found = described(batch["streams"], batch["text"])
    sum(caption_losses(found, batch, CaptionWeights()).values()).backward()
    kept, dropped = 0, 0
    for name, (start, end) in found.joint.spans.items():
        grad = batch["streams"][name].features.grad
        for row, there in enumerate(found.joint.mask[:, start:end].any(dim=1)):
            assert (grad is not None and bool(grad[row].any())) == bool(there)
            kept, dropped = kept + bool(there), dropped + (not there)
    assert kept and dropped


def test_a_batch_without_earlier_captions_has_no_context(speech: Path) -> None:
    samples = Samples(create_caption_dataset(f"grid:{speech}", "train"))
    described = model(context_tokens=6).train()
    batch = Collate(described)([samples[0], samples[5]])
    assert "context" not in batch
    found = described(batch["streams"], batch["text"])
    sum(caption_losses(found, batch, CaptionWeights()).values()).backward()
    missing = {name for name, parameter in described.named_parameters() if parameter.grad is None}
    assert missing and all(name.startswith("context_") for name in missing)


def test_the_losses_are_those_written_out(speech: Path) -> None:
    samples, described = Samples(create_caption_dataset(f"grid:{speech}", "train")), model()
    batch = Collate(described)([samples[0], samples[5]])
    found = described(batch["streams"], batch["text"])
    losses = caption_losses(found, batch, CaptionWeights(caption=2.0, words=3.0, ctc=0.5))
    following = batch["text"][:, 1:5]
    chances = found.logits[:, :4].log_softmax(dim=-1).gather(2, following.unsqueeze(-1))
    torch.testing.assert_close(losses["caption"], -2 * chances.mean())
    labels, ctc = [], []
    for name, (start, end) in found.joint.spans.items():
        scores = found.words[:, start:end].log_softmax(dim=-1)
        labels.append(-scores.gather(2, batch["words"][name].unsqueeze(-1)).flatten())
        for row in range(2):
            ctc.append(F.ctc_loss(scores[row], batch["text"][row, 1:4], (end - start,), (3,), reduction="sum") / 3)
    torch.testing.assert_close(losses["words"], 3 * torch.cat(labels).mean())
    torch.testing.assert_close(losses["ctc"], 0.5 * torch.stack(ctc).mean())


@pytest.mark.slow
def test_it_learns_to_write_what_it_has_not_heard(table: dict[str, Any], tmp_path: Path) -> None:
    table["schedule"]["epochs"] = 40
    table["optimizer"] = {"lr": 3e-3, "clip_grad": 1.0}
    result = run(table, tmp_path / "out", ema_decay=0.9, eval_interval=40, report=True)
    assert result.scores["test"]["WER"] < 30  # by chance 50: each word is one of two
    rows = list(csv.DictReader((result.output / "metrics.csv").open()))
    assert float(rows[-1]["eval_WER"]) == pytest.approx(result.scores["val"]["WER"])
    assert result.report is not None
    assert "sentence_accuracy" in result.report.read_text()
    loaded = lamzoo.create_model(f"local-dir:{result.model}", pretrained=True)
    dataset = create_caption_dataset(table["data"]["source"], "test")
    found = evaluate_captions(loaded, dataset, batch_size=3, device="cpu")
    assert found.metrics == pytest.approx(result.scores["test"])
    assert found.captions.keys() == dataset.references().keys()
    few = describe_clips(loaded, dataset, [5, 1], device="cpu")
    assert few == {dataset.items[index].id: found.captions[dataset.items[index].id] for index in (5, 1)}
    with pytest.raises(UnsupportedHostError, match="reads {'audio': 128}, but the data have {'mouth': 384}"):
        describe_clips(loaded, create_caption_dataset(f"grid:{dataset.spec[5:-6]}:mouth", "test"))
    with pytest.raises(UnsupportedHostError, match="does not generate captions"):
        describe_clips(torch.nn.Linear(2, 2), dataset)


def test_a_recipe_merges_tokens(table: dict[str, Any], tmp_path: Path) -> None:
    table |= {"reduction": {"keep": 0.5}, "schedule": {"epochs": 1, "warmup_epochs": 0}}
    assert parse_recipe(parse_recipe(table).to_dict()) == parse_recipe(table)
    result = run(table, tmp_path / "out")
    saved = lamzoo.create_model(f"local-dir:{result.model}", pretrained=True)
    assert saved.token_reduction == lamzoo.TokenReduction(0.5)
    assert all(math.isfinite(value) for value in result.history[-1].values())


def test_a_run_in_bfloat16_is_scored_in_float32(table: dict[str, Any]) -> None:
    table["run"]["precision"] = "bf16"
    trained = CaptionRun(parse_recipe(table), False, None, None)
    dtypes = set()
    layer = trained.evaluated_model.encoder.layers[0].feed_forward
    layer.register_forward_hook(lambda _, __, tokens: dtypes.add(tokens.dtype))
    trained.score("validation")
    assert dtypes == {torch.float32}
    trained.backward(0, 0, [next(iter(trained.loader))])
    assert dtypes == {torch.float32, torch.bfloat16}


# Behind a prefix the decoder is transformers' own GPT-2, which tests/models compares it with.
@pytest.mark.slow
@pytest.mark.parametrize("reads", ["cross", "prefix"])
def test_gpt2_learns_to_write_what_it_has_not_heard(table: dict[str, Any], tmp_path: Path, reads: str) -> None:
    pytest.importorskip("transformers", reason="the extra gpt2")
    gpt2 = {"reads": reads, "vocab_size": 300, "positions": 256, "width": 32, "layers": 2, "heads": 2, "dropout": 0.0}
    pairs = str(write_byte_pairs(tmp_path))
    small = {name: SMALL[name] for name in ("width", "heads", "hidden", "encoder_layers", "dropout", "input_dropout")}
    table["model"] = {
        "name": "lam_describer_gpt2",
        "kwargs": {**small, "gpt2": gpt2, "tokenizer_name": pairs, "context_length": 12},
    }
    table["data"] |= {"workers": 1}
    table["augment"] = {"splice": 0.0}
    table["schedule"]["epochs"] = 40
    table["optimizer"] = {"lr": 5e-3, "clip_grad": 1.0}
    table["loss"] = {"label_smoothing": 0.1}
    result = run(table, tmp_path / "out", eval_interval=40)
    assert result.history[-1]["train_loss"] < 0.5 * result.history[0]["train_loss"]
    assert result.scores["test"]["WER"] < 30  # by chance 50: each word is one of two
    loaded = lamzoo.create_model(f"local-dir:{result.model}", pretrained=True)
    dataset = create_caption_dataset(table["data"]["source"], "test")
    found = evaluate_captions(loaded, dataset, generation=GenerationConfig(beams=2), batch_size=3, device="cpu")
    assert {word for text in found.captions.values() for word in text.split()} <= set(ALL)


@pytest.mark.parametrize("killed_at", [pytest.param(2, marks=pytest.mark.slow), 5])
def test_killed_run_resumes_to_the_same_curve(table: dict[str, Any], tmp_path: Path, killed_at: int) -> None:
    table["model"]["kwargs"] |= {"dropout": 0.1}
    table["run"] |= {"ema_decay": 0.9, "checkpoint_interval": 2}
    whole = run(table, tmp_path / "whole")
    resumed = train_killed(table, tmp_path / "killed", killed_at)
    assert torch.equal(curve(resumed.history), curve(whole.history))
    expected, weights = (load_file(result.model / "model.safetensors") for result in (whole, resumed))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_a_checkpoint_of_a_wrapped_model_is_resumed(table: dict[str, Any], tmp_path: Path) -> None:
    table["run"]["checkpoint_interval"] = 2
    whole = run(table, tmp_path / "whole")
    resumed = train_killed(table, tmp_path / "killed", 2, wrap_weights)
    assert torch.equal(curve(resumed.history), curve(whole.history))


def wrap_weights(output: Path) -> None:
    """Names the weights of a run's checkpoints as DistributedDataParallel does."""
    for path in output.glob("checkpoints/*/model.safetensors"):
        save_file({f"module.{name}": value for name, value in load_file(path).items()}, path)


@pytest.mark.slow
def test_two_processes_give_the_curve_of_one(table: dict[str, Any], tmp_path: Path) -> None:
    table["optimizer"] = {"name": "sgd", "lr": 1e-3}
    alone = run(table, tmp_path / "alone")
    table["run"]["accumulation"] = 2
    rows = train_in_two(table, tmp_path / "two")
    torch.testing.assert_close(curve(rows), curve(alone.history), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("spoken", "metric"), [(True, "WER"), (False, "CIDEr")])
def test_the_best_is_chosen_by_the_words_that_are_said_or_by_what_people_wrote(
    table: dict[str, Any], speech: Path, tmp_path: Path, spoken: bool, metric: str
) -> None:
    if not spoken:
        folder = Path(shutil.copytree(speech, tmp_path / "silent"))
        lines = [json.loads(line) | {"words": []} for line in (folder / "captions.jsonl").read_text().splitlines()]
        (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        table |= {"data": {"source": f"grid:{folder}:audio"}, "augment": {}}
    result = run(table, tmp_path / "chosen")
    scores = [record[f"eval_{metric}"] for record in result.history]
    best = (min if spoken else max)(scores)
    assert scores[result.epoch - 1] == best
    assert f"the best by {metric} on val ({best:.2f})" in result.about


@pytest.mark.slow
def test_the_madv2_recipe_trains_on_features_in_its_layout(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py", reason="MAD's features are HDF5 files")
    generator = np.random.default_rng(0)
    annotations, features = tmp_path / "mad" / "annotations", tmp_path / "mad" / "features"
    (annotations / "MAD-v2").mkdir(parents=True)
    features.mkdir()
    columns = "movie,start,end,text"
    lines = [f"film{n % 2},{3 * n},{3 * n + 2},Someone {('walks', 'waits')[n % 2]} by door {n}." for n in range(16)]
    (annotations / "MAD-v2" / "mad-v2-ad-unnamed.csv").write_text("\n".join([columns, *lines]))
    told = {
        str(n): {
            "movie": "1005_Signs", "sentence": f"SOMEONE waits {n}.", "timestamps": [2.0 * n, 2.0 * n + 1.5],
            "ext_timestamps": [2.0 * n, 2.0 * n + 2.0], "movie_duration": 60.0, "tokens": [],
        }
        for n in range(8)
    }  # fmt: skip
    (annotations / "MAD_val.json").write_text(json.dumps(told))
    (annotations / "MAD_test.json").write_text("{}")
    for name, rate, width in (("CLIP_B32_frames_features_5fps.h5", 5, 512), ("audio_100fps.h5", 100, 128)):
        with h5py.File(features / name, "w") as file:
            for movie in ("film0", "film1", "1005_Signs"):
                file[movie] = generator.standard_normal((60 * rate, width)).astype(np.float32)
    small = "{width=32, heads=2, hidden=64, encoder_layers=2, text_layers=1, decoder_layers=1, vocabulary=600}"
    changes = (
        "model.pretrained=false",
        f"model.kwargs={small}",
        "data.workers=0",
        "run.batch_size=8",
        "run.device=cpu",
        "run.precision=no",
    )
    source, output = f"data.source=mad:{tmp_path / 'mad'}", f"run.output={tmp_path / 'out'}"
    result = train(load_recipe(RECIPES / "madv2.toml", (source, output, *changes, "run.report=false")))
    assert result.history[-1]["update"] == 20
    assert result.history[-1]["train_loss"] < result.history[0]["train_loss"]
    assert {"CIDEr", "R@5/16"} <= result.scores["mad-eval"].keys()
    assert lamzoo.create_model(f"local-dir:{result.model}", pretrained=True).features == {"video": 512, "audio": 128}


def test_case_and_punctuation_do_not_count(speech: Path) -> None:
    dataset = create_caption_dataset(f"grid:{speech}", "test")
    loud = {key: texts[0].upper() + "!" for key, texts in dataset.references().items()}
    assert caption_scores(dataset, loud)["WER"] == 0.0
    assert caption_scores(dataset, dict.fromkeys(loud, ""))["WER"] == 100.0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data": {"sauce": "grid:x"}}, "data.sauce is unknown; did you mean data.source"),
        ({"data": {"eval_split": "train"}}, "clips of .* would be used for training and scoring"),
        ({"data": {"context": 2}}, "context is 2, but lam_describer_micro does not support earlier captions"),
        ({"augment": {"splice": 2.0}}, "augment.splice is 2.0"),
        ({"loss": {"ctc": -1.0}}, "loss.ctc is -1.0"),
        ({"reduction": {"method": "prune"}}, "reduction.method is 'prune', which only classifiers are trained with"),
        ({"optimizer": {"layer_decay": 0.5}}, "optimizer.layer_decay is for classifiers"),
        ({"run": {"batch_size": 4096}}, "batch_size is 4096, but .* has only 24 clips"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused_and_leaves_nothing(
    table: dict[str, Any], tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    for section, values in changes.items():
        table[section] = {**table.get(section, {}), **values}
    with pytest.raises(LamzooError, match=says):
        train(parse_recipe(table))
    assert not (tmp_path / "out").exists()
