"""One run: a method on a task, trained by transformers' ``Trainer``.

It may import the core, `errors`, `plans`, `runs` and `tasks`. In the order of reading:

- `train`: the whole of a run, and its result.
- `fleet_runs`: several runs in one, on one model.
- `task_rows`: rows of several tasks.
- `averages`: moving averages of the trained parameters.
- `run_trainer`: the ``Trainer`` as it is used here.
- `processes`: one run in several processes.
- `cluster`: one run, or many tasks, on a Ray cluster.
- `advice`: settings to change when memory was too small.
- `memory`: how much memory a run takes at its peak.
"""
