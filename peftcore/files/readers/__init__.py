"""Rules of how other programs read an adapter's file: peft, servers of language models, image generators.

It may import `files.formats`, and what is below. In the order of reading:

- `reader`: what one program does with each option and tensor, as data; one file of ``rules/`` a program.
- `check`: what a program would read, change, drop or refuse of a file, without any model.
"""
