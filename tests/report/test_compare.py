import ast
import csv
import html
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import typer

from lamzoo.cli.app import app
from lamzoo.errors import DataError
from lamzoo.profiling.results import COLUMNS
from lamzoo.report.compare import compare, gmacs_panels, latency_panels, read_timm, to_csv, to_markdown
from lamzoo.report.compare.entries import data_name, family, number
from lamzoo.report.compare.page import _columns, _table_row
from lamzoo.report.compare.panels import command, creation, pareto
from lamzoo.report.compare.text import all_notes
from lamzoo.report.compare.timm_results import is_imagenet1k
from tests.report.compare_rows import FAILED, LAM, PLAIN, UNSCORED, WORSE, table, timm_results

IMAGENET = "imagefolder:/data/imagenet/val"
TIMM = Path(__file__).parents[3] / "shared" / "data" / "timm_results"


def names(group) -> list[str]:
    return [entry.row.model for entry in group.entries]


def test_lam_stands_below_its_plain_twin_and_says_the_difference(tmp_path: Path) -> None:
    (group,) = compare([table(tmp_path, WORSE, LAM, PLAIN)]).groups
    assert names(group) == ["vit_micro", "lam_vit_micro", "vit_worse"]
    assert group.entries[1].twin == PLAIN
    assert group.entries[1].difference == 1.5


def test_ratios_are_those_to_the_same_model_without_masks(tmp_path: Path) -> None:
    (group,) = compare([table(tmp_path, PLAIN, LAM)]).groups
    assert group.entries[1].gmacs_ratio == pytest.approx(1.2)
    assert group.entries[1].params_ratio == pytest.approx(1.25)
    assert group.entries[0].gmacs_ratio is None


def test_merged_models_are_below_their_plain_backbone_with_all_tokens(tmp_path: Path) -> None:
    merged = {"merge": 0.63, "gmacs": 0.08, "latency_ratio": 0.65}
    rows = (replace(LAM, **merged), LAM, replace(PLAIN, **merged, value=79.0), PLAIN)
    comparison = compare([table(tmp_path, *rows)])
    (group,) = comparison.groups
    assert [entry.row.label for entry in group.entries] == [
        "vit_micro.toy",
        "lam_vit_micro.toy, merged to 63 %",
        "vit_micro.toy, merged to 63 %",
        "lam_vit_micro.toy",
    ]
    assert [entry.difference for entry in group.entries] == [None, 1.5, -1.0, 1.5]
    assert "vit_micro.toy, merged to 63 %" in to_markdown(comparison)
    (panel,) = latency_panels(comparison)
    assert [point.x for point in panel.points] == pytest.approx([2.0, 1.3, 1.3, 2.5])


def test_reranked_models_are_compared_with_their_reranked_backbone(tmp_path: Path) -> None:
    two = {"rerank": 16, "latency_ms": 6.0, "latency_q1_ms": 5.9, "latency_q3_ms": 6.1}
    rows = (LAM, replace(LAM, **two, latency_ratio=1.1, value=79.0), PLAIN, replace(PLAIN, **two, value=78.5))
    comparison = compare([table(tmp_path, *rows)])
    (group,) = comparison.groups
    assert {entry.row.label: entry.difference for entry in group.entries if entry.row.has_lam} == {
        rows[0].label: 1.5, rows[1].label: 0.5,
    }  # fmt: skip
    (panel,) = latency_panels(comparison)
    assert 6.6 in [pytest.approx(point.x) for point in panel.points]
    assert "--rerank 1" in command(replace(LAM, rerank=0))


@pytest.mark.parametrize("other", [{"data": "imagefolder:other"}, {"split": "val"}, {"metric": "top5"}])
def test_scores_on_different_data_never_share_a_panel_and_it_is_said(tmp_path: Path, other: dict[str, str]) -> None:
    comparison = compare([table(tmp_path, PLAIN, LAM, replace(WORSE, **other))])
    assert sorted(len(panel.points) for panel in gmacs_panels(comparison)) == [1, 2]
    assert sorted(len(panel.points) for panel in latency_panels(comparison)) == [1, 2]
    assert any("each has its own panel" in note for note in all_notes(comparison))


