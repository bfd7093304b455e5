"""Builds the ten packages and holds them against what an index of packages asks for: ``make release-check``.

Each becomes a source distribution and, from that, a wheel, so that a file which the source distribution lacks is missed
here and not by users. Nothing is fetched and nothing is uploaded.
"""

import subprocess
import sys
from pathlib import Path

from version import PYPROJECTS, ROOT, current


def check(folder: Path) -> None:
    """Build into an empty folder, then check all that lies there."""
    if folder.exists() and any(folder.iterdir()):
        sys.exit(f"{folder} is not empty; remove it, so that nothing old is released")
    if f"\n## {current()} - " not in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"):
        sys.exit(f"CHANGELOG.md has no section for {current()}")
    for path in PYPROJECTS:
        run("build", "--no-isolation", "--outdir", folder, path.parent)
    built = sorted(folder.iterdir())
    strange = [path.name for path in built if f"-{current()}" not in path.name]
    if strange or len(built) != 2 * len(PYPROJECTS):
        sys.exit(f"{len(built)} files were built, wanted {2 * len(PYPROJECTS)} of {current()}; other ones: {strange}")
    run("twine", "check", "--strict", *built)


def run(module: str, *arguments: object) -> None:
    """A module of Python as a command that must succeed; what it says is shown when it does not."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        sys.exit(f"{done.stdout}\n{' '.join(command)} failed")


if __name__ == "__main__":
    where = Path(*sys.argv[1:]) if sys.argv[1:] else ROOT / "dist"
    check(where)
    print(f"{len(list(where.iterdir()))} files in {where} can be released")
