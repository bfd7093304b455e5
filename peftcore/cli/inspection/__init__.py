"""The output of the commands that look and change nothing: methods, show, plan, tree, doctor.

It may import the core and `peftcore.cli.pages`. In the order of reading:

- `methods_table`: the methods as a table.
- `show`: all that a method says about itself.
- `folded_paths`: paths that differ in numbers only, as one.
- `costs_page`: the costs of a method.
- `host_tree`: a host as a folded tree, and the changes that methods would make in it.
- `doctor`: the installed parts, and those that are broken.
"""
