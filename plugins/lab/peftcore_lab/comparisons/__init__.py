"""Comparisons: several methods, configurations and seeds on one task, each a separate run.

It may import all that `peftcore_lab` lists before it. In the order of reading:

- `comparison`: the schema of a comparison.
- `rates`: learning rates that are chosen for each method.
- `running`: executes the runs of a comparison, in this process or elsewhere.
- `compare`: runs a whole comparison.
- `comparison_on_ray`: the runs of a comparison as tasks of a Ray cluster.
- `modules`: comparisons on any module, with training and scoring by functions of the user.
- `demo`: the comparison that contains its own model and data.
"""
