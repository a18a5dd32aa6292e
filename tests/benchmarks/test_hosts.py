"""The list of timm's models with masks: of the installed timm, and as add_lam decides."""

from __future__ import annotations

import pytest
import timm

from benchmarks import hosts
from benchmarks.rows import read_rows

ROWS = {row.model: row for row in read_rows(hosts.RESULTS, hosts.Row)}
_QUICK = ("test_vit", "resnet18", "xcit_nano_12_p8_224")
# The first model of each family with each kind of outcome.
_ONE_OF_EACH = {(row.family, row.attention, row.refusal): row.model for row in reversed(ROWS.values())}


def test_the_list_has_every_family_of_timm_and_most_models_with_a_softmax_over_tokens_have_masks() -> None:
    if {row.timm for row in ROWS.values()} != {timm.__version__}:
        pytest.skip("the list was made with another timm")
    every = hosts.all_models()
    assert list(ROWS) == [name for name in every if name in ROWS]
    assert {row.family for row in ROWS.values()} == {hosts.family_of(name) for name in every}
    masked = sum(row.layers > 0 for row in ROWS.values())
    assert masked / (masked + sum(bool(row.refusal) and not row.other for row in ROWS.values())) > 0.9


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in _QUICK else pytest.mark.slow)
        for name in dict.fromkeys([*_QUICK, *_ONE_OF_EACH.values()])
    ],
)
def test_a_row_says_what_add_lam_does(name: str) -> None:
    assert hosts.inspect(name) == ROWS[name]


def test_the_tables_count_and_name_every_model_once() -> None:
    rows = [
        hosts.Row("a", "one", 2, "Attention", None, "1"),
        hosts.Row("b", "one", 3, "Attention, WindowAttention", None, "1"),
        hosts.Row("c", "two", 0, "XCA", f"can't carry a mask, {hosts._OTHER}of channels; choose another.", "1"),
        hosts.Row("d", "two", 0, "Strange", "can't carry a learnable mask; see the list.", "1"),
        hosts.Row("e", "three", 0, None, None, "1"),
    ]
    coverage = hosts.coverage_table(rows)
    assert "| tried, of `timm.list_models()` in timm 1 | 5 |" in coverage
    assert "| whose attention is a softmax over tokens | 3 |" in coverage
    assert "| of these, with masks | 2 (66.7%) |" in coverage
    assert "| `one` | 2 | `Attention`, `WindowAttention` | `a`, `b` |" in hosts.table(rows)
    assert "| `two` | `XCA` | of channels | `c` |" in hosts.left_out_table(rows)
    assert "| `two` | `Strange` | isn't supported | `d` |" in hosts.left_out_table(rows)
