"""The csr backend with Lightning modules that do not know of it."""

from __future__ import annotations

from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dst
from dst import ConfigurationError, methods
from dst.lightning import SparseTraining
from dst.nn import SparseLinear
from tests.sampling import rotated


class Plain(lightning.LightningModule):
    """A module without any sparse code; one layer is built as late as Lightning allows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(12, 24)
        self.second: nn.Module | None = None
        generator = torch.Generator().manual_seed(1)
        self.data = TensorDataset(
            torch.randn(64, 12, generator=generator, dtype=torch.float64), torch.randint(4, (64,), generator=generator)
        )

    def configure_model(self) -> None:
        if self.second is None:
            torch.manual_seed(4)
            self.second = nn.Linear(24, 4)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        assert self.second is not None
        return nn.functional.cross_entropy(self.second(self.first(batch[0].to(self.dtype)).relu()), batch[1])

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.data, 8)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 0.01)


def trainer_of(*callbacks: Any, **options: Any) -> lightning.Trainer:
    settings: dict[str, Any] = {
        "max_epochs": 4,
        "logger": False,
        "precision": "64-true",
        "use_distributed_sampler": False,
    }
    return lightning.Trainer(
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=list(callbacks),
        **settings | options,
    )


def fit(
    method: dst.Method,
    *others: Any,
    seed: int = 0,
    ckpt: str | None = None,
    module: Plain | None = None,
    **options: Any,
) -> Any:
    sparse, module = SparseTraining(method, seed=seed), module or Plain()
    trainer_of(sparse, *others, **options).fit(module)
    return sparse.sparsifier, module


def weights(module: Plain) -> list[torch.Tensor]:
    layers = (module.first, module.second)
    return [m.dense_weight() if isinstance(m, SparseLinear) else m.weight.detach() for m in layers]


def rigl(backend: str = "csr", **options: Any) -> dst.Method:
    return methods.rigl(0.25, backend=backend, **{"update_every": 4, **options})


@pytest.mark.parametrize(
    ("options", "replace_step"),
    rotated([{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.1}], [True, False]),
)
def test_a_fit_is_that_of_the_masked_backend(options, replace_step):
    (a, masked), (b, csr) = (
        fit(rigl(backend, replace_step=replace_step), seed=5, **options) for backend in ("masked", "csr")
    )
    assert isinstance(csr.first, SparseLinear)
    assert isinstance(csr.second, SparseLinear)
    assert a.updates == b.updates > 2
    assert all(torch.equal(mask, b.masks[name]) for name, mask in a.masks.items())
    for dense, sparse in zip(weights(masked), weights(csr), strict=True):
        torch.testing.assert_close(sparse, dense, rtol=0, atol=1e-9)


class Early(Plain):
    """The same with all layers from the start."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(24, 4)

    configure_model = lightning.LightningModule.configure_model


def test_averaged_weights_follow():
    average = EMAWeightAveraging(decay=0.5)
    sparsifier, module = fit(rigl(), average, module=Early())
    assert torch.equal(module.first.mask(), sparsifier.masks["first.weight"])


def test_averages_that_were_copied_too_early_are_refused():
    trainer = trainer_of(EMAWeightAveraging(decay=0.5), SparseTraining(rigl()))
    with pytest.raises(ConfigurationError, match="list SparseTraining before"):
        trainer.fit(Early())


def test_a_trainer_elsewhere_is_refused(monkeypatch):
    sparse = SparseTraining(rigl())
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    monkeypatch.setattr(type(trainer.strategy), "root_device", torch.device("meta"))
    with pytest.raises(ConfigurationError, match='accelerator="cpu"'):
        sparse.setup(trainer, Plain(), "fit")
