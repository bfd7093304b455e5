"""A guest network: a smaller network of the model's family that runs in parallel with the model, over the same tokens.

It has the class and the config of the model's stack (the module that embeds tokens and runs blocks), with smaller
sizes. It belongs to the injection: it trains and is saved with the injection, and is rebuilt from options when a file
is loaded. It may share the model's embedding table and head. In generation, its cache of earlier tokens is stored after
the layers of the model's cache (`PassCache`).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from peftcore.authoring.pass_cache import PassCache
from peftcore.contract.operators import Operator, Shared
from peftcore.contract.surgeon_protocol import Surgeon
from peftcore.errors import ConfigError, SequenceError, UnsupportedSite
from peftcore.forward.context.taps import Tap
from peftcore.forward.sequence.sequence import POSITIONS
from peftcore.layers.layer import plain_class
from peftcore.roles.hostmap import under
from peftcore.roles.stacks import CACHES, EMBEDS, IDS, TokenStack, arguments, cache_in
from peftcore.targets.sites import Site

LAYERS, WIDTH = "num_hidden_layers", "hidden_size"
"""Names in configs of transformers of the number of layers and of the width of the hidden states."""
OF_A_DECODER = "decoder_layers"
"""A name that a config has only if its common names, such as `hidden_size`, are sizes of an encoder."""
NAMES = {"intermediate_size": ("intermediate_size", "ffn_dim", "n_inner")}
"""Other names of sizes in configs of transformers. The key is the common name of a size."""
TYPES = "token_type_ids"
HANDED_ON = (
    *("attention_mask", POSITIONS, "cache_position", "use_cache"),
    *("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
)
"""Arguments of the model's stack that the guest gets too. The last five describe batches of packed sequences."""


