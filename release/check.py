"""Builds the ten packages and holds them against what an index of packages asks for: ``make release-check``.

Each becomes a source distribution and, from that, a wheel, so that a file which the source distribution lacks is missed
here and not by users. Nothing is fetched and nothing is uploaded. ``make release-check TAG=v0.2.0`` first refuses a tag
to which versions and changelog do not fit.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

from version import PYPROJECTS, ROOT, current


def check(folder: Path) -> None:
    """Build into an empty folder, then check all that lies there."""
    if folder.exists() and any(folder.iterdir()):
        sys.exit(f"{folder} is not empty; remove it, so that nothing old is released")
    if f"\n## {current()} - " not in changelog(ROOT):
        sys.exit(f"CHANGELOG.md has no section for {current()}")
    for path in PYPROJECTS:
        run("build", "--no-isolation", "--outdir", folder, path.parent)
    built = sorted(folder.iterdir())
    strange = [path.name for path in built if f"-{current()}" not in path.name]
    if strange or len(built) != 2 * len(PYPROJECTS):
        sys.exit(f"{len(built)} files were built, wanted {2 * len(PYPROJECTS)} of {current()}; other ones: {strange}")
    run("twine", "check", "--strict", *built)


def check_tag(tag: str, root: Path = ROOT) -> None:
    """Refuse a tag of another version, or of one whose section in the changelog is not finished."""
    if tag != f"v{current()}":
        sys.exit(f"the tag {tag} is not v{current()}, the version of the packages: make version VERSION={tag[1:]}")
    section = f"## {current()} - "
    if not re.search(f"^{re.escape(section)}[0-9]{{4}}-[0-9]{{2}}-[0-9]{{2}}$", changelog(root), re.MULTILINE):
        sys.exit(f'CHANGELOG.md has no heading "{section}YEAR-MONTH-DAY": give the section of this version its date')
    if left := sorted(path.name for path in (root / "changelog.d").glob("*.*.md")):
        sys.exit(f"not yet in CHANGELOG.md: {', '.join(left)}; make changelog VERSION={current()}")


def changelog(root: Path) -> str:
    return (root / "CHANGELOG.md").read_text(encoding="utf-8")


def run(module: str, *arguments: object) -> None:
    """A module of Python as a command that must succeed; what it says is shown when it does not."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        sys.exit(f"{done.stdout}\n{' '.join(command)} failed")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "dist")
    parser.add_argument("--tag")
    given = parser.parse_args()
    if given.tag:
        check_tag(given.tag)
    check(given.folder)
    print(f"{len(list(given.folder.iterdir()))} files in {given.folder} can be released")
