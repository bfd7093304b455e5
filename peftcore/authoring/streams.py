"""A stream of extra rows in parallel with the tokens of a diffusion transformer (SD3, Flux, PixArt, DiT).

Such a transformer lays an image out as tokens, modulates all tokens by one timestep, and puts them back on a grid at
the end. Rows inserted among the tokens would have to be removed before that, would need positions between those of the
tokens, and would share their timestep. So the rows are a separate stream. Each block runs once for the tokens and once
for the rows, with the same weights but separate arguments (timestep, positions); the attention in which tokens see each
other sees both:

    k_r, v_r of L(r)   ->   x' = L(x; keys [k_r, k_x])   ->   r' = L(r; keys [k_x, k_r])

If both get the same arguments, that equals the block on [x; r]. The length of the transformer's sequence does not
change, so rows need not be cut off, and tensors along the sequence stay as they are. Rows may be in parallel with the
tokens of the image, or with those of the text if the text is a separate stream (SD3, Flux). Several streams do not see
each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from peftcore.authoring.block_sites import block_width
from peftcore.contract.config import MethodConfig
from peftcore.contract.operators import Operator
from peftcore.contract.surgeon_protocol import Surgeon
from peftcore.errors import PluginError, SequenceError, TrainingError, UnsupportedSite
from peftcore.forward.attention.attention import Attend, AttentionOperator
from peftcore.forward.context.activation_checkpoints import reentrant
from peftcore.forward.context.context import forward_context
from peftcore.forward.context.taps import REENTRANT, Tap
from peftcore.layers.layer import Layer, plain_class
from peftcore.roles.hostmap import under
from peftcore.roles.stacks import arguments
from peftcore.targets.attention_sites import AttentionSite
from peftcore.targets.sites import Site

IMAGE, TEXT = "hidden_states", "encoder_hidden_states"
"""The arguments of the transformer and of its blocks that contain the streams of image and text."""
ROTARY = "image_rotary_emb"
"""The argument that passes cosines and sines of the positions of all tokens to a block, ``[tokens, width]`` each."""
PLACES = {"txt_ids": -2}
"""Arguments of the transformer with one entry for each token of the text, and the dimension of these entries."""
ALONG = "attention_mask"
"""The argument that hides tokens of the image from each other."""
TOLD = frozenset({"temb", "timestep"})
"""The arguments that pass the timestep to blocks: blocks of a diffusion transformer have one of them."""
FORM = "stream"
BLOCK = f"{FORM}.block."
"""The start of the form of a block's site; the block's path follows."""

S = TypeVar("S", bound="RowStream")


@dataclass(frozen=True, eq=False)
class StreamSite(Site):
    """A diffusion transformer, as a site for a stream of rows in parallel with its tokens."""

    width: int = 0
    """The number of features of its tokens inside the blocks."""
    places: tuple[Site, ...] = ()
    """The blocks of the transformer."""
    attentions: tuple[AttentionSite, ...] = ()
    """The attentions in which its tokens see each other."""
    joint: bool = False
    """Whether the blocks also change the text, instead of only reading it."""
    text: bool = False
    """Whether its blocks get a text."""

    def _make_path(self) -> str:
        return f"{self.module_path}:{FORM}".lstrip(":")

    @property
    def weight_shape(self) -> torch.Size:
        """The width as a shape, for plans and files."""
        return torch.Size([self.width])

    @property
    def blocks(self) -> tuple[str, ...]:
        """The paths of its blocks."""
        return tuple(place.module_path for place in self.places)

    def only(self, blocks: Iterable[str]) -> StreamSite:
        """Returns the site for rows that pass only through these blocks; the other blocks do not see the rows."""
        kept = set(blocks)
        pairs = [pair for pair in zip(self.places, self.attentions, strict=True) if pair[0].module_path in kept]
        places, attentions = zip(*pairs, strict=True)
        return replace(self, places=places, attentions=attentions)


def stream_sites(surgeon: Surgeon, paths: Iterable[str] = ("",)) -> list[StreamSite]:
    """Returns the diffusion transformers of the host that contain a target module, or are inside a target module.

    Raises:
        UnsupportedSite: no diffusion transformer is found; or a block does not have exactly one attention in which its
            tokens see each other.
    """
    wanted, host = list(paths), surgeon.resolver.host
    lists: dict[str, list[str]] = {}
    for entry in host.entries:
        if entry.role == "block":
            owner = entry.path.rpartition(".")[0].rpartition(".")[0]
            lists.setdefault(owner, []).append(entry.path)
    patched = [entry.path for entry in host.entries if entry.role == "patch" and entry.block is None]
    found = [
        _site(surgeon, owner, blocks)
        for owner, blocks in lists.items()
        if any(under(path, owner) or under(owner, path) for path in wanted)
        and any(under(path, owner) for path in patched)
        and all(_is_told(surgeon, block) for block in blocks)
    ]
    if not found:
        raise UnsupportedSite(
            "found no diffusion transformer whose blocks get a timestep and tokens of an image; target one (SD3, "
            "Flux, PixArt, DiT of diffusers)"
        )
    return found


def _is_told(surgeon: Surgeon, block: str) -> bool:
    names = arguments(plain_class(surgeon.resolver.modules[block]))
    return IMAGE in names and not TOLD.isdisjoint(names)


def _site(surgeon: Surgeon, owner: str, blocks: list[str]) -> StreamSite:
    modules, entries = surgeon.resolver.modules, surgeon.resolver.host.entries
    attentions: list[AttentionSite] = []
    joint, cross = False, False
    for block in blocks:
        inside = [entry for entry in entries if entry.block == block]
        own = [entry.path for entry in inside if entry.role == "attn"]
        text = any(entry.stream == "context" for entry in inside)
        reads = any(entry.role == "cross" for entry in inside)
        joint, cross = joint or text, cross or reads
        if len(own) != 1 or (text and reads):
            raise UnsupportedSite(
                f"{block} does not have exactly one self-attention, through which the rows next to its tokens must go; "
                "use another model"
            )
        attentions.append(surgeon.attention_site(surgeon.resolver.module_site(own[0])))
    whole = surgeon.resolver.module_site(owner)
    places = (Site(modules[each], each, "", Layer(), form=f"{BLOCK}{each}", meta=surgeon.dry) for each in blocks)
    return StreamSite(
        **{**vars(whole), "form": FORM, "role": None, "meta": surgeon.dry},
        width=block_width(surgeon, blocks[0]),
        places=tuple(places),
        attentions=tuple(attentions),
        joint=joint,
        text=joint or cross,
    )


class Reached(Exception):  # no error: it ends a pass that has given what it was for
    """Raised to end a pass for the rows at the requested module."""

    def __init__(self, running: Running) -> None:
        super().__init__()
        self.running = running


Keys = tuple[Tensor, Tensor]
"""Keys and values, ``[batch, heads, tokens, width]``."""


class Running:
    """The state of a stream of rows in one forward of its transformer.

    Attributes:
        told: the arguments of the first block for the rows, by name.
        begins: the form of the first block, if the rows are inserted there.
        rows: the rows after the last block that ran; None before the first block, and after their stream has ended.
        before: the rows before each block that ran, for blocks that run again inside backward.
        makes: whether the transformer now computes the rows from an input.
        asks: whether the block now runs only to get the keys and values of the rows.
        counts: the numbers of tokens and of rows in the attention of the current block.
        of_tokens: keys and values of the tokens in that attention, once they are known.
        of_rows: keys and values of the rows in that attention, once they are known.
    """

    def __init__(self) -> None:
        self.told: Mapping[str, Any] | None = None
        self.begins: str | None = None
        self.rows: Tensor | None = None
        self.before: dict[str, Tensor] = {}
        self.makes, self.asks = False, False
        self.counts = 0, 0
        self.of_tokens: Keys | None = None
        self.of_rows: Keys | None = None
        self._inside = _reentrant()

    def check_gradients(self) -> None:
        """Verify that the rows get gradients: a reentrant checkpoint of a block loses them, since rows are not its
        arguments."""
        if (here := _reentrant()) is not None and here != self._inside:
            raise TrainingError(REENTRANT)

    def enter(self, form: str, rows: Tensor) -> Tensor:
        """Returns the rows before a block; a block that runs again inside backward gets the same rows."""
        if form in self.before and not forward_context().repeating:
            raise SequenceError(
                "a block runs twice in one forward, so it is ambiguous which rows belong to which tokens: run it once"
            )
        return self.before.setdefault(form, rows)


def _reentrant() -> int | None:
    """Returns the reentrant checkpoint in whose forward this is."""
    return None if torch.compiler.is_compiling() or torch.is_grad_enabled() else reentrant()


NOW = Tap()
"""The key of the stream for whose rows modules run now; empty while they run for the transformer's own tokens."""


