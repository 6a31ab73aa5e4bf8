"""A run that is interrupted and resumed is bitwise identical to an uninterrupted one."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, LearningRateMonitor

import dst
from dst.checkpoints import load_checkpoint
from dst.lightning import SparseTraining
from tests.checks import differences
from tests.distributed.processes import exit_code_of
from tests.methods_list import DYNAMIC, METHODS, TOTAL_STEPS
from tests.resume.fits import BATCHES, SELDOM, Fit, Interrupted, Module, SaveAt, StopAt, check_rows, check_same
from tests.sampling import rotated

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),  # savers of other intervals
]


def points(name: str) -> list[int]:
    """Steps to resume from: before an update, just after one, on an epoch's edge and within one; at a first mask."""
    method = METHODS[name]()
    chosen = {6, 13}
    first = next((s for s in range(1, TOTAL_STEPS) if method.clock.fires(s, TOTAL_STEPS)), None)
    if first is not None:
        chosen |= {first, first + 1}
    elif method.density < 1:
        made = dst.types.resolve_steps(method.sparsify_at, TOTAL_STEPS)
        chosen |= {max(1, made), made + 1}
    return sorted(chosen)


# That each method resumes in a plain loop is tested for all of them.
@pytest.mark.parametrize(("name", "point"), rotated(METHODS, range(4), share=(2, 5)))
def test_every_method_resumes_from_any_step(name: str, point: int, tmp_path: Path) -> None:
    step = points(name)[point % len(points(name))]
    whole = Fit(SparseTraining(METHODS[name]()), tmp_path, saver={"every_n_train_steps": step})
    assert whole.sparse.sparsifier is not None
    assert whole.sparse.sparsifier.step == TOTAL_STEPS
    if name in DYNAMIC:
        assert whole.sparse.sparsifier.updates > 3
    resume = tmp_path / f"step={step}.ckpt"
    resumed = Fit(SparseTraining(METHODS[name]()), tmp_path / "again", resume=resume, saver=SELDOM)
    check_same(whole, resumed)
    assert sum("loss" in row for _, row in resumed.rows.rows) >= TOTAL_STEPS - step


@pytest.mark.parametrize(
    ("name", "optimizer", "step"),
    rotated(["rigl", "set", "momentum_growth", "static_at_step"], ["adamw", "odd", "rmsprop"], [5, 10]),
)
def test_every_optimizer_resumes(name: str, optimizer: str, step: int, tmp_path: Path) -> None:
    def fit(folder: Path, resume: Path | None = None) -> Fit:
        saver = {"every_n_train_steps": step}
        return Fit(SparseTraining(METHODS[name]()), folder, optimizer=optimizer, resume=resume, saver=saver)

    check_same(fit(tmp_path), fit(tmp_path / "b", tmp_path / f"step={step}.ckpt"))


@pytest.mark.parametrize(
    ("where", "name"),
    rotated([(1, 4), (1, 5), (3, 13), (3, 14), (3, 15)], ["rigl", "set", "snip", "momentum_growth"]),
)
def test_an_interrupted_run_resumes_from_its_last_checkpoint(where: tuple[int, int], name: str, tmp_path: Path) -> None:
    accumulate, stop = where

    def sparse() -> SparseTraining:
        return SparseTraining(METHODS[name]())

    whole = Fit(sparse(), tmp_path / "whole", accumulate=accumulate, saver=SELDOM)
    halted = sparse()
    interrupted = Fit(halted, tmp_path, callbacks=[halted, StopAt(stop)], accumulate=accumulate)
    assert not interrupted.finished
    last = tmp_path / "last.ckpt"
    assert load_checkpoint(last)["global_step"] == stop // accumulate
    resumed = Fit(sparse(), tmp_path, accumulate=accumulate, resume=last, saver=SELDOM)
    check_same(whole, resumed)
    check_rows(whole, interrupted, resumed)


@pytest.mark.parametrize(("micro", "order"), rotated([13, 14, 15], [0, 1]))
def test_a_checkpoint_within_gradient_accumulation_keeps_the_gradients(micro: int, order: int, tmp_path: Path) -> None:
    method = METHODS["rigl"]()  # updates at step 4, which micro-batches 12, 13 and 14 make
    options: dict[str, Any] = {"accumulate": 3, "saver": SELDOM}
    whole = Fit(SparseTraining(method), tmp_path / "whole", **options)
    sparse, saver = SparseTraining(method), SaveAt(micro, tmp_path / "middle.ckpt")
    interrupted = Fit(sparse, tmp_path, callbacks=[sparse, saver] if order else [saver, sparse], **options)
    assert not interrupted.finished
    resumed = Fit(SparseTraining(method), tmp_path, resume=tmp_path / "middle.ckpt", **options)
    found = list(differences(whole.outcome(), resumed.outcome()))
    assert not found, found
    check_rows(whole, interrupted, resumed)


