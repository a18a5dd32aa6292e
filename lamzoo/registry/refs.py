"""Model names: the one parser of every form that Python, the command line, recipes and plug-ins accept."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lamzoo.errors import UnknownModelError
from lamzoo.tasks import task_of_predictions

TIMM_PREFIX = "timm/"
OPEN_CLIP_PREFIX = "open_clip/"
HF_PREFIX = "hf/"

Kind = Literal["registered", "timm", "open_clip", "hf", "local-dir", "hf-hub", "checkpoint", "program", "predictions"]

_FILE_KINDS: dict[str, Kind] = {
    ".onnx": "program",
    ".pt2": "program",
    ".safetensors": "checkpoint",
    ".safetensors.index.json": "checkpoint",
    ".bin": "checkpoint",
    ".pth": "checkpoint",
    ".pt": "checkpoint",
    ".ckpt": "checkpoint",
}
#: Names of the files that ``save_pretrained`` writes its weights to.
SAVED_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


@dataclass(frozen=True)
class ModelRef:
    """A parsed model name.

    ============================================  =================================================================
    form                                          kind
    ============================================  =================================================================
    ``arch``, ``arch.tag``                        ``"registered"``: a card or a plug-in
    ``timm/NAME``, ``timm/NAME.tag``              ``"timm"``
    ``open_clip/NAME``, ``open_clip/NAME:tag``    ``"open_clip"``
    ``hf/OWNER/NAME``, ``...@revision``           ``"hf"``: a model of Hugging Face transformers on the hub
    ``hf-hub:OWNER/NAME``, ``...@revision``       ``"hf-hub"``
    ``local-dir:DIR``, ``DIR``                    ``"local-dir"``: a folder of ``save_pretrained``, or of a training run
    ``DIR/model.safetensors``                     ``"local-dir"``, if ``DIR`` is a saved model
    any other weights file                        ``"checkpoint"``: weights of an unknown architecture
    ``FILE.onnx``, ``FILE.pt2``                   ``"program"``: written by ``export_model``
    ``FILE.jsonl[.gz]``, ``FILE.json``            ``"predictions"``: stored ones, which ``lamzoo eval`` scores
    ============================================  =================================================================

    A registered name has priority over a folder of the same name, which ``./NAME`` refers to.

    Attributes:
        text: the name as given.
        kind: its form.
        arch: name in the registry, without tag: ``lam_vit_base``, ``timm/vit_base_patch16_224``,
            ``open_clip/ViT-B-32``; empty for folders, repositories and files.
        tag: the tag, if the name has one.
        path: the saved model's folder, or the file; None for names and repositories.
        repo: hub repository.
        revision: commit, tag or branch of the repository; None for the default branch.
    """

    text: str
    kind: Kind
    arch: str = ""
    tag: str | None = None
    path: Path | None = None
    repo: str = ""
    revision: str | None = None

    @classmethod
    def parse(
        cls, name: str | os.PathLike[str], *, is_registered: Callable[[str], bool] = lambda arch: False
    ) -> ModelRef:
        """Parses a name; use :func:`lamzoo.registry.catalog.model_ref`, which passes ``is_registered``.

        Args:
            name: any of the forms above.
            is_registered: whether a name without tag is a registered one; asked only if a saved folder has that name.

        Raises:
            UnknownModelError: an unknown prefix, nothing behind a prefix, or a path that doesn't exist.
        """
        text = os.fspath(name)
        head, colon, place = text.partition(":")
        if text in ("local-dir:", "hf-hub:"):
            raise UnknownModelError(f"There is no model {text!r}: nothing follows the prefix.")
        if text.startswith("local-dir:"):
            return cls.of_folder(place, text)
        if text.startswith("hf-hub:"):
            repo, _, revision = place.partition("@")
            return cls(text, "hf-hub", repo=repo, revision=revision or None)
        if text.startswith(OPEN_CLIP_PREFIX):
            arch, _, tag = text.partition(":" if colon else ".")
            return cls(text, "open_clip", arch=arch, tag=tag or None)
        if text.startswith(HF_PREFIX) and text != HF_PREFIX:
            repo, _, revision = text.removeprefix(HF_PREFIX).partition("@")
            return cls(text, "hf", repo=repo, revision=revision or None)
        arch, _, tag = text.partition(".")
        if text.startswith(TIMM_PREFIX):
            return cls(text, "timm", arch=arch, tag=tag or None)
        if colon and not os.path.exists(text) and not Path(text).drive:
            close = difflib.get_close_matches(head, ("local-dir", "hf-hub"), n=1)
            hint = f"did you mean {close[0]}:{place}?" if close else "the prefixes are local-dir: and hf-hub:."
            raise UnknownModelError(f"There is no model {text!r}: {head!r} is not a known prefix; {hint}")
        if _is_path(text):
            return _of_path(text)
        saved = _has_config(Path(text)) or _has_config(Path(text, "model"))
        if saved and not is_registered(arch):
            return cls.of_folder(text, text)
        return cls(text, "registered", arch=arch, tag=tag or None)

    @classmethod
    def of_folder(cls, folder: str | os.PathLike[str], text: str | None = None) -> ModelRef:
        """Returns the reference to a saved model, given its folder or that of the run that trained it.

        Args:
            folder: the folder; whether it holds a model is checked when it is read.
            text: the name as given; ``local-dir:<folder>`` by default.
        """
        path = Path(os.path.expanduser(folder))
        if not _has_config(path) and _has_config(path / "model"):
            path = path / "model"
        return cls(f"local-dir:{os.fspath(folder)}" if text is None else text, "local-dir", path=path)

    @property
    def name(self) -> str:
        """The name in one form for each model: ``arch.tag``, or with its prefix."""
        if self.arch:
            return join_name(self.arch, self.tag)
        if self.kind == "local-dir" and not self.text.startswith("local-dir:"):
            return f"local-dir:{self.path}"
        return self.text

    @property
    def is_saved(self) -> bool:
        """Whether the model is described by a ``config.json``, in a folder or a hub repository."""
        return self.kind in ("local-dir", "hf-hub")


def name_of(model: object) -> str:
    """Returns the registry name of a model; the name of its class if it was not created by lamzoo."""
    return getattr(model, "registry_name", None) or type(model).__name__


def display_name(name: str) -> str:
    """Returns a short form of a name for plots: of a saved model, its folder or that of its run; otherwise the name."""
    if not name.startswith("local-dir:"):
        return name
    path = Path(name.removeprefix("local-dir:"))
    return path.parent.name if path.name == "model" and path.parent.name else path.name


def join_name(arch: str, tag: str | None) -> str:
    """Returns ``arch.tag``, or ``arch`` without a tag."""
    return f"{arch}.{tag}" if tag else arch


def split_name(name: str) -> tuple[str, str | None]:
    """Splits ``arch.tag``, or ``open_clip/arch:tag``, into its parts; the tag of a bare name is None."""
    ref = ModelRef.parse(name)
    return ref.arch, ref.tag


def _is_path(text: str) -> bool:
    separators = "/" if os.altsep is None else os.sep + os.altsep
    return text.startswith((".", "~")) or _kind_of_file(text) is not None or any(s in text for s in separators)


def _kind_of_file(text: str) -> Kind | None:
    suffix = max((suffix for suffix in _FILE_KINDS if text.endswith(suffix)), key=len, default="")
    if not suffix and task_of_predictions(text) is not None:
        return "predictions"
    return _FILE_KINDS.get(suffix)


def _has_config(folder: Path) -> bool:
    return os.path.isfile(folder / "config.json")  # False for names that no file can have, where pathlib raises


def _of_path(text: str) -> ModelRef:
    path = Path(os.path.expanduser(text))
    kind = _kind_of_file(text)
    if kind == "checkpoint" and SAVED_WEIGHTS.fullmatch(path.name) and _has_config(path.parent):
        return ModelRef.of_folder(path.parent, text)
    if kind is not None:
        return ModelRef(text, kind, path=path)
    if os.path.isdir(path):
        return ModelRef.of_folder(path, text)
    if os.path.exists(path):
        raise UnknownModelError(f"There is no model {text!r}: a file of this kind is neither weights nor a program.")
    siblings = [str(p) for p in path.parent.iterdir() if p.is_dir()] if os.path.isdir(path.parent) else []
    head, _, rest = text.partition("/")
    close = difflib.get_close_matches(str(path), siblings, n=1)
    close += [f"{prefix}/{rest}" for prefix in difflib.get_close_matches(head, ("timm", "open_clip", "hf"), n=1)]
    hint = f"did you mean {' or '.join(close)}?" if close else "a hub repository is written hf-hub:OWNER/NAME."
    raise UnknownModelError(f"There is no model {text!r}: no such folder; {hint}")
