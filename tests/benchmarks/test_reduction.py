"""The bench of token reduction: equal budgets, paired errors, and results files that fill the tables and the figure."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from torch import nn

import lamzoo
from benchmarks import features
from benchmarks import reduction as bench
from benchmarks import reduction_tables as tables
from benchmarks.methods import ALIKE, ALL, MERGED, METHODS, OURS, PEERS, Samples
from benchmarks.reduction import Images, Subject
from benchmarks.reduction_figure import draw
from benchmarks.reduction_tables import Row, TimeRow, TrainedRow
from benchmarks.rows import read_rows, write_rows
from lamzoo.profiling.latency import device_label

ROW = Row(
    model="lam", plain="vit", method="merged", variant=None, share=0.7, setting="keep=0.6", gmacs=0.25, top1=40.1,
    difference=-0.5, difference_se=0.21, agreement=96.25, kl=0.0123, peer=None, ahead=None, ahead_se=None, data="tiny",
    split="val", images=5000, device="cpu", threads=1, dtype="float32", torch="2.15",
)  # fmt: skip
TIME = TimeRow(
    model="lam", plain="vit", method="merged", variant=None, share=0.7, setting="keep=0.6", gmacs=0.25, images=1,
    ratio=0.8, ratio_q1=0.79, ratio_q3=0.85, ms=4.0, plain_ms=5.0, pairs=40, device="cpu", threads=1, dtype="float32",
    torch="2.15",
)  # fmt: skip
FEATURES = features.Row(
    model="vit", method="merged", variant=None, share=0.63, setting="keep=0.6", gmacs=3.5, cosine=0.99, accuracy=58.1,
    difference=0.4, difference_se=0.6, patch_cosine=0.97, patch_error=0.2, data="clothes", images=700, dense_images=90,
    device="cpu", threads=1, dtype="float32", torch="2.15",
)  # fmt: skip
AT = (0, 1)
SAMPLES = Samples(*torch.rand(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))


def model(*, masked: bool = True, **options: object) -> nn.Module:
    torch.manual_seed(0)
    vit = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=16, depth=3, num_heads=2, num_classes=5, **options
    ).eval()
    nn.init.normal_(vit.head.weight)  # type: ignore[arg-type]
    return lamzoo.add_lam(vit, lamzoo.LamConfig(rank=3, init="paper")) if masked else vit


@pytest.fixture(autouse=True)
def plain_gmacs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Budgets of the tests' models, which have no names."""
    monkeypatch.setattr(bench, "_all_gmacs", lambda name: lamzoo.profile(model(masked=False)).gmacs)


def images(count: int = 12) -> Images:
    torch.manual_seed(1)
    return Images(torch.rand(count, 3, 32, 32), torch.arange(count) % 5)


# DiffRate's search counts pass after pass.
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name == "DiffRate" else []) for name in METHODS if name != ALL],
)
def test_a_method_stays_within_its_budget_and_leaves_nothing_behind(name: str) -> None:
    vit = model()
    whole = lamzoo.profile(vit).gmacs
    counted = SAMPLES.scored if name == "ATM" else SAMPLES.scored[:1]  # it merges by the images
    for variant, reduce in METHODS[name](vit).items():
        with reduce(vit, 0.8 * whole, AT, SAMPLES) as setting:
            assert setting is not None, variant
            assert setting.gmacs == pytest.approx(lamzoo.profile(vit, counted).gmacs / len(counted)), variant
            assert 0.7 * whole < setting.gmacs <= 0.8 * whole, variant
        assert lamzoo.profile(vit).gmacs == whole
        with reduce(vit, whole * 1e-3, AT, SAMPLES) as setting:
            assert setting is None


def test_methods_that_depend_on_images_are_left_out_without_any() -> None:
    vit = model()
    for name in ("ATM", "DiffRate"):
        with METHODS[name](vit)[None](vit, 1.0, AT, None) as setting:
            assert setting is None