def test_gradients_are_saved_where_they_accumulate_and_nowhere_else(tmp_path: Path) -> None:
    """Interrupted again before the first micro-batch, they are still there; between steps they would be ballast."""

    class SaveFirst(Callback):
        def on_train_batch_start(self, trainer: lightning.Trainer, *args: Any) -> None:
            trainer.save_checkpoint(tmp_path / "again.ckpt")
            raise Interrupted

    sparse, saver = SparseTraining(METHODS["set"]()), SaveAt(14, tmp_path / "middle.ckpt")
    Fit(sparse, tmp_path, callbacks=[sparse, saver], accumulate=3)
    second = SparseTraining(METHODS["set"]())
    resume = tmp_path / "middle.ckpt"
    Fit(second, tmp_path, callbacks=[SaveFirst(), second], accumulate=3, resume=resume)
    key = "dst_accumulated_gradients"
    first, again = (load_checkpoint(tmp_path / f"{name}.ckpt")[key] for name in ("middle", "again"))
    assert set(first) == {n for n, _ in Module().named_parameters()}
    assert not list(differences(first, again))
    assert key not in load_checkpoint(tmp_path / "step=4.ckpt")


def fit_until_killed(name: str, accumulate: int, stop: int, folder: Path) -> None:
    torch.set_num_threads(1)
    sparse = SparseTraining(METHODS[name]())
    kill = StopAt(stop, lambda: os.kill(os.getpid(), signal.SIGKILL))
    Fit(sparse, folder, callbacks=[sparse, kill], accumulate=accumulate, optimizer="adamw")


@pytest.mark.parametrize(
    ("name", "accumulate", "stop"), [("rigl", 1, 9), pytest.param("set", 3, 37, marks=pytest.mark.exhaustive)]
)
def test_a_killed_process_resumes_from_its_last_checkpoint(
    name: str, accumulate: int, stop: int, tmp_path: Path
) -> None:
    assert exit_code_of(fit_until_killed, name, accumulate, stop, tmp_path) == -signal.SIGKILL
    whole = Fit(SparseTraining(METHODS[name]()), tmp_path / "whole", accumulate=accumulate, optimizer="adamw")
    resume = tmp_path / "last.ckpt"
    check_same(
        whole,
        Fit(SparseTraining(METHODS[name]()), tmp_path, accumulate=accumulate, optimizer="adamw", resume=resume),
    )


ORDERS: dict[str, Callable[[SparseTraining, Callback, Callback], Sequence[Callback]]] = {
    "sparse, average, monitor": lambda s, a, m: [s, a, m],
    "average, sparse, monitor": lambda s, a, m: [a, s, m],
    "monitor, average, sparse": lambda s, a, m: [m, a, s],
}


@pytest.mark.parametrize("name", ["rigl", "static_at_step"])
def test_callbacks_in_any_order(name: str, tmp_path: Path) -> None:
    """Weights, averaged weights and metrics are the same in every order, and survive a resume in every other."""

    def fit(order: str, folder: Path, resume: Path | None = None) -> tuple[Fit, EMAWeightAveraging]:
        sparse, average = SparseTraining(METHODS[name]()), EMAWeightAveraging(decay=0.7)
        callbacks = list(ORDERS[order](sparse, average, LearningRateMonitor()))
        return Fit(sparse, folder, callbacks=callbacks, resume=resume, saver=SELDOM), average

    def check(one: tuple[Fit, EMAWeightAveraging], other: tuple[Fit, EMAWeightAveraging]) -> None:
        assert not list(differences(one[0].outcome(), other[0].outcome()))
        averages = [average._average_model for _, average in (one, other)]
        assert None not in averages
        assert not list(differences(*(average.state_dict() for average in averages)))

    first, *others = ORDERS
    whole = {order: fit(order, tmp_path / order) for order in ORDERS}
    for order in others:
        check(whole[first], whole[order])
    for saved, order in zip(ORDERS, [*others, first], strict=True):
        check(whole[first], fit(order, tmp_path / "again", tmp_path / saved / "step=9.ckpt"))


def test_a_finished_run_that_is_resumed_keeps_everything(tmp_path: Path) -> None:
    whole = Fit(SparseTraining(METHODS["rigl"]()), tmp_path)
    again = Fit(SparseTraining(METHODS["rigl"]()), tmp_path / "again", resume=tmp_path / "last.ckpt")
    left, right = whole.outcome(), again.outcome()
    assert not list(differences(left["topology"], right["topology"]))
    assert not list(differences(left["model"], right["model"]))
    assert again.sparse.state_dict() != {}


