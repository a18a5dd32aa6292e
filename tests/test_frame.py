"""The project's frame: version, files, imports, and the wheel."""

import ast
import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import lamzoo
from tests.forked import run_code

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MODULES = sorted((ROOT / "lamzoo").rglob("*.py"))

# What only some commands need: found when used, never when lamzoo is imported.
OPTIONAL = {
    "accelerate", "av", "datasets", "h5py", "itables", "matplotlib", "onnx", "onnxruntime", "onnxscript", "open_clip",
    "plotly", "pycocoevalcap", "skimage", "tensorboard", "typer", "webdataset",
}  # fmt: skip


def test_version_is_the_same_everywhere() -> None:
    version = lamzoo.__version__
    assert importlib.metadata.version("lamzoo") == version, "install lamzoo again: pip install --editable ."
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_file_begins_with_a_sentence_and_is_short(path: Path) -> None:
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), "no module docstring"
    assert text.count("\n") <= 600


def test_import_is_silent_light_and_lazy() -> None:
    probe = """
import json, sys, time
import timm, torch
before, start = set(sys.modules), time.process_time()
import lamzoo
seconds = time.process_time() - start
print(json.dumps({"seconds": seconds, "loaded": sorted({name.split(".")[0] for name in set(sys.modules) - before})}))
"""
    for _ in range(3):
        done = run_code(probe)
        assert done.returncode == 0, done.stderr
        (line,) = done.stdout.splitlines()
        report = json.loads(line)
        assert done.stderr == ""
        assert not OPTIONAL & set(report["loaded"])
        if report["seconds"] < 2:
            return
    pytest.fail(f"import lamzoo costs {report['seconds']} s on top of torch and timm, three times")


def test_commands_for_images_need_no_library_of_other_extras() -> None:
    probe = """
import sys
missing = "accelerate", "av", "datasets", "h5py", "onnx", "open_clip", "plotly", "scipy", "transformers"
sys.modules |= dict.fromkeys(missing)
import lamzoo.evaluation, lamzoo.export, lamzoo.profiling, lamzoo.report.demo
from lamzoo.report import explain
from lamzoo.cli.app import main
main(["info", "lam_vit_micro"])
"""
    done = run_code(probe)
    assert done.returncode == 0, done.stderr


def test_submodules_are_found_after_importing_lamzoo_alone() -> None:
    packages = [".".join(path.parent.relative_to(ROOT).parts) for path in MODULES if path.name == "__init__.py"]
    pages = "\n".join(page.read_text() for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")))
    documented = set(re.findall(r"(?<![/.\w])lamzoo(?:\.[a-z_]+)+(?=\.[A-Za-z_]+|\b)", pages))
    assert {"lamzoo.evaluation.moment_metrics", "lamzoo.data.captions.create_caption_dataset"} <= documented
    probe = f"""
import operator
import lamzoo
assert lamzoo.models.describer.generation.__name__ == "lamzoo.models.describer.generation"
for name in {sorted({*packages, *documented} - {"lamzoo"})}:
    operator.attrgetter(name.removeprefix("lamzoo."))(lamzoo)
for wrong in ("evaluations", "data.caption", "__main__"):
    try:
        operator.attrgetter(wrong)(lamzoo)
    except AttributeError as error:
        assert "has no attribute" in str(error)
    else:
        raise AssertionError(wrong)
"""
    done = run_code(probe)
    assert done.returncode == 0, done.stderr


def test_public_names_exist_and_are_documented() -> None:
    for name in lamzoo.__all__:
        assert getattr(lamzoo, name).__doc__, name


def test_core_dependencies_are_few_and_no_extra_repeats_them() -> None:
    core = set(PROJECT["project"]["dependencies"])
    assert len(core) <= 10
    for extra, wanted in PROJECT["project"]["optional-dependencies"].items():
        assert not core & set(wanted), extra


def test_the_lock_pins_every_dependency_within_its_bounds_and_by_hash() -> None:
    entries = re.split(r"\n(?=\S)", (ROOT / "requirements" / "dev.lock").read_text())
    pinned: dict[str, list[str]] = {}
    for entry in entries:
        found = re.match(r"([\w.-]+)==([\w.]+)", entry)
        if found:
            assert "--hash=sha256:" in entry, found[0]
            pinned.setdefault(canonicalize_name(found[1]), []).append(found[2])
    extras = PROJECT["project"]["optional-dependencies"]
    locked = [wanted for name, wanted in extras.items() if name != "app"]  # which the development environment lacks
    for text in [*PROJECT["project"]["dependencies"], *(text for wanted in locked for text in wanted)]:
        wanted = Requirement(text)
        if wanted.name != "lamzoo":
            versions = pinned.get(canonicalize_name(wanted.name), [])
            assert versions, f"{wanted.name} is not in requirements/dev.lock; run make lock"
            assert all(version in wanted.specifier for version in versions), f"{wanted}: {versions}; run make lock"


@pytest.mark.slow
def test_wheel_works_in_an_empty_environment() -> None:
    subprocess.run([sys.executable, ROOT / "tests" / "wheel" / "check_wheel.py"], check=True, stdin=subprocess.DEVNULL)


@pytest.mark.slow
def test_the_lowest_stated_versions_work() -> None:
    subprocess.run([sys.executable, ROOT / "tests" / "wheel" / "check_lowest.py"], check=True, stdin=subprocess.DEVNULL)
