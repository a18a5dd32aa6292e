"""ImageNet-1k's path from end to end, on generated images in its official layouts."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import timm.data
from PIL import Image

from lamzoo.training import load_recipe

RECIPES = Path(__file__).parents[3] / "benchmarks" / "recipes"
NAMES = ("imagenet1k_lam_vit_small.toml", "imagenet1k_lam_vit_small.finetune.toml")
LABELS = (0, 7, 389, 999)  # four of the thousand classes


def jpeg(label: int, number: int) -> bytes:
    """An image whose colour says its label."""
    pixels = np.random.default_rng((label, number)).integers(0, 60, (40, 48, 3))
    pixels += np.array([(190, 20, 20), (20, 190, 20), (20, 20, 190), (190, 190, 20)])[LABELS.index(label)]
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "JPEG")
    return file.getvalue()


def write_shard(path: Path, images: list[tuple[str, bytes, int]]) -> None:
    with tarfile.open(path, "w") as archive:
        for key, image, label in images:
            for extension, content in (("cls", str(label).encode()), ("jpg", image), ("json", b"{}")):
                entry = tarfile.TarInfo(f"{key}.{extension}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 training and 64 validation images: shards, ``val/<wnid>/``, a class index file and ReaL labels."""
    root = tmp_path_factory.mktemp("imagenet")
    wnids = list(timm.data.ImageNetInfo().label_names())
    for shard in range(2):
        labels = [LABELS[number % 4] for number in range(120)]
        images = [
            (f"{wnids[label]}_{shard}_{number}", jpeg(label, 1000 * shard + number), label)
            for number, label in enumerate(labels)
        ]
        write_shard(root / f"imagenet1k-train-{shard:04}.tar", images)
    validation = [(f"ILSVRC2012_val_{number + 1:08}", LABELS[number % 4]) for number in range(64)]
    packed = [(key, jpeg(label, 5000 + number), label) for number, (key, label) in enumerate(validation)]
    write_shard(root / "imagenet1k-validation-00.tar", packed)
    for key, image, label in packed:
        path = root / "val" / wnids[label] / f"{key}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
    index = {str(number): [wnid, f"class {number}"] for number, wnid in enumerate(wnids)}
    (root / "imagenet_class_index.json").write_text(json.dumps(index))
    real = [[] if number % 8 == 0 else [label, 5] for number, (_, label) in enumerate(validation)]
    (root / "real.json").write_text(json.dumps(real))
    return root


@pytest.mark.parametrize("name", NAMES)
def test_the_recipe_is_whole_and_has_deits_augmentation(name: str) -> None:
    recipe = load_recipe(RECIPES / name)
    augment = recipe.augment
    assert augment.auto_augment == "rand-m9-mstd0.5-inc1"
    assert (augment.mixup, augment.cutmix, augment.random_erasing, augment.label_smoothing) == (0.8, 1.0, 0.25, 0.1)
    assert recipe.model.kwargs["num_classes"] == 1000
    assert recipe.data.source.startswith("wds:")
    assert f"-m lamzoo train benchmarks/recipes/{name}" in (RECIPES / name).read_text()


def command(*arguments: object, processes: int = 0) -> str:
    """Runs the command line in a process of its own, or in several under torchrun; returns its output."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes else []
    done = subprocess.run(
        [sys.executable, *torchrun, "-m", "lamzoo", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_two_processes_train_from_shards_and_the_validation_folder_is_scored(imagenet: Path, tmp_path: Path) -> None:
    changes = (
        "model.name=lam_vit_micro",
        "model.kwargs={num_classes=1000, drop_path_rate=0.1}",
        f"data.source=wds:{imagenet}/imagenet1k-{{split}}-*.tar",
        "data.workers=1",
        "data.scan=true",
        "optimizer.lr=2e-3",
        "schedule.epochs=1",
        "schedule.warmup_epochs=0",
        f"run.output={tmp_path / 'run'}",
        "run.batch_size=24",
        "run.device=cpu",
    )
    command("train", RECIPES / NAMES[0], *changes, processes=2)
    assert (tmp_path / "run" / "metrics.csv").read_text().count("\n") == 2
    common = ("eval", f"local-dir:{tmp_path / 'run' / 'model'}", "--device", "cpu", "--json")
    mapped = ("--class-map", imagenet / "imagenet_class_index.json", "--real-labels", imagenet / "real.json")
    record = json.loads(command(*common, "--data", f"imagefolder:{imagenet / 'val'}", *mapped))
    assert (record["samples"], record["real_samples"], record["skipped"]) == (64, 56, 0)
    shards = json.loads(command(*common, "--data", f"wds:{imagenet}/imagenet1k-validation-*.tar", *mapped[2:]))
    assert [shards[key] for key in ("top1", "top5", "real_top1")] == [
        record[key] for key in ("top1", "top5", "real_top1")
    ]
