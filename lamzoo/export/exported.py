"""Exported programs as modules: callable on images, with preprocessing and class names."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lamzoo.errors import ConfigError, ExportError, MissingExtraError, WeightsNotFoundError
from lamzoo.export.trust import check_trusted, trust_program
from lamzoo.quiet import quietly
from lamzoo.reading import parse_json, read_bytes, reason
from lamzoo.registry.preprocessing import check_preprocessing

Format = Literal["torch", "onnx"]
FORMATS: dict[Format, str] = {"torch": ".pt2", "onnx": ".onnx"}
FACTS, INPUT, OUTPUT = "lamzoo", "images", "logits"


class ExportedModel(nn.Module):
    """An exported program with the interface of a model, for scoring, timing and prediction; computes on the CPU.

    Args:
        run: the program.
        facts: metadata from its file.
        source: the file, for messages.

    Attributes:
        pretrained_cfg: timm's preprocessing configuration of the model, with class names.
        num_classes: number of classes.
        facts: all metadata of the file: versions, masks, token reduction.

    Raises:
        ExportError: the preprocessing configuration is missing or invalid.
    """

    def __init__(
        self, run: Callable[[Tensor], Tensor], facts: dict[str, Any], source: str | Path = "the exported program"
    ) -> None:
        super().__init__()
        self._run = (run,)  # not a submodule: exported programs have no modes to switch
        self._source = source
        self.facts = facts
        self.pretrained_cfg = _read_cfg(facts, source)
        self.num_classes: int = self.pretrained_cfg["num_classes"]

    def forward(self, images: Tensor) -> Tensor:
        """Computes ``(B, num_classes)`` logits of ``(B, C, H, W)`` float32 images, without gradients.

        Raises:
            ConfigError: the images have another shape or dtype.
            ExportError: the program fails, or returns something else.
        """
        expected = tuple(self.pretrained_cfg["input_size"])
        if images.ndim != 4 or tuple(images.shape[1:]) != expected or images.dtype != torch.float32:
            raise ConfigError(
                f"{self._source} takes float32 images (B, {', '.join(map(str, expected))}) and got {images.dtype} "
                f"{tuple(images.shape)}; resize them, or export the model at their size."
            )
        try:
            with torch.no_grad():  # the weights of a torch.export program require gradients
                logits = self._run[0](images.detach().cpu())
        except Exception as error:  # a program from elsewhere may raise anything
            raise ExportError(
                f"{self._source} cannot be run on images {tuple(images.shape)} ({first_line(error)}); export it again."
            ) from error
        if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.shape[:1] != images.shape[:1]:
            raise ExportError(f"{self._source} does not return logits, a row for each image; export it again.")
        return logits.to(images.device)


def load_exported(path: str | Path, format: Format | None = None, *, trust: bool = False) -> ExportedModel:
    """Loads a program written by :func:`lamzoo.export_model`.

    An ONNX program runs no code of its file. A torch.export program can, and is only loaded if the user exported it on
    this machine, or trusts it; both are recorded by the file's sha256 in lamzoo's cache folder.

    Args:
        path: the file.
        format: derived from the suffix by default.
        trust: trust a torch.export program that was exported elsewhere, from now on.

    Raises:
        WeightsNotFoundError: the file does not exist.
        UntrustedProgramError: a torch.export program that is not trusted.
        ExportError: the file is damaged, or was not exported by lamzoo.
        MissingExtraError: onnxruntime is not installed.
    """
    path = Path(path)
    format = format or ("torch" if path.suffix == FORMATS["torch"] else "onnx")
    try:
        content = read_bytes(path)
    except FileNotFoundError:
        raise WeightsNotFoundError(f"There is no exported program at {path}.") from None
    except (OSError, ValueError) as error:
        raise ExportError(f"{path} cannot be read ({reason(error)}); check the path and its permissions.") from error
    if format == "torch":
        (trust_program if trust else check_trusted)(content, path)
    return open_program(content, format, path)


def open_program(content: bytes, format: Format, path: Path) -> ExportedModel:
    """Opens a trusted program.

    Args:
        content: the bytes of the file.
        format: its format.
        path: the file, for messages.

    Raises:
        ExportError: the file is damaged, or was not exported by lamzoo.
        MissingExtraError: onnxruntime is not installed.
    """
    try:
        run, text = _LOADERS[format](content)
        facts = parse_json(text, file_names=True)
    except MissingExtraError:
        raise
    except Exception as error:  # of torch, onnxruntime or the file's metadata
        raise ExportError(
            f"{path} is not a program that lamzoo exported, or is damaged ({first_line(error)}); export it again."
        ) from error
    return ExportedModel(run, facts, path)


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or the name of its class."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _read_cfg(facts: Any, source: str | Path) -> dict[str, Any]:
    """Returns the preprocessing configuration in a file's metadata, checked."""
    cfg = facts.get("pretrained_cfg") if isinstance(facts, dict) else None
    if not isinstance(cfg, dict) or cfg.get("input_size") is None or cfg.get("num_classes") is None:
        raise ExportError(f"{source} lacks the preprocessing that lamzoo writes into programs; export it again.")
    names = cfg.get("label_names")
    if isinstance(names, list) and len(names) != cfg["num_classes"]:
        cfg = {key: value for key, value in cfg.items() if key != "label_names"}  # 0.1 kept those of a replaced head
    return check_preprocessing(cfg, "pretrained_cfg", source=f"{source}:", error=ExportError)


def _load_torch(content: bytes) -> tuple[Callable[[Tensor], Tensor], str]:
    extra = {FACTS: ""}
    with quietly():
        program = torch.export.load(io.BytesIO(content), extra_files=extra)
    return program.module(), extra[FACTS]


def _load_onnx(content: bytes) -> tuple[Callable[[Tensor], Tensor], str]:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError(
            "ONNX files are run by onnxruntime, which is not installed; pip install 'lamzoo[export]'."
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # errors are raised, and need not be printed as well
    # Spinning threads would occupy the cores: PyTorch in the same process would be several times slower.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # A program may name other files that hold its weights; no path leads to one from here.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        (logits,) = session.run([OUTPUT], {INPUT: images.numpy()})
        return torch.from_numpy(logits)

    return run, session.get_modelmeta().custom_metadata_map[FACTS]


_LOADERS: dict[Format, Callable[[bytes], tuple[Callable[[Tensor], Tensor], str]]] = {
    "torch": _load_torch,
    "onnx": _load_onnx,
}
