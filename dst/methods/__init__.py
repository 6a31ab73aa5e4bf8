"""The published methods, one composition per file.

Every function returns a frozen ``dst.Method``. Durations (``update_every``, ``start``, ``stop``, …) are optimizer steps
when they are ints and fractions of the total steps when they are floats.
"""

from dst.methods.ac_dc import ac_dc
from dst.methods.cht import cht
from dst.methods.deep_r import deep_r
from dst.methods.dense import dense
from dst.methods.dsr import dsr
from dst.methods.dynadiag import dynadiag
from dst.methods.gmp import gmp
from dst.methods.granet import granet
from dst.methods.grasp import grasp
from dst.methods.l0 import l0
from dst.methods.lottery_ticket_rewind import lottery_ticket_rewind
from dst.methods.mest import mest
from dst.methods.movement import movement
from dst.methods.rigl import rigl
from dst.methods.rigl_block import rigl_block
from dst.methods.rigl_itop import rigl_itop
from dst.methods.set_ import set_
from dst.methods.small_dense import small_dense
from dst.methods.snfs import snfs
from dst.methods.snip import snip
from dst.methods.sparse_from_scratch import sparse_from_scratch
from dst.methods.sr_ste import sr_ste
from dst.methods.srigl import srigl
from dst.methods.static import static
from dst.methods.str_ import str_
from dst.methods.synflow import synflow
from dst.methods.top_kast import top_kast

__all__ = [
    "ac_dc",
    "cht",
    "deep_r",
    "dense",
    "dsr",
    "dynadiag",
    "gmp",
    "granet",
    "grasp",
    "l0",
    "lottery_ticket_rewind",
    "mest",
    "movement",
    "rigl",
    "rigl_block",
    "rigl_itop",
    "set_",
    "small_dense",
    "snfs",
    "snip",
    "sparse_from_scratch",
    "sr_ste",
    "srigl",
    "static",
    "str_",
    "synflow",
    "top_kast",
]
