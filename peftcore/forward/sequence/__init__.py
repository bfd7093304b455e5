"""Virtual tokens: trained rows in the token sequence of a model (soft prompts).

In the order of reading:

- `sequence_order`: positions of virtual tokens in the sequences of a batch.
- `sequence_cache`: transformers' caches that contain virtual tokens.
- `sequence_masks`: attention masks that include virtual tokens.
- `sequence`: virtual tokens before the user's tokens.
- `sequence_inside`: virtual tokens that are computed at inner blocks.
"""
