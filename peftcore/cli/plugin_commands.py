"""The commands that plugins register through the hook `peftcore_commands`."""

from __future__ import annotations

from typing import Any

import typer
import typer.main

from peftcore.errors import PluginError
from peftcore.registry.plugins import registry


def commands(taken: tuple[str, ...]) -> dict[str, Any]:
    """Return the commands of all plugins, keyed by name. If the commands of a plugin cannot be built, or one of them
    has a name that is taken, none of this plugin's commands is added, and the plugin is recorded as a failure. Commands
    of other plugins are not affected.

    Args:
        taken: the names of the core's commands, which plugins cannot use.
    """
    found: dict[str, Any] = {}
    owners = dict.fromkeys(taken, "peftcore itself")
    loaded = registry()
    hook = loaded.manager.hook.peftcore_commands
    for implementation in hook.get_hookimpls():
        name, plugin = implementation.plugin_name, implementation.plugin
        others = [each for each in loaded.manager.get_plugins() if each is not plugin]
        app = typer.Typer()
        try:
            loaded.manager.subset_hook_caller("peftcore_commands", others)(app=app)
            own = dict(typer.main.get_group(app).commands)
            if twice := sorted(own.keys() & owners.keys()):
                raise PluginError(f"its command {twice[0]!r} is taken by {owners[twice[0]]}")
        except Exception as error:  # any error of a plugin is that plugin's alone
            if name not in {each.name for each in loaded.failures}:
                known = loaded.plugins.get(name)
                loaded.fail(name, known.distribution if known else "unknown distribution", error)
            continue
        found |= own
        owners |= dict.fromkeys(own, name)
    return found
