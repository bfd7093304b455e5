"""Training runs: the schema of one, and the folder that it fills.

It may import the core, `errors`, `digests` and `models`. In the order of reading:

- `run`: the schema of a run.
- `reading`: options as users write them, and one sentence for each that is wrong.
- `folder`: the folder of a run, by which it can go on.
"""
