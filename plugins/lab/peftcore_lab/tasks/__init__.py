"""Tasks: each task loads a model by its name and examples from a file, ready for the Trainer.

It may import `errors`, `packages`, `data`, `models` and `runs`; no task trains. In the order of reading:

- `task`: the interface of a task.
- `task_catalogue`: the tasks by name.
- `_classes`: metrics of classification tasks; `text_classification`, `token_classification`, `image_classification`.
- `_language`: metrics of language tasks; `seq2seq`.
- `_causal`: the base of tasks for decoders; `causal_lm`, `chat`.
- `_dpo`: TRL's Trainer for pairs of answers; `preference`.
- `segmentation`: pictures and the classes of their pixels.
- `_noising`: noise over latents; `_painters`: pipelines of diffusers; `text_to_image`: pictures by their names.
"""

from peftcore_lab.tasks.task import Data, OwnTrainer, Prepared, RowsOfTasks, Task, Work

__all__ = ["Data", "OwnTrainer", "Prepared", "RowsOfTasks", "Task", "Work"]
