"""Calls that could run code from a file: each one in the package and the benchmarks is known, and why it is safe."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Functions that may unpickle, evaluate or import something that a file names, by their full name.
LOADERS = re.compile(
    r"torch\.(load|jit\.load|export\.load|hub\..*|package\..*|ops\.load_library|classes\.load_library)"
    r"|(numpy|np)\.(load|lib\.format\.read_array)|numpy\.fromfile"
    r"|(pickle|marshal|shelve|joblib|dill|cloudpickle|runpy|code|imp)\.\w+|(yaml|ruamel)\..*"
    r"|(eval|exec|compile|__import__)|importlib\.(import_module|util\.(spec_from|module_from)\w*|machinery\.\w+Loader)"
    r"|timm\.(create_model|models\.(load|create|safe)\w*)|timm\.\w*\.?(load_state_dict|load_checkpoint|load_pretrained)"
    r"|open_clip\.(create|load|get_tokenizer|from)\w*|transformers\.(pipeline|Auto\w+\..*)|accelerate\..*load\w*|peft\..*"
    r"|datasets\.load\w*|timm\.data\.create_dataset|torchvision\.(datasets|models)\..*"
    r"|scipy\.io\.\w+|h5py\.\w+|pandas\.read_\w+|onnxruntime\.InferenceSession|onnx\.load\w*|webdataset\.\w+"
    r"|faiss\.(read_\w+|deserialize_\w+|\w*Reader)|subprocess\.\w+|os\.(system|popen|exec\w+|spawn\w+|posix_spawn\w*)|pty\.spawn|ctypes\.\w+"
    r"|importlib\.metadata\.entry_points|pkgutil\.resolve_name"
)
# Methods of such names, whatever the object.
METHODS = {
    "from_pretrained", "load_state", "load_checkpoint", "register_custom_ops_library", "read_pickle", "unpickle",
    "load_from_checkpoint", "torch_load", "load_state_dict_from_url",
}  # fmt: skip

# Why each call is safe, by module and function; JSON has a table of its own below.
KNOWN = {
    ("lamzoo/training/checkpoints.py", "torch.load"): "weights_only=True, after the sha256 of the manifest",
    ("lamzoo/weights/files.py", "timm.models.load_state_dict"): "weights_only=True, and only if the caller allows it",
    ("lamzoo/export/exported.py", "torch.export.load"): "bytes whose sha256 the user exported or trusts",
    ("lamzoo/export/exported.py", "onnxruntime.InferenceSession"): "runs no code: bytes, no external data, no own ops",
    ("lamzoo/export/program.py", "onnx.load"): "the file that was just exported; protocol buffers",
    ("lamzoo/data/arrays.py", "numpy.lib.format.read_array"): "allow_pickle=False",
    ("lamzoo/data/images/label_file.py", "scipy.io.loadmat"): "MATLAB's format has no code; object arrays hold arrays",
    ("lamzoo/data/images/library_datasets.py", "datasets.load_from_disk"): "Arrow and JSON",
    ("lamzoo/data/images/library_datasets.py", "datasets.load_dataset"): "datasets 4 runs no scripts of a repository",
    ("lamzoo/data/images/library_datasets.py", "torchvision.datasets.?"): "CIFAR's pickles have known hashes; no LSUN",
    (
        "lamzoo/models/transformers_images.py",
        "transformers.AutoConfig.for_model",
    ): "a class by its name",
    ("benchmarks/focus_vit.py", "onnx.load_model_from_string"): "bytes of a known sha256; protocol buffers",
    ("benchmarks/train_lora.py", "peft.LoraConfig"): "a configuration, made here",
    ("benchmarks/train_lora.py", "peft.inject_adapter_in_model"): "new layers, loads nothing",
    ("benchmarks/hosts.py", "timm.create_model"): "pretrained=False: loads nothing",
    ("lamzoo/models/vit.py", "timm.create_model"): "pretrained=False: loads nothing; the name comes from a card",
    (
        "lamzoo/models/clip4clip/towers.py",
        "open_clip.create_model",
    ): "load_weights=False, and a name that open_clip lists",
    (
        "lamzoo/models/clip4clip/model.py",
        "open_clip.get_tokenizer",
    ): "a name that open_clip lists; trusts no remote code",
    ("lamzoo/adapters/hosts.py", "pkgutil.resolve_name"): "modules that a table in this file names",
    ("lamzoo/adapters/pretrained.py", "transformers.AutoConfig.from_pretrained"): "JSON; trusts no remote code",
    ("lamzoo/adapters/pretrained.py", "masked.from_pretrained"): "safetensors, unless the caller says otherwise",
    ("lamzoo/registry/huggingface.py", "transformers.AutoConfig.from_pretrained"): "JSON; trusts no remote code",
    ("lamzoo/registry/huggingface.py", "transformers.AutoImageProcessor.from_pretrained"): "JSON; no remote code",
    ("lamzoo/registry/huggingface.py", "lamzoo.adapters.from_pretrained"): "pickles only if the caller allows them",
    ("lamzoo/registry/huggingface.py", "cls.from_pretrained"): "pickles only if the caller allows them",
    ("lamzoo/lazy.py", "importlib.import_module"): "modules of lamzoo",
    ("lamzoo/tasks/__init__.py", "pkgutil.resolve_name"): "modules that the tasks' records name",
    ("lamzoo/tasks/base.py", "pkgutil.resolve_name"): "modules that the tasks' records name",
    ("lamzoo/registry/catalog.py", "pkgutil.resolve_name"): "builders named by installed cards",
    ("lamzoo/reduction/budget.py", "pkgutil.resolve_name"): "a function of lamzoo that the file names",
    ("lamzoo/registry/catalog.py", "importlib.metadata.entry_points"): "plug-ins, which the user installed",
    ("lamzoo/evaluation/captions/metrics.py", "importlib.import_module"): "modules of pycocoevalcap named in this file",
    ("lamzoo/evaluation/captions/metrics.py", "subprocess.run"): "Java's tokenizer; no shell",
    ("lamzoo/profiling/bench.py", "subprocess.run"): "git; no shell",
    ("lamzoo/profiling/job.py", "subprocess.Popen"): "this Python with a module of lamzoo; no shell",
    ("benchmarks/finetuning.py", "subprocess.run"): "this Python with lamzoo; no shell",
    ("benchmarks/ablation/run.py", "subprocess.run"): "this Python with lamzoo; no shell",
}

# json.dumps and json.dump write NaN, which is no JSON; documents are written by lamzoo.reading.to_json.
PLAIN_JSON = {
    "lamzoo/reading.py": "to_json itself, and checks",
    "lamzoo/records.py": "strings of TOML and of messages",
    "lamzoo/lam/config.py": "a LamConfig has no numbers that are not finite, and lam/ imports no other module",
    "lamzoo/cli/_output.py": "escapes of single characters",
    "lamzoo/profiling/job.py": "a line for lamzoo's own process, escaped to ASCII",
    "lamzoo/weights/files.py": "the header that safetensors wrote",
    "lamzoo/registry/saving.py": "a check, with allow_nan=False",
    "lamzoo/video/search.py": "hashed",
    "lamzoo/report/compare/page.py": "names of columns, inside HTML",
    "lamzoo/report/compare/panels.py": "strings of Python",
    "benchmarks/publish.py": "compared",
    "benchmarks/ablation/run.py": "hashed, and a string of TOML",
}


@cache
def calls() -> tuple[tuple[str, str, int, ast.Call], ...]:
    """Every call in the sources: file, full name of the function, line and call."""
    found = []
    for path in sorted([*ROOT.glob("lamzoo/**/*.py"), *ROOT.glob("benchmarks/**/*.py")]):
        file, tree = path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8"))
        found += [(file, name, call.lineno, call) for name, call in named_calls(tree)]
    return tuple(found)


def named_calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Yields the calls of a module with the full names of the functions, as far as imports and attributes tell."""
    imported = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {
                alias.asname or alias.name.partition(".")[0]: alias.name
                if alias.asname
                else alias.name.partition(".")[0]
                for alias in node.names
            }
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            imported |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}

    def full_name(node: ast.expr) -> str:
        if isinstance(node, ast.Attribute):
            return f"{full_name(node.value)}.{node.attr}"
        return imported.get(node.id, node.id) if isinstance(node, ast.Name) else "?"

    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield full_name(node.func), node
            if full_name(node.func) == "getattr":
                yield f"{full_name(node.args[0])}.?", node


