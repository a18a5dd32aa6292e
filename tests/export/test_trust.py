"""Exported programs from elsewhere: none runs code unless it is trusted, and their metadata are checked."""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import stat
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import lamzoo
from lamzoo import export_model, load_exported
from lamzoo.errors import ConfigError, ExportError, UntrustedProgramError
from lamzoo.export import ExportedModel
from tests.forked import run_code


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in both formats, exported with a cache of its own, ``cache``."""
    folder = tmp_path_factory.mktemp("programs")
    torch.manual_seed(0)
    model = lamzoo.create_model("lam_vit_micro", num_classes=3, img_size=16, embed_dim=16, depth=1, num_heads=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        export_model(model, folder / "m.pt2")
        export_model(model, folder / "m.onnx")
    return folder


class Canary:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def poisoned(source: Path, target: Path, canary: Path) -> Path:
    """Copies a program, with sample inputs whose unpickling creates ``canary``."""
    sample = io.BytesIO()
    torch.save((Canary(canary),), sample)
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, sample.getvalue() if "sample_inputs" in name else old.read(name))
    return target


def test_a_program_from_elsewhere_runs_no_code_unless_trusted(folder: Path, tmp_path: Path) -> None:
    path = poisoned(folder / "m.pt2", tmp_path / "hostile.pt2", tmp_path / "executed")
    with pytest.raises(UntrustedProgramError, match=r"hostile\.pt2 was exported elsewhere.*--trust.*ONNX") as caught:
        load_exported(path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()
    with pytest.raises(ExportError, match="damaged"):  # torch finds no inputs in the sample, having unpickled it
        load_exported(path, trust=True)
    assert (tmp_path / "executed").exists()


def test_torch_logs_nothing_about_a_damaged_program(folder: Path, tmp_path: Path, caplog: Any) -> None:
    path = tmp_path / "m.pt2"
    path.write_bytes((folder / "m.pt2").read_bytes()[:5000])
    with pytest.raises(ExportError, match="or is damaged"):
        load_exported(path, trust=True)
    assert caplog.text == ""


def test_trust_is_the_users_and_outlives_the_process(folder: Path, tmp_path: Path) -> None:
    code = "import sys; import lamzoo; lamzoo.load_exported(sys.argv[1])"
    mine = run_code(code, str(folder / "m.pt2"), env={"XDG_CACHE_HOME": str(folder / "cache")})
    assert mine.returncode == 0, mine.stderr
    of_another = run_code(code, str(folder / "m.pt2"), env={"XDG_CACHE_HOME": str(tmp_path)})
    assert "UntrustedProgramError" in of_another.stderr
    (record,) = (folder / "cache" / "lamzoo" / "trusted-programs").iterdir()
    assert stat.S_IMODE(record.stat().st_mode) == 0o600
    assert record.read_text() == str(folder / "m.pt2")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="only root can give a file to another user")
def test_records_of_another_user_are_no_trust(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lamzoo.export import trust

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    program = poisoned(folder / "m.pt2", tmp_path / "m.pt2", tmp_path / "executed").read_bytes()
    trust.trust_program(program, tmp_path / "m.pt2")
    (record,) = (tmp_path / "lamzoo" / "trusted-programs").iterdir()
    os.chown(record, 65534, 65534)
    monkeypatch.setattr(trust, "_trusted_here", set())  # as in another process
    with pytest.raises(UntrustedProgramError):
        trust.check_trusted(program, tmp_path / "m.pt2")


def test_a_cache_that_cannot_be_written_is_a_warning_and_the_program_is_loaded_in_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.manual_seed(1)
    model = lamzoo.create_model("lam_vit_micro", num_classes=3, img_size=16, embed_dim=16, depth=1, num_heads=2)
    with caplog.at_level(logging.WARNING, "lamzoo"):
        export_model(model, tmp_path / "m.pt2")
    assert "m.pt2 is not recorded as trusted" in caplog.text
    assert load_exported(tmp_path / "m.pt2").num_classes == 3


def test_our_programs_contain_no_pickle(folder: Path) -> None:
    with zipfile.ZipFile(folder / "m.pt2") as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    assert any("weights" in name for name in content)
    for name, data in content.items():
        assert not zipfile.is_zipfile(io.BytesIO(data)), f"{name} is a file of torch.save"
        assert not (data.startswith(b"\x80") and data.endswith(pickle.STOP)), f"{name} is a pickle"
        if name.endswith("_config.json"):
            assert not any(entry["use_pickle"] for entry in json.loads(data)["config"].values())


GOOD = {"input_size": [3, 16, 16], "num_classes": 3, "mean": [0.5] * 3, "std": [0.5] * 3, "label_names": list("abc")}


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ("[" * 10**5, "nested too deeply"),
        ("{", "is not a program that lamzoo exported"),
        ("[]", "lacks the preprocessing"),
        ("{}", "lacks the preprocessing"),
        ({"num_classes": None}, "lacks the preprocessing"),
        ({"num_classes": "x"}, 'num_classes is "x"'),
        ({"input_size": ["3", "16", "16"]}, "input_size"),
        ({"input_size": [3, 0, 16]}, "input_size"),
        ({"std": [0, 0, 0]}, "std is"),
        ({"mean": "x"}, 'mean is "x"'),
        ({"interpolation": "x"}, "interpolation is 'x'"),
        ({"crop_pct": -1}, "crop_pct is -1"),
        ({"label_names": ["a", "b", 3]}, "label_names"),
        ({"label_names": "abc"}, "label_names"),
    ],
)
def test_metadata_of_another_type_are_refused(facts: Any, says: str, folder: Path, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load(folder / "m.onnx")
    (entry,) = (entry for entry in model.metadata_props if entry.key == "lamzoo")
    entry.value = facts if isinstance(facts, str) else json.dumps({"pretrained_cfg": GOOD | facts})
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(ExportError, match=says) as caught:
        load_exported(tmp_path / "m.onnx")
    assert str(tmp_path / "m.onnx") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("location", ["weights.bin", "../weights.bin", "/etc/passwd"])
def test_onnx_reads_no_other_file(location: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load(folder / "m.onnx")
    tensor = model.graph.initializer[0]
    (tmp_path / "sub").mkdir()
    for path in (tmp_path / "weights.bin", tmp_path / "sub" / "weights.bin"):
        path.write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    (tmp_path / "sub" / "m.onnx").write_bytes(model.SerializeToString())
    monkeypatch.chdir(tmp_path / "sub")
    with pytest.raises(ExportError, match="is not a program that lamzoo exported"):
        load_exported("m.onnx")


def test_images_that_a_program_does_not_take_are_named() -> None:
    program = ExportedModel(lambda images: torch.zeros(len(images), 3), {"pretrained_cfg": GOOD}, "m.onnx")
    for images in (torch.rand(2, 3, 8, 8), torch.rand(3, 16, 16), torch.rand(2, 3, 16, 16).double()):
        with pytest.raises(ConfigError, match=r"^m.onnx takes float32 images \(B, 3, 16, 16\) and got"):
            program(images)
    assert program(torch.rand(2, 3, 16, 16, requires_grad=True)).shape == (2, 3)


@pytest.mark.parametrize(
    ("run", "says"),
    [
        (lambda images: torch.zeros(1, 3), "does not return logits"),
        (lambda images: torch.zeros(len(images), 3, dtype=torch.int64), "does not return logits"),
        (lambda images: [images], "does not return logits"),
        (lambda images: images.view(-1, 7), r"cannot be run on images \(2, 3, 16, 16\)"),
    ],
)
def test_a_program_that_fails_or_returns_something_else_is_named(run: Any, says: str) -> None:
    program = ExportedModel(run, {"pretrained_cfg": GOOD}, "m.onnx")
    with pytest.raises(ExportError, match=f"^m.onnx {says}"):
        program(torch.rand(2, 3, 16, 16))
