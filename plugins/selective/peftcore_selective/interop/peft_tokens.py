"""Trainable tokens in peft's files, alone or together with LoRA (checked against peft 0.21).

``trainable_tokens_delta`` contains the rows that replace rows of the token embedding, in the order of the option
`token_indices`. peftcore stores the rows in ascending order of the token ids.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Size, Tensor, nn

from peftcore.author.formats import Found, Group, Keys, PeftMethod, Place
from peftcore.errors import CheckpointError


class PeftTokens(PeftMethod):
    """Translates the trained rows of one token embedding."""

    methods = ("trainable_tokens",)
    below = ("trainable_tokens_delta",)
    beside: ClassVar[Mapping[str, str]] = {"trainable_tokens_delta": "token_adapter.trainable_tokens_delta"}

    def options(self, keys: Keys, shapes: Mapping[str, Size]) -> dict[str, Any]:
        tokens = keys.take("token_indices", list)
        keys.pass_over("init_weights")
        if not all(type(each) is int for each in tokens):
            raise CheckpointError(f"{keys.where}: trainable tokens must be a list of token ids")
        return {"method": "trainable_tokens", "token_indices": tokens}

    def own(self, groups: Sequence[Group], model: nn.Module, read: Callable[[str], Tensor]) -> list[Group]:
        """Return the groups of a file. Groups of tied embeddings become one group if they have the same rows, since
        peft writes each of them."""
        modules, kept = dict(model.named_modules()), dict[int, tuple[Tensor, Group]]()
        apart = []
        for group in sorted(groups, key=lambda group: not isinstance(modules[group.path], nn.Embedding)):
            (rows,) = map(read, group.names.values())
            first, _ = kept.setdefault(id(modules[group.path]._parameters.get("weight")), (rows, group))
            if not torch.equal(first, rows):
                apart.append(group)
        return [*(group for _, group in kept.values()), *apart]

    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        (alone,) = self.below
        name = self.beside[alone] if found.has(self.beside[alone]) else alone
        if len(place.graft.holders) > 1 and not isinstance(place.site.module, nn.Embedding):
            found.wrong.append(f"{place.site.path} is tied to a table in which peft does not train these tokens")
        tokens = place.config.token_indices
        rows = found.take(name, place.operator.value.shape)
        return {"value": rows[sorted(range(len(tokens)), key=tokens.__getitem__)]}

    def write_options(self, config: Any) -> dict[str, Any]:
        return {"token_indices": sorted(config.token_indices)}

    def write(self, place: Place) -> dict[str, Tensor]:
        return {self.below[0]: place.operator.value.detach()}
