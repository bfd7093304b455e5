"""Formats of adapter files: our own, and those of other libraries, one module for each format.

`format` has the base class of formats; `peft_method`, `kohya_method` and `adapterhub` have the base classes by which a
plugin translates one method for the files of these libraries.
"""
