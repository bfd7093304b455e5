"""Random histories of an adapted model: each step is one that users make, and after each the outputs are compared with
what ought to come out (`history_world`). A step may be refused with a typed error, after which nothing has changed."""

from __future__ import annotations

import asyncio
import copy
import os
import pickle
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import torch
from history_script import Script
from history_world import AT_FIRST, CLOSE, HOSTS_HERE, Adapter, World, Wrong, base_of, case_of, snapshot
from hypothesis import note
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin

import peftcore
from peftcore import Average, Stack, Sum
from peftcore.errors import PeftcoreError


class Compiled(torch.optim.AdamW):
    """An optimizer whose step is compiled."""

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        torch._dynamo.reset()
        torch.compile(super().step, backend="aot_eager")()


NAMES = ("a", "b", "c")
METHODS = sorted(info.name for info in peftcore.methods())
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-2),
    "foreach": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, foreach=True),
    "fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, fused=True),
}
WRITERS: dict[str, Callable[[Tensor], object]] = {
    "in place": lambda tensor: tensor.detach().mul_(1.1),
    "through .data": lambda tensor: tensor.data.mul_(1.1),
    "a numpy view": lambda tensor: tensor.detach().numpy().__imul__(1.1),
    "new data": lambda tensor: setattr(tensor, "data", tensor.data * 1.1),
}
COMPUTED: dict[str, Callable[[nn.Module], object]] = {
    "weight_norm": parametrizations.weight_norm,
    "the older weight_norm": torch.nn.utils.weight_norm,
    "a pruning mask": lambda module: prune.identity(module, "weight"),
}
WAYS_TO_COPY: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}
COMPILED = bool(os.environ.get("PEFTCORE_HISTORIES_MINUTES"))
"""Whether anything is compiled, which takes seconds."""
if COMPILED:
    OPTIMIZERS["compiled"] = lambda parameters: Compiled(parameters, lr=1e-3)
names = st.sampled_from(NAMES)
subsets = st.lists(names, unique=True, max_size=3)


