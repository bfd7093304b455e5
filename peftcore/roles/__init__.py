"""What the parts of a host are: `derive` reads a model, `HostMap` answers by role, `probe` refines with one forward."""

from peftcore.roles.entries import HostEntry, Layout, Ranges
from peftcore.roles.hostmap import HostMap
from peftcore.roles.rules import derive
from peftcore.roles.tracing import probe
from peftcore.roles.vocabulary import ROLES

__all__ = ["ROLES", "HostEntry", "HostMap", "Layout", "Ranges", "derive", "probe"]
