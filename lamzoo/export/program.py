"""Conversion of a model to a torch.export program, and of the program to ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from lamzoo.errors import ExportError, MissingExtraError
from lamzoo.export.exported import FACTS, INPUT, OUTPUT, Format, first_line
from lamzoo.quiet import quietly

OPSET = 20
_ONNX_LIMIT = 1536 * 2**20  # above, torch writes the weights to a second file
BATCH = Dim("batch")


def trace(model: nn.Module, images: Tensor) -> ExportedProgram:
    """Exports a model for any batch size.

    Args:
        model: a model in evaluation mode.
        images: example images ``(B, C, H, W)``.

    Raises:
        ExportError: torch.export can't trace the model.
    """
    example = images if len(images) > 1 else images.repeat(2, 1, 1, 1)  # a size of 1 would become a constant
    try:
        with quietly():
            program = torch.export.export(model, (example,), dynamic_shapes=({0: BATCH},))
    except Exception as error:
        raise ExportError(f"{type(model).__name__} cannot be exported: {first_line(error)}") from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # local paths, and half of the file size
    _remove_unused_weights(program)
    return program


def _remove_unused_weights(program: ExportedProgram) -> None:
    """Removes weights that the program doesn't read, such as those that a fused layer has copied."""
    unused = {node.name: node for node in program.graph.nodes if node.op == "placeholder" and not node.users}
    signature = program.graph_signature
    for spec in [spec for spec in signature.input_specs if spec.arg.name in unused]:
        if spec.target in program.state_dict:
            program.graph.erase_node(unused[spec.arg.name])
            signature.input_specs.remove(spec)
            del program.state_dict[spec.target]
    program.graph_module.recompile()


def write_program(program: ExportedProgram, path: Path, format: Format, facts: str, int8: bool) -> int | None:
    """Writes a program to a file.

    Args:
        program: what :func:`trace` returned.
        path: the output file.
        format: the file's format.
        facts: JSON metadata for the file.
        int8: quantise the program.

    Returns:
        The opset of an ONNX file; None for torch.

    Raises:
        ExportError: the ONNX exporter does not support an operator, or the weights are too large for ONNX.
        MissingExtraError: onnx, onnxscript or onnxruntime is not installed.
    """
    if format == "torch":
        program._example_inputs = None  # torch would save them as a pickle, and needs none
        with path.open("wb") as file:
            torch.export.save(program, file, extra_files={FACTS: facts})
        return None
    try:
        import onnxruntime  # noqa: F401 - the check needs it, and so it is asked for before anything is done
        from onnxscript import opset20
    except ImportError as error:
        raise MissingExtraError(
            f"ONNX files need {error.name}, which is not installed; pip install 'lamzoo[export]'."
        ) from error

    size = sum(weights.nbytes for weights in program.state_dict.values())
    if size > _ONNX_LIMIT:
        raise ExportError(
            f"The weights have {size / 2**30:.1f} GiB, and an ONNX file has room for {_ONNX_LIMIT / 2**30:.1f} GiB; "
            "export to *.pt2 instead."
        )

    def stable_sort(self: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
        # ONNX's TopK orders equal elements by index, as a stable sort does.
        size = opset20.Shape(self, start=dim, end=dim + 1 if dim != -1 else None)
        return opset20.TopK(self, size, axis=dim, largest=int(descending), sorted=1)

    try:
        with quietly():
            converted = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: BATCH},),
                custom_translation_table={torch.ops.aten.sort.stable: stable_sort},
            )
    except Exception as error:
        raise ExportError(f"The program cannot be written as ONNX: {first_line(error.__cause__ or error)}") from error
    assert converted is not None
    converted.model.metadata_props[FACTS] = facts
    for node in converted.model.graph.all_nodes():
        node.metadata_props.clear()  # local paths
    converted.save(str(path))
    if int8:
        _quantise(path)
    return OPSET


def _quantise(path: Path) -> None:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    # Folds constants: the parts of a layer that are computed apart, as in merging, become matrices of their own.
    quant_pre_process(path, path, skip_onnx_shape=True, skip_symbolic_shape=True)
    graph = onnx.load(path).graph
    matrices = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 2}
    # Per channel, onnxruntime only runs matrices; a mask network has a stack of them, one per head.
    linear = [node.name for node in graph.node if node.op_type in ("Gemm", "MatMul") and node.input[1] in matrices]
    with quietly():
        quantize_dynamic(path, path, weight_type=QuantType.QInt8, per_channel=True, nodes_to_quantize=linear)
