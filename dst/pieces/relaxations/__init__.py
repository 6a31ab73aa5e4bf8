"""How effective weights follow from latent weights, and how gradients get back to them.

A relaxation is a frozen dataclass of pure functions of one layer (``LatentLayer``). ``dst.backends.latent`` owns the
tensors and calls them. The parameter holds the effective weights between optimizer steps, so ``backward()`` leaves their
gradient in ``.grad``. At the start of a step, ``Relaxation.backward`` turns it into the gradient of the latent weights,
which the optimizer then updates.

There are two kinds:

- ``StraightThrough`` and hard ``Movement`` follow the engine's mask: it says which weights are active.
- ``LearnedThreshold``, ``HardConcrete`` and soft ``Movement`` learn which weights are active (``until_mask``). They end
  when the first mask is made; from then on training is masked.
"""

from dst.pieces.relaxations.hard_concrete import HardConcrete
from dst.pieces.relaxations.learned_threshold import LearnedThreshold
from dst.pieces.relaxations.movement import Movement
from dst.pieces.relaxations.pressure import pressure
from dst.pieces.relaxations.relaxation import LatentLayer, Relaxation
from dst.pieces.relaxations.straight_through import StraightThrough

__all__ = ["HardConcrete", "LatentLayer", "LearnedThreshold", "Movement", "Relaxation", "StraightThrough", "pressure"]
