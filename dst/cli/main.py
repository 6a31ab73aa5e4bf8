"""The ``dst`` command: ``dst train``, which is the same as ``train.py``, and commands that show finished runs."""

from __future__ import annotations

import difflib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from dst.errors import ConfigurationError, StateError

if TYPE_CHECKING:
    from omegaconf import DictConfig

# Hydra, Lightning and rich are imported in functions, so that `dst --help` and a mistyped setting respond at once.


@dataclass
class TrainConfig:
    """Types of the settings in ``conf/train.yaml``. Hydra rejects a value of another type when it reads it."""

    density: float = 0.1
    seed: int = 0
    backend: str = "masked"
    include: Optional[list[str]] = None  # noqa: UP045 (OmegaConf reads these annotations)
    exclude: Optional[list[str]] = None  # noqa: UP045
    threads: Optional[int] = None  # noqa: UP045
    resume: Optional[str] = None  # noqa: UP045
    compress_gradients: bool = False
    report: bool = True
    select: str = "last"
    convention: str = "flops"
    effective_density: bool = False
    sparsity: Any = "???"  # OmegaConf's mark of a required value
    model: Any = "???"
    data: Any = "???"
    optimizer: Any = "???"
    scheduler: Any = "???"
    trainer: Any = "???"
    logger: Any = "???"


def config_dir() -> Path:
    """Return the folder of the configuration files, of the installed package or of the checkout.

    Raises:
        ConfigurationError: Neither exists.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "train.yaml").is_file():
            return folder
    raise ConfigurationError(f"no configuration in {package / 'conf'} or {package.parent / 'conf'}: install dst again")


def register_schema() -> None:
    """Register `TrainConfig` with Hydra as ``schema``, which composing ``train.yaml`` needs."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="schema", node=TrainConfig)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the ``dst`` command and return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if arguments[0] == "--version":
        import dst

        print(f"dst {dst.__version__}")
        return 0
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS and "LOCAL_RANK" in os.environ:
        # Lightning starts the other processes of a distributed run with the overrides only.
        command, rest = "train", arguments
    if command not in COMMANDS:
        guess = difflib.get_close_matches(command, COMMANDS, 1)
        hint = f"did you mean {guess[0]}?" if guess else "dst --help lists the commands"
        print(f"error: dst has no command {command!r}; {hint}", file=sys.stderr)
        return 2
    if command == "train":
        return train(rest)
    try:
        return COMMANDS[command][0](rest)
    except SystemExit as done:  # argparse has printed help or an error
        return int(done.code or 0)


def train(argv: Sequence[str]) -> int:
    """Train with ``conf/train.yaml`` and the overrides, and return the exit status.

    A wrong setting prints one line on standard error, returns status 2 and leaves no folder behind. ``DST_TRACEBACK=1`` or
    ``HYDRA_FULL_ERROR=1`` also prints the traceback.

    Args:
        argv: Overrides and flags of Hydra.
    """
    import hydra

    wanted = os.environ.get("DST_TRACEBACK", os.environ.get("HYDRA_FULL_ERROR", "0"))
    # Otherwise Hydra prints exceptions itself and exits. Set for all processes that this one starts, too.
    os.environ.update(HYDRA_FULL_ERROR="1", DST_TRACEBACK=wanted)
    # Hydra's parser accepts overrides on one side of a flag only.
    sys.argv = [sys.argv[0], *sorted(argv, key=lambda argument: argument not in ("-m", "--multirun"))]
    register_schema()
    begun = False

    def begin(cfg: DictConfig) -> float:
        nonlocal begun
        begun = True
        return job(cfg)

    try:
        hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="train")(begin)()
    except Exception as error:
        if not begun and isinstance(error, OSError) and error.filename:  # Hydra creates the run's folder before the job
            error = ConfigurationError(
                f"the run's folder cannot be written ({error.strerror}: {error.filename}); choose another hydra.run.dir"
            )
        if not _is_about_settings(error):
            raise
        return _refuse(error)
    return 0


def _refuse(error: Exception) -> int:
    """Print a wrong setting, undo what was written, and return the exit status."""
    from dst.cli.sweep import discard

    discard()
    if os.environ.get("DST_TRACEBACK") == "1":
        traceback.print_exc()
    print(f"error: {explain(error)}", file=sys.stderr)
    return 2


def _is_about_settings(error: Exception) -> bool:
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    return isinstance(error, (ConfigurationError, StateError, HydraException, OmegaConfBaseException))


