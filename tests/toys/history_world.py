"""An adapted model with a history, and beside it what it ought to be: the tensors of the base, the values of each
adapter, and the choice. From these a fresh model says what comes out, whatever happened to the other one."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from declared_cases import declared
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin

import peftcore
from peftcore import Average, Stack, Sum
from peftcore.errors import CompositionError, MergeError, PeftcoreError, RouteError, SequenceError
from peftcore.forward.state.host_state import state_of
from peftcore.testing import HOSTS, Case, NotApplicable
from peftcore.testing.kit import fill

HOSTS_HERE = ("mlp", "encoder", "llama", "gpt2", "moe", "vit", "unet", "convnet")
CLOSE = 1e-7
"""How far outputs may be apart, relative to the largest entry: all is float64, and merges round once."""
AT_FIRST = frozenset({"svdiff"})
"""Methods that are made of the weights as they were when they were applied (see their docstrings)."""
Choice = tuple[str, ...] | list[str | None] | Sum | Average | Stack
"""Names that stack, one name for each row, or a composition."""


_THREE_TOKENS = GenerationConfig(max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)


@functools.cache
def case_of(method: str, host: str) -> Case:
    """The method on a host, with the options that its test declares."""
    info = next(each for each in peftcore.methods() if each.name == method)
    return declared(info).case(host)


@dataclass
class Adapter:
    """What an adapter ought to be."""

    case: Case
    values: dict[str, Tensor]
    merged: bool = False


def snapshot(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in tensors.items()}


def base_of(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the base, without adapters."""
    with peftcore.saving_base():
        return snapshot(model.state_dict())


class Wrong(AssertionError):
    """An output that is not what it ought to be."""