def test_methods_are_offered_where_they_work() -> None:
    plain, pooled = model(masked=False), model(class_token=False, global_pool="avg")
    assert all(METHODS[name](pooled) for name in OURS)
    assert [name for name in OURS if METHODS[name](plain)] == [MERGED, ALIKE]
    assert [name for name in PEERS if not METHODS[name](pooled)] == ["EViT"]


def test_the_standard_error_is_paired() -> None:
    ours = torch.tensor([True] * 60 + [False] * 40)
    theirs = ours.clone()
    assert bench.paired_difference(ours, theirs) == (0.0, 0.0)  # equal, however uncertain the accuracy itself
    theirs[:3] = False
    theirs[-1] = True
    difference, error = bench.paired_difference(ours, theirs)
    assert difference == pytest.approx(2.0)
    assert error == pytest.approx(100 * math.sqrt((0.04 - 0.02**2) / 99))  # of three gains and a loss in 100 images


def test_the_divergence_is_that_of_the_softmax_from_the_reference() -> None:
    torch.manual_seed(0)
    mine, whole = torch.randn(7, 5), torch.randn(7, 5)
    expected = [
        torch.distributions.kl_divergence(*(torch.distributions.Categorical(logits=each) for each in pair))
        for pair in zip(whole, mine, strict=True)
    ]
    assert bench.kl_divergence(mine, whole) == pytest.approx(float(torch.stack(expected).mean()), rel=1e-5)
    assert bench.kl_divergence(whole + 3.0, whole) == pytest.approx(0.0, abs=1e-7)


def test_a_row_of_all_tokens_differs_from_them_in_nothing() -> None:
    vit, data = model(), images()
    subject = Subject("lam", "vit", "tiny", "val", AT)
    reference = bench.logits_of(vit, data)
    whole = bench.measure(subject, vit, ALL, None, 1.0, data, reference)
    merged = bench.measure(subject, vit, "merged", None, 0.7, data, reference)
    assert whole is not None
    assert merged is not None
    row, predictions = whole
    assert (row.difference, row.difference_se, row.agreement, row.kl, row.images) == (0.0, 0.0, 100.0, 0.0, 12)
    assert row.top1 == pytest.approx(100 * float((predictions == data.labels).double().mean()), abs=0.01)
    assert merged[0].kl is not None
    assert merged[0].kl > 0
    assert merged[0].gmacs < row.gmacs
    assert bench.measure(subject, vit, "merged", None, 1e-3, data, reference) is None


def test_this_projects_rows_are_compared_with_the_best_peer() -> None:
    def row(method: str, top1: float, variant: str | None = None) -> Row:
        return replace(ROW, method=method, top1=top1, variant=variant)

    rows = [row("merged", 75.0), row("ToMe", 25.0), row("ToMe", 50.0, "filled"), row("stride", 0.0)]
    rows.append(replace(row("stride", 100.0), share=0.5))  # of another budget
    correct = {75.0: [1, 1, 1, 0], 50.0: [1, 0, 1, 0]}
    first, *peers = bench.against_peers(rows, lambda row: torch.tensor(correct[row.top1]).bool())
    assert (first.peer, first.ahead, first.ahead_se) == ("ToMe, filled", 25.0, 25.0)
    assert peers == rows[1:]
    assert bench.against_peers(rows, lambda row: None) == rows
    assert bench.against_peers([first, *peers], lambda row: None)[0] == first
    assert bench.against_peers([first, row("ToMe", 60.0)], lambda row: None)[0] == rows[0]  # another peer is the best


