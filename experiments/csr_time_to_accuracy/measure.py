"""Time to accuracy: dense, masked and csr training of the same network, by wall clock.

Images are Fashion-MNIST, padded to 32×32. All variants see the same batches in the same order and take the same number of
steps, in turns of one epoch each, so that other work on the machine disturbs all of them alike.

    python experiments/csr_time_to_accuracy/measure.py --model resnet20 --images 12800 --epochs 4
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

import dst
from dst.data import FashionMNIST
from dst.models import ResNet20, ViTTiny
from dst.tables import csv_table

MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet20": lambda: ResNet20((1, 32, 32), 10),
    "vit_tiny": lambda: ViTTiny((1, 32, 32), 10, depth=4),
}
RESULTS = Path(__file__).parent / "results" / "runs.csv"


@dataclass(frozen=True)
class Row:
    """One variant after one epoch.

    Attributes:
        model: Name of the model.
        variant: ``dense``, ``masked`` or ``csr``.
        density: Density of the sparse layers.
        seed: Seed of weights, masks and data order.
        epoch: Epochs so far.
        steps: Optimizer steps so far.
        seconds: Wall time of training so far, without evaluation.
        accuracy: Share of the test images that are classified correctly.
        threads: Threads of torch.
    """

    model: str
    variant: str
    density: float
    seed: int
    epoch: int
    steps: int
    seconds: float
    accuracy: float
    threads: int


class Run:
    """One training.

    Args:
        model: Name of the model.
        variant: ``dense``, ``masked`` or ``csr``.
        density: Density of the sparse layers.
        steps: Optimizer steps of the whole training.
        seed: Seed of weights and masks.
        example: A batch of images.
    """

    def __init__(self, model: str, variant: str, density: float, steps: int, seed: int, example: Tensor) -> None:
        torch.manual_seed(seed)
        self.model = MODELS[model]()
        self.sparsifier: dst.Sparsifier | None = None
        method = None
        if variant != "dense":
            method = dst.methods.rigl(density, update_every=50, backend=variant)
            self.model = dst.prepare(self.model, method, seed=seed, example=example)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1 if model == "resnet20" else 0.03, momentum=0.9)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)
        if method is not None:
            self.sparsifier = dst.Sparsifier(self.model, self.optimizer, method, total_steps=steps, seed=seed)
        self.seconds = 0.0

    def train(self, images: Tensor, labels: Tensor, batches: Tensor) -> None:
        """Take one step for every row of ``batches``, which has indices of images."""
        self.model.train()
        start = time.perf_counter()
        for batch in batches:
            self.optimizer.zero_grad()
            functional.cross_entropy(self.model(images[batch]), labels[batch]).backward()
            if self.sparsifier is not None:
                self.sparsifier.before_step()
            self.optimizer.step()
            self.schedule.step()
        self.seconds += time.perf_counter() - start

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Share of the images that are classified correctly."""
        self.model.eval()
        found = torch.cat([self.model(part).argmax(1) for part in images.split(500)])
        return float((found == labels).float().mean())


def load(root: str, train: bool, images: int) -> tuple[Tensor, Tensor]:
    """The first images of a split, normalised and padded to 32×32, and their labels."""
    data = FashionMNIST(root=root, download=False)
    pixels, labels = data.read("train" if train else "test")
    normalised = (pixels[:images].float() / data.white - data.mean[0]) / data.std[0]
    return functional.pad(normalised, [2] * 4, value=-data.mean[0] / data.std[0]), labels[:images]


def measure(args: argparse.Namespace) -> list[Row]:
    """Train all variants; returns a row for each after every epoch."""
    images, labels = load(args.root, True, args.images)
    test_images, test_labels = load(args.root, False, args.test_images)
    per_epoch = args.images // args.batch
    rows = []
    for seed in args.seeds:
        runs = {
            name: Run(args.model, name, args.density, per_epoch * args.epochs, seed, images[: args.batch])
            for name in args.variants
        }
        generator = torch.Generator().manual_seed(seed)
        for epoch in range(args.epochs):
            order = torch.randperm(args.images, generator=generator)[: per_epoch * args.batch].view(-1, args.batch)
            for name, run in runs.items():
                run.train(images, labels, order)
                accuracy = run.accuracy(test_images, test_labels)
                density = 1.0 if name == "dense" else args.density
                steps = per_epoch * (epoch + 1)
                row = Row(
                    args.model, name, density, seed, epoch + 1, steps, run.seconds, accuracy, torch.get_num_threads()
                )
                rows.append(row)
                print(f"seed {seed} epoch {epoch + 1} {name}: {run.seconds:.1f} s, {accuracy:.4f}", flush=True)
    return rows


def main() -> None:
    """Run the experiment and write its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="resnet20")
    parser.add_argument("--variants", nargs="+", default=["dense", "masked", "csr"])
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--images", type=int, default=12_800, help="training images")
    parser.add_argument("--test-images", type=int, default=2_000)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--root", default="data", help="folder that holds fashion-mnist")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    rows = measure(args)
    header = [field.name for field in fields(Row)]
    new = not args.output.exists()
    with args.output.open("a") as file:
        file.write(csv_table(([header] if new else []) + [list(asdict(row).values()) for row in rows]))


if __name__ == "__main__":
    main()
