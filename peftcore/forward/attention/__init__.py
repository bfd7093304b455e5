"""Edits inside attention, and the ways in which attention modules call them.

In the order of reading:

- `attention`: edits inside attention.
- `transformers_attention`: edits in attentions of transformers.
- `multihead_attention`: edits in torch's own attention.
- `attention_calls`: the ways in which attention modules call edits.
"""
