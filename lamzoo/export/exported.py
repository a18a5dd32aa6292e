"""Exported programs as modules: callable on images, with preprocessing and class names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lamzoo.errors import ExportError, MissingExtraError, WeightsNotFoundError

Format = Literal["torch", "onnx"]
FORMATS: dict[Format, str] = {"torch": ".pt2", "onnx": ".onnx"}
FACTS, INPUT, OUTPUT = "lamzoo", "images", "logits"


class ExportedModel(nn.Module):
    """An exported program with the interface of a model, for scoring, timing and prediction; computes on the CPU.

    Args:
        run: the program.
        facts: metadata from its file.

    Attributes:
        pretrained_cfg: timm's preprocessing configuration of the model, with class names.
        num_classes: number of classes.
        facts: all metadata of the file: versions, masks, pruning.
    """

    def __init__(self, run: Callable[[Tensor], Tensor], facts: dict[str, Any]) -> None:
        super().__init__()
        self._run = (run,)  # not a submodule: exported programs have no modes to switch
        self.facts = facts
        self.pretrained_cfg: dict[str, Any] = facts["pretrained_cfg"]
        self.num_classes: int = self.pretrained_cfg["num_classes"]

    def forward(self, images: Tensor) -> Tensor:
        """Computes ``(B, num_classes)`` logits of ``(B, C, H, W)`` float32 images."""
        return self._run[0](images.cpu()).to(images.device)


def load_exported(path: str | Path, format: Format | None = None) -> ExportedModel:
    """Loads a program written by :func:`lamzoo.export_model`.

    Args:
        path: the file.
        format: derived from the suffix by default.

    Raises:
        WeightsNotFoundError: the file does not exist.
        ExportError: the file is damaged, or was not exported by lamzoo.
        MissingExtraError: onnxruntime is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsNotFoundError(f"There is no exported program at {path}.")
    load = (
        _load_torch if (format or ("torch" if path.suffix == FORMATS["torch"] else "onnx")) == "torch" else _load_onnx
    )
    try:
        run, facts = load(path)
        return ExportedModel(run, json.loads(facts))
    except MissingExtraError:
        raise
    except Exception as error:
        raise ExportError(
            f"{path} is not a program that lamzoo exported, or is damaged ({type(error).__name__}); export it again."
        ) from error


def _load_torch(path: Path) -> tuple[Callable[[Tensor], Tensor], str]:
    extra = {FACTS: ""}
    with path.open("rb") as file:
        program = torch.export.load(file, extra_files=extra)
    return program.module(), extra[FACTS]


def _load_onnx(path: Path) -> tuple[Callable[[Tensor], Tensor], str]:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError(
            "ONNX files are run by onnxruntime, which is not installed; pip install 'lamzoo[export]'."
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Spinning threads would occupy the cores: PyTorch in the same process would be several times slower.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        (logits,) = session.run([OUTPUT], {INPUT: images.numpy()})
        return torch.from_numpy(logits)

    return run, session.get_modelmeta().custom_metadata_map[FACTS]


_LOADERS: dict[Format, Callable[[Path], tuple[Callable[[Tensor], Tensor], str]]] = {
    "torch": _load_torch,
    "onnx": _load_onnx,
}
