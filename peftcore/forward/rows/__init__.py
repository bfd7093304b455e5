"""Rows of a batch that use different adapters.

In the order of reading:

- `routing`: the rows of each adapter, and outputs joined row by row.
- `stacked_operators`: equal operators of several adapters, which run as one.
- `batched_updates`: low-rank updates of many adapters in one product.
"""
