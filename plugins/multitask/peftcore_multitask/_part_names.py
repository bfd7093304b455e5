"""Names of modules that several sites share."""


def part_name(*parts: str) -> str:
    """Return the name of a module that several sites share, built from its kind and its location."""
    return "/".join(filter(None, parts)).replace(".", "/").replace("*", "n").replace(":", "/")
