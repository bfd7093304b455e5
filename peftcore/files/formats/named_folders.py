"""Finds the folders of other adapters that an adapter's file lists, and renames their tensors as parts of that adapter.

A name in a file is only looked up as a local folder: nothing is downloaded, imported or executed. The folder is read
like any other adapter.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from peftcore.contract.surgeon_protocol import Surgeon
from peftcore.errors import CheckpointError, shown
from peftcore.files.formats.hub import IDENTIFIER, is_fetched


def named_folder(name: str, beside: Path, where: Path) -> Path:
    """Returns the folder with the path `name`, relative to the file's folder or to the working directory. If that
    folder does not exist (the files may have been moved), returns the folder next to the file that is called as the
    last part of `name`.

    Args:
        beside: the folder that contains the file.
        where: the file, for error messages.

    Raises:
        CheckpointError: the folder does not exist, or two match; or the file was downloaded from a hub and names a
            folder outside of the downloaded folder.
    """
    path, own, from_elsewhere = Path(name), beside.resolve(), is_fetched(beside)

    def there(*places: Path) -> list[Path]:
        found = dict.fromkeys(place.resolve() for place in places if name and os.path.isdir(place))
        return [place for place in found if not from_elsewhere or own in place.parents]  # none of this machine's

    found = there(beside / path, path) or there(beside / path.name)
    if len(found) == 1:
        return found[0]
    if found:
        both = " and ".join(map(str, found))
        raise CheckpointError(
            f"{where} names the adapter {shown(name)}, which matches {both}: write the full path of one"
        )
    if IDENTIFIER.fullmatch(name):
        raise CheckpointError(
            f"{where} names the adapter {shown(name)}, which is not a folder here; if it is a repository on the "
            f"hub, fetch it (hf download {name} --local-dir FOLDER) and write FOLDER instead"
        )
    raise CheckpointError(
        f"{where} names the adapter {shown(name)}, and no such folder exists, neither as given nor next to the file; "
        "write its full path"
    )


def of_part(tensors: Mapping[str, Tensor], part: str, whole: Surgeon) -> dict[str, Tensor]:
    """Returns the tensors of one part of a hybrid, keyed by their names in a file of the whole hybrid. In `tensors`,
    they have the names of a file of the part alone. The part's operators may be submodules of the hybrid's operators.

    Args:
        part: the name of the part.
    """
    owners = {id(inner): f"{graft.key}.{path}".removesuffix(".") for graft in whole.grafts
              for path, inner in graft.operator.named_modules()}  # fmt: skip
    recorder = whole.parts[part]
    places = {graft.key: owners[id(graft.operator)] for graft in recorder.grafts}
    return {_renamed(name, part, places): value for name, value in tensors.items()}


def _renamed(name: str, part: str, places: Mapping[str, str]) -> str:
    if name.startswith("shared:"):
        return f"shared:{part}/{name.removeprefix('shared:')}"
    beginnings = [name[:end] for end, sign in enumerate(name) if sign == "."]
    key = max((each for each in beginnings if each in places), key=len)
    return places[key] + name.removeprefix(key)
