"""The stacks of a host: the modules that take token ids, embed them, and run the blocks.

Operators that change a sequence act at a stack instead of the root model that the user calls: `generate` runs only the
encoder at first, `get_text_features` runs a tower, and multimodal models merge images and pass embeddings to a stack.
Stacks are found by signatures and by the roles of the modules inside them, never by class names.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.errors import SequenceError
from peftcore.roles import vocabulary as V
from peftcore.roles.entries import HostEntry
from peftcore.roles.survey import attribute

IDS = "input_ids"
EMBEDS = "inputs_embeds"
MEMORY = "encoder_hidden_states"
CACHES = frozenset({"cache", "past_key_values", "past_key_value", "layer_past", "cache_params"})
"""Names of the arguments with which models and blocks of transformers get the cache of earlier tokens."""
_TABLES = ("table", "raw", "tensor")
NEED_IDS = frozenset({"per_layer_inputs"})
"""Arguments of stacks that are computed from the ids in addition to embeddings, so that embeddings alone are not
enough."""


@dataclass(frozen=True)
class TokenStack:
    """One token stack (a module that takes token ids, embeds them and runs blocks), described by paths."""

    path: str
    """The path of the stack; "" for the host itself."""
    entry: str
    """The module that accepts embeddings instead of ids: the stack itself, or its embedding module (CLIP's text
    tower)."""
    body: str
    """The module that contains all blocks; poolers run after it."""
    table: str
    """The path of the token table below the stack."""
    causal: bool = False
    """Whether each token attends only to itself and to earlier tokens."""
    position_padding: int | None = None
    """The token id of padding, which is also the position of padding, if positions count only the other tokens
    (RoBERTa). None if positions count all tokens."""
    readers: tuple[str, ...] = ()
    """The stacks that attend to this stack's output."""
    reads: bool = False
    """Whether it attends to the output of another stack."""
    takes_cache: bool = False
    """Whether it accepts a cache of earlier tokens, after which its sequence continues."""
    positions: int | None = field(default=None, repr=False)
    """The number of positions in its table; None if positions are not in a table (rotary angles, biases by
    distance)."""

    @property
    def role(self) -> str:
        """The stack's role in the host map."""
        return "stack.decoder" if self.reads else "stack"

    def check_positions(self, front: int, text: int, places: Tensor | None, what: str = "rows") -> None:
        """Verify that the table has enough positions for a text and the rows in front of it.

        Args:
            front: the number of rows in front.
            text: the number of tokens in the text, including a cache.
            places: the positions of rows and tokens, if they are known. Padding tokens may lack positions.
            what: the name of the rows in front, for the error message.

        Raises:
            SequenceError: the table has fewer positions.
        """
        if self.positions is None or torch.compiler.is_compiling():
            return
        first = 0 if self.position_padding is None else self.position_padding + 1
        most, whole = self.positions - first, front + text
        if whole > most and places is not None:  # nearly nobody waits for this look
            whole = int(places.max()) + 1 - first
        if whole > most:
            raise SequenceError(
                f"{self.path or 'the host'} has {most} positions, but {front} {what} in front of a text of "
                f"{whole - front} tokens need {whole}: shorten the text, or use fewer {what}"
            )


def arguments(cls: type[nn.Module]) -> tuple[str, ...]:
    """Returns the names of the arguments of a class's forward; for a grafted class, those of its base."""
    return _arguments(cls.forward)


@functools.lru_cache(maxsize=1024)
def _arguments(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]


