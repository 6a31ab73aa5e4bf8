"""Random choices that depend on what they are for, and not on what was drawn before."""

from __future__ import annotations

import hashlib

import torch


def folded_generator(*keys: int | str) -> torch.Generator:
    """A CPU generator whose stream depends on the keys alone.

    Folding (seed, step, layer, purpose) into a fresh generator, instead of drawing from one long stream, makes every
    random choice independent of what was drawn before: the same after a resume, and the same on every rank.
    """
    digest = hashlib.blake2b(repr(keys).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") & (2**63 - 1))
