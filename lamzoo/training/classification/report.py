"""The report of a classification run: Markdown and JSON, with pictures if matplotlib is installed."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from torch import nn

from lamzoo.adapters import lam_parameters
from lamzoo.errors import DataError, LamzooError, UnsupportedHostError
from lamzoo.escaping import markdown, markdown_block, markdown_code
from lamzoo.files import atomic_files
from lamzoo.reading import to_json
from lamzoo.registry.factory import create_model
from lamzoo.training.classification.scoring import Score
from lamzoo.training.recipe import Recipe
from lamzoo.training.splits import Splits
from lamzoo.version import __version__

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_logger = logging.getLogger(__name__)

_MASK_PICTURES = 3
_LISTED = 60  # maximum number of classes in the Markdown table; the JSON has all
_CONFUSION_IN_JSON = 200  # maximum number of classes for the whole matrix in the JSON
_CONFUSION_DRAWN = 3000  # maximum number of classes for its picture, whose memory grows with their square
_PAIRS = 5


@dataclass(frozen=True)
class RunFacts:
    """The contents of a report.

    Attributes:
        common: the facts common to all tasks, as of :meth:`lamzoo.training.trainer.TrainingRun.facts`.
        recipe: the run's.
        model: the trained model, already saved.
        splits: its data.
        scores: the model's scores by split; the split watched during the run comes first.
        history: one record per epoch.
        about_weights: a sentence on the choice of the model's weights.
    """

    common: Mapping[str, Any]
    recipe: Recipe
    model: nn.Module
    splits: Splits
    scores: Mapping[str, Score]
    history: list[dict[str, float]]
    about_weights: str


def write_report(folder: Path, facts: RunFacts) -> None:
    """Writes ``report.md``, ``report.json``, ``confusion.png``, ``curves.png`` and ``masks-*.png`` into a folder.

    A picture that can't be drawn, without matplotlib or masks, is replaced by a sentence with the reason.

    Raises:
        DataError: a file can't be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"The report {folder} can't be written: {error.strerror}; choose another folder.") from None
    names = _class_names(facts)
    content = _content(facts, names)
    pictures = [*_plots(folder, facts, names), *_masks(folder, facts, names)]
    with atomic_files(DataError) as stage:
        stage(folder / "report.json").write_text(to_json(content, indent=2) + "\n", "utf-8")
        stage(folder / "report.md").write_text(_markdown(content, pictures), "utf-8")


def confusion(score: Score, classes: int) -> NDArray[np.int64]:
    """Counts a split's images by class (row) and prediction (column)."""
    flat = score.labels * classes + score.guesses
    return torch.bincount(flat, minlength=classes * classes).reshape(classes, classes).numpy()


def _class_names(facts: RunFacts) -> list[str]:
    classes: Any = facts.model.num_classes
    return facts.splits.train.classes or [f"class {index}" for index in range(classes)]


def _content(facts: RunFacts, names: list[str]) -> dict[str, Any]:
    """Returns the report's contents as JSON values."""
    common, recipe, device = facts.common, facts.recipe, facts.common["device"]
    masks = 0 if common["masks"] is None else sum(p.numel() for p in lam_parameters(facts.model))
    training = np.bincount(facts.splits.train.labels(), minlength=len(names))
    return {
        "model": common["model"],
        "pretrained": recipe.model.pretrained,
        "weights": common["weights"],
        "masks": common["masks"],
        "tune": recipe.model.tune,
        "data": common["data"],
        "classes": len(names),
        "training_images": len(facts.splits.train),
        "left_out": common["left_out"],
        "validation_was_split_off": facts.splits.made is not None,
        "parameters": {"all": common["parameters"], "trained": common["trained_parameters"], "masks": masks},
        "scores": {split: _score(score, names, training) for split, score in facts.scores.items()},
        "epochs": common["epochs"],
        "epoch_kept": common["epoch_kept"],
        "about_weights": facts.about_weights,
        **{key: common[key] for key in ("batch_size", "lr", "seed", "precision", "train_seconds", "wall_seconds")},
        "device": f"{device} ({torch.cuda.get_device_name()})" if "cuda" in device else device,
        "processes": common["processes"],
        "threads": torch.get_num_threads(),
        "command": common["command"] or f"lamzoo train {shlex.quote(str(Path(recipe.run.output) / 'recipe.json'))}",
        "output": recipe.run.output,
        "versions": {"lamzoo": __version__, "torch": torch.__version__, "timm": timm.__version__},
    }


