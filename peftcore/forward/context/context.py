"""The forward context, one for each forward of the host: its inputs, the choice it ran under, taps, losses.

Two hooks on the root open and close it; operators get it from `forward_context`. Modules that run again inside
backward (gradient checkpointing) find the context of the forward they repeat: its outputs' autograd nodes announce
it before any of its modules can run again. So leaving `activate` or `route` before `backward()` changes nothing.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peftcore.errors import MissingContext, RouteError, SequenceError, TrainingError
from peftcore.forward.context.checkpoints import reentrant, remember, remembered, running
from peftcore.forward.context.draws import own_draws_aside
from peftcore.forward.context.repeats import Repeats, of_batch, told_repeats
from peftcore.forward.context.tokens import OF_DECODER, Prompt, Tokens
from peftcore.layers.kernels import transformed
from peftcore.roles.stacks import arguments, caches_in, is_cache
from peftcore.utils.threads import this_thread

if TYPE_CHECKING:
    from peftcore.forward.choice.active_adapters import Choice
    from peftcore.forward.context.counted_draws import CountedDraws
    from peftcore.forward.context.draws import Streams
    from peftcore.forward.context.taps import Tap
    from peftcore.forward.rows.routing import OwnRows
    from peftcore.forward.state.host_state import HostState


class _Threads(threading.local):
    """The forward contexts that one thread has open."""

    def __init__(self) -> None:
        self.token = this_thread()
        self.calls: list[ForwardContext] = []
        self.calm: ForwardContext | None = None
        """The forward of a host that runs now, where its modules need not ask what was chosen: they take its choice."""
        self.traced: tuple[object, Choice] | None = None
        """The choice for one call that runs now, with the `Choices` of its host, for code that torch.compile traces."""
        self.outside: weakref.ref[ForwardContext] | None = None
        """The context for a part of the host that runs by itself; the host's state holds it."""
        self.generating: list[tuple[Sequence[object], int, Prompt | None]] = []
        """The calls of ``generate`` that run, the innermost last: the states of its hosts, how many rows it was given,
        and its prompt."""
        self.announced: dict[int, tuple[int, weakref.ref[ForwardContext]]] = {}
        """The backward pass (its number) and the forward that it goes through now, which its graph holds, by host."""

    def disturb(self) -> None:
        """Let the modules of all forwards that this thread runs ask again what was chosen: something else may be."""
        for call in self.calls:
            call.calm = False
        self.calm = None

    def settle(self) -> None:
        """Let modules follow the innermost forward that runs."""
        self.calm = self.calls[-1] if self.calls and self.calls[-1].calm else None


HERE = _Threads()


graph_task: Callable[[], int] = torch._C._current_graph_task_id
"""The number of the backward pass that this thread runs, -1 outside of any.

A private function of torch: nothing public tells a repeated forward from a first one."""


def repeating() -> bool:
    """Whether this thread is inside a backward pass, where a forward repeats an earlier one."""
    return graph_task() != -1


