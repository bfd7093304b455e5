"""Adapter files: our own format, and those of other libraries, each in a module of its own.

`formats` says what a format is; `peft_method`, `kohya` and `adapterhub` what a plugin says of one method in the files
of these libraries.
"""
