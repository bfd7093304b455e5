"""The command ``peftcore new``, which writes a new plugin package, and its templates.

It may import the core and `peftcore.cli.pages`. It contains the module `new`, and the folder `templates` with the files
to write.
"""
