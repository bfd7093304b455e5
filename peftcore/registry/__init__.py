"""The registry of plugins, and of methods by name.

It may import `contract`, and what is below. In the order of reading:

- `plugins`: loads entry points; the core's own answers are a plugin that is loaded by name.
- `evidence`: with whose numbers the tests of a plugin compare its methods, read from its package.
- `presets`: the class of a preset, which is the method's with other defaults.
- `catalogue`: methods by name, a description of each, the schema of their options.
- `equation_only`: the notice that a method was not compared with anybody else's numbers.
"""
