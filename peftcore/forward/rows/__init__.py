"""Rows of a batch that use different adapters.

In the order of reading:

- `routing`: runs each adapter on its rows, and combines the outputs row by row.
- `stacked_operators`: runs equal operators of several adapters as one.
- `batched_updates`: adds the low-rank updates of many adapters with one batched product.
"""
