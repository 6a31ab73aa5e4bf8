"""Random generators seeded by keys such as seed, step and layer."""

from __future__ import annotations

import hashlib

import torch


def folded_generator(*keys: int | str) -> torch.Generator:
    """A CPU generator whose stream depends only on the keys.

    A random choice seeded by (seed, step, layer, purpose) does not depend on earlier draws. It is the same after a resume
    and on every rank.
    """
    digest = hashlib.blake2b(repr(keys).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") & (2**63 - 1))
