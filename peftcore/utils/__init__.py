"""Small helpers for all packages.

It may import nothing of peftcore. In the order of reading:

- `progress`: bars for long work.
- `notices`: single lines for the user, each once.
- `threads`: threads by objects of their own.
- `autocast`: the dtype under autocast.
- `journal`: writes that are undone together, when one fails or later.
"""
