"""What the parts of a host are: `derive` reads a model, `HostMap` answers by role, `probe` refines with one forward."""

from peftcore.hosts.entries import HostEntry, Layout, Ranges
from peftcore.hosts.hostmap import HostMap
from peftcore.hosts.rules import derive
from peftcore.hosts.tracing import probe
from peftcore.hosts.vocabulary import ROLES

__all__ = ["ROLES", "HostEntry", "HostMap", "Layout", "Ranges", "derive", "probe"]