@pytest.mark.parametrize(
    "other", [{"device": "cuda (NVIDIA H100)"}, {"dtype": "bfloat16"}, {"threads": 1}, {"mode": "compiled"}]
)
def test_latencies_of_different_settings_never_share_a_panel_and_it_is_said(tmp_path: Path, other) -> None:
    comparison = compare([table(tmp_path, PLAIN, LAM, replace(PLAIN, **other), replace(LAM, **other))])
    panels = latency_panels(comparison)
    assert [len(panel.points) for panel in panels] == [2, 2]
    for panel in panels:
        ((plain, lam),) = panel.joins
        assert plain.entry.setting == lam.entry.setting
    assert any("Latencies of different devices" in note for note in all_notes(comparison))


def test_rows_of_one_table_and_of_two_compare_alike(tmp_path: Path) -> None:
    two = [table(tmp_path, LAM, name="a.csv"), table(tmp_path, PLAIN, name="b.csv")]
    (group,) = compare(two).groups
    assert names(group) == ["vit_micro", "lam_vit_micro"]
    assert [Path(entry.source).name for entry in group.entries] == ["b.csv", "a.csv"]


def test_row_that_stands_in_two_tables_is_shown_once_and_it_is_said(tmp_path: Path) -> None:
    comparison = compare([table(tmp_path, PLAIN, LAM), table(tmp_path, PLAIN, name="again.csv")])
    assert len(comparison.entries) == 2
    assert any("duplicate" in note for note in comparison.notes)


def test_twin_is_looked_for_at_the_same_image_size_only(tmp_path: Path) -> None:
    comparison = compare([table(tmp_path, replace(PLAIN, img_size="64"), LAM)])
    assert gmacs_panels(comparison)[0].joins == ()
    assert any("lam_vit_micro.toy (of vit_micro.toy)" in note for note in comparison.notes)


@pytest.mark.parametrize("column", ["gmacs", "lam_gmacs", "params_m", "lam_params_m"])
@pytest.mark.parametrize("cost", [None, 0.0])
def test_lam_without_its_cost_is_refused(tmp_path: Path, column: str, cost: float | None) -> None:
    path = table(tmp_path, PLAIN, replace(LAM, **{column: cost}))
    with pytest.raises(DataError, match=rf"lam_vit_micro.toy has masks and its {column} is (empty|zero)"):
        compare([path])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_measurement_that_is_no_number_is_refused(tmp_path: Path, value: float) -> None:
    with pytest.raises(DataError, match=r"line 2: latency_ms is .(nan|inf)., which is not a number"):
        compare([table(tmp_path, replace(PLAIN, latency_ms=value))])


