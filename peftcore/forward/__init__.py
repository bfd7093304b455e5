"""The forward of an adapted model: which adapters are active, plans, effective weights, rows, attention, virtual
tokens.

It may import `libraries` and the packages below it. In the order of reading:

- `context`: the context of one forward: its inputs, tokens and random numbers, and the values that operators store in
  it.
- `choice`: which adapters are active, on which rows, in which threads and tasks, and until when.
- `tensors`: the tensors with which a module computes: effective, recomputed, cached and lazy ones.
- `plan`: the operators that act at one module under one choice, planned once.
- `rows`: rows of a batch that use different adapters.
- `state`: the state of an adapted model and of each adapted module.
- `attention`: operators inside attention, and the ways in which attention modules call them.
- `sequence`: virtual tokens in the sequence of a model.
- `call`: one call of an adapted module, with the operators that act on it.
- `class_swap`: the mechanism that replaces the forward of a module.
"""
