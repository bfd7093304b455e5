"""The commands of the core, in one module for each kind. Each command parses its options, calls the function that does
the work, and prints the result.

They may import all of the command line and the layers below it, but inside of their functions, so that the command line
starts quickly. In the order of reading: `listing`, `inspecting`, `adapters`, `program_exports`, `authoring`;
`_adapter_options` holds the options that commands on adapter files share, `_method_options` the options of methods as
flags.
"""

from peftcore.cli.app import app
from peftcore.cli.commands import adapters, authoring, inspecting, listing, program_exports

__all__ = ["adapters", "app", "authoring", "inspecting", "listing", "program_exports"]