def test_measuring_resumes_and_keeps_predictions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vit = model()
    monkeypatch.setattr(bench, "_create", lambda name, pretrained: vit)
    monkeypatch.setattr(Images, "load", lambda *_: images())
    subject, path = Subject("lam", "vit", "tiny", "val", AT, (0.7,)), tmp_path / "rows.csv"

    def run(*methods: str, again: bool = False) -> list[Row]:
        bench.measure_all([subject], methods, "", path, tmp_path / "kept", torch.device("cpu"), again=again)
        return read_rows(path, Row)

    first = run(ALL, "merged")
    assert [row.method for row in first] == [ALL, "merged"]
    marked = [replace(row, torch="0") for row in first]
    write_rows(path, marked)
    both = run(ALL, "merged", "stride")
    assert [(row.method, row.torch == "0") for row in both] == [(ALL, True), ("merged", True), ("stride", False)]
    assert both[1].peer == "stride"  # from the predictions of the first run
    again = run("merged", again=True)
    assert {row.method: row.torch == "0" for row in again} == {ALL: True, "stride": False, "merged": False}


def test_every_batch_and_number_of_threads_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    vits = {"lam": model(), "vit": model(masked=False)}
    monkeypatch.setattr(bench, "_create", lambda name, pretrained: vits[name])
    subject, threads = Subject("lam", "vit", "tiny", "val", AT, (0.7,)), torch.get_num_threads()
    known = replace(TIME, device=device_label(torch.device("cpu")))
    rows = list(bench.measure_times(subject, ["merged"], [], [known, replace(TIME, device="cuda (a GPU)")], pairs=4))
    conditions = [(1, 2), (16, 1), (16, 2)]  # one image on one thread was timed before
    assert [(row.images, row.threads) for row in rows] == conditions
    assert all(0 < row.ratio_q1 <= row.ratio <= row.ratio_q3 for row in rows)
    assert [row.pairs for row in rows] == [4, 2, 2]
    assert torch.get_num_threads() == threads
    assert list(bench.measure_times(subject, ["merged"], [], [known, *rows], pairs=4)) == []
    one_thread = [known, replace(known, images=16)]
    assert list(bench.measure_times(subject, ["merged"], [], one_thread, pairs=4, threads=[1])) == []


def test_an_unknown_model_is_named_with_what_to_add(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["reduction", "--models", "vit_micro.cifar10_mul", "local-dir:mine"])
    with pytest.raises(SystemExit) as ended:
        bench.main()
    assert ended.value.code == 2
    assert "local-dir:mine: no model of this benchmark; say with --like" in capsys.readouterr().err


def test_rows_survive_their_file_and_fill_the_table(tmp_path: Path) -> None:
    worse = replace(ROW, model="vit", method="ToMe", variant="after the block", top1=39.0)
    rows = [
        replace(ROW, method=ALL, share=1.0, top1=40.6),
        ROW,
        replace(ROW, share=0.5, top1=30.0),
        worse,
        replace(worse, variant="in the block", top1=39.5),
        replace(ROW, model="trained", agreement=None, kl=None, difference=None, difference_se=None),
        replace(ROW, model="control", method=ALL, share=1.0, top1=41.2),
    ]
    write_rows(tmp_path / "rows.csv", rows)
    assert read_rows(tmp_path / "rows.csv", Row) == rows
    assert tables.table(rows).splitlines() == [
        "| model (all tokens) | tokens | 100% of the GMACs | 70% of the GMACs | 50% of the GMACs |",
        "|---|---|---|---|---|",
        "| `lam` (40.60) | merged |  | 40.10 (-0.50 ± 0.21, 96.2, 0.012) | 30.00 (-0.50 ± 0.21, 96.2, 0.012) |",
        "| `vit` | ToMe |  | 39.50 (-0.50 ± 0.21, 96.2, 0.012) |  |",
        "| `trained` | merged |  | 40.10 |  |",
        "| `control` | all tokens | 41.20 |  |  |",
        "",
        "Measured on: tiny, val split, 5,000 images; cpu, float32, torch 2.15.",
    ]


