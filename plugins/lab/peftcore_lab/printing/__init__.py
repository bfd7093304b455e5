"""The tables that the commands print in the end.

It may import `peftcore_lab` and rich. In the order of reading:

- `run`: a training run.
- `comparison`: a comparison.
- `search`: a search.
"""
