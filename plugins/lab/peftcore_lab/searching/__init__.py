"""Searches for the method, its options and its sites that are best for a task within a budget.

It may import all that `peftcore_lab` lists before it, and optuna. In the order of reading:

- `search`: a whole search.
- `space`: the search space.
- `budget`: the costs of a candidate, which are known before training, and their limits.
- `studies`: the optuna study, which several workers may share.
- `search_outcome`: the result of a search.
- `search_on_ray`: the trials of a search on a Ray cluster.
"""
