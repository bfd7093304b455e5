"""Rules for how other programs (peft, servers of language models, image generators) read an adapter's file.

It may import `files.formats` and the layers below. In the order of reading:

- `reader`: the rules by which one program treats each option and tensor, as data; ``rules/`` has one file for each
  program.
- `check`: finds the parts of a file that a program would read, change, drop or refuse, without a model.
"""
