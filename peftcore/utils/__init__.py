"""Small helpers for all packages.

It may import `peftcore.errors` only. In the order of reading:

- `progress`: bars for long work.
- `notices`: single lines for the user, each once.
- `threads`: identifies threads by objects.
- `autocast`: the dtype under autocast.
- `packages`: which Python packages are installed.
- `numbers`: formats numbers for people.
- `device_memory`: checks that new tensors fit into the memory of their devices.
- `quiet`: silences other libraries.
- `yaml_values`: values that users write in YAML.
- `journal`: writes that are undone together, after an error or later.
- `variables`: context variables that have a value until the end of a block.
"""