REFUSALS: dict[str, tuple[Callable[[], SparseTraining], Callable[[], Module], str]] = {
    "density": (
        lambda: SparseTraining(dst.methods.rigl(0.2, update_every=4)),
        Module,
        r"another method \(density: 0\.3 in the checkpoint, 0\.2 here\)",
    ),
    "method": (lambda: SparseTraining(METHODS["set"]()), Module, "name: rigl in the checkpoint, set here"),
    "knob": (
        lambda: SparseTraining(dst.methods.rigl(0.3, update_every=5)),
        Module,
        r"clock\.every: 4 in the checkpoint, 5 here",
    ),
    "seed": (lambda: SparseTraining(METHODS["rigl"](), seed=1), Module, "seed 0, this run 1"),
    "layers": (
        lambda: SparseTraining(METHODS["rigl"](), exclude=["head.weight"]),
        Module,
        r"does not fit the model: has unknown \['head\.weight'\]",
    ),
    "model": (lambda: SparseTraining(METHODS["rigl"]()), lambda: Module(width=17), "size mismatch for hidden.weight"),
}


@pytest.fixture(scope="module")
def an_epoch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of an epoch of rigl."""
    folder = tmp_path_factory.mktemp("epoch")
    Fit(SparseTraining(METHODS["rigl"]()), folder, steps=BATCHES)
    return folder / "last.ckpt"


@pytest.mark.parametrize("what", REFUSALS)
def test_a_checkpoint_of_something_else_is_refused(what: str, an_epoch: Path, tmp_path: Path) -> None:
    sparse, module, message = REFUSALS[what]
    with pytest.raises((dst.StateError, RuntimeError), match=message):
        Fit(sparse(), tmp_path, module=module(), resume=an_epoch)


def test_a_checkpoint_cut_off_is_refused_by_name(an_epoch: Path, tmp_path: Path) -> None:
    last, whole = tmp_path / "last.ckpt", an_epoch.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        last.write_bytes(whole[:length])
        with pytest.raises(dst.StateError, match=r"last\.ckpt cannot be read.*latest_readable"):
            Fit(SparseTraining(METHODS["rigl"]()), tmp_path / "again", resume=last)


def test_a_dense_checkpoint_on_the_connections_of_a_fit_before(tmp_path: Path) -> None:
    """Momentum of connections that are inactive in the callback's masks becomes zero, as the weights do."""
    Fit(SparseTraining(METHODS["dense"]()), tmp_path, callbacks=[], steps=BATCHES, optimizer="adamw")
    module, sparse = Module("adamw"), SparseTraining(METHODS["sparse_from_scratch"]())
    Fit(sparse, tmp_path / "b", module=module, steps=BATCHES)
    seen = []

    class First(Callback):
        def on_train_batch_start(self, trainer: lightning.Trainer, *args: Any) -> None:
            assert sparse.sparsifier is not None
            for name, mask in sparse.sparsifier.masks.items():
                state = trainer.optimizers[0].state[module.get_parameter(name)]
                assert state["exp_avg"][mask].ne(0).any()
                seen.append(state["exp_avg"][~mask].eq(0).all() and module.get_parameter(name)[~mask].eq(0).all())

    resume = tmp_path / "step=6.ckpt"
    again = Fit(sparse, tmp_path / "c", module=module, callbacks=[sparse, First()], resume=resume, steps=2 * BATCHES)
    assert again.finished
    assert len(seen) == 3 * BATCHES
    assert all(seen)


def test_a_checkpoint_without_sparse_training_starts_from_its_weights(tmp_path: Path) -> None:
    """A dense run's checkpoint without masks is a starting point: momentum is masked by the new mask."""
    dense = Fit(SparseTraining(METHODS["dense"]()), tmp_path, callbacks=[], steps=BATCHES, optimizer="adamw")
    assert dense.finished
    sparse = SparseTraining(METHODS["static_from_start"]())
    resumed = Fit(sparse, tmp_path / "b", optimizer="adamw", resume=tmp_path / "step=6.ckpt", steps=2 * BATCHES)
    assert sparse.sparsifier is not None
    weights = load_checkpoint(tmp_path / "step=6.ckpt")["state_dict"]
    for name, mask in sparse.sparsifier.masks.items():
        assert resumed.module.get_parameter(name)[~mask].eq(0).all()
        state = resumed.trainer.optimizers[0].state[resumed.module.get_parameter(name)]
        assert state["exp_avg"][~mask].eq(0).all()
    everything = torch.cat([weights[n].abs().flatten() for n in sparse.sparsifier.masks])
    kept = torch.cat([m.flatten() for m in sparse.sparsifier.masks.values()])
    assert everything[kept].min() >= everything[~kept].max()
