"""Converts a finished training run to zoo weights: a bfloat16 safetensors file, its model card and registry entry.

    python -m benchmarks.publish RUN --recipe benchmarks/recipes/micro.cifar10.toml --tag cifar10 --split test

The score in the card is measured on the written file; the description of the data comes from ``cards.toml`` in this
folder. The registry entry is printed, to be added to ``registry/*.toml``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch

import lamzoo
from lamzoo import records
from lamzoo.errors import DataError
from lamzoo.reduction.budget import reduce_tokens
from lamzoo.registry.cards import data_dir
from lamzoo.tasks import EvalRequest, find_task
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

The first command trains the model ({minutes:.0f} minutes of training steps on one core of a busy machine; another
number of threads rounds differently), the second writes the weights and this card, and the third reproduces the score.

## Data

{source}

{scoring}

## Limits

One seed and a short budget: a working example and a test of the whole path, not a claim about learnable masks.{limits}
Predictions have the biases of the data set.
"""


@dataclass(frozen=True)
class Measured:
    """Scores of the written weights for a model card.

    Attributes:
        rows: rows of the card's table: label and value.
        metrics: metrics for the registry.
        samples: description of the scored samples.
        size: description of the input size.
        command: command that reproduces the scores.
        limits: limitations of the model.
        pretrained_cfg: keys that the tag adds to the model's card.
    """

    rows: Mapping[str, str]
    metrics: Mapping[str, float]
    samples: str
    size: str
    command: str
    limits: str
    pretrained_cfg: Mapping[str, Any]


_TEXTS = records.read_table(Path(__file__).parent / "cards.toml", what="Cards")


def main() -> None:
    """Publishes the run named on the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="output folder of `lamzoo train`, finished")
    parser.add_argument("--recipe", type=Path, required=True, help="recipe of the run, as a path in this checkout")
    parser.add_argument("--tag", required=True, choices=sorted(_TEXTS["data"]))
    parser.add_argument("--split", default="test")
    parser.add_argument("--out", type=Path, default=data_dir("weights"))
    arguments = parser.parse_args()

    recipe = records.read_table(arguments.run / "recipe.json", what="Recipe")
    columns, rows = records.read_lines(arguments.run / "metrics.csv", what="log")
    epochs = parse_recipe(recipe).schedule.total_epochs
    if len(rows) != epochs:
        parser.error(f"{arguments.run} has {len(rows)} of {epochs} epochs; finish it first")
    name = recipe["model"]["name"]
    trained: Any = lamzoo.create_model(f"local-dir:{arguments.run / 'model'}", pretrained=True)
    # In the folder of the run until it is measured: weights that were published before stay if that fails.
    file = write_state_dict(trained.bfloat16().state_dict(), arguments.run / f"{name}.{arguments.tag}.safetensors")

    model = lamzoo.create_model(name, checkpoint_path=file.path, lam=trained.lam_config or False)
    reduction = getattr(trained, "token_reduction", None)
    if reduction is not None:
        reduce_tokens(model, reduction)
    measured = measure(model, f"{name}.{arguments.tag}", recipe, arguments.split, trained.pretrained_cfg)
    profile = lamzoo.profile(model)
    data, chosen = _TEXTS["data"][arguments.tag], _TEXTS["models"].get(f"{name}.{arguments.tag}")
    dataset = data["name"]
    published = arguments.recipe.as_posix()
    masks = recipe["model"].get("lam")
    # An ablation row's recipe also names the masks.
    if isinstance(masks, dict) and model.lam_config == lamzoo.LamConfig.from_dict(masks):
        del recipe["model"]["lam"]
    recipe["run"]["output"] = run = f"runs/{name}.{arguments.tag}"
    overrides = "".join(f" {change}" for change in changes(load_recipe(arguments.recipe).to_dict(), recipe))
    interval = recipe["run"].get("eval_interval", 1)
    ema = ", averaged (EMA)" if recipe["run"].get("ema_decay") else ""
    split, kept = recipe["data"]["eval_split"], _kept(arguments.run, epochs)
    scoring = f"The {split} split was scored {_looks(interval, epochs)}; the weights are {kept}{ema}. "
    scoring += chosen["text"] if chosen else ""
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
        samples=measured.samples,
        eval_device="cpu",
        torch=torch.__version__,
        timm=timm.__version__,
        sha256=file.sha256,
        train=f"lamzoo train {published}{overrides}",
        run=run,
        command=measured.command,
        minutes=float(rows[-1][1][columns.index("train_seconds")]) / 60,
        source="\n\n".join(data[part].strip() for part in ("text", recipe["task"]) if part in data),
        scoring=textwrap.fill(scoring, 120),
        limits=measured.limits,
    )
    shutil.copyfile(file.path, arguments.out / file.path.name)
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
{records.to_toml(measured.metrics).rstrip()}
command = "{measured.command}"
"""
    )
    if reduction is not None:
        key = "prune" if reduction.method == "prune" else "reduction"
        print(f"[models.{name}.tags.{arguments.tag}.{key}]\n{records.to_toml(reduction.to_dict())}")
    if model.lam_config is not None and model.lam_config != lamzoo.model_info(name).lam:
        print(f"[models.{name}.tags.{arguments.tag}.lam]\n{model.lam_config.to_toml()}")
    if measured.pretrained_cfg:
        print(f"[models.{name}.tags.{arguments.tag}.pretrained_cfg]\n{records.to_toml(measured.pretrained_cfg)}")


