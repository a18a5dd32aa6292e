import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lamzoo.errors import ConfigError
from lamzoo.profiling import compare_latency, latency
from lamzoo.profiling.latency import device_label


class _Sleep(nn.Module):
    def __init__(self, seconds, log=None):
        super().__init__()
        self.seconds = seconds
        self.log = [] if log is None else log

    def forward(self, x):
        assert not self.training
        assert torch.is_inference_mode_enabled()
        self.log.append(self.seconds)
        time.sleep(self.seconds)
        return x


class _Timed(nn.Module):
    """Adds the milliseconds that its passes take to a log, and takes none."""

    def __init__(self, milliseconds, log):
        super().__init__()
        self.milliseconds, self.log = iter(milliseconds), log

    def forward(self, x):
        self.log.append(next(self.milliseconds))
        return x


def test_ratio_and_medians_are_those_of_the_models(monkeypatch):
    model, baseline = _Timed([8, 20, 24, 16, 40, 20], log := []), _Timed([8, 10, 8, 8, 10, 8], log)
    monkeypatch.setattr(latency, "time", SimpleNamespace(perf_counter=lambda: sum(log) / 1e3))
    result = compare_latency(model, baseline, torch.zeros(2, 3), repeats=5, warmup=1)
    assert (result.model.median_ms, result.baseline.median_ms, result.ratio) == pytest.approx((20, 8, 2.5))
    assert result.model.quartiles_ms == pytest.approx((20, 24))
    assert result.ratio_quartiles == pytest.approx((2, 3))
    assert (result.input_shape, result.dtype) == ((2, 3), "float32")
    assert result.device == device_label(torch.device("cpu"))
    assert result.device.startswith("cpu")
    assert (result.repeats, result.threads) == (5, torch.get_num_threads())


def test_models_run_in_turns_and_go_first_in_turns():
    log = []
    compare_latency(_Sleep(0.0, log), _Sleep(0.001, log), torch.zeros(1), repeats=3, warmup=1)
    assert log == [0.0, 0.001, 0.001, 0.0, 0.0, 0.001, 0.001, 0.0]


def test_training_mode_is_put_back():
    model, baseline = _Sleep(0.0).train(), _Sleep(0.0).eval()
    compare_latency(model, baseline, torch.zeros(1), repeats=2, warmup=0)
    assert model.training
    assert not baseline.training


def test_impossible_repeats_are_refused():
    with pytest.raises(ConfigError, match="at least 2 repeats"):
        compare_latency(_Sleep(0.0), _Sleep(0.0), torch.zeros(1), repeats=1)


def test_models_on_another_device_are_refused():
    with pytest.raises(ConfigError, match="baseline is on meta and the input on cpu"):
        compare_latency(nn.Linear(1, 1), nn.Linear(1, 1, device="meta"), torch.zeros(1))
    with pytest.raises(ConfigError, match="not on meta"):
        compare_latency(nn.Linear(1, 1), nn.Linear(1, 1), torch.zeros(1, device="meta"))


@pytest.mark.gpu
def test_cuda_kernels_are_waited_for():
    big = nn.Linear(8192, 8192, device="cuda")
    model = nn.Sequential(*[big] * 4)
    result = compare_latency(model, nn.Sequential(big), torch.rand(4096, 8192, device="cuda"))
    assert result.device.startswith("cuda (")
    assert 3 < result.ratio < 5
