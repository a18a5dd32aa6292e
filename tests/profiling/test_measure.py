import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from lamzoo.adapters import fuse
from lamzoo.errors import ConfigError
from lamzoo.profiling import MemoryMeter, best_batch, measure, measurement, memory, profile, time_latency
from lamzoo.reduction.budget import merge_to_share
from lamzoo.registry.factory import create_model
from tests.forked import run_code


def tiny(**arguments):
    return create_model("lam_vit_micro", embed_dim=32, depth=1, num_heads=2, **arguments)


def test_a_model_with_masks_is_measured_beside_itself_without_them():
    result = measure(tiny(), batch=2, repeats=4, warmup=1)
    assert result.profile.lam_gmacs > 0
    assert result.comparison is not None
    assert result.comparison.model == result.latency
    assert result.comparison.input_shape == (1, 3, 32, 32)
    assert result.comparison.ratio > 0
    assert result.batch == 2
    assert result.images_per_s > 0
    assert result.images_per_s_ratio is not None


def test_a_fused_model_is_measured_beside_its_backbone():
    model = fuse(create_model("lam_vit_tiny_patch8_64", depth=1))
    result = measure(model, batch=1, repeats=2, warmup=0)
    assert result.profile.fused_layers == 1
    assert result.comparison is not None


def test_a_plain_model_is_measured_alone():
    result = measure(tiny(lam=False), batch=1, repeats=2, warmup=0)
    assert (result.comparison, result.images_per_s_ratio, result.profile.lam_gmacs) == (None, None, 0)


@pytest.mark.parametrize("lam", [True, False], ids=["masked", "plain"])
def test_a_model_with_merged_tokens_is_measured_beside_its_backbone_with_all(lam: bool):
    model = create_model("lam_vit_micro", embed_dim=32, depth=2, num_heads=2, lam={"rank": 2} if lam else False)
    whole = profile(model)
    result = measure(merge_to_share(model, 0.8), batch=1, repeats=2, warmup=0)
    assert 0.7 * whole.gmacs < result.profile.gmacs <= 0.8 * whole.gmacs
    assert (0.6 if lam else 0) * whole.lam_gmacs <= result.profile.lam_gmacs <= whole.lam_gmacs
    assert result.comparison is not None
    assert result.images_per_s_ratio is not None
    assert model.token_reduction is not None


def test_the_model_is_left_as_it_was():
    model = tiny().train()
    state = copy.deepcopy(model.state_dict())
    measure(model, batch=1, repeats=2, warmup=0)
    assert model.training
    assert model.lam_config is not None
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())


def test_half_precision_is_measured():
    assert measure(tiny().to(torch.bfloat16), batch=1, repeats=2, warmup=0).latency.median_ms > 0


def test_masks_that_cost_nothing_are_refused(monkeypatch):
    cheap = measurement.profile(tiny(lam=False))
    monkeypatch.setattr(measurement, "profile", lambda model: cheap)
    with pytest.raises(ConfigError, match="appear to cost nothing"):
        measure(tiny(), batch=1, repeats=2)


def test_macs_that_contradict_the_formula_are_refused(monkeypatch):
    real = measurement.profile
    wrong = lambda model: dataclasses.replace(real(model), gmacs=1.02 * real(model).gmacs)  # noqa: E731
    monkeypatch.setattr(measurement, "profile", wrong)
    with pytest.raises(ConfigError, match="its formula gives"):
        measure(tiny(lam=False), batch=1, repeats=2)


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"max_batch": 0}, {"batch": 1, "repeats": 1}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ConfigError, match="must be 1 or more|at least 2 repeats"):
        measure(tiny(), **wrong)


def rates(monkeypatch, seconds, grown=None):
    """Lets a pass of a batch take what a table says, and notes which batches were tried."""
    tried = []

    def try_batch(model, batch):
        tried.append(batch)
        return (seconds[batch], (grown or {}).get(batch, 0)) if batch in seconds else None

    monkeypatch.setattr(measurement, "_try_batch", try_batch)
    return tried


def test_the_batch_is_doubled_until_images_a_second_fall(monkeypatch):
    tried = rates(monkeypatch, {1: 1.0, 2: 1.5, 4: 2.0, 8: 4.5, 16: 9.5, 32: 10.0})
    assert best_batch(nn.Linear(1, 1)) == 4
    assert tried == [1, 2, 4, 8, 16]


def test_one_step_without_gain_does_not_end_the_search(monkeypatch):
    rates(monkeypatch, {1: 1.0, 2: 2.0, 4: 2.0, 8: 4.5, 16: 9.0})
    assert best_batch(nn.Linear(1, 1)) == 4


