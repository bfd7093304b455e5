"""Adapted hosts go through torch.compile, torch.export, fx and functional calls as their bases do."""

import asyncio
import contextlib
import copy
import shutil
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from interop_hosts import METHODS, WIDTH, Encoder, adapt, encoder, gradients, inputs, mlp
from slowly import quick
from torch import Tensor, fx, nn
from torch._dynamo.testing import CompileCounterWithBackend, EagerAndRecordGraphs
from torch.utils.checkpoint import checkpoint

import peftcore
from peftcore.testing.compiling import AsItStands

COMPILERS = ("g++", "clang++", "c++")
MLP_METHODS = {"lora": {"target": "*_proj"}, "dora": {"target": "*_proj"}, "ia3": {"target": "*_proj"}, "bitfit": {}}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Nothing compiled for one test serves another."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def step(model: Any, injection: peftcore.Injection, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    output = model(x)
    output.square().sum().backward()
    return output.detach(), gradients(injection)


def assert_same_step(one: tuple[Tensor, dict[str, Tensor]], two: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(one[0], two[0], rtol=1e-4, atol=1e-5)
    assert one[1].keys() == two[1].keys() and one[1]
    for name, gradient in one[1].items():
        torch.testing.assert_close(
            gradient, two[1][name], rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("method", quick(METHODS, ["lora", "dora", "linear_probe"]))
def test_compiled_encoder_equals_eager_in_training_and_evaluation(method: str) -> None:
    model, x = encoder(), inputs()
    injection = adapt(model, method)
    model(x)  # the witness looks at the first forward, and goes
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same_step(step(compiled, injection, x), step(model, injection, x))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def test_compiled_evaluation_makes_no_effective_weight() -> None:
    """It could not be kept from call to call. Eager evaluation keeps it, which gives the same."""
    model, x = nn.Sequential(nn.Linear(8, 12)).eval(), torch.randn(3, 8)
    adapt(model, "oft", target="0")
    model(x)
    graphs = EagerAndRecordGraphs()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend=graphs)(x), model(x))
    (graph,) = graphs.graphs
    made = [node.meta["example_value"] for node in graph.graph.nodes if node.op.startswith("call")]
    assert made and all(each.shape != (12, 8) for each in made if isinstance(each, Tensor))


@pytest.mark.parametrize("method", MLP_METHODS)
def test_compiled_mlp_equals_eager(method: str) -> None:
    model, x = mlp(), inputs()
    injection = adapt(model, method, **MLP_METHODS[method])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same_step(step(compiled, injection, x), step(model, injection, x))


def test_compiled_before_the_first_eager_forward() -> None:
    """The witness is still waiting then; it must neither break the graph nor judge what it cannot see."""
    model, x = encoder(), inputs()
    injection = adapt(model, "lora")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    output = compiled(x)
    torch.testing.assert_close(output, model(x), rtol=1e-4, atol=1e-5)
    injection.check()


@pytest.mark.parametrize("method", quick(["lora", "dora"], ["lora"]))
def test_switching_compiles_once_for_each_active_set(method: str) -> None:
    model, x = encoder(), inputs()
    for seed, name in enumerate(("a", "b")):
        adapt(model, method, name=name, seed=seed)
    model(x)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    sets = [(), ("a",), ("b",), ("a", "b")]
    for active in sets:
        peftcore.activate(model, *active)
        compiled(x)
    assert counter.frame_count == len(sets)
    for _ in range(2):
        for active in reversed(sets):
            peftcore.activate(model, *active)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == len(sets)


