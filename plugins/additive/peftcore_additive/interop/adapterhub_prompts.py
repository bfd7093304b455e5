"""Prefixes and prompts in AdapterHub's files (checked against adapters 1.3.0).

The rows of a prompt are inserted after the embeddings, without positions, either before the first token ("prefix") or
after it ("prefix_after_bos"). In an encoder both give the same result, except for heads that pool the first position:
the adapters package keeps the prompt's rows in the model's outputs. With "prefix" such a head reads the prompt's first
row. With "prefix_after_bos" it reads the first token, as in peftcore.

A prefix is stored in one tensor for all layers of an encoder, of a decoder, or of a decoder's cross-attentions. It has
one row for each position, with [key | value] of all layers concatenated. If a network generates the prefix from
constant inputs, the network's output is read, as the package's `eject_prefix_tuning` does; training continues with this
output. The prefix does not move the positions of tokens. The file contains the same tensors again under a separate name
for each layer. In causal models, outputs equal those of the package with ``attn_implementation="eager"``. With "sdpa",
version 1.3.0 of the package masks the prefix out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.author import ACTIVATIONS as FUNCTIONS
from peftcore.author import Resolver, Site, TokenStack
from peftcore.author.formats import Found, HubArchitecture, HubPlace, Keys, is_listed, plain_class
from peftcore.errors import CheckpointError, HostMismatch
from peftcore_additive.interop.adapterhub import ACTIVATIONS

ROLES = {"self_prefix": "attn.core", "encoder_prefix": "attn.core", "cross_prefix": "cross.core"}
"""Roles in peftcore, by the package's names for the location of a prefix. "encoder_prefix" means an encoder whose
output a decoder reads."""
OF_TOKENS = (
    "MODEL_FOR_MASKED_LM_MAPPING",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
    "MODEL_MAPPING",
)
"""The names of transformers' lists of models that return one output for each token, and pool only if they have a
pooler."""
COPY = "copy "
"""The prefix for the names of tensors that the file contains a second time."""


class HubPrefix(HubArchitecture):
    """Translates keys and values in front of the keys and values of every attention."""

    holder = "prefix_tunings"

    def options(self, keys: Keys, shapes: Mapping[str, Any], resolver: Resolver) -> dict[str, Any]:
        keys.pass_over("encoder_prefix", "cross_prefix", "leave_out", "init_weights_seed", "shared_gating")
        keys.pass_over("flat", "bottleneck_size")  # the tensors say it: an ejected prefix keeps its options
        keys.only("use_gating", False)
        name = keys.take("non_linearity", str, "tanh")
        if "wte.weight" in shapes and name not in ACTIVATIONS:
            raise CheckpointError(f"{keys.where}: 'non_linearity' is {name!r}; supported are {', '.join(ACTIVATIONS)}")
        self.function = FUNCTIONS[ACTIVATIONS.get(name, "tanh")]()
        length, dropout = keys.take("prefix_length", int), float(keys.take("dropout", float, 0.0))
        return {
            "method": "prefix_tuning",
            "length": length,
            "projection": None,
            "dropout": dropout,
            "behind": False,
            "gate": False,
        }

    def places(self, groups: Mapping[str, Mapping[str, str]], keys: Keys, resolver: Resolver) -> list[HubPlace]:
        held: dict[str, dict[str, str]] = {}
        for group in groups.values():
            for below, full in group.items():
                where, _, tensor = below.partition(".")
                names = held.setdefault(where, {})
                names[f"{COPY}{len(names)} {tensor}" if tensor in names else tensor] = full
        if unknown := sorted(held.keys() - ROLES.keys()):
            said = (
                f"{', '.join(unknown)}; supported are {', '.join(ROLES)}, of one stack or of an encoder and its decoder"
            )
            raise CheckpointError(f"{keys.where} has prefixes at {said}")
        found, left_out = list[HubPlace](), keys.take("leave_out", list, [])
        for where, names in held.items():
            sites = [site for number, site in _sites(resolver, where) if number not in left_out]
            _check_positions(resolver, sites, keys)
            found += [HubPlace(site, names, index, len(sites)) for index, site in enumerate(sites)]
        return found

    def read(self, place: HubPlace, operator: Any, found: Found) -> dict[str, Tensor]:
        if place.index == 0:
            self._check_copies(found)
        length, width = operator.prefix.shape
        size = place.count * width
        part = slice(place.index * width, (place.index + 1) * width)
        if not found.has("wte.weight"):
            return {"prefix": found.take("control_trans", (length * size,)).view(length, size)[:, part]}
        wide = found.shape("wte.weight").numel() // length  # of a whole matrix; what is none is refused below
        hidden = found.shape("control_trans.0.bias").numel() if found.has("control_trans.0.bias") else 1
        rows = found.take("wte.weight", (length, wide))
        weight, bias = (
            found.take("control_trans.0.weight", (hidden, wide)),
            found.take("control_trans.0.bias", (hidden,)),
        )
        inner = self.function(nn.functional.linear(rows, weight, bias))  # [length, hidden]
        weight, bias = found.take("control_trans.2.weight", (size, hidden)), found.take("control_trans.2.bias", (size,))
        return {"prefix": nn.functional.linear(inner, weight[part], bias[part])}

    @staticmethod
    def _check_copies(found: Found) -> None:
        for name, full in found.names.items():
            if name.startswith(COPY):
                tensor = name.removeprefix(COPY).partition(" ")[2]
                shape = found.shape(tensor)
                if not torch.equal(found.take(name, shape), found.take(tensor, shape)):
                    found.wrong.append(f"{full} differs from {found.names[tensor]}, although it should be a copy of it")


class HubPrompt(HubArchitecture):
    """Translates prompt rows after the embeddings of an encoder."""

    holder = "prompt_tunings"

    def options(self, keys: Keys, shapes: Mapping[str, Any], resolver: Resolver) -> dict[str, Any]:
        """Returns the options of `prompt_tuning`.

        Raises:
            HostMismatch: the adapters package would pool a row of the prompt, or the host has several stacks that embed
                tokens.
        """
        keys.pass_over("prompt_init", "prompt_init_text", "random_uniform_scale", "init_weights_seed")
        keys.only("combine", "prefix", "prefix_after_bos")
        if keys.take("combine", str, "prefix") == "prefix" and _may_pool(resolver):
            raise HostMismatch(
                f"{keys.where}: with 'combine' = 'prefix' the adapters package pools a prompt's first row, peftcore "
                f"the first token, and {plain_class(resolver.model).__name__} may pool; load it on a model that "
                "labels, fills in or answers by tokens, or an encoder without a pooler"
            )
        return {"method": "prompt_tuning", "length": keys.take("prompt_length", int), "behind_embeddings": True}

    def places(self, groups: Mapping[str, Mapping[str, str]], keys: Keys, resolver: Resolver) -> list[HubPlace]:
        sites = resolver.sites("stack")
        if len(sites) != 1 or len(groups) != 1:
            paths = ", ".join(site.module_path for site in sites)
            raise HostMismatch(
                f"{keys.where} has a prompt for one stack of tokens, but this host has {len(sites)}: {paths}"
            )
        return [HubPlace(sites[0], names) for names in groups.values()]

    def read(self, place: HubPlace, operator: Any, found: Found) -> dict[str, Tensor]:
        return {"prompt": found.take("prompt_embedding.weight", operator.prompt.shape)}


def _may_pool(resolver: Resolver) -> bool:
    """Returns True if the host may pool the first row of its outputs: it has a pooler after its blocks, or its class is
    not one of those that predict for each token."""
    poolers = [path for stack in resolver.token_stacks() for path in _behind(resolver, stack)]
    return bool(poolers) or not is_listed(resolver.model, *OF_TOKENS)


def _behind(resolver: Resolver, stack: TokenStack) -> list[str]:
    """Returns the paths of the modules of a stack that follow its blocks and have parameters, except norms."""
    entries, modules = resolver.host.entries, resolver.modules
    inside = [path for path in modules if path.startswith(f"{stack.path}.".lstrip("."))]
    blocks = tuple(f"{entry.path}." for entry in entries if entry.role == "block")
    last = max(index for index, path in enumerate(inside) if f"{path}.".startswith(blocks))
    norms = {entry.path for entry in entries if entry.role.startswith("norm")}
    held = [path for path in inside[last + 1 :] if any(True for _ in modules[path].parameters(recurse=False))]
    return [path for path in held if path not in norms]


def _sites(resolver: Resolver, where: str) -> list[tuple[int, Site]]:
    """Returns the attentions that have the kind of prefix named `where`, each with the number of its layer. In a
    decoder the numbers continue those of its encoder."""
    read = [f"{stack.path}." for stack in resolver.token_stacks() if stack.readers]

    def in_encoder(site: Site) -> bool:
        return any(site.module_path.startswith(path) for path in read)

    before = sum(in_encoder(site) for site in resolver.sites("attn.core")) if where != "encoder_prefix" else 0
    sites = [site for site in resolver.sites(ROLES[where]) if in_encoder(site) == (where == "encoder_prefix")]
    return list(enumerate(sites, before))


def _check_positions(resolver: Resolver, sites: list[Site], keys: Keys) -> None:
    """Check that no attention has relative positions, since in the adapters package they also apply to the keys of the
    prefix.

    Raises:
        HostMismatch: an attention has relative positions.
    """
    positions = [entry.path for entry in resolver.host.entries if entry.role == "embed.pos"]
    relative = [path for path in positions if any(path.startswith(f"{site.module_path}.") for site in sites)]
    if relative:
        raise HostMismatch(
            f"{keys.where}: in the adapters package the prefix keys have relative positions, from {relative[0]}; in "
            "peftcore they have none, so this host cannot load the file"
        )
