"""Formats of adapter files: our own, and those of other libraries, one module for each format.

`format` has the base class of formats. `peft_method`, `kohya_method` and `adapterhub` have base classes for
translations: a plugin subclasses one to read and write its method in the files of that library.
"""
