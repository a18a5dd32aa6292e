"""Training in two processes on this machine, as a user starts it."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def train_in_two(table: dict[str, Any], output: Path) -> list[dict[str, Any]]:
    """Trains a recipe, given as nested values, under torchrun, and returns the rows of its ``metrics.csv``."""
    recipe = output.with_suffix(".json")
    recipe.write_text(json.dumps({**table, "run": {**table["run"], "output": str(output)}}))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "lamzoo"]
    done = subprocess.run(
        [*launch, "train", str(recipe)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return list(csv.DictReader((output / "metrics.csv").open()))
