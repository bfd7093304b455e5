"""The commands ``peftcore train``, ``compare``, ``search`` and ``chat``: each reads options, calls its job and prints
the result.

They import the modules that they need inside their functions, so that the command line starts quickly. In the order of
reading: `training`, `comparing`, `searching`, `chatting`. `_options` contains the options that several commands share.
"""

from __future__ import annotations

import typer

from peftcore.cli.commands._method_options import WithMethodOptions
from peftcore_lab.commands.chatting import chat
from peftcore_lab.commands.comparing import compare
from peftcore_lab.commands.searching import search
from peftcore_lab.commands.training import train


def add(app: typer.Typer) -> None:
    """Add all commands to an application."""
    app.command(cls=WithMethodOptions)(train)
    app.command(cls=WithMethodOptions)(compare)
    app.command()(search)
    app.command()(chat)
