"""The output of the commands that change nothing: methods, show, plan, tree, doctor.

It may import the core and `peftcore.cli.pages`. In the order of reading:

- `methods_table`: the methods as a table.
- `show`: the description of a method.
- `folded_paths`: joins paths that differ only in numbers.
- `costs_page`: the costs of a method.
- `host_tree`: a host as a folded tree, and the changes that methods would make in it.
- `doctor`: reports installed and broken parts.
"""
