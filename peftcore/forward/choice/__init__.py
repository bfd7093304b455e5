"""Which adapters are active, on which rows, in which threads and tasks, and until when.

In the order of reading:

- `active_adapters`: active adapters, and the adapter of each row of a batch.
- `merged_choice`: which choices are right while adapters are merged.
- `unused_parameters`: adapters that train and do not act, where that fails.
- `residency`: which adapters have their values on the model, within a limit.
- `scopes`: threads or asyncio tasks that see a choice, and when it ends.
"""
