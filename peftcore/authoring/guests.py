"""A guest network in parallel with the model: a smaller one of the model's family, which runs over the same tokens.

It has the class and the config of the model's stack, with fewer layers, and belongs to the injection: it trains with
it, is in its file, and is rebuilt from options alone when the file is loaded. It may share the model's token table and
its head. In generation its cache of earlier tokens is stored after the layers of the model's cache (`PassCache`).
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
"""The names that configs of transformers have, or accept, for the depth and the width of a stack."""
OF_A_DECODER = "decoder_layers"
"""A size that a config has if its common names, such as `hidden_size`, mean the encoder."""
NAMES = {"intermediate_size": ("intermediate_size", "ffn_dim", "n_inner")}
"""Other names of sizes, for configs that do not map them to the names in `LAYERS` and `WIDTH`."""
TYPES = "token_type_ids"
HANDED_ON = (
    *("attention_mask", POSITIONS, "cache_position", "use_cache"),
    *("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
)
"""Arguments of the stack that are passed to the guest unchanged; the last ones describe batches of packed sequences."""


class GuestNetwork(nn.Module):
    """A network of a stack's own family.

    Attributes:
        network: the stack's class, built from its config with the changes.
        projection: maps the guest's states to the width of the stack's hidden states; the identity if both are equal.
        own_table: whether the guest embeds tokens itself; otherwise it gets the model's embeddings.
        table: the path of the token table below the network, also if the guest does not have a table.
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
        """Build it, with values of its own.

        Args:
            stack: the model's.
            table: the path of its token table below it.
            sizes: the options of its config that are others, by name: ``{"num_hidden_layers": 1}``.
            own_table: whether the guest has a token table of its own.
            without: children of the stack that the guest does not have: poolers.
            types: whether it reads the types of tokens, for which it has a table of its own.
            position_padding: the id of padding where positions count the other tokens, as in `TokenStack`.

        Raises:
            ConfigError: the config has no such size, or a guest of these would be larger, or is none.
            UnsupportedSite: its layers would have no attention.
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
        """Run over the input tokens of the stack.

        Args:
            given: the stack's arguments by name.
            embeds: embeddings to use instead of ids, ``[batch, tokens, width]``.
            cache: the guest's cache of earlier tokens.

        Returns:
            The guest's states of the tokens, ``[batch, tokens, width of the stack]``, and its whole output.
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
            network: a network of the guest's class and sizes. Its token table is ignored if the guest shares the
                model's.

        Raises:
            ConfigError: the network has other tensors.
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
    """Returns a guest in parallel with a stack (see `TokenStacks.around`), which the injection owns as ``"guest"``.

    Args:
        surgeon: the method's surgeon.
        stack: the stack.
        sizes: see `GuestNetwork`.
        own_table: whether the guest has a separate token table, which trains; otherwise it shares the model's.
        encoders: whether stacks whose tokens see later ones may have a guest too.

    Raises:
        ConfigError: as of `GuestNetwork`.
        UnsupportedSite: the stack is not a causal one of transformers; with `encoders`, not one of transformers.
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
    """Runs a guest before the stack, over the same tokens, and stores the guest's states for other operators."""

    observes = frozenset({"activation"})

    def __init__(self, site: Site, guest: Shared, states: Tap) -> None:
        """Stand around a stack; `states` is where ``[batch, tokens, width]`` is left, until backward."""
        super().__init__(site)
        self.guest, self.states, self.cache = guest, states, PassCache()
        self.names, self.table = site.arguments, site.tensor.removesuffix(".weight")

    def at(self, form: str, module: nn.Module) -> Callable[..., Any]:
        """Returns the function that wraps the stack; it reads the stack's token table."""
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
    """Returns the children of a stack that come behind the module with all blocks, and are not among what is `used`
    (by path): poolers, which read finished states."""
    if known.body == known.path:
        return []
    names = [name for name, _ in stack.named_children()]
    inside = known.body.removeprefix(f"{known.path}.").partition(".")[0]
    behind, start = names[names.index(inside) + 1 :], f"{known.path}.".lstrip(".")
    return [name for name in behind if not any(f"{path}.".startswith(f"{start}{name}.") for path in used)]


def _changed(stack: nn.Module, sizes: Mapping[str, int]) -> Any:
    """Returns the config of a stack with other sizes, of which none is larger."""
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
    """Returns the names of a config of transformers, those of other architectures among them that stand for its own."""
    return {*config.to_dict(), *config.attribute_map}


def _has_attention(config: Any) -> bool:
    """Whether some layer keeps keys and values of tokens, without which hybrid stacks cannot count them."""
    from transformers.cache_utils import DynamicCache

    return not all(DynamicCache(config=config).is_linear)