class ForwardContext:
    """The context of one forward of the host.

    Attributes:
        choice: the choice when it began.
        taps: values that operators leave for each other, by number of the `Tap`; those that are held until backward are
            there when the host has returned. A list, since torch.compile does not trace grafts behind a change of a
            dict that was there before.
        losses: scalars that operators add to the loss of the output, each with its operator; see `add_loss`.
        visits: of a part of the host that runs by itself, how many target modules ran in training since the losses
            were taken.
    """

    def __init__(
        self,
        state: HostState | None = None,
        choice: Choice | None = None,
        model: nn.Module | None = None,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.state, self.choice = state, choice
        self.taps: list[tuple[int, Any, bool, OwnRows | None, int | None]] = []
        self.losses: list[tuple[nn.Module, Tensor]] = []
        self.visits = 0
        self.passes, self.number = 0, 0
        """How many passes `again` made, and which of them this is; 0 is the forward itself."""
        self.open, self.calm, self.extra = True, False, False
        self.frame: FrameType | None = None
        """The call of the host whose forward it is."""
        self.listed = False
        """Whether it is among the forwards that run, for all threads to see (`HostState.running`)."""
        self.recorded = torch.is_grad_enabled() or (model is not None and model.training)
        """Whether backward may repeat it; in a reentrant checkpoint its modules run without gradients."""
        self.within: list[Any] = []
        """The checkpoints in which an extra pass runs, which repeat the pass and what is round it."""
        self.rows: OwnRows | None = None
        """The rows of the batch that the operator which runs is given, where it is not given all of them."""
        self.drawn: tuple[Streams, list[Tensor], CountedDraws] | None = None
        """While an adapter of a route draws by its own seed: torch's generators, where the model's draws were, and what
        draws in their place."""
        self.held: dict[int, list[int]] = {}
        """How many tokens each layer of a cache held before, by id of the cache, while a module runs for several
        injections one after the other."""
        self._tokens: Tokens | None = None
        self._sizes: list[int] | None = None
        self._model, self._args, self._kwargs = model, args, kwargs or {}

    def count_tokens(self) -> None:
        """Count the tokens, while the cache holds none of the new ones yet."""
        taken = () if self._model is None else inspect.signature(self._model.forward).parameters
        _, prompt = self._generating()
        self._tokens = Tokens(self.inputs, taken, prompt)

    def _generating(self) -> tuple[int, Prompt | None]:
        """Returns how many rows the ``generate`` of the host was given in which this runs, and its prompt."""
        for hosts, rows, prompt in reversed(HERE.generating):
            if any(host is self.state for host in hosts):
                return rows, prompt
        return 0, None

    @property
    def prompt(self) -> Prompt | None:
        """The prompt of the ``generate`` in which this forward runs, whose tokens it is given (or generated ones behind
        it); None elsewhere."""
        return None if self._tokens is None else self._tokens.prompt

    @property
    def tokens(self) -> Tokens:
        """The tokens of the host's forward, of all rows of the batch; for methods with `Method.reads_tokens`, and in a
        route with `since`.

        Raises:
            MissingContext: a part of the host was called by itself, it has an encoder and a decoder, or it is compiled.
        """
        if self._tokens is None or not self._tokens.counted:
            raise MissingContext(
                "the tokens are those of input_ids (or inputs_embeds) of the model that was adapted, where it has one "
                "stack of them and runs uncompiled, and of a cache that counts tokens: call that model"
            )
        return self._tokens

    def tokens_behind(self, sequence: Sequence[int], like: Tensor) -> Tensor | None:
        """Returns which tokens of a module's input stand at or behind the last occurrence of a sequence of ids in their
        row, or behind the columns that ``peftcore.call(model, since=...)`` says.

        Args:
            sequence: the ids; none where only what is told counts.
            like: the input ``[rows, tokens, ...]`` or ``[rows * tokens, ...]``.

        Returns:
            ``[rows, tokens]`` or ``[rows * tokens]`` of bool; None for all: there is no sequence, and nothing is told.

        Raises:
            MissingContext: nothing says where that is; see `Tokens.since`.
            SequenceError: the module is given other tokens than the host.
        """
        told = self.told("since")
        if not sequence and told is None:
            return None
        tokens = self.tokens
        if told is not None:  # of all rows of the batch, of which the operator's own are taken below
            entries = torch.as_tensor(told).view(-1)
            told = of_batch("since", entries, tokens.batch, self._repeated(len(entries), tokens.batch)[1])
        since = tokens.since(sequence, told).to(like.device)
        behind = torch.arange(tokens.held, tokens.held + tokens.new, device=like.device) >= since.unsqueeze(-1)
        own = behind if self.rows is None else self.rows.of_tokens(behind)
        if own.shape == like.shape[: own.dim()]:
            return own
        if own.numel() != len(like):
            raise SequenceError(
                f"a module is given {tuple(like.shape)}, and the model {tuple(own.shape)} tokens: exclude it from the "
                "adapter's target modules"
            )
        return own.flatten()

    def tokens_held(self, cache: Any, depth: int) -> int:
        """Returns how many tokens a layer of a cache of transformers held when the module began at which the operator
        stands. Where a route or a composition has injections act one after the other, the module may have run already
        when an operator asks.

        Raises:
            AttributeError, ValueError: it counts no tokens.
        """
        lengths = self.held.get(id(cache))
        if lengths is None:
            return int(cache.get_seq_length(depth))
        return lengths[depth] if depth < len(lengths) else 0  # a layer that the module has made since

    @contextmanager
    def one_module(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[None]:
        """Context manager for the call of a module that runs for several injections, with its arguments by position
        and by name."""
        outer, self.held = self.held, {}
        given = {**dict(zip(arguments(type(module)), args, strict=False)), **kwargs}
        for cache in caches_in(given).values():
            with suppress(AttributeError, ValueError):  # caches of states count no tokens
                self.held[id(cache)] = [int(cache.get_seq_length(depth)) for depth in range(len(cache))]
        try:
            yield
        finally:
            self.held = outer

    @property
    def context(self) -> Mapping[str, Any]:
        """The values given to `peftcore.call(model, ...)`; in a route those of the operator's own rows."""
        told = {} if self.choice is None else self.choice.context
        return told if self.rows is None or not told else {name: self.rows.told(each) for name, each in told.items()}

    def need(self, name: str) -> Any:
        """Returns one entry of the context.

        Raises:
            MissingContext: `call` was not given it.
        """
        self._check_told(name)
        return self.context[name]

    def told(self, name: str, otherwise: Any = None) -> Any:
        """Returns one entry of what was given to `peftcore.call(model, ...)`, in a route too as it was given."""
        return otherwise if self.choice is None else self.choice.context.get(name, otherwise)

    def _check_told(self, name: str) -> None:
        if self.choice is None or name not in self.choice.context:
            raise MissingContext(f"this method needs to be told {name!r}: with peftcore.call(model, {name}=...): ...")

    def for_rows(self, name: str, rows: int, value: Tensor | None = None) -> Tensor:
        """Returns the entries of a value that calls tell for the rows that a module is given, in a route the operator's
        own: one for all, or one for each row of the batch, which stands for the adjacent rows that the module has of it
        (windows, frames, flat tokens).

        Args:
            name: the name by which calls tell it.
            rows: how many rows the module is given; a multiple of the entries.
            value: what to look up entries in, of all rows; None for what was told, a tensor.

        Raises:
            MissingContext: nobody told it.
            RouteError: there are not as many rows, and nothing says how the batch repeats entries.
        """
        if value is None:
            self._check_told(name)
            value = self.told(name)
            assert value is not None
        if len(value) == 1:
            return value
        if not len(value):
            raise RouteError(f"{name} has no entries: give one for each row, or one for all")
        own = of_batch(name, value, *self._repeated(len(value), rows))
        own = own if self.rows is None else self.rows.of(own)
        if rows % len(own):
            raise RouteError(
                f"a module is given {rows} rows, which cannot be told apart by the {len(own)} entries of {name}: "
                "exclude it from the adapter's target modules, or give one entry for all rows"
            )
        return own

    def keep_rows(self, keep: Callable[..., Any], *tensors: Tensor) -> Any:
        """Returns what `keep` returns of tensors with a row for each row that an operator is given. In a route these
        are its own ones: `keep` is given all rows of the batch then, with zeros for the others, and of what it returns
        the operator gets its own. For what stays from one forward to the next, and is reordered or repeated with the
        batch: layers of the model's cache."""
        if self.rows is None:
            return keep(*tensors)
        return self.rows.of(keep(*map(self.rows.spread, tensors)))

    def _repeated(self, entries: int, rows: int) -> tuple[int, Repeats]:
        """Returns how many rows the batch has, where a value has so many entries and a module is given so many rows;
        and how it repeats entries."""
        repeats = told_repeats({} if self.choice is None else self.choice.context)
        route = None if self.rows is None else self.rows.route
        if self._sizes is None:
            inputs = {} if self._model is None else bound(self._model, self._args, self._kwargs)
            self._sizes = batch_sizes(inputs)
        sizes = self._sizes
        if sizes:  # of several (pictures and texts), the one that the module is given
            batch = rows if rows == entries and entries in sizes else sizes[0]
        elif route is not None:
            batch = len(route.index) // max(route.tokens, 1) * route.copies
        else:  # a part of the host runs by itself
            batch = rows if repeats is None else entries * repeats.guidance * repeats.copies
        if repeats is None:
            known = entries in (self._generating()[0], 0 if route is None else len(route.index))
            repeats = Repeats(copies=max(batch // entries, 1)) if known else Repeats()
        return batch, repeats

    @property
    def repeating(self) -> bool:
        """Whether this thread is inside a backward pass, which runs parts of the forward again."""
        return repeating()

    @property
    def inputs(self) -> Mapping[str, Any]:
        """The host's arguments by the names of its forward, in a route those of the operator's own rows; empty where a
        part of the host was called by itself."""
        if self._model is None:
            return {}
        inputs = bound(self._model, self._args, self._kwargs)
        return inputs if self.rows is None else {name: self.rows.of(each) for name, each in inputs.items()}

    @property
    def of_two_streams(self) -> bool:
        """Whether the host takes tokens of an encoder and of a decoder, which have masks of their own."""
        taken = () if self._model is None else inspect.signature(self._model.forward).parameters
        return not OF_DECODER.isdisjoint(taken)

    def add_loss(self, loss: Tensor, operator: nn.Module) -> None:
        """Add a scalar to the loss of the host's output, in training. Repeated forwards add nothing twice.

        Where the output has no loss, it waits for `Injection.losses` of the injection that the operator belongs to.

        Args:
            loss: of shape ``[]``; in a route of the rows that the operator is given, which are its own adapter's.
            operator: the operator that adds it, ``forward_context().add_loss(loss, self)``.

        Raises:
            TrainingError: as `check_loss_learns`.
            RouteError: the operator is given rows of other adapters too, so the loss would be of all of them.
        """
        self.check_loss_learns()
        route = None if self.choice is None else self.choice.route
        if route is not None and self.rows is None and (torch.compiler.is_compiling() or len(route.present) > 1):
            raise RouteError(
                f"the loss that a {type(operator).__name__} adds would be one of the rows of all adapters: it runs on "
                "all when compiled, and where a module is not given a row for each of the batch. Train uncompiled, "
                "exclude that module from its targets, or train this adapter in batches of its own"
            )
        if self.open and (self._model is not None or (self.visits and not repeating())):
            self.losses.append((operator, loss))

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Context manager in which a module runs on something else than the model gives it, such as a prompt: taps and
        losses are afterwards what they were, for they are those of the model's own tokens."""
        taps, losses = [*self.taps], [*self.losses]
        try:
            yield
        finally:
            self.taps[:], self.losses[:] = taps, losses

    def check_loss_learns(self) -> None:
        """Verify that a loss which an operator makes now has a gradient.

        Raises:
            TrainingError: it is made inside a reentrant checkpoint, which keeps none.
        """
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling() and reentrant() is not None:
            raise TrainingError(LOST)

    def without(
        self,
        name: str | nn.Module,
        run: Callable[..., Any],
        *args: Any,
        caches: Callable[[Any], Any] = copy.deepcopy,
        **kwargs: Any,
    ) -> Any:
        """Run ``run(*args, **kwargs)`` once more with one injection off, in this thread alone.

        In a route its rows run the bare base model, in a composition its parts; what else acts stays as it is. Taps
        that it leaves and losses that it adds are its own, and end with it.

        Args:
            name: the injection's name; or an operator of it, since an operator does not know the name but has itself:
                ``forward_context().without(self, call, x)``.
            run: what to run, such as the operator's ``call``.
            args: its arguments, with `kwargs`.
            caches: what stands for a cache among the arguments: a copy, so the pass sees what is in it and
                leaves it as it is; or `PassCache.beside`, a cache of what such passes computed themselves.

        Raises:
            UnknownInjection: the operator belongs to no injection of the host.
        """
        state = self.state
        if state is None or self.choice is None:
            return run(*args, **kwargs)
        choice = self.choice.without(name if isinstance(name, str) else state.name_of(name))
        args = tuple(caches(each) if is_cache(each) else each for each in args)
        kwargs |= {name: caches(each) for name, each in caches_in(kwargs).items()}
        inner = ForwardContext(state, choice, self._model, self._args, self._kwargs)
        inner.extra, inner.calm, inner.taps, inner.frame = True, not repeating(), [*self.taps], sys._getframe()
        inner.within = running() if inner.recorded else []
        before = len(HERE.calls)
        with state.choices.held(choice):
            HERE.calls.append(inner)
            HERE.settle()
            try:
                output = run(*args, **kwargs)
            finally:
                del HERE.calls[before:]
        inner.close()
        announce(output, inner)
        announce((args, kwargs), self)  # what backward comes to when it is through with the pass
        return output

    def again(self, left: Mapping[Tap, Any] | None = None) -> Any:
        """Run the host's forward once more, on the same arguments and under the same choice, for `Method.output_loss`.

        What draws in training draws anew. Taps that the pass leaves and losses that it adds end with it.

        Args:
            left: what taps hold in that pass from its beginning on, of which operators see that it is this one.

        Returns:
            What the host returns, with its graph, before hooks of the host change it; in a route the adapter's own rows
            of it.

        Raises:
            MissingContext: a part of the host was called by itself.
            TrainingError: the host was given a cache, which has the tokens of this forward by now.
        """
        model = self._model
        if model is None:
            raise MissingContext("a part of the model was called by itself: only the whole model runs once more")
        if given := caches_in(self.inputs):
            raise TrainingError(
                f"the model is to run twice, and {next(iter(given))}= has the tokens already: train without it"
            )
        inner = ForwardContext(self.state, self.choice, model, self._args, self._kwargs)
        self.passes += 1
        inner.extra, inner._tokens, inner.number = True, self._tokens, self.passes
        inner.taps = [(tap.key, value, True, None, None) for tap, value in (left or {}).items()]
        compiling = torch.compiler.is_compiling()
        if not compiling:
            inner.frame, inner.within = sys._getframe(), running() if inner.recorded else []
        before = len(HERE.calls)
        HERE.calls.append(inner)
        try:
            with nullcontext() if self.drawn is None else own_draws_aside(self):
                output = model.forward(*self._args, **self._kwargs)
        finally:
            del HERE.calls[before:]
        inner.close()
        if not compiling:
            announce(output, inner)
        return output if self.rows is None else self.rows.of(output)

    def close(self) -> None:
        """Close the context when the host has returned: taps hold activations and are dropped, but for those that
        backward will read."""
        self.open, self.frame = False, None
        if self.listed and self.state is not None:
            self.listed = False
            self.state.running.pop(id(self), None)
        self.taps = [tap for tap in self.taps if tap[2]]


_COMPILED_ALONE = ForwardContext()
"""The context for parts of a host that are compiled and run by themselves."""


def bound(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a module's forward by name; those that ``**kwargs`` takes are merged with the named
    ones."""
    signature = inspect.signature(module.forward)
    arguments = dict(signature.bind_partial(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(name, {}))
    return arguments


def batch_sizes(inputs: Mapping[str, Any]) -> list[int]:
    """Returns how many rows the tensors among a host's arguments have, in order; what stands for all rows (positions
    ``[1, tokens]``) comes last."""
    found = [value for value in inputs.values() if isinstance(value, Tensor) and value.dim()]
    found = [value for value in found if value.dim() > 1] or found
    return sorted((len(value) for value in found), key=lambda size: size == 1)


def forward_context() -> ForwardContext:
    """Returns the context of the forward of the host that runs in this thread; inside backward, that of the forward
    being repeated.

    For operators, inside their forward. Where a part of the host was called by itself (an encoder by `generate`), the
    context has no inputs.
    """
    if torch.compiler.is_compiling():
        return HERE.calls[-1] if HERE.calls else _COMPILED_ALONE
    if HERE.calls and HERE.calls[-1].extra:
        return HERE.calls[-1]
    if repeating():
        told = remembered(None)
        if told is not None:
            context: ForwardContext = told[1]
            return context
        here = graph_task()
        for task, reference in reversed(HERE.announced.values()):
            call = reference()
            if task == here and call is not None:
                return call
    drop_interrupted()
    return HERE.calls[-1] if HERE.calls else outside() or ForwardContext()


def remember_in_checkpoint(state: HostState, choice: Choice) -> None:
    """Keep the choice, and the context of this forward, for the checkpoints in which a module of the host runs."""
    here = next((call for call in reversed(HERE.calls) if call.state is state), None)
    if here is None or here.recorded:
        for kept in running():
            if here is None or all(kept is not each for each in here.within):
                remember(kept, state, choice, here or outside() or ForwardContext(state, choice))


def drop_interrupted() -> None:
    """Close the contexts of forwards that do not run any more: torch calls no hook when a KeyboardInterrupt or a
    SystemExit ends a forward."""
    while HERE.calls and not _runs(HERE.calls[-1].frame):
        HERE.calls.pop().close()
        HERE.settle()


def _runs(wanted: FrameType | None) -> bool:
    """Whether a call still runs in this thread; nothing says it of one that was traced."""
    if wanted is None:
        return True
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame is not wanted:
        frame = frame.f_back
    return frame is not None


def outside() -> ForwardContext | None:
    """Returns the context for a part of the host that runs by itself in this thread, if there is one."""
    return None if HERE.outside is None else HERE.outside()


LOST = (
    "a block adds a loss of the adapter's own, which a reentrant checkpoint gives no gradient: take the others, "
    "model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})"
)


def tensors_in(output: Any) -> Iterator[Tensor]:
    """Yields the tensors in nested containers."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors_in(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from tensors_in(value)
    elif dataclasses.is_dataclass(output):
        yield from tensors_in(vars(output))


def announce(output: Any, call: ForwardContext) -> None:
    """Hook the outputs' gradients, so that backward announces this forward: their nodes run before anything inside."""
    if call.state is None or transformed():
        return
    state = call.state

    def told(gradients: tuple[Any, ...]) -> None:
        HERE.announced[id(state)] = graph_task(), weakref.ref(call)
        state.recorder.drained = True
        HERE.disturb()  # a forward of the host may be under way: a module that runs again in its middle must ask

    for tensor in tensors_in(output):
        if tensor.grad_fn is not None:
            tensor.grad_fn.register_prehook(told)