def is_loader(name: str) -> bool:
    return LOADERS.fullmatch(name) is not None or name.rpartition(".")[2] in METHODS


def test_every_call_that_may_run_code_from_a_file_is_known() -> None:
    found = {(file, name): line for file, name, line, _ in calls() if is_loader(name)}
    unknown = [f"{file}:{line} calls {name}" for (file, name), line in found.items() if (file, name) not in KNOWN]
    assert not unknown, "make sure that the call runs no code of a file, and add it to KNOWN with the reason"
    assert not set(KNOWN) - set(found), "remove from KNOWN what is called no more"


def test_pickles_are_read_as_weights_only_and_no_command_runs_in_a_shell() -> None:
    for file, name, line, call in calls():
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if name in ("torch.load", "timm.models.load_state_dict"):
            assert given.get("weights_only") == "True", f"{file}:{line}"
        assert given.get("allow_pickle") != "True", f"{file}:{line}"
        assert given.get("trust_remote_code", "False") == "False", f"{file}:{line}"
        assert given.get("shell", "False") == "False", f"{file}:{line}"


def test_documents_are_written_as_strict_json() -> None:
    found = {file: line for file, name, line, _ in calls() if name in ("json.dumps", "json.dump")}
    unknown = [f"{file}:{line}" for file, line in found.items() if file not in PLAIN_JSON]
    assert not unknown, "write documents with lamzoo.reading.to_json, or add the file to PLAIN_JSON with the reason"
    assert not set(PLAIN_JSON) - set(found), "remove from PLAIN_JSON what writes JSON no more"


def test_names_are_resolved_through_imports() -> None:
    source = (
        "import torch as t\nfrom numpy import load as read\nt.load(a)\nread(b)\nAutoModel().from_pretrained(c)\neval(d)"
    )
    names = [name for name, _ in named_calls(ast.parse(source))]
    assert {"torch.load", "numpy.load", "?.from_pretrained", "eval"} <= set(names)
    assert all(is_loader(name) for name in names if name != "AutoModel")
