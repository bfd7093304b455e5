"""Integrations with other libraries' trainers.

It may import `authoring`, and what is below. In the order of reading:

- `checkpoints`: what the Trainer of transformers writes of an adapted model.
- `callback`: the Trainer's callback.
- `trainer`: the Trainer itself, wherever its loss is computed.
"""
