"""Training runs: the schema of a run, and its folder of results.

It may import the core, `errors`, `digests` and `models`. In the order of reading:

- `run`: the schema of a run.
- `reading`: reads the user's options, with one error message for each wrong option.
- `folder`: the folder of a run, from which the run can be resumed.
"""
