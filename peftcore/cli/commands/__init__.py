"""The commands, each in the module of its kind: it reads options, calls its job and prints the result."""

from peftcore.cli.app import app
from peftcore.cli.commands import adapters, authoring, comparing, inspecting, listing, searching, training

__all__ = ["adapters", "app", "authoring", "comparing", "inspecting", "listing", "searching", "training"]
