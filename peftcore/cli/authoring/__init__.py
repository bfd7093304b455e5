"""A plugin to start from: ``peftcore new`` and its templates.

It may import the core and `peftcore.cli.pages`. It holds `new`, and as `templates` what that writes.
"""
