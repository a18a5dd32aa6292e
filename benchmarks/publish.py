"""Turns a finished training run into zoo weights: a bfloat16 safetensors file, its model card, and its registry entry.

    python -m benchmarks.publish RUN --recipe benchmarks/recipes/micro.cifar10.toml --tag cifar10 --split test

The score in the card is that of the written file, read back; what it says of the data is in ``cards.toml`` beside this
file. The registry entry is printed, for ``registry/*.toml``.
"""

from __future__ import annotations

import argparse
import csv
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch

import lamzoo
from lamzoo.data import create_dataset
from lamzoo.data.captions import create_caption_dataset
from lamzoo.data.moments import create_moment_dataset
from lamzoo.data.retrieval import create_retrieval_dataset
from lamzoo.evaluation import evaluate, evaluate_moments
from lamzoo.evaluation.captions.evaluate import evaluate_captions
from lamzoo.evaluation.retrieval.evaluate import evaluate_retrieval
from lamzoo.evaluation.retrieval.metrics import WAYS
from lamzoo.registry.cards import data_dir
from lamzoo.training import load_recipe, parse_recipe
from lamzoo.weights.files import write_state_dict

_CARD = """\
# {name}.{tag}

{description} Trained from scratch by lamzoo.

| | |
|---|---|
| parameters | {params:,} |
| GMACs | {gmacs:.4f} at {size}, attention included |
| masks | {masks} |
| training data | {dataset} |
| licence of the weights | Apache-2.0 |
| recipe | `{recipe}`, seed {seed}, {epochs} epochs, {precision} autocast on {device} |
{scores}
| measured on | {dataset}, {split} split, {samples}, float32 |
| device, versions | {eval_device}, torch {torch}, timm {timm} |
| sha256 | `{sha256}` |

## Commands

```
OMP_NUM_THREADS=1 {train}
python -m benchmarks.publish {run} --recipe {recipe} --tag {tag} --split {split}
{command}
```

The first trains ({minutes:.0f} minutes of training steps here, on one core of a busy machine; another number of threads
rounds differently), the second wrote the weights and this card, the third gives the score back.

## Data

{source}

The {watched} split was scored after {looks} to watch the run; the weights are those of the last epoch{ema},
not of the best.{chosen}

## Limits

One seed and a short budget: a working example and a test of the whole path, not a claim about learnable masks.{limits}
Predictions carry whatever biases the data set has.
"""


@dataclass(frozen=True)
class Measured:
    """What the written weights are worth, in the words of their task.

    Attributes:
        rows: of the card's table: what, and its value.
        metrics: for the registry.
        samples: what was scored.
        size: of the input.
        command: gives the scores back.
        limits: what the model can't do.
        pretrained_cfg: what the tag says beyond the model's card.
    """

    rows: Mapping[str, str]
    metrics: Mapping[str, float]
    samples: str
    size: str
    command: str
    limits: str
    pretrained_cfg: Mapping[str, Any]


_TEXTS = tomllib.loads((Path(__file__).parent / "cards.toml").read_text(encoding="utf-8"))


