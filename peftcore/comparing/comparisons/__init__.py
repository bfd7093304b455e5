"""Comparisons: several methods, configurations and seeds on one task, each a run of its own.

It may import all that `peftcore.comparing` lists before it. In the order of reading:

- `comparison`: what is compared.
- `compare`: carrying it out.
- `demo`: the comparison that brings its own model and data.
"""
