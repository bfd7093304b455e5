"""Integrations with other libraries' trainers.

It may import `authoring`, and what is below. In the order of reading:

- `callback`: transformers' Trainer.
"""
