"""How a budget is split over layers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from dst.allocation import ER, ERK, Global, PerLayer, Uniform
from dst.errors import ConfigurationError
from tests.checks import check_density

shape = st.one_of(
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.tuples(st.integers(1, 20), st.integers(1, 20), st.sampled_from([1, 3]), st.sampled_from([1, 3])),
)
shapes_lists = st.lists(shape, min_size=1, max_size=8)
density_values = st.floats(0.001, 1.0)


def names(shapes):
    return [f"layer{i}" for i in range(len(shapes))]


def sizes(shapes):
    return [math.prod(s) for s in shapes]


@given(shapes_lists, density_values, st.sampled_from([Uniform(), ER(), ERK(), ERK(power=0.5)]))
def test_counts_lie_between_one_and_all_and_add_up_to_the_budget(shapes, density, allocation):
    assume(density * sum(sizes(shapes)) > len(shapes))
    counts = allocation.counts(names(shapes), shapes, density)
    assert all(1 <= c <= n for c, n in zip(counts, sizes(shapes), strict=True))
    if isinstance(allocation, Uniform):
        for count, size in zip(counts, sizes(shapes), strict=True):
            check_density(count, density, size)
    else:
        check_density(sum(counts), density, sum(sizes(shapes)))


# With four weights and more in every layer at these densities, rounding never runs out of room.
roomy = st.one_of(
    st.tuples(st.integers(5, 40), st.integers(5, 40)), st.tuples(st.integers(5, 20), st.integers(5, 20), st.just(3))
)


@given(st.lists(roomy, min_size=1, max_size=8), st.floats(0.2, 1.0), st.sampled_from([ER(), ERK(), ERK(power=0.5)]))
@example([(5, 5), (9, 12), (12, 9)], 0.20185, ERK())
def test_erk_counts_are_the_densities_to_a_weight_and_dense_layers_are_dense(shapes, density, allocation):
    counts = allocation.counts(names(shapes), shapes, density)
    densities = allocation.densities(names(shapes), shapes, density)
    for count, size, share in zip(counts, sizes(shapes), densities, strict=True):
        assert abs(count - share * size) < 2
        if share == 1:
            assert count == size


@pytest.mark.parametrize("allocation", [Uniform(), ER(), ERK()])
def test_fewer_weights_than_layers_are_refused(allocation):
    shapes = [(2, 5)] * 4
    with pytest.raises(ConfigurationError, match=r"keeps 2 weights for 4 layers; use at least 0\.1"):
        allocation.counts(names(shapes), shapes, 0.05)
    assert allocation.counts(names(shapes), shapes, 0.1) == [1, 1, 1, 1]


@given(shapes_lists, density_values, st.sampled_from([ER(), ERK(), ERK(power=0.5)]))
def test_erk_densities_are_proportional_where_they_are_not_one(shapes, density, allocation):
    densities = allocation.densities(names(shapes), shapes, density)
    assert all(0 < d <= 1 for d in densities)
    total = sum(d * n for d, n in zip(densities, sizes(shapes), strict=True))
    assert abs(total - density * sum(sizes(shapes))) <= len(shapes)

    def raw(s):
        s = s[:2] if isinstance(allocation, ER) else s
        return (sum(s) / math.prod(s)) ** allocation.power

    sparse = [d / raw(s) for d, s in zip(densities, shapes, strict=True) if d < 1]
    if sparse:
        epsilon = sparse[0]
        assert sparse == pytest.approx([epsilon] * len(sparse), rel=1e-9)
        dense = [raw(s) for d, s in zip(densities, shapes, strict=True) if d == 1]
        assert all(epsilon * r >= 1 - 1e-9 for r in dense)


def test_er_looks_at_channels_and_erk_at_kernels_too():
    shapes = [(4, 8, 3, 3), (16, 16)]
    er = ER().densities(names(shapes), shapes, 0.1)
    assert er[0] / er[1] == pytest.approx((12 / 32) / (32 / 256))
    erk = ERK().densities(names(shapes), shapes, 0.1)
    assert erk[0] / erk[1] == pytest.approx((18 / 288) / (32 / 256))
    rooted = ERK(power=0.5).densities(names(shapes), shapes, 0.1)
    assert rooted[0] / rooted[1] == pytest.approx(((18 / 288) / (32 / 256)) ** 0.5)


def test_layers_that_would_exceed_one_become_dense_and_the_rest_is_solved_again():
    # Raw densities 3/2, 4/4 and 20/100. At 0.5 of 106 weights the first is full, and only then the second; 47 remain.
    shapes = [(2, 1), (2, 2), (10, 10)]
    assert ERK().densities(names(shapes), shapes, 0.5) == pytest.approx([1, 1, 0.47])
    assert ERK().counts(names(shapes), shapes, 0.5) == [2, 4, 47]
    assert ERK().densities(names(shapes), shapes, 1.0) == [1, 1, 1]


def test_uniform_and_its_dense_first_layer():
    shapes = [(10, 10), (20, 10), (30, 10)]
    assert Uniform().counts(names(shapes), shapes, 0.1) == [10, 20, 30]
    assert Uniform(dense_first=True).counts(names(shapes), shapes, 0.1) == [100, 20, 30]


@given(shapes_lists, density_values, st.integers(0, 3), st.booleans())
def test_global_is_exact_and_leaves_no_layer_empty(shapes, density, seed, tied):
    assume(density * sum(sizes(shapes)) > len(shapes))
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.rand(s, generator=generator) + 10 * (i == 0) for i, s in enumerate(shapes)]
    if tied:
        scores = [torch.zeros(s) for s in shapes]
    counts = Global().counts(names(shapes), shapes, density, scores)
    check_density(sum(counts), density, sum(sizes(shapes)))
    assert all(1 <= c <= n for c, n in zip(counts, sizes(shapes), strict=True))
    assert Global().counts(names(shapes), shapes, density, scores) == counts


def test_global_spends_the_budget_on_the_best_scores():
    scores = [torch.tensor([[9.0, 1.0, 8.0, 2.0]]), torch.tensor([[3.0, 7.0]]), torch.tensor([[0.1, 0.2, 0.3, 0.4]])]
    shapes = [(1, 4), (1, 2), (1, 4)]
    assert Global().counts("abc", shapes, 0.5, scores) == [2, 2, 1]  # 9 8 7 3 2, whose least gives way to 0.4
    assert Global().counts("abc", shapes, 0.6, scores) == [3, 2, 1]
    assert Global().needs_scores


def test_global_refuses_fewer_weights_than_layers_and_says_what_would_do():
    shapes = [(2, 5)] * 4
    with pytest.raises(ConfigurationError, match=r"keeps 2 weights for 4 layers; use at least 0\.1"):
        Global().counts(names(shapes), shapes, 0.05, [torch.rand(s) for s in shapes])
    assert sum(Global().counts(names(shapes), shapes, 0.1, [torch.rand(s) for s in shapes])) == 4
    with pytest.raises(ValueError, match="scores"):
        Global().counts(names(shapes), shapes, 0.5)


class TestPerLayer:
    shapes = ((10, 10), (20, 10), (5, 4))
    names = ("body.a", "body.b", "head")

    def counts(self, table, density):
        return PerLayer(table).counts(self.names, self.shapes, density)

    def test_names_and_patterns(self):
        assert self.counts({"body.*": 0.1, "head": 0.5}, 0.125) == [10, 20, 10]

    def test_first_match_counts(self):
        assert self.counts({"body.a": 0.5, "body.*": 0.1, "*": 1.0}, 0.28125) == [50, 20, 20]

    def test_a_part_of_a_parameter_is_named_as_it_is(self):
        names = [f"attention.in_proj_weight[{part}]" for part in "qkv"]
        table = dict(zip(names, (0.1, 0.2, 0.3), strict=True))
        assert PerLayer(table).counts(names, [(10, 10)] * 3, 0.2) == [10, 20, 30]

    def test_missing_layer(self):
        with pytest.raises(ConfigurationError, match="no density is given for head"):
            self.counts({"body.*": 0.1}, 0.1)

    def test_unused_pattern(self):
        with pytest.raises(ConfigurationError, match=r"\['tail'\] match no layer; the layers are body.a, body.b, head"):
            self.counts({"*": 0.1, "tail": 0.2}, 0.1)

    def test_wrong_total(self):
        with pytest.raises(ConfigurationError, match=r"add up to 0\.125, but density=0\.2.*pass density=0\.125"):
            self.counts({"body.*": 0.1, "head": 0.5}, 0.2)

    def test_total_may_be_off_by_one_weight_per_layer(self):
        assert self.counts({"body.*": 0.1, "head": 0.5}, 43 / 320) == [10, 20, 10]
        with pytest.raises(ConfigurationError, match="add up"):
            self.counts({"body.*": 0.1, "head": 0.5}, 44 / 320)

    @pytest.mark.parametrize("density", [0, -0.1, 1.1, math.nan])
    def test_out_of_range(self, density):
        with pytest.raises(ConfigurationError, match=r"density of layer 'head' is .*\(0, 1\]"):
            PerLayer({"body.*": 0.1, "head": density})
