"""Targets: resolve the names that a user gives to modules, tensors, attentions and token sequences of a model.

It may import `forward`, and the packages below it. In the order of reading:

- `sites`: a target module or tensor at which a method acts.
- `resolver`: resolves names, globs, roles, types and predicates to sites.
- `defaults`: default targets of a method, and notices for the user about them.
- `attention_sites`: attention modules that can be edited.
- `sequence_order`: positions of virtual tokens in the sequences of a batch.
- `sequence_cache`: transformers' caches that hold virtual tokens.
- `sequence_masks`: attention masks over virtual tokens.
- `sequence`: virtual tokens in front of the user's tokens.
- `sequence_inside`: virtual tokens that are made at inner blocks.
"""
