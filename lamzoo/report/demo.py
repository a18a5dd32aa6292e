"""The demo: a tour of the image models on real photographs, masked beside plain and merged, in under a minute."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from torch import nn

from lamzoo.adapters.deploy import fuse
from lamzoo.data import LabelledImages, create_dataset
from lamzoo.errors import DataError, MissingExtraError
from lamzoo.escaping import printable
from lamzoo.evaluation import Prediction, evaluate, predict, resolve_device
from lamzoo.evaluation.runtime import class_count
from lamzoo.files import make_folder
from lamzoo.profiling import LatencyComparison, compare_latency, profile
from lamzoo.profiling.inputs import default_input
from lamzoo.profiling.latency import device_label
from lamzoo.reduction.budget import merge_to_share
from lamzoo.registry.factory import create_model
from lamzoo.registry.refs import join_name
from lamzoo.report.explorer import explore_image
from lamzoo.report.mask_pictures import explain

MODEL, BASELINE = "lam_vit_tiny_patch8_64", "vit_tiny_patch8_64"  # 100 classes, 64 pixels
SMALL, SMALL_BASELINE = "lam_vit_micro", "vit_micro"  # CIFAR-10's classes, 32 pixels
SHARE = 0.63  # of its GMACs that a model's tokens are merged to

_SHOWN = 3  # classes
_REPEATS = {1: 30, 32: 6}  # by batch size


@dataclass(frozen=True)
class Photograph:
    """A photograph of scikit-image.

    Attributes:
        name: its subject.
        path: the file.
        answers: the right classes of the demo's models, by the first of their names; empty if it is of no class.
    """

    name: str
    path: Path
    answers: tuple[str, ...]


_PHOTOGRAPHS = (
    ("cat", "chelsea.png", ("cat", "tabby", "Egyptian cat")),
    ("rocket", "rocket.jpg", ()),
    ("coffee", "coffee.png", ()),
    ("astronaut", "astronaut.png", ()),
)


def run(out: Path, cifar10: Path | None = None, *, console: Console | None = None) -> None:
    """Classifies photographs with the bundled weights, measures cost, and writes pictures and pages of the masks.

    Prints tables of predictions, cost and, given CIFAR-10, accuracy. Writes ``masks-<photograph>.png`` and, for the
    photographs with a right answer, ``<photograph>.html`` and ``<photograph>-merged.html``, the interactive pages of
    the model with all tokens and with merged ones. Older files are replaced.

    Args:
        out: folder of the pictures and pages; created if missing.
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
    make_folder(out)
    device = resolve_device("auto")
    console.print(f"torch {torch.__version__}, {device_label(device)}, {torch.get_num_threads()} CPU threads")

    def load(name: str) -> nn.Module:
        return create_model(name, pretrained=True).to(device).eval()

    masked, plain, merged = load(MODEL), load(BASELINE), load(MODEL)
    merge_to_share(merged, SHARE)
    small = {name: load(name) for name in (SMALL, SMALL_BASELINE)}
    shown = {BASELINE: plain, MODEL: masked, f"{MODEL}, merged to {SHARE:.0%}": merged}
    show_predictions(console, {**shown, **small}, photographs)
    fused = load(MODEL)
    fuse(fused)
    show_cost(console, {**shown, f"{MODEL}, fused": fused})
    for photograph in photographs:
        picture = out / f"masks-{photograph.name}.png"
        explain(masked, photograph.path, picture)
        _print_file(console, f"masks on the {photograph.name}", picture)
        for model, name in ((masked, ""), (merged, "-merged")) if photograph.answers else ():
            page = out / f"{photograph.name}{name}.html"
            explore_image(model, photograph.path, page)
            what = "with merged tokens" if name else "token by token"
            _print_file(console, f"{what}, in a browser", page)
    if test_set is not None:
        show_accuracy(console, small, test_set)


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
    photographs = [Photograph(name, folder / file, answers) for name, file, answers in _PHOTOGRAPHS]
    for photograph in photographs:
        if not photograph.path.is_file():
            raise DataError(f"This scikit-image has no {photograph.path}; install it again from its wheel.")
    return photographs


def show_predictions(console: Console, models: Mapping[str, nn.Module], photographs: list[Photograph]) -> None:
    """Prints the three most probable classes of each photograph that has a right answer, one row for each model."""
    for photograph in (photograph for photograph in photographs if photograph.answers):
        table = Table(title=f"Predictions for the {photograph.name}")
        for column in ("model", "classes", "px", "most probable", "right"):
            table.add_column(column, justify="right" if column in ("classes", "px") else "left", overflow="fold")
        for name, model in models.items():
            count = class_count(model)
            (answer,) = predict(model, [photograph.path], topk=count, device=next(model.parameters()).device)
            names = [guess.label.partition(",")[0] for guess in answer]
            guesses = [_guess(guess, name in photograph.answers) for guess, name in zip(answer, names, strict=True)]
            rank = next(number for number, name in enumerate(names, start=1) if name in photograph.answers)
            right = "yes" if rank == 1 else f"no: {names[rank - 1]} is {rank} of {count}"
            size = default_input(model).shape[-1]  # type: ignore[union-attr]
            table.add_row(name, str(count), str(size), ", ".join(guesses[:_SHOWN]), right)
        console.print(table)
    without = [photograph.name for photograph in photographs if not photograph.answers]
    console.print(
        "The photographs are those of scikit-image, which the models have not been trained on"
        + (f"; {', '.join(without)} are of none of their classes, and have only their masks drawn." if without else ".")
    )


def show_cost(console: Console, models: Mapping[str, nn.Module]) -> None:
    """Prints GMACs, parameters and latency of models, the first of which is what the others are compared with."""
    base_name, baseline = next(iter(models.items()))
    batches = " and ".join(map(str, _REPEATS))
    table = Table(title=f"Cost of one image, and the time of the others relative to {base_name}")
    for column in ("model", "GMACs", "params (M)", *(f"ratio, batch of {batch}" for batch in _REPEATS)):
        table.add_column(column, justify="left" if column == "model" else "right", overflow="fold")
    first: LatencyComparison | None = None
    for name, model in models.items():
        cost = profile(model)
        ratios = []
        for batch, repeats in _REPEATS.items() if model is not baseline else ():
            timing = compare_latency(model, baseline, default_input(model, batch), repeats)
            first = first or timing
            ratios.append(_ratio(timing))
        table.add_row(name, f"{cost.gmacs:.4f}", f"{cost.params_m:.4f}", *(ratios or [""] * len(_REPEATS)))
    console.print(table)
    if first is not None:
        console.print(
            "GMACs: 10^9 multiply-accumulates, attention and masks included. Ratios: median (and quartiles) of passes "
            f"in alternation in one process, batches of {batches}, {first.dtype} on {first.device} with "
            f"{first.threads} threads; one image takes {base_name} {first.baseline.median_ms:.2f} ms. Other load on "
            "the machine affects the times."
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


def _guess(guess: Prediction, is_right: bool) -> str:
    text = f"{escape(printable(guess.label.partition(',')[0]))} {guess.probability:.0%}"
    return f"[green]{text}[/green]" if is_right else text


def _print_file(console: Console, what: str, path: Path) -> None:
    console.print(f"{what}: {escape(printable(str(path)))}", soft_wrap=True)


def _with_tag(name: str, model: nn.Module) -> str:
    return join_name(name, (getattr(model, "pretrained_cfg", None) or {}).get("tag"))


def _ratio(timing: LatencyComparison) -> str:
    return f"{timing.ratio:.2f} ({timing.ratio_quartiles[0]:.2f}-{timing.ratio_quartiles[1]:.2f})"
