"""The table of exported programs: each is measured beside the model it comes from."""

from pathlib import Path

import pytest

import lamzoo
from benchmarks.exported import PROGRAMS, measure, table
from benchmarks.rows import read_rows, write_rows
from tests.images import CLASSES, write_npz


@pytest.mark.parametrize(  # int8 differs in what export_model is asked for, which has tests of its own
    "program", [pytest.param(name, marks=[pytest.mark.slow] if "int8" in name else []) for name in PROGRAMS]
)
def test_a_program_is_measured_and_survives_its_file(program: str, tmp_path: Path) -> None:
    data = write_npz(tmp_path / "data")
    model = lamzoo.create_model("lam_vit_micro", num_classes=len(CLASSES), depth=2, embed_dim=32, num_heads=2).eval()
    lamzoo.prune_tokens(model, 0.5, (0,))
    row = measure(model, "lam_vit_micro.x", "few", program, f"npz:{data}", "test", tmp_path)
    assert (row.program, row.data, row.split) == (program, "data", "test")
    assert row.gmacs == round(lamzoo.profile(model).gmacs, 4)
    assert (row.ratio is None) == (row.max_difference is None) == (program == "PyTorch")
    write_rows(tmp_path / "rows.csv", [row])
    assert read_rows(tmp_path / "rows.csv", type(row)) == [row]
    assert f"| `lam_vit_micro.x` | pruned to few | {program} |" in table([row])
