"""Names of parts that the sites of one stack share."""


def part_name(*parts: str) -> str:
    """Return the name of a shared part, made of its kind and its location."""
    return "/".join(filter(None, parts)).replace(".", "/").replace("*", "n").replace(":", "/")
