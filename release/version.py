"""Gives the ten packages another version: ``make version VERSION=0.2.0``.

They are released together, so each says the same version, and a plugin wants the core (and other plugins) from that
version on and below the next that may break it: the next minor one before 1.0, the next major one after.
"""

import re
import sys
from pathlib import Path

from packaging.version import InvalidVersion, Version

ROOT = Path(__file__).parents[1]
PYPROJECTS = [ROOT / "pyproject.toml", *sorted(ROOT.glob("plugins/*/pyproject.toml"))]
MODULE = ROOT / "peftcore" / "__init__.py"
CITATION = ROOT / "CITATION.cff"
VERSION = re.compile(r'^(version|__version__) = "(.*)"$', re.MULTILINE)
CITED = re.compile(r"^version: .*$", re.MULTILINE)
OURS = re.compile(r'"(peftcore(?:-[a-z]+)?(?:\[[a-z,]+\])?)>=[^"]*"')


def current() -> str:
    """The version that the core has."""
    found = VERSION.search(PYPROJECTS[0].read_text(encoding="utf-8"))
    assert found, f"{PYPROJECTS[0]} has no version"
    return found[2]


def fitting(version: str) -> str:
    """What packages of this version want of each other: ``">=0.1.0,<0.2"``."""
    parsed = Version(version)
    return f">={version},<{parsed.major + 1 if parsed.major else f'0.{parsed.minor + 1}'}"


def write(version: str) -> None:
    """Put a version everywhere."""
    for path in (*PYPROJECTS, MODULE):
        text = VERSION.sub(rf'\1 = "{version}"', path.read_text(encoding="utf-8"))
        path.write_text(OURS.sub(rf'"\1{fitting(version)}"', text), encoding="utf-8")
    CITATION.write_text(CITED.sub(f"version: {version}", CITATION.read_text(encoding="utf-8")), encoding="utf-8")


def main(wanted: str) -> None:
    try:
        version = Version(wanted)
    except InvalidVersion:
        sys.exit("which version? make version VERSION=0.2.0")
    if version <= Version(current()):
        sys.exit(f"{version} does not come after {current()}")
    write(str(version))
    print(f"{version} in {len(PYPROJECTS)} packages; then: make changelog VERSION={version}, make release-check")


if __name__ == "__main__":
    main("".join(sys.argv[1:]))
