"""BD-LoRA in peft's files: the option `use_bdlora` selects the factor with blocks for each module, by parts of its
name.

The blocks of a factor are stacked vertically, as in peftcore. If the option selects neither factor for a module, peft
uses plain LoRA there. peftcore reads it as BD-LoRA with a single block.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Size, nn

from peftcore.author.formats import Keys, Place, is_one_of, module_key
from peftcore.errors import CheckpointError, ExportError
from peftcore_reparameterized.interop.peft_lora.variant import LoRAVariant

BLOCKS = ("target_modules_bd_a", "target_modules_bd_b")
"""The options with parts of module names: modules whose A is block diagonal, and modules whose B is."""


class BDLoRAVariant(LoRAVariant):
    """Low-rank factors, one of which is block diagonal."""

    reads = "bd_lora"
    writes = ("bd_lora",)

    def marked(self, keys: Keys) -> bool:
        return bool(keys.table("use_bdlora"))

    def options(self, keys: Keys, shapes: Mapping[str, Size], common: Mapping[str, Any]) -> dict[str, Any]:
        inside = Keys(keys.table("use_bdlora"), keys.where)
        inside.pass_over("match_strict", BLOCKS[1])
        own = {"blocks": inside.take("nblocks", int, 1), "cut_inputs": ["*"] if inside.names(BLOCKS[0]) else []}
        inside.check_known()
        return {**common, **own}

    def changes(self, keys: Keys, paths: Collection[str]) -> dict[str, dict[str, Any]]:
        """Returns `use_bdlora` for each module, by path. Each of its two lists contains only this path, or is empty."""
        told, found = keys.table("use_bdlora"), {}
        for path in paths:
            hit = {name: _names_part(told, name, path, keys) for name in BLOCKS}
            if all(hit.values()):
                raise CheckpointError(f"{keys.where}: 'use_bdlora' has blocks in both factors of {path}")
            if told.get("match_strict", True) and not any(hit.values()):
                raise CheckpointError(f"{keys.where}: 'use_bdlora' has no blocks for {path}, and match_strict")
            cut = {name: [path] if hit[name] else [] for name in BLOCKS}
            count = told.get("nblocks") if any(hit.values()) else 1
            found[path] = {"use_bdlora": {**told, **cut, "nblocks": count}}
        return found

    def differs(self, place: Place) -> str:
        linear = is_one_of(place.site, (nn.Linear,))
        return "" if linear else "factors in blocks, which it has only in linear layers"

    def write_options_of_all(self, places: Sequence[Place]) -> dict[str, Any]:
        """Returns `use_bdlora` with its two lists of module names. A name must not be part of the name of another
        module."""
        blocks = {module_key(place.site): place.operator for place in places}
        counts = {each.blocks for each in blocks.values()} - {1}
        if len(counts) > 1:
            raise ExportError(f"peft has one number of blocks, but these have {sorted(counts)}")
        cut = [
            [path for path, each in blocks.items() if each.blocks > 1 and each.cut_A is side] for side in (True, False)
        ]
        for path, each in blocks.items():
            hit = [any(part in path for part in names) for names in cut]
            if hit != [each.blocks > 1 and each.cut_A, each.blocks > 1 and not each.cut_A]:
                raise ExportError(
                    f"peft names modules by parts of their names, and {path} has one in common with another module"
                )
        lists = dict(zip(BLOCKS, cut, strict=True))
        return {"use_bdlora": {**lists, "nblocks": max(counts, default=1), "match_strict": False}}


def _names_part(told: Mapping[str, Any], key: str, path: str, keys: Keys) -> bool:
    """Whether the list of peft's option `key` contains a part of the path."""
    return any(part in path for part in Keys(told, keys.where).names(key))
