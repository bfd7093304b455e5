"""The command line ``peftcore``, the face of `peftcore.comparing`: it reads options, and prints results.

Its dependencies belong to the extra ``peftcore[cli]`` and are imported when a command runs: ``import peftcore`` stays
light, and an installation without the extra says what to install instead of failing at import.

It may import all of peftcore, and nothing imports it but ``peftcore.__main__``. In the order of reading:

- `app`: the typer application, and what its commands have in common.
- `pages`: consoles, tables and JSON, of which all that is printed is made.
- `looking`: what the commands print that look and change nothing.
- `printing`: what the commands print that train.
- `adapters`: the commands on adapter files, in the words of their options.
- `authoring`: ``peftcore new``, and its templates.
- `commands`: one module a kind of command; each imports what does its work when it runs.
- `entry`: where it starts.
"""
