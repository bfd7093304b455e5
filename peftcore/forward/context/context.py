"""The forward context, one for each forward of the host: its inputs, its choice, taps and losses.

Two hooks on the root open and close the context; operators get it from `forward_context`. Modules that run again inside
backward (gradient checkpointing) find the context of the forward that they repeat: the autograd nodes of its outputs
announce it before its modules run again. So exiting `activate` or `route` before `backward()` has no effect on the
gradients.
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
        """The running forward of a host whose choice its modules can take without looking it up."""
        self.traced: tuple[object, Choice] | None = None
        """The choice of the running call (`using`), with the `Choices` of its host, for code that torch.compile
        traces."""
        self.outside: weakref.ref[ForwardContext] | None = None
        """The context for a part of the host that runs by itself; the host's state holds it."""
        self.generating: list[tuple[Sequence[object], int, Prompt | None]] = []
        """The calls of ``generate`` that run, the innermost last: the states of its hosts, its number of rows, and its
        prompt."""
        self.announced: dict[int, tuple[int, weakref.ref[ForwardContext]]] = {}
        """By host: the number of the backward pass, and the forward that it runs through now, which its graph holds."""

    def disturb(self) -> None:
        """Make the modules of all running forwards of this thread look up the choice again, because it may have
        changed."""
        for call in self.calls:
            call.calm = False
        self.calm = None

    def settle(self) -> None:
        """Make modules use the choice of the innermost running forward."""
        self.calm = self.calls[-1] if self.calls and self.calls[-1].calm else None


HERE = _Threads()


graph_task: Callable[[], int] = torch._C._current_graph_task_id
"""The number of the backward pass that this thread runs, -1 outside of any.

A private function of torch: no public function distinguishes a repeated forward from a first one."""


def repeating() -> bool:
    """Whether this thread is inside a backward pass, in which a forward repeats an earlier forward."""
    return graph_task() != -1


class AdaptedHost(Protocol):
    """The state of a model, as the contexts of its forwards need it."""

    @property
    def running(self) -> MutableMapping[int, ForwardContext]:
        """The forwards that run now, in all threads, by id."""

    def name_of(self, operator: nn.Module) -> str:
        """Returns the name of the injection to which an operator belongs.

        Raises:
            UnknownInjection: the operator belongs to no injection of the host.
        """

    def held(self, choice: Choice) -> AbstractContextManager[None]:
        """Returns the context manager in which a choice holds only for the code that this thread calls."""

    def note_backward(self) -> None:
        """Note that backward runs through the recorded forwards."""


