"""Examples, from files, folders and datasets.

It may import `errors`, `digests`, and libraries that read tables and pictures; no model and no tokenizer is loaded
here. In the order of reading:

- `table_readers`: the rows of a CSV or JSONL file.
- `columns`: finds the columns of a table by their names.
- `texts`: labelled texts as a task of classes.
- `example_sources`: anything that holds examples, as a ``datasets.Dataset``.
- `task_mixtures`: examples of several tasks in one table.
- `splits`: a third split of the examples, used to choose settings.
"""
