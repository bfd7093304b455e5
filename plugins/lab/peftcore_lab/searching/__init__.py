"""Searches: the method, its options and its sites that suit a task best within a budget.

It may import all that `peftcore_lab` lists before it, and optuna. In the order of reading:

- `search`: the whole of a search.
- `space`: the space that it chooses from.
- `budget`: the costs that a candidate may have, known before it is trained.
- `studies`: the study that several workers may share.
- `search_outcome`: the outcome.
- `search_on_ray`: its trials on a Ray cluster.
"""
