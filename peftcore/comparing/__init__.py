"""Runs, comparisons and searches as a library, of which the command line is the face.

It may import all of peftcore but `peftcore.cli` and `peftcore.testing`, and the libraries of the extra
``peftcore[cli]``; nothing of peftcore but the command line imports it, so that ``import peftcore`` stays light. Nothing
here prints: who calls hands in a display that is told of progress. Each package imports those above it alone. In the
order of reading:

- `errors`: input that cannot be used.
- `packages`: which Python packages are installed.
- `digests`: digests of what is read from files.
- `numbers`: numbers as people read them.
- `quiet`: other libraries say nothing.
- `data`: examples from files, folders and datasets.
- `models`: models from where the user keeps them, with weights or without.
- `plans`: the changes of a method to a model, and their costs.
- `runs`: the schema of a training run, and the folder that it fills.
- `tasks`: tasks to learn.
- `training`: one run.
- `reports`: results of a comparison, for people and programs.
- `comparisons`: several methods, configurations and seeds on one task.
- `searching`: the best within a budget.
"""
