"""Who brings what: plugins, and methods by name.

It may import `contract`, and what is below. In the order of reading:

- `plugins`: entry points; the core's own answers are a plugin that is loaded by name.
- `catalogue`: methods by name, what is known of each, the schema of their options.
- `experimental`: the notice that a method was compared with nobody else's numbers.
"""
