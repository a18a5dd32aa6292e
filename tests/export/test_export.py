"""What export_model promises: programs for batches of any size that agree with the model and run without lamzoo."""

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import skimage.data
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.testing import assert_close

import lamzoo
from lamzoo import LamConfig, add_lam, export_model, fuse, load_exported, merge_tokens, prune_tokens
from lamzoo.data import create_dataset
from lamzoo.errors import ConfigError, ExportError, MissingExtraError, WeightsNotFoundError
from lamzoo.evaluation import evaluate, predict, preprocess
from lamzoo.export import ExportedFile
from tests.forked import run_code
from tests.images import CLASSES, write_npz

SUFFIXES = {"torch": ".pt2", "onnx": ".onnx"}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "masked": {},
    "fused": {},
    "drop": {"rest": "drop"},
    "merge": {"rest": "merge"},
    "nearest": {"score": "redundancy", "rest": "nearest"},
}
each_format = pytest.mark.parametrize("format", list(SUFFIXES))
Exported = Callable[[str, Any], tuple[nn.Module, ExportedFile]]


def vit(variant: str = "masked", **kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 3, **kwargs}
    model = timm.models.VisionTransformer(**options)
    model.pretrained_cfg = {"architecture": "vit", "input_size": (3, 32, 32), "label_names": CLASSES}
    if variant != "plain":
        add_lam(model, LamConfig(keys="position", rank=3, init="paper"))
    if variant == "fused":
        fuse(model)
    if variant == "merged":
        merge_tokens(model, keep=0.5)
    elif VARIANTS[variant]:
        prune_tokens(model, 0.5, (0, 1), **VARIANTS[variant])
    return model.eval()


def images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))


def photographs() -> list[Image.Image]:
    return [Image.fromarray(getattr(skimage.data, name)()) for name in ("astronaut", "cat", "coffee")]


