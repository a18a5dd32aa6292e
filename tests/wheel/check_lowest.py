"""Installs the lowest versions that pyproject.toml states into an empty environment, and runs the core tests there.

Run as a script; exits non-zero with the reason when anything fails. A torch for CUDA is several gigabytes: set
``TORCH_INDEX`` to an index of CPU builds, as for ``make test``, where one is reachable.
"""

import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = ("clip",)
TOOLS = ("hypothesis", "pytest")
TESTS = (
    "tests/lam",
    "tests/adapters/test_mha.py",
    "tests/adapters/test_open_clip.py",
    "tests/adapters/test_timm.py",
    "tests/models/test_micro.py",
    "tests/registry/test_create_model.py",
    "tests/weights/test_loading.py",
)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="lamzoo-lowest-") as folder:
        run_tests(install(Path(folder)))
    print("lowest versions passed")


def lowest() -> dict[str, str]:
    """Returns the lowest version of each dependency of lamzoo and of the tested extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *(need for extra in EXTRAS for need in project["optional-dependencies"][extra])]
    bounds = (re.match(r"([\w.-]+)>=([\w.]+)", requirement) for requirement in wanted)
    return {bound[1]: bound[2] for bound in bounds if bound is not None}


def install(work: Path) -> Path:
    """Installs lamzoo with the lowest versions into a new environment; returns its Python."""
    constraints = work / "constraints.txt"
    constraints.write_text("".join(f"{name}=={version}\n" for name, version in lowest().items()), encoding="utf-8")
    environment = os.environ | {"VENV": str(work / "venv"), "PYTHON": sys.executable}
    target = f"{ROOT}[{','.join(EXTRAS)}]"
    _run(
        ["sh", ROOT / ".ci" / "install", "--quiet", "--constraint", constraints, "--editable", target, *TOOLS],
        environment,
    )
    return work / "venv" / "bin" / "python"


def run_tests(python: Path) -> None:
    """Runs the core tests, which set the hub's environment variables themselves."""
    keep = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_"))}
    _run([python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS], keep)


def _run(command: list[str | Path], environment: dict[str, str]) -> None:
    print("$", *command, flush=True)
    if code := subprocess.run(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL).returncode:
        sys.exit(f"'{' '.join(map(str, command))}' ended with {code}")


if __name__ == "__main__":
    main()
