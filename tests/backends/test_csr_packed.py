"""torch's own attention and encoders, storing only their non-zeros, against the masked backend."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import dst
from dst import methods
from dst.allocation import PerLayer, Uniform
from dst.backends import timing
from dst.errors import ConfigurationError
from dst.init import FromFile
from dst.nn import SparseLinear, SparseMultiheadAttention
from tests.backends.runs import (
    CLAIMED,
    DENSITY,
    EVERY,
    OPTIMIZERS,
    STEPS,
    Run,
    assert_same,
    check_accumulates_as_masked,
    check_continues_with,
    check_copy_becomes_dense,
    check_resumes,
    check_trains_as_masked,
    measured_cases,
    restored,
    sparse_layers,
)
from tests.sampling import rotated

WIDTH = 32


class Sequence(nn.Module):
    """Inputs as five vectors, wide enough that every output of a sparse projection has inputs.

    A key that is the same at all positions has gradients that are zero but for rounding: their order would be arbitrary.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("stem", torch.randn(6, WIDTH))

    def sequence(self, x: Tensor) -> Tensor:
        return x.view(-1, 5, 6) @ self.stem


class Packed(Sequence):
    """Self-attention, then attention over a memory."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.cross = nn.MultiheadAttention(WIDTH, 4, bias=False)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.sequence(x)
        y = x + self.attention(x, x, x, need_weights=False)[0]
        mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
        memory = x.transpose(0, 1)
        y = y.transpose(0, 1) + self.cross(y.transpose(0, 1), memory, memory, attn_mask=mask)[0]
        return self.head(y.mean(0))


class Encoder(Sequence):
    """Two of torch's encoder layers."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 48, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.sequence(x)).mean(1))


@pytest.mark.parametrize(
    ("name", "optimizer", "net"),
    rotated(
        ["rigl", "rigl_with_step", "rigl_no_regrowth", "rigl_rescaled", "rigl_by_magnitude", "set", "gradient_drop"],
        OPTIMIZERS,
        [Packed, Encoder],
    ),
)
def test_trains_as_a_masked_one(name, optimizer, net):
    csr = check_trains_as_masked(name, optimizer, net)
    assert any(isinstance(m, SparseMultiheadAttention) for m in csr.model.modules())


def test_all_layers_of_an_encoder_are_sparse():
    csr = Run(methods.rigl(DENSITY, allocation=Uniform(), backend="csr"), net=Encoder)
    names = [f"encoder.layers.{i}.{n}" for i in (0, 1) for n in ("self_attn.in_proj", "self_attn.out_proj", "linear1")]
    assert set(names) <= set(sparse_layers(csr.model))
    assert csr.sparsifier.masks["encoder.layers.0.self_attn.in_proj_weight"].shape == (3 * WIDTH, WIDTH)


def test_accumulated_gradients():
    check_accumulates_as_masked(Packed)


@pytest.mark.parametrize(("optimizer", "net"), [("sgd", Packed), ("adamw", Encoder)])
def test_a_resumed_run_is_identical(optimizer, net):
    check_resumes(optimizer, net)


@pytest.mark.parametrize(("before", "after"), [("masked", "csr"), ("csr", "masked")])
@pytest.mark.parametrize(("optimizer", "net"), [("sgd", Encoder), ("adamw", Packed)])
def test_a_run_continues_with_the_other_backend(before, after, optimizer, net):
    check_continues_with(before, after, optimizer, net)


@pytest.mark.parametrize("net", [Packed, Encoder])
@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_become_dense_again(net, again):
    model = check_copy_becomes_dense(net, again)
    assert not any(isinstance(m, (SparseLinear, SparseMultiheadAttention)) for m in model.modules())


# -- the module -----------------------------------------------------------------------------------------------------