def bundled() -> list[str]:
    """Every image classifier whose weights come with lamzoo."""
    tags = {name: lamzoo.model_info(name).tag for name in lamzoo.list_models(pretrained=True)}
    return [name for name, tag in tags.items() if tag is not None and tag.file and "top1" in tag.metrics]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Returns a variant and its file in a format, which is written once, into a folder of its own."""

    @cache
    def export(variant: str, format: Any) -> tuple[nn.Module, ExportedFile]:
        model, path = vit(variant), tmp_path_factory.mktemp(f"{variant}-{format}") / f"model{SUFFIXES[format]}"
        return model, export_model(model, path, images=images(4))

    return export


# A program takes seconds. "merge" has all that "drop" has, and one token more; the tests of merging and pruning export
# by torch.export.
_RARE = ("plain", "drop", "nearest", "fused")


@each_format
@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=[pytest.mark.slow] if name in _RARE else []) for name in VARIANTS]
)
def test_the_program_agrees_with_the_model_for_any_batch(variant: str, format: Any, exported: Exported) -> None:
    model, written = exported(variant, format)
    path = written.path
    assert (path.name, written.format, written.precision) == (f"model{SUFFIXES[format]}", format, "float32")
    assert (written.samples, written.same_top1) == (4, 1.0)
    assert written.max_difference <= 1e-4
    assert written.mib == path.stat().st_size / 2**20
    program = load_exported(path)
    for batch in (1, 3, 7):
        logits = program(images(batch).requires_grad_())
        assert not logits.requires_grad
        assert_close(logits, model(images(batch)), atol=1e-4, rtol=0)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.slow
def test_a_merged_model_is_exported_for_any_batch_and_says_so(exported: Exported) -> None:
    model, written = exported("merged", "onnx")  # the tests of merging export by torch.export
    program = load_exported(written.path)
    for batch in (1, 7):
        assert_close(program(images(batch)), model(images(batch)), atol=1e-4, rtol=0)
    assert lamzoo.TokenReduction.from_dict(program.facts["token_reduction"]) == model.token_reduction
    assert program.facts["prune_config"] is None


def test_a_fused_model_is_exported_in_its_fused_form_and_says_so(exported: Exported) -> None:
    model, written = exported("fused", "torch")
    program = torch.export.load(written.path)
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("aten.scaled_dot_product_attention.default") == 3
    assert targets.count("aten.linear.default") == 1 + 3 * 4
    assert not any("scatter" in target or "copy" in target for target in targets)
    assert not any("qkv" in name for name in program.state_dict)  # the fused layers have copies
    again = load_exported(written.path)
    assert again.facts["fused"]
    assert_close(again(images(7)), model(images(7)), atol=1e-4, rtol=0)
    assert not load_exported(exported("masked", "torch")[1].path).facts["fused"]


@pytest.mark.slow
@each_format
def test_a_fused_model_with_merged_tokens_is_exported_for_any_batch(format: Any, tmp_path: Path) -> None:
    model = fuse(vit("merged"))
    path = tmp_path / f"model{SUFFIXES[format]}"
    export_model(model, path, images=images(2))
    program = load_exported(path)
    assert program.facts["fused"]
    for batch in (1, 7):
        assert_close(program(images(batch)), model(images(batch)), atol=1e-4, rtol=0)


@pytest.mark.parametrize("format", [pytest.param("onnx", marks=pytest.mark.slow), "torch"])
def test_equal_scores_keep_the_same_tokens(format: Any, tmp_path: Path) -> None:
    model = add_lam(vit("plain", depth=2), LamConfig())  # the identity: no token matters more than another
    prune_tokens(model, 0.5, (0,))
    export_model(model, tmp_path / f"model{SUFFIXES[format]}", images=images(2))


@pytest.mark.slow
@each_format
@pytest.mark.parametrize("keep", [None, 0.7])
@pytest.mark.parametrize("name", bundled())
def test_the_bundled_models_are_exported_and_checked_on_photographs(
    name: str, keep: float | None, format: Any, tmp_path: Path
) -> None:
    model = lamzoo.create_model(name, pretrained=True)
    if keep is not None:
        if model.lam_config is None:
            pytest.skip("a plain model has no masks to prune by")
        prune_tokens(model, keep)
    batch = preprocess(model, photographs())
    written = export_model(model, tmp_path / f"model{SUFFIXES[format]}", images=batch)
    assert written.max_difference <= 1e-4
    assert written.same_top1 == 1.0


def test_the_programs_run_where_lamzoo_and_timm_are_not(exported: Exported, tmp_path: Path) -> None:
    model, _ = exported("merge", "torch")
    files = {format: str(exported("merge", format)[1].path) for format in SUFFIXES}
    torch.save({"images": images(3), "logits": model(images(3))}, tmp_path / "expected.pt")
    script = """
