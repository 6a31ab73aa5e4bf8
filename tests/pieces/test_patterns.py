"""Patterns: whole groups and exact counts at every update."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dst
from dst import methods
from dst.allocation import Global, Uniform
from dst.errors import ConfigurationError
from dst.init import Magnitude
from dst.patterns import NM, Block, Diagonal, FanIn, Head, Neuron, TransposableNM, Unstructured, best_per_scope
from dst.redistribute import MeanMomentum
from dst.schedules import Constant, Cubic
from dst.scores import Momentum
from dst.topology.layers import SparseLayer, find_layers
from dst.topology.seeding import folded_generator
from tests.checks import check_budget
from tests.small import Small, backward


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def layer(*shape: int, output_dim: int = 0, label: str = "attention.in_proj_weight[q]") -> SparseLayer:
    return SparseLayer(label, "weight", "Linear", shape, output_dim=output_dim)


def mask_from(where: SparseLayer, positions: torch.Tensor) -> torch.Tensor:
    mask = torch.zeros(where.shape, dtype=torch.bool)
    mask.view(-1)[positions] = True
    return mask


def as_matrix(where: SparseLayer, tensor: torch.Tensor) -> torch.Tensor:
    """Outputs by inputs, written differently from the code under test."""
    if where.output_dim:
        tensor = tensor.transpose(0, 1)
    return tensor.flatten(1)


def has_pattern(pattern, where, mask) -> bool:
    """The definition of every pattern, by loops."""
    matrix = as_matrix(where, mask)
    rows, columns = matrix.shape
    if isinstance(pattern, Block):
        height, width = math.gcd(pattern.height, rows), math.gcd(pattern.width, columns)
        tiles = itertools.product(range(0, rows, height), range(0, columns, width))
        return all(len(matrix[r : r + height, c : c + width].unique()) == 1 for r, c in tiles)
    if isinstance(pattern, Neuron):
        return all(len(row.unique()) == 1 for row in matrix)
    if isinstance(pattern, Head):
        size = rows // pattern.heads
        return all(len(matrix[h * size : (h + 1) * size].unique()) == 1 for h in range(pattern.heads))
    if isinstance(pattern, Diagonal):
        if rows > columns:
            matrix, rows, columns = matrix.t(), columns, rows
        return all(len({bool(matrix[i, (i + d) % columns]) for i in range(rows)}) == 1 for d in range(columns))
    if isinstance(pattern, FanIn):
        sums = matrix.sum(1)
        return len(sums[sums > 0].unique()) == 1 and (pattern.ablate > 0 or bool((sums > 0).all()))
    channels_last = (mask.transpose(0, 1) if where.output_dim else mask).movedim(1, -1)
    if isinstance(pattern, NM):
        for line in channels_last.reshape(-1, channels_last.shape[-1]):
            for window in line.split(pattern.m):
                if int(window.sum()) != len(window) * pattern.n // pattern.m:
                    return False
        return True
    assert isinstance(pattern, TransposableNM)
    plane = channels_last.movedim(-1, 1).flatten(2).movedim(-1, 0) if mask.ndim > 2 else channels_last[None]
    return all(
        bool((part.sum(1) == pattern.n).all())
        for matrix in plane
        for lines in (matrix, matrix.t())
        for part in lines.split(pattern.m, 1)
    )


PATTERNS = [
    Block(4, 4),
    Block(1, 8),
    Block(3, 2),
    Neuron(),
    Head(2),
    Diagonal(),
    FanIn(),
    FanIn(0.5),
    NM(2, 4),
    NM(1, 4),
    NM(3, 5),
    TransposableNM(2, 4),
    TransposableNM(1, 2),
]
LAYERS = [
    layer(12, 16),
    layer(16, 12),
    layer(10, 7),
    layer(1, 9),
    layer(8, 4, 3, 3),
    layer(6, 5, 3, 2),
    layer(4, 8, 3, 3, output_dim=1),
    layer(5, 6, 2, 3, output_dim=1),
    layer(4, 4, 3),
]
COMBINATIONS = [
    pytest.param(p, x, id=f"{p}-{'x'.join(map(str, x.shape))}{'T' * x.output_dim}")
    for p in PATTERNS
    for x in LAYERS
    if p.for_density(p.n / p.m if isinstance(p, (NM, TransposableNM)) else 0.3).unsupported_reason(x) is None
]


def density_of(pattern) -> float:
    return pattern.n / pattern.m if isinstance(pattern, (NM, TransposableNM)) else 0.3


@pytest.mark.parametrize(
    ("pattern", "where", "regrow"),
    [
        pytest.param(
            *p.values, regrow, id=f"{p.id}-{regrow}", marks=[pytest.mark.exhaustive] if i % 2 == regrow else []
        )
        for i, p in enumerate(COMBINATIONS)
        for regrow in (True, False)
    ],
)
def test_masks_keep_the_pattern_and_the_count_through_updates(pattern, where, regrow):
    resolved = pattern.for_density(density_of(pattern))
    count = resolved.fit(where, round(density_of(pattern) * where.weights))
    scores = torch.rand(where.shape, generator=generator(1)) - 0.8  # most below what pads a short window
    mask = mask_from(where, resolved.select(where, scores, count, generator()))
    assert int(mask.sum()) == count
    assert has_pattern(pattern, where, mask)
    assert resolved.holds(where, mask)
    if resolved.fit(where, 1) > 1 and count < where.weights:  # elsewhere one weight fewer is a pattern too
        broken = mask.clone()
        broken.view(-1)[mask.view(-1).nonzero()[0]] = False
        assert not resolved.holds(where, broken)
    for step, fraction in enumerate((0.0, 0.3, 0.5, 0.1, 1.0)):
        drops, grows = (torch.rand(where.shape, generator=generator(10 * step + i)) - 0.8 for i in range(2))
        drop = int(fraction * int(mask.sum()))
        grow = count - (int(mask.sum()) - drop)
        rewiring = resolved.rewire(
            where, mask, drops, grows, drop, grow, regrow_dropped=regrow, generator=generator(step)
        )
        assert not mask.view(-1)[rewiring.grown].any()
        assert mask.view(-1)[rewiring.dropped].all()
        for positions in (rewiring.grown, rewiring.dropped):
            assert torch.equal(positions, positions.unique())
        before, mask = mask, rewiring.apply_(mask.clone())
        assert has_pattern(pattern, where, mask)
        assert resolved.holds(where, mask)
        if pattern == FanIn(0.5):
            remaining = int(as_matrix(where, mask).any(1).sum())
            inputs = as_matrix(where, mask).shape[1]
            assert int(mask.sum()) == min(inputs, count // remaining) * remaining
        else:
            assert int(mask.sum()) == count
        if fraction == 0 and pattern != FanIn(0.5):
            assert torch.equal(mask, before)


@pytest.mark.parametrize("pattern", [p for p in PATTERNS if p.for_density(density_of(p)).is_free], ids=str)
@given(wanted=st.integers(1, 144), rows=st.integers(1, 12), columns=st.integers(1, 12))
@settings(max_examples=25, deadline=None)
def test_fit_is_the_nearest_count_that_the_pattern_holds(pattern, wanted, rows, columns):
    where = layer(2 * rows, columns)
    wanted = min(wanted, where.weights)
    unit = pattern.fit(where, 1)
    fitted = pattern.fit(where, wanted)
    assert 0 < fitted <= where.weights
    assert fitted % unit == 0
    assert pattern.fit(where, fitted) == fitted
    assert abs(fitted - wanted) <= max(unit / 2, unit - wanted)
    mask = mask_from(where, pattern.select(where, torch.rand(where.shape), fitted, generator()))
    assert int(mask.sum()) == fitted


@pytest.mark.parametrize(("pattern", "where"), COMBINATIONS)
def test_a_budget_that_moves_is_met(pattern, where):
    resolved = pattern.for_density(density_of(pattern))
    if not resolved.is_free or pattern == FanIn(0.5):
        return
    mask = torch.ones(where.shape, dtype=torch.bool)
    for share in (0.6, 0.2, 0.7, 1.0):
        target = resolved.fit(where, round(share * where.weights))
        change = target - int(mask.sum())
        scores = torch.rand(where.shape, generator=generator(3))
        rewiring = resolved.rewire(
            where, mask, scores, scores, max(0, -change), max(0, change), regrow_dropped=True, generator=generator()
        )
        kept_by_score = rewiring.apply_(mask.clone())
        assert int(kept_by_score.sum()) == target
        assert has_pattern(pattern, where, kept_by_score)
        assert not (change < 0 and rewiring.grown.numel())
        assert not (change > 0 and rewiring.dropped.numel())
        mask = kept_by_score


def test_the_best_groups_of_every_scope_are_chosen():
    where = layer(2, 8)
    scores = torch.tensor([[1.0, 9, 3, 4, 8, 7, 6, 5], [2, 2.5, 9, 1, 0, 3, 1, 2]])
    pattern = NM(2, 4).for_density(0.5)
    assert pattern.select(where, scores, 8, generator()).tolist() == [1, 3, 4, 5, 9, 10, 13, 15]
    assert FanIn().select(where, scores, 4, generator()).tolist() == [1, 4, 10, 13]
    assert Neuron().select(where, scores, 8, generator()).tolist() == list(range(8))
    assert Block(2, 2).select(where, scores, 4, generator()).tolist() == [4, 5, 12, 13]
    assert Block(1, 2).select(where, scores, 4, generator()).tolist() == [4, 5, 6, 7]


def test_neurons_regrow_or_not():
    where = layer(4, 2)
    mask = mask_from(where, torch.tensor([0, 1, 2, 3]))
    drops = torch.tensor([[1.0, 1], [2, 2], [0, 0], [0, 0]])
    grows = torch.tensor([[9.0, 9], [0, 0], [1, 1], [2, 2]])

    def after(regrow: bool) -> list[int]:
        rewiring = Neuron().rewire(where, mask, drops, grows, 3, 3, regrow_dropped=regrow, generator=generator())
        return rewiring.apply_(mask.clone()).any(1).nonzero().squeeze(1).tolist()

    assert after(True) == [0, 1]  # the lowest, 0, is dropped and has the highest grow score
    assert after(False) == [1, 3]


def test_where_a_window_has_no_other_candidates_dropped_ones_return_best_first():
    where, pattern = layer(1, 4), NM(3, 4).for_density(0.75)
    mask = mask_from(where, torch.tensor([0, 1, 2]))
    drops = torch.tensor([[3.0, 2, 1, 0]])
    grows = torch.tensor([[0.0, 5, 9, 1]])
    rewiring = pattern.rewire(where, mask, drops, grows, 2, 2, regrow_dropped=False, generator=generator())
    assert (rewiring.grown.tolist(), rewiring.dropped.tolist()) == ([3], [1])


def test_a_window_that_keeps_too_many_loses_its_lowest():
    where, pattern = layer(1, 8), NM(1, 4).for_density(0.25)
    mask = mask_from(where, torch.tensor([0, 1, 2, 4]))  # not yet in the pattern, as after another density
    drops = torch.tensor([[1.0, 3, 2, 0, 0.5, 0, 0, 0]])
    rewiring = pattern.rewire(where, mask, drops, None, 2, 0, regrow_dropped=True, generator=generator())
    assert rewiring.apply_(mask.clone()).view(-1).nonzero().squeeze(1).tolist() == [1, 4]


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (1, 2), (2, 3)])
def test_transposable_tiles_are_optimal(n, m):
    pattern, where = TransposableNM(n, m), layer(2 * m, 3 * m)
    scores = torch.rand(where.shape, generator=generator(n + m))
    mask = mask_from(where, pattern.select(where, scores, pattern.fit(where, 1), generator()))
    for r, c in itertools.product(range(0, 2 * m, m), range(0, 3 * m, m)):
        tile, chosen = scores[r : r + m, c : c + m], mask[r : r + m, c : c + m]
        best = max(
            sum(float(tile[i, j]) for i, row in enumerate(rows) for j in row)
            for rows in itertools.product(itertools.combinations(range(m), n), repeat=m)
            if all(sum(j in row for row in rows) == n for j in range(m))
        )
        assert float((tile * chosen).sum()) == pytest.approx(best, abs=1e-5)


@pytest.mark.parametrize(
    ("pattern", "density"),
    [(Block(2, 2), 0.5), (Diagonal(), 0.5), (FanIn(), 0.5), (NM(1, 2), 0.5), (TransposableNM(), 0.5)],
)
def test_ties_are_fair_and_follow_the_seed(pattern, density):
    where, resolved = layer(16, 16), pattern.for_density(density)
    count = resolved.fit(where, int(density * where.weights))
    flat = torch.zeros(where.shape)
    picks = torch.stack([mask_from(where, resolved.select(where, flat, count, generator(s))) for s in range(300)])
    assert torch.equal(picks[7], mask_from(where, resolved.select(where, flat, count, generator(7))))
    share = picks.float().mean(0)
    # 300 draws of chance a half: standard deviation 0.029
    assert 0.35 < float(share.min()) <= float(share.max()) < 0.65
    if not isinstance(pattern, (Block, Diagonal)):
        first, second = as_matrix(where, picks[0])[:4, :4], as_matrix(where, picks[0])[4:8, 4:8]
        third = as_matrix(where, picks[0])[8:12, :4]
        assert not (torch.equal(first, second) and torch.equal(first, third))  # scopes are drawn for themselves


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_best_per_scope_against_sorting(data):
    scopes, groups = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 9))
    quotas = torch.tensor(data.draw(st.lists(st.integers(0, groups), min_size=scopes, max_size=scopes)))
    values = torch.tensor(
        data.draw(st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.5]), min_size=scopes * groups, max_size=scopes * groups))
    ).view(scopes, groups)
    chosen = best_per_scope(values, quotas, generator())
    assert chosen.sum(1).tolist() == quotas.tolist()
    for row, picked, quota in zip(values, chosen, quotas.tolist(), strict=True):
        assert sorted(row[picked].tolist()) == sorted(row.tolist(), reverse=True)[:quota][::-1]


def test_nan_is_never_chosen_while_there_is_another():
    scores = torch.full((4, 8), math.nan)
    scores[:, 2] = -5.0
    chosen = mask_from(layer(4, 8), FanIn().select(layer(4, 8), scores, 4, generator()))
    assert chosen[:, 2].all()


def test_outputs_without_salient_connections_are_ablated_and_return():
    where, pattern = layer(4, 8), FanIn(0.5)
    mask = torch.zeros(4, 8, dtype=torch.bool)
    mask[:, :2] = True
    drops = mask * torch.tensor([[9.0], [8.0], [7.0], [0.1]])
    grows = torch.arange(32.0).view(4, 8).flip(0) / 100
    grows[3] = 0
    rewiring = pattern.rewire(where, mask, drops, grows, 2, 2, regrow_dropped=True, generator=generator())
    mask = rewiring.apply_(mask.clone())
    assert mask.sum(1).tolist() == [2, 2, 2, 0]  # eight connections over three outputs make a fan-in of two
    grows = torch.zeros(4, 8)
    grows[3] = 1.0
    rewiring = pattern.rewire(where, mask, mask.float(), grows, 0, 2, regrow_dropped=True, generator=generator())
    assert rewiring.apply_(mask.clone()).sum(1).tolist() == [2, 2, 2, 2]
    # Only one output matters: it takes the whole budget, up to all its inputs.
    drops = torch.zeros(4, 8)
    drops[1] = 5.0
    mask = torch.zeros(4, 8, dtype=torch.bool)
    mask[:, :2] = True
    grows = torch.zeros(4, 8)
    grows[1] = torch.arange(8.0)
    rewiring = pattern.rewire(where, mask, drops, grows, 6, 6, regrow_dropped=True, generator=generator())
    assert rewiring.apply_(mask.clone()).sum(1).tolist() == [0, 8, 0, 0]


def test_heads_are_rows_of_inputs_and_columns_of_the_output_projection():
    layers, _ = find_layers(Small())
    free = [x for x in layers if Head(2).unsupported_reason(x) is None]
    assert [x.label for x in free] == [
        "attention.in_proj_weight[q]",
        "attention.in_proj_weight[k]",
        "attention.in_proj_weight[v]",
        "attention.out_proj.weight",
    ]
    out = mask_from(free[-1], Head(2).select(free[-1], torch.rand(8, 8), 32, generator()))
    assert out.any(0).sum() == 4
    assert out.all(0).sum() == 4
    assert Head(3).unsupported_reason(free[0]) == "3 heads do not divide 8"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NM(5, 4), "n must lie in"),
        (lambda: NM(2), "needs m"),
        (lambda: methods.rigl(0.1, pattern=NM(2, 4)), "pass density=0.5"),
        (lambda: methods.rigl(0.123, pattern=NM()), "no N:M sparsity"),
        (lambda: methods.rigl(0.1, pattern=NM(m=4)), "windows of 4"),
        (lambda: methods.rigl(0.1, pattern=TransposableNM()), "pass density=0.5"),
        (lambda: TransposableNM(2, 8), "m must be 2, 3 or 4"),
        (lambda: Block(0, 4), "height=0 must be a positive integer"),
        (lambda: Head(1.5), "heads=1.5"),
        (lambda: FanIn(1.5), "ablate=1.5"),
        (
            lambda: methods.lottery_ticket_rewind(0.1, pattern=Block()),
            "lottery levels prune single weights, which Block",
        ),
        (lambda: methods.cht(0.1, pattern=Block()), "chain_removal drops single connections, which Block"),
        (lambda: methods.rigl(0.1, pattern=Block(), backend="csr"), "Block needs masks to choose groups"),
        (
            lambda: dst.Method(**{**vars(methods.rigl(0.5, pattern=NM())), "redistribute": MeanMomentum()}),
            "NM fixes every layer's density, and redistribute changes it",
        ),
        (
            lambda: dst.Method(**{**vars(methods.rigl(0.5, pattern=NM())), "schedule": Cubic()}),
            "NM has one density, and Cubic runs through others",
        ),
    ],
)
def test_what_cannot_be_is_refused_at_construction(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()


def test_the_smallest_windows_that_have_the_density():
    assert [NM().numbers(d) for d in (0.5, 0.25, 0.1, 0.3, 0.75, 0.05)] == [
        (1, 2), (1, 4), (1, 10), (3, 10), (3, 4), (1, 20)
    ]  # fmt: skip
    assert NM(m=4).numbers(0.5) == (2, 4)


def test_windows_are_resolved_by_the_density():
    where = layer(2, 8)
    assert NM().for_density(0.25) == NM(1, 4).for_density(0.25) == NM(1, 4)
    assert NM(1, 4).fit(where, 16) == NM().for_density(0.25).fit(where, 16) == 4
    with pytest.raises(ValueError, match="call for_density first"):
        NM().fit(where, 16)


def trained(method: dst.Method, steps: int = 6) -> dst.Sparsifier:
    torch.manual_seed(0)
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    sparsifier = dst.Sparsifier(model, optimizer, method, total_steps=20)
    for step in range(steps):
        backward(model, optimizer, step)
        sparsifier.before_step()
        optimizer.step()
        for name, parameter in model.named_parameters():
            if name in sparsifier.masks:
                assert not parameter[~sparsifier.masks[name]].any()
    return sparsifier


def test_a_pattern_that_no_layer_can_have():
    model = nn.Linear(8, 4)
    with pytest.raises(
        ConfigurationError, match=r"no layer can have the pattern Head \(weight: no attention projection\)"
    ):
        dst.Sparsifier(
            model, torch.optim.SGD(model.parameters(), 0.1), methods.rigl(0.5, pattern=Head(2)), total_steps=3
        )


def test_layers_that_cannot_have_the_pattern_stay_dense_and_the_others_have_the_density():
    sparsifier = trained(methods.set_(0.5, update_every=2, pattern=Head(2), allocation=Uniform()))
    for row in sparsifier.layer_table():
        assert row["density"] == (0.5 if "attention" in row["name"] else 1.0)
    table = str(dst.plan(Small(), methods.set_(0.5, pattern=Head(2))))
    assert "stays dense: no attention projection" in table


@pytest.mark.parametrize("pattern", [Block(2, 2), Neuron(), Diagonal(), FanIn()], ids=str)
def test_one_budget_for_the_network(pattern):
    method = methods.static(0.4, init=Magnitude(), sparsify_at=0, allocation=Global(), pattern=pattern)
    sparsifier = trained(method, steps=1)
    densities = {round(row["density"], 2) for row in sparsifier.layer_table()}
    assert len(densities) > 3  # layers differ
    for x in sparsifier.layers:
        assert pattern.holds(x, x.part(sparsifier.masks[x.parameter]))
    assert sparsifier.density == pytest.approx(0.4, abs=0.12)


def test_budget_moves_between_layers_in_whole_groups_and_the_network_stays_at_its_own():
    pattern = Block(2, 2)
    base = methods.rigl(0.4, update_every=2, grow=Momentum(), pattern=pattern, fraction=Constant(0.4), stop=1.0)
    sparsifier = trained(dst.Method(**{**vars(base), "redistribute": MeanMomentum()}), steps=1)
    budget, first = sum(sparsifier._training.state.budgets.values()), sparsifier.layer_table()
    sparsifier = trained(dst.Method(**{**vars(base), "redistribute": MeanMomentum()}), steps=20)
    assert sum(sparsifier._training.state.budgets.values()) == budget
    assert sparsifier.layer_table() != first
    for x in sparsifier.layers:
        assert pattern.holds(x, x.part(sparsifier.masks[x.parameter]))
    counts = {row["name"]: row["nonzero"] for row in sparsifier.layer_table()}
    assert counts == {x.label: pattern.fit(x, sparsifier._training.state.budgets[x.label]) for x in sparsifier.layers}


@pytest.mark.parametrize("pattern", [Block(2, 2), NM(), FanIn(), Diagonal()], ids=str)
def test_density_set_by_hand(pattern):
    sparsifier = trained(methods.rigl(0.5, update_every=2, pattern=pattern, allocation=Uniform()), steps=3)
    for density in (0.25, 0.75):
        sparsifier.set_density(density)
        resolved = pattern.for_density(density)
        for x in sparsifier.layers:
            mask = x.part(sparsifier.masks[x.parameter])
            assert resolved.holds(x, mask) if resolved.unsupported_reason(x) is None else mask.all()


def test_masks_from_a_file_have_the_pattern(tmp_path):
    method = methods.rigl(0.4, update_every=2, pattern=Block(2, 2))
    sparsifier = trained(method, steps=3)
    dst.save_masks(sparsifier.masks, tmp_path / "masks.pt")
    from_file = dst.init.FromFile(str(tmp_path / "masks.pt"))
    again = trained(methods.rigl(0.4, init=from_file, pattern=Block(2, 2), update_every=50, start=10), steps=1)
    assert all(torch.equal(again.masks[name], mask) for name, mask in sparsifier.masks.items())
    with pytest.raises(ConfigurationError, match=r"mask of conv.weight in .* does not have the pattern Diagonal"):
        trained(methods.rigl(0.4, init=from_file, pattern=Diagonal()), steps=1)


def test_choices_depend_on_seed_step_and_layer_alone():
    resolved, where = FanIn(), layer(6, 10)
    scores = torch.randn(6, 10)
    draws = [resolved.select(where, scores, 18, folded_generator(0, "x", 3)) for _ in range(2)]
    assert torch.equal(*draws)
    assert Unstructured().fit(where, 7) == 7


@pytest.mark.parametrize(
    "method",
    [
        methods.set_(0.5, update_every=2, pattern=TransposableNM()),
        methods.set_(0.5, update_every=2, pattern=Head(4), fraction=Constant(0.6)),
        methods.rigl(0.5, update_every=2, pattern=NM(2, 4), regrow_dropped=False),
    ],
    ids=["transposable", "heads", "2:4"],
)
def test_patterns_for_some_layers_train_explore_and_keep_their_density(method):
    sparsifier = trained(method, steps=12)
    check_budget(sparsifier, method)
    partly = [row for row in sparsifier.layer_table() if row["density"] < 1]
    assert sparsifier.exploration_rate > sum(r["nonzero"] for r in partly) / sum(r["weights"] for r in partly)
    assert sparsifier.updates == 6