def test_trained_weights_have_their_start_in_the_table(tmp_path: Path) -> None:
    merged = TrainedRow(
        **{**vars(ROW), "model": "local-dir:runs/b/model", "share": 0.63}, start="lam.tiny", training="merged, 63%",
        epochs=10, gain=-0.1, gain_se=0.2,
    )  # fmt: skip
    write_rows(tmp_path / "rows.csv", [replace(ROW, model="local-dir:runs/pruned/model", method="mask, drop")])
    earlier = read_rows(tmp_path / "rows.csv", TrainedRow)
    assert tables.trained_table([*earlier, merged]).splitlines()[:4] == [
        "| model | trained with | epochs | tokens | 70% of the GMACs | 63% of the GMACs |",
        "|---|---|---|---|---|---|",
        "| `pruned` |  |  | mask, drop | 40.10 |  |",
        "| `lam.tiny` | merged, 63% | 10 | merged |  | 40.10 (-0.10 ± 0.20) |",
    ]


@pytest.mark.parametrize(
    ("sections", "text"),
    [
        ({}, ALL),
        ({"reduction": {"method": "merge", "target_gmacs": 9.0}}, ALL),
        ({"reduction": {"method": "merge", "keep": 0.5}}, "merged, keep=0.5"),
        ({"prune": {"training": "top-k", "target_gmacs": 0.63}}, "pruned, top-k, 63%"),
        ({"peer": {"method": "ToMe", "target_gmacs": 0.63}}, "ToMe, 63%"),
    ],
)
def test_the_training_is_read_from_the_run(
    sections: dict[str, object], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "_all_gmacs", lambda name: 1.0)
    recipe = {"model": {"name": "lam"}, "schedule": {"epochs": 3, "cooldown_epochs": 1}, **sections}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    (tmp_path / "model").mkdir()
    subject = Subject(f"local-dir:{tmp_path / 'model'}", "vit", "tiny", "val", AT, start="lam")
    assert bench.training_of(subject) == (text, 4)


def test_merging_has_its_difference_to_the_best_peer_in_a_table() -> None:
    ahead = replace(ROW, method=ALIKE, peer="ToMe, after, plain pooling", ahead=-0.254, ahead_se=0.2)
    rows = [ahead, replace(ahead, share=0.5, ahead=1.0, peer="stride"), replace(ahead, method="mask, drop"), ROW]
    assert tables.peer_table(rows).splitlines()[2] == "| `lam` | -0.25 ± 0.20 (ToMe) | +1.00 ± 0.20 (stride) |"
    assert tables.peer_table(rows).endswith("\nMeasured on: tiny, val split, 5,000 images.\n")


def test_a_sentence_counts_the_comparisons_and_names_those_in_which_merging_is_behind() -> None:
    ahead = replace(ROW, method=ALIKE, peer="ToMe", ahead=0.5, ahead_se=0.2)
    rows = [ahead, replace(ahead, share=0.5, ahead=-0.3), replace(ahead, share=0.6, ahead=-0.5)]
    rows += [
        replace(ahead, share=0.4, ahead=9.0, peer="stride"),
        replace(ahead, model="other", data="large", ahead=0.3),
    ]
    peers = [replace(row, method="stride" if row.share == 0.4 else "ToMe", kl=0.02) for row in rows]
    assert tables.peer_table([*rows, *peers]).splitlines()[-3] == (
        "Merging is ahead by more than 1.96 standard errors in 0 of 1 comparison on large and 1 of 3 comparisons on "
        "tiny, and behind by more in 1: `lam` at 60%; this is not corrected for the number of comparisons. Its KL "
        "divergence is smaller than that of the peer in 4 of 4. Where only random and stride reach the budget (1), "
        "nothing is counted."
    )
    assert "and behind by more in none; this" in tables.peer_table([rows[0], *peers])


