"""Helpers for authors of methods.

It may import `algebra`, and what is below. In the order of reading:

- `branches`: adapters parallel to a branch of a block.
- `hybrid_parts`: methods that are made of methods.
- `budgets`: trainable values of a method in well-known models.
"""
