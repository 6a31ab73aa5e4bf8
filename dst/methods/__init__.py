"""The published methods, each as one composition in a file of its own.

Every function returns a frozen ``dst.Method``. Durations (``update_every``, ``start``, ``stop``, …) are optimizer steps
when they are ints and fractions of the total steps when they are floats.
"""

from dst.methods.dense import dense
from dst.methods.lottery_ticket_rewind import lottery_ticket_rewind
from dst.methods.rigl import rigl
from dst.methods.set_ import set_
from dst.methods.sparse_from_scratch import sparse_from_scratch
from dst.methods.static import static

__all__ = ["dense", "lottery_ticket_rewind", "rigl", "set_", "sparse_from_scratch", "static"]
