import io
import json

import numpy as np
import pytest
from rich.console import Console

from lamzoo.errors import DataError, MissingExtraError
from lamzoo.evaluation import resolve_device
from lamzoo.lam import LamConfig
from lamzoo.profiling.latency import device_label
from lamzoo.report import demo


@pytest.fixture
def models(build, monkeypatch):
    """The models with random weights, in place of the bundled ones; few repeats and two photographs."""

    def create_model(name, pretrained):
        assert pretrained
        return build(LamConfig() if name.startswith("lam_") else None)

    monkeypatch.setattr(demo, "create_model", create_model)
    monkeypatch.setattr(demo, "_REPEATS", {1: 2, 2: 2})
    monkeypatch.setattr(demo, "_PHOTOGRAPHS", demo._PHOTOGRAPHS[:2])


@pytest.fixture
def cifar10(photo, tmp_path):
    """The same image once in each class, in the layout that `npz:` reads."""
    folder = tmp_path / "data"
    folder.mkdir()
    buffer = io.BytesIO()
    photo.resize((32, 32)).save(buffer, "JPEG")
    one = np.frombuffer(buffer.getvalue(), dtype=np.uint8)
    np.savez(folder / "test.npz", jpeg=np.tile(one, 10), offsets=np.arange(11) * len(one), labels=np.arange(10))
    classes = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (folder / "classes.json").write_text(json.dumps(classes))
    return folder


def test_demo_shows_everything_and_replaces_older_files(models, cifar10, tmp_path):
    out = tmp_path / "[new]" / "out"
    out.mkdir(parents=True)
    for name in ("cat.html", "masks-cat.png"):
        (out / name).write_text("older")
    text = io.StringIO()
    demo.run(out, cifar10, console=Console(file=text, width=160))
    shown = text.getvalue()
    for part in ("torch ", "merged to 63%", "fused", "cat ", "GMACs", "10 test images", "10.00", "[new]"):
        assert part in shown
    assert device_label(resolve_device("auto")) in " ".join(shown.partition("CPU threads")[0].split())
    names = ["cat-merged.html", "cat.html", "masks-cat.png", "masks-rocket.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert all((out / name).stat().st_size > 1000 for name in names)
    assert "rocket are of none of their classes" in " ".join(shown.split())
    assert all(str(path) in shown for path in out.iterdir())


@pytest.mark.slow
def test_tour_says_of_every_model_whether_it_finds_the_cat(tmp_path):
    text = io.StringIO()
    demo.run(tmp_path, console=Console(file=text, width=200))
    rows = [line for line in text.getvalue().splitlines() if " yes " in line or " no: " in line]
    assert len(rows) == 5
    assert any("lam_vit_tiny_patch8_64, merged to 63%" in row and " 100 " in row for row in rows)
    for path in ("cat.html", "cat-merged.html"):
        assert (tmp_path / path).stat().st_size > 100_000


def test_photographs_are_real_files_in_the_wheel():
    photographs = demo.find_photographs()
    assert [photograph.name for photograph in photographs] == ["cat", "rocket", "coffee", "astronaut"]
    assert all(photograph.path.stat().st_size > 100_000 for photograph in photographs)
    assert [photograph.name for photograph in photographs if photograph.answers] == ["cat"]


def test_missing_scikit_image_names_the_extra(monkeypatch):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"lamzoo\[demo\]"):
        demo.find_photographs()


def test_bad_folders_are_refused_before_a_model_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "create_model", None)
    with pytest.raises(DataError, match="no-such-folder"):
        demo.run(tmp_path / "out", tmp_path / "no-such-folder")
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file can't be created"):
        demo.run(tmp_path / "file")
