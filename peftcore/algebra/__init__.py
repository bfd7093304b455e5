"""Adapter algebra: sums and merges of the weight changes of adapters.

It may import `authoring` and the layers below. In the order of reading:

- `merge_math`: TIES, DARE and related methods, as functions of tensors.
- `combining`: `deltas`, `to_lora` and `combine`, of whole adapters.
- `adapters_as_parts`: existing adapters as the parts of a hybrid.
- `exporting`: writes an adapter for another program: exactly, or projected to a LoRA, or not at all.
"""
