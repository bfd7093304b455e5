"""Sums and merges of what adapters do to weights.

It may import `files`, and what is below. In the order of reading:

- `merge_math`: TIES, DARE and their kin, as functions of tensors.
- `combining`: `deltas`, `to_lora` and `combine`, of whole adapters.
- `adapters_as_parts`: adapters as the parts of a method of parts.
"""

from peftcore.utils.moved import names_of

__getattr__ = names_of("algebra")
