"""Formats of adapter files: peftcore's own, and those of other libraries. There is one module for each format.

`format` has the base class of formats. `peft_method`, `kohya_method` and `adapterhub` have base classes for
translations: a plugin writes a subclass to read and write its method in the files of peft, kohya or AdapterHub.
"""
