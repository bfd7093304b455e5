"""Plans: the operators that act at one module while certain adapters are active, computed once.

In the order of reading:

- `plan`: active plans and module plans.
"""
