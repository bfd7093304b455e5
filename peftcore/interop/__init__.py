"""Adapter files: our own format, and those of other libraries, each in a module of its own.

`formats` says what a format is; `translation` what a plugin says of one method in another library's files.
"""
