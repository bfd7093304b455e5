"""Targets: resolve the names that a user gives to modules, tensors, attentions and token sequences of a model.

It may import `roles` and the packages below it. The modules, in the order of reading:

- `sites`: a target module or tensor at which a method acts.
- `resolver`: resolves names, globs, roles, types and predicates to sites.
- `attention_sites`: attention modules that can be edited.
- `sequence_sites`: a token stack, for operators that add rows to its sequence.
"""
