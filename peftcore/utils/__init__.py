"""Small helpers for all packages.

It may import `peftcore.errors` alone. In the order of reading:

- `progress`: bars for long work.
- `notices`: single lines for the user, each once.
- `threads`: threads by objects of their own.
- `autocast`: the dtype under autocast.
- `packages`: which Python packages are installed.
- `numbers`: numbers as people read them.
- `quiet`: other libraries say nothing.
- `yaml_values`: values that users write in YAML.
- `journal`: writes that are undone together, when one fails or later.
"""
