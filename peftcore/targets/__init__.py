"""From what a user names to sites: modules, tensors, attentions, token sequences.

It may import `forward`, and what is below. In the order of reading:

- `sites`: a place at which a method acts.
- `resolver`: names, globs, roles, types and predicates.
- `attention_sites`: where attention can be edited.
- `sequence_cache`: caches that hold trained rows.
- `sequence_masks`: masks over trained rows.
- `sequence`: trained rows in front of the tokens.
"""

from peftcore.utils.moved import names_of

__getattr__ = names_of("targets")