def test_every_table_shows_the_masks_share_of_the_cost(tmp_path: Path) -> None:
    comparison = compare([table(tmp_path, PLAIN, LAM)])
    line = next(line for line in to_markdown(comparison).splitlines() if line.startswith("| lam_vit_micro"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:9] == [
        "81.50",
        "+1.50",
        "1.250",
        "0.2500",
        "0.1200",
        "0.0200",
        "2.50 (2.40-2.80)",
        "1.25 (1.20-1.30)",
    ]


def test_failed_row_is_listed_with_its_reason_and_in_no_panel(tmp_path: Path) -> None:
    comparison = compare([table(tmp_path, PLAIN, FAILED)])
    assert [entry.row for entry in comparison.failed] == [FAILED]
    assert "killed: no memory" in to_markdown(comparison)
    assert [point.entry.row for panel in gmacs_panels(comparison) for point in panel.points] == [PLAIN]


@pytest.mark.parametrize(("in_turns", "said"), [(2.1, False), (3.0, True)])
def test_twin_timed_at_another_speed_than_in_turns_is_said(tmp_path: Path, in_turns: float, said: bool) -> None:
    comparison = compare([table(tmp_path, PLAIN, replace(LAM, plain_latency_ms=in_turns))])
    assert any("the ratio is more reliable" in note for note in all_notes(comparison)) is said


@pytest.mark.parametrize(("latency", "ratio", "place"), [(1.6, 1.5, 3.0), (4.0, 0.9, 1.8), (2.5, None, 2.5)])
def test_a_lam_is_placed_at_its_backbones_latency_times_its_ratio(
    tmp_path: Path, latency: float, ratio: float | None, place: float
) -> None:
    rows = PLAIN, replace(LAM, latency_ms=latency, latency_ratio=ratio)
    (panel,) = latency_panels(compare([table(tmp_path, *rows)]))
    ((plain, lam),) = panel.joins
    assert (plain.x, lam.x) == pytest.approx((2.0, place))
    assert "latency of one image" in panel.x_label


def test_a_faster_run_of_the_lam_does_not_take_its_backbone_off_the_front(tmp_path: Path) -> None:
    rows = PLAIN, replace(LAM, value=79.0, latency_ms=1.0), replace(PLAIN, value=78.0, model="other", latency_ms=2.2)
    comparison = compare([table(tmp_path, *rows)])
    (panel,) = latency_panels(comparison)
    assert [point.entry.row.model for point in panel.front] == ["vit_micro"]
    best = {line["model"]: line["pareto_latency"] for line in csv.DictReader(to_csv(comparison).splitlines())}
    assert best == {"vit_micro": "yes", "lam_vit_micro": "", "other": ""}


def test_milliseconds_of_another_setting_give_no_place(tmp_path: Path) -> None:
    comparison = compare([table(tmp_path, PLAIN, replace(LAM, threads=1, latency_ms=5.0))])
    assert sorted(point.x for panel in latency_panels(comparison) for point in panel.points) == [2.0, 5.0]


def test_row_without_a_score_is_in_a_table_and_in_no_panel_and_it_is_said(tmp_path: Path) -> None:
    comparison = compare([table(tmp_path, PLAIN, UNSCORED)])
    assert [group.scored for group in comparison.groups] == [True, False]
    assert [len(panel.points) for panel in gmacs_panels(comparison)] == [1]
    assert any("without a score" in note and "vit_small" in note for note in all_notes(comparison))


def test_csv_keeps_every_row_and_column_and_adds_what_was_compared(tmp_path: Path) -> None:
    text = to_csv(compare([table(tmp_path, PLAIN, LAM, FAILED, UNSCORED)]))
    lines = {line["model"]: line for line in csv.DictReader(text.splitlines())}
    assert set(lines) == {"vit_micro", "lam_vit_micro", "lam_vit_huge", "vit_small"}
    assert set(COLUMNS) < set(lines["vit_micro"])
    assert lines["lam_vit_huge"]["error"] == FAILED.error
    assert (lines["lam_vit_micro"]["plain_value"], lines["lam_vit_micro"]["value_difference"]) == ("80.0", "1.5")
    assert (lines["lam_vit_micro"]["gmacs_ratio"], lines["lam_vit_micro"]["pareto_gmacs"]) == ("1.2", "yes")


def test_pareto_front_is_what_nothing_beats() -> None:
    items = [(1.0, 5.0), (2.0, 5.0), (2.0, 7.0), (3.0, 6.0), (4.0, 9.0), (4.0, 9.0), (0.5, 1.0)]
    assert pareto(items, lambda item: item) == ((0.5, 1.0), (1.0, 5.0), (2.0, 7.0), (4.0, 9.0), (4.0, 9.0))


def test_front_of_a_panel_leaves_out_what_costs_more_and_scores_less(tmp_path: Path) -> None:
    (panel,) = gmacs_panels(compare([table(tmp_path, PLAIN, LAM, WORSE)]))
    assert [point.entry.row.model for point in panel.front] == ["vit_micro", "lam_vit_micro"]


def test_number_never_makes_a_small_cost_look_like_none() -> None:
    assert [number(value) for value in (None, 0.0, 0.000012, 0.0028, 1.25, 86.567, 1242.2)] == [
        "", "0", "0.000012", "0.0028", "1.250", "86.57", "1242",
    ]  # fmt: skip


def test_table_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no rows in"):
        compare([table(tmp_path)])


def test_timms_results_get_gmacs_and_speed_of_the_same_size(tmp_path: Path) -> None:
    giant, small, other = read_timm(timm_results(tmp_path / "timm"))
    assert (giant.params_m, giant.gmacs, small.gmacs, other.gmacs) == (1013.01, 1900.5, 4.61, None)
    assert [(speed.machine, speed.batch) for speed in giant.speeds] == [("amp-gpu", 64), ("fp32-cpu", 1)]


def test_timms_results_stand_behind_imagenet_alone(tmp_path: Path) -> None:
    timm = timm_results(tmp_path / "timm")
    rows = table(tmp_path, PLAIN, replace(LAM, data=IMAGENET))
    panels = gmacs_panels(compare([rows], timm=timm))
    assert [(panel.title, len(panel.timm)) for panel in panels] == [
        ("imagenet, test", 2),
        ("toys, test", 0),
    ]
    assert all(panel.timm == () for panel in latency_panels(compare([rows], timm=timm)))


def test_timms_results_have_a_panel_of_their_own_where_nothing_was_scored_on_imagenet(tmp_path: Path) -> None:
    comparison = compare([table(tmp_path, PLAIN)], timm=timm_results(tmp_path / "timm"))
    assert [(len(panel.points), len(panel.timm)) for panel in gmacs_panels(comparison)] == [(1, 0), (0, 2)]
    assert any("No row was scored on ImageNet-1k" in note for note in comparison.notes)


def test_timm_data_names_the_rows_that_belong_beside_timms(tmp_path: Path) -> None:
    timm, rows = timm_results(tmp_path / "timm"), table(tmp_path, PLAIN)
    (panel,) = gmacs_panels(compare([rows], timm=timm, timm_data="imagefolder:toys"))
    assert (len(panel.points), len(panel.timm)) == (1, 2)
    with pytest.raises(DataError, match="No row was scored on --timm-data 'imagefolder:other'"):
        compare([rows], timm=timm, timm_data="imagefolder:other")


@pytest.mark.parametrize(
    ("data", "is_it"),
    [
        (IMAGENET, True),
        ("/data/ILSVRC2012/val", True),
        ("hfds:timm/imagenet-1k-wds", True),
        ("wds:/data/imagenet1k-validation-{00..63}.tar", True),
        ("torchvision:ImageNet:/data", True),
        ("npz:../shared/data/tinyimagenet100", False),
        ("imagefolder:/data/tiny-imagenet/val", False),
        ("imagefolder:/data/imagenette2", False),
        ("imagefolder:/data/imagenet-100/val", False),
        ("imagefolder:/data/imagenet-a", False),
        ("hfds:imagenet21k", False),
        ("imagefolder:/data/imagenetv2/val", False),
    ],
)
def test_imagenet1k_is_known_by_its_name_and_its_relatives_are_not(data: str, is_it: bool) -> None:
    assert is_imagenet1k(data) is is_it


def test_timms_scores_on_another_test_set_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "results-imagenet-real.csv"
    path.write_text("model,img_size,top1,param_count,top1_diff\na.b,224,80.0,5.0,+1.0\n")
    with pytest.raises(DataError, match="another test set"):
        read_timm(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("model,top1\na,1\n", "no column 'img_size'"),
        ("model,img_size,top1,param_count\na.b,224,high,5\n", "top1 of a.b is 'high'"),
    ],
)
def test_broken_timm_results_are_refused_with_their_file_named(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "results-imagenet.csv").write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        read_timm(tmp_path)
    assert "results-imagenet.csv" in str(caught.value)


