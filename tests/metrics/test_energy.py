"""Energy: counters are read and wrap; without one there is no figure."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from dst.errors import ConfigurationError
from dst.metrics import Energy, EnergyMeter
from dst.metrics.energy import Nvml, Rapl, available_meters, sum_energy


def counters(root, *values, limit=1_000_000):
    for i, value in enumerate(values):
        zone = root / f"intel-rapl:{i}"
        zone.mkdir(exist_ok=True, parents=True)
        (zone / "energy_uj").write_text(f"{value}\n")
        (zone / "max_energy_range_uj").write_text(f"{limit}\n")
        part = root / f"intel-rapl:{i}:0"  # a part of the package, which its counter holds already
        part.mkdir(exist_ok=True)
        (part / "energy_uj").write_text("999\n")


def test_rapl_adds_packages_and_survives_a_wrap(tmp_path):
    counters(tmp_path, 100, 900_000)
    meter = Rapl(tmp_path)
    with EnergyMeter(meters=[meter]) as measured:
        counters(tmp_path, 400_100, 950_000)
        assert meter.joules() == pytest.approx(0.45)
        counters(tmp_path, 400_100, 50_000)
    assert measured.result.joules == pytest.approx(0.55)
    assert "(CPU packages (RAPL" in str(measured.result)
    assert measured.result.seconds == measured.seconds > 0


@pytest.fixture
def powercap(tmp_path, monkeypatch):
    """The folder in which counters of the CPU are looked for."""
    monkeypatch.setattr(Rapl.__init__, "__defaults__", (tmp_path,))
    return tmp_path


def test_machines_without_counters_get_no_figure(powercap):
    assert available_meters() == []
    with EnergyMeter() as measured:
        assert sum(range(1000))
    assert measured.result is None
    assert measured.seconds > 0
    counters(powercap, 5)
    assert [type(meter) for meter in available_meters()] == [Rapl]


def test_counters_that_may_not_be_read_are_no_measurement(tmp_path):
    counters(tmp_path, 5)
    (tmp_path / "intel-rapl:0" / "max_energy_range_uj").write_text("much")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        Rapl(tmp_path)
    with pytest.raises(ConfigurationError, match="no RAPL counter"):
        Rapl(tmp_path / "none")


class FakeNvml(types.ModuleType):
    """What of NVIDIA's library is used."""

    class NVMLError(Exception):
        pass

    def __init__(self):
        super().__init__("pynvml")
        self.millijoules = {"GPU-a": 5_000, "GPU-b": 7_000}

    def nvmlInit(self):
        pass

    def nvmlDeviceGetHandleByUUID(self, identifier):
        if identifier not in self.millijoules:
            raise self.NVMLError("not found")
        return identifier

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        return self.millijoules[handle]


def test_gpus_are_read_by_their_library(monkeypatch):
    library = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", library)
    with EnergyMeter(meters=[Nvml(["GPU-a", "GPU-b"])]) as measured:
        library.millijoules["GPU-b"] += 2_500
    assert measured.result.joules == 2.5
    assert measured.result.sources == ("2 GPU (NVML)",)
    with pytest.raises(ConfigurationError, match="energy of GPU-c cannot be read: not found"):
        Nvml(["GPU-c"])


def test_the_gpu_of_the_model_is_read_or_nothing_is(monkeypatch, powercap):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="a"))
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    assert [type(meter) for meter in available_meters("cuda")] == [Nvml]
    counters(powercap, 5)
    assert [type(meter) for meter in available_meters("cuda")] == [Nvml, Rapl]
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert available_meters("cuda") == []  # the CPU alone is not what the model takes
    with pytest.raises(ConfigurationError, match=r"pip install 'dst\[energy\]'"):
        Nvml(["GPU-a"])


def test_energy_is_divided_and_added():
    whole = Energy(10.0, 2.0, ("x",))
    assert whole.per(5) == Energy(2.0, 0.4, ("x",))
    assert sum_energy([whole, Energy(1.0, 1.0, ("y", "x"))]) == Energy(11.0, 3.0, ("x", "y"))
    with pytest.raises(ConfigurationError, match="among 0 pieces"):
        whole.per(0)
