"""The forward context: one object per forward of the host, with the inputs, the choice of active adapters, and values
and losses of operators.

Two hooks on the root module open and close the context. Operators get it from `forward_context`. If modules run again
inside backward (gradient checkpointing), they get the context of the forward that they repeat: the autograd nodes of
its outputs record it before its modules run again. So a block of `activate` or `route` may end before `backward()`
without changing the gradients.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from peftcore.errors import MissingContext, RouteError, SequenceError, TrainingError
from peftcore.forward.context.activation_checkpoints import reentrant, remember, remembered, running
from peftcore.forward.context.repeats import Repeats, of_batch, told_repeats
from peftcore.forward.context.row_random_numbers import own_draws_aside
from peftcore.forward.context.tokens import OF_DECODER, Prompt, Tokens
from peftcore.layers.kernels import transformed
from peftcore.roles.stacks import arguments, bound, caches_in, is_cache
from peftcore.utils.threads import this_thread

if TYPE_CHECKING:
    from peftcore.forward.choice.active_adapters import Choice
    from peftcore.forward.context.counter_based_random import CountedDraws
    from peftcore.forward.context.row_random_numbers import Streams
    from peftcore.forward.context.taps import Tap
    from peftcore.forward.rows.routing import OwnRows


class _Threads(threading.local):
    """The forward contexts that one thread has open."""

    def __init__(self) -> None:
        self.token = this_thread()
        self.calls: list[ForwardContext] = []
        self.calm: ForwardContext | None = None
        """The running forward of a host whose choice of active adapters has not changed since it began, so that modules
        need not determine it again. None if they have to."""
        self.traced: tuple[object, Choice] | None = None
        """The choice of active adapters of the running call (`using`), with the `Choices` of its host. Read by code
        that torch.compile traces."""
        self.outside: weakref.ref[ForwardContext] | None = None
        """The context for a part of the host that the user calls directly. The host's state keeps it alive."""
        self.generating: list[tuple[Sequence[object], int, Prompt | None]] = []
        """The running calls of ``generate``, the innermost last: the states of the hosts, the number of rows, and the
        prompt."""
        self.announced: dict[int, tuple[int, weakref.ref[ForwardContext]]] = {}
        """By host: the number of the backward pass, and the forward through which it runs now. The graph of the forward
        keeps it alive."""

    def disturb(self) -> None:
        """Make the modules of all running forwards of this thread determine the choice of active adapters again,
        because it may have changed."""
        for call in self.calls:
            call.calm = False
        self.calm = None

    def settle(self) -> None:
        """Let modules reuse the choice of active adapters of the innermost running forward, if it has not changed."""
        self.calm = self.calls[-1] if self.calls and self.calls[-1].calm else None


HERE = _Threads()


graph_task: Callable[[], int] = torch._C._current_graph_task_id
"""Returns the number of the backward pass that this thread runs; -1 outside of backward passes.

A private function of torch: no public function distinguishes a repeated forward from a first one.
"""


def repeating() -> bool:
    """Whether this thread is inside a backward pass. A forward that runs there repeats an earlier one."""
    return graph_task() != -1


class AdaptedHost(Protocol):
    """The state of a model, as `ForwardContext` needs it."""

    @property
    def running(self) -> MutableMapping[int, ForwardContext]:
        """The running forwards in all threads, by id."""

    def name_of(self, operator: nn.Module) -> str:
        """Returns the name of the injection to which an operator belongs.

        Raises:
            UnknownInjection: the operator belongs to no injection of the host.
        """

    def held(self, choice: Choice) -> AbstractContextManager[None]:
        """Returns a context manager that sets a choice of active adapters only for the code that this thread calls in
        the block."""

    def note_backward(self) -> None:
        """Record that backward runs through the recorded forwards."""


