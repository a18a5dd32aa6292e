import csv
from pathlib import Path

import pytest

from lamzoo.errors import DataError
from lamzoo.profiling import BenchRow, read_rows, write_rows
from lamzoo.profiling.results import COLUMNS

ROWS = [
    BenchRow("lam_vit_micro", "cifar10", params_m=1.07897, lam_params_m=0.035088, batch=64, plain="vit_micro.cifar10"),
    BenchRow("local-dir:Ümläut, a b", status="failed", error='it said "no",\nand left', seed=0, lam_gmacs=0.0),
]


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    write_rows(tmp_path / "r.csv", ROWS)
    assert read_rows(tmp_path / "r.csv") == ROWS


def test_the_columns_begin_as_promised(tmp_path: Path) -> None:
    write_rows(tmp_path / "r.csv", [])
    promised = (
        "model,tag,data,split,metric,value,params_m,lam_params_m,gmacs,lam_gmacs,latency_ms,latency_ratio,"
        "images_per_s,peak_mib,img_size,batch,dtype,device,threads,torch,timm,weights_sha256,seed,commit"
    )
    assert (tmp_path / "r.csv").read_text().startswith(promised + ",")
    assert read_rows(tmp_path / "r.csv") == []


def test_columns_may_stand_in_any_order(tmp_path: Path) -> None:
    write_rows(tmp_path / "r.csv", ROWS)
    with (tmp_path / "r.csv").open(newline="") as file:
        lines = [line[::-1] for line in csv.reader(file)]
    with (tmp_path / "s.csv").open("w", newline="") as file:
        csv.writer(file).writerows(lines)
    assert read_rows(tmp_path / "s.csv") == ROWS


def test_a_row_knows_its_name_and_its_setting() -> None:
    first, second = ROWS
    assert (first.name, second.name) == ("lam_vit_micro.cifar10", "local-dir:Ümläut, a b")
    assert (first.has_lam, second.has_lam) == (True, False)
    assert (first.ok, second.ok) == (True, False)
    assert first.key == BenchRow("lam_vit_micro", "cifar10", value=3.0, seed=1).key
    assert first.key != BenchRow("lam_vit_micro", "cifar10", device="cpu").key
    assert first.key != BenchRow("lam_vit_micro", "cifar10", merge=0.63).key


def test_rows_of_both_stages_of_retrieval_are_others_and_are_read_back(tmp_path: Path) -> None:
    rows = [BenchRow("lam_clip4clip", rerank=count) for count in (None, 0, 50)]
    assert [row.label for row in rows] == ["lam_clip4clip", "lam_clip4clip, first stage", "lam_clip4clip, 50 reranked"]
    assert len({row.key for row in rows}) == 3
    write_rows(tmp_path / "r.csv", rows)
    assert read_rows(tmp_path / "r.csv") == rows


def test_a_row_of_the_fused_form_is_another_one_and_is_read_back(tmp_path: Path) -> None:
    row = BenchRow("lam_vit_tiny", merge=0.63, form="fused")
    assert row.label == "lam_vit_tiny, merged to 63 %, fused"
    assert row.key != BenchRow("lam_vit_tiny", merge=0.63).key
    write_rows(tmp_path / "r.csv", [row])
    assert read_rows(tmp_path / "r.csv") == [row]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda text: "", "is empty"),
        (lambda text: text.replace("gmacs", "gmac", 1), "unknown column 'gmac'; did you mean"),
        (lambda text: text.partition("\n")[0].replace(",error", ""), "has no column 'error'"),
        (lambda text: text.partition("\n")[0].replace("tag,", ""), "no column 'tag'"),
        (lambda text: text.replace("model,", "model,model,", 1), "'model' twice"),
        (lambda text: text.replace("1.078970", "many"), "line 2: params_m is 'many', which is not a number"),
        (lambda text: text.replace(",64,", ",64.5,"), "line 2: batch is '64.5', which is not a whole number"),
        (lambda text: text.replace("eager,ok", "lazy,ok"), "mode is 'lazy'; it must be eager or compiled"),
        (lambda text: text.replace("lam_vit_micro,", ",", 1), "model is ''; it must be a name"),
        (lambda text: text + "one,two\n", "2 cells instead of"),
        (lambda text: text + '"', "cannot be read"),
    ],
)
def test_a_table_that_is_none_is_refused_by_file_and_place(tmp_path: Path, change, says: str) -> None:
    write_rows(tmp_path / "r.csv", ROWS)
    text = (tmp_path / "r.csv").read_text(encoding="utf-8")
    assert change(text) != text
    (tmp_path / "r.csv").write_text(change(text), encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_rows(tmp_path / "r.csv")
    assert says in str(caught.value)
    assert str(tmp_path / "r.csv") in str(caught.value)


def test_a_missing_or_binary_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_bytes(b"\xff\xfe\x00")
    for name in ("r.csv", "none.csv"):
        with pytest.raises(DataError, match="cannot be read"):
            read_rows(tmp_path / name)


def test_a_table_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    write_rows(tmp_path / "r.csv", ROWS)
    before = (tmp_path / "r.csv").read_bytes()

    def broken():
        yield ROWS[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_rows(tmp_path / "r.csv", broken())
    assert (tmp_path / "r.csv").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["r.csv"]


def test_every_column_is_explained() -> None:
    assert all(
        f"        {column}:" in str(BenchRow.__doc__) or f"    {column}:" in str(BenchRow.__doc__) for column in COLUMNS
    )