class GuestNetwork(nn.Module):
    """A smaller network of the same class as one stack of a model (a module that embeds tokens and runs blocks).

    Attributes:
        network: the network, built from the stack's class and its config with changed sizes.
        projection: maps the guest's hidden states to the width of the stack's; the identity if both widths are equal.
        own_table: whether the guest has its own embedding table; otherwise it gets embeddings from the model's table.
        table: the path, relative to the network, at which an embedding table is or would be.
    """

    def __init__(
        self,
        stack: nn.Module,
        table: str,
        sizes: Mapping[str, int],
        own_table: bool,
        *,
        without: Sequence[str] = (),
        types: bool = False,
        position_padding: int | None = None,
    ) -> None:
        """Build the network, with new initial values.

        Args:
            stack: the model's stack.
            table: the path of the stack's embedding table, relative to the stack.
            sizes: the sizes that differ from the stack's config, by name: ``{"num_hidden_layers": 1}``.
            own_table: whether the guest has its own embedding table. It always has one if its width differs from the
                stack's.
            without: names of child modules of the stack that the guest does not get, such as poolers.
            types: whether the guest gets `token_type_ids`, for which it has its own embedding table.
            position_padding: the id and position of padding, if positions count only the other tokens, as in
                `TokenStack`.

        Raises:
            ConfigError: the config does not have a size of that name, or has a smaller one, or no network can be built
                with the sizes.
            UnsupportedSite: none of the guest's layers would have attention.
        """
        super().__init__()
        config = _changed(stack, sizes)
        width, own = int(getattr(stack.config, WIDTH)), int(getattr(config, WIDTH))
        self.own_table, self.table = own_table or own != width, table
        if not self.own_table:  # what is dropped again need not be as large
            config.vocab_size = min(config.vocab_size, 1 + max(getattr(config, "pad_token_id", None) or 0, 0))
        try:
            self.network = plain_class(stack)(config)
        except (ValueError, TypeError, RuntimeError, AssertionError, ArithmeticError, LookupError) as error:
            raise ConfigError(f"no {plain_class(stack).__name__} can be built with {dict(sizes)}: {error}") from error
        if not self.own_table:
            above, _, name = table.rpartition(".")
            setattr(self.network.get_submodule(above), name, None)
        theirs = {name for name, _ in stack.named_children()}.difference(without)
        for name in [name for name, _ in self.network.named_children() if name not in theirs]:
            setattr(self.network, name, None)
        self.position_padding, self._handed_on = position_padding, (*HANDED_ON, TYPES) if types else HANDED_ON
        self.projection = nn.Linear(own, width, bias=False) if own != width else nn.Identity()
        self._names = arguments(type(self.network))

    def forward(self, given: Mapping[str, Any], embeds: Tensor | None, cache: Any) -> tuple[Tensor, Any]:
        """Run the guest on the same tokens as the stack.

        Args:
            given: the arguments of the stack by name.
            embeds: embeddings ``[batch, tokens, width]`` to use instead of token ids.
            cache: the guest's cache of earlier tokens.

        Returns:
            The guest's hidden states, projected to ``[batch, tokens, width of the stack]``, and the complete output of
                its network.
        """
        mine = {name: given[name] for name in self._handed_on if given.get(name) is not None}
        if cache is not None:  # which the stack fills whatever it is told
            mine |= {next(name for name in self._names if name in CACHES): cache, "use_cache": True}
        if embeds is None:
            mine[IDS] = given[IDS]
        else:
            mine[EMBEDS] = embeds.to(next(self.network.parameters()).dtype)
            ids, padding = given.get(IDS), self.position_padding
            if padding is not None and ids is not None and POSITIONS not in mine:  # which it would count by the ids
                real = (ids != padding).long()
                mine[POSITIONS] = real.cumsum(1) * real + padding
        output = self.network(**mine, return_dict=True)
        states: Tensor = self.projection(output["last_hidden_state"])
        return states, output

    def take(self, network: nn.Module) -> None:
        """Copy the values of a trained network into the guest; the trained network does not change.

        Args:
            network: a trained network with the class and sizes of the guest. Its embedding table is ignored if the
                guest shares the model's table.

        Raises:
            ConfigError: the network has tensors of other names or shapes than the guest.
        """
        values = network.state_dict()
        if not self.own_table:
            values.pop(f"{self.table}.weight", None)
        own = {name: value.shape for name, value in self.network.state_dict().items()}
        other = {name: value.shape for name, value in values.items()}
        if wrong := sorted(name for name in own.keys() | other.keys() if own.get(name) != other.get(name)):
            name = wrong[0]
            raise ConfigError(
                f"{name} is {list(own.get(name, ())) or 'missing'} in the guest network, and "
                f"{list(other.get(name, ())) or 'missing'} in the given network: pass the given network's sizes when "
                "you apply the method"
            )
        self.network.load_state_dict(values)


def guest_network(
    surgeon: Surgeon, stack: Site, sizes: Mapping[str, int], own_table: bool = False, *, encoders: bool = False
) -> Shared:
    """Builds and returns a guest, a smaller network of the same class as a stack. It is registered with the injection
    as the shared module ``"guest"``.

    Args:
        surgeon: the argument `surgeon` of `Method.inject`.
        stack: the model's stack, as returned by `TokenStacks.around`.
        sizes: as in `GuestNetwork`.
        own_table: whether the guest has its own embedding table, which trains; otherwise it shares the model's.
        encoders: whether `stack` may be an encoder, in which tokens attend to later tokens.

    Raises:
        ConfigError: as in `GuestNetwork`.
        UnsupportedSite: the stack is not a causal stack of transformers; with `encoders`, not a stack of transformers
            of the supported kinds.
    """
    known = next(each for each in surgeon.resolver.token_stacks() if each.path == stack.module_path)
    config = getattr(stack.module, "config", None)
    fits = getattr(config, WIDTH, None) == stack.out_features and OF_A_DECODER not in _names(config)
    inside = [entry for entry in surgeon.resolver.host.entries if under(entry.path, known.path)]
    one_by_one = len({entry.block for entry in inside} - {None}) == getattr(config, LAYERS, None)
    serves = known.takes_cache if known.causal else encoders and one_by_one  # ALBERT's one block runs several times
    if not serves or known.entry != known.path or not fits:
        kind = "stack" if encoders else "causal stack"
        raise UnsupportedSite(
            f"{stack.path or 'the model'} is not a {kind} of transformers, of which a smaller copy can be built; use "
            "another model"
        )
    types = any(entry.role == "embed.type" for entry in inside)
    without = _behind_the_body(stack.module, known, [entry.module for entry in inside if entry.role != "other"])
    build = functools.partial(GuestNetwork, without=without, types=types, position_padding=known.position_padding)
    return surgeon.own("guest", lambda: build(stack.module, known.table, sizes, own_table))


