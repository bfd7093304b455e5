"""Small helpers for all packages.

It may import `peftcore.errors` only. In the order of reading:

- `progress`: progress bars for long work.
- `notices`: logs lines for the user, each only once.
- `threads`: identifies threads by objects.
- `autocast`: helpers for torch's autocast.
- `packages`: finds installed Python packages.
- `numbers`: formats numbers as text.
- `device_memory`: checks that new tensors fit into the memory of their devices.
- `quiet`: silences other libraries.
- `yaml_values`: parses values that users write in YAML.
- `journal`: records changes of a model, and undoes them after an error or later.
- `variables`: sets context variables until the end of a block.
"""