import sys
torch_file, onnx_file, expected = sys.argv[1:]
assert not any(name.partition(".")[0] == "lamzoo" for name in sys.modules)
sys.modules |= dict.fromkeys(["lamzoo", "timm", *(name for name in sys.modules if name.startswith("timm."))])
import onnxruntime
import torch
expected = torch.load(expected)
torch.testing.assert_close(torch.export.load(torch_file).module()(expected["images"]), expected["logits"])
session = onnxruntime.InferenceSession(onnx_file, providers=["CPUExecutionProvider"])
(logits,) = session.run(["logits"], {"images": expected["images"].numpy()})
torch.testing.assert_close(torch.from_numpy(logits), expected["logits"], atol=1e-4, rtol=0)
"""
    done = run_code(script, files["torch"], files["onnx"], str(tmp_path / "expected.pt"))
    assert done.returncode == 0, done.stderr


@each_format
def test_a_program_is_scored_and_predicts_as_the_model_does(format: Any, exported: Exported, tmp_path: Path) -> None:
    model, written = exported("masked", format)
    program = load_exported(written.path)
    dataset = create_dataset(f"npz:{write_npz(tmp_path / 'data')}", "test")
    assert evaluate(program, dataset, batch_size=4).top1 == evaluate(model, dataset).top1
    (mine,), (its) = predict(program, photographs()[:1]), predict(model, photographs()[:1])[0]
    assert [guess.label for guess in mine] == [guess.label for guess in its]


@each_format
def test_the_file_says_what_is_needed_to_use_it(format: Any, exported: Exported) -> None:
    model, written = exported("merge", format)
    facts = load_exported(written.path).facts
    assert facts["pretrained_cfg"]["label_names"] == CLASSES
    assert facts["pretrained_cfg"]["input_size"] == [3, 32, 32]
    assert LamConfig.from_dict(facts["lam_config"]) == model.lam_config
    assert lamzoo.PruneConfig.from_dict(facts["prune_config"]) == model.prune_config
    assert facts["lamzoo"] == lamzoo.__version__
    assert str(Path(lamzoo.__file__).parent).encode() not in written.path.read_bytes()


def test_onnx_has_the_opset_and_the_batch_that_are_promised(exported: Exported) -> None:
    onnx = pytest.importorskip("onnx")
    _, written = exported("masked", "onnx")
    model = onnx.load(written.path)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", written.opset)]
    (entry,) = model.graph.input
    assert [dim.dim_param or dim.dim_value for dim in entry.type.tensor_type.shape.dim] == ["batch", 3, 32, 32]
    onnx.checker.check_model(model, full_check=True)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["masked", pytest.param("fused", marks=pytest.mark.slow)])
def test_int8_is_smaller_and_near(variant: str, tmp_path: Path) -> None:
    model = vit(variant, embed_dim=64, depth=1)
    whole = export_model(model, tmp_path / "whole.onnx", images=images(8))
    small = export_model(model, tmp_path / "small.onnx", images=images(8), int8=True)
    assert small.precision == "int8"
    assert small.mib < 0.5 * whole.mib
    assert whole.max_difference < small.max_difference < 0.2


@pytest.mark.slow
def test_int8_reaches_the_layers_that_merging_computes_in_parts(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    model = merge_tokens(vit("plain", embed_dim=64, depth=1), keep=1)  # queries of the class token alone
    export_model(model, tmp_path / "small.onnx", images=images(2), int8=True)
    weights = onnx.load(tmp_path / "small.onnx").graph.initializer
    matrices = [each for each in weights if len(each.dims) == 2 and min(each.dims) >= 64]
    assert len(matrices) == 5
    assert all(each.data_type == onnx.TensorProto.INT8 for each in matrices)


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = vit(depth=1).train()
    model.blocks[0].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export_model(model, tmp_path / "model.pt2")
    assert model.training
    assert not model.blocks[0].training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Branches(nn.Module):
    """Cannot be traced: it asks a tensor which way to go."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 3)
        self.pretrained_cfg = {"input_size": (3, 4, 4)}

    def forward(self, x: Tensor) -> Tensor:
        logits = self.head(x.mean((2, 3)))
        return logits if logits.sum() > 0 else -logits


class Pair(Branches):
    def forward(self, x: Tensor) -> Any:
        return self.head(x.mean((2, 3))), x


@pytest.mark.parametrize(
    ("model", "name", "arguments", "error", "says"),
    [
        (vit, "model.pb", {}, ConfigError, r"suffix of .*model.pb.*\*\.onnx"),
        (vit, "model.onnx", {"format": "torch"}, ConfigError, r"must end in \.pt2"),
        (vit, "model.pt2", {"format": "tflite"}, ConfigError, "'tflite' is unknown"),
        (vit, "model.pt2", {"int8": True}, ConfigError, "only available for ONNX"),
        (vit, "model.pt2", {"images": torch.rand(2, 3, 16, 16)}, ConfigError, r"\(2, 3, 16, 16\).*\(B, 3, 32, 32\)"),
        (lambda: vit().bfloat16(), "model.pt2", {}, ConfigError, r"bfloat16 on cpu.*\.float\(\)"),
        (
            torch.inference_mode()(vit),
            "model.pt2",
            {},
            ConfigError,
            "cls_token was created under.*deepcopy of it, outs",
        ),
        (Branches, "model.pt2", {}, ExportError, "Branches cannot be exported: "),
        (Pair, "model.pt2", {}, ExportError, "returns a tuple"),
    ],
)
def test_what_cannot_be_written_is_said_and_leaves_no_file(
    model: Any, name: str, arguments: dict[str, Any], error: type[Exception], says: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=says) as caught:
        export_model(model(), tmp_path / name, **arguments)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("pinned", [True, False], ids=["pinned", "of the layer"])
