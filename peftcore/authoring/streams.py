"""A stream of extra rows in parallel with the tokens of a diffusion transformer (SD3, Flux, PixArt, DiT).

Such a transformer converts an image to a sequence of tokens, modulates all tokens by one timestep, and converts them
back to an image. If the rows were inserted into this sequence, they would have to be removed at the end, and would need
positions and the same timestep. So the rows are a separate stream. Each block runs once for the tokens and once for the
rows, with the same weights but separate arguments (timestep, positions). In self-attention, tokens and rows attend to
each other:

    k_r, v_r of L(r)   ->   x' = L(x; keys [k_r, k_x])   ->   r' = L(r; keys [k_x, k_r])

If both get the same arguments, this equals the block on [x; r]. The length of the transformer's own sequence does not
change, so rows need not be removed, and other tensors with the sequence's length still fit. The rows may be processed
like tokens of the image, or like tokens of the text if the text is a separate stream (SD3, Flux). Several streams of
rows do not attend to each other.
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
"""The arguments of the transformer and of its blocks with the tokens of the image and of the text."""
ROTARY = "image_rotary_emb"
"""The argument of a block with the cosines and sines of the positions of all tokens, ``[tokens, width]`` each."""
PLACES = {"txt_ids": -2}
"""Arguments of the transformer that have one entry for each token of the text, with the dimension along which the
tokens are."""
ALONG = "attention_mask"
"""The argument that masks tokens of the image in self-attention."""
TOLD = frozenset({"temb", "timestep"})
"""The arguments that pass the timestep to blocks. Every block of a diffusion transformer has one of them."""
FORM = "stream"
BLOCK = f"{FORM}.block."
"""The form of a block's site begins with this, and the path of the block follows."""

S = TypeVar("S", bound="RowStream")


@dataclass(frozen=True, eq=False)
class StreamSite(Site):
    """A diffusion transformer as a site for a stream of extra rows, which its blocks process in parallel with its
    tokens."""

    width: int = 0
    """The number of features of the tokens inside the blocks."""
    places: tuple[Site, ...] = ()
    """The blocks of the transformer."""
    attentions: tuple[AttentionSite, ...] = ()
    """The self-attention of each block."""
    joint: bool = False
    """Whether the blocks also change the text, instead of only reading it."""
    text: bool = False
    """Whether the blocks get a text."""

    def _make_path(self) -> str:
        return f"{self.module_path}:{FORM}".lstrip(":")

    @property
    def weight_shape(self) -> torch.Size:
        """The width as a shape with one dimension. Plans and files show it as the shape of the site."""
        return torch.Size([self.width])

    @property
    def blocks(self) -> tuple[str, ...]:
        """The paths of the blocks."""
        return tuple(place.module_path for place in self.places)

    def only(self, blocks: Iterable[str]) -> StreamSite:
        """Returns a copy of the site in which only the given blocks (by path) process the rows."""
        kept = set(blocks)
        pairs = [pair for pair in zip(self.places, self.attentions, strict=True) if pair[0].module_path in kept]
        places, attentions = zip(*pairs, strict=True)
        return replace(self, places=places, attentions=attentions)


def stream_sites(surgeon: Surgeon, paths: Iterable[str] = ("",)) -> list[StreamSite]:
    """Returns the diffusion transformers of the host that contain one of the modules at `paths`, or are inside one.

    Raises:
        UnsupportedSite: no diffusion transformer is found; or a block does not have exactly one self-attention.
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
    """Raised to end a forward for the rows early, as soon as it has reached the required module. It is caught inside
    this file."""

    def __init__(self, running: Running) -> None:
        super().__init__()
        self.running = running


Keys = tuple[Tensor, Tensor]
"""Keys and values, ``[batch, heads, tokens, width]``."""


class Running:
    """The state of a stream of rows in one forward of its transformer.

    Attributes:
        told: the arguments for the rows with which the first block is called, by name.
        begins: the form of the first block's site, if `RowStream.first` made the rows there.
        rows: the rows after the last block that ran; None before the first block, and after their stream has ended.
        before: the input rows of each block that ran, by form, for blocks that run again inside backward.
        makes: whether the transformer is now running up to its first block, to compute the rows from a second input.
        asks: whether a block is now running only to get the keys and values of the rows.
        counts: the numbers of tokens and of rows in the attention of the current block.
        of_tokens: keys and values of the tokens in the attention of the current block; None until they are computed.
        of_rows: keys and values of the rows in the attention of the current block; None until they are computed.
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
        """Raise TrainingError if the rows would get no gradients. This is so if a block runs under reentrant gradient
        checkpointing, because the rows are not arguments of the block."""
        if (here := _reentrant()) is not None and here != self._inside:
            raise TrainingError(REENTRANT)

    def enter(self, form: str, rows: Tensor) -> Tensor:
        """Returns the input rows of a block. If the block runs again inside backward, it gets the same rows as
        before."""
        if form in self.before and not forward_context().repeating:
            raise SequenceError(
                "a block runs twice in one forward, so it is ambiguous which rows belong to which tokens: run it once"
            )
        return self.before.setdefault(form, rows)


def _reentrant() -> int | None:
    """Returns an id of the reentrant gradient checkpoint whose forward is running; None if there is none."""
    return None if torch.compiler.is_compiling() or torch.is_grad_enabled() else reentrant()


NOW = Tap()
"""The key of the stream whose rows are being processed now; empty while the transformer's own tokens are processed."""


