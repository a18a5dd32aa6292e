"""Token-reduction settings, as data: where tokens leave, how many, and what happens to them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lamzoo.errors import ConfigError
from lamzoo.lam.config import from_fields

Score = Literal["mask", "attention", "attention-value", "redundancy"]
Rest = Literal["drop", "merge", "nearest"]
Training = Literal["straight-through", "top-k"]


@dataclass(frozen=True)
class PruneConfig:
    """Token-pruning settings.

    Attributes:
        keep: share of a layer's tokens, class and register tokens excluded, that is kept at each layer of ``at``,
            rounded up.
        at: layers, counted from 0, whose attention scores the tokens; pruned tokens leave after the layer's block.
        score: how tokens are scored. ``"mask"``: mean mask value of a key over the queries, computed from the factors
            in O(N R); ``"attention"``: attention of the class token (of the mean query without one) under the mask, in
            O(N (d + R)); ``"attention-value"``: that, times the norm of the value; ``"redundancy"``: every second token
            is kept, and the others are scored by how dissimilar their values are to these, with the mask as a second
            criterion, in O(N^2 d); meant for ``rest="nearest"``.
        rest: ``"drop"`` removes pruned tokens, ``"merge"`` averages them into one token, weighted by the softmax of
            their scores, ``"nearest"`` averages each into the kept token with the highest cosine similarity.
        training: behaviour in training mode. ``"straight-through"``: all tokens stay in place; pruned ones are hidden
            from later layers and from the pooling by decisions whose gradient reaches the scores (the principle of
            DynamicViT, arXiv 2106.02034). It costs as much as the unpruned model, plus a second attention in each later
            layer; add :func:`lamzoo.pruning_loss` to the loss. ``"top-k"``: as in evaluation and at its cost; no
            gradient flows through the choice of tokens.

    Raises:
        ConfigError: a field has an invalid value.
    """

    keep: float
    at: tuple[int, ...]
    score: Score = "mask"
    rest: Rest = "drop"
    training: Training = "straight-through"

    def __post_init__(self) -> None:
        if isinstance(self.keep, bool) or not isinstance(self.keep, (int, float)) or not 0 < self.keep <= 1:
            raise ConfigError(f"keep={self.keep!r}: the share of tokens to keep must be above 0 and at most 1.")
        layers = tuple(self.at) if isinstance(self.at, Iterable) else ()
        if (
            not layers
            or any(isinstance(layer, bool) or not isinstance(layer, int) or layer < 0 for layer in layers)
            or list(layers) != sorted(set(layers))
        ):
            raise ConfigError(f"at={self.at!r}: name at least one layer, in ascending order, counted from 0.")
        object.__setattr__(self, "at", layers)
        for name, of in (("score", Score), ("rest", Rest), ("training", Training)):
            value, choices = getattr(self, name), get_args(of)
            if value not in choices:
                raise ConfigError(f"{name}={value!r}: it must be one of {', '.join(map(repr, choices))}.")

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain TOML and JSON values."""
        return dataclasses.asdict(self) | {"at": list(self.at)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> PruneConfig:
        """Builds a configuration from the fields given; raises as :meth:`lamzoo.LamConfig.from_dict`."""
        return from_fields(cls, fields)
