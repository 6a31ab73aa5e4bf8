"""Measures `import dst`, `import torch` and `dst --help`: medians over fresh processes."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

from dst.tables import aligned_table

COMMANDS = {
    "import torch": "import torch",
    "import dst": "import dst; dst.Sparsifier, dst.prepare, dst.methods",
    "dst --help": "from dst.cli import main; main(['--help'])",
    "python": "",
}


def main() -> None:
    """Print the seconds of each, and the ratio of the imports."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9, help="processes of each kind, interleaved")
    repeats = parser.parse_args().repeats
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(repeats + 1):  # the first round fills the file cache
        for name, code in COMMANDS.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    rows = [(name, f"{median:.3f} s") for name, median in medians.items()]
    print(aligned_table([*rows, ("ratio", f"{medians['import dst'] / medians['import torch']:.2f}")], right={1}))


if __name__ == "__main__":
    main()
