"""Position tables resize as timm's position embeddings do, and never touch class and register tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import resample_abs_pos_embed

from lamzoo.errors import MaskShapeError
from lamzoo.lam import resize_table
from lamzoo.lam.resize import rows_of_present

sides = st.integers(1, 6)


@settings(derandomize=True, max_examples=40)
@given(old=st.tuples(sides, sides), new=st.tuples(sides, sides), prefix=st.integers(0, 3), heads=st.integers(1, 2))
def test_grids_resize_as_timm_does(old: tuple[int, int], new: tuple[int, int], prefix: int, heads: int) -> None:
    table = torch.randn(heads, prefix + old[0] * old[1], 5)
    length = prefix + new[0] * new[1]
    resized = resize_table(table, length, num_prefix_tokens=prefix, old_grid=old, new_grid=new)
    assert resized.shape == (heads, length, 5)
    assert torch.equal(resized[:, :prefix], table[:, :prefix])
    for head in range(heads):
        expected = resample_abs_pos_embed(
            table[head : head + 1], list(new), old_size=list(old), num_prefix_tokens=prefix, interpolation="bicubic"
        )
        torch.testing.assert_close(resized[head : head + 1], expected)


@settings(derandomize=True, max_examples=40)
@given(old=st.tuples(sides, sides), new=st.tuples(sides, sides), heads=st.integers(1, 2))
def test_a_turned_image_gives_the_turned_table(old: tuple[int, int], new: tuple[int, int], heads: int) -> None:
    image = torch.randn(heads, *old, 2)
    length = new[0] * new[1]
    upright = resize_table(image.flatten(1, 2), length, old_grid=old, new_grid=new).unflatten(1, new)
    turned = resize_table(image.transpose(1, 2).flatten(1, 2), length, old_grid=old[::-1], new_grid=new[::-1])
    torch.testing.assert_close(upright, turned.unflatten(1, new[::-1]).transpose(1, 2), atol=1e-5, rtol=1e-5)


@settings(max_examples=40)
@given(
    size=st.integers(1, 6),
    prefix=st.integers(0, 2),
    present=st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=3),
    width=st.integers(1, 9),
)
def test_a_padded_sample_reads_the_rows_of_its_own_length(
    size: int, prefix: int, present: list[list[bool]], width: int
) -> None:
    table = torch.randn(2, prefix + size, 3, dtype=torch.float64)
    there = torch.tensor(present)[:, :width]
    rows = rows_of_present(table, there, prefix)
    assert rows.shape == (len(there), 2, width, 3)
    for sample, mask in zip(rows, there, strict=True):
        own = resize_table(table, int(mask.sum()), num_prefix_tokens=prefix)
        torch.testing.assert_close(sample[:, mask], own, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("grid", [None, (2, 3)])
def test_same_size_is_the_same_table(grid: tuple[int, int] | None) -> None:
    table = torch.randn(2, 7, 3)
    for new in (None, grid):
        assert torch.equal(resize_table(table, 7, num_prefix_tokens=1, old_grid=grid, new_grid=new), table)


def test_a_turned_grid_of_the_same_length_is_resampled() -> None:
    table = torch.randn(1, 7, 3)
    turned = resize_table(table, 7, num_prefix_tokens=1, old_grid=(2, 3), new_grid=(3, 2))
    assert torch.equal(turned[:, 0], table[:, 0])
    assert not torch.allclose(turned, table)


@settings(derandomize=True, max_examples=40)
@given(size=st.integers(1, 9), wanted=st.integers(0, 12), prefix=st.integers(0, 2))
def test_sequences_are_cut_or_stretched(size: int, wanted: int, prefix: int) -> None:
    size += prefix
    table = torch.randn(2, size, 3)
    resized = resize_table(table, wanted, num_prefix_tokens=prefix)
    assert resized.shape == (2, wanted, 3)
    if wanted <= size:
        assert torch.equal(resized, table[:, :wanted])
    else:
        assert torch.equal(resized[:, :prefix], table[:, :prefix])
        rest = resized[:, prefix:]
        assert (rest.amax(1) <= table[:, prefix:].amax(1) + 1e-6).all()  # linear: never beyond its neighbours
        assert (rest.amin(1) >= table[:, prefix:].amin(1) - 1e-6).all()


def test_stretching_a_line_gives_the_same_line() -> None:
    table = torch.linspace(0, 1, 5).view(1, 5, 1)
    middle = resize_table(table, 10)[0, 1:-1, 0]
    torch.testing.assert_close(middle.diff(), torch.full((7,), 0.125))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("grids", [{}, {"old_grid": (2, 2), "new_grid": (3, 3)}])
def test_dtype_is_kept_and_gradients_flow(dtype: torch.dtype, grids: dict[str, tuple[int, int]]) -> None:
    table = torch.randn(1, 5, 3, dtype=dtype, requires_grad=True)
    resized = resize_table(table, 10, num_prefix_tokens=1, **grids)
    assert resized.dtype == dtype
    resized.sum().backward()
    assert table.grad is not None
    assert (table.grad != 0).all()


def test_errors_name_the_sizes() -> None:
    table = torch.randn(1, 7, 3)
    with pytest.raises(MaskShapeError, match=r"7 rows isn't 1 prefix tokens and a \(2, 2\) grid"):
        resize_table(table, 5, num_prefix_tokens=1, old_grid=(2, 2), new_grid=(2, 2))
    with pytest.raises(MaskShapeError, match=r"7 tokens \(1 prefix, grid \(2, 3\)\) got 6 tokens, grid None"):
        resize_table(table, 6, num_prefix_tokens=1, old_grid=(2, 3))
    with pytest.raises(MaskShapeError, match=r"got 6 tokens, grid \(2, 3\)"):
        resize_table(table, 6, num_prefix_tokens=1, old_grid=(2, 3), new_grid=(2, 3))
    with pytest.raises(MaskShapeError, match=r"2 prefix tokens alone cannot be resized to 4 tokens"):
        resize_table(table[:, :2], 4, num_prefix_tokens=2)
    with pytest.raises(MaskShapeError, match="2 prefix tokens alone"):
        rows_of_present(table[:, :2], torch.ones(1, 4, dtype=torch.bool), num_prefix_tokens=2)