class Turn(Tap):
    """Holds the state of one stream in a forward (`Running`), and shows operators inside the blocks whether modules run
    for the stream's rows."""

    def __init__(self) -> None:
        super().__init__(until_backward=True)

    def is_now(self) -> bool:
        """Whether modules now run for the rows of this stream."""
        return bool(NOW.get() == self.key)

    def is_others(self) -> bool:
        """Whether modules now run for the rows of another stream."""
        return NOW.get() not in (None, self.key)

    def run(self, call: Callable[..., Any], given: Mapping[str, Any]) -> Any:
        """Run a module for the rows of this stream."""
        NOW.put(self.key)
        try:
            return _called(call, given)
        finally:
            NOW.take()


def _called(call: Callable[..., Any], given: Mapping[str, Any]) -> Any:
    """Call a module on arguments by name; the image is by position, where operators inside expect it."""
    return call(given[IMAGE], **{name: value for name, value in given.items() if name != IMAGE})


class RowStream(Operator):
    """Base class of operators with a stream of rows. Subclasses define `second` or `first`."""

    beside_text = False
    """Whether the rows are in parallel with the tokens of the text, instead of those of the image."""
    sees_tokens = True
    """Whether the rows see the tokens; tokens always see the rows."""

    def __init__(self, site: StreamSite) -> None:
        super().__init__(site)
        if self.beside_text and not site.joint:
            raise UnsupportedSite(
                f"the text is not a stream in {site.module_path or 'the host'}, whose blocks only read it; use a model "
                "such as SD3"
            )
        self.width, self.joint = site.width, site.joint
        self.stream, self.other = (TEXT, IMAGE) if self.beside_text else (IMAGE, TEXT)
        self.names = {place.form: arguments(plain_class(place.module)) for place in (site, *site.places)}
        self.turn = Turn()

    def second(self, given: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Returns arguments by name from which the transformer computes the rows in the same way as its tokens,
        timestep and positions included; None if `first` returns the rows.

        Args:
            given: the arguments that the user passed to the transformer.

        Raises:
            MissingContext, RouteError, ConfigError: this call lacks the values from which rows are computed, or the
                values do not fit.
        """
        return None

    def first(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """Returns the arguments of the first block for the rows, by name; `alike` builds them from rows ``[batch, rows,
        width]``.

        Args:
            given: the arguments of the first block for the tokens.
        """
        raise NotImplementedError

    def at_block(self, block: str, rows: Tensor) -> Tensor:
        """Returns the rows that enter a block, ``[batch, rows, width]``; by default the output rows of the previous
        block.

        Args:
            block: the path of the block.
            rows: the rows after the previous block.
        """
        return rows

    def alike(self, given: Mapping[str, Any], rows: Tensor) -> dict[str, Any]:
        """Returns the arguments of a block for rows without positions; the other arguments are the same as for the
        tokens."""
        mine = {**given, self.stream: rows}
        if given.get(ROTARY) is not None:  # the angle of rows is zero
            cos, sin = given[ROTARY]
            shape = rows.shape[1], cos.shape[-1]
            mine[ROTARY] = cos.new_ones(shape), sin.new_zeros(shape)
        return mine

    def at(self, form: str, module: Any) -> Callable[..., Any]:
        """Returns the function that wraps the transformer, or one of its blocks."""
        return self if form == FORM else partial(self._block, form)

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the transformer."""
        if NOW.get() is not None:  # another stream has it make rows
            return call(*args, **kwargs)
        given = self._bind(FORM, args, kwargs)
        running = Running()
        self.turn.put(running)
        second = self.second(given)
        if second is not None:
            self._make(running, call, second)
        return _called(call, given)

    def _make(self, running: Running, call: Callable[..., Any], second: Mapping[str, Any]) -> None:
        """Run the transformer on a second input up to its first block, which tells what that is given."""
        running.makes = True
        try:
            self.turn.run(call, self._without_text(second) if self.joint else second)
        except Reached as reached:
            if reached.running is not running:
                raise
        finally:
            running.makes = False

    def _without_text(self, second: Mapping[str, Any]) -> dict[str, Any]:
        """Returns arguments with no tokens of text, which are in the transformer's own already."""
        none = {name: second[name].narrow(dim, 0, 0) for name, dim in PLACES.items() if second.get(name) is not None}
        return {**second, TEXT: second[TEXT][:, :0], **none}

    def _block(self, form: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a block, for the tokens and for the rows."""
        running: Running | None = self.turn.get()
        if running is None or self.turn.is_others():
            return call(*args, **kwargs)
        given = self._bind(form, args, kwargs)
        if running.makes:
            running.told = running.told or given
            if torch.compiler.is_compiling():  # what it does from here on is not used, so the graph has none of it
                return _called(call, given)
            raise Reached(running)
        if form not in running.before and running.before and running.rows is None:
            return call(*args, **kwargs)  # the stream beside which they stand has ended (the last text of SD3)
        if running.told is None or running.begins == form:  # a checkpoint that repeats the block repeats this too
            running.told, running.begins = self.first(given), form
        told = running.told
        running.check_gradients()
        self._check(told, given)
        rows = running.enter(form, told[self.stream] if running.rows is None else running.rows)
        rows = self.at_block(form.removeprefix(BLOCK), told[self.stream] if running.begins == form else rows)
        tokens = given[IMAGE].shape[1] + (given[TEXT].shape[1] if self.joint else 0)
        running.counts, running.of_tokens, running.of_rows = (tokens, rows.shape[1]), None, None
        mine = self._for_rows(form, told, given, rows)
        if self.sees_tokens:
            self._ask(running, call, mine)
            output = _called(call, given)
            made = self.turn.run(call, mine)
        else:
            made = self.turn.run(call, mine)
            output = _called(call, given)
        running.rows = _of_length(made, rows.shape[1])
        return output

    def _ask(self, running: Running, call: Callable[..., Any], mine: Mapping[str, Any]) -> None:
        """Run the block for the rows up to its attention, for their keys."""
        running.asks = not torch.compiler.is_compiling()  # there what is not used falls away by itself
        try:
            self.turn.run(call, mine)
        except Reached as reached:
            if reached.running is not running:
                raise
        finally:
            running.asks = False

    def _check(self, told: Mapping[str, Any], given: Mapping[str, Any]) -> None:
        """Check that nothing is lost on the way.

        Raises:
            SequenceError: tokens of the image are hidden from each other, or the rows are not those of this batch.
            PluginError: the rows have another shape.
        """
        if given.get(ALONG) is not None:
            raise SequenceError(
                f"{ALONG}= hides tokens of the image, but does not cover the rows next to them: remove {ALONG}="
            )
        rows, tokens = told[self.stream], given[IMAGE]
        if rows.dim() != 3 or rows.shape[-1] != self.width or not rows.shape[1]:
            raise PluginError(f"{type(self).__name__} has rows of {tuple(rows.shape)}, not [batch, rows, {self.width}]")
        if len(rows) != len(tokens):
            raise SequenceError(
                f"the batch has {len(tokens)} sequences of tokens, but {len(rows)} of rows: pass one for each"
            )

    def _for_rows(self, form: str, told: Mapping[str, Any], given: Mapping[str, Any], rows: Tensor) -> dict[str, Any]:
        """Returns what a block is given for the rows: what the first one was, and no tokens of the other stream."""
        mine = {**given, **{name: value for name, value in told.items() if name in self.names[form]}, self.stream: rows}
        if self.joint:
            mine[self.other] = given[self.other][:, :0]
        return mine

    def _bind(self, form: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return {**dict(zip(self.names[form], args, strict=False)), **kwargs}


def _of_length(output: Any, rows: int) -> Tensor | None:
    """Returns the rows of what a block returns, where the other stream has no tokens; None where they end there."""
    parts = (output,) if isinstance(output, Tensor) else output
    return next((each for each in parts if isinstance(each, Tensor) and each.shape[1] == rows), None)


class JointAttention(AttentionOperator):
    """Lets tokens and rows see each other in one attention."""

    def __init__(self, site: AttentionSite, stream: RowStream) -> None:
        super().__init__(site)
        self.turn = stream.turn

    def forward(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        running: Running | None = self.turn.get()
        if running is None or running.makes or self.turn.is_others():
            return attend(query, key, value)
        tokens, rows = running.counts
        if self.turn.is_now():
            running.of_rows, others = _last(rows, key, value), running.of_tokens
            if running.asks:
                raise Reached(running)
        else:
            running.of_tokens, others = _last(tokens, key, value), running.of_rows
        if others is None:
            return attend(query, key, value)
        return attend(query, torch.cat([others[0], key], 2), torch.cat([others[1], value], 2))


def _last(count: int, key: Tensor, value: Tensor) -> Keys:
    """Returns the attention's own keys and values, without those that other edits put in front."""
    return key[:, :, -count:], value[:, :, -count:]


def add_stream(
    surgeon: Surgeon, site: StreamSite, operator: Callable[..., S], config: MethodConfig | None = None, **own: Any
) -> S:
    """Install ``operator(site, config, **own)``, a `RowStream`, at a diffusion transformer.

    Returns the operator. Its `turn` shows operators inside the blocks when the blocks run for the rows.
    """
    stream = surgeon.graft(site, operator, config, site.places, **own)
    for attention in site.attentions:
        surgeon.graft(attention, lambda at: JointAttention(at, stream))
    return stream
