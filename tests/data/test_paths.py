"""Data specifications whose folders are on a Windows drive, and names that lead out of their folder."""

from pathlib import Path

import pytest

from lamzoo.data import create_dataset
from lamzoo.data.moments import create_moment_dataset
from lamzoo.data.paths import existing_file, split_last
from lamzoo.data.retrieval import create_retrieval_dataset
from lamzoo.errors import DataError
from lamzoo.files import is_plain_name


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("photos", ("photos", None)),
        ("photos:labels.csv", ("photos", "labels.csv")),
        ("a:b:c", ("a:b", "c")),
        (r"C:\photos", (r"C:\photos", None)),
        (r"C:\photos:labels.csv", (r"C:\photos", "labels.csv")),
        (r"C:\photos:D:\labels.csv", (r"C:\photos", r"D:\labels.csv")),
        (r"photos:D:\labels.csv", ("photos", r"D:\labels.csv")),
    ],
)
def test_the_colon_of_a_drive_separates_nothing(text: str, parts: tuple[str, str | None]) -> None:
    assert split_last(text) == parts


@pytest.mark.parametrize(
    ("create", "spec"),
    [
        (create_dataset, r"imagefolder:C:\photos"),
        (create_dataset, r"imagelist:C:\photos:D:\labels.csv"),
        (create_dataset, r"npz:C:\photos"),
        (create_dataset, r"wds:C:\shards\{split}.tar"),
        (create_dataset, r"C:\photos"),
        (create_retrieval_dataset, r"msrvtt:C:\videos"),
        (create_retrieval_dataset, r"grid:C:\videos:mouth"),
        (create_moment_dataset, r"tvsum:C:\videos"),
        (create_moment_dataset, r"grid:C:\videos:both"),
    ],
)
def test_a_missing_folder_on_a_drive_is_named_whole(create, spec: str) -> None:
    folder = r"C:\shards" if "shards" in spec else r"C:\photos" if "photos" in spec else r"C:\videos"
    with pytest.raises(DataError) as caught:
        create(spec, "test")
    assert folder in str(caught.value).replace(r"\\", "\\")


@pytest.mark.parametrize("name", ["../a.npz", "{root}/a.npz", "sub/../../a.npz"])
def test_a_listed_name_that_leads_out_of_its_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "features" / "sub").mkdir(parents=True)
    for place in (tmp_path, tmp_path / "features", tmp_path / "features" / "sub"):
        (place / "a.npz").touch()
    assert existing_file(tmp_path / "features", "sub/a.npz") == tmp_path / "features" / "sub" / "a.npz"
    with pytest.raises(DataError, match="does not name a file below"):
        existing_file(tmp_path / "features", name.format(root=tmp_path))


@pytest.mark.parametrize("name", ["a.safetensors", "modèle 2.safetensors", "-x"])
def test_a_plain_name_is_a_file_of_its_folder_on_every_system(name: str) -> None:
    assert is_plain_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../a",
        "/a",
        "a/b",
        "a/",
        r"a\b",
        r"..\a",
        "C:a",
        r"\\host\a",
        "a\0",
        "a\n",
        "x" * 300,
        5,
        None,
        ["a"],
    ],
)
def test_anything_else_is_not_a_plain_name(name: object) -> None:
    assert not is_plain_name(name)