def measure(model: Any, name: str, recipe: Mapping[str, Any], split: str, trained_cfg: Mapping[str, Any]) -> Measured:
    """Scores a model on a split of its training data.

    Args:
        model: model with the written weights.
        name: its ``arch.tag``.
        recipe: recipe of the run, as nested values.
        split: split of the recipe's data.
        trained_cfg: ``pretrained_cfg`` of the trained model; a classifier's has ``label_names``.
    """
    task, source = find_task(recipe["task"]), recipe["data"]["source"]
    found = task.load("evaluate")(model, task.open_split(source, split), EvalRequest(batch_size=32, device="cpu"))
    scores = {metric: value for metric in task.metrics if (value := metric.of(found.scores)) is not None}
    size, limits, labels = task.load("describe_input")(model), "", trained_cfg.get("label_names")
    if labels:
        separator = "; " if any("," in label for label in labels) else ", "
        limits = (
            f" It takes\nimages of {size.removesuffix(' px')} pixels and assigns one of {len(labels)} classes to any "
            f"image:\n{separator.join(labels)}."
        )
    return Measured(
        rows={metric.heading: metric.text(value) for metric, value in scores.items()},
        metrics={metric.column: round(value, max(2, metric.decimals)) for metric, value in scores.items()},
        samples=found.samples,
        size=size,
        command=f"lamzoo eval {name} --data {source} --split {split}",
        limits=limits,
        pretrained_cfg={"label_names": labels} if labels else {},
    )


def _looks(interval: int, epochs: int) -> str:
    """Returns when a run with an ``eval_interval`` looked at its scores, as an adverbial clause."""
    if interval >= epochs:
        return "once, at the end"
    return f"after {'each epoch' if interval == 1 else f'every {interval} epochs'} to monitor the run"


def _kept(run: Path, epochs: int) -> str:
    """Returns a clause that states which epoch's weights a run has kept, according to its report."""
    report = run / "report" / "report.json"
    if not report.is_file():
        raise DataError(f"{report} is missing, which records the epoch of the weights; train with run.report=true.")
    kept = records.read_table(report, what="Report")["epoch_kept"]
    return "those of the last epoch" if kept == epochs else f"those of epoch {kept} of {epochs}, chosen by that split"


def changes(before: Mapping[str, Any], after: Mapping[str, Any], section: str = "") -> list[str]:
    """Returns the overrides for ``lamzoo train`` that turn one recipe's values into another's."""
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
