"""The comparison of token reductions: equal budgets, and a results file that gives back its rows."""

from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import lamzoo
from benchmarks.reduction import METHODS, Row, figure, largest, table
from benchmarks.rows import read_rows, write_rows

ROW = Row(
    model="lam", plain="vit", method="mask, drop", share=0.7, setting=0.625, gmacs=0.25, top1=40.1, latency_ratio=0.8,
    latency_ratio_q1=0.79, latency_ratio_q3=0.85, throughput_ratio=0.7, data="tiny", split="val", device="cpu",
    threads=2, torch="2.15",
)  # fmt: skip


def model() -> nn.Module:
    torch.manual_seed(0)
    vit = timm.models.VisionTransformer(
        img_size=64, patch_size=8, embed_dim=32, depth=5, num_heads=2, num_classes=5
    ).eval()
    return lamzoo.add_lam(vit, lamzoo.LamConfig(rank=3, init="paper"))


@pytest.mark.parametrize("name", [name for name in METHODS if name != "all tokens"])
def test_a_method_gets_the_largest_setting_within_the_budget(name: str) -> None:
    vit, method, at = model(), METHODS[name], (0, 1, 2)
    whole = lamzoo.profile(vit).gmacs
    budget = 0.7 * whole
    setting = largest(method, vit, at, budget)
    assert setting is not None

    def gmacs(setting: float) -> float:
        with method.open(vit, setting, at):
            return lamzoo.profile(vit).gmacs

    following = method.settings[list(method.settings).index(setting) + 1]
    assert gmacs(setting) <= budget < gmacs(following)
    assert lamzoo.profile(vit).gmacs == whole  # nothing stays behind
    assert largest(method, vit, at, whole * 1e-3) is None


def test_rows_survive_their_file_and_fill_the_table(tmp_path: Path) -> None:
    rows = [ROW, replace(ROW, share=0.5, top1=30.0), replace(ROW, model="vit", method="ToMe", setting=3)]
    write_rows(tmp_path / "rows.csv", rows)
    assert read_rows(tmp_path / "rows.csv", Row) == rows
    assert table(rows).splitlines() == [
        "| model | tokens | 70% of the GMACs | 50% of the GMACs |",
        "|---|---|---|---|",
        "| `lam` | mask, drop | 40.10 (0.80, 0.70) | 30.00 (0.80, 0.70) |",
        "| `vit` | ToMe | 40.10 (0.80, 0.70) |  |",
        "",
        "Measured on: tiny, val split; cpu, 2 threads, torch 2.15.",
    ]


def test_the_figure_has_a_line_for_each_model_and_method() -> None:
    local = "local-dir:runs/lam.pruned/model"
    rows = [ROW, replace(ROW, share=0.5, gmacs=0.2), replace(ROW, model="vit.tag", method="ToMe")]
    drawing = figure([*rows, replace(ROW, model=local, data="large")])
    assert len(drawing.axes) == 4  # data by what they are drawn against
    for axis in drawing.axes[:2]:
        assert [line.get_label() for line in axis.lines] == ["lam, mask, drop", "vit, ToMe"]
    assert [line.get_label() for line in drawing.axes[2].lines] == ["lam.pruned, mask, drop"]
    assert drawing.axes[0].lines[0].get_xdata().tolist() == [0.2, 0.25]