class ForwardContext:
    """The context of one forward of the host.

    Attributes:
        choice: the choice of active adapters when the forward began.
        taps: values that operators store for each other, by the number of the `Tap`. Values with `until_backward` are
            kept after the host has returned. This is a list, because torch.compile cannot trace changes of a dict that
            existed before.
        losses: scalars that operators add to the loss of the output, each with its operator; see `add_loss`.
        visits: the number of target modules that ran in training since the losses were last taken, if the user called a
            part of the host directly.
    """

    def __init__(
        self,
        state: AdaptedHost | None = None,
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
        """`passes` is the number of extra runs that `again` made. `number` is the number of this run; 0 for the forward
        itself."""
        self.open, self.calm, self.extra = True, False, False
        self.frame: FrameType | None = None
        """The Python frame that runs the host."""
        self.listed = False
        """Whether the forward is listed in `HostState.running`, which all threads can read."""
        self.recorded = torch.is_grad_enabled() or (model is not None and model.training)
        """Whether backward may repeat the forward. In a reentrant checkpoint, its modules first run without
        gradients."""
        self.within: list[Any] = []
        """The checkpoints that surround an extra pass. If they are repeated, the whole pass is repeated too."""
        self.rows: OwnRows | None = None
        """The rows of the batch that the running operator receives; None if it receives all rows."""
        self.drawn: tuple[Streams, list[Tensor], CountedDraws] | None = None
        """If an adapter of a route draws from its seed now: torch's generators, the saved states of the model's
        generators, and the `CountedDraws` that replace them. Otherwise None."""
        self.held: dict[int, list[int]] = {}
        """For a module that runs for several injections one after the other: the number of tokens in each layer of a
        cache before the first run, by id of the cache."""
        self._tokens: Tokens | None = None
        self._sizes: list[int] | None = None
        self._model, self._args, self._kwargs = model, args, kwargs or {}

    def count_tokens(self) -> None:
        """Store the ids of the tokens and their number in the cache as `tokens`. Called before the model adds the new
        tokens to the cache."""
        taken = () if self._model is None else inspect.signature(self._model.forward).parameters
        _, prompt = self._generating()
        self._tokens = Tokens(self.inputs, taken, prompt)

    def _generating(self) -> tuple[int, Prompt | None]:
        """Returns the number of rows of the ``generate`` of this host that runs now, and its prompt; 0 and None outside
        of ``generate``."""
        for hosts, rows, prompt in reversed(HERE.generating):
            if any(host is self.state for host in hosts):
                return rows, prompt
        return 0, None

    @property
    def prompt(self) -> Prompt | None:
        """The prompt of the running ``generate``, if this forward receives tokens of the prompt or tokens generated
        after it; otherwise None."""
        return None if self._tokens is None else self._tokens.prompt

    @property
    def tokens(self) -> Tokens:
        """The tokens of the host's forward, for all rows of the batch. Available for methods with
        `Method.reads_tokens`, and in a route with `since`.

        Raises:
            MissingContext: the user called a part of the host directly, the host has an encoder and a decoder, or it is
                compiled.
        """
        if self._tokens is None or not self._tokens.counted:
            raise MissingContext(
                "the tokens of this forward are not known: call the whole adapted model, uncompiled, with input_ids or "
                "inputs_embeds, and with a cache that counts tokens; models with an encoder and a decoder are not "
                "supported"
            )
        return self._tokens

    def tokens_behind(self, sequence: Sequence[int], like: Tensor) -> Tensor | None:
        """Returns a mask of a module's input tokens. In each row, it is False before a certain column and True from
        there on. This column is the last occurrence of a sequence of ids, or the one that the user passed in
        ``peftcore.call(model, since=...)``.

        Args:
            sequence: the ids; empty to use only the columns of `since`.
            like: the input ``[rows, tokens, ...]`` or ``[rows * tokens, ...]``.

        Returns:
            ``[rows, tokens]`` or ``[rows * tokens]`` of bool. None, which means all tokens, if there is neither a
                sequence nor `since`.

        Raises:
            MissingContext: the first column is not known; see `Tokens.since`.
            SequenceError: the module receives other tokens than the host.
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
                f"a module received an input of shape {tuple(like.shape)}, but the model's tokens have shape "
                f"{tuple(own.shape)}: exclude it from the adapter's target modules"
            )
        return own.flatten()

    def tokens_held(self, cache: Any, depth: int) -> int:
        """Returns the number of tokens in a layer of a transformers cache before the operator's module ran for the
        first time in this forward. In a route or a composition the module runs several times, and each run may add
        tokens to the cache.

        Raises:
            AttributeError, ValueError: the cache counts no tokens.
        """
        lengths = self.held.get(id(cache))
        if lengths is None:
            return int(cache.get_seq_length(depth))
        return lengths[depth] if depth < len(lengths) else 0  # a layer that the module has made since

    @contextmanager
    def one_module(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[None]:
        """Context manager for a module that runs for several injections one after the other. `args` and `kwargs` are
        its arguments."""
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
        """The values given to `peftcore.call(model, ...)`; in a route only the entries of the operator's rows."""
        told = {} if self.choice is None else self.choice.context
        return told if self.rows is None or not told else {name: self.rows.told(each) for name, each in told.items()}

    def need(self, name: str) -> Any:
        """Returns one value given to `peftcore.call(model, ...)`. In a route, only the entries of the operator's rows.

        Raises:
            MissingContext: the user did not pass the value.
        """
        self._check_told(name)
        return self.context[name]

    def told(self, name: str, otherwise: Any = None) -> Any:
        """Returns one value given to `peftcore.call(model, ...)`, or `otherwise` if the user did not pass it. In a
        route, the value contains the entries of all rows of the batch."""
        return otherwise if self.choice is None else self.choice.context.get(name, otherwise)

    def _check_told(self, name: str) -> None:
        if self.choice is None or name not in self.choice.context:
            raise MissingContext(
                f"this method needs a value for {name!r}: pass it with peftcore.call(model, {name}=...): ..."
            )

    def for_rows(self, name: str, rows: int, value: Tensor | None = None) -> Tensor:
        """Returns the entries of a value from `peftcore.call` for the rows that a module receives. In a route, these
        are the operator's rows. The value has one entry for all rows, or one per row of the batch. If the module's
        input splits each row of the batch into several adjacent rows (windows, frames, flat tokens), the entry applies
        to all of them.

        Args:
            name: the name of the value in `peftcore.call`.
            rows: the number of rows that the module receives; a multiple of the entries.
            value: a tensor with the entries of all rows. By default the value given to `peftcore.call`, which must be a
                tensor.

        Raises:
            MissingContext: the user did not pass the value.
            RouteError: the number of rows does not match the entries, and it is not known how the batch repeats them.
        """
        if value is None:
            self._check_told(name)
            value = self.told(name)
            assert value is not None
        if len(value) == 1:
            return value
        if not len(value):
            raise RouteError(f"{name} has no entries: pass one for each row, or one for all rows")
        own = of_batch(name, value, *self._repeated(len(value), rows))
        own = own if self.rows is None else self.rows.of(own)
        if rows % len(own):
            raise RouteError(
                f"a module received {rows} rows, which is not a multiple of the {len(own)} entries of {name}: exclude "
                "it from the adapter's target modules, or pass one entry for all rows"
            )
        return own

    def keep_rows(self, keep: Callable[..., Any], *tensors: Tensor) -> Any:
        """Returns `keep(*tensors)`, for a function that stores tensors with one row per row of the batch.

        In a route, the operator has only its rows. So `keep` receives tensors with all rows of the batch, with zeros in
        the rows of other injections, and only the operator's rows of its output are returned. Use it for state that
        persists between forwards and is reordered or repeated with the batch, such as layers of the model's cache.
        """
        if self.rows is None:
            return keep(*tensors)
        return self.rows.of(keep(*map(self.rows.spread, tensors)))

    def _repeated(self, entries: int, rows: int) -> tuple[int, Repeats]:
        """Returns the number of rows of the batch, and how many times the batch repeats each entry. `entries` is the
        number of entries of a value, `rows` the number of rows that the module receives."""
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
        """Whether this thread is inside a backward pass. A forward that runs there repeats an earlier one (activation
        checkpointing)."""
        return repeating()

    @property
    def inputs(self) -> Mapping[str, Any]:
        """The host's arguments by name. In a route, only the operator's rows. Empty if the user called a part of the
        host directly."""
        if self._model is None:
            return {}
        inputs = bound(self._model, self._args, self._kwargs)
        return inputs if self.rows is None else {name: self.rows.of(each) for name, each in inputs.items()}

    @property
    def of_two_streams(self) -> bool:
        """Whether the host takes tokens of an encoder and of a decoder, each with a separate mask."""
        taken = () if self._model is None else inspect.signature(self._model.forward).parameters
        return not OF_DECODER.isdisjoint(taken)

    def add_loss(self, loss: Tensor, operator: nn.Module) -> None:
        """Add a scalar to the loss of the host's output, in training. If backward repeats the forward, the scalar is
        not added again.

        If the output lacks a loss, the scalar is stored. `Injection.losses` of the operator's injection returns it.

        Args:
            loss: a scalar of shape ``[]``. In a route it is computed from the operator's rows.
            operator: the operator that calls this: ``forward_context().add_loss(loss, self)``.

        Raises:
            TrainingError: as `check_loss_learns`.
            RouteError: the operator receives rows of other adapters too, so the loss would include them.
        """
        self.check_loss_learns()
        route = None if self.choice is None else self.choice.route
        if route is not None and self.rows is None and (torch.compiler.is_compiling() or len(route.present) > 1):
            raise RouteError(
                f"the loss that {type(operator).__name__} adds would include rows of other adapters: compiled code "
                "runs it on all rows, as do modules that do not receive one row for each row of the batch. Train "
                "uncompiled, exclude that module from its targets, or train this adapter in separate batches"
            )
        if self.open and (self._model is not None or (self.visits and not repeating())):
            self.losses.append((operator, loss))

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Context manager for running a module on other inputs than the model's, such as a prompt. Losses and values of
        taps that this run changes are restored afterwards."""
        taps, losses = [*self.taps], [*self.losses]
        try:
            yield
        finally:
            self.taps[:], self.losses[:] = taps, losses

    def check_loss_learns(self) -> None:
        """Verify that a loss that an operator computes now would get a gradient.

        Raises:
            TrainingError: the loss is computed inside a reentrant checkpoint, which keeps no graph.
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
        """Run ``run(*args, **kwargs)`` once more without one injection, in this thread only. Returns the output.

        In a route, the rows of the injection then run the base model. In a composition, its parts do. All other
        injections act as before. Values of taps and losses that this run stores are deleted at its end.

        Args:
            name: the injection's name. An operator does not know the name of its injection, so it passes itself:
                ``forward_context().without(self, call, x)``.
            run: the function to run, such as the operator's ``call``.
            args: the positional arguments of `run`.
            caches: a function that is applied to each cache among the arguments. By default caches are copied, so the
                run reads them but does not change them. With `PassCache.beside`, such runs share a separate cache of
                the values that they compute.
            kwargs: the keyword arguments of `run`.

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
        with state.held(choice):
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
        """Run the host's forward once more, with the same arguments and active adapters, for `Method.output_loss`.

        In training, random functions such as dropout draw new numbers. Values of taps and losses that this run stores
        are deleted at its end.

        Args:
            left: values of taps at the beginning of this run. Operators can recognize the run by them.

        Returns:
            The host's output, with its graph, before hooks of the host change it. In a route, only the adapter's rows.

        Raises:
            MissingContext: the user called a part of the host directly.
            TrainingError: the host received a cache, which already contains the tokens of this forward.
        """
        model = self._model
        if model is None:
            raise MissingContext(
                "a part of the model was called directly, but only the whole model can run once more: call the adapted "
                "model itself"
            )
        if given := caches_in(self.inputs):
            raise TrainingError(
                f"this method runs the model twice, but {next(iter(given))}= already contains the tokens: train "
                "without it"
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
        """Close the context after the host has returned. Values of taps are activations, so they are deleted, except
        for those with `until_backward`."""
        self.open, self.frame = False, None
        if self.listed and self.state is not None:
            self.listed = False
            self.state.running.pop(id(self), None)
        self.taps = [tap for tap in self.taps if tap[2]]


_COMPILED_ALONE = ForwardContext()
"""The context for compiled parts of a host that the user calls directly."""


def batch_sizes(inputs: Mapping[str, Any]) -> list[int]:
    """Returns the numbers of rows of the tensors among a host's arguments, in order. A 1 is last, since such tensors
    are shared by all rows (positions ``[1, tokens]``)."""
    found = [value for value in inputs.values() if isinstance(value, Tensor) and value.dim()]
    found = [value for value in found if value.dim() > 1] or found
    return sorted((len(value) for value in found), key=lambda size: size == 1)


def forward_context() -> ForwardContext:
    """Returns the context of the host's forward that runs in this thread. Inside backward, returns the context of the
    forward that is repeated.

    Operators call it in their forward. If a part of the host was called directly (such as an encoder by `generate`),
    the inputs of the context are empty.
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


def remember_in_checkpoint(state: AdaptedHost, choice: Choice) -> None:
    """Store the choice of active adapters and the context of this forward in the checkpoints that now run in this
    thread."""
    here = next((call for call in reversed(HERE.calls) if call.state is state), None)
    if here is None or here.recorded:
        for kept in running():
            if here is None or all(kept is not each for each in here.within):
                remember(kept, state, choice, here or outside() or ForwardContext(state, choice))


def drop_interrupted() -> None:
    """Close the contexts of forwards that were ended by a KeyboardInterrupt or a SystemExit, since torch does not call
    hooks then."""
    while HERE.calls and not (HERE.calls[-1].open and _runs(HERE.calls[-1].frame)):
        HERE.calls[-1].close()
        HERE.calls.pop()
    HERE.settle()  # also where the interrupt came just before


def _runs(wanted: FrameType | None) -> bool:
    """Whether the call with the given frame still runs in this thread. Always True for a traced call, which lacks a
    frame."""
    if wanted is None:
        return True
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame is not wanted:
        frame = frame.f_back
    return frame is not None


def outside() -> ForwardContext | None:
    """Returns the context of a part of the host that was called directly in this thread; None otherwise."""
    return None if HERE.outside is None else HERE.outside()


LOST = (
    "a checkpointed block adds a loss of the adapter, and reentrant checkpoints give it no gradient: call "
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
    """Add hooks to the autograd nodes of a forward's outputs. In backward they record the context of this forward,
    before the nodes inside it run."""
    if call.state is None or transformed():
        return
    state = call.state

    def told(gradients: tuple[Any, ...]) -> None:
        HERE.announced[id(state)] = graph_task(), weakref.ref(call)
        state.note_backward()
        HERE.disturb()  # a forward of the host may be under way: a module that runs again in its middle must ask

    for tensor in tensors_in(output):
        if tensor.grad_fn is not None:
            tensor.grad_fn.register_prehook(told)