def job(cfg: DictConfig) -> float:
    """Train one run within Hydra. Return its test accuracy, for sweepers that optimise it."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra_cfg = HydraConfig.get()
    folder = Path(hydra_cfg.runtime.output_dir)
    if hydra_cfg.mode == RunMode.MULTIRUN:
        if hydra_cfg.runtime.choices["hydra/launcher"] != "basic":
            cfg.trainer.enable_progress_bar = False  # bars of parallel runs would overwrite each other
        return _sweep_job(cfg, folder)

    from dst.cli.train import run
    from dst.report.terminal import show

    try:
        summary = run(cfg, folder)
    except Exception as error:
        if not _is_about_settings(error):
            raise
        sys.exit(_refuse(error))  # Hydra would add lines of its own to an exception
    except (KeyboardInterrupt, SystemExit) as interrupt:
        if (folder / "checkpoints" / "last.ckpt").exists():
            print(f"interrupted; resume with: resume=last hydra.run.dir={folder}", file=sys.stderr)
        sys.exit(_status(interrupt))
    if os.environ.get("LOCAL_RANK", "0") == "0":
        show(summary.renderable(folder))
    if summary.test.loss is None:
        print(f"error: {_DIVERGED}", file=sys.stderr)
        sys.exit(1)
    return _accuracy(summary.test.accuracy)


_DIVERGED = (
    "training has diverged: the test loss is not finite; lower optimizer.lr, or clip by trainer.gradient_clip_val"
)


def _status(interrupt: BaseException) -> int:
    """Return the exit status of an interrupted process: 128 plus the signal's number."""
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    if isinstance(interrupt, SIGTERMException):
        return 128 + signal.SIGTERM
    code = interrupt.code if isinstance(interrupt, SystemExit) else None
    return code if isinstance(code, int) and code not in (0, 1) else 128 + signal.SIGINT


def _sweep_job(cfg: DictConfig, folder: Path) -> float:
    """Train one run of a sweep. A failure is recorded in the run's folder, and the sweep continues.

    In the folder of an interrupted sweep, finished runs are not repeated, and unfinished ones are resumed.
    """
    from dst.cli.sweep import ERROR_FILE, finished, mark_finished
    from dst.cli.train import run
    from dst.report.summary import percent

    try:
        if (done := finished(folder, cfg)) is not None:
            print(f"run {folder.name}: finished before, test accuracy {percent(done.test.accuracy)}")
            return _accuracy(done.test.accuracy)
        checkpoints = folder / "checkpoints"
        if cfg.resume is None and checkpoints.is_dir() and any(checkpoints.iterdir()):
            cfg.resume = "last"
        summary = run(cfg, folder, sweep=True)
        mark_finished(folder, cfg)
    except (KeyboardInterrupt, SystemExit) as interrupt:
        print(
            f"interrupted; resume with the same command and hydra.sweep.dir={_sweep_folder(folder)}: finished runs are kept, "
            "and this one is resumed",
            file=sys.stderr,
        )
        sys.exit(_status(interrupt))
    except Exception as error:
        expected = _is_about_settings(error)
        message = explain(error) if expected else f"{type(error).__name__}: {error}"
        details = "" if expected else f"\n{traceback.format_exc()}"
        (folder / ERROR_FILE).write_text(f"{message}\n{details}", encoding="utf-8")
        if not expected or os.environ.get("DST_TRACEBACK") == "1":
            traceback.print_exc()
        print(f"error: run {folder.name}: {message}", file=sys.stderr)
        return float("nan")
    (folder / ERROR_FILE).unlink(missing_ok=True)
    if summary.test.loss is None:
        print(f"warning: run {folder.name}: {_DIVERGED}", file=sys.stderr)
    print(f"run {folder.name}: test accuracy {percent(summary.test.accuracy)} in {summary.seconds:.1f} s")
    return _accuracy(summary.test.accuracy)


def _sweep_folder(folder: Path) -> Path:
    from hydra.core.hydra_config import HydraConfig

    return Path(HydraConfig.get().sweep.dir) if HydraConfig.initialized() else folder.parent