class World:
    """The model, and what it ought to be."""

    def __init__(self, host: str) -> None:
        self.host = HOSTS[host]
        self.model, self.inputs = case_of("lora", host).fresh(torch.float64)
        if host == "moe":
            self.model.set_experts_implementation("eager")  # type: ignore[operator]  # the others know no float64
        self.pristine = copy.deepcopy(self.model)
        self.base = base_of(self.model)
        self.adapters: dict[str, Adapter] = {}
        self.choice: Choice = ()
        self.refused = 0

    @property
    def rows(self) -> int:
        """The rows of a batch."""
        return len(next(value for value in self.inputs.values() if isinstance(value, Tensor) and value.dim()))

    def injection(self, name: str) -> peftcore.Injection:
        """The injection of this name on the model."""
        return peftcore.injections(self.model)[name]

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """A step that may be refused: then nothing has changed, which the next comparison shows."""
        try:
            yield
        except (PeftcoreError, NotApplicable):
            self.refused += 1

    def apply(self, model: nn.Module, name: str, case: Case) -> peftcore.Injection:
        """Apply a method; the same whenever it is applied."""
        return case.apply(model, name=name, dtype="float64", seed=7)

    def fresh(self, names: Iterable[str]) -> nn.Module:
        """A fresh model with some of the adapters, in the order in which they came."""
        model = copy.deepcopy(self.pristine)
        model.load_state_dict(self.base)
        wanted = set(names)
        for name, adapter in self.adapters.items():
            if name in wanted:
                injection = self.apply(model, name, adapter.case)
                for key, value in injection.state_dict().items():
                    value.copy_(adapter.values[key])
        return model

    def baked(self, names: Sequence[str]) -> nn.Module:
        """A fresh model with these adapters, of which those that can be are in the weights."""
        model = self.fresh(names)
        peftcore.activate(model, *names)
        for injection in peftcore.injections(model).values():
            if injection.method.tags.mergeable:
                injection.merge(keep=None)
            else:
                break  # what comes after one that stays has to stay, too
        return model

    def output(self, model: nn.Module, rows: slice = slice(None)) -> Tensor:
        """What a model gives in evaluation."""
        inputs = {k: v[rows] if isinstance(v, Tensor) and v.dim() else v for k, v in self.inputs.items()}
        dtype = next(model.parameters()).dtype
        inputs = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
        model.eval()
        with torch.no_grad():
            return self.host.output(model(**inputs))

    @property
    def generates(self) -> bool:
        """Whether the model is one that generates."""
        return isinstance(self.model, GenerationMixin)

    def generated(self, model: nn.Module, rows: slice = slice(None)) -> Tensor:
        """The logits of three generated tokens, ``[rows, 3, tokens]``."""
        assert isinstance(model, GenerationMixin)
        model.eval()
        inputs = {k: v[rows] for k, v in self.inputs.items() if k in ("input_ids", "attention_mask")}
        found = model.generate(
            **inputs, generation_config=_THREE_TOKENS, return_dict_in_generate=True, output_logits=True
        )  # type: ignore[operator]
        logits: Tensor = torch.stack(found.logits, 1)
        return logits

    def expected(self, choice: Choice, run: Callable[..., Tensor] | None = None) -> Tensor:
        """What the model ought to give under a choice; `run` gets it from a model, and from some rows."""
        run = run or self.output
        if isinstance(choice, tuple):
            return run(self.baked(choice))
        if isinstance(choice, list):
            each = [
                run(self.baked(() if name is None else (name,)), slice(row, row + 1)) for row, name in enumerate(choice)
            ]
            return torch.cat(each)
        model = self.fresh(choice.names())
        peftcore.activate(model, choice)
        return run(model)

    def compare(self, actual: Tensor, expected: Tensor, what: str, close: float = CLOSE) -> None:
        """Compare what is there with what ought to be.

        Raises:
            Wrong: they differ.
        """
        scale = max(float(expected.abs().max()), 1e-3)
        if actual.shape != expected.shape:
            raise Wrong(f"{what}: {list(actual.shape)} in place of {list(expected.shape)}; {self}")
        if not float((actual - expected).abs().max()) <= close * scale:
            raise Wrong(f"{what}: off by {float((actual - expected).abs().max()) / scale:.2e}; {self}")

    def check(self) -> None:
        """Compare the outputs under the choice in force. A route or a composition may be refused only when the model
        runs; it is left then, as the error advises."""
        try:
            found = self.output(self.model)
        except RouteError:
            if isinstance(self.choice, tuple):
                raise
            self.refused += 1
            peftcore.activate(self.model)
            self.choice = ()
            found = self.output(self.model)
        self.compare(found, self.expected(self.choice), "output")

    def without(self, name: str) -> None:
        """Forget an adapter that is gone, in the choice too."""
        del self.adapters[name]
        if isinstance(self.choice, tuple):
            self.choice = tuple(each for each in self.choice if each != name)
        if not self.adapters:  # a model without any has no choice either, such as a route of none
            self.choice = ()

    def gradients(
        self, model: nn.Module, names: Iterable[str], run: Callable[[nn.Module], Tensor]
    ) -> dict[str, Tensor]:
        """The gradients of adapters' parameters, by adapter and name."""
        found = {}
        injections = peftcore.injections(model)
        parameters = {
            f"{name}.{path}.{key}": parameter
            for name in names
            for path, module in injections[name].modules()
            for key, parameter in module.named_parameters()
        }
        for parameter in parameters.values():
            parameter.grad = None
        run(model).square().mean().backward()
        for key, parameter in parameters.items():
            if parameter.grad is not None:
                found[key] = parameter.grad.clone()
        return found

    def filled(self, name: str, case: Case, seed: int) -> None:
        """Apply a method to the model, and move its values."""
        injection = self.apply(self.model, name, case)
        fill(injection, seed)
        self.joined(name, Adapter(case, snapshot(injection.state_dict())))

    def joined(self, name: str, adapter: Adapter, active: bool = True) -> None:
        """A new adapter is there. Where it overrides what another one does, or is overridden, it acts alone from now
        on, as an error advises; it goes again where the other one is merged."""
        before = self.choice
        self.adapters[name] = adapter
        if isinstance(self.choice, tuple) and active:
            self.choice = (*self.choice, name)
            try:
                self.output(self.model)
            except (CompositionError, SequenceError) as error:
                with pytest.raises(type(error)):
                    self.output(self.fresh(self.choice))
                try:
                    peftcore.activate(self.model, name)
                    self.choice = (name,)
                except MergeError:
                    self.injection(name).remove()
                    del self.adapters[name]
                    self.choice = before

    def copied(self, through: Callable[[nn.Module], nn.Module]) -> nn.Module:
        """A copy of the model, told what the model was told, which copies forget."""
        state = state_of(self.model)
        model = through(self.model)
        if state is not None and (context := state.now().context):
            peftcore.call(model, **context)
        return model

    def learn(self, name: str) -> None:
        """Take over the values that an adapter has now."""
        self.adapters[name].values = snapshot(self.injection(name).state_dict())

    def __repr__(self) -> str:
        adapters = {name: f"{a.case.method.name}{' merged' * a.merged}" for name, a in self.adapters.items()}
        return f"World({self.host.name}, {adapters}, choice {self.choice!r})"