def test_a_backend_that_would_need_lamzoo_is_not_exported(pinned: bool, tmp_path: Path) -> None:
    model: Any = vit(depth=1)
    model.blocks[0].attn.lam.backend = "auto" if pinned else "chunked"
    with (
        lamzoo.attention_backend("chunked" if pinned else "auto"),
        pytest.raises(ExportError, match="The chunked backend doesn't .* would need lamzoo to run it; use 'auto'"),
    ):
        export_model(model, tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []


def test_a_fused_model_under_a_pinned_backend_is_not_exported_in_its_fused_form(tmp_path: Path) -> None:
    with lamzoo.attention_backend("eager"):
        export_model(vit("fused", depth=1), tmp_path / "model.pt2")
    assert any("qkv" in name for name in torch.export.load(tmp_path / "model.pt2").state_dict)
    assert not load_exported(tmp_path / "model.pt2").facts["fused"]


def test_a_model_of_two_inputs_is_refused(tmp_path: Path) -> None:
    model = lamzoo.create_model("clip4clip_micro")
    with pytest.raises(ExportError, match="takes 2 inputs"):
        export_model(model, tmp_path / "model.pt2")


def test_a_failed_export_leaves_the_file_that_was_there_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"an earlier program")
    with pytest.raises(ExportError, match="differs from the model") as caught:
        export_model(vit(depth=1), path, tolerance=-1.0)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == b"an earlier program"
    assert list(tmp_path.iterdir()) == [path]


def test_the_folder_must_be_writable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ExportError, match="cannot be written"):
        export_model(vit(), tmp_path / "file" / "model.pt2")


@each_format
def test_a_missing_or_damaged_program_is_named(format: Any, exported: Exported, tmp_path: Path) -> None:
    path = tmp_path / f"model{SUFFIXES[format]}"
    with pytest.raises(WeightsNotFoundError, match="no exported program"):
        load_exported(path)
    path.write_bytes(exported("masked", format)[1].path.read_bytes()[:1000])
    with pytest.raises(ExportError, match="is not a program that lamzoo exported, or is damaged"):
        load_exported(path, trust=True)
    path.unlink()
    path.mkdir()
    with pytest.raises(ExportError, match="it is a folder"):
        load_exported(path)


class Wide(nn.Module):
    """Has weights of 1.6 GB, of which a single page is touched."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 3)
        self.register_buffer("table", torch.zeros(420_000_000))
        self.pretrained_cfg = {"input_size": (3, 4, 4)}

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.mean((2, 3))) + self.table[:1]


def test_weights_that_onnx_would_put_into_a_second_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"1\.6 GiB.*\*\.pt2"):
        export_model(Wide(), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_are_not_finite_are_not_exported(tmp_path: Path) -> None:
    model = vit(depth=1)
    torch.nn.init.constant_(model.head.bias, torch.nan)
    with pytest.raises(ConfigError, match="outputs are not finite"):
        export_model(model, tmp_path / "model.onnx", int8=True)
    assert list(tmp_path.iterdir()) == []


def test_class_names_of_a_replaced_head_are_not_exported(tmp_path: Path) -> None:
    model = vit(depth=1, num_classes=4)
    written = export_model(model, tmp_path / "model.pt2")
    assert "label_names" not in load_exported(written.path).pretrained_cfg


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"onnxruntime.*lamzoo\[export\]"):
        export_model(vit(), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []
