"""The work of the commands on adapter files (inspect, merge, convert, export-lora); their error messages name the
options of the commands.

It may import the core, `peftcore.models` and `peftcore.cli.app`. In the order of reading:

- `jobs`: the work of the commands.
- `adapter_hosts`: finds and opens the model that an adapter is for.
- `output`: writes the files of a command, completely or not at all.
- `results`: the results of the jobs.
- `adapter_tables`: the results as tables and JSON.
"""
