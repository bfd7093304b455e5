"""The forward of an adapted model: which adapters are active, plans, effective weights, rows, attention.

It may import `libraries` and `roles`, and what is below. In the order of reading:

- `context`: what one forward knows: its inputs, tokens and random numbers, and what operators leave in it.
- `choice`: which adapters are active, on which rows, in which threads and tasks, and until when.
- `tensors`: the tensors with which a module computes: effective, recomputed, cached and lazy ones.
- `plan`: what acts at one module under one choice, planned once.
- `rows`: rows of a batch that go to different adapters.
- `state`: what peftcore keeps on an adapted model and on each adapted module.
- `attention`: edits inside attention, and the ways in which attention modules call them.
- `call`: one call of an adapted module, with what acts there.
- `class_swap`: how a module gets another forward.
"""
