"""How ``artefacts/`` was made. Run once, with lamzoo 0.1.0 (commit 0269061), and kept as a record: never updated.

    python -m tests.compatibility.make

``names.json`` lists what could be imported, ``expected.json`` what 0.1.0 itself read out of the files, and the whole
curve of each run that is kept half-way.
"""

from __future__ import annotations

import ast
import csv
import importlib
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file

import lamzoo
from lamzoo.data import create_dataset
from lamzoo.evaluation import evaluate
from lamzoo.training import load_recipe, train
from lamzoo.training.checkpoints import Checkpoints
from tests.compatibility.inputs import CLASSES, pixels, write_photos, write_speech
from tests.videos import pictures, write_clip

HERE = Path(__file__).resolve().parent / "artefacts"
ROOT = HERE.parents[2]
CHECKPOINTS = {"classification": 3, "retrieval": 3, "moments": 5, "captions": 4}  # written before the run was killed
QUERIES = ("red at the left", "blue by the right")
PROMISED = ("registry", "names", "weights", "search", "pruning", "evaluation", "adapters", "lam", "data", "models")
EXPECTED: dict[str, Any] = {}


class Killed(Exception):
    pass


def command(*arguments: object) -> str:
    line = [sys.executable, "-m", "lamzoo", *map(str, arguments)]
    return subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout


def anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    return entry


def make_run(task: str) -> None:
    """Trains a run whole for its curve and its model, and once more until it is killed."""
    recipe = HERE / "recipes" / f"{task}.toml"
    command("train", recipe, "--output", "whole")
    with Path("whole/metrics.csv").open(newline="") as file:
        EXPECTED[f"curve of {task}"] = list(csv.DictReader(file))
    if task != "classification":
        shutil.copytree("whole/model", HERE / "models" / task)
    shutil.rmtree("whole")

    save, written = Checkpoints.save, []

    def save_and_die(self: Any, accelerator: Any, state: Any) -> None:
        save(self, accelerator, state)
        written.append(state["update"])
        if len(written) == CHECKPOINTS[task]:
            raise Killed

    Checkpoints.save = save_and_die
    try:
        train(load_recipe(recipe))
    except Killed:
        EXPECTED[f"update of {task}"] = written[-1]
    Checkpoints.save = save
    with tarfile.open(HERE / "training" / f"{task}.tar.xz", "w:xz") as archive:
        archive.add("run", filter=anonymous)
    shutil.rmtree("run")


def make_vit() -> None:
    """Writes an image classifier, the same pruned, its exported programs, and what they answer."""
    torch.manual_seed(0)
    model = lamzoo.create_model(
        "lam_vit_micro", embed_dim=8, depth=2, num_classes=2, lam=lamzoo.LamConfig(keys="position", op="mul", rank=3)
    ).eval()
    with torch.no_grad():
        for parameter in lamzoo.lam_parameters(model):
            parameter.add_(torch.randn_like(parameter) * 0.3)
    lamzoo.save_pretrained(model, HERE / "models" / "vit", label_names=[*CLASSES])
    lamzoo.save_pretrained(model, HERE / "models" / "sharded", label_names=[*CLASSES], max_shard_bytes=16_000)
    save_file(lamzoo.lam_state_dict(model), HERE / "masks.safetensors")
    EXPECTED["logits of vit"] = model(pixels()).tolist()
    with lamzoo.capture_masks(model) as masks:
        model(pixels())
    EXPECTED["importance of vit"] = [*masks.values()][-1].importance[0].flatten().tolist()
    lamzoo.prune_tokens(model, keep=0.6, at=(0,))
    lamzoo.save_pretrained(model, HERE / "models" / "pruned", label_names=[*CLASSES])
    EXPECTED["logits of pruned"] = model(pixels()).tolist()
    for name in ("vit.onnx", "vit.pt2"):
        command("export", f"local-dir:{HERE / 'models' / 'vit'}", "--out", HERE / name, "--repeats", 2)


def make_state() -> None:
    """Writes the state of an evaluation that was killed after 20 of 40 images."""
    shutil.copytree(HERE / "models" / "vit", "model")
    options = ("--data", "imagefolder:photos", "--batch-size", 1, "--device", "cpu", "--json")
    EXPECTED["accuracy of vit"] = json.loads(command("eval", "local-dir:model", *options))

    def die(progress: Any) -> None:
        if progress.seen == 20:
            raise Killed

    model = lamzoo.create_model("local-dir:model", pretrained=True)
    try:
        evaluate(
            model, create_dataset("imagefolder:photos", "all"), batch_size=1, device="cpu", state="state.json",
            progress=die,
        )  # fmt: skip
    except Killed:
        content = json.loads(Path("state.json").read_text())
    content["partial"]["seconds"] = 1000.0  # a time to know it by
    content["key"]["first image"] = content["key"]["first image"].replace(os.getcwd(), "HERE")
    (HERE / "state.json").write_text(json.dumps(content, indent=1) + "\n")
    shutil.rmtree("model")