def bound(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a module's forward by name; the entries of ``**kwargs`` are merged with the named
    arguments."""
    signature = inspect.signature(module.forward)
    arguments = dict(signature.bind_partial(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(name, {}))
    return arguments


def is_cache(value: Any) -> bool:
    """Whether a value is a cache of transformers. This does not import transformers: if it is not imported, the answer
    is False."""
    utils = sys.modules.get("transformers.cache_utils")
    return utils is not None and isinstance(value, utils.Cache)


def caches_in(given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the caches among a module's arguments by name: values that are caches, and arguments with a name in
    `CACHES`."""
    return {name: value for name, value in given.items() if value is not None and (name in CACHES or is_cache(value))}


def cache_in(given: Mapping[str, Any]) -> Any:
    """Returns the cache of earlier tokens from the arguments of a transformers module; None without a cache."""
    found = caches_in(given)
    return found[min(found)] if found else None


def find(modules: Mapping[str, nn.Module], entries: Iterable[HostEntry]) -> list[TokenStack]:
    """Returns every stack of a host, given its modules by path and their entries."""
    places: dict[str, list[HostEntry]] = {}
    for entry in entries:
        places.setdefault(entry.role, []).append(entry)
    tables = {id(table) for table in _tables(modules, places.get("embed", []))}
    blocks = [entry.path for entry in places.get("block", [])]
    if not tables or not blocks:
        return []
    classes = {cls for cls in {type(module) for module in modules.values()} if IDS in arguments(cls)}
    candidates = [path for path, module in modules.items() if type(module) in classes and _below(blocks, path)]
    stacks = []
    for path in candidates:
        if not any(other != path and _inside(other, path) for other in candidates):
            stack = _describe(modules, path, tables, blocks, places.get("embed.pos", []))
            stacks += [stack] if stack is not None else []
    cross = [entry.path for role, found in places.items() if role.startswith("cross") for entry in found]
    return _related(stacks, cross)


def _related(stacks: list[TokenStack], cross: list[str]) -> list[TokenStack]:
    """Returns the stacks with their readers. If some stacks have cross-attention and others do not, those with
    cross-attention read the others."""
    reading = {stack.path for stack in stacks if _below(cross, stack.path)}
    if len(reading) in (0, len(stacks)):
        return stacks
    readers = tuple(stack.path for stack in stacks if stack.path in reading)
    return [_joined(stack, stack.path in reading, readers) for stack in stacks]


def _joined(stack: TokenStack, reads: bool, readers: tuple[str, ...]) -> TokenStack:
    return replace(stack, readers=() if reads else readers, reads=reads)


def _describe(
    modules: Mapping[str, nn.Module],
    path: str,
    tables: set[int],
    blocks: list[str],
    positions: list[HostEntry],
) -> TokenStack | None:
    """Returns the token stack at a path; None if embeddings cannot be passed to it instead of ids."""
    module = modules[path]
    embeddings = (
        name for name, below in module.named_modules() if isinstance(below, nn.Embedding) and _weight(below) in tables
    )
    table = next(embeddings, None)
    if table is None or NEED_IDS.intersection(arguments(type(module))):
        return None
    entry = _entry(modules, path, table)
    if entry is None:
        return None
    return TokenStack(
        path,
        entry,
        _body(modules, path, blocks),
        table,
        _causal(modules, path, blocks),
        _padding(modules, path, positions),
        takes_cache=_takes_cache(module),
        positions=_positions(modules[path], path, blocks, positions),
    )


def _takes_cache(module: nn.Module) -> bool:
    return not CACHES.isdisjoint(arguments(type(module)))


def _causal(modules: Mapping[str, nn.Module], path: str, blocks: list[str]) -> bool:
    """Whether some attention in the stack's blocks has a true attribute `is_causal`. If none has the attribute, a stack
    with a cache counts as causal."""
    tops = {block for block in blocks if _inside(block, path)}
    inside = [module for place, module in modules.items() if not tops.isdisjoint(_from(place))]
    said = {attribute(module, "is_causal") for module in inside} - {None}
    return True in said or (not said and _takes_cache(modules[path]))


def _entry(modules: Mapping[str, nn.Module], path: str, table: str) -> str | None:
    """Returns the outermost module from the stack down to its table that takes embeddings."""
    steps = table.split(".")
    below = [".".join(steps[:depth]) for depth in range(len(steps))]
    ways = [f"{path}.{step}".strip(".") for step in below]
    return next((way for way in ways if way in modules and {IDS, EMBEDS} <= set(arguments(type(modules[way])))), None)


def _body(modules: Mapping[str, nn.Module], path: str, blocks: list[str]) -> str:
    """Returns the path of the stack itself if the list of blocks is a child of it, otherwise the path of the child that
    contains all blocks."""
    inside = [block for block in blocks if _inside(block, path)]
    depth = len(path.split(".")) if path else 0
    children = {".".join(block.split(".")[: depth + 1]) for block in inside}
    child = children.pop()
    listed = isinstance(modules[child], nn.ModuleList | nn.ModuleDict | nn.Sequential)
    return path if children or listed or child in inside else child


def _padding(modules: Mapping[str, nn.Module], path: str, positions: list[HostEntry]) -> int | None:
    """Returns the padding index of the position table, or None. With a padding index, positions count only tokens that
    are not padding; without one, they count all tokens."""
    tables = [modules[entry.path] for entry in positions if entry.tensor is None and _inside(entry.path, path)]
    return next((table.padding_idx for table in tables if isinstance(table, nn.Embedding)), None)


def _positions(stack: nn.Module, path: str, blocks: list[str], positions: list[HostEntry]) -> int | None:
    """Returns the length of the longest position table outside of the blocks; None if there is no such table. If the
    config declares a smaller number of positions, that number is returned, since some rows of the table may not be
    positions."""
    tops = tuple(f"{block}." for block in blocks)
    tables = [e for e in positions if _inside(e.path, path) and not e.path.startswith(tops) and e.kind in _TABLES]
    counts = [e.shape[-2] for e in tables if len(e.shape) > 1 and not V.words(e.path) & V.RELATIVE]
    if not counts:
        return None
    said = getattr(attribute(stack, "config"), "max_position_embeddings", None)
    return min(max(counts), said) if isinstance(said, int) else max(counts)


def _tables(modules: Mapping[str, nn.Module], entries: list[HostEntry]) -> Iterable[nn.Parameter]:
    weights = (modules[entry.path]._parameters.get("weight") for entry in entries if entry.path in modules)
    return (weight for weight in weights if weight is not None)


def _weight(module: nn.Module) -> int:
    return id(module._parameters.get("weight"))


def _from(path: str) -> Iterable[str]:
    """Yields a path and all paths above it, except the host's."""
    while path:
        yield path
        path = path.rpartition(".")[0]


def _inside(path: str, top: str) -> bool:
    return path != top and (not top or path.startswith(f"{top}."))


def _below(paths: Iterable[str], top: str) -> bool:
    return any(_inside(path, top) for path in paths)