def pair(**options) -> tuple[nn.MultiheadAttention, SparseMultiheadAttention]:
    """Sparse attention, and dense attention with the same weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.MultiheadAttention(12, 3, dtype=torch.float64, **options))
    sparse = dst.prepare(model, methods.rigl(0.3, backend="csr", allocation=Uniform()))[0]
    assert isinstance(sparse, SparseMultiheadAttention)
    if sparse.in_proj.bias is not None:
        nn.init.normal_(sparse.in_proj.bias)
    return dst.to_dense(nn.Sequential(copy.deepcopy(sparse)))[0], sparse


PADDING = torch.tensor([[False, False, False, True], [False, True, False, True]])
CAUSAL = torch.ones(5, 4, dtype=torch.bool).triu(1)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"average_attn_weights": False},
        {"attn_mask": CAUSAL},
        {"attn_mask": CAUSAL, "is_causal": True},
        {"attn_mask": torch.arange(20.0).view(5, 4).double(), "key_padding_mask": PADDING.double()},
        {"key_padding_mask": PADDING},
        {"attn_mask": CAUSAL, "key_padding_mask": PADDING},
        {"attn_mask": (torch.arange(120).view(6, 5, 4) % 3 == 1)},
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_same_results_as_the_dense_module(arguments, batch_first, need_weights, training):
    dense, sparse = (m.train(training) for m in pair(batch_first=batch_first))
    query, key, value = (torch.randn(2, n, 12, dtype=torch.float64, requires_grad=True) for n in (5, 4, 4))
    inputs = [x if batch_first else x.transpose(0, 1) for x in (query, key, value)]
    expected, found = (m(*inputs, need_weights=need_weights, **arguments) for m in (dense, sparse))
    torch.testing.assert_close(found, expected)
    assert found[0].shape == expected[0].shape
    of_dense, of_sparse = (torch.autograd.grad(y[0].square().sum(), (query, key, value)) for y in (expected, found))
    torch.testing.assert_close(of_sparse, of_dense)
    with torch.no_grad():
        torch.testing.assert_close(sparse(*inputs, need_weights=need_weights, **arguments), expected)


@pytest.mark.parametrize("options", [{"bias": False}, {"batch_first": True}, {}])
@pytest.mark.parametrize("same", ["all", "key and value", "query and value", "none"])
def test_inputs_without_a_batch_and_shared_inputs(options, same):
    dense, sparse = pair(**options)
    a, b, c = (torch.randn(4, 12, dtype=torch.float64) for _ in range(3))
    inputs = {"all": (a, a, a), "key and value": (a, b, b), "query and value": (a, b, a), "none": (a, b, c)}[same]
    mask = torch.ones(4, 4, dtype=torch.bool).triu(1)
    for arguments in ({}, {"attn_mask": mask, "key_padding_mask": PADDING[0]}, {"need_weights": False}):
        torch.testing.assert_close(sparse(*inputs, **arguments), dense(*inputs, **arguments))


def test_dropout_acts_on_the_attention_weights_in_training():
    dense, sparse = pair(dropout=0.5)
    x = torch.randn(4, 2, 12, dtype=torch.float64)
    results = []
    for module in (dense, sparse):
        torch.manual_seed(3)
        results.append(module(x, x, x))
    torch.testing.assert_close(results[0], results[1])
    assert not torch.equal(sparse(x, x, x, need_weights=False)[0], sparse(x, x, x, need_weights=False)[0])
    sparse.eval()
    assert torch.equal(sparse(x, x, x)[0], sparse(x, x, x)[0])


def test_a_causal_hint_needs_a_mask():
    _, sparse = pair()
    x = torch.randn(4, 2, 12, dtype=torch.float64)
    with pytest.raises(ValueError, match="is_causal is a hint about attn_mask"):
        sparse(x, x, x, is_causal=True)
    with pytest.raises(ConfigurationError, match="do not fit attention with 5 heads"):
        SparseMultiheadAttention(sparse.in_proj, sparse.out_proj, 5)


# -- encoders -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    "exclude", [[], ["*linear*"], ["*self_attn*"], ["encoder.layers.0.*"], ["encoder.layers.1.*"], ["*in_proj_weight*"]]
)
def test_encoders_in_evaluation_do_not_take_the_fused_path(exclude):
    method = methods.rigl(DENSITY, allocation=Uniform(), backend="csr")
    model = dst.prepare(Encoder().double(), method, exclude=exclude).eval()
    settings = [(m.use_nested_tensor, m.layers[0].activation_relu_or_gelu) for m in (Encoder().encoder,)]
    dense = dst.to_dense(copy.deepcopy(model)).eval()
    assert [(m.use_nested_tensor, m.layers[0].activation_relu_or_gelu) for m in (dense.encoder,)] == settings
    x = torch.randn(3, 5, WIDTH, dtype=torch.float64)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = True
    for arguments in ({}, {"src_key_padding_mask": padding}, {"mask": torch.ones(5, 5, dtype=torch.bool).triu(1)}):
        with torch.no_grad():
            found, expected = model.encoder(x, **arguments), dense.encoder(x, **arguments)
        rows = ~padding if "src_key_padding_mask" in arguments else torch.ones_like(padding)
        torch.testing.assert_close(found[rows], expected[rows])


# -- which modules --------------------------------------------------------------------------------------------------


def test_a_part_that_keeps_all_its_weights_is_stored_with_the_others():
    densities = {"*[[]q]": 1.0, "*[[]k]": 0.2, "*[[]v]": 0.3, "*": 0.5}
    count = sum(WIDTH * WIDTH * d for d in (1.0, 0.2, 0.3, 0.5)) * 2 + WIDTH * 4 * 0.5

    def run(backend):
        density = count / (8 * WIDTH * WIDTH + WIDTH * 4)
        return methods.rigl(density, update_every=EVERY, stop=1.0, allocation=PerLayer(densities), backend=backend)

    masked, csr = (Run(run(backend), net=Packed) for backend in ("masked", "csr"))
    assert csr.model.attention.in_proj.nnz == int(masked.sparsifier.masks["attention.in_proj_weight"].sum())
    assert_same(masked.train(STEPS), csr.train(STEPS))
    assert csr.sparsifier.masks["attention.in_proj_weight"][:WIDTH].all()
    storage = {row.name: row.storage for row in dst.plan(Packed(), run("csr")).rows}
    assert [storage[f"attention.in_proj_weight[{part}]"] for part in "qkv"] == ["dense", "csr", "csr"]


@pytest.mark.parametrize("backend", ["masked", "csr"])
def test_a_mask_file_of_either_backend_starts_the_other(backend, tmp_path):
    first = Run(CLAIMED["rigl"](backend), net=Packed).train(9)
    path = tmp_path / "masks.pt"
    dst.save_masks(first.sparsifier.masks, path)
    for other in ("masked", "csr"):
        second = Run(methods.static(DENSITY, sparsify_at=0, init=FromFile(str(path)), backend=other), net=Packed)
        assert all(torch.equal(m, first.sparsifier.masks[n]) for n, m in second.sparsifier.masks.items())


class Derived(nn.MultiheadAttention):
    pass


def test_the_dry_run_tells_what_stays_masked():
    tied = nn.MultiheadAttention(6, 2)
    tied.in_proj_weight = (shared := nn.MultiheadAttention(6, 2)).in_proj_weight
    model = nn.ModuleDict(
        {
            "plain": nn.MultiheadAttention(6, 2),
            "kdim": nn.MultiheadAttention(6, 2, kdim=4),
            "zero": nn.MultiheadAttention(6, 2, add_zero_attn=True),
            "bias": nn.MultiheadAttention(6, 2, add_bias_kv=True),
            "derived": Derived(6, 2),
            "partial": nn.MultiheadAttention(6, 2),
            "tied": tied,
            "shared": shared,
        }
    )
    method, exclude = methods.rigl(0.2, allocation=Uniform(), backend="csr"), ["partial.in_proj_weight[[]v]"]
    rows = [row for row in dst.plan(model, method, exclude=exclude).rows if not row.note.startswith("dense")]
    reasons = {row.name.partition(".")[0]: {r.note for r in rows if r.name.startswith(row.name[:4])} for row in rows}
    bias = "attention with add_bias_kv or add_zero_attn is not supported by csr"
    assert reasons == {
        "plain": {""},
        "kdim": {"attention with kdim or vdim is not supported by csr; use nn.Linear projections"},
        "zero": {bias},
        "bias": {bias},
        "derived": {"Derived has no csr kernel"},
        "partial": {"q, k and v are stored together, and not all of them are sparse"},
        "tied": {"tied weights"},
        "shared": {"tied weights"},
    }
    assert {row.name: row.storage for row in rows if not row.note} == {
        **{f"plain.in_proj_weight[{part}]": "csr" for part in "qkv"},
        "plain.out_proj.weight": "csr",
    }
    prepared = dst.prepare(model, method, exclude=exclude)
    assert [n for n, m in prepared.items() if isinstance(m, SparseMultiheadAttention)] == ["plain"]
    again = [row for row in dst.plan(prepared, method, exclude=exclude).rows if row.storage == "csr"]
    assert [row.name for row in again] == [
        *(f"plain.in_proj_weight[{part}]" for part in "qkv"),
        "plain.out_proj.weight",
    ]


def test_selectors_choose_the_same_layers_before_and_after():
    method = methods.rigl(0.2, backend="csr")
    for include in (["attention"], [nn.MultiheadAttention], ["attention.in_proj_weight*"]):
        model = dst.prepare(Packed(), method, include=include)
        assert isinstance(model.attention, SparseMultiheadAttention)
        assert isinstance(model.attention.out_proj, nn.Linear)
        sgd = torch.optim.SGD(model.parameters(), 0.1)
        sparsifier = dst.Sparsifier(model, sgd, method, total_steps=4, include=include)
        assert "attention.in_proj_weight" in sparsifier.masks


def test_auto_measures_q_k_and_v_together(monkeypatch):
    cases = measured_cases(monkeypatch)
    method = methods.rigl(DENSITY, allocation=Uniform(), backend="auto")
    model = dst.prepare(Packed(), method, example=torch.randn(8, 30))
    assert [(c.kind, c.inputs, c.outputs, c.active, c.batch_size) for c in cases] == [
        (nn.Linear, WIDTH, 3 * WIDTH, 3 * round(DENSITY * WIDTH * WIDTH), 40),
        (nn.Linear, WIDTH, WIDTH, round(DENSITY * WIDTH * WIDTH), 40),
        (nn.Linear, WIDTH, 4, round(DENSITY * 4 * WIDTH), 8),
    ]
    fresh = restored(Packed(), model.state_dict())
    x = torch.randn(4, 30)
    torch.testing.assert_close(fresh(x), model(x))
    fresh = restored(fresh, dst.to_dense(copy.deepcopy(model)).state_dict())
    assert type(fresh.attention) is nn.MultiheadAttention
    torch.testing.assert_close(fresh(x), model(x))


def test_auto_keeps_attention_masked_where_its_projection_is_not_faster(monkeypatch):
    monkeypatch.setattr(timing, "measure", lambda case: timing.Timing(1, 1))
    model = dst.prepare(Packed(), methods.rigl(DENSITY, allocation=Uniform(), backend="auto"))
    assert sparse_layers(model) == []


@pytest.mark.parametrize("fast", [(), (3 * WIDTH,), (WIDTH,), (4, WIDTH), (3 * WIDTH, WIDTH, 4)])
def test_the_dry_run_prints_what_prepare_does(monkeypatch, fast, capsys):
    monkeypatch.setattr(timing, "measure", lambda case: timing.Timing(2.0 if case.outputs in fast else 1.0, 1))
    method, example = methods.rigl(DENSITY, allocation=Uniform(), backend="auto"), torch.randn(8, 30)
    planned = dst.plan(Packed(), method, example=example)
    model = dst.prepare(Packed(), method, example=example)
    assert [f"backend=auto: {row.name} {row.storage} ({row.note})" for row in planned.rows] == (
        capsys.readouterr().err.splitlines()
    )
    stored = {name for name, storage in _sparsifier(model, method).backends.items() if storage == "csr"}
    assert stored == {row.name for row in planned.rows if row.storage == "csr"}
    assert len(stored) == {(): 0, (3 * WIDTH,): 6, (WIDTH,): 0, (4, WIDTH): 1}.get(fast, 9)


def _sparsifier(model: nn.Module, method: dst.Method) -> dst.Sparsifier:
    return dst.Sparsifier(model, torch.optim.SGD(model.parameters(), 0.1), method, total_steps=9)
