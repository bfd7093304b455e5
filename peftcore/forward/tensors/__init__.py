"""The tensors with which a module computes: effective, recomputed, cached and lazy ones.

In the order of reading:

- `view`: a module with other tensors, for one forward.
- `cache`: values computed from weights, kept while the weights do not change.
- `recompute`: effective weights in training, computed again in backward.
- `mount`: one operator at one tensor or around one module.
- `expert_updates`: lazy weights for low-rank updates of stacked experts.
"""