@pytest.mark.skipif(not TIMM.is_dir(), reason="timm's own results are not beside this checkout")
def test_timms_own_files_give_vit_base_its_published_gmacs() -> None:
    results = read_timm(TIMM)
    (base,) = [result for result in results if result.name == "vit_base_patch16_224.augreg_in21k_ft_in1k"]
    assert (base.top1, base.gmacs) == (84.534, 17.58)
    assert sum(result.gmacs is not None for result in results) == 1454


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("npz:../shared/data/cifar10", "cifar10"),
        (IMAGENET, "imagenet"),
        ("imagefolder:/home/me/photos/", "photos"),
        ("hfds:timm/imagenet-1k-wds", "timm/imagenet-1k-wds"),
        ("torchvision:ImageNet:/data", "ImageNet"),
        ("wds:/data/in1k/{split}-{000..012}.tar", "in1k"),
        ("grid:/data/grid_s1", "GRID"),
        ("grid:/data/grid_s1:lips", "GRID, lips"),
        ("msrvtt:/data/msrvtt:7k", "MSR-VTT, 7k"),
        ("qvhighlights:C:/data", "QVHighlights"),
        ("grid:C:\\data", "GRID"),
        ("grid:C:\\data:lips", "GRID, lips"),
        ("photos", "photos"),
    ],
)
def test_data_sets_are_named_without_the_path_of_a_machine(spec: str, name: str) -> None:
    assert data_name(spec) == name


def test_data_sets_of_the_same_name_keep_their_paths(tmp_path: Path) -> None:
    rows = [replace(PLAIN, data=f"imagefolder:/{where}/toys") for where in ("mine", "yours")]
    panels = gmacs_panels(compare([table(tmp_path, *rows)]))
    assert [panel.title for panel in panels] == ["imagefolder:/mine/toys, test", "imagefolder:/yours/toys, test"]


