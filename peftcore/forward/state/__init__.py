"""What peftcore keeps on an adapted model and on each adapted module.

In the order of reading:

- `own_losses`: auxiliary losses of methods.
- `recorder`: opens and closes the context of each forward.
- `generate`: one call of `generate` computes effective weights once.
- `adapter_modules`: the modules in which operators live.
- `host_state`: the state of an adapted model.
- `slot`: the operators and plans of one module.
- `cached_weights`: the promise of a user that nothing is written for a while.
"""
