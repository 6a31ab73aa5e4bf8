"""Energy: counters are read and wrap, and estimates are called so."""

from __future__ import annotations

import sys
import types

import pytest

from dst.errors import ConfigurationError
from dst.metrics import Energy, EnergyMeter
from dst.metrics import energy as module
from dst.metrics.energy import CpuTime, Nvml, Rapl, available_meters


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
    assert not measured.result.estimated
    assert "measured: CPU packages" in str(measured.result)
    assert measured.result.seconds > 0


def test_machines_without_counters_get_an_estimate_that_says_what_it_assumes(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_POWERCAP", tmp_path)
    monkeypatch.setattr(Rapl.__init__, "__defaults__", (tmp_path,))
    (meter,) = available_meters(watts_per_core=7)
    assert isinstance(meter, CpuTime)
    used = {"seconds": 3.0}

    def times():
        return types.SimpleNamespace(user=9.0, system=9.0, children_user=0.5 * used["seconds"], children_system=0.5)

    monkeypatch.setattr(module.os, "times", times)
    monkeypatch.setattr(module.time, "process_time", lambda: 0.5 * used["seconds"])
    with EnergyMeter(meters=[meter]) as measured:
        used["seconds"] += 2
    assert measured.result.joules == 14
    assert measured.result.estimated
    assert "estimate: CPU time at an assumed 7 W per busy core" in str(measured.result)


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
    assert not measured.result.estimated
    with pytest.raises(ConfigurationError, match="energy of GPU-c cannot be read: not found"):
        Nvml(["GPU-c"])


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'dst\[energy\]'"):
        Nvml(["GPU-a"])
    missing = module._or_missing(lambda: Nvml(["GPU-a"]), "the GPU")
    with EnergyMeter(meters=[missing]) as measured:
        pass
    assert measured.result.estimated
    assert "without the GPU, which is not counted" in str(measured.result)


def test_energy_of_one_inference():
    whole = Energy(10.0, 2.0, ("x",), True)
    assert whole.per(5) == Energy(2.0, 0.4, ("x",), True)
    for call in (lambda: whole.per(0), lambda: CpuTime(0), lambda: EnergyMeter(meters=[])):
        with pytest.raises(ConfigurationError):
            call()
