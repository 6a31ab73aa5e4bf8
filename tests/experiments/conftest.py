"""Runs measure for no longer than they must."""

from tests.cli.conftest import _brief_timing  # noqa: F401 (a fixture)
