"""How long `import dst` takes beside `import torch`, and how soon `dst --help` answers: medians of fresh processes."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

COMMANDS = {
    "import torch": "import torch",
    "import dst": "import dst; dst.Sparsifier, dst.prepare, dst.methods",
    "dst --help": "from dst.cli import main; main(['--help'])",
    "python": "",
}


def main() -> None:
    """Print seconds, and the ratio of the imports."""
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
    for name, median in medians.items():
        print(f"{name:<14}{median:7.3f} s")
    print(f"{'ratio':<14}{medians['import dst'] / medians['import torch']:7.2f}")


if __name__ == "__main__":
    main()
