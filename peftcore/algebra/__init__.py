"""Adapter algebra: computes sums and merges of adapters, from the changes that they make to weights.

It may import `authoring` and the layers below. In the order of reading:

- `merge_math`: TIES, DARE and related merges, as functions of tensors.
- `combining`: `deltas`, `to_lora` and `combine`, as functions of whole adapters.
- `adapters_as_parts`: `gather`, which makes a hybrid from existing adapters.
- `exporting`: writes an adapter for another program, unchanged or as a LoRA.
"""
