"""Pages of the documentation: links lead to files, the README is short, the API reference is complete."""

from __future__ import annotations

import importlib
import re
import tomllib
from pathlib import Path

import lamzoo

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REPOSITORY = PROJECT["urls"]["Repository"]
RAW = REPOSITORY.replace("github.com", "raw.githubusercontent.com")


def test_links_into_the_repository_lead_to_files() -> None:
    pattern = rf"(?:{REPOSITORY}/(?:blob|tree)|{RAW})/main(?:/([^)\s#\"]+))?"
    found = [(page.name, path) for page in PAGES for path in re.findall(pattern, page.read_text(encoding="utf-8"))]
    assert found
    assert not [(page, path) for page, path in found if not (ROOT / path).exists()]


def test_links_of_the_readme_are_absolute() -> None:
    links = re.findall(r"\]\(([^)]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert links
    assert not [link for link in links if not link.startswith("https://")]


def test_readme_fits_on_a_screen_or_three() -> None:
    assert (ROOT / "README.md").read_text(encoding="utf-8").count("\n") <= 200


def test_links_between_anchors_of_the_repository_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(rf"{REPOSITORY}/blob/main/([^)\s#]+)#([\w-]+)", text)
    assert links
    for target, anchor in links:
        headings = re.findall(r"^#+ (.*)$", (ROOT / target).read_text(encoding="utf-8"), re.MULTILINE)
        assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


# Public names that serve lamzoo's own modules, or type checkers.
NOT_SHOWN = {
    "evaluation.Precision", "evaluation.check_batches", "evaluation.default_state_path", "export.Format",
    "lam.SharedState", "registry.obtain", "tasks.TASKS", "tasks.metric_table", "tasks.task_of_predictions",
    "training.AnyRecipe", "weights.join", "weights.shard",
}  # fmt: skip
ROOMS = (
    "adapters", "evaluation", "export", "lam", "profiling", "reduction", "registry", "report", "tasks", "training",
    "weights",
)  # fmt: skip


def test_the_api_reference_has_every_public_name() -> None:
    shown = set(re.findall(r"^::: lamzoo\.([\w.]+)$", (ROOT / "docs/reference/api.md").read_text(), re.MULTILINE))
    of_rooms = {f"{room}.{name}" for room in ROOMS for name in importlib.import_module(f"lamzoo.{room}").__all__}
    missing = {name for name in of_rooms - shown if name.rpartition(".")[2] not in lamzoo.__all__}
    assert missing == NOT_SHOWN
    assert "errors" in shown
    assert shown >= set(lamzoo.__all__) - {"LamzooError"}


def test_pictures_are_small() -> None:
    for picture in (ROOT / "docs" / "images").iterdir():
        assert picture.stat().st_size < 150_000, picture.name


def test_the_gallery_has_its_pictures_and_they_are_small() -> None:
    page = (ROOT / "docs" / "how-to" / "gallery.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"\(\.\./images/(.*?)\)", page))
    there = {picture.name: picture.stat().st_size for picture in (ROOT / "docs" / "images").glob("gallery-*")}
    assert there.keys() == shown
    assert sum(there.values()) < 300_000
    assert page.count("```bash") == len(shown)


def test_the_installation_page_lists_the_extras() -> None:
    shown = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs/start/install.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(shown) == PROJECT["optional-dependencies"].keys() - {"demo", "docs", "test", "dev"}


def test_the_data_page_lists_the_specifications() -> None:
    page = (ROOT / "docs/reference/data.md").read_text(encoding="utf-8")
    factories = (
        lamzoo.data.create_dataset,
        lamzoo.data.retrieval.create_retrieval_dataset,
        lamzoo.data.moments.create_moment_dataset,
        lamzoo.data.captions.create_caption_dataset,
    )
    for factory in factories:
        kinds = set(re.findall(r"``(\w+):", factory.__doc__ or ""))
        assert kinds
        assert not [kind for kind in kinds if f"| `{kind}:" not in page], factory
