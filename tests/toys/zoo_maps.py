"""Host maps of the zoo, made once."""

from __future__ import annotations

from functools import cache

from more_hosts import build

from peftcore.roles import HostMap, derive


@cache
def host_of(name: str) -> HostMap:
    return derive(build(name)[0])


def paths(host: HostMap, role: str, tower: str | None = None) -> list[str]:
    return [entry.path for entry, _ in host.select(role, tower)]
