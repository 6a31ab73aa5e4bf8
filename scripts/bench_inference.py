"""Evaluation of the shipped models: `dst.nn.optimize_for_inference` against dense PyTorch, torch.compile and ONNX Runtime.

Variants of a model run in one process and take turns in random order. A turn is ten calls and one before them that is not
counted, as it finds another variant's weights in the caches. Figures are wall times. The table has the median time of each
variant, and the ratio of the dense model's median to it: above 1 the variant is faster. ONNX Runtime and torch.compile run
the dense model. ONNX Runtime is left out with a message if it is not installed, and torch.compile if it fails.

    python scripts/bench_inference.py
    python scripts/bench_inference.py --calls 0  # only calls with cold caches
    python scripts/bench_inference.py --models resnet20 --batches 1 --threads 1 --no-compile
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import random
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

import dst
from dst.models import GPT, MLP, WRN22_2, ResNet20, ViTTiny
from dst.tables import aligned_table

IMAGES, TOKENS = (3, 32, 32), (128,)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet20": (lambda: ResNet20(IMAGES, 10), IMAGES),
    "wrn_22_2": (lambda: WRN22_2(IMAGES, 10), IMAGES),
    "vit_tiny": (lambda: ViTTiny(IMAGES, 10), IMAGES),
    "gpt": (lambda: GPT(65, 128), TOKENS),
    "mlp": (lambda: MLP((1, 28, 28), 10, width=1000, depth=3), (1, 28, 28)),
}
Run = Callable[[], object]


def example(name: str, batch: int) -> Tensor:
    """Random inputs of a model."""
    shape = (batch, *MODELS[name][1])
    return torch.randint(0, 65, shape) if name == "gpt" else torch.randn(shape)


def compiled(model: nn.Module, inputs: Tensor) -> Run | None:
    """The compiled model, or None with a message."""
    torch.compiler.reset()
    start = time.perf_counter()
    try:
        fast = torch.compile(model)
        with torch.inference_mode():
            fast(inputs)
    except Exception as error:
        print(f"torch.compile failed: {str(error).splitlines()[0]}")
        return None
    print(f"torch.compile took {time.perf_counter() - start:.0f} s", flush=True)
    return lambda: fast(inputs)


def onnx(model: nn.Module, inputs: Tensor) -> Run | None:
    """The model in ONNX Runtime, or None with a message."""
    missing = [name for name in ("onnxruntime", "onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"ONNX Runtime is left out: {', '.join(missing)} not installed")
        return None
    import onnxruntime

    file = io.BytesIO()
    with torch.no_grad():
        program = torch.onnx.export(model, (inputs,), dynamo=True)
    assert program is not None
    program.save(file)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: inputs.numpy()}
    return lambda: session.run(None, feed)


def variants(name: str, batch: int, densities: list[float], with_compile: bool) -> dict[tuple[str, str], Run]:
    """The runs of one model, by name and density."""
    inputs = example(name, batch)
    build = MODELS[name][0]
    torch.manual_seed(0)
    dense = build().eval()
    runs: dict[tuple[str, str], Run | None] = {("dense eager", "1"): lambda: dense(inputs)}
    if with_compile:
        runs["torch.compile", "1"] = compiled(dense, inputs)
    runs["ONNX Runtime", "1"] = onnx(dense, inputs)
    for density in densities:
        method = dst.methods.rigl(density, backend="csr")
        model = dst.prepare(build(), method, example=inputs).eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            fast = dst.nn.optimize_for_inference(model)
        with torch.inference_mode():
            assert torch.allclose(fast(inputs), model(inputs), rtol=1e-3, atol=1e-3)
        runs["csr modules", f"{density:g}"] = lambda model=model: model(inputs)
        runs["optimize_for_inference", f"{density:g}"] = lambda fast=fast: fast(inputs)
    return {key: run for key, run in runs.items() if run is not None}


def turn(run: Run, calls: int) -> list[float]:
    """Times of ``calls`` calls after a first one, in seconds; of the first one if ``calls`` is 0."""
    times = []
    for _ in range(calls + 1):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times[1:] or times


@torch.inference_mode()
def measured(runs: dict[tuple[str, str], Run], seconds: float, calls: int) -> dict[tuple[str, str], float]:
    """Median times of the runs in seconds."""
    times: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for _ in range(3):
        for run in runs.values():
            run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["dense eager", "1"]) < 5:
        for key, run in random.sample(list(runs.items()), len(runs)):
            times[key] += turn(run, calls)
    return {key: statistics.median(taken) for key, taken in times.items()}


def bench(
    name: str, batch: int, densities: list[float], seconds: float, calls: int, with_compile: bool
) -> list[tuple[str, ...]]:
    """Time one model at one batch size; returns rows of the table."""
    # Weights that are created in inference mode have no version counter, and copies of them cannot be kept.
    medians = measured(variants(name, batch, densities, with_compile), seconds, calls)
    dense = medians["dense eager", "1"]
    return [(name, str(batch), *key, f"{1e3 * t:.2f}", f"{dense / t:.2f}") for key, t in medians.items()]


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 64])
    parser.add_argument("--densities", nargs="+", type=float, default=[0.1])
    parser.add_argument("--seconds", type=float, default=20, help="of measuring for each model and batch size")
    parser.add_argument(
        "--calls", type=int, default=10, help="calls of a turn; 0 counts only the call after another variant"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    rows = [("model", "batch", "variant", "density", "median (ms)", "× dense eager")]
    for name in args.models:
        for batch in args.batches:
            found = bench(name, batch, args.densities, args.seconds, args.calls, not args.no_compile)
            print(*(" ".join(row) for row in found), sep="\n", flush=True)
            rows += found
    print(aligned_table(rows, right={1, 3, 4, 5}))


if __name__ == "__main__":
    main()