class GuestOperator(Operator):
    """An operator around a stack that runs a guest (a smaller network in parallel with the stack) before the stack, on
    the same tokens. It stores the guest's hidden states for other operators."""

    observes = frozenset({"activation"})

    def __init__(self, site: Site, guest: Shared, states: Tap) -> None:
        """Wrap a stack. The guest's hidden states ``[batch, tokens, width]`` are stored in `states`."""
        super().__init__(site)
        self.guest, self.states, self.cache = guest, states, PassCache()
        self.names, self.table = site.arguments, site.tensor.removesuffix(".weight")

    def at(self, form: str, module: nn.Module) -> Callable[..., Any]:
        """Returns the function that wraps the stack. The function uses the stack's embedding table."""
        return functools.partial(self._beside, module)

    def _beside(self, stack: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        module: Any = self.guest.module
        embeds, cache = given.get(EMBEDS), cache_in(given)
        if embeds is None and not module.own_table:
            embeds = stack.get_submodule(self.table)(given[IDS])
        if embeds is not None and module.own_table and not isinstance(module.projection, nn.Identity):
            raise SequenceError(
                "the guest network has a token table of another width, so it cannot read embeddings: pass input_ids="
            )
        beside = None if cache is None else self.cache.beside(cache, module.network.config)
        states, output = module(given, embeds, beside)
        self.states.put(states)
        result = call(**given)
        self.cache.keep(given, result, output)
        return result


def _behind_the_body(stack: nn.Module, known: TokenStack, used: Sequence[str]) -> list[str]:
    """Returns the names of child modules of a stack, such as poolers, that are registered after the module with all
    blocks. Those that contain a module in `used` (paths) are left out."""
    if known.body == known.path:
        return []
    names = [name for name, _ in stack.named_children()]
    inside = known.body.removeprefix(f"{known.path}.").partition(".")[0]
    behind, start = names[names.index(inside) + 1 :], f"{known.path}.".lstrip(".")
    return [name for name in behind if not any(f"{path}.".startswith(f"{start}{name}.") for path in used)]


def _changed(stack: nn.Module, sizes: Mapping[str, int]) -> Any:
    """Returns the config of a stack with changed sizes. No size may be larger than before."""
    config: Any = copy.deepcopy(stack.config)
    for name, size in sizes.items():
        name = next((each for each in NAMES.get(name, ()) if each in _names(config)), name)
        before = getattr(config, name, "")
        before = 4 * getattr(config, WIDTH) if before is None else before  # GPT-2's feed-forward
        if not isinstance(before, int) or isinstance(before, bool) or name.startswith("vocab") or name.endswith("_id"):
            raise ConfigError(f"{name} is not a size in the config of {plain_class(stack).__name__}")
        if size > before:
            raise ConfigError(
                f"{name}={size} is too large for a guest network: the model has {before}, and a guest cannot be larger"
            )
        setattr(config, name, size)
    if "flash" in str(getattr(config, "_attn_implementation", "")):
        config._attn_implementation = "sdpa"  # adapters are float32, which flash attention has no kernels for
    before, count = getattr(stack.config, LAYERS), getattr(config, LAYERS)
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == before:  # an entry for each layer
            setattr(config, name, value[:count])
    if _has_attention(stack.config) and not _has_attention(config):
        raise UnsupportedSite(
            f"the first {count} layers of {plain_class(stack).__name__} have no attention: use more layers"
        )
    return config


def _names(config: Any) -> set[str]:
    """Returns the names of the options in a config of transformers, including the common names that are mapped to its
    own names."""
    return {*config.to_dict(), *config.attribute_map}


def _has_attention(config: Any) -> bool:
    """Whether some layer caches keys and values. Without such a layer, the cache of a hybrid stack cannot count
    tokens."""
    from transformers.cache_utils import DynamicCache

    return not all(DynamicCache(config=config).is_linear)
