"""The forward of an adapted model.

It may import `libraries` and the packages below it. In the order of reading:

- `context`: the context of one forward: its inputs, tokens and random numbers, and the values that operators store in
  it.
- `choice`: which adapters are active, for which rows of the batch, in which threads and tasks, and for how long.
- `tensors`: the tensors with which a module computes: effective, recomputed, cached and lazy ones.
- `plan`: the operators that act at one module while certain adapters are active.
- `rows`: rows of a batch that use different adapters.
- `state`: the state of an adapted model and of each adapted module.
- `attention`: operators inside attention, and how attention modules call them.
- `sequence`: virtual tokens in the sequence of a model.
- `call`: one call of an adapted module, with the operators that act on it.
- `class_swap`: the mechanism that replaces the forward of a module.
"""
