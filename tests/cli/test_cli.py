import json
import logging
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from lamzoo import __version__
from lamzoo.adapters import fuse
from lamzoo.cli import _output as out
from lamzoo.cli import app as cli
from lamzoo.errors import WeightsNotFoundError
from lamzoo.profiling import profile
from lamzoo.reduction import merge_tokens
from lamzoo.registry.catalog import model_info
from lamzoo.registry.factory import create_model
from lamzoo.registry.saving import save_pretrained
from lamzoo.weights import save_lam
from lamzoo.weights.sources import hub_file_of
from tests.images import CLASSES, encoded, write_folder, write_npz
from tests.weights.hub_server import HubServer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "micro"
    save_pretrained(create_model("lam_vit_micro", num_classes=3), folder, label_names=CLASSES)
    return f"local-dir:{folder}"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder to work in, beside what a test makes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_help_and_version(run) -> None:
    assert run("--version").out == f"lamzoo {__version__} (torch {version('torch')}, timm {version('timm')})\n"
    for arguments in ((), ("--help",), ("-h",)):
        done = run(*arguments)
        assert done.code == 0
        for command in ("list", "info", "predict", "eval", "explain", "export", "train", "demo", "download"):
            assert f"\n  {command} " in done.out
    assert "\nVideos:\n" in done.out
    assert "--precision" in run("eval", "-h").out


def test_every_command_writes_to_out() -> None:
    commands: dict[str, Any] = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    named = {name: each.opts for name, command in commands.items() for each in command.params if each.name == "output"}
    assert {"train", "eval", "export", "bench"} <= named.keys()
    assert not [name for name, options in named.items() if "--out" not in options]


@pytest.mark.parametrize(("options", "shown"), [((), ""), (("--verbose",), "a step\n"), (("-v",), "a step\n")])
def test_infos_are_shown_with_verbose_alone(
    run, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], shown: str
) -> None:
    log = logging.getLogger("lamzoo.registry.saving")
    monkeypatch.setattr("lamzoo.registry.catalog.match_models", lambda *args, **kwargs: log.info("a step") or [])
    done = run(*options, "list", "lam_vit_micro")
    assert done.err.count("a step") == bool(shown), done.err
    assert done.err.startswith(shown)


@pytest.mark.parametrize("address", ["http://[", "http://hub:99999", "hub", "ftp://hub", "http://"])
def test_a_malformed_address_of_the_hub_is_named(run, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", address)
    done = run("list")
    assert (done.code, done.err) == (
        2,
        f"lamzoo: HF_ENDPOINT is '{address}', which is no http address; correct or unset it\n",
    )


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["list"], ["info", "lam_vit_base"]], ids=" ".join)
def test_what_needs_no_model_imports_no_torch_and_is_quick(arguments: list[str]) -> None:
    probe = f"""
import json, sys, time
from lamzoo.cli import main
try:
    main({arguments!r})
except SystemExit as end:
    heavy = sorted({{"torch", "timm", "torchvision", "open_clip", "transformers"}} & set(sys.modules))
    sys.stderr.write(json.dumps([end.code, heavy, time.process_time()]))
"""
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
        code, heavy, seconds = json.loads(done.stderr)
        assert (code, heavy) == (0, [])
        if seconds < 1.5:  # 0.4 to 0.6 on a machine at rest
            return
    pytest.fail(f"{seconds} s of processor time, three times")


