"""Comparisons: several methods, configurations and seeds on one task, each a separate run.

It may import all that `peftcore_lab` lists before it. In the order of reading:

- `comparison`: the schema of a comparison.
- `rates`: learning rates that are chosen for each method.
- `running`: carrying out its runs, in this process or elsewhere.
- `compare`: carrying it out.
- `comparison_on_ray`: its runs as tasks of a Ray cluster.
- `modules`: the same on any module, whose training and scoring are the user's.
- `demo`: the comparison that contains its own model and data.
"""