def main() -> None:
    """Publishes the run named on the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="output folder of `lamzoo train`, finished")
    parser.add_argument("--recipe", type=Path, required=True, help="what it was trained by, as a path in this checkout")
    parser.add_argument("--tag", required=True, choices=sorted(_TEXTS["data"]))
    parser.add_argument("--split", default="test")
    parser.add_argument("--out", type=Path, default=data_dir("weights"))
    arguments = parser.parse_args()

    recipe = json.loads((arguments.run / "recipe.json").read_text(encoding="utf-8"))
    rows = list(csv.DictReader((arguments.run / "metrics.csv").open(encoding="utf-8")))
    epochs = parse_recipe(recipe).schedule.total_epochs
    if len(rows) != epochs:
        parser.error(f"{arguments.run} has {len(rows)} of {epochs} epochs; finish it first")
    name = recipe["model"]["name"]
    trained = lamzoo.create_model(f"local-dir:{arguments.run / 'model'}", pretrained=True)
    file = write_state_dict(trained.bfloat16().state_dict(), arguments.out / f"{name}.{arguments.tag}.safetensors")

    model = lamzoo.create_model(name, checkpoint_path=file.path)
    pruning = getattr(trained, "prune_config", None)
    if pruning is not None:
        options = pruning.to_dict()
        lamzoo.prune_tokens(model, options.pop("keep"), options.pop("at"), **options)
    measured = MEASURES[recipe["task"]](
        model, f"{name}.{arguments.tag}", recipe, arguments.split, trained.pretrained_cfg
    )
    profile = lamzoo.profile(model)
    data, chosen = _TEXTS["data"][arguments.tag], _TEXTS["models"].get(f"{name}.{arguments.tag}")
    dataset = data["name"]
    published = arguments.recipe.as_posix()
    masks = recipe["model"].get("lam")
    # The row of an ablation names its masks too.
    if isinstance(masks, dict) and model.lam_config == lamzoo.LamConfig.from_dict(masks):
        del recipe["model"]["lam"]
    recipe["run"]["output"] = run = f"runs/{name}.{arguments.tag}"
    overrides = "".join(f" {change}" for change in changes(load_recipe(arguments.recipe).to_dict(), recipe))
    interval = recipe["run"].get("eval_interval", 1)
    card = _CARD.format(
        name=name,
        tag=arguments.tag,
        description=lamzoo.model_info(name).description,
        params=round(profile.params_m * 1e6),
        gmacs=profile.gmacs,
        size=measured.size,
        masks="none" if model.lam_config is None else f"`{model.lam_config}`",
        dataset=dataset,
        recipe=published,
        seed=recipe["run"]["seed"],
        epochs=epochs,
        precision=recipe["run"]["precision"],
        device=recipe["run"]["device"],
        scores="\n".join(f"| {what} | {value} |" for what, value in measured.rows.items()),
        split=arguments.split,
        watched=recipe["data"]["eval_split"],
        samples=measured.samples,
        eval_device="cpu",
        torch=torch.__version__,
        timm=timm.__version__,
        sha256=file.sha256,
        train=f"lamzoo train {published}{overrides}",
        run=run,
        command=measured.command,
        minutes=float(rows[-1]["train_seconds"]) / 60,
        source="\n\n".join(data[part].strip() for part in ("text", recipe["task"]) if part in data),
        chosen=f" {chosen['text'].strip()}" if chosen else "",
        looks="each epoch" if interval == 1 else f"every {interval} epochs",
        ema=", averaged (EMA)" if recipe["run"].get("ema_decay") else "",
        limits=measured.limits,
    )
    (arguments.out / f"{name}.{arguments.tag}.md").write_text(card, encoding="utf-8")
    print(
        f"""
[models.{name}.tags.{arguments.tag}]
file = "{file.path.name}"
sha256 = "{file.sha256}"
dataset = "{dataset}"
licence = "apache-2.0"
recipe = "{published}{overrides}"

