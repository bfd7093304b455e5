"""One run: a method on a task, trained by transformers' ``Trainer``.

It may import the core, `errors`, `plans`, `runs` and `tasks`. In the order of reading:

- `train`: a whole run, and its result.
- `fleet_runs`: several runs that train together on one model.
- `task_rows`: rows of several tasks.
- `averages`: moving averages of the trained parameters.
- `run_trainer`: the subclass of ``Trainer`` for runs.
- `processes`: one run in several processes.
- `cluster`: runs on a Ray cluster.
- `advice`: settings to change if a run needs too much memory.
- `memory`: the peak memory of a run.
"""
