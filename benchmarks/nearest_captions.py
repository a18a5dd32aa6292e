"""Captions of the most similar photographs: a nearest-neighbour baseline for captioning photographs.

    python -m benchmarks.nearest_captions --data flickr8k:../shared/data/flickr8k

Among the captions of the nearest training photographs, selects the one most similar to the others (Devlin et al., arXiv
1505.04467, here with word overlap as similarity and downscaled pixels as features).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import timm
import torch
from numpy.typing import NDArray

from lamzoo.data.captions import CaptionDataset, create_caption_dataset
from lamzoo.evaluation import word_overlap
from lamzoo.evaluation.captions.coco_results import write_captions
from lamzoo.evaluation.captions.evaluate import caption_scores
from lamzoo.reading import to_json


def thumbnails(dataset: CaptionDataset) -> NDArray[np.float32]:
    """Returns the mean colours of each photograph's patches, ``(N, patches * 3)``, normalised to length 1."""
    small = []
    for index in range(len(dataset)):
        patches = dataset.read(index)["image"].features
        small.append(patches.reshape(len(patches), -1, 3).mean(axis=1).ravel())
    stacked = np.stack(small)
    return stacked / np.linalg.norm(stacked, axis=1, keepdims=True)


def consensus(captions: Sequence[str]) -> str:
    """Returns the caption with the highest word overlap with the others; the first one among ties."""
    alike = word_overlap(captions, captions)
    return captions[int(alike.sum(axis=1).argmax())]


def nearest_captions(train: CaptionDataset, dataset: CaptionDataset, neighbours: int) -> dict[str, str]:
    """Returns a caption for each item of a data set, taken from a similar item of ``train``."""
    similar = thumbnails(dataset) @ thumbnails(train).T
    found = {}
    for item, row in zip(dataset.items, similar, strict=True):
        nearest = np.argsort(-row, kind="stable")[:neighbours]
        texts = [caption.lower() for index in nearest for caption in train.items[index].captions]
        found[item.id] = consensus(texts)
    return found


def main() -> None:
    """Prints the scores as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", required=True, metavar="SPEC", help="data set of photographs with captions, flickr8k:DIR"
    )
    parser.add_argument("--split", default="test")
    parser.add_argument("--neighbours", type=int, default=20, help="number of nearest photographs")
    parser.add_argument(
        "--out", type=Path, metavar="FILE.json", help="also write the captions in COCO's results format"
    )
    args = parser.parse_args()
    train, dataset = (create_caption_dataset(args.data, split) for split in ("train", args.split))
    captions = nearest_captions(train, dataset, args.neighbours)
    if args.out is not None:
        write_captions(args.out, captions)
    versions = {"torch": torch.__version__, "timm": timm.__version__}
    facts = {"data": args.data, "split": dataset.split, "neighbours": args.neighbours, "versions": versions}
    print(to_json({**facts, "scores": caption_scores(dataset, captions)}, indent=2))


if __name__ == "__main__":
    main()
