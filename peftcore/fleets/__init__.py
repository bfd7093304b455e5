"""Many adapters trained in shared steps on one base.

It may import `authoring` and the layers below it. The modules, in the order of reading:

- `rows`: joins batches, and selects rows of the joined batch.
- `outputs`: selects the rows of one member from an output.
- `losses`: the loss of one adapter, computed from its rows.
- `feeds`: iterates over one adapter's data.
- `adapter_checkpoints`: the files from which one adapter's training continues.
- `member`: one adapter that trains in a fleet.
- `fleet`: the shared steps.
"""
