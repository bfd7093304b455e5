"""The tensors with which a module computes: effective, recomputed, cached and lazy ones.

In the order of reading:

- `view`: a copy of a module with other tensors, for one forward.
- `cache`: stores values computed from weights while the weights do not change.
- `recompute`: frees effective weights after the forward, and computes them again in backward.
- `mount`: one operator at one tensor or around one module.
- `expert_updates`: lazy weights, which represent low-rank updates of stacked experts.
"""