def test_the_last_layer_is_whole_where_merging_is_compared_with_peers() -> None:
    vit = lamzoo.create_model("vit_micro").eval()
    image, budget = torch.randn(2, 3, 32, 32), 0.7 * lamzoo.profile(vit).gmacs
    keeps, costs = [], []
    for method in (MERGED, ALIKE):
        with METHODS[method](vit)[None](vit, budget, (), None) as setting:
            assert setting is not None
            keeps.append(vit.token_reduction.keep)
            costs.append(setting.gmacs)
            shorter = vit(image)
        lamzoo.merge_tokens(vit, keep=keeps[-1])
        torch.testing.assert_close(vit(image), shorter)  # the same output
        assert lamzoo.profile(vit).gmacs <= costs[-1]
        lamzoo.remove_reduction(vit)
    assert keeps[0] > keeps[1]
    assert "pool" not in vars(vit)


def test_times_survive_their_file_and_fill_their_table(tmp_path: Path) -> None:
    rows = [
        replace(TIME, share=0.5, ratio=0.8),
        TIME,
        replace(TIME, images=16, ratio=0.82),
        replace(TIME, method="ToMe", images=16, threads=2, ratio=0.84),
    ]
    write_rows(tmp_path / "rows.csv", rows)
    assert read_rows(tmp_path / "rows.csv", TimeRow) == rows
    assert tables.time_table(rows).splitlines() == [
        "| model | GMACs | tokens | 1 image, 1 thread | 16 images, 1 thread | 16 images, 2 threads |",
        "|---|---|---|---|---|---|",
        "| `lam` | 70% | merged | 0.80 (0.79-0.85) | 0.82 (0.79-0.85) |  |",
        "| `lam` | 70% | ToMe |  |  | 0.84 (0.79-0.85) |",
        "| `lam` | 50% | merged | 0.80 (0.79-0.85) |  |  |",
        "",
        "Measured on: cpu, float32, torch 2.15.",
    ]


def test_tables_without_rows_have_a_heading_alone() -> None:
    for empty in (tables.table([]), tables.peer_table([]), tables.time_table([]), features.table([])):
        assert [line[:2] for line in empty.splitlines()] == ["| ", "|-"]


def test_the_figure_has_masked_and_plain_in_colour_and_peers_in_grey() -> None:
    plain = replace(ROW, model="vit")
    rows = [
        replace(ROW, method=ALL), replace(plain, method=ALL), ROW, plain, replace(ROW, share=0.5, gmacs=0.2),
        replace(ROW, method="ToMe"), replace(plain, method="ToMe"), replace(ROW, model="lam.large", data="large"),
    ]  # fmt: skip
    drawing = draw(rows)
    assert len(drawing.axes) == 2  # one for each data set
    lines = {str(line.get_label()): line for line in drawing.axes[0].lines}
    colours = {label: line.get_color() for label, line in lines.items()}
    assert lines["lam, merged"].get_xdata().tolist() == [0.2, 0.25]
    assert colours["lam, merged"] == colours["lam, all tokens"] != colours["vit, merged"]
    assert colours["vit, merged"] == colours["vit, all tokens"]
    assert not {colours["lam, ToMe"], colours["vit, ToMe"]} & {colours["lam, merged"], colours["vit, merged"]}
    (legend,) = drawing.legends
    own = [f"{of}, {method}" for of in ("masked", "plain") for method in (ALL, "merged")]
    assert [text.get_text() for text in legend.get_texts()] == [*own, "ToMe"]  # a peer once


@pytest.mark.parametrize("missing", [ALL, "merged", "ToMe"])
def test_the_figure_is_drawn_without_rows_that_are_missing(missing: str) -> None:
    rows = [replace(ROW, method=method, model="vit") for method in (ALL, "merged", "ToMe") if method != missing]
    drawing = draw(rows)
    assert [text.get_text() for text in drawing.legends[0].get_texts()] == [
        label for label in ("plain, all tokens", "plain, merged", "ToMe") if not label.endswith(missing)
    ]


