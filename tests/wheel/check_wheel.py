"""Builds the wheel, installs it into an empty environment, and uses it there.

Run as a script (``make wheel-test``); exits non-zero with the reason when anything is missing.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="lamzoo-wheel-") as folder:
        work = Path(folder)
        wheel = build(work / "dist")
        check_contents(wheel)
        use(install(wheel, work), work / "elsewhere")
    print("wheel test passed")


def build(dist: Path) -> Path:
    """Builds the source distribution, and from it, as an index would have it, the wheel."""
    _run([sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", dist], cwd=ROOT)
    (sdist,) = dist.glob("*.tar.gz")
    shutil.unpack_archive(sdist, dist)
    source = dist / sdist.name.removesuffix(".tar.gz")
    _run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", dist], cwd=source)
    (wheel,) = dist.glob("*.whl")
    return wheel


def check_contents(wheel: Path) -> None:
    """Every module, card, weight and recipe is in the wheel, and nothing that was compiled or cached."""
    inside = set(zipfile.ZipFile(wheel).namelist())
    wanted = {path.relative_to(ROOT).as_posix() for path in (ROOT / "lamzoo").rglob("*.py")} | {"lamzoo/py.typed"}
    for folder, suffix in {"registry": ".toml", "weights": ".safetensors", "benchmarks/recipes": ".toml"}.items():
        files = [path for path in (ROOT / folder).rglob("*") if path.is_file()]
        if not any(path.suffix == suffix for path in files):
            sys.exit(f"{folder}/ holds no {suffix} to ship")
        data = f"lamzoo/_data/{Path(folder).name}"
        wanted |= {f"{data}/{path.relative_to(ROOT / folder).as_posix()}" for path in files}
    if missing := sorted(wanted - inside):
        sys.exit(f"the wheel lacks {', '.join(missing)}")
    if not any(name.endswith("licenses/LICENSE") for name in inside):
        sys.exit("the wheel lacks its licence")
    if strays := sorted(name for name in inside if name.endswith(".pyc")):
        sys.exit(f"the wheel holds {', '.join(strays)}")


def install(wheel: Path, work: Path) -> Path:
    """Installs the wheel, with the dependency versions of this environment, into a new one; returns its bin folder."""
    constraints = work / "constraints.txt"
    pins = {f"{d.name}=={d.version}" for d in distributions() if d.name not in {"lamzoo", "pip", "setuptools"}}
    constraints.write_text("\n".join(sorted(pins)) + "\n")
    environment = os.environ | {"VENV": str(work / "venv"), "PYTHON": sys.executable}
    _run(["sh", ROOT / ".ci" / "install", "--quiet", "--constraint", constraints, wheel], cwd=work, env=environment)
    return work / "venv" / "bin"


def use(binaries: Path, elsewhere: Path) -> None:
    """Runs the probe and the command line in a folder that has nothing to do with the checkout, without the hub."""
    elsewhere.mkdir()
    keep = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment = keep | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(elsewhere / "hf"), "CUDA_VISIBLE_DEVICES": ""}
    probe = ROOT / "tests" / "wheel" / "probe.py"
    for command in (
        [binaries / "python", "-I", probe, "image.png"],
        [binaries / "lamzoo", "list"],
        [binaries / "lamzoo", "predict", "lam_vit_micro", "image.png"],
    ):
        _run(command, cwd=elsewhere, env=environment)


def _run(command: list[str | Path], *, cwd: Path, env: dict[str, str] | None = None) -> None:
    print("$", *command, flush=True)
    if code := subprocess.run(command, cwd=cwd, env=env, stdin=subprocess.DEVNULL).returncode:
        sys.exit(f"'{' '.join(map(str, command))}' ended with {code}")


if __name__ == "__main__":
    main()