def explain(error: BaseException) -> str:
    """Return one message that says what to change.

    Args:
        error: An error of the configuration or of a check.

    Returns:
        The message of its cause that is about the settings.
    """
    from hydra.errors import ConfigCompositionException, InstantiationException, MissingConfigException

    for cause in _causes(error):
        if isinstance(cause, (ConfigurationError, StateError)):
            return str(cause)
    text = _first_paragraph(str(error))
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, name = error.missing_cfg_file.rpartition("/")
        guess = difflib.get_close_matches(name, error.options, 1)
        hint = f"did you mean {guess[0]}? " if guess else ""
        return f"there is no {group}={name}; {hint}Choose from {', '.join(error.options)}"
    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        return f"{text} {error.__cause__}"
    if isinstance(error, ConfigCompositionException) and error.__cause__ is not None:
        return f"{text}: {_first_paragraph(str(error.__cause__))}"
    return text


def _first_paragraph(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines()]
    return " ".join(line for line in lines if line and not line.startswith(("full_key:", "object_type=")))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _accuracy(value: float | None) -> float:
    return float("nan") if value is None else value


def methods(argv: Sequence[str]) -> int:
    """Print all methods with their storage, grow score, pattern, cost and paper."""
    import argparse

    parser = argparse.ArgumentParser(
        "dst methods", description="List the methods: storage, growth, pattern, cost, paper."
    )
    parser.parse_args(argv)

    from dst.cli.catalogue import COLUMNS, catalogue
    from dst.report.terminal import show, terminal_table

    whole = [i for i, header in enumerate(COLUMNS) if header in ("sparsity=", "paper")]
    show(terminal_table([COLUMNS, *catalogue()], right=(), whole=whole))
    return 0


def inspect(argv: Sequence[str]) -> int:
    """Print a checkpoint's layers, densities and health, without executing code from the file."""
    import argparse

    parser = argparse.ArgumentParser("dst inspect", description="Show a checkpoint's layers, densities and health.")
    parser.add_argument("path", help="a checkpoint, a mask file, or a run's folder")
    arguments = parser.parse_args(argv)

    from dst.report.inspection import inspect_checkpoint
    from dst.report.terminal import show

    try:
        inspection = inspect_checkpoint(arguments.path)
    except StateError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show(inspection.renderable())
    return 0


def compare(argv: Sequence[str]) -> int:
    """Print means over seeds, paired differences and Pareto fronts of runs, and write them as files on request."""
    import argparse

    from dst.report.compare import compare as compared
    from dst.report.compare import read_runs
    from dst.report.comparison_output import renderable, write_comparison
    from dst.report.terminal import show

    parser = argparse.ArgumentParser("dst compare", description="Compare finished runs over seeds.")
    parser.add_argument("runs", nargs="+", help="folders of runs, or folders of such folders (a sweep)")
    parser.add_argument("--baseline", help="label of the group to compare all others with")
    parser.add_argument(
        "--output", type=Path, help="folder for compare.csv, differences.csv, compare.md and compare.html"
    )
    arguments = parser.parse_args(argv)
    try:
        comparison = compared(read_runs(arguments.runs), arguments.baseline)
    except ConfigurationError as error:  # DataError is one, too
        print(f"error: {error}", file=sys.stderr)
        return 2
    show(renderable(comparison))
    if arguments.output is not None:
        for path in write_comparison(comparison, arguments.output):
            print(path)
    return 0


def report(argv: Sequence[str]) -> int:
    """Write a run's report as one HTML file."""
    import argparse

    from dst.report import REPORT_FILE, write_report

    parser = argparse.ArgumentParser("dst report", description="Write a run's report: one HTML file, no network.")
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--output", type=Path, help=f"the file to write; {REPORT_FILE} in the run's folder by default")
    arguments = parser.parse_args(argv)
    output = arguments.output or arguments.run / REPORT_FILE
    try:
        write_report(arguments.run, output)
    except ConfigurationError as error:  # DataError is one, too
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(output)
    return 0


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "train": (train, "train a network: dst train sparsity=rigl density=0.1 (dst train --help)"),
    "methods": (methods, "list the methods: storage, growth, pattern, cost, paper"),
    "inspect": (inspect, "show a checkpoint's layers, densities and health: dst inspect CKPT"),
    "report": (report, "write a run's report as one HTML file: dst report RUN [--output FILE]"),
    "compare": (compare, "compare runs over seeds: dst compare RUNS... (dst compare --help)"),
}


def _help() -> str:
    lines = [f"  {name:<10}{text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(["Dynamic sparse training.", "", "usage: dst COMMAND ...", "", *lines])
