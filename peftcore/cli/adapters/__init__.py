"""The commands on adapter files (inspect, merge, convert, export-lora), which speak in words of their options.

It may import the core, `peftcore.models` and `peftcore.cli.app`. In the order of reading:

- `jobs`: the work of the commands.
- `adapter_hosts`: the model that an adapter is for.
- `output`: the files that a command writes, whole or not at all.
- `results`: the results of the jobs.
- `adapter_tables`: the results as tables and JSON.
"""
