"""The records of models and their weights, and the TOML cards that they are read from; needs neither torch nor timm."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from lamzoo.errors import ConfigError, RegistryError
from lamzoo.files import is_plain_name, is_sha256
from lamzoo.lam import LamConfig
from lamzoo.records import Limits, build, read_table
from lamzoo.reduction.config import PruneConfig, TokenReduction
from lamzoo.registry.preprocessing import check_preprocessing

#: Keys of timm's ``PretrainedCfg`` that a card may set: preprocessing, classes, names of the first and last layers.
CFG_KEYS = frozenset(
    {
        "input_size",
        "test_input_size",
        "min_input_size",
        "fixed_input_size",
        "interpolation",
        "crop_pct",
        "test_crop_pct",
        "crop_mode",
        "mean",
        "std",
        "num_classes",
        "label_names",
        "label_descriptions",
        "pool_size",
        "first_conv",
        "classifier",
    }
)


_REDUCTIONS: dict[str, type[TokenReduction]] = {"prune": PruneConfig, "reduction": TokenReduction}


@dataclass(frozen=True)
class PretrainedWeights:
    """One set of weights of a model: a tag.

    Exactly one of ``file``, ``hub``, ``timm`` and ``open_clip`` is the primary source; a ``file`` may have a ``hub``
    as well, for installations without the file, and ``timm`` or ``open_clip`` the repository that their tag means.

    Attributes:
        name: the tag, the part after the dot in ``arch.tag``.
        file: name of a safetensors file (or of the ``.index.json`` of a sharded one) in the weights folder.
        hub: Hugging Face Hub repository, ``owner/name``.
        hub_file: file in that repository; by default ``model.safetensors``, or what timm and open_clip call theirs.
        revision: commit of that repository.
        timm: timm's ``arch.tag``, weights of the plain backbone.
        open_clip: open_clip's ``model:tag``, weights of the towers.
        sha256: hash of the file, or of its index if sharded; None to rely on the hub's etag.
        dataset: training data.
        licence: SPDX identifier of the weights.
        metrics: measured values, with ``dataset`` and the ``command`` that measured them.
        recipe: training recipe, for weights trained here.
        args: arguments of the builder that the weights need.
        pretrained_cfg: keys of timm's ``PretrainedCfg``, overriding the model's; includes ``label_names``.
        reduction: token reduction that the weights were trained with; ``prune`` in a card is its earlier form.
        lam: masks that the weights were trained with, where they differ from the model's.
        params: number of parameters with these masks.
        gmacs: 10^9 multiply-accumulates with these masks.
        plain: ``arch.tag`` of the plain weights to compare with, where it isn't the model's twin with the same tag.
        note: a sentence that is logged when the weights are used, such as where the tag's earlier ones are.
    """

    name: str
    file: str | None = None
    hub: str | None = None
    hub_file: str | None = None
    revision: str | None = None
    timm: str | None = None
    open_clip: str | None = None
    sha256: str | None = None
    dataset: str | None = None
    licence: str | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    recipe: str | None = None
    args: Mapping[str, Any] = field(default_factory=dict)
    pretrained_cfg: Mapping[str, Any] = field(default_factory=dict)
    reduction: TokenReduction | None = None
    lam: LamConfig | None = None
    params: Annotated[int, Limits(least=0)] | None = None
    gmacs: Annotated[float, Limits(least=0)] | None = None
    plain: str | None = None
    note: str | None = None

    @property
    def prune(self) -> PruneConfig | None:
        """The reduction, if it is pruning."""
        return pruning_of(self.reduction)

    @property
    def external(self) -> bool:
        """Whether the file is in another project's format and holds the plain backbone only."""
        return self.timm is not None or self.open_clip is not None

    @property
    def on_hub(self) -> bool:
        """Whether the hub is the primary source."""
        return self.file is None