class History(RuleBasedStateMachine):
    """One random history."""

    world: World
    script: Script | None = None

    def teardown(self) -> None:
        """Print what a failing history did, as a script."""
        if self.script is not None:
            note(f"As a script:\n\n{self.script.end()}\n")

    @initialize(host=st.sampled_from(HOSTS_HERE), methods=st.lists(st.sampled_from(METHODS), min_size=1, max_size=3))
    def begin(self, host: str, methods: list[str]) -> None:
        self.world = World(host)
        begin = f"model, inputs = HOSTS[{host!r}].build()  # of peftcore.testing"
        self.script = Script(lambda: self.world.model, begin, "model.double().eval()")
        for name, method in zip(NAMES, methods, strict=False):
            self.apply(name, method, 1)

    # What changes which adapters there are

    @rule(name=names, method=st.sampled_from(METHODS), seed=st.integers(1, 5))
    def apply(self, name: str, method: str, seed: int) -> None:
        world = self.world
        with world.allowed():
            world.filled(name, case_of(method, world.host.name), seed)
            assert self.script is not None
            self.script.lines.append(f"fill(peftcore.injections(model)[{name!r}], {seed})  # of peftcore.testing.kit")

    @rule(name=names)
    def remove(self, name: str) -> None:
        world = self.world
        if name in world.adapters:
            with world.allowed():
                world.injection(name).remove()
                world.without(name)

    @rule(name=names, other=names, active=st.booleans())
    def save_and_load(self, name: str, other: str, active: bool) -> None:
        world = self.world
        if name not in world.adapters or other in world.adapters:
            return
        with tempfile.TemporaryDirectory() as folder, world.allowed():
            world.injection(name).save(Path(folder, "adapter"))
            again = peftcore.load(world.model, Path(folder, "adapter"), name=other, active=active)
            world.joined(other, Adapter(world.adapters[name].case, snapshot(again.state_dict())), active)

    # What changes which of them act

    @rule(chosen=subsets)
    def activate(self, chosen: list[str]) -> None:
        world = self.world
        acting = tuple(name for name in world.adapters if name in chosen)
        with world.allowed():
            peftcore.activate(world.model, *acting)
            world.choice = acting

    @rule(rows=st.lists(st.sampled_from([*NAMES, None]), min_size=8, max_size=8))
    def route(self, rows: list[str | None]) -> None:
        world = self.world
        each = [name if name in world.adapters else None for name in rows[: world.rows]]
        if len(each) == world.rows and world.adapters:  # on a bare model there is nothing to choose
            with world.allowed():
                peftcore.route(world.model, each)
                world.choice = each

    @rule(kind=st.sampled_from([Sum, Average, Stack]), chosen=subsets)
    def compose(self, kind: type[Any], chosen: list[str]) -> None:
        world = self.world
        acting = [name for name in world.adapters if name in chosen]
        if len(acting) == 2:
            with world.allowed():
                composition = kind(*acting)
                peftcore.activate(world.model, composition)
                world.choice = composition

    @rule(name=names)
    def disabled(self, name: str) -> None:
        world = self.world
        if name not in world.adapters or not isinstance(world.choice, tuple):
            return
        with world.allowed(), world.injection(name).disabled():
            rest = tuple(each for each in world.choice if each != name)
            world.compare(world.output(world.model), world.expected(rest), f"output without {name}")

    @rule(chosen=subsets)
    def in_another_thread(self, chosen: list[str]) -> None:
        world = self.world
        acting = tuple(name for name in world.adapters if name in chosen)
        found: list[Any] = []

        def run() -> None:
            try:
                with peftcore.activate(world.model, *acting):
                    found.append(world.output(world.model))
            except BaseException as error:
                found.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        if isinstance(found[0], Tensor):
            world.compare(found[0], world.expected(acting), f"output in a thread that chose {acting}")
        elif not isinstance(found[0], PeftcoreError):
            raise found[0]

    @rule(chosen=subsets)
    def for_one_call(self, chosen: list[str]) -> None:
        world = self.world
        acting = tuple(name for name in world.adapters if name in chosen)
        if acting:
            with world.allowed():
                found = peftcore.using(world.model, *acting)(world.output, world.model)
                world.compare(found, world.expected(acting), f"output of a call that chose {acting}")

    @precondition(lambda self: self.world.generates)
    @rule()
    def generate(self) -> None:
        world = self.world
        with world.allowed():
            found = world.generated(world.model)
            world.compare(found, world.expected(world.choice, world.generated), "logits of generated tokens")

    @rule(first=subsets, second=subsets)
    def in_two_tasks(self, first: list[str], second: list[str]) -> None:
        world = self.world

        async def one(chosen: list[str], steps: int) -> list[tuple[tuple[str, ...], Tensor]]:
            acting = tuple(name for name in world.adapters if name in chosen)
            found = []
            with peftcore.activate(world.model, *acting):
                for _ in range(steps):
                    found.append((acting, world.output(world.model)))
                    await asyncio.sleep(0)
            return found

        async def both() -> list[Any]:
            return await asyncio.gather(one(first, 2), one(second, 3), return_exceptions=True)

        for found in asyncio.run(both()):
            if isinstance(found, PeftcoreError):
                continue
            if isinstance(found, BaseException):
                raise found
            for acting, output in found:
                world.compare(output, world.expected(acting), f"output in a task that chose {acting}")

    # What writes to weights

    @rule(name=names, keep=st.sampled_from(["cpu", "device", "record", None]), into=st.sampled_from(["float", "same"]))
    def merge(self, name: str, keep: Any, into: Any) -> None:
        world = self.world
        if name in world.adapters:
            with world.allowed():
                world.injection(name).merge(keep, into=into)
                world.adapters[name].merged = True

    @rule(name=names)
    def unmerge(self, name: str) -> None:
        world = self.world
        if name in world.adapters:
            with world.allowed():
                world.injection(name).unmerge()
                world.adapters[name].merged = False

    @rule(name=names)
    def bake(self, name: str) -> None:
        world = self.world
        if name not in world.adapters or any(each.merged for each in world.adapters.values()):
            return
        if any(each.case.method.name in AT_FIRST for other, each in world.adapters.items() if other != name):
            return
        with world.allowed():
            baked = world.fresh([name])
            peftcore.injections(baked)[name].bake()
            if len(world.adapters) > 1 and len([*baked.parameters()]) > len([*world.pristine.parameters()]):
                return  # on a base with more biases others would choose other entries than they have
            world.injection(name).bake()
            world.base = base_of(baked)
            world.pristine = baked.eval()  # biases may have come
            world.without(name)

    @precondition(lambda self: not any(each.merged for each in self.world.adapters.values()))
    @rule(kind=st.sampled_from([*OPTIMIZERS]), again=st.sampled_from([None, True, False]))
    def train(self, kind: str, again: bool | None) -> None:
        """One step; `again` is whether the model runs in a checkpoint, and whether in a reentrant one."""
        world = self.world
        choice = world.choice
        named = set(choice if isinstance(choice, tuple | list) else choice.names())
        acting = tuple(name for name in world.adapters if name in named)
        if not acting or (again and not any(v.is_floating_point() for v in world.inputs.values())):
            return  # without an input that needs gradients, a reentrant checkpoint gives none
        fresh = world.fresh(acting)
        if isinstance(choice, list):
            peftcore.route(fresh, choice)
        elif isinstance(choice, tuple):
            peftcore.activate(fresh, *choice)
        else:
            peftcore.activate(fresh, choice)
        for model in (world.model, fresh):
            for name in acting:
                peftcore.injections(model)[name].trainable(True)

        def run(model: nn.Module, through: bool) -> Tensor:
            torch.manual_seed(0)
            model.eval()  # no dropout and no running statistics of the model's own
            if not through or again is None:
                return world.host.output(model(**world.inputs))
            keys = list(world.inputs)
            begun = [v.requires_grad_() if v.is_floating_point() else v for v in world.inputs.values()]

            def forward(*values: Tensor) -> Tensor:
                return world.host.output(model(**dict(zip(keys, values, strict=True))))

            output: Tensor = checkpoint(forward, *begun, use_reentrant=again)
            return output

        with world.allowed():
            expected = world.gradients(fresh, acting, lambda model: run(model, False))
            found = world.gradients(world.model, acting, lambda model: run(model, True))
            if found.keys() != expected.keys():
                raise Wrong(f"gradients of {found.keys() ^ expected.keys()}; {world}")
            for key, value in expected.items():
                world.compare(found[key], value, f"gradient of {key}")
            parameters = [p for name in acting for p in world.injection(name).parameters() if p.grad is not None]
            if parameters:
                OPTIMIZERS[kind](parameters).step()
        for name in acting:
            world.learn(name)

    @precondition(lambda self: not any(each.merged for each in self.world.adapters.values()))
    @rule()
    def own_losses(self) -> None:
        """Each adapter has the losses of its own method, whoever is asked first; one whose method has none has none."""
        world = self.world
        if not isinstance(world.choice, tuple) or len(world.choice) < 2:
            return

        def weigh(injection: peftcore.Injection) -> None:
            for _, module in injection.modules():
                if "balance" in vars(module) and vars(module).get("top_k", 1):  # without top_k nothing is balanced
                    module.balance = 0.5  # many have no weight by default

        def told(acting: tuple[str, ...], asked: tuple[str, ...]) -> dict[str, Tensor]:
            model = world.fresh(acting)
            peftcore.activate(model, *acting)
            for injection in peftcore.injections(model).values():
                weigh(injection)
            torch.manual_seed(0)
            model.train()(**world.inputs)
            return {name: peftcore.injections(model)[name].losses().detach() for name in asked}

        with world.allowed():
            found, turned = told(world.choice, world.choice), told(world.choice, world.choice[::-1])
            for name, loss in found.items():
                world.compare(turned[name], loss, f"losses of {name!r}, asked in another order")
                if not told((name,), (name,))[name]:
                    world.compare(loss, torch.zeros_like(loss), f"losses of {name!r}, whose method has none")

    @rule(name=names, how=st.sampled_from([*WRITERS]))
    def write_to_an_adapter(self, name: str, how: str) -> None:
        world = self.world
        if name in world.adapters and not world.adapters[name].merged:
            for parameter in world.injection(name).parameters():
                WRITERS[how](parameter)
            world.learn(name)

    @precondition(lambda self: not any(each.merged for each in self.world.adapters.values()))
    @rule(how=st.sampled_from([*WRITERS]))
    def write_to_the_base(self, how: str) -> None:
        world = self.world
        if any(each.case.method.name in AT_FIRST for each in world.adapters.values()):
            return
        for path in world.base:
            holder = world.model.get_submodule(path.rpartition(".")[0])
            tensor = holder._parameters.get(path.rpartition(".")[2])
            if tensor is not None and tensor.dim() == 2:
                WRITERS[how](tensor)
        world.base = base_of(world.model)

    @rule(name=names, steps=st.integers(1, 2))
    def average_in_and_out(self, name: str, steps: int) -> None:
        """As an EMA: validate with averaged values, then go on with the trained ones."""
        world = self.world
        if name not in world.adapters or world.adapters[name].merged:
            return
        parameters = list(world.injection(name).parameters())
        before = [each.detach().clone() for each in parameters]
        for parameter in parameters:
            parameter.data.copy_(parameter.data * 0.9)
        world.learn(name)
        for _ in range(steps):
            world.check()
        for parameter, value in zip(parameters, before, strict=True):
            parameter.data.copy_(value)
        world.learn(name)

    # What changes the model itself, tried on a copy: copies start without a route

    def _copy(self) -> nn.Module | None:
        return None if isinstance(self.world.choice, list) else self.world.copied(copy.deepcopy)

    def _holds(self, model: nn.Module, what: str, close: float = CLOSE) -> None:
        """Look at outputs, after a merge and after it was taken back, too; each may be refused."""
        world = self.world
        expected = world.expected(world.choice)
        injections = peftcore.injections(model)
        steps: list[Callable[[], object]] = [lambda: None]
        steps += [injections[name].unmerge for name in reversed(world.adapters) if world.adapters[name].merged]
        acting = world.choice if isinstance(world.choice, tuple) else ()
        steps += [injections[name].merge for name in acting]
        steps += [injections[name].unmerge for name in reversed(acting)]
        for step in steps:
            with world.allowed():
                step()
                found = world.output(model).double()
                world.compare(found[..., : expected.shape[-1]], expected, what, close)

    @rule()
    def cast(self) -> None:
        if (model := self._copy()) is not None:
            self._holds(model.float(), "output in float32", 1e-3)

    @precondition(lambda self: self.world.generates)
    @rule()
    def resize(self) -> None:
        model: Any = self._copy()
        if model is not None:
            with self.world.allowed():
                model.resize_token_embeddings(model.config.vocab_size + 3, mean_resizing=False)
                self._holds(model, "output with more tokens")

    def _adapted(self, model: nn.Module, which: int) -> str:
        """The path of an adapted module; empty where there is none below the model."""
        injections = peftcore.injections(model).values()
        paths = sorted({site.module_path for injection in injections for site in injection.sites} - {""})
        return paths[which % len(paths)] if paths else ""

    @precondition(lambda self: not any(each.merged for each in self.world.adapters.values()))
    @rule(which=st.integers(0, 100))
    def replace(self, which: int) -> None:
        """Put a module like it in the place of an adapted one."""
        model = self._copy()
        if model is not None and (path := self._adapted(model, which)):
            model.set_submodule(path, self.world.fresh(()).get_submodule(path))
            self._holds(model, f"output with another {path}")

    @rule(which=st.integers(0, 100), how=st.sampled_from(sorted(COMPUTED)))
    def parametrize(self, which: int, how: str) -> None:
        model = self._copy()
        if model is not None and (path := self._adapted(model, which)):
            module = model.get_submodule(path)
            if isinstance(module, nn.Linear | nn.Conv2d):
                with self.world.allowed():
                    COMPUTED[how](module)
                    self._holds(model, f"output with {how} at {path}")

    # What goes on around

    @precondition(lambda self: COMPILED)
    @rule()
    def compiled(self) -> None:
        """`aot_eager` runs what a compiler was given, without one."""
        world = self.world
        torch._dynamo.reset()
        model = torch.compile(world.model, backend="aot_eager")
        with world.allowed():
            world.compare(world.output(model), world.expected(world.choice), "compiled output")

    @rule(times=st.integers(1, 3))
    def evaluate_on_a_promise(self, times: int) -> None:
        world = self.world
        expected = world.expected(world.choice)
        with peftcore.cache_weights(world.model):
            for _ in range(times):
                world.compare(world.output(world.model), expected, "output in cache_weights")

    @rule(through=st.sampled_from(sorted(WAYS_TO_COPY)))
    def copied(self, through: str) -> None:
        world = self.world
        if isinstance(world.choice, list):
            return  # copies start without a route
        world.model = world.copied(WAYS_TO_COPY[through])

    @rule(name=names, low=st.booleans())
    def low_memory(self, name: str, low: bool) -> None:
        world = self.world
        if name in world.adapters:
            world.injection(name).low_memory = low

    @rule(mode=st.booleans())
    def state_dict_round_trip(self, mode: bool) -> None:
        world = self.world
        world.model.load_state_dict(copy.deepcopy(world.model.state_dict()), assign=mode)
        if mode and isinstance(world.model, GenerationMixin):
            world.model.tie_weights()  # type: ignore[attr-defined]  # which assigning has cut

    @invariant()
    def outputs_are_right(self) -> None:
        if hasattr(self, "world"):
            self.world.check()
