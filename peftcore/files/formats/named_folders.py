"""Adapters whose file names the folders of other adapters: the paths of those folders, and their tensors in the whole.

A name in a file is looked up as a folder and as nothing else. Nothing is fetched, imported or executed; the folder is
read like any adapter.
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
    """Returns the folder that a file means by a name: of that path; or, in a file that was moved together with the
    folders in it, of the name's last step next to the file. A relative path starts from the file's folder or from the
    working directory.

    Args:
        beside: the folder of the file.
        where: the file, for messages.

    Raises:
        CheckpointError: the folder does not exist, or two match; or the file came from a hub, and names a folder
            outside of it.
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
    """Returns the tensors of one part of a hybrid by their names in the whole, from their names in a file of the part
    alone. Operators may be inside the operators of the whole.

    Args:
        part: its name.
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
