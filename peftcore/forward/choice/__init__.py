"""Which adapters are active, on which rows, in which threads and tasks, and until when.

In the order of reading:

- `active_adapters`: active adapters, and the adapter of each row of a batch.
- `merged_choice`: which choices are correct while adapters are merged.
- `unused_parameters`: refuses inactive adapters with trainable parameters under DistributedDataParallel.
- `residency`: which adapters keep their values on the model, within a limit of bytes.
- `scopes`: threads or asyncio tasks that see a choice, and when it ends.
"""