def make_index() -> None:
    """Writes an index of three clips, which are kept with it."""
    clips = HERE / "clips"
    clips.mkdir()
    for name, number in (("astronaut", 0), ("coffee", 1), ("rocket", 2)):
        write_clip(clips / f"{name}.mp4", pictures(6, (64, 48), name), fps=3)
        os.utime(clips / f"{name}.mp4", (1_700_000_000 + number,) * 2)
    shutil.copytree(clips, "clips")
    model = f"local-dir:{HERE / 'models' / 'retrieval'}"
    line = ("--videos", "clips", "--model", model, "--index", "index.safetensors", "--device", "cpu", "--no-sheet")
    found = json.loads(command("search", *QUERIES, *line, "--json"))
    EXPECTED["search"] = {
        entry["query"]: [[Path(match["path"]).name, match["score"]] for match in entry["matches"]]
        for entry in found["queries"]
    }
    shutil.copy("index.safetensors", HERE / "index.safetensors")


def make_scores() -> None:
    """Notes what the commands say of the models of the other tasks."""
    for task, data in (("retrieval", "speech:face"), ("moments", "speech:audio"), ("captions", "speech:audio")):
        line = ["eval", f"local-dir:{HERE / 'models' / task}", "--task", task, "--data", f"grid:{data}", "--split"]
        line += ["test", "--device", "cpu", "--json"]
        if task != "retrieval":
            file = HERE / ("moments.jsonl" if task == "moments" else "captions.json")
            line += ["--submission", str(file)]
        EXPECTED[f"scores of {task}"] = json.loads(command(*line))["metrics"]


def make_tables() -> None:
    """Writes the results of ``lamzoo bench`` and of an ablation, and what is made of them."""
    shutil.copytree(HERE / "models" / "vit", "vit")
    command("bench", "local-dir:vit", "--data", "imagefolder:photos", "--out", "bench.csv", "--device", "cpu",
            "--repeats", 2, "--threads", 1, "--max-batch", 2)  # fmt: skip
    shutil.copy("bench.csv", HERE / "bench.csv")
    EXPECTED["comparison"] = command("compare", "bench.csv", "--format", "csv")
    line = [sys.executable, "-m", "benchmarks.ablation.run", "--ablation", HERE / "ablation.toml", "--out", "out"]
    subprocess.run([*line, "--results", "ablation.csv"], check=True)
    shutil.copy("ablation.csv", HERE / "ablation.csv")
    line = [sys.executable, "-m", "benchmarks.ablation.table", "--ablation", HERE / "ablation.toml"]
    done = subprocess.run([*line, "--results", "ablation.csv"], check=True, stdout=subprocess.PIPE, text=True)
    EXPECTED["ablation"] = done.stdout


def public_names(module: ModuleType) -> list[str]:
    """Returns what a module offers: ``__all__``, or what it defines without an underscore, type variables left out."""
    if hasattr(module, "__all__"):
        return sorted(module.__all__)
    names: set[str] = set()
    for node in ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8")).body:
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.AnnAssign(target=ast.Name(id=name)):
                names.add(name)
            case ast.Assign(targets=[ast.Name(id=name)]):
                names.add(name)
    return sorted(name for name in names if name[0] != "_" and not isinstance(getattr(module, name), TypeVar))


def make_names() -> None:
    """Writes ``names.json``: what may be imported, by module, and what ``import lamzoo`` alone has to reach."""
    modules = ["lamzoo", "lamzoo.data.captions", *(f"lamzoo.{name}" for name in PROMISED)]
    modules += [module.name for module in pkgutil.walk_packages(lamzoo.models.__path__, "lamzoo.models.")]
    imports = {module: set(public_names(importlib.import_module(module))) for module in modules}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for module, names in re.findall(r"from (lamzoo[\w.]*) import ([\w, ]+)", readme):
        imports.setdefault(module, set()).update(names.split(", "))
    for card in sorted((ROOT / "registry").glob("*.toml")):
        for model in tomllib.loads(card.read_text(encoding="utf-8"))["models"].values():
            module, name = model["builder"].split(":")
            imports.setdefault(module, set()).add(name)
    attributes = set(re.findall(r"\blamzoo(?:\.\w+)+", readme))
    content = {"imports": {module: sorted(names) for module, names in sorted(imports.items()) if names}}
    content |= {"attributes": sorted(attributes)}
    (HERE / "names.json").write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    make_names()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    for name in ("models", "training", "clips"):
        shutil.rmtree(HERE / name, ignore_errors=True)
        if name != "clips":
            (HERE / name).mkdir()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        write_photos(Path("photos"))
        write_speech(Path("speech"))
        make_vit()
        make_state()
        for task in CHECKPOINTS:
            make_run(task)
        make_index()
        make_scores()
        make_tables()
    (HERE / "expected.json").write_text(json.dumps(EXPECTED, indent=1) + "\n")


if __name__ == "__main__":
    main()
