"""Maps from the tokens of a layer to fewer ones."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from lamzoo.lam.token_map import TokenMap, take


def token_map(length: int, few: int, averages: bool, generator: torch.Generator) -> TokenMap:
    """A random map of two samples; every remaining token has members."""
    order = torch.stack([torch.randperm(length, generator=generator) for _ in range(2)])
    kept = order[:, :few].sort(dim=1).values
    if not averages:
        return TokenMap(length, kept)
    into = torch.randint(few, (2, length), generator=generator).scatter(1, kept, torch.arange(few).expand(2, -1))
    return TokenMap.averaging(kept, into, torch.rand(2, length, generator=generator) + 0.1)


@settings(derandomize=True, max_examples=60)
@given(
    lengths=st.tuples(st.integers(3, 9), st.integers(2, 9), st.integers(1, 9)).map(lambda n: sorted(n, reverse=True)),
    averages=st.tuples(st.booleans(), st.booleans()),
    seed=st.integers(0, 2**20),
)
def test_two_maps_in_turn_are_one(lengths: list[int], averages: tuple[bool, bool], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    first = token_map(lengths[0], lengths[1], averages[0], generator)
    second = token_map(lengths[1], lengths[2], averages[1], generator)
    tokens = torch.randn(2, lengths[0], 3, generator=generator)
    both = first.then(second)
    assert_close(both(tokens), second(first(tokens)))
    assert torch.equal(both.kept, first.kept.gather(1, second.kept))


def test_an_average_is_weighted_and_spreads_back_to_its_members() -> None:
    tokens = torch.tensor([[[4.0], [1.0], [8.0], [3.0]]])
    merge = TokenMap.averaging(torch.tensor([[0, 3]]), torch.tensor([[0, 1, 0, 1]]), torch.tensor([[3.0, 1, 1, 1]]))
    assert_close(merge(tokens), torch.tensor([[[5.0], [2.0]]]))
    assert_close(merge.spread(merge(tokens)), torch.tensor([[[5.0], [2.0], [5.0], [2.0]]]))
    assert_close(merge(merge.spread(merge(tokens))), merge(tokens))
    assert_close(take(tokens, merge.kept), torch.tensor([[[4.0], [3.0]]]))


def test_tokens_without_weight_count_for_nothing() -> None:
    tokens = torch.tensor([[[4.0], [torch.finfo().max], [8.0]]])
    merge = TokenMap.averaging(torch.tensor([[0, 2]]), torch.tensor([[0, 0, 1]]), torch.tensor([[1.0, 0, 0]]))
    assert_close(merge(tokens), torch.tensor([[[4.0], [0.0]]]))
