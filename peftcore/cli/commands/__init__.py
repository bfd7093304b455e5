"""The commands, each in the module of its kind: it reads options, calls its job and prints the result.

They may import all of the command line and what lies below it, inside their functions, so that the command line starts
quickly. In the order of reading: `listing`, `inspecting`, `training`, `comparing`, `searching`, `adapters`,
`authoring`; `_options` are those that commands of training have in common.
"""

from peftcore.cli.app import app
from peftcore.cli.commands import adapters, authoring, comparing, inspecting, listing, searching, training

__all__ = ["adapters", "app", "authoring", "comparing", "inspecting", "listing", "searching", "training"]
