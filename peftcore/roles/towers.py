"""Towers: the sub-model of a host to which a node belongs, and the index of its layer.

A tower is one of several sub-models with separate blocks: CLIP's text and vision models, LLaVA's vision tower and
language model. Encoder and decoder are two halves of one model and count as one tower, and so do the stages of a
network.
"""

from __future__ import annotations

from peftcore.roles.repeated_blocks import Blocks
from peftcore.roles.survey import Node, Survey
from peftcore.roles.vocabulary import tokens

HALVES = frozenset({"encoder", "decoder"})
STAGES = frozenset({"block", "blocks", "layer", "layers", "stage", "stages", "down", "up", "mid"})


class Towers:
    def __init__(self, survey: Survey, blocks: Blocks) -> None:
        self._blocks = blocks
        self.roots = self._find(survey.root)

    def of(self, survey: Survey) -> list[str]:
        """Returns the tower of each node: the path of the nearest tower root that contains it; "" outside of towers."""
        towers: list[str] = []
        for node in survey.nodes:
            inherited = towers[node.parent.index] if node.parent is not None else ""
            towers.append(node.path if node in self.roots else inherited)
        return towers

    def _find(self, node: Node) -> set[Node]:
        """Returns the roots of the towers under a node. A module with several children that contain blocks has towers:
        those of these children that are neither halves (encoder, decoder) nor stages."""
        if node.is_block or node in self._blocks.lists:
            return set()
        holding = [child for child in node.children if self._blocks.blocks.count(child)]
        found = {child for child in holding if len(holding) > 1 and self._stands_alone(child)}
        for child in holding:
            found |= self._find(child)
        return found

    def _stands_alone(self, child: Node) -> bool:
        """Whether a child is neither a block nor a list of blocks or stages, and does not have the name of a half
        (encoder, decoder) or of a stage."""
        part = child.is_block or child in self._blocks.lists or STAGES.intersection(tokens(child.name))
        return not part and child.name not in HALVES


def layers(blocks: Blocks) -> dict[Node, int]:
    """Returns the index of each block among the blocks of its list."""
    counts: dict[Node | None, int] = {}
    numbered = {}
    for block in blocks.blocks:
        numbered[block] = counts.setdefault(block.parent, 0)
        counts[block.parent] += 1 + len(block.twins)
    return numbered
