"""The output of the commands that look and change nothing: methods, show, plan, tree, doctor.

It may import the core and `peftcore.cli.pages`. In the order of reading:

- `listing`: the methods as a table.
- `show`: all that a method says about itself.
- `folding`: paths that differ in numbers only, as one.
- `costs_page`: what a method would cost.
- `host_tree`: a host as a folded tree, and what methods would change in it.
- `doctor`: what is installed, and what of it is broken.
"""
