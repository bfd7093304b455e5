"""The output of the commands that train: progress while they work, tables in the end.

It may import `peftcore.comparing` and rich. In the order of reading:

- `progress`: bars on standard error.
- `run`: a training run.
- `comparison`: a comparison.
- `search`: a search.
"""
