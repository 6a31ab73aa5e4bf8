"""The published methods, each as one composition in a file of its own.

Every function returns a frozen ``dst.Method``. Durations (``update_every``, ``start``, ``stop``, …) are optimizer steps
when they are ints and fractions of the total steps when they are floats.
"""

from dst.methods.ac_dc import ac_dc
from dst.methods.deep_r import deep_r
from dst.methods.dense import dense
from dst.methods.dsr import dsr
from dst.methods.gmp import gmp
from dst.methods.granet import granet
from dst.methods.lottery_ticket_rewind import lottery_ticket_rewind
from dst.methods.mest import mest
from dst.methods.rigl import rigl
from dst.methods.rigl_itop import rigl_itop
from dst.methods.set_ import set_
from dst.methods.snfs import snfs
from dst.methods.sparse_from_scratch import sparse_from_scratch
from dst.methods.static import static

__all__ = [
    "ac_dc",
    "deep_r",
    "dense",
    "dsr",
    "gmp",
    "granet",
    "lottery_ticket_rewind",
    "mest",
    "rigl",
    "rigl_itop",
    "set_",
    "snfs",
    "sparse_from_scratch",
    "static",
]
