"""The state of an adapted model and of each adapted module.

In the order of reading:

- `own_losses`: auxiliary losses of methods.
- `recorder`: opens and closes the context of each forward.
- `generate`: computes effective weights once per call of `generate`.
- `host_state`: the state of an adapted model.
- `slot`: the operators and plans of one module.
- `cached_weights`: the context manager `cache_weights`.
"""
