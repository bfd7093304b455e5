"""Rules of how other programs read an adapter's file: peft, servers of language models, image generators.

It may import `files.formats`, and what is below. In the order of reading:

- `reader`: how one program treats each option and tensor, as data; one file of ``rules/`` a program.
- `check`: the parts of a file that a program would read, change, drop or refuse, without any model.
"""
