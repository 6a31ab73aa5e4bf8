"""Train a network sparsely: ``python train.py sparsity=rigl density=0.1``; ``--help`` lists what can be set."""

from __future__ import annotations

import sys

from dst.cli.main import train

if __name__ == "__main__":
    sys.exit(train(sys.argv[1:]))
