"""Durations, clocks, fractions and densities."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dst.errors import ConfigurationError
from dst.schedules import Alternating, Constant, Cosine, Cubic, Every, InversePower, Linear, Never, Stepwise
from dst.types import resolve_steps


@pytest.mark.parametrize(
    ("duration", "steps"), [(0, 0), (1, 1), (7, 7), (500, 500), (0.0, 0), (1.0, 200), (0.25, 50), (0.0076, 2)]
)
def test_ints_are_steps_and_floats_fractions(duration, steps):
    assert resolve_steps(duration, 200) == steps


@pytest.mark.parametrize("duration", [-1, -0.1, 1.01, 100.0, math.nan, math.inf, True, "0.5", None])
def test_durations_out_of_range_are_named(duration):
    with pytest.raises(ConfigurationError, match="rewind_to="):
        resolve_steps(duration, 200, "rewind_to")


def fired(clock, total):
    return [step for step in range(2 * total) if clock.fires(step, total)]


@pytest.mark.parametrize(
    ("clock", "steps"),
    [
        (Every(10, 0, 1.0), [0, 10, 20, 30]),
        (Every(10, 0, 0.75), [0, 10, 20]),
        (Every(10, 0, 31), [0, 10, 20, 30]),
        (Every(10, 0, 30), [0, 10, 20]),
        (Every(10, 5, 1.0), [5, 15, 25, 35]),
        (Every(0.25, 0.1, 1.0), [4, 14, 24, 34]),
        (Every(0.001, 0, 3), [0, 1, 2]),  # a fraction of less than a step is every step
        (Every(10, 0.5, 0.5), []),
        (Every(), [0]),
        (Never(), []),
    ],
)
def test_when_clocks_fire(clock, steps):
    assert fired(clock, 40) == steps


@given(st.integers(1, 50), st.integers(0, 50), st.integers(0, 120), st.integers(1, 100))
def test_every_fires_within_its_window_at_equal_distances(every, start, stop, total):
    clock = Every(every, start, stop)
    assert fired(clock, 100) == list(range(start, min(stop, 200), every))
    assert clock.stop_step(total) == stop
    assert not any(clock.fires(step, total) for step in range(stop, stop + 60))


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"every": 0}, "update_every"),
        ({"every": 0.0}, "update_every"),
        ({"every": -5}, "update_every"),
        ({"start": -1}, "start"),
        ({"stop": 1.5}, "stop"),
    ],
)
def test_clock_settings_out_of_range_are_named(arguments, name):
    with pytest.raises(ConfigurationError, match=f"{name}="):
        Every(**arguments)


@pytest.mark.parametrize(
    ("fraction", "values"),
    [
        (Constant(0.3), [0.3, 0.3, 0.3, 0.3]),
        (Linear(0.4), [0.4, 0.3, 0.2, 0.0]),
        (InversePower(0.8, power=2), [0.8, 0.45, 0.2, 0.0]),
        (InversePower(0.8), [0.8, 0.3375, 0.1, 0.0]),
        (Cosine(0.4), [0.4, 0.2 * (1 + math.sqrt(0.5)), 0.2, 0.0]),
    ],
)
def test_fractions_by_hand(fraction, values):
    assert [fraction(step, 40) for step in (0, 10, 20, 40)] == pytest.approx(values, abs=1e-12)
    assert fraction(60, 40) == pytest.approx(values[-1], abs=1e-12)
    assert fraction(0, 0) == pytest.approx(values[-1], abs=1e-12)


@given(
    st.sampled_from([Constant, Linear, Cosine, InversePower]),
    st.floats(0, 1),
    st.integers(1, 1000),
    st.integers(0, 1000),
)
def test_fractions_start_at_their_initial_value_and_never_rise(kind, initial, stop, step):
    fraction = kind(initial)
    assert fraction(0, stop) == pytest.approx(initial)
    assert 0 <= fraction(step + 1, stop) <= fraction(step, stop) + 1e-12 <= initial + 1e-9


@pytest.mark.parametrize("kind", [Constant, Linear, Cosine, InversePower])
@pytest.mark.parametrize("initial", [-0.1, 1.1, math.nan])
def test_fractions_refuse_an_initial_value_out_of_range(kind, initial):
    with pytest.raises(ConfigurationError, match="drop fraction"):
        kind(initial)


def test_inverse_power_refuses_a_power_that_is_not_positive():
    with pytest.raises(ConfigurationError, match="power=0"):
        InversePower(0.3, power=0)


# --- densities ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "density"),
    [(0, 1.0), (1, 0.5), (19, 0.5), (20, 0.05), (29, 0.05), (30, 0.8), (74, 0.8), (75, 0.1), (99, 0.1)],
)
def test_a_density_in_steps(step, density):
    schedule = Stepwise([[1, 0.5], [0.2, 0.05], [30, 0.8]], initial=1.0)  # lists, as YAML has them
    assert schedule(step, 100, 0.1) == density
    assert schedule.settles_at(100) == 75
    assert hash(schedule) == hash(Stepwise(((1, 0.5), (0.2, 0.05), (30, 0.8))))


@given(st.floats(0.01, 1), st.floats(0.01, 1), st.integers(0, 60), st.integers(0, 60), st.integers(1, 100))
def test_the_cubic_density_goes_one_way_from_initial_to_final(initial, final, start, length, total):
    schedule = Cubic(initial, start, start + length)
    found = [schedule(step, total, final) for step in range(start + length + 5)]
    assert all(d == initial for d in found[: start + (length > 0)])
    assert all(d == final for d in found[start + length :])
    way = sorted(found, reverse=initial > final)
    assert found == pytest.approx(way)
    assert schedule.settles_at(total) == start + length


@pytest.mark.parametrize(
    "make",
    [
        lambda: Cubic(0.0),
        lambda: Cubic(1.5),
        lambda: Cubic(1.0, start=-1),
        lambda: Cubic(1.0, stop=1.5),
        lambda: Stepwise(((0.1, 0.0),)),
        lambda: Stepwise(((0.1, 1.1),)),
        lambda: Stepwise(((-1, 0.5),)),
        lambda: Stepwise((), initial=0.0),
        lambda: Stepwise((), stop=2.0),
        lambda: Alternating(every=0),
        lambda: Alternating(start=-0.1),
        lambda: Alternating(stop=1.1),
    ],
)
def test_densities_out_of_range(make):
    with pytest.raises(ConfigurationError):
        make()
