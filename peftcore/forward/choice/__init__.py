"""Which adapters are active, for which rows of the batch, in which threads and tasks, and for how long.

In the order of reading:

- `active_adapters`: the object that describes a choice: active adapters, and the adapter of each row of a batch.
- `merged_choice`: checks whether a choice is correct while adapters are merged.
- `unused_parameters`: an error for inactive adapters with trainable parameters under DistributedDataParallel.
- `residency`: offloads adapters, so that those on the model stay within a limit of bytes.
- `scopes`: the threads or asyncio tasks in which a choice is in force, and when it ends.
"""