@pytest.mark.slow
@pytest.mark.parametrize(
    "counted", [pytest.param(True, id="by-turns"), pytest.param(False, id="at-once", marks=pytest.mark.slow)]
)
def test_calls_of_several_threads_share_whole_graphs(counted: bool) -> None:
    """A call moves the graph that it takes to the front of dynamo's list (torch 2.13), and another thread, which walks
    that list meanwhile, may pass by its own and compile it once more: so graphs are counted where calls take turns."""
    model, x = encoder(), inputs()
    for seed, name in enumerate(("a", "b")):
        adapt(model, "lora", name=name, seed=seed)
    model.eval()(x)
    rows: list[str | None] = (["a", None, "b"] * len(x))[: len(x)]
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    turn: Any = threading.Lock() if counted else contextlib.nullcontext()
    forms: list[Any] = ["a", "b", rows, rows[::-1]]
    wrong: list[Any] = []

    def in_turn(x: Tensor) -> Any:
        with turn:
            return compiled(x)

    def serve() -> None:
        try:
            for form in (*forms, *forms):
                using = peftcore.using(model, form)
                with torch.no_grad():
                    torch.testing.assert_close(using(in_turn, x), using(model, x), rtol=1e-4, atol=1e-5)
        except BaseException as error:
            wrong.append(error)

    serve()
    serve()  # a plan for one more choice makes graphs anew, until all have come
    frames = counter.frame_count
    threads = [threading.Thread(target=serve) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not wrong
    assert not counted or counter.frame_count == frames


def test_blocks_of_threads_and_tasks_break_graphs_and_are_right() -> None:
    model, x = nn.Sequential(nn.Linear(WIDTH, WIDTH)).eval(), inputs()
    for seed, name in enumerate(("a", "b")):
        adapt(model, "lora", target="0", name=name, seed=seed)
    model(x)
    compiled = torch.compile(model, backend="eager")
    expected = {name: peftcore.using(model, name)(model, x) for name in ("a", "b")}

    async def request(name: str) -> None:
        with peftcore.activate(model, name):
            for _ in range(2):
                await asyncio.sleep(0)
                torch.testing.assert_close(compiled(x), expected[name])

    async def serve() -> None:
        await asyncio.gather(*map(request, "abab"))

    asyncio.run(serve())
    torch.testing.assert_close(compiled(x), model(x))


def test_optimizer_steps_do_not_compile_again() -> None:
    model, x = encoder(), inputs()
    injection = adapt(model, "lora")
    model(x)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    optimizer = torch.optim.SGD(injection.parameters(), lr=0.1)
    outputs = []
    for _ in range(3):
        output = compiled(x)
        outputs.append(output.detach())
        output.square().sum().backward()
        optimizer.step()
    assert counter.frame_count == 1
    assert not torch.equal(outputs[0], outputs[1])


def test_merged_and_removed_hosts_compile_as_the_base() -> None:
    model, x = encoder(), inputs()
    base = model(x)
    injection = adapt(model, "lora")
    acting = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), acting, rtol=1e-4, atol=1e-5)
    injection.merge()
    torch.testing.assert_close(compiled(x), acting, rtol=1e-4, atol=1e-5)
    injection.remove()
    torch.testing.assert_close(compiled(x), base, rtol=1e-4, atol=1e-5)


MECHANISMS = {
    "onion": ("lora", {"target": "*.down_proj", "alpha": 12.0}),
    "weight operator": ("dora", {"target": "*.up_proj"}),
    "replacement": ("ln_tuning", {}),
    "rows of a fused weight": ("lora", {"target": "attn.q", "alpha": 12.0}),
    "rows of a matrix": ("lora", {"target": "head", "alpha": 12.0}),
}
"""Each on a part of the encoder of its own, so that one compilation, which takes seconds, holds all. Scales
are not 1, which would hide one that is lost."""


