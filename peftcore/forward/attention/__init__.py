"""Operators inside attention ("edits"), and how attention modules call them.

In the order of reading:

- `attention`: edits: operators inside attention.
- `transformers_attention`: edits in attention modules of transformers.
- `multihead_attention`: edits in torch's `nn.MultiheadAttention`.
- `attention_calls`: finds how an attention module computes attention, so that it can call edits.
"""