def test_a_figure_of_no_rows_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figure, none = tmp_path / "x.svg", tmp_path / "none.csv"
    write_rows(none, [replace(ROW, method="mask, drop")])  # the figure has no pruning
    monkeypatch.setattr("sys.argv", ["reduction", "--figure", str(figure), "--results", str(none)])
    with pytest.raises(SystemExit) as ended:
        bench.main()
    assert ended.value.code == 2
    assert f"{none} has no rows to draw; measure some first" in capsys.readouterr().err
    assert not figure.exists()


def test_the_nearest_neighbour_is_another_image() -> None:
    vectors = torch.tensor([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0], [0.1, 3.0], [1.0, 1.1]])
    correct = features.neighbour_correct(vectors, torch.tensor([0, 0, 1, 1, 0]))
    assert correct.tolist() == [True, True, True, True, False]  # the last lies nearest to one of class 1


def test_dense_features_are_compared_patch_by_patch() -> None:
    reference = torch.tensor([[[3.0, 0.0], [0.0, 4.0]]])
    assert features.dense_differences(reference, reference) == (1.0, 0.0)
    cosine, error = features.dense_differences(torch.tensor([[[3.0, 0.0], [4.0, 0.0]]]), reference)
    assert cosine == pytest.approx(0.5)
    assert error == pytest.approx(math.sqrt(32) / 5)


def test_features_with_all_tokens_are_their_own_reference() -> None:
    vit = model(masked=False)
    vit.reset_classifier(0)  # type: ignore[operator]
    reference = features.Reference.of(vit, images(16))
    whole = features.measure(vit, ALL, None, 1.0, reference)
    merged = features.measure(vit, "merged", None, 0.7, reference)
    assert whole is not None
    assert merged is not None
    assert (whole.cosine, whole.difference, whole.difference_se, whole.patch_cosine) == (1.0, 0.0, 0.0, None)
    assert merged.gmacs < whole.gmacs
    assert merged.patch_cosine is not None
    assert 0 < merged.patch_cosine < 1
    assert merged.dense_images == 2


def test_the_table_of_features_has_a_line_for_each_method_and_budget(tmp_path: Path) -> None:
    tome = replace(FEATURES, method="ToMe", variant="after the block", patch_cosine=None, patch_error=None, cosine=0.9)
    rows = [FEATURES, tome, replace(tome, variant="in the block", cosine=0.95)]
    write_rows(tmp_path / "rows.csv", rows)
    assert read_rows(tmp_path / "rows.csv", features.Row) == rows
    assert features.table(rows).splitlines()[2:] == [
        "| merged | 63% | 0.9900 | 58.10 | +0.40 ± 0.60 | 0.9700 | 0.200 |",
        "| ToMe | 63% | 0.9500 | 58.10 | +0.40 ± 0.60 |  |  |",
        "",
        "Measured on: vit, clothes, 700 photographs (90 for patches); cpu, float32, torch 2.15.",
    ]


def test_missing_weights_of_the_backbone_are_named(tmp_path: Path) -> None:
    with pytest.raises(lamzoo.LamzooError, match=r"no weights at .*none\.safetensors; .*--weights"):
        features.load_backbone(tmp_path / "none.safetensors")


def test_images_are_read_as_the_model_reads_them(tmp_path: Path) -> None:
    for name, colour in (("a", 255), ("b", 0)):
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.new("RGB", (40, 32), (colour, 0, 0)).save(tmp_path / "val" / name / "0.png")
    vit = model()
    vit.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "crop_pct": 1.0}  # type: ignore[assignment]
    loaded = Images.load(vit, str(tmp_path), "val")
    assert loaded.labels.tolist() == [0, 1]
    assert loaded.pixels.shape == (2, 3, 32, 32)
    assert loaded.pixels[:, 0].mean(dim=(1, 2)).tolist() == pytest.approx([1.0, -1.0])
