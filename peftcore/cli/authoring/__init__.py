"""``peftcore new``, which writes a new plugin package, and its templates.

It may import the core and `peftcore.cli.pages`. It contains the module `new`, and the files to write in `templates`.
"""
