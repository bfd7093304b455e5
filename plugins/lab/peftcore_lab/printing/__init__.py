"""The tables that the commands print at the end.

It may import `peftcore_lab` and rich. In the order of reading:

- `run_output`: a training run.
- `comparison_table`: a comparison.
- `search_table`: a search.
"""