@dataclass(frozen=True)
class ModelSpec:
    """One model of the registry: how to build it, and its sets of weights.

    Attributes:
        name: as given to ``create_model``.
        family: name of the card, or package of the plug-in.
        builder: ``"module:function"``, or the function itself for models registered in code.
        task: name of one of :data:`lamzoo.tasks.TASKS`.
        backbone: the builder's ``config``; ``timm`` in it names a timm architecture.
        lam: default masks; None for a plain model.
        plain: name of the registered model to compare with: the same backbone without masks, trained alike, with the
            same tags.
        description: one sentence.
        params: number of parameters, with the default head.
        gmacs: 10^9 multiply-accumulates of one image at the default input size, attention included.
        pretrained_cfg: keys of timm's ``PretrainedCfg`` shared by all tags.
        tags: in order of preference.
        weights_dir: folder of the tags' files.
        source: origin of the registration.
    """

    name: str
    family: str
    builder: str | Callable[..., Any]
    task: str = "classification"
    backbone: Mapping[str, Any] = field(default_factory=dict)
    lam: LamConfig | None = None
    plain: str | None = None
    description: str = ""
    params: int | None = None
    gmacs: float | None = None
    pretrained_cfg: Mapping[str, Any] = field(default_factory=dict)
    tags: Mapping[str, PretrainedWeights] = field(default_factory=dict)
    weights_dir: Path | None = None
    source: Literal["card", "plug-in", "timm", "open_clip", "transformers"] = "card"

    def cfg(self, tag: PretrainedWeights | None) -> dict[str, Any]:
        """Returns the keys of timm's ``PretrainedCfg`` that the card states for a tag, lists as tuples."""
        values = {**self.pretrained_cfg, **(tag.pretrained_cfg if tag is not None else {})}
        return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}

    def of_tag(self, tag: PretrainedWeights | None) -> ModelSpec:
        """Returns the model with the masks of a tag, which may differ from its own, and the size that it has then."""
        if tag is None or tag.lam is None:
            return self
        return dataclasses.replace(self, lam=tag.lam, params=tag.params, gmacs=tag.gmacs)

    def plain_of(self, tag: PretrainedWeights | None) -> str | None:
        """Returns the name of the plain twin, with the weights to compare those of a tag with."""
        if tag is None or self.plain is None:
            return self.plain
        return tag.plain or f"{self.plain}.{tag.name}"


