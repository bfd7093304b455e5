"""Putting operators into a model and taking them out, all or nothing.

It may import `targets`, and what is below. In the order of reading:

- `seeding`: random numbers by seed and path.
- `surgeon`: the verbs of `Method.inject`, which record.
- `forced_attributes`: how some modules are held while a model is adapted.
- `installation`: what was recorded goes in; the base is frozen by who applies.
- `silent_layers`: a target module that never ran is an error.
- `planning`: what would be done.
"""

from peftcore.utils.moved import names_of

__getattr__ = names_of("surgery")
