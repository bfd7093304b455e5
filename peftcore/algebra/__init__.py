"""Adapter algebra: sums and merges of the weight changes of adapters.

It may import `authoring`, and what is below. In the order of reading:

- `merge_math`: TIES, DARE and their kin, as functions of tensors.
- `combining`: `deltas`, `to_lora` and `combine`, of whole adapters.
- `adapters_as_parts`: existing adapters as the parts of a hybrid.
- `exporting`: an adapter as what another program reads, exact, projected or refused.
"""
