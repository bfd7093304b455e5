"""The commands on adapter files (inspect, merge, convert, export-lora), which speak in words of their options.

It may import the core, `peftcore.comparing.models` and `peftcore.cli.app`. In the order of reading:

- `jobs`: what is done.
- `hosts`: the model that an adapter is for.
- `output`: what is written, whole or not at all.
- `results`: what the jobs came to.
- `tables`: what is printed of it.
"""