class ForwardContext:
    """The context of one forward of the host.

    Attributes:
        choice: the choice when it began.
        taps: values that operators store for each other, by the number of the `Tap`; values held until backward stay
            after the host has returned. A list, since torch.compile does not trace grafts after a change of a dict that
            existed before.
        losses: scalars that operators add to the loss of the output, each with its operator; see `add_loss`.
        visits: for a part of the host that was called directly: the number of target modules that ran in training since
            the losses were last taken.
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
        """The number of passes that `again` made, and the number of this pass; 0 is the forward itself."""
        self.open, self.calm, self.extra = True, False, False
        self.frame: FrameType | None = None
        """The Python frame of the host's call."""
        self.listed = False
        """Whether the forward is listed in `HostState.running`, which all threads can read."""
        self.recorded = torch.is_grad_enabled() or (model is not None and model.training)
        """Whether backward may repeat the forward; in a reentrant checkpoint its modules run without gradients."""
        self.within: list[Any] = []
        """The checkpoints in which an extra pass runs; they repeat the pass together with the surrounding code."""
        self.rows: OwnRows | None = None
        """The rows of the batch that the running operator receives; None if it receives all rows."""
        self.drawn: tuple[Streams, list[Tensor], CountedDraws] | None = None
        """While an adapter of a route draws from its seed: torch's generators, the saved states of the model's
        generators, and the `CountedDraws` that replace them."""
        self.held: dict[int, list[int]] = {}
        """While a module runs for several injections one after the other: the number of tokens that each layer of a
        cache held before, by id of the cache."""
        self._tokens: Tokens | None = None
        self._sizes: list[int] | None = None
        self._model, self._args, self._kwargs = model, args, kwargs or {}

    def count_tokens(self) -> None:
        """Count the tokens, before the new ones are added to the cache."""
        taken = () if self._model is None else inspect.signature(self._model.forward).parameters
        _, prompt = self._generating()
        self._tokens = Tokens(self.inputs, taken, prompt)

    def _generating(self) -> tuple[int, Prompt | None]:
        """Returns the number of rows of the host's running ``generate``, and its prompt."""
        for hosts, rows, prompt in reversed(HERE.generating):
            if any(host is self.state for host in hosts):
                return rows, prompt
        return 0, None

    @property
    def prompt(self) -> Prompt | None:
        """The prompt of the ``generate`` in which this forward runs, if the forward receives tokens of the prompt or
        tokens generated after it; otherwise None."""
        return None if self._tokens is None else self._tokens.prompt

    @property
    def tokens(self) -> Tokens:
        """The tokens of the host's forward, for all rows of the batch. Available for methods with
        `Method.reads_tokens`, and in a route with `since`.

        Raises:
            MissingContext: a part of the host was called by itself, the host has an encoder and a decoder, or is
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
        """Returns a mask of a module's input tokens. It is True from the last occurrence of a sequence of ids in the
        row, or from the column given by ``peftcore.call(model, since=...)``.

        Args:
            sequence: the ids; empty to use only the columns of `since`.
            like: the input ``[rows, tokens, ...]`` or ``[rows * tokens, ...]``.

        Returns:
            ``[rows, tokens]`` or ``[rows * tokens]`` of bool; None for all tokens, if neither a sequence nor `since` is
            given.

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
        """Returns how many tokens a layer of a transformers cache held when the operator's module began to run. In a
        route or a composition, injections act one after the other, so the module may have run already when an operator
        calls this method.

        Raises:
            AttributeError, ValueError: the cache counts no tokens.
        """
        lengths = self.held.get(id(cache))
        if lengths is None:
            return int(cache.get_seq_length(depth))
        return lengths[depth] if depth < len(lengths) else 0  # a layer that the module has made since

    @contextmanager
    def one_module(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[None]:
        """Context manager for the call of a module that runs for several injections, with its positional and keyword
        arguments."""
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
        """Returns one entry of the context.

        Raises:
            MissingContext: `call` was not given the entry.
        """
        self._check_told(name)
        return self.context[name]

    def told(self, name: str, otherwise: Any = None) -> Any:
        """Returns one value given to `peftcore.call(model, ...)`; in a route, the value for all rows of the batch."""
        return otherwise if self.choice is None else self.choice.context.get(name, otherwise)

    def _check_told(self, name: str) -> None:
        if self.choice is None or name not in self.choice.context:
            raise MissingContext(
                f"this method needs a value for {name!r}: pass it with peftcore.call(model, {name}=...): ..."
            )

    def for_rows(self, name: str, rows: int, value: Tensor | None = None) -> Tensor:
        """Returns the entries of a call's value for the rows that a module receives; in a route, for the operator's
        rows. The value has one entry for all rows, or one for each row of the batch. An entry of a batch row applies to
        all adjacent rows into which the module's input splits that row (windows, frames, flat tokens).

        Args:
            name: the name of the value in `peftcore.call`.
            rows: the number of rows that the module receives; a multiple of the entries.
            value: a tensor with the entries of all rows; None for the value given to `peftcore.call`, which must be a
                tensor.

        Raises:
            MissingContext: the call did not pass the value.
            RouteError: the number of rows does not match the entries, and the repetition of entries in the batch is not
                known.
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
        """Returns the output of `keep` for tensors that have a row for each row of the operator's input. In a route,
        `keep` receives tensors with all rows of the batch, with zeros in the rows of other injections, and the operator
        gets only its rows of the output. Use it for state that persists between forwards and is reordered or repeated
        with the batch, such as layers of the model's cache."""
        if self.rows is None:
            return keep(*tensors)
        return self.rows.of(keep(*map(self.rows.spread, tensors)))

    def _repeated(self, entries: int, rows: int) -> tuple[int, Repeats]:
        """Returns the number of rows of the batch, and how it repeats entries, for a value with `entries` entries at a
        module that receives `rows` rows."""
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
        """The host's arguments by the names of its forward, in a route only the operator's rows; empty if a part of the
        host was called by itself."""
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
        """Add a scalar to the loss of the host's output, in training. Forwards repeated in backward do not add it
        again.

        If the output lacks a loss, the scalar waits for `Injection.losses` of the operator's injection.

        Args:
            loss: of shape ``[]``; in a route computed from the operator's rows, which are the rows of its adapter.
            operator: the operator that adds it, ``forward_context().add_loss(loss, self)``.

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
        """Context manager in which a module runs on other inputs than the model's, such as a prompt. Taps and losses
        are restored afterwards, since they belong to the model's tokens."""
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
        """Run ``run(*args, **kwargs)`` once more with one injection off, in this thread alone.

        In a route the injection's rows run the bare base model, in a composition its parts do; all other injections act
        as before. Taps and losses of this pass are dropped at its end.

        Args:
            name: the injection's name; or an operator of the injection, since an operator does not know the name:
                ``forward_context().without(self, call, x)``.
            run: the function to run, such as the operator's ``call``.
            args: its arguments, with `kwargs`.
            caches: the function that replaces a cache among the arguments. The default copies it, so the pass reads its
                contents without changing them; `PassCache.beside` returns a separate cache of the values that such
                passes computed.

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
        """Run the host's forward once more, on the same arguments and under the same choice, for `Method.output_loss`.

        Random draws in training, such as dropout, are repeated with new numbers. Taps and losses of the pass are
        dropped at its end.

        Args:
            left: the values that taps have at the beginning of the pass; operators recognize the pass by them.

        Returns:
            The host's output, with its graph, before hooks of the host change it; in a route only the adapter's rows.

        Raises:
            MissingContext: a part of the host was called by itself.
            TrainingError: the host was given a cache, which already contains the tokens of this forward.
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
        """Close the context when the host has returned: taps hold activations and are dropped, except for those that
        backward will read."""
        self.open, self.frame = False, None
        if self.listed and self.state is not None:
            self.listed = False
            self.state.running.pop(id(self), None)
        self.taps = [tap for tap in self.taps if tap[2]]


_COMPILED_ALONE = ForwardContext()
"""The context for parts of a host that are compiled and run by themselves."""


def batch_sizes(inputs: Mapping[str, Any]) -> list[int]:
    """Returns how many rows the tensors among a host's arguments have, in order; sizes of tensors that all rows share
    (positions ``[1, tokens]``) are last."""
    found = [value for value in inputs.values() if isinstance(value, Tensor) and value.dim()]
    found = [value for value in found if value.dim() > 1] or found
    return sorted((len(value) for value in found), key=lambda size: size == 1)


def forward_context() -> ForwardContext:
    """Returns the context of the running forward of the host in this thread; inside backward, the context of the
    forward that is repeated.

    Operators call it in their forward. If a part of the host was called by itself (an encoder by `generate`), the
    inputs of the context are empty.
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
    """Store the choice and the context of this forward in the checkpoints in which a module of the host runs."""
    here = next((call for call in reversed(HERE.calls) if call.state is state), None)
    if here is None or here.recorded:
        for kept in running():
            if here is None or all(kept is not each for each in here.within):
                remember(kept, state, choice, here or outside() or ForwardContext(state, choice))


def drop_interrupted() -> None:
    """Close the contexts of forwards that have ended: torch does not call hooks when a KeyboardInterrupt or a
    SystemExit ends a forward."""
    while HERE.calls and not (HERE.calls[-1].open and _runs(HERE.calls[-1].frame)):
        HERE.calls[-1].close()
        HERE.calls.pop()
    HERE.settle()  # also where the interrupt came just before


def _runs(wanted: FrameType | None) -> bool:
    """Whether a call still runs in this thread; always True for a traced call, which has no frame."""
    if wanted is None:
        return True
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame is not wanted:
        frame = frame.f_back
    return frame is not None


def outside() -> ForwardContext | None:
    """Returns the context of a part of the host that was called directly in this thread; None without one."""
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
    """Add hooks to the autograd nodes of the outputs, so that backward announces this forward before it reaches the
    nodes inside it."""
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
