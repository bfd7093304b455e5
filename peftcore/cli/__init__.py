"""The command line ``peftcore``: it reads options, and prints results.

Its own commands look at methods, models and adapter files; those that train, compare and search are in the distribution
peftcore-lab, which registers them as any plugin does, through the hook `peftcore_commands`. A command imports its
requirements when it runs: ``import peftcore`` stays light.

It may import all of peftcore, and nothing of the core imports it but ``peftcore.__main__``. In the order of reading:

- `plugin_commands`: the commands of plugins.
- `app`: the typer application, and the shared parts of its commands.
- `pages`: consoles, tables and JSON, of which all that is printed is made.
- `progress_display`: bars on standard error.
- `inspection`: the output of the commands that inspect and change nothing.
- `adapters`: the commands on adapter files, in the words of their options.
- `authoring`: ``peftcore new``, and its templates.
- `commands`: one module a kind of command; each imports what does its work when it runs.
- `entry`: where it starts.
"""
