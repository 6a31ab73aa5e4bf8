"""Methods: frozen compositions of pieces, without state."""

from dst.method.checks import check_method, check_same, shown
from dst.method.composition import Method
from dst.method.lottery import REWINDS, LotterySchedule
from dst.method.narrow import MATCHES, Narrow
from dst.method.spec import spec_differences
from dst.method.validation import BACKENDS

__all__ = [
    "BACKENDS",
    "MATCHES",
    "REWINDS",
    "LotterySchedule",
    "Method",
    "Narrow",
    "check_method",
    "check_same",
    "shown",
    "spec_differences",
]