def _score(score: Score, names: list[str], training: NDArray[np.int64]) -> dict[str, Any]:
    classes, correct = len(names), score.labels == score.guesses
    images, guessed, right = (
        torch.bincount(part, minlength=classes).numpy() for part in (score.labels, score.guesses, score.labels[correct])
    )
    per_class = [
        {
            "class": name,
            "training_images": int(training[index]),
            "images": int(images[index]),
            "recall": _percent(right[index], images[index]),
            "precision": _percent(right[index], guessed[index]),
        }
        for index, name in enumerate(names)
    ]
    recalls = right[images > 0] / images[images > 0]
    wrong = score.labels[~correct] * classes + score.guesses[~correct]
    pairs, counts = np.unique(wrong.numpy(), return_counts=True)
    most = np.argsort(-counts, kind="stable")[:_PAIRS]
    return {
        "images": len(score.labels),
        "top1": round(score.top1, 3),
        "top5": None if score.top5 is None else round(score.top5, 3),
        "mean_recall": round(100 * float(recalls.mean()), 3),
        "loss": round(score.loss, 5),
        "per_class": per_class,
        "most_confused": [
            {"class": names[pair // classes], "taken_for": names[pair % classes], "images": count}
            for pair, count in zip(pairs[most].tolist(), counts[most].tolist(), strict=True)
        ],
        "confusion": confusion(score, classes).tolist() if classes <= _CONFUSION_IN_JSON else None,
    }


def _percent(part: Any, whole: Any) -> float | None:
    return round(100 * float(part) / float(whole), 2) if whole else None


def _plots(folder: Path, facts: RunFacts, names: list[str]) -> list[str]:
    """Draws curves and confusion matrix; returns Markdown lines."""
    from lamzoo.report.curves import draw_confusion, draw_curves
    from lamzoo.report.mpl import write_figure

    split, score = list(facts.scores.items())[-1]
    title = f"{facts.recipe.model.name}: {split}, {len(score.labels)} images, {score.top1:.2f} % right"
    plots: list[tuple[str, str, Callable[[], Figure]]] = [("Curves", "curves.png", lambda: draw_curves(facts.history))]
    lines: list[str] = []
    if len(names) <= _CONFUSION_DRAWN:
        heading = f"Confusion matrix ({split})"
        plots.append((heading, "confusion.png", lambda: draw_confusion(confusion(score, len(names)), names, title)))
    else:
        lines += [f"The confusion matrix is not drawn: it has more than {_CONFUSION_DRAWN:,} classes.", ""]
    try:
        for heading, filename, draw in plots:
            write_figure(draw(), folder / filename)
            lines += [f"## {markdown(heading)}", "", f"![{markdown(heading)}]({filename})", ""]
    except LamzooError as error:
        if isinstance(error, DataError):
            raise
        _logger.warning("the report has no pictures: %s", error)
        lines += ["## Pictures", "", f"None: {markdown(str(error))}", ""]
    return lines


def _masks(folder: Path, facts: RunFacts, names: list[str]) -> list[str]:
    """Draws the masks over a few scored images of different classes; returns Markdown lines."""
    from lamzoo.report import explain

    dataset = facts.splits.test or facts.splits.evaluation
    assert dataset is not None  # a finished run has scored a split
    lines = ["## Masks", ""]
    if getattr(facts.model, "lam_config", None) is None:
        return [*lines, "The model has no learnable masks.", ""]
    # Load the model as a user would, with its class names.
    saved = create_model(f"local-dir:{Path(facts.recipe.run.output) / 'model'}", pretrained=True)
    labels = np.asarray(dataset.labels())
    present = np.unique(labels)
    chosen = present[np.linspace(0, len(present) - 1, min(_MASK_PICTURES, len(present))).astype(int)]
    try:
        for number, label in enumerate(chosen, 1):
            index = int(np.flatnonzero(labels == label)[0])
            explain(saved, dataset.decode(index)[0], folder / f"masks-{number}.png")
            where = dataset.filename(index)
            lines += [f"{markdown(names[label])}: {markdown(where)}", "", f"![masks](masks-{number}.png)", ""]
    except (LamzooError, OSError) as error:
        if isinstance(error, DataError):
            raise
        if not isinstance(error, UnsupportedHostError):
            _logger.warning("the report has no pictures of the masks: %s", error)
        lines += [f"They can't be drawn: {markdown(str(error))}", ""]
    return lines


def _markdown(content: dict[str, Any], pictures: list[str]) -> str:
    scores, counts = content["scores"], content["parameters"]
    share = 100 * counts["trained"] / counts["all"]
    source = content["weights"] or ("pretrained" if content["pretrained"] else "from scratch")
    facts = [
        ("model", f"{markdown_code(content['model'])} ({markdown(source)})"),
        ("masks", markdown_code(content["masks"]) if content["masks"] else "none"),
        ("data", f"{markdown_code(content['data'])}: {content['classes']} classes, {content['training_images']:,} "
                 "training images"),
        ("trained", f"{content['tune']}: {counts['trained']:,} of {counts['all']:,} parameters ({share:.2f} %)"),
        ("parameters of the masks", f"{counts['masks']:,}"),
        ("schedule", f"{content['epochs']} epochs, batches of {content['batch_size']}, learning rate "
                     f"{content['lr']:.3g}, seed {content['seed']}"),
        ("time", f"{_duration(content['train_seconds'])} in updates, {_duration(content['wall_seconds'])} in all, on "
                 f"{markdown(content['device'])}, {content['processes']} process(es) of {content['threads']} threads, "
                 f"precision {content['precision']}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in content["versions"].items())),
    ]  # fmt: skip
    lines = ["# Training report", "", "| | |", "|---|---|", *(f"| {key} | {text} |" for key, text in facts)]
    lines += ["", "| split | images | top-1 | top-5 | mean recall | loss |", "|---|---:|---:|---:|---:|---:|"]
    for split, score in scores.items():
        cells = [f"{score['images']:,}", *(_shown(score[key]) for key in ("top1", "top5", "mean_recall"))]
        lines.append(f"| {markdown(split)} | {' | '.join(cells)} | {score['loss']:.4f} |")
    lines += ["", markdown(content["about_weights"])]
    if content["validation_was_split_off"]:
        lines.append("The data has no validation split: it was split off the training images, class by class.")
    if content["left_out"]:
        lines.append(f"{content['left_out']} images could not be read and were left out; `bad-inputs.csv` lists them.")
    output = Path(content["output"])
    use = shlex.quote(f"local-dir:{output / 'model'}")
    lines += ["", *markdown_block(content["command"], f"lamzoo predict {use} IMAGE..."), ""]
    for split, score in scores.items():
        lines += _class_table(split, score)
    return "\n".join([*lines, *pictures]).rstrip() + "\n"


def _class_table(split: str, score: dict[str, Any]) -> list[str]:
    per_class = score["per_class"]
    heading = f"## Classes ({markdown(split)})"
    if len(per_class) > _LISTED:
        scored = [line for line in per_class if line["recall"] is not None]
        per_class = sorted(scored, key=lambda line: line["recall"])[:_LISTED]
        heading += f": the {_LISTED} lowest of {len(score['per_class'])}"
    lines = [heading, "", "| class | training images | images | recall | precision |", "|---|---:|---:|---:|---:|"]
    lines += [
        f"| {markdown(line['class'])} | {line['training_images']:,} | {line['images']:,} | {_shown(line['recall'])} | "
        f"{_shown(line['precision'])} |"
        for line in per_class
    ]
    if score["most_confused"]:
        pairs = (
            f"{markdown(p['class'])} for {markdown(p['taken_for'])} ({p['images']})" for p in score["most_confused"]
        )
        lines += ["", f"Most often taken: {', '.join(pairs)}."]
    return [*lines, ""]


def _shown(percent: float | None) -> str:
    return "" if percent is None else f"{percent:.2f} %"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
