"""The core's commands, each in the module of its kind: it reads options, calls its job and prints the result.

They may import all of the command line and the layers below it, inside their functions, so that the command line starts
quickly. In the order of reading: `listing`, `inspecting`, `adapters`, `program_exports`, `authoring`;
`_adapter_options` holds the options that commands on adapter files share, `_method_options` the options of methods as
flags.
"""

from peftcore.cli.app import app
from peftcore.cli.commands import adapters, authoring, inspecting, listing, program_exports

__all__ = ["adapters", "app", "authoring", "inspecting", "listing", "program_exports"]
