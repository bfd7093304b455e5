"""The operators that act at one module under one choice, planned once.

In the order of reading:

- `plan`: active plans and module plans.
"""