def test_the_search_ends_where_memory_does(monkeypatch):
    tried = rates(monkeypatch, {1: 1.0, 2: 1.0, 4: 1.0})
    assert best_batch(nn.Linear(1, 1)) == 4
    assert tried == [1, 2, 4, 8]
    monkeypatch.setattr(measurement, "free_bytes", lambda: 1000)
    tried = rates(monkeypatch, {1: 1.0, 2: 1.0, 4: 1.0, 8: 1.0}, grown={1: 200, 2: 400, 4: 600})
    assert best_batch(nn.Linear(1, 1)) == 4
    assert tried == [1, 2, 4], "a batch of 8 would need 1200 bytes"


def test_the_search_ends_at_the_limit_and_at_slow_passes(monkeypatch):
    rates(monkeypatch, dict.fromkeys((1, 2, 4, 8, 16), 1.0))
    assert best_batch(nn.Linear(1, 1), 8) == 8
    tried = rates(monkeypatch, {1: 6.0, 2: 11.0})
    assert best_batch(nn.Linear(1, 1)) == 2
    assert tried == [1, 2]


def test_a_model_that_does_not_fit_at_all_is_refused(monkeypatch):
    rates(monkeypatch, {})
    with pytest.raises(ConfigError, match="A single image does not fit"):
        best_batch(nn.Linear(1, 1))


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")],
    ids=str,
)
def test_running_out_of_memory_is_no_error(monkeypatch, error):
    def fail(model, images):
        raise error

    monkeypatch.setattr(measurement, "_pass", fail)
    assert measurement._try_batch(tiny(), 1) is None


def test_another_error_in_a_pass_is_one(monkeypatch):
    monkeypatch.setattr(measurement, "_pass", lambda model, images: nn.Linear(1, 1)(torch.zeros(2)))
    with pytest.raises(RuntimeError, match="shapes"):
        measurement._try_batch(tiny(), 1)


# In a process of its own, as the meter asks: memory that other tests have freed would be used again, unnoticed.
_METER = """
import sys
import torch
from lamzoo.profiling import MemoryMeter

MIB = 2**18  # float32 numbers

class Wide(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(32 * MIB))

    def forward(self, x):
        return torch.ones(64 * MIB).sum() + x

ballast = torch.ones(int(sys.argv[1]) * MIB)
meter = MemoryMeter(torch.device("cpu"))
print(meter.peak_mib(Wide(), torch.zeros(1)))
"""


@pytest.mark.parametrize("ballast_mib", [0, 64])
def test_peak_memory_is_that_of_weights_and_activations_whatever_was_there_before(ballast_mib):
    found = []
    for _ in range(3):  # the system may take pages away, or give some back late
        run = run_code(_METER, str(ballast_mib))
        assert run.returncode == 0, run.stderr
        found.append(float(run.stdout))
        if found[-1] == pytest.approx(32 + 64, abs=8):
            return
    pytest.fail(f"{found} MiB in place of 96")


def test_latency_of_one_model():
    latency = time_latency(tiny(), torch.rand(1, 3, 32, 32), repeats=3, warmup=0)
    assert 0 < latency.quartiles_ms[0] <= latency.median_ms <= latency.quartiles_ms[1]
    with pytest.raises(ConfigError, match="at least 2 repeats"):
        time_latency(tiny(), torch.rand(1, 3, 32, 32), repeats=1)


@pytest.mark.slow
def test_compiled_models_are_measured():
    result = measure(tiny(), compiled=True, batch=2, repeats=3, warmup=1)
    assert result.comparison is not None
    assert result.profile.lam_gmacs > 0


@pytest.mark.gpu
def test_cuda_memory_and_speed_are_measured():
    device = torch.device("cuda")
    meter = MemoryMeter(device)
    model = tiny().to(device)
    weights = sum(parameter.numel() * 4 for parameter in model.parameters()) / 2**20
    assert weights <= meter.peak_mib(model, torch.rand(1, 3, 32, 32, device=device)) < weights + 64
    result = measure(model, max_batch=8, repeats=4)
    assert result.comparison is not None
    assert result.comparison.device.startswith("cuda (")
    assert result.batch in (1, 2, 4, 8)


@pytest.mark.gpu
def test_a_batch_that_is_too_large_for_the_gpu_ends_the_search():
    model = tiny(img_size=32).to("cuda")
    assert measurement._try_batch(model, 1) is not None
    torch.cuda.set_per_process_memory_fraction(0.02)
    try:
        assert measurement._try_batch(model, 2**18) is None
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_cached_files_do_not_count_as_used_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name, text in (("max", "1000000"), ("current", "999000"), ("stat", "anon 9000\ninactive_file 990000\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert memory.free_bytes() == 991000