def test_seeds_of_a_model_are_one_point_with_an_error_bar(tmp_path: Path) -> None:
    plain = [
        replace(PLAIN, seed=seed, value=value, weights_sha256=f"p{seed}")
        for seed, value in enumerate((80.0, 82.0, 84.0))
    ]
    runs = [
        replace(LAM, model=f"local-dir:runs/lam-seed{seed}", tag=None, value=value, weights_sha256=f"m{seed}")
        for seed, value in enumerate((81.0, 83.0))
    ]
    paths = [table(tmp_path, row, name=f"{number}.csv") for number, row in enumerate((*plain, *runs))]
    comparison = compare(paths)
    (panel,) = gmacs_panels(comparison)
    assert [(point.label, point.y, len(point.seeds)) for point in panel.points] == [
        ("vit_micro.toy (3 seeds)", 82.0, 3),
        ("lam (2 seeds)", 82.0, 2),
    ]
    assert [point.y_error for point in panel.points] == pytest.approx([2.0, 2**0.5])
    ((twin, lam),) = set(panel.joins)
    assert (twin, lam) == panel.points
    assert "82.00 ± 2.00 (standard deviation of 3 seeds: 80.00, 82.00, 84.00)" in panel.series[-2].facts[0][1]
    assert any("several seeds is one point" in note for note in all_notes(comparison))


RUN = replace(LAM, model="local-dir:runs/rank4/seed0", tag=None, value=60.0, weights_sha256="a")
OTHER = replace(RUN, model="local-dir:runs/rank4/seed1", value=90.0, weights_sha256="b")


@pytest.mark.parametrize(
    ("changed", "labels"),
    [
        ({}, ["rank4 (2 seeds)"]),
        ({"model": "local-dir:runs/rank4/seed1/model"}, ["rank4 (2 seeds)"]),
        ({"model": "local-dir:runs/rank64/seed0"}, ["seed0", "seed0"]),
        ({"model": "local-dir:other/rank4/seed0"}, ["seed0", "seed0"]),
        ({"model": "local-dir:runs/rank4/seed0"}, ["rank4 (2 seeds)"]),
        ({"gmacs": 0.5}, ["seed0", "seed1"]),
        ({"params_m": 2.0}, ["seed0", "seed1"]),
        ({"plain": "vit_other.toy"}, ["seed0", "seed1"]),
        ({"weights_sha256": "a"}, ["seed0", "seed1"]),
        ({"weights_sha256": None}, ["seed0", "seed1"]),
    ],
)
def test_runs_are_seeds_of_a_model_only_where_all_else_is_equal(tmp_path: Path, changed, labels: list[str]) -> None:
    (panel,) = gmacs_panels(compare([table(tmp_path, RUN, replace(OTHER, **changed))]))
    assert [point.label for point in panel.points] == labels


@pytest.mark.parametrize(
    ("name", "shared"),
    [
        ("runs/lam-vit-s16", "runs/lam-vit-s16"),
        ("a/best", "a/best"),
        ("a/best/model", "a/best"),
        ("runs/lam_seed_12/", "runs/lam"),
        ("runs/lam.seed-3", "runs/lam"),
        ("runs/reseed3", "runs/reseed3"),
        ("seed0", ""),
    ],
)
def test_the_name_of_a_run_has_its_whole_path_without_the_seed(name: str, shared: str) -> None:
    assert family(replace(RUN, model=f"local-dir:{name}")) == f"local-dir:{shared}"


def test_one_model_measured_with_several_seeds_has_no_error_bar(tmp_path: Path) -> None:
    rows = [replace(PLAIN, weights_sha256="a", seed=seed) for seed in (0, 1)]
    (panel,) = gmacs_panels(compare([table(tmp_path, row, name=f"{row.seed}.csv") for row in rows]))
    assert [(point.label, point.y_error) for point in panel.points] == [("vit_micro.toy", None)] * 2


def test_budgets_of_two_models_with_one_leaf_are_two_curves(tmp_path: Path) -> None:
    runs = [replace(RUN, model=f"local-dir:{folder}/best", weights_sha256=folder) for folder in "ab"]
    rows = [replace(run, merge=share, gmacs=0.12 * (share or 1.0)) for run in runs for share in (None, 0.5)]
    (panel,) = gmacs_panels(compare([table(tmp_path, *rows)]))
    assert [[point.entry.row.model for point in curve] for curve in panel.curves] == [[run.model] * 2 for run in runs]


