"""The demo: a zoo model compared with its plain twin on real photographs."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from torch import nn

from lamzoo.data import LabelledImages, create_dataset
from lamzoo.errors import DataError, MissingExtraError
from lamzoo.escaping import printable
from lamzoo.evaluation import Prediction, class_names, evaluate, predict, resolve_device
from lamzoo.evaluation.runtime import class_count
from lamzoo.profiling import Latency, LatencyComparison, compare_latency, profile
from lamzoo.profiling.inputs import default_input
from lamzoo.registry.factory import create_model
from lamzoo.report.mask_pictures import explain

MODEL = "lam_vit_micro"
BASELINE = "vit_micro"
_REPEATS = {1: 30, 32: 10}  # by batch size


@dataclass(frozen=True)
class Photograph:
    """A photograph of scikit-image.

    Attributes:
        name: its subject.
        path: the file.
        label: its CIFAR-10 class; None if it is of no class.
    """

    name: str
    path: Path
    label: str | None


_PHOTOGRAPHS = (("cat", "chelsea.png", "cat"), ("rocket", "rocket.jpg", None), ("coffee", "coffee.png", None),
                ("astronaut", "astronaut.png", None))  # fmt: skip


def run(out: Path, cifar10: Path | None = None, *, console: Console | None = None) -> None:
    """Classifies photographs with the bundled weights and with the plain backbone, and draws the masks.

    Prints tables of predictions, cost and, given CIFAR-10, accuracy, and writes ``masks-<photograph>.png``; older files
    are replaced.

    Args:
        out: folder of the pictures; created if missing.
        cifar10: folder for :func:`lamzoo.data.create_dataset`, with a ``test`` split; None for no evaluation.
        console: the console to print to; that of the terminal by default.

    Raises:
        MissingExtraError: scikit-image or matplotlib is not installed.
        DataError: ``out`` can't be written, or ``cifar10`` can't be read.
        WeightsError: the bundled weights are missing or damaged.
    """
    console = Console() if console is None else console
    photographs = find_photographs()
    test_set = None if cifar10 is None else create_dataset(str(cifar10), "test")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"The folder {out} can't be created: {error.strerror}; choose another with --out.") from error
    device = resolve_device("auto")
    models = {name: create_model(name, pretrained=True).to(device).eval() for name in (MODEL, BASELINE)}
    console.print(f"torch {torch.__version__}, {_device_name(device)}, {torch.get_num_threads()} CPU threads")
    show_predictions(console, models, photographs)
    show_cost(console, models)
    for photograph in photographs:
        path = out / f"masks-{photograph.name}.png"
        explain(models[MODEL], photograph.path, path)
        console.print(f"masks of {MODEL} on the {photograph.name}: {escape(printable(str(path)))}", soft_wrap=True)
    if test_set is not None:
        show_accuracy(console, models, test_set)


def find_photographs() -> list[Photograph]:
    """Returns the photographs that scikit-image includes without a download.

    Raises:
        MissingExtraError: scikit-image is not installed.
        DataError: the installation lacks one of the files.
    """
    found = importlib.util.find_spec("skimage")
    if found is None or found.origin is None:
        raise MissingExtraError(
            "The demo needs the photographs of scikit-image, which is not installed; install it with: "
            "pip install 'lamzoo[demo]'"
        )
    folder = Path(found.origin).parent / "data"
    photographs = [Photograph(name, folder / file, label) for name, file, label in _PHOTOGRAPHS]
    for photograph in photographs:
        if not photograph.path.is_file():
            raise DataError(f"This scikit-image has no {photograph.path}; install it again from its wheel.")
    return photographs


def show_predictions(console: Console, models: dict[str, nn.Module], photographs: list[Photograph]) -> None:
    """Prints the three most probable classes of each photograph, one column per model."""
    table = Table(title="Predictions on scikit-image's photographs", show_lines=True)
    table.add_column("photograph")
    table.add_column("right answer")
    guesses: list[list[list[Prediction]]] = []
    for name, model in models.items():
        table.add_column(_with_tag(name, model))
        device = next(model.parameters()).device
        guesses.append(predict(model, [photograph.path for photograph in photographs], topk=3, device=device))
    for photograph, *answers in zip(photographs, *guesses, strict=True):
        right = photograph.label or "none of the classes"
        table.add_row(photograph.name, right, *(_lines(answer, photograph.label) for answer in answers))
    console.print(table)
    first = next(iter(models.values()))
    names = class_names(first, class_count(first))
    without = [photograph.name for photograph in photographs if photograph.label not in names]
    console.print(
        f"These photographs are not from the models' data and are downscaled to their input size. The models have "
        f"{len(names)} classes ({', '.join(names[:10])}{', ...' if len(names) > 10 else ''}), so every prediction for "
        f"{' and '.join(filter(None, (', '.join(without[:-1]), *without[-1:])))} is wrong."
    )


def show_cost(console: Console, models: dict[str, nn.Module]) -> None:
    """Prints GMACs, parameters and latency of two models, and the ratio of the first to the second."""
    (name, model), (base_name, baseline) = models.items()
    costs = {name: profile(model), base_name: profile(baseline)}
    timings = [
        compare_latency(model, baseline, default_input(model, batch), repeats) for batch, repeats in _REPEATS.items()
    ]
    table = Table(title="Cost of one image")
    for column in ("model", "GMACs", "params (M)", *(f"ms, batch of {batch}" for batch in _REPEATS)):
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    for key, latencies in ((name, [t.model for t in timings]), (base_name, [t.baseline for t in timings])):
        cost = costs[key]
        table.add_row(key, f"{cost.gmacs:.4f}", f"{cost.params_m:.4f}", *map(_milliseconds, latencies))
    mine, other = costs[name], costs[base_name]
    table.add_row(
        "ratio",
        f"{mine.gmacs / other.gmacs:.3f}",
        f"{mine.params_m / other.params_m:.3f}",
        *map(_ratio, timings),
    )
    console.print(table)
    first = timings[0]
    repeats = " and ".join(map(str, _REPEATS.values()))
    console.print(
        "GMACs: 10^9 multiply-accumulates, attention included. "
        f"The masks are {mine.lam_gmacs:.4f} GMACs and {mine.lam_params_m:.4f} M parameters of {name}. "
        f"Latency: median and quartiles of {repeats} passes of each, in alternation in one process, {first.dtype} on "
        f"{first.device} with {first.threads} threads; the ratio is the median over pairs. "
        "Other load on the machine affects it."
    )


def show_accuracy(console: Console, models: dict[str, nn.Module], test_set: LabelledImages) -> None:
    """Scores the models on a test set and prints the accuracies."""
    table = Table(title=f"Accuracy on {len(test_set)} test images")
    for column in ("model", "top-1 %", "top-5 %", "images/s"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, model in models.items():
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task(name, total=len(test_set))
            result = evaluate(
                model,
                test_set,
                batch_size=128,
                device=next(model.parameters()).device,
                progress=lambda state, progress=progress, task=task: progress.update(task, completed=state.seen),  # type: ignore[misc]
            )
        top5 = "" if result.top5 is None else f"{result.top5:.2f}"
        table.add_row(_with_tag(name, model), f"{result.top1:.2f}", top5, f"{result.images_per_s:.0f}")
    console.print(table)


def _lines(answer: list[Prediction], right: str | None) -> str:
    lines = []
    for guess in answer:
        line = f"{escape(guess.label)} {guess.probability:.1%}"
        lines.append(f"[green]{line}[/green]" if guess.label == right else line)
    return "\n".join(lines)


def _with_tag(name: str, model: nn.Module) -> str:
    tag = (getattr(model, "pretrained_cfg", None) or {}).get("tag")
    return f"{name}.{tag}" if tag else name


def _milliseconds(latency: Latency) -> str:
    return f"{latency.median_ms:.2f}\n({latency.quartiles_ms[0]:.2f}-{latency.quartiles_ms[1]:.2f})"


def _ratio(timing: LatencyComparison) -> str:
    return f"{timing.ratio:.3f}\n({timing.ratio_quartiles[0]:.3f}-{timing.ratio_quartiles[1]:.3f})"


def _device_name(device: torch.device) -> str:
    return f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