@pytest.mark.slow
@pytest.mark.skipif(
    not any(map(shutil.which, COMPILERS)), reason="inductor needs a C++ compiler, and none is installed"
)
def test_inductor_equals_eager() -> None:
    model, x = encoder(), inputs()
    injections = {
        mechanism: adapt(model, method, name=f"number {number}", **arguments)
        for number, (mechanism, (method, arguments)) in enumerate(MECHANISMS.items())
    }
    output = model(x)
    for mechanism, injection in injections.items():
        with injection.disabled():
            assert not torch.allclose(model(x), output, atol=1e-3), f"{mechanism} does nothing"

    def all_of(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
        output = model(x)
        output.square().sum().backward()
        found = {f"{m}: {n}": grad for m, injection in injections.items() for n, grad in gradients(injection).items()}
        return output.detach(), found

    compiled = torch.compile(model, fullgraph=True)
    assert_same_step(all_of(compiled), all_of(model))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_compiled_for_a_cpu_an_update_is_one_with_its_layer(method: str, autocast: bool) -> None:
    """Products are what the kernel says: that of B's gradient is made as its transpose."""
    model, x = mlp().train(), inputs()
    injection = adapt(model, method, target="up_proj", rank=3, alpha=6.0)
    model(x)
    compiled = torch.compile(model, fullgraph=True, backend=(backend := AsItStands()))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        one, two = step(compiled, injection, x), step(model, injection, x)
    if autocast:
        torch.testing.assert_close(one[0], two[0], rtol=0.05, atol=0.05)
    else:
        assert_same_step(one, two)
    products = [node for graph in backend.graphs for node in graph.nodes if "mm" in str(node.target)]
    assert (3, 2 * WIDTH) in [node.meta["val"].shape for node in products]


class Repeated(nn.Module):
    """Layers that backward runs once more."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return x


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "dora", "hra"])
def test_compiled_with_symbolic_shapes_in_a_checkpoint(method: str) -> None:
    torch.manual_seed(0)
    model = Repeated(2).train()
    injection = adapt(model, method, target="layers.*")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (4, 7):
        assert_same_step(step(compiled, injection, inputs(rows)), step(model, injection, inputs(rows)))


def test_compiled_what_is_dropped_is_the_same_when_it_is_repeated() -> None:
    """The output is linear in B: what B's gradient says of it, it must have, for one and the same mask."""
    torch.manual_seed(0)
    model, x = Repeated(1).train(), inputs(50)
    base = model(x).detach()
    injection = adapt(model, "lora", target="layers.0", alpha=12.0, dropout=0.5)
    compiled, weights = torch.compile(model, fullgraph=True, backend="aot_eager"), torch.randn_like(base)
    B: Any = injection.operators["layers.0"].B
    update = ((compiled(x) - base) * weights).sum()
    (gradient,) = torch.autograd.grad(update, B)
    torch.testing.assert_close((gradient * B).sum(), update, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_export_holds_the_adapter(method: str) -> None:
    model, x = encoder(), inputs()
    base = model(x)
    injection = adapt(model, method)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(x), base, atol=1e-3)
    own = {name for name, value in model.named_parameters() if value.requires_grad}
    assert own <= set(program.state_dict)
    injection.remove()
    torch.testing.assert_close(model(x), base)
    assert not torch.allclose(program.module()(x), base, atol=1e-3)


@pytest.mark.parametrize("strict", [False, True])
def test_what_is_exported_is_plain(strict: bool) -> None:
    """No function with a gradient of its own, nothing in place: whatever runs the program knows its operations."""
    model, x = mlp(), inputs()
    adapt(model, "lora", target="*_proj", alpha=12.0)
    model(x)
    graph = torch.export.export(model, (x,), strict=strict).graph
    called = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert called.count("aten.linear.default") == 6
    assert all(name.startswith("aten.") and "_." not in name for name in called)


def test_export_with_a_dynamic_batch() -> None:
    model = encoder()
    adapt(model, "lora")
    program = torch.export.export(model, (inputs(),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(program.module()(inputs(7)), model(inputs(7)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", MLP_METHODS)
def test_symbolic_trace_of_an_mlp(method: str) -> None:
    model, x = mlp(), inputs()
    adapt(model, method, **MLP_METHODS[method])
    expected = model(x)
    traced = fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["up_proj", "down_proj"]
    assert torch.equal(traced(x), expected)


@pytest.mark.parametrize("method", ["lora", "dora", "bitfit", "loha", "lokr"])
def test_functional_call_swaps_operators_and_base(method: str) -> None:
    model, x = encoder(), inputs()
    base = {name: value.detach().clone() for name, value in model.named_parameters()}
    adapt(model, method)
    expected = model(x)
    adapted = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert not torch.allclose(model(x), expected, atol=1e-3)
    torch.testing.assert_close(
        torch.func.functional_call(model, {**base, **adapted}, (x,)), expected, rtol=1e-4, atol=1e-5
    )
    assert not any(parameter.any() for parameter in model.parameters())


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("method", ["lora", "dora", "ln_tuning"])
def test_gradients_for_each_sample_by_vmap(method: str) -> None:
    model, x = encoder(), inputs()
    injection = adapt(model, method)
    model(x)
    train = {name: value for name, value in model.named_parameters() if value.requires_grad}

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (sample.unsqueeze(0),)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(train, x)
    model(x).square().sum().backward()
    for name, parameter in train.items():
        assert parameter.grad is not None
        torch.testing.assert_close(each[name].sum(0), parameter.grad, rtol=1e-3, atol=1e-5)
    assert len(train) == len(list(injection.parameters()))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("gradients_on", [True, False])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_ensembles_by_vmap_over_stacked_adapters(method: str, gradients_on: bool) -> None:
    model, x = encoder(), inputs()
    adapt(model, method)
    expected, states = [], []
    for seed in (1, 2, 3):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        expected.append(model(x))
        states.append({name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad})
    stacked = {name: torch.stack([state[name] for state in states]) for name in states[0]}
    with torch.set_grad_enabled(gradients_on):
        outputs = torch.func.vmap(lambda state: torch.func.functional_call(model, state, (x,)))(stacked)
    torch.testing.assert_close(outputs, torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_in_both_modes_gives_the_same_gradients() -> None:
    class Checkpointed(Encoder):
        reentrant: bool | None = None

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
            return self.head(self.norm(x).mean(1))

    for method in ("lora", "dora", "ia3"):
        torch.manual_seed(0)
        model = Checkpointed(2).train()
        injection = adapt(model, method)
        steps = []
        for mode in (None, True, False):
            model.reentrant = mode
            steps.append(step(model, injection, inputs().requires_grad_(True)))
        assert_same_step(steps[1], steps[0])
        assert_same_step(steps[2], steps[0])


def test_fixtures_are_what_the_tests_think() -> None:
    plan = peftcore.plan(encoder(), "lora")
    assert [site.path for site in plan.sites] == [f"blocks.0.attn.qkv:attn.{part}" for part in "qv"]
    assert isinstance(encoder().head, nn.Linear) and inputs().shape == (4, 5, WIDTH)


@pytest.mark.parametrize("method", quick(["lora", "dora"], ["dora"]))
def test_copy_of_an_adapted_host_compiles(method: str) -> None:
    model, x = encoder(), inputs()
    adapt(model, method)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