def test_token_budgets_of_a_model_are_a_curve(tmp_path: Path) -> None:
    budgets = [replace(LAM, merge=share, gmacs=0.12 * share, value=80.0 - share) for share in (0.5, 0.75)]
    (panel,) = gmacs_panels(compare([table(tmp_path, PLAIN, LAM, *budgets)]))
    (curve,) = panel.curves
    assert [point.entry.row.merge for point in curve] == [0.5, 0.75, None]
    assert [lam.entry.row.merge for _, lam in panel.joins] == [None]
    (line,) = [series for series in panel.series if series.name == "token budgets, with LAM"]
    assert line.xs == pytest.approx((0.06, 0.09, 0.12, None))


def test_a_point_has_its_quartiles_its_command_and_the_python_that_creates_it(tmp_path: Path) -> None:
    merged = replace(LAM, merge=0.5, form="fused", data="npz:my data")
    (panel,) = latency_panels(compare([table(tmp_path, replace(PLAIN, data="npz:my data"), merged)]))
    assert [point.x_range for point in panel.points] == [(1.9, 2.2), pytest.approx((2.4, 2.6))]
    facts = panel.series[-1].facts[0]
    assert facts[-2:] == ("machine: cpu, float32, 2 threads, eager, torch 2.15.0", command(merged))
    assert command(merged) == (
        "lamzoo bench lam_vit_micro.toy --data 'npz:my data' --split test --img-size 32 --device cpu --dtype float32 "
        "--threads 2 --seed 0 --merge 0.5 --out again.csv --fuse"
    )
    assert creation(merged).splitlines() == [
        'model = lamzoo.create_model("lam_vit_micro.toy", pretrained=True, img_size=32)',
        "lamzoo.merge_tokens(model, target_gmacs=0.5 * lamzoo.profile(model).gmacs)",
        "lamzoo.fuse(model)",
    ]


def test_the_table_of_the_page_copies_several_lines_as_they_are(tmp_path: Path) -> None:
    merged = replace(LAM, model='lam_"<vit>', merge=0.5, form="fused")
    comparison = compare([table(tmp_path, PLAIN, merged)])
    (entry,) = (entry for entry in comparison.entries if entry.row.merge)
    copied = html.unescape(re.search('data-copy="(.*?)"', _table_row(entry, _columns(comparison)), re.DOTALL)[1])
    assert copied == creation(merged)
    assert len(ast.parse(copied).body) == 3


@pytest.mark.parametrize(
    "name",
    ["x'+__import__('os').system('id')+'", 'bob\'s "best" run', "C:\\new\nline", "a\u202e\x1b\x7f\U000e0001", "🦒", ""],
)
def test_the_copied_python_has_the_name_as_a_string_and_nothing_else(name: str) -> None:
    line = creation(replace(LAM, model=f"local-dir:{name}", tag=None, img_size=None))
    assert line.isprintable()
    (call,) = (node.value for node in ast.parse(line).body if isinstance(node, ast.Assign))
    (argument,) = call.args
    assert ast.literal_eval(argument) == f"local-dir:{name}"
    assert [keyword.arg for keyword in call.keywords] == ["pretrained"]


@pytest.mark.parametrize(
    ("changed", "size"),
    [
        ({"model": "lam_vit_micro", "tag": "cifar10"}, None),
        ({"model": "lam_vit_micro", "tag": "cifar10", "img_size": "96"}, 96),
        ({"model": "local-dir:runs/a", "tag": None, "img_size": "96"}, 96),
        ({"img_size": "32x64"}, None),
        ({"img_size": None}, None),
    ],
)
def test_another_image_size_is_in_the_command_and_in_the_python(changed, size: int | None) -> None:
    row = replace(LAM, **changed, device="cuda (NVIDIA H100)", dtype="bfloat16", threads=1, seed=3, mode="compiled")
    given = {keyword.arg: keyword.value.value for keyword in ast.parse(creation(row)).body[0].value.keywords}
    assert given == {"pretrained": True} | ({} if size is None else {"img_size": size})
    context = typer.main.get_command(app).commands["bench"].make_context("bench", shlex.split(command(row))[2:])
    assert {name: context.params[name] for name in ("img_size", "device", "dtype", "threads", "seed", "compiled")} == {
        "img_size": size, "device": "cuda", "dtype": "bfloat16", "threads": 1, "seed": 3, "compiled": True,
    }  # fmt: skip
    assert (context.params["patterns"], context.params["output"]) == ([row.name], Path("again.csv"))
