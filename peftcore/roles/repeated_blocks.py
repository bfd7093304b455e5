"""The blocks that repeat along the depth of a host: rule R8 of `docs/roles.md`."""

from __future__ import annotations

from torch import nn

from peftcore.roles import vocabulary as V
from peftcore.roles.mixers import Mixers
from peftcore.roles.survey import Kind, Node, Ordered, Survey


class Blocks:
    """Finds the blocks of a host (the modules that repeat along its depth, such as transformer layers) among the
    elements of its lists of modules. Sets `is_block` and `block` of all nodes."""

    def __init__(self, survey: Survey, mixers: Mixers) -> None:
        self.survey = survey
        self.mixers = mixers
        self.lists = {node: elements for node in survey.nodes if (elements := list_elements(node))}
        self.elements = [element for elements in self.lists.values() for element in elements]
        self._matrices_beside = self._count_beside_mixers()
        self.blocks = Ordered(self._find())
        self._mark()

    def _find(self) -> list[Node]:
        found = self._innermost()
        self._add_cousins(found)
        self._add_siblings(found)
        return list(found)

    def _innermost(self) -> dict[Node, None]:
        """Returns the list elements that contain a mixer (attention or state space), or that are blocks without a mixer
        (`_has_body`). If such elements are nested, only the innermost ones are returned.

        Exception: T5 lists its sub-layers, some with a mixer and some without. There the owner of the list is the
        block, because an element is then a branch of a block and not a whole one.
        """
        candidates = Ordered(e for e in self.elements if self.mixers.nodes.count(e) or self._has_body(e))
        complete = Ordered(e for e in candidates if self.mixers.nodes.count(e) and self._matrices_beside[e.index])
        mixed = Ordered(owner for owner, elements in self.lists.items() if self._is_mixed(elements))
        with_mixer, listed = set(complete), set(mixed)
        chosen: dict[Node, None] = {}
        for node in candidates:
            innermost = candidates.count(node) == 1
            lists_branches = mixed.count(node) > (node in listed)
            owner = node in with_mixer and complete.count(node) == 1 and lists_branches
            if (innermost or owner) and not any(ancestor in chosen for ancestor in node.ancestors()):
                chosen[node] = None
        return chosen

    def _is_mixed(self, elements: list[Node]) -> bool:
        holds = [self.mixers.nodes.count(element) > 0 for element in elements]
        return any(holds) and not all(holds)

    def _has_body(self, element: Node) -> bool:
        """Whether an element is a block without a mixer. It has at least two weights. In addition, it has two norms, or
        a convolution and one norm, or (in networks without norms) a third weight and a convolution, unless it is the
        stem."""
        weights, convs = self.survey.weights.count(element), self.survey.convs.count(element)
        if self.mixers.nodes.count(element) or weights < 2:
            return False
        enough_norms = self.survey.norms.count(element) >= (1 if convs else 2)
        return enough_norms or (convs > 0 and weights >= 3 and not element.name.startswith("stem"))

    def _count_beside_mixers(self) -> list[int]:
        """Returns, for each node, the number of weights under it that are not inside a mixer."""
        counts = [0] * len(self.survey.nodes)
        mixers, weights = set(self.mixers.nodes), set(self.survey.weights)
        for node in reversed(self.survey.nodes):
            total = 0 if node in mixers else counts[node.index] + (node in weights)
            counts[node.index] = total
            if node.parent is not None:
                counts[node.parent.index] += total
        return counts

    def _add_cousins(self, found: dict[Node, None]) -> None:
        """Add the elements of stages that have only plain convolutions, if stages next to them have blocks. An example
        is the last stage of MobileNet."""
        families: dict[Node, list[Node]] = {}
        for owner in self.lists:
            if owner.parent is not None and isinstance(owner.parent.module, nn.Sequential):
                families.setdefault(owner.parent, []).append(owner)
        blocks = Ordered(found)
        for stages in families.values():
            if any(element in found for stage in stages for element in self.lists[stage]):
                for stage in stages:
                    elements = self.lists[stage]
                    if not any(blocks.count(element) for element in elements):
                        found.update(dict.fromkeys(e for e in elements if self.survey.convs.count(e)))

    def _add_siblings(self, found: dict[Node, None]) -> None:
        """Add elements that have weights and are in the same list as a block, such as the MLP-only layers of hybrid
        models."""
        blocks = Ordered(found)
        for elements in self.lists.values():
            if any(element in found for element in elements):
                for element in elements:
                    apart = not blocks.count(element) and not any(a in found for a in element.ancestors())
                    if element not in found and apart and self.survey.weights.count(element):
                        found[element] = None

    def _mark(self) -> None:
        """Set the innermost block of every node."""
        for node in self.blocks:
            node.is_block = True
        for node in self.survey.nodes:
            node.block = node if node.is_block else node.parent.block if node.parent is not None else None


def list_elements(node: Node) -> list[Node]:
    """Returns the elements of a list of modules: those children of a ModuleList or Sequential that have children
    themselves. Numbered children of one class count as a list too (layer1 and layer2 of ResNet, b1 and b2 of
    RegNet)."""
    children = node.children
    if not children:
        return []
    numbered = (
        node.parent is not None
        and all(V.NUMBERED.fullmatch(child.name) for child in children)
        and len({type(child.module) for child in children}) == 1
    )
    if not numbered and not isinstance(node.module, (nn.ModuleList, nn.Sequential)):
        return []
    return [child for child in children if child.children and child.kind in (Kind.CONTAINER, Kind.RAW)]
