"""The command line ``peftcore``: it parses options, calls functions of peftcore, and prints their results.

The commands here inspect methods and models, and work on adapter files. The commands that train, compare and search are
in the distribution peftcore-lab. It registers them through the hook `peftcore_commands`, which any plugin can use. A
command imports its requirements only when it runs, so ``import peftcore`` stays fast.

It may import all of peftcore; in the core, only ``peftcore.__main__`` imports it. In the order of reading:

- `plugin_commands`: the commands of plugins.
- `app`: the typer application, and the shared parts of its commands.
- `pages`: helpers for printing: consoles, tables and JSON.
- `progress_display`: progress bars on standard error.
- `inspection`: the output of the commands that inspect and change nothing.
- `adapters`: the work of the commands on adapter files.
- `authoring`: ``peftcore new``, and its templates.
- `commands`: one module for each kind of command; the functions import their requirements when they run.
- `entry`: the entry point.
"""
