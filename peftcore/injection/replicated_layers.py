"""Makes a model run some of its layers several times with the same weights (`layer_replication` of peft), and detects
such layers."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from torch import nn

from peftcore.errors import UnsupportedHost
from peftcore.injection.injection import injections
from peftcore.layers.adapter_modules import ADAPTER_MODULES
from peftcore.layers.model_locks import changing
from peftcore.utils.journal import Journal

Ranges = Sequence[Sequence[int]]
"""Ranges of layer numbers, each as its first number and the number after its last: ``[[0, 4], [2, 5]]``."""


def replicate_layers(model: nn.Module, ranges: Ranges, path: str | None = None) -> None:
    """Make a model run ranges of its layers, one range after the other. With ``[[0, 4], [2, 5]]`` it runs the layers 0,
    1, 2, 3, 2, 3, 4. A repeated layer shares its weights with the first one, so it needs no memory for weights. Its
    adapters are separate.

    Call it before adapters are applied. The model is changed in place, and the number of layers in its configuration is
    updated.

    Args:
        model: the model.
        ranges: the ranges of layer numbers, as in peft's `layer_replication`.
        path: the path of the list of layers; needed if the model has several lists.

    Raises:
        UnsupportedHost: the model lacks a list of layers, or has several; a range is outside of the list; or the model
            is adapted already.
    """
    with changing(model):
        if injections(model):
            raise UnsupportedHost("layers can be replicated only in a model without adapters: remove() them first")
        path = _stack(model) if path is None else path
        layers = model.get_submodule(path)
        numbers = [number for start, stop in ranges for number in range(start, stop)]
        if not isinstance(layers, nn.ModuleList) or not numbers or not all(0 <= n < len(layers) for n in numbers):
            raise UnsupportedHost(
                f"{path} has no layers {ranges}; it is a {type(layers).__name__} of {_length(layers)}. Pass ranges of "
                "existing layers"
            )
        parent, _, name = path.rpartition(".")
        made = nn.ModuleList(_again(layers[number], index) for index, number in enumerate(numbers))
        made.replicated = [list(each) for each in ranges]  # type: ignore[assignment]
        config: Any = getattr(model, "config", None)
        with Journal() as journal:
            journal.set(model.get_submodule(parent), name, made)
            if getattr(config, "num_hidden_layers", None) is not None:
                journal.set(config, "num_hidden_layers", len(numbers))
            if isinstance(kinds := getattr(config, "layer_types", None), list):
                journal.set(config, "layer_types", [kinds[number] for number in numbers])


def replicated_layers(model: nn.Module) -> dict[str, list[list[int]]]:
    """Returns the ranges of layers that a model runs, by the path of the list of layers (`nn.ModuleList`). Lists
    without a repeated layer are left out."""
    found = {}
    for path, layers in model.named_modules():
        if isinstance(layers, nn.ModuleList) and len(order := _order(layers)) > len(set(order)):
            found[path] = getattr(layers, "replicated", None) or _ranges(order)
    return found


def runs(model: nn.Module, ranges: Ranges) -> bool:
    """Whether a model runs its layers in these ranges. Layers that share all weights count as the same layer."""
    numbers = [number for start, stop in ranges for number in range(start, stop)]
    wanted = [list(dict.fromkeys(numbers)).index(number) for number in numbers]
    return any(isinstance(each, nn.ModuleList) and _order(each) == wanted for each in model.modules())


def _again(layer: nn.Module, index: int) -> nn.Module:
    """Returns a copy of a layer that shares its parameters and buffers, with `layer_idx` set to the new position."""
    shared: dict[int, Any] = {id(each): each for each in (*layer.parameters(), *layer.buffers())}
    made = copy.deepcopy(layer, shared)
    for module in made.modules():
        if isinstance(getattr(module, "layer_idx", None), int):  # by which transformers finds its place in a cache
            module.layer_idx = index  # type: ignore[assignment]
    return made


def _order(layers: nn.ModuleList) -> list[int]:
    """Returns a number for each layer, the same for layers with the same weights. Numbers count up in the order of
    first occurrence. A layer without weights gets a number of its own."""
    keys = [tuple(_weights(layer)) or (id(layer),) for layer in layers]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return [numbers[key] for key in keys]


def _weights(layer: nn.Module) -> Iterator[int]:
    """Yields the ids of the layer's own parameters. Parameters of adapters on the layer are left out."""
    for path, parameter in layer.named_parameters():
        if ADAPTER_MODULES not in path.split("."):
            yield id(parameter)


def _ranges(order: Sequence[int]) -> list[list[int]]:
    starts = [0, *(index for index, (one, two) in enumerate(pairwise(order), 1) if two != one + 1), len(order)]
    return [[order[start], order[stop - 1] + 1] for start, stop in pairwise(starts)]


def _stack(model: nn.Module) -> str:
    """Returns the path of the model's outermost list of layers; a model with several such lists is an error."""
    lists = {path: each for path, each in model.named_modules() if isinstance(each, nn.ModuleList) and len(each)}
    outer = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists if other != path)]
    if len(outer) != 1:
        raise UnsupportedHost(f"the model has {len(outer)} lists of layers: pass path=, one of {sorted(outer)}")
    return str(outer[0])


def _length(layers: nn.Module) -> str:
    return f"{len(layers)}" if isinstance(layers, nn.ModuleList) else "no layers"