def data_dir(kind: Literal["recipes", "registry", "weights"]) -> Path:
    """Returns the folder of the cards, the bundled weights or the recipes: in a wheel's package, or in a checkout.

    Raises:
        RegistryError: the installation lacks the folder.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "_data" / kind, package.parent / "benchmarks" / kind, package.parent / kind):
        if folder.is_dir():
            return folder
    raise RegistryError(
        f"This installation of lamzoo has no {kind} folder ({folder}); install it again from its wheel."
    )


@dataclass(frozen=True)
class _Model:
    """The table of one model in a card, before its masks and tags are read."""

    builder: str
    backbone: Mapping[str, Any] = field(default_factory=dict)
    lam: Mapping[str, Any] | None = None
    plain: str | None = None
    description: str = ""
    params: Annotated[int, Limits(least=0)] | None = None
    gmacs: Annotated[float, Limits(least=0)] | None = None
    pretrained_cfg: Mapping[str, Any] = field(default_factory=dict)
    tags: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Card:
    """The keys of a card."""

    models: Mapping[str, _Model]
    family: str | None = None
    task: str = "classification"
    description: str = ""


def read_card(path: str | Path, *, weights_dir: Path, source: Literal["card", "plug-in"] = "card") -> list[ModelSpec]:
    """Reads one family's card.

    Args:
        path: the TOML file.
        weights_dir: folder of the tags' files.
        source: origin of the card.

    Returns:
        The models of the card, in the order of the file.

    Raises:
        RegistryError: the file is not TOML, or has an unknown, missing or mistyped key; names file and key.
    """
    path = Path(path)
    table = read_table(path, what="Registry card", error=RegistryError)
    card = build(_Card, table, source=f"{path}:", error=RegistryError)
    for name, model in card.models.items():
        _check_model(name, model, f"{path}: models.{name}")
    return [
        ModelSpec(
            name=name,
            family=card.family or path.stem,
            task=card.task,
            lam=_read_lam(model.lam, f"{path}: models.{name}"),
            tags={
                tag: read_weights(tag, tags, f"{path}: models.{name}.tags.{tag}") for tag, tags in model.tags.items()
            },
            weights_dir=weights_dir,
            source=source,
            **{key: value for key, value in vars(model).items() if key not in ("lam", "tags")},
        )
        for name, model in card.models.items()
    ]


def read_weights(name: str, table: Mapping[str, Any], where: str) -> PretrainedWeights:
    """Reads the table of one tag.

    Args:
        name: the tag.
        table: the keys of :class:`PretrainedWeights`.
        where: place of the table, for messages.

    Raises:
        RegistryError: an unknown key, a wrong type, no source or two; names ``where`` and the key.
    """
    if "name" in table:
        raise RegistryError(f"{where}: key name is unknown; the tag's name is the key of its table.")
    plain = {key: value for key, value in table.items() if key not in (*_REDUCTIONS, "lam")}
    tag = build(PretrainedWeights, {"name": name, **plain}, source=f"{where}:", error=RegistryError)
    check_cfg(tag.pretrained_cfg, where)
    tag = dataclasses.replace(tag, lam=_read_lam(table.get("lam"), where))
    given = [key for key in _REDUCTIONS if key in table]
    if len(given) > 1:
        raise RegistryError(f"{where}: prune and reduction exclude each other; leave one out.")
    for key in given:
        try:
            tag = dataclasses.replace(tag, reduction=_REDUCTIONS[key].from_dict(table[key]))
        except ConfigError as error:
            raise RegistryError(f"{where}.{key}: {error}") from error
    sources = (tag.timm, tag.open_clip, tag.file or (None if tag.external else tag.hub))
    if sum(source is not None for source in sources) != 1:
        raise RegistryError(f"{where}: a tag needs timm, or open_clip, or file and/or hub, as its source.")
    if not is_plain_name(name):
        raise RegistryError(f"{where}: a tag's name may not be empty or contain '/'.")
    if tag.file is not None and not all(map(is_plain_name, tag.file.split("/"))):
        raise RegistryError(f"{where}: file = {tag.file!r} is not below the weights folder.")
    if tag.open_clip is not None and tag.open_clip.count(":") != 1:
        raise RegistryError(f"{where}: open_clip = {tag.open_clip!r}; it must be 'model:tag'.")
    if tag.hub is not None and not tag.external and tag.revision is None:
        raise RegistryError(f"{where}: hub = {tag.hub!r} needs a revision, the commit that the sha256 belongs to.")
    if not tag.external and tag.sha256 is None:
        raise RegistryError(f"{where}: the tag's file needs its sha256.")
    if tag.lam is not None and tag.external:
        raise RegistryError(f"{where}: weights of timm and open_clip have no masks; leave lam out.")
    if tag.sha256 is not None and not is_sha256(tag.sha256):
        raise RegistryError(f"{where}: sha256 = {tag.sha256!r} is not 64 lower-case hexadecimal digits.")
    return tag


def _check_model(name: str, model: _Model, where: str) -> None:
    """Checks what the types of a model's table don't say."""
    if "." in name or ":" in name or not is_plain_name(name):
        raise RegistryError(f"{where}: a model's name may not be empty or contain '.', '/' or ':'.")
    module, _, function = model.builder.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), function)):
        raise RegistryError(f"{where}: builder is {model.builder!r}; it must be 'module:function'.")
    if not isinstance(model.backbone.get("timm", ""), str):
        raise RegistryError(f"{where}: backbone.timm is {model.backbone['timm']!r}; it must name an architecture.")
    check_cfg(model.pretrained_cfg, where)
    if model.plain is not None and model.lam is None:
        raise RegistryError(f"{where}: plain is {model.plain!r}; it is only for a model with masks.")


def _read_lam(fields: Mapping[str, Any] | None, where: str) -> LamConfig | None:
    try:
        return None if fields is None else LamConfig.from_dict(fields)
    except ConfigError as error:
        raise RegistryError(f"{where}.lam: {error}") from error


def pruning_of(reduction: TokenReduction | None) -> PruneConfig | None:
    """Returns a token reduction under its earlier name, if it is pruning at given layers."""
    if reduction is None or reduction.method == "merge" or reduction.at is None:
        return None
    return PruneConfig.of(reduction)


def check_cfg(cfg: Mapping[str, Any], where: str) -> None:
    """Checks the table ``pretrained_cfg`` of a model or tag.

    Raises:
        RegistryError: a key is unknown, mistyped or out of range; names it.
    """
    for key in cfg:
        if key not in CFG_KEYS:
            raise RegistryError(
                f"{where}.pretrained_cfg: unknown key {key!r}; the keys are {', '.join(sorted(CFG_KEYS))}."
            )
    check_preprocessing(cfg, source=f"{where}.pretrained_cfg:")
