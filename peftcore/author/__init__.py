"""All names that authors of methods and plugins import. Users import from `peftcore`.

It may import all lower packages, and only plugins import it. In the order in which an author needs them:

- `essentials`: names that most methods need: for the method, its options, its target modules and its operators.
- `weights`: names for methods that work on weights in detail: layouts, slices, quantized layers, low-rank factors,
  gradients, routers.
- `blocks`: names for methods that act on blocks and their branches, run a network in parallel with the model, or add
  rows to the tokens of a diffusion model.
- `sequences`: names for methods with soft prompts, or that edit attention or read caches.
- `formats`: names for readers and writers of other programs' files. Import them from `peftcore.author.formats`.
"""

from peftcore.author import blocks, essentials, sequences, weights
from peftcore.author.blocks import *  # noqa: F403
from peftcore.author.essentials import *  # noqa: F403
from peftcore.author.sequences import *  # noqa: F403
from peftcore.author.weights import *  # noqa: F403

__all__: list[str] = []
__all__ += essentials.__all__
__all__ += weights.__all__
__all__ += blocks.__all__
__all__ += sequences.__all__
