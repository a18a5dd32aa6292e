"""Token-reduction settings, as data: where tokens leave, how many, and what happens to them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

from lamzoo.errors import ConfigError
from lamzoo.lam.config import from_fields

Method = Literal["merge", "prune"]
Score = Literal["mask", "attention", "attention-value", "redundancy"]
Rest = Literal["drop", "merge", "nearest"]
Training = Literal["straight-through", "top-k"]

_METHODS: Mapping[Method, str] = {"merge": "merging", "prune": "pruning"}

# The fields of each method, in the order in which they are written.
_FIELDS: Mapping[Method, tuple[str, ...]] = {
    "merge": ("method", "keep", "at", "frames"),
    "prune": ("keep", "method", "at", "score", "rest", "training"),
}


@dataclass(frozen=True)
class TokenReduction:
    """Token-reduction settings of a model.

    Merging is the default, and the better choice without training: a few similar tokens are averaged in each layer,
    with masks or without; see :func:`lamzoo.merge_tokens`. Pruning removes tokens after a few layers by their scores
    under the masks, and can be trained; use it to remove a part of the image, such as the background, or to train the
    masks to select tokens; see :func:`lamzoo.prune_tokens`.

    Attributes:
        keep: share of the patches to keep. With ``method="merge"``, of those of the input, after the last layer,
            rounded up; in a describer, of the tokens of each modality. With ``method="prune"``, of a layer's own, at
            each layer of ``at``, rounded up. Class and register tokens don't count.
        method: ``"merge"`` or ``"prune"``.
        at: layers, counted from 0. Merging: in which tokens merge; by default all of them, or every second one in a
            model of at least 8 blocks and 128 patches. Pruning: whose attention scores the tokens; pruned tokens leave
            after the layer's block. By default three, at a quarter, half and three quarters of the depth.
        score: for pruning, how tokens are scored. ``"mask"``: mean mask value of a key over the queries, computed from
            the factors in O(N R); ``"attention"``: attention of the class token (of the mean query without one) under
            the mask, in O(N (d + R)); ``"attention-value"``: that, times the norm of the value; ``"redundancy"``: every
            second token is kept, and the others are scored by how dissimilar their values are to these, with the mask
            as a second criterion, in O(N^2 d); meant for ``rest="nearest"``.
        rest: for pruning. ``"drop"`` removes pruned tokens, ``"merge"`` averages them into one token, weighted by the
            softmax of their scores, ``"nearest"`` averages each into the kept token with the highest cosine similarity.
        training: for pruning, its behaviour in training mode; merging is the same in training and evaluation.
            ``"straight-through"``: all tokens stay in place; pruned ones are hidden from later layers and from the
            pooling by decisions whose gradient reaches the scores (the principle of DynamicViT, arXiv 2106.02034). It
            costs as much as the unpruned model, plus a second attention in each later layer; add
            :func:`lamzoo.pruning_loss` to the loss. ``"top-k"``: as in evaluation and at its cost; no gradient flows
            through the choice of tokens.
        frames: for merging in CLIP4Clip, the share of a video's frames to keep, rounded: similar frames are averaged
            before the image tower encodes them.

    Raises:
        ConfigError: a field has an invalid value, or is one of the other method and differs from its default.
    """

    keep: float
    method: Method = "merge"
    at: tuple[int, ...] | None = None
    score: Score = "mask"
    rest: Rest = "drop"
    training: Training = "straight-through"
    frames: float = 1.0

    def __post_init__(self) -> None:
        for name, what in (("keep", "tokens"), ("frames", "frames")):
            share = getattr(self, name)
            if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
                raise ConfigError(
                    f"{name}={share!r}: the share of {what} to keep must be a number above 0 and at most 1."
                )
        for name, of in (("method", Method), ("score", Score), ("rest", Rest), ("training", Training)):
            value, choices = getattr(self, name), get_args(of)
            if value not in choices:
                raise ConfigError(f"{name}={value!r}: it must be one of {', '.join(map(repr, choices))}.")
        if self.at is not None:
            object.__setattr__(self, "at", layers_of(self.at))
        other: Method = "prune" if self.method == "merge" else "merge"
        for field in dataclasses.fields(TokenReduction):
            value = getattr(self, field.name)
            if field.name in _FIELDS[other] and field.name not in _FIELDS[self.method] and value != field.default:
                raise ConfigError(
                    f"{field.name}={value!r} is a setting of {_METHODS[other]}; leave it out, or set method={other!r}."
                )

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields of the method as plain TOML and JSON values."""
        fields = {name: getattr(self, name) for name in _FIELDS[self.method]}
        if fields["at"] is None:
            del fields["at"]
        else:
            fields["at"] = list(fields["at"])
        if fields.get("frames") == 1:
            del fields["frames"]
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Builds a configuration from the fields given; raises as :meth:`lamzoo.LamConfig.from_dict`."""
        return from_fields(cls, fields)


class PruneConfig(TokenReduction):
    """Token-pruning settings: a :class:`TokenReduction` with ``method="prune"``.

    Args:
        keep: as in :class:`TokenReduction`, like the others; the layers of ``at`` have to be named.
        at: likewise.
        score: likewise.
        rest: likewise.
        training: likewise.

    Raises:
        ConfigError: an argument has an invalid value.
    """

    at: tuple[int, ...]

    def __init__(
        self,
        keep: float,
        at: Sequence[int],
        score: Score = "mask",
        rest: Rest = "drop",
        training: Training = "straight-through",
    ) -> None:
        super().__init__(keep, "prune", layers_of(at), score, rest, training)

    @classmethod
    def of(cls, reduction: TokenReduction) -> PruneConfig:
        """Returns the same pruning under the earlier name."""
        assert reduction.method == "prune" and reduction.at is not None
        return cls(reduction.keep, reduction.at, reduction.score, reduction.rest, reduction.training)

    def to_dict(self) -> dict[str, Any]:
        """Returns the arguments as plain TOML and JSON values."""
        return {name: value for name, value in super().to_dict().items() if name != "method"}


def layers_of(at: object) -> tuple[int, ...]:
    """Returns layers as a tuple.

    Raises:
        ConfigError: these are not layers, as :class:`TokenReduction` takes them.
    """
    layers = tuple(at) if isinstance(at, Iterable) else ()
    if (
        not layers
        or any(isinstance(layer, bool) or not isinstance(layer, int) or layer < 0 for layer in layers)
        or list(layers) != sorted(set(layers))
    ):
        raise ConfigError(f"at={at!r}: name at least one layer, in ascending order, counted from 0.")
    return layers