def test_list_fits_a_terminal_and_tells_task_input_score_and_weights(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(out, "_PIPE_WIDTH", 80)
    lines = run("list").out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["model", "task", "input", "params", "score", "weights"]
    rows = {line.split()[0]: line.split() for line in lines}
    assert len(rows) == len(lines), "no name is wrapped"
    assert rows["lam_vit_micro"][1:] == ["classification", "32px", "1.1M", "top-1", "86.5", "bundled"]
    assert rows["lam_qd_detr"][1:] == ["moments", "features", "7.6M", "none"]


def test_list_tells_where_the_weights_are(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    (before,) = json.loads(run("list", "lam_vit_large", "--json").out)
    repo = hub_file_of(model_info("lam_vit_large").tag)
    assert repo is not None
    folder = tmp_path / "hub" / f"models--{repo.repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / (repo.revision or "abc")).mkdir(parents=True)
    (folder / "snapshots" / (repo.revision or "abc") / "model.safetensors").touch()
    (after,) = json.loads(run("list", "lam_vit_large", "--json").out)
    assert (before["weights"], after["weights"]) == ("download", "cached")
    assert {"name", "family", "description", "params", "gmacs", "tags"} <= set(after)
    assert after["score"]["metric"] == "top-1"


def test_typers_own_runner_works() -> None:
    done = CliRunner().invoke(cli.app, ["list", "lam_vit_micro"])
    assert done.exit_code == 0
    assert "lam_vit_micro" in done.stdout


def test_list_finds_names_by_wildcard_and_by_part(run) -> None:
    names = [entry["name"] for entry in json.loads(run("list", "--json").out)]
    assert {"lam_vit_micro", "vit_micro"} <= set(names)
    assert [entry["name"] for entry in json.loads(run("list", "lam_vit_mic*", "--json").out)] == ["lam_vit_micro"]
    assert {e["name"] for e in json.loads(run("list", "vit_micro", "--json").out)} == {"lam_vit_micro", "vit_micro"}
    timms = [entry["name"] for entry in json.loads(run("list", "timm/vit_small*", "--json").out)]
    assert timms
    assert all(name.startswith("timm/vit_small") for name in timms)
    for entry in json.loads(run("list", "--pretrained", "--json").out):
        assert "." in entry["name"]


def test_info_tells_what_is_merged_and_what_is_left_to_compute(run, tmp_path: Path) -> None:
    merged = merge_tokens(create_model("vit_micro", depth=2), keep=0.5)
    save_pretrained(merged, tmp_path)
    facts = json.loads(run("info", f"local-dir:{tmp_path}", "--json").out)
    assert facts["reduction"] == {"method": "merge", "keep": 0.5}
    assert facts["pruning"] is None
    assert facts["gmacs"] == pytest.approx(profile(merged).gmacs, rel=1e-2)
    assert "keep 0.5" in run("info", f"local-dir:{tmp_path}").out


def test_info_tells_that_a_model_is_fused_and_what_it_costs(run, tmp_path: Path) -> None:
    model = fuse(create_model("lam_vit_tiny_patch8_64", depth=1))
    save_pretrained(model, tmp_path)
    facts = json.loads(run("info", f"local-dir:{tmp_path}", "--json").out)
    assert facts["fused"] is True
    assert facts["gmacs"] == pytest.approx(profile(model).gmacs, rel=1e-2)
    assert "fused" not in run("info", "lam_vit_micro").out


def test_info_tells_what_masks_without_their_model_are(run, tmp_path: Path) -> None:
    model = create_model("lam_vit_micro", depth=2)
    save_lam(model, tmp_path / "m", also=["head"], label_names=[f"class {index}" for index in range(10)])
    facts = json.loads(run("info", str(tmp_path / "m"), "--json").out)
    assert (facts["base"], facts["base class"]) == ("lam_vit_micro", "timm.VisionTransformer")
    assert facts["masks"] == model.lam_config.to_dict()
    assert facts["layers"] == ["blocks.0.attn", "blocks.1.attn"]
    assert (facts["stored besides"], facts["label names"][9]) == (["head.weight", "head.bias"], "class 9")
    assert facts["bytes"] < 200_000
    assert "masks without their model" in run("info", str(tmp_path / "m")).out
    with pytest.raises(WeightsNotFoundError, match="has masks without their model; create their base"):
        create_model(tmp_path / "m")


def test_info_tells_what_masks_in_a_repository_are(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_lam(create_model("lam_vit_micro", depth=2), tmp_path / "m")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with HubServer({"me/masks": {path.name: path.read_bytes() for path in folder.iterdir()}}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        facts = json.loads(run("info", "hf-hub:me/masks", "--json").out)
    assert (facts["name"], facts["base"], len(facts["layers"])) == ("hf-hub:me/masks", "lam_vit_micro", 2)


def test_info_tells_cost_masks_and_preprocessing(run, model: str) -> None:
    facts = json.loads(run("info", "lam_vit_micro", "--json").out)
    assert facts["masks"]["rank"] > 0
    assert 1e6 < facts["parameters"] < 3e6
    assert facts["gmacs"] > 0
    assert facts["input_size"] == [3, 32, 32]
    assert json.loads(run("info", "vit_micro", "--json").out)["masks"] is None
    facts = json.loads(run("info", model, "--json").out)
    assert facts["classes"] == 3
    assert facts["label names"] == CLASSES
    assert "lam_vit_micro" in run("info", "lam_vit_micro").out


def test_info_measures_a_saved_model_of_any_size_without_building_it(run, tmp_path: Path) -> None:
    save_pretrained(create_model("lam_vit_micro"), tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["model_args"]["img_size"] = 8192  # 2 GB of position embeddings
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    assert json.loads(run("info", str(tmp_path / "m"), "--json").out)["parameters"] > 5e8


def test_info_tells_the_note_of_a_tag(run) -> None:
    assert "cifar10: Since 0.2.0 these weights" in run("info", "lam_vit_micro").out


def test_info_tells_where_weights_come_from_and_what_is_read(run) -> None:
    facts = json.loads(run("info", "lam_clip4clip", "--json").out)
    assert {tag["source"] for tag in facts["tags"]} >= {"open_clip:ViT-B-32:openai"}
    assert facts["classes"] is None
    assert "input_size" not in json.loads(run("info", "lam_qd_detr", "--json").out)  # it reads features


def test_predict_takes_files_and_folders_with_any_name(run, model: str, tmp_path: Path) -> None:
    folder = tmp_path / "Meine Bilder [red]"
    folder.mkdir()
    (folder / "写真 1.jpg").write_bytes(encoded(0, 0))
    (tmp_path / "b.jpg").write_bytes(encoded(1, 0))
    done = run("predict", model, folder, tmp_path / "b.jpg", "--topk", 2, "--device", "cpu", "--json")
    assert (done.code, done.err) == (0, "")
    first, second = json.loads(done.out)
    assert (first["image"], second["image"]) == (str(folder / "写真 1.jpg"), str(tmp_path / "b.jpg"))
    assert len(first["predictions"]) == 2
    assert {guess["label"] for guess in first["predictions"]} <= set(CLASSES)
    table = run("predict", model, folder, "--topk", 1).out
    assert "写真 1.jpg" in table
    assert "[red]" in table


def test_predict_with_a_checkpoint(run, model: str, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(encoded(0, 0))
    weights = Path(model.removeprefix("local-dir:")) / "model.safetensors"
    direct = run("predict", model, tmp_path / "a.jpg", "--json").out
    assert run("predict", model, tmp_path / "a.jpg", "--checkpoint", weights, "--json").out == direct
    done = run("predict", "vit_micro", tmp_path / "a.jpg", "--checkpoint", tmp_path / "none.safetensors")
    assert done.code == 2
    assert "none.safetensors" in done.err


def test_eval_prints_json_alone_and_writes_it(run, model: str, tmp_path: Path) -> None:
    data = write_npz(tmp_path / "data")
    done = run("eval", model, "--data", f"npz:{data}", "--json", "--batch-size", 4, "--output", "score.json")
    assert (done.code, done.err) == (0, "")
    record = json.loads(done.out)
    assert record == json.loads(Path("score.json").read_text())
    assert record["samples"] == 9
    assert record["top5"] is None
    assert 0 <= record["top1"] <= 100
    table = run("eval", model, "--data", data, "--split", "test", "--precision", "bfloat16", "--limit", 3)
    assert table.code == 0
    assert "top-1 (%)" in table.out
    assert files(tmp_path / "cache") == []  # the state is gone when the score is complete


def test_a_killed_eval_resumes(run, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lamzoo.evaluation

    data = write_npz(tmp_path / "data")
    common = ("eval", model, "--data", data, "--batch-size", 2, "--state", "state.json", "--json")
    whole = json.loads(run(*common).out)
    real = lamzoo.evaluation.evaluate

    def killed(*args: object, **kwargs: object) -> object:
        def progress(progress: lamzoo.evaluation.EvalProgress) -> None:
            if progress.seen == 6:
                raise KeyboardInterrupt

        return real(*args, **{**kwargs, "save_every": 1, "progress": progress})

    with monkeypatch.context() as patch:
        patch.setattr("lamzoo.evaluation.classification.evaluate.evaluate", killed)
        done = run(*common)
    assert (done.code, done.out) == (130, "")
    assert json.loads(Path("state.json").read_text())["partial"]["seen"] == 6
    resumed = json.loads(run(*common, "--resume").out)
    assert (resumed["top1"], resumed["samples"]) == (whole["top1"], whole["samples"])
    assert not Path("state.json").exists()


def test_explain_writes_a_picture(run, model: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "a.jpg").write_bytes(encoded(0, 0))
    done = run("explain", model, tmp_path / "a.jpg", "--out", "masks.png")
    assert (done.code, done.out) == (0, "masks.png\n")
    assert Path("masks.png").read_bytes().startswith(b"\x89PNG")


def test_download_names_the_files(run, model: str) -> None:
    done = run("download", model)
    assert done.code == 0
    assert Path(done.out.strip()).name == "model.safetensors"


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """The working directory, with some files that are good and some that are not."""
    here = tmp_path / "here"
    (here / "cut.jpg").write_bytes(encoded(0, 0)[:600])
    (here / "text.png").write_text("I am a text")
    (here / "good.jpg").write_bytes(encoded(0, 0))
    (here / "empty").mkdir()
    (here / "bad.toml").write_text("[model]\nname = 'vit_micro'\n[data]\nsauce = 'x'\n[run]\noutput = 'out'\n")
    write_folder(here / "folder", each=1)
    write_npz(here / "packed")
    (write_folder(here / "broken", splits=("test",)) / "test" / "red" / "1.jpg").write_text("nothing")
    return here


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("predict lam_vit_mikro good.jpg", "did you mean lam_vit_micro"),
        ("eval vit_mikro --data packed", "did you mean vit_micro"),
        ("explain vit_mikro good.jpg --out x.png", "did you mean vit_micro"),
        ("info lam_vit_mikro", "did you mean lam_vit_micro"),
        ("download lam_vit_mikro", "did you mean lam_vit_micro"),
        ("list nothing*", "no model matches 'nothing*'"),
        ("info local-dir:empty", "config.json"),
        ("predict MODEL none.jpg", "none.jpg"),
        ("predict MODEL cut.jpg", "cut.jpg"),
        ("predict MODEL good.jpg cut.jpg --json", "cut.jpg"),
        ("predict MODEL text.png", "text.png"),
        ("predict MODEL empty", "has no image"),
        ("predict MODEL good.jpg --batch-size -3", "batch size is -3"),
        ("predict MODEL good.jpg --topk 0", "topk is 0"),
        ("predict MODEL good.jpg --device cuda:99", "no device 'cuda:99'"),
        ("predict MODEL good.jpg --checkpoint none.safetensors", "none.safetensors"),
        ("predict MODEL", "IMAGE"),
        ("explain MODEL text.png --out x.png", "text.png"),
        ("explain MODEL good.jpg --out nowhere/x.png", "nowhere"),
        ("eval MODEL --data folder --split test", "no split 'test'; it has 'train', 'val'"),
        ("eval MODEL --data coco:x", "neither a data set nor an existing folder"),
        (
            "eval moments.jsonl --task captions --data empty",
            "moments.jsonl is a file of predictions of moment retrieval",
        ),
        ("eval MODEL --data imagefolder:none", "no such folder: none"),
        ("eval MODEL --data empty", "no class folders"),
        ("eval MODEL --data broken --workers 1", "1.jpg"),
        ("eval MODEL --data packed --device tpu9", "no device 'tpu9'"),
        ("eval MODEL --data packed --batch-size 0", "batch size is 0"),
        ("eval MODEL --data packed --batch-size many", "--batch-size"),
        ("eval MODEL --data packed --workers -1", "workers is -1"),
        ("eval MODEL --data packed --precision int4", "int4"),
        ("eval MODEL --data packed --output nowhere/score.json", "nowhere"),
        ("eval MODEL --data packed --state text.png", "is not an evaluation state"),
        ("eval MODEL --data packed --output /dev/full", "over the pipe, socket or device /dev/full"),
        ("eval MODEL --data packed --output folder", "over the folder folder"),
        (f"eval MODEL --data packed --output {'x' * 300}", "--output is xxx"),
        ("eval MODEL --data packed --limit 99999999999999999999", "--limit is 99999999999999999999; it must be below"),
        ("eval MODEL --data packed --workers 99999", "workers is 99999; it must lie between 0 and 1024"),
        ("eval MODEL --data packed --fps nan", "--fps is nan; it must be a finite number"),
        ("eval MODEL --data a\0b", "--data is a\\0b; it must not contain a NUL character"),
        (f"eval MODEL --data imagefolder:{'x' * 300}", "File name too long"),
        (f"info local-dir:{'x' * 300}", "File name too long"),
        (f"train --model MODEL --data folder --seed {2**70}", "'--seed'"),
        (f"train --model MODEL --data folder run.seed={2**70}", "run.seed is 1180591620717411303424; it must be below"),
        (f"bench MODEL --out b.csv --seed {2**70}", "'--seed'"),
        ("bench MODEL --out folder", "over the folder folder"),
        ("export MODEL --out folder", "over the folder folder"),
        ("eval MODEL", "--data"),
        ("train none.toml", "none.toml"),
        ("train bad.toml", "sauce"),
        ("demo --cifar10 nowhere", "nowhere"),
        ("evaluate", "evaluate"),
        ("list --nothing", "--nothing"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    run, model: str, inputs: Path, tmp_path: Path, arguments: str, message: str
) -> None:
    before = files(tmp_path)
    done = run(*arguments.replace("MODEL", model).split())
    assert (done.code, done.out) == (2, ""), done.err
    assert done.err.startswith("lamzoo: ")
    assert done.err.count("\n") == 1
    assert message in done.err
    assert files(tmp_path) == before  # nothing half-written


def test_debug_shows_the_traceback_wherever_it_stands(run) -> None:
    for arguments in (("--debug", "info", "nothing"), ("info", "nothing", "--debug")):
        done = run(*arguments)
        assert done.code == 2
        assert "Traceback" in done.err
        assert "UnknownModelError" in done.err


def test_what_nobody_expected_is_said_and_not_swallowed(run, monkeypatch: pytest.MonkeyPatch) -> None:
    import lamzoo.registry.catalog

    def broken(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("one by\nnothing")

    monkeypatch.setattr(lamzoo.registry.catalog, "list_models", broken)
    done = run("list")
    assert done.code == 1
    assert done.err == "lamzoo: ZeroDivisionError: one by nothing (unexpected; --debug shows where)\n"
    assert "Traceback" in run("list", "--debug").err


def test_a_hub_out_of_reach_is_three_lines(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = run("download", "lam_vit_base")
    assert done.code == 2
    starts = (
        "lamzoo: lam_vit_base: timm/",
        "Works without it: lam_vit_base with pretrained=False",
        "To bring it here: ",
    )
    for line, start in zip(done.err.splitlines(), starts, strict=True):
        assert line.startswith(start)


def test_the_command_in_its_own_process_reports_bad_input() -> None:
    command = [sys.executable, "-c", "from lamzoo.cli import main; main()", "predict", "lam_vit_micro", "nö.jpg"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "lamzoo: no such image or folder: nö.jpg\n"


@pytest.mark.parametrize("argument", ["flood", "--version"])
def test_a_reader_that_has_gone_is_no_error(argument: str) -> None:
    code = f"""
from lamzoo.cli import app as cli
cli.app.command("flood")(lambda: cli.out.print_json([1] * 99999))
cli.main([{argument!r}])
"""
    pipe = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert pipe.stdout is not None
    pipe.stdout.close()
    _, err = pipe.communicate()
    assert err == b""
