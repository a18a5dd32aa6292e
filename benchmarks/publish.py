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
from pathlib import Path
from typing import Any

import timm
import torch

import lamzoo
from lamzoo.cards import data_dir
from lamzoo.data import create_dataset
from lamzoo.evaluation import evaluate
from lamzoo.training import load_recipe
from lamzoo.weightfiles import write_state_dict

_CARD = """\
# {name}.{tag}

{description} Trained from scratch by lamzoo.

| | |
|---|---|
| parameters | {params:,} |
| GMACs | {gmacs:.4f} at {size} px, attention included |
| masks | {masks} |
| training data | {dataset} |
| licence of the weights | Apache-2.0 |
| recipe | `{recipe}`, seed {seed}, {epochs} epochs, {precision} autocast on {device} |
| top-1 | {top1:.2f} % |
| top-5 | {top5:.2f} % |
| measured on | {dataset}, {split} split, {samples:,} images, float32 |
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

The {split} split was scored after {looks} to watch the run; the weights are those of the last epoch{ema},
not of the best. {chosen}

## Limits

One seed and a short budget: a working example and a test of the whole path, not a claim about learnable masks. It sees
{size} pixels and answers any picture at all with one of {num_classes} classes:
{labels}.
Predictions carry whatever biases the data set has.
"""

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
    if len(rows) != recipe["schedule"]["epochs"]:
        parser.error(f"{arguments.run} has {len(rows)} of {recipe['schedule']['epochs']} epochs; finish it first")
    name, source = recipe["model"]["name"], recipe["data"]["source"]
    trained = lamzoo.create_model(f"local-dir:{arguments.run / 'model'}", pretrained=True)
    weights = {
        key: value.bfloat16() if value.is_floating_point() else value for key, value in trained.state_dict().items()
    }
    file = write_state_dict(weights, arguments.out / f"{name}.{arguments.tag}.safetensors")

    model = lamzoo.create_model(name, checkpoint_path=file.path)
    result = evaluate(model, create_dataset(source, arguments.split), device="cpu")
    profile = lamzoo.profile(model)
    data = _TEXTS["data"][arguments.tag]
    dataset = data["name"]
    labels = trained.pretrained_cfg["label_names"]
    published = arguments.recipe.as_posix()
    recipe["run"]["output"] = run = f"runs/{name}.{arguments.tag}"
    overrides = "".join(f" {change}" for change in changes(load_recipe(arguments.recipe).to_dict(), recipe))
    command = f"lamzoo eval {name}.{arguments.tag} --data {source} --split {arguments.split}"
    interval = recipe["run"].get("eval_interval", 1)
    card = _CARD.format(
        name=name,
        tag=arguments.tag,
        description=lamzoo.model_info(name).description,
        params=round(profile.params_m * 1e6),
        gmacs=profile.gmacs,
        size=model.pretrained_cfg["input_size"][-1],
        masks="none" if model.lam_config is None else f"`{model.lam_config}`",
        dataset=dataset,
        recipe=published,
        seed=recipe["run"]["seed"],
        epochs=recipe["schedule"]["epochs"],
        precision=recipe["run"]["precision"],
        device=recipe["run"]["device"],
        top1=result.top1,
        top5=result.top5,
        split=arguments.split,
        samples=result.samples,
        eval_device="cpu",
        torch=torch.__version__,
        timm=timm.__version__,
        sha256=file.sha256,
        train=f"lamzoo train {published}{overrides}",
        run=run,
        command=command,
        minutes=float(rows[-1]["train_seconds"]) / 60,
        source=data["text"].strip(),
        chosen=_TEXTS["models"].get(f"{name}.{arguments.tag}", {"text": ""})["text"].strip(),
        looks="each epoch" if interval == 1 else f"every {interval} epochs",
        ema=", averaged (EMA)" if recipe["run"].get("ema_decay") else "",
        num_classes=len(labels),
        labels=", ".join(labels),
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
top1 = {result.top1:.2f}
top5 = {result.top5:.2f}
command = "{command}"

[models.{name}.tags.{arguments.tag}.pretrained_cfg]
label_names = {json.dumps(labels)}
"""
    )


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
