"""Many adapters trained in shared steps on one base.

It may import `authoring` and the layers below. In the order of reading:

- `rows`: batches put together, and rows taken from them again.
- `outputs`: the rows of one member in an output, and the dimensions that have rows.
- `losses`: the loss of one adapter, computed from its rows.
- `feeds`: one adapter's data, batch after batch.
- `adapter_checkpoints`: the files from which one adapter's training continues.
- `member`: one adapter that trains in a fleet.
- `fleet`: the shared steps.
"""
