"""What can be learned: each task makes of a model's name and a file a model with examples, ready for the Trainer.

It may import `errors`, `packages`, `data`, `models` and `runs`; no task trains. In the order of reading:

- `task`: what a task is.
- `catalogue`: the tasks by name.
- `_classes`: what tasks of classes share; `text_classification`, `token_classification`, `image_classification`.
- `_language`: what tasks of language share; `seq2seq`.
- `_causal`: what tasks of decoders share; `causal_lm`, `chat`.
- `text_to_image`: pictures by their names.
"""
