"""The command ``lamzoo explain``: a model and an image, or a query about a video, in; a picture of its masks out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lamzoo.cli import _output as out
from lamzoo.cli._options import Checkpoint, Device, Name, load_model
from lamzoo.errors import ConfigError, DataError, UnsupportedHostError

if TYPE_CHECKING:
    from lamzoo.data.moments import MomentDataset

_NAMED = 5  # queries in an error


def explain(
    name: Name,
    output: Annotated[Path, typer.Option("--out", metavar="FILE.png", help="The picture to write.")],
    image: Annotated[Path | None, typer.Argument(metavar="IMAGE", help="An image file, or --data instead.")] = None,
    data: Annotated[str | None, typer.Option(metavar="SPEC", help=(
        "Queries about videos: qvhighlights:DIR, charades:DIR, tvsum:DIR[:DOMAIN] or grid:DIR."))] = None,
    split: Annotated[str | None, typer.Option(help="Which part of the data [test].")] = None,
    query: Annotated[str | None, typer.Option(metavar="QID", help="Which query [the first of the split].")] = None,
    checkpoint: Checkpoint = None,
    device: Device = "auto",
) -> None:  # fmt: skip
    """Draws a model's masks over a photograph, or with --data over the time of a video, into a PNG."""
    if image is None and data is None:
        raise ConfigError("there is nothing to explain; name an IMAGE, or with --data a data set of moments")
    if image is not None and data is not None:
        raise ConfigError(f"the image {image} and --data {data} make two pictures; leave one of them out")
    if data is not None:
        _explain_moments(name, data, split or "test", query, output, checkpoint, device)
    elif image is not None:
        given = next((option for option, value in (("--split", split), ("--query", query)) if value is not None), None)
        if given is not None:
            raise ConfigError(f"{given} means nothing for an image; leave it out, or give --data in the image's place")
        _explain_image(name, image, output, checkpoint, device)
    out.print_line(out.printable(output))


def _explain_image(name: str, image: Path, output: Path, checkpoint: Path | None, device: str) -> None:
    from lamzoo.data import open_image
    from lamzoo.evaluation import resolve_device
    from lamzoo.models.moment_detr.model import MomentNetwork
    from lamzoo.report import explain

    target = resolve_device(device)
    open_image(image)
    model = load_model(name, checkpoint)
    if isinstance(model, MomentNetwork):
        raise UnsupportedHostError(f"{name} looks at videos and sentences, not at images; give it --data instead")
    explain(model.to(target), image, output)


def _explain_moments(
    name: str, data: str, split: str, query: str | None, output: Path, checkpoint: Path | None, device: str
) -> None:
    from lamzoo.data.moments import create_moment_dataset
    from lamzoo.evaluation import resolve_device
    from lamzoo.report import explain_moments

    target = resolve_device(device)
    dataset = create_moment_dataset(data, split)
    index = 0 if query is None else _find(dataset, query)
    explain_moments(load_model(name, checkpoint).to(target), dataset, index, output)


def _find(dataset: MomentDataset, qid: str) -> int:
    qids = [str(query.qid) for query in dataset.queries]  # QVHighlights' are numbers, others' are not
    if qid in qids:
        return qids.index(qid)
    few = ", ".join(map(repr, qids[:_NAMED]))
    more = f" and {len(qids) - _NAMED} more" if len(qids) > _NAMED else ""
    raise DataError(f"the split {dataset.split!r} of {dataset.spec} has no query {qid!r}; it has {few}{more}")
