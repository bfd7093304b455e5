"""What authors of methods share.

It may import `algebra`, and what is below. In the order of reading:

- `branches`: adapters beside a branch of a block.
- `hybrid_parts`: methods that are made of methods.
- `budgets`: what a method trains in models that people know.
"""
