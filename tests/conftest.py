from __future__ import annotations

import pytest
import torch
from hypothesis import settings

settings.register_profile("repo", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("repo")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same global random state."""
    torch.manual_seed(0)