class Turn(Tap):
    """Stores the state (`Running`) of one stream during a forward. Operators inside the blocks use it to find out
    whether a module is running on the stream's rows or on the transformer's tokens."""

    def __init__(self) -> None:
        super().__init__(until_backward=True)

    def is_now(self) -> bool:
        """Whether the modules are now running on the rows of this stream."""
        return bool(NOW.get() == self.key)

    def is_others(self) -> bool:
        """Whether the modules are now running on the rows of another stream."""
        return NOW.get() not in (None, self.key)

    def run(self, call: Callable[..., Any], given: Mapping[str, Any]) -> Any:
        """Run a module on the rows of this stream, with `given` arguments by name."""
        NOW.put(self.key)
        try:
            return _called(call, given)
        finally:
            NOW.take()


def _called(call: Callable[..., Any], given: Mapping[str, Any]) -> Any:
    """Call a module on arguments by name. The image is passed by position, as operators inside the module expect."""
    return call(given[IMAGE], **{name: value for name, value in given.items() if name != IMAGE})


class RowStream(Operator):
    """Base class of operators that add a stream of rows in parallel with the tokens of a diffusion transformer.
    Subclasses define `second` or `first`, which return the rows."""

    beside_text = False
    """Whether the rows are processed like tokens of the text, instead of tokens of the image."""
    sees_tokens = True
    """Whether the rows attend to the tokens. The tokens always attend to the rows."""

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
        """Returns a second set of arguments for the transformer, by name, including timestep and positions. The
        transformer computes the rows from them, as it computes its tokens from its own arguments. None if `first`
        returns the rows.

        Args:
            given: the arguments of the transformer by name.

        Raises:
            MissingContext, RouteError, ConfigError: the values from which rows are computed are missing in this call,
                or do not fit.
        """
        return None

    def first(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """Returns the arguments with which the first block is called for the rows, by name. `alike` builds them from
        rows ``[batch, rows, width]``.

        Args:
            given: the arguments with which the first block is called for the tokens, by name.
        """
        raise NotImplementedError

    def at_block(self, block: str, rows: Tensor) -> Tensor:
        """Returns the input rows of a block, ``[batch, rows, width]``; by default the output rows of the previous
        block.

        Args:
            block: the path of the block.
            rows: the rows after the previous block.
        """
        return rows

    def alike(self, given: Mapping[str, Any], rows: Tensor) -> dict[str, Any]:
        """Returns the arguments of a block for rows without positions. All other arguments are the same as for the
        tokens."""
        mine = {**given, self.stream: rows}
        if given.get(ROTARY) is not None:  # the angle of rows is zero
            cos, sin = given[ROTARY]
            shape = rows.shape[1], cos.shape[-1]
            mine[ROTARY] = cos.new_ones(shape), sin.new_zeros(shape)
        return mine

    def at(self, form: str, module: Any) -> Callable[..., Any]:
        """Returns the function that wraps `module`, the transformer or one of its blocks."""
        return self if form == FORM else partial(self._block, form)

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Returns the output of the transformer, whose blocks also process the rows."""
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
        """Run the transformer on a second input up to its first block, and record the arguments of that block."""
        running.makes = True
        try:
            self.turn.run(call, self._without_text(second) if self.joint else second)
        except Reached as reached:
            if reached.running is not running:
                raise
        finally:
            running.makes = False

    def _without_text(self, second: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the second input without tokens of the text, because the transformer's own input already contains the
        text."""
        none = {name: second[name].narrow(dim, 0, 0) for name, dim in PLACES.items() if second.get(name) is not None}
        return {**second, TEXT: second[TEXT][:, :0], **none}

    def _block(self, form: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a block on the tokens and on the rows. Returns the output for the tokens."""
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
        """Run the block on the rows up to its attention, to get their keys and values."""
        running.asks = not torch.compiler.is_compiling()  # there what is not used falls away by itself
        try:
            self.turn.run(call, mine)
        except Reached as reached:
            if reached.running is not running:
                raise
        finally:
            running.asks = False

    def _check(self, told: Mapping[str, Any], given: Mapping[str, Any]) -> None:
        """Verify that the rows fit the tokens.

        Raises:
            SequenceError: tokens of the image are masked in self-attention, or the rows have another batch size.
            PluginError: the rows have a wrong shape.
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
        """Returns the arguments of a block for the rows: those that were recorded for the first block, and no tokens of
        the other stream."""
        mine = {**given, **{name: value for name, value in told.items() if name in self.names[form]}, self.stream: rows}
        if self.joint:
            mine[self.other] = given[self.other][:, :0]
        return mine

    def _bind(self, form: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return {**dict(zip(self.names[form], args, strict=False)), **kwargs}


def _of_length(output: Any, rows: int) -> Tensor | None:
    """Returns the rows in the output of a block; None if the block does not return them, as the last block of SD3 for
    text."""
    parts = (output,) if isinstance(output, Tensor) else output
    return next((each for each in parts if isinstance(each, Tensor) and each.shape[1] == rows), None)


class JointAttention(AttentionOperator):
    """Makes the tokens and the rows attend to each other in one attention module."""

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
    """Returns the last `count` keys and values. These are the attention's own, without those that other adapters have
    inserted before them."""
    return key[:, :, -count:], value[:, :, -count:]


def add_stream(
    surgeon: Surgeon, site: StreamSite, operator: Callable[..., S], config: MethodConfig | None = None, **own: Any
) -> S:
    """Build ``operator(site, config, **own)``, a `RowStream`, and put it at a diffusion transformer.

    Returns the operator. Operators inside the blocks can use its `turn` to find out whether a block is running on the
    rows.
    """
    stream = surgeon.graft(site, operator, config, site.places, **own)
    for attention in site.attentions:
        surgeon.graft(attention, lambda at: JointAttention(at, stream))
    return stream