[models.{name}.tags.{arguments.tag}.metrics]
dataset = "{dataset}, {arguments.split} split"
{_toml(measured.metrics)}
command = "{measured.command}"
"""
    )
    if pruning is not None:
        print(f"[models.{name}.tags.{arguments.tag}.prune]\n{_toml(pruning.to_dict())}\n")
    if measured.pretrained_cfg:
        print(f"[models.{name}.tags.{arguments.tag}.pretrained_cfg]\n{_toml(measured.pretrained_cfg)}")


def measure_images(
    model: Any, name: str, recipe: Mapping[str, Any], split: str, trained_cfg: Mapping[str, Any]
) -> Measured:
    """Scores a classifier on a split of the data that it was trained on."""
    source, labels = recipe["data"]["source"], trained_cfg["label_names"]
    result = evaluate(model, create_dataset(source, split), device="cpu")
    size = model.pretrained_cfg["input_size"][-1]
    separator = "; " if any("," in label for label in labels) else ", "
    return Measured(
        rows={"top-1": f"{result.top1:.2f} %", "top-5": f"{result.top5:.2f} %"},
        metrics={"top1": round(result.top1, 2), "top5": round(result.top5, 2)},
        samples=f"{result.samples:,} images",
        size=f"{size} px",
        command=f"lamzoo eval {name} --data {source} --split {split}",
        limits=(
            f" It sees\n{size} pixels and answers any picture at all with one of {len(labels)} classes:\n"
            f"{separator.join(labels)}."
        ),
        pretrained_cfg={"label_names": labels},
    )


def measure_retrieval(
    model: Any, name: str, recipe: Mapping[str, Any], split: str, trained_cfg: Mapping[str, Any]
) -> Measured:
    """Scores a retrieval model on a split of the data that it was trained on."""
    source = recipe["data"]["source"]
    result = evaluate_retrieval(model, create_retrieval_dataset(source, split), device="cpu")
    height, width = model.image_size
    ranks = "R@1 {R1:.1f} %, R@5 {R5:.1f} %, R@10 {R10:.1f} %, median rank {MedianR:g}"
    keys = ("R1", "R5", "R10", "MedianR")
    return Measured(
        rows={text: ranks.format(**result.metrics[way]) for way, text in WAYS.items()},
        metrics={f"{way}_{key}": round(result.metrics[way][key], 2) for way in WAYS for key in keys},
        samples=f"{result.texts:,} texts and {result.videos:,} videos",
        size=f"{model.max_frames} frames of {width} x {height} px and one text",
        command=f"lamzoo eval {name} --task retrieval --data {source} --split {split}",
        limits="",
        pretrained_cfg={},
    )


def measure_moments(
    model: Any, name: str, recipe: Mapping[str, Any], split: str, trained_cfg: Mapping[str, Any]
) -> Measured:
    """Scores a moment model on a split of the data that it was trained on."""
    source = recipe["data"]["source"]
    result = evaluate_moments(model, create_moment_dataset(source, split), device="cpu")
    scores = {"R1@0.5": "MR-full-R1@0.5", "R1@0.7": "MR-full-R1@0.7", "mAP": "MR-full-mAP"}
    found = {what: result.metrics["brief"][key] for what, key in scores.items()}
    return Measured(
        rows={what: f"{value:.2f} %" for what, value in found.items()},
        metrics={what.replace("@0.", "_0"): value for what, value in found.items()},
        samples=f"{result.queries:,} queries",
        size=f"{model.max_clips} clips of {model.video_dim} features and {model.max_words} words of {model.text_dim}",
        command=f"lamzoo eval {name} --task moments --data {source} --split {split}",
        limits="",
        pretrained_cfg={},
    )


def measure_captions(
    model: Any, name: str, recipe: Mapping[str, Any], split: str, trained_cfg: Mapping[str, Any]
) -> Measured:
    """Scores a describer on a split of the data that it was trained on; it writes greedily."""
    source = recipe["data"]["source"]
    result = evaluate_captions(model, create_caption_dataset(source, split), device="cpu")
    found = result.metrics
    inputs = [f"{rate:g} tokens of {name} ({model.features[name]} wide)" for name, rate in model.rates.items()]
    return Measured(
        rows={
            "word error rate": f"{found['WER']:.2f} %",
            "sentences right": f"{found['sentence_accuracy']:.2f} %",
            "CIDEr": f"{found['CIDEr']:.3f}",
        },
        metrics={key: round(found[key], 4) for key in ("WER", "sentence_accuracy", "CIDEr")},
        samples=f"{len(result.captions):,} clips",
        size=f"{model.seconds:g} seconds of {' and '.join(inputs)} a second, and one sentence",
        command=f"lamzoo eval {name} --task captions --data {source} --split {split}",
        limits="",
        pretrained_cfg={},
    )


#: By the recipe's task.
MEASURES = {
    "classification": measure_images,
    "retrieval": measure_retrieval,
    "moments": measure_moments,
    "captions": measure_captions,
}


def _toml(table: Mapping[str, Any]) -> str:
    return "\n".join(f"{key} = {json.dumps(value)}" for key, value in table.items())


def changes(before: Mapping[str, Any], after: Mapping[str, Any], section: str = "") -> list[str]:
    """Returns the overrides, as ``lamzoo train`` reads them, that turn one recipe's values into another's."""
    found = []
    for key in sorted(before.keys() | after.keys()):
        name, old, new = f"{section}{key}", before.get(key), after.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += changes(old, new, f"{name}.")
        elif new is not None and json.dumps(new) != json.dumps(old):  # JSON has no tuples
            found.append(f"{name}={new if isinstance(new, str) else json.dumps(new)}")
    return found


if __name__ == "__main__":
    main()
