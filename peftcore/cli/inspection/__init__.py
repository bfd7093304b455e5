"""The output of the commands that only show information: methods, show, plan, tree, doctor.

It may import the core and `peftcore.cli.pages`. In the order of reading:

- `methods_table`: the methods as a table.
- `show`: the description of a method.
- `folded_paths`: combines paths that differ only in numbers, such as ``layers.{0..23}``.
- `costs_page`: the costs of a method.
- `host_tree`: a host as a tree with one line for equal modules, and the changes that methods would make in it.
- `doctor`: reports installed and broken parts.
"""
