"""Reading and writing adapters: nothing in a file is believed, nothing half-written is left.

It may import `injection`, and what is below. In the order of reading:

- `safe_io`: bytes in and out.
- `envelope`: what an adapter says of itself besides its tensors.
- `formats`: one module a file format, ours and other libraries'.
- `save_load`: `load`, and what `Injection.save` calls.
- `compositions`: compositions with the adapters in them.
"""

from peftcore.utils.moved import names_of

__getattr__ = names_of("files")
