"""Searches: the method, its options and its sites that suit a task best within a budget.

It may import all that `peftcore.comparing` lists before it, and optuna. In the order of reading:

- `search`: the whole of a search.
- `space`: what it chooses from.
- `budget`: what a candidate may cost, known before it is trained.
- `studies`: the record that several workers may share.
- `found`: what came out.
"""
