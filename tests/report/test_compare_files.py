import csv
import io
import re
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lamzoo.cli import app as cli
from lamzoo.errors import DataError, MissingExtraError
from lamzoo.report.compare import compare, gmacs_panels, latency_panels, to_csv, to_markdown, write_comparison
from lamzoo.report.compare.page import draw_interactive
from lamzoo.report.compare.plots import draw_panels
from lamzoo.report.curves import draw_confusion
from lamzoo.report.mpl import encode
from tests.report.compare_rows import FAILED, LAM, PLAIN, UNSCORED, WORSE, table, timm_results

FILES = {
    "compare.md", "compare.csv", "compare.html",
    "accuracy-vs-gmacs.png", "accuracy-vs-gmacs.svg", "accuracy-vs-latency.png", "accuracy-vs-latency.svg",
}  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("plotly")
    folder = tmp_path_factory.mktemp("compare")
    rows = table(folder, PLAIN, LAM, WORSE, FAILED, UNSCORED)
    write_comparison(compare([rows], timm=timm_results(folder / "timm"), timm_data=PLAIN.data), folder / "out")
    return folder / "out"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[object, str, str]]:
    def run(*args: object) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as caught:
            cli.main(["compare", *map(str, args)])
        return (caught.value.code, *capsys.readouterr())

    return run


def test_all_files_are_written_and_nothing_else(written: Path) -> None:
    assert {path.name for path in written.iterdir()} == FILES


def test_pictures_can_be_read_and_name_the_models(written: Path) -> None:
    for name in ("accuracy-vs-gmacs", "accuracy-vs-latency"):
        with Image.open(written / f"{name}.png") as picture:
            assert picture.width > 500
        text = "".join(ET.parse(written / f"{name}.svg").getroot().itertext())
        assert "lam_vit_micro.toy" in text
        assert "Pareto front" in text


def test_pictures_of_the_same_rows_are_the_same_to_the_byte(written: Path, tmp_path: Path) -> None:
    rows = table(tmp_path, PLAIN, LAM, WORSE, FAILED, UNSCORED)
    panels = latency_panels(compare([rows]))
    for kind in ("svg", "png"):
        again = encode(draw_panels(panels, "Accuracy against latency"), kind)
        assert again == (written / f"accuracy-vs-latency.{kind}").read_bytes()


def test_page_and_pictures_show_the_same_series(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    rows = table(tmp_path, PLAIN, LAM, WORSE)
    panels = gmacs_panels(compare([rows], timm=timm_results(tmp_path / "timm"), timm_data=PLAIN.data))
    for axis, panel in zip(draw_panels(panels, "Accuracy against GMACs").axes, panels, strict=True):
        names = [trace.name for trace in draw_interactive(panel).data if trace.showlegend]
        assert axis.get_legend_handles_labels()[1] == names
        assert {"plain backbone", "with LAM", "Pareto front"} <= set(names)


def test_page_asks_for_nothing_and_takes_no_name_for_markup(written: Path) -> None:
    page = (written / "compare.html").read_text()
    assert "default-src 'none'" in page
    assert not re.search(r"<(script|img|iframe)[^>]+src=|<link[^>]+href=\"(?!data:)", page)
    assert "<script>oops()" not in page
    assert "&lt;script&gt;oops()" in page


def test_comparison_without_a_score_still_draws_pictures_that_say_so(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    write_comparison(compare([table(tmp_path, UNSCORED)]), tmp_path / "out")
    text = "".join(ET.parse(tmp_path / "out" / "accuracy-vs-gmacs.svg").getroot().itertext())
    assert "no row has both a score and this cost" in text


@pytest.mark.parametrize("package", ["plotly", "itables", "matplotlib"])
def test_missing_library_is_named_and_nothing_is_written(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=r"lamzoo\[compare\]"):
        write_comparison(compare([table(tmp_path, PLAIN)]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    (tmp_path / "out").write_text("a file")
    with pytest.raises(DataError, match="out"):
        write_comparison(compare([table(tmp_path, PLAIN)]), tmp_path / "out")


def test_command_prints_a_table_with_costs_notes_and_failures(run, tmp_path: Path) -> None:
    code, out, _ = run(table(tmp_path, PLAIN, LAM, FAILED))
    assert code == 0
    for text in (
        "lam_vit_micro.toy",
        "+1.50",
        "0.0200",
        "1.25 (1.20-1.30)",
        "killed: no memory",
        "1 measurement(s) failed",
    ):
        assert text in out


def test_command_cuts_no_number_on_a_narrow_terminal(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lamzoo.cli._output._PIPE_WIDTH", 80)
    _, out, _ = run(table(tmp_path, PLAIN, LAM))
    assert max(len(line) for line in out.splitlines() if line.startswith("│")) <= 80
    for text in ("81.50", "0.0200", "2.50", "(2.40-2.80)", "(1.20-1.30)", "1000", "20.00"):
        assert text in out


def test_command_prints_markdown_and_csv_and_nothing_else(run, tmp_path: Path) -> None:
    rows = table(tmp_path, PLAIN, LAM)
    assert run(rows, "--format", "markdown")[1].startswith("# Comparison\n")
    assert run(rows, "--format", "csv")[1].splitlines()[0].startswith("model,tag,data")


def test_command_compares_with_the_results_of_timm(run, tmp_path: Path) -> None:
    rows, timm = table(tmp_path, PLAIN, LAM), timm_results(tmp_path / "timm")
    options = ("--timm", timm, "--timm-data", PLAIN.data, "--format", "markdown")
    found, without = (run(rows, *more)[1].strip() for more in (options, options[-2:]))
    assert found == to_markdown(compare([rows], timm=timm, timm_data=PLAIN.data)).strip()
    note = "timm's speeds were measured on other machines"
    assert note in found and note not in without


def test_command_refuses_what_it_cannot_read_with_one_line(run, tmp_path: Path) -> None:
    code, out, err = run(tmp_path / "none.csv")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "none.csv" in err


def test_command_refuses_a_lam_without_its_cost(run, tmp_path: Path) -> None:
    code, _, err = run(table(tmp_path, PLAIN, replace(LAM, lam_gmacs=None)), "--out", tmp_path / "out")
    assert code == 2
    assert "lam_gmacs" in err
    assert not (tmp_path / "out").exists()


def test_names_with_control_characters_and_dollar_signs_make_valid_pictures() -> None:
    pytest.importorskip("matplotlib")
    name = "a\x00\x1b\x7f\x9b\ufffe\u202e<b>&$x^$"
    figure = draw_confusion(np.eye(2, dtype=np.int64), [name, "b"], f"{name} on b")
    text = "".join(ET.fromstring(encode(figure, "svg")).itertext())
    assert text.count(r"a\x00\x1b\x7f\x9b\ufffe\u202e<b>&$x^$") == 3


def test_formulas_in_a_table_are_text_in_every_file(tmp_path: Path) -> None:
    rows = [PLAIN, LAM, replace(WORSE, model="=cmd|' /C calc'!A0", data="@SUM(1)")]
    comparison = compare([table(tmp_path, *rows)])
    assert "=cmd|' /C calc'!A0" in {entry.row.model for entry in comparison.entries}
    cells = [cell for line in csv.reader(io.StringIO(to_csv(comparison))) for cell in line]
    assert not [cell for cell in cells if cell.startswith(("=", "@"))]
