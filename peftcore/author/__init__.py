"""The imports for authors of methods and plugins; users import from `peftcore`.

It may import all lower packages, and only plugins import it. In the order in which an author needs them:

- `essentials`: the imports of most methods: a method, its options, its target modules, the operators at them.
- `weights`: weights and modules in detail: layouts, slices, quantized layers, low-rank factors, gradients, routers.
- `blocks`: blocks of a model and their branches, networks in parallel with a model, additional rows next to the tokens
  of a diffusion model.
- `sequences`: token sequences and attention: soft prompts, the contents of a cache, edits inside an attention.
- `formats`: readers and writers for files of other programs; import them from `peftcore.author.formats`.
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
