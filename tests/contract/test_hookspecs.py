"""Each hook says when it runs, what it gets and returns, can be answered earlier and wrapped, and rests in a step."""

import inspect
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pluggy
import pytest
import torch
import typer
from core_toys import Doubling, DoublingOperator, Shift, perceptron, token_ids, transformer
from torch import Tensor, nn
from typer.testing import CliRunner

import peftcore
from peftcore.author import hookimpl
from peftcore.cli.commands import app as command_line
from peftcore.contract import hookspecs
from peftcore.contract.hookspecs import ForcedAttributes
from peftcore.files.formats.format import formats
from peftcore.files.formats.peft_method import peft_methods, peft_variants
from peftcore.injection.quantization import schemes
from peftcore.registry.plugins import registry
from peftcore_lab.tasks.task_catalogue import find as find_task
from peftcore_lab.tasks.task_catalogue import places as tasks

HOOKS = [name for name in vars(hookspecs) if name.startswith("peftcore_")]
FIRSTRESULT = [
    "peftcore_map",
    "peftcore_layer",
    "peftcore_forced_attributes",
    "peftcore_inject",
    "peftcore_select",
    "peftcore_merge",
]


class Observer:
    """One hook implementation, plain or as a wrapper, that remembers what it was called with and what came of it."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.results: list[Any] = []


Add = Callable[..., Observer]


@pytest.fixture
def answer() -> Iterator[Add]:
    """Register an implementation of a hook that calls a function, for the length of a test."""
    manager = registry().manager
    added: list[Any] = []

    def add(hook: str, function: Callable[..., Any]) -> Observer:
        observer = Observer()
        arguments = manager.hook.__dict__[hook].spec.argnames

        def implementation(**given: Any) -> Any:
            observer.calls.append(given)
            return function(**given)

        holder = _holder(hook, implementation, arguments, wrapper=False)
        manager.register(holder)
        added.append(holder)
        return observer

    def wrap(hook: str) -> Observer:
        observer = Observer()
        arguments = manager.hook.__dict__[hook].spec.argnames

        def implementation(**given: Any) -> Any:
            observer.calls.append(given)
            result = yield
            observer.results.append(result)
            return result

        holder = _holder(hook, implementation, arguments, wrapper=True)
        manager.register(holder)
        added.append(holder)
        return observer

    add.wrap = wrap  # type: ignore[attr-defined]
    yield add
    for holder in added:
        manager.unregister(holder)


def _holder(hook: str, implementation: Callable[..., Any], arguments: tuple[str, ...], wrapper: bool) -> Any:
    """An object with one hook of the exact signature of the specification."""
    listed = ", ".join(arguments)
    keywords = ", ".join(f"{name}={name}" for name in arguments)
    kind = "return (yield from implementation({}))" if wrapper else "return implementation({})"
    space: dict[str, Any] = {"implementation": implementation}
    exec(f"def hook({listed}):\n    {kind.format(keywords)}", space)
    holder = type("Holder", (), {})()
    setattr(holder, hook, hookimpl(wrapper=wrapper)(space["hook"]))
    return holder


def test_these_are_all_the_hooks() -> None:
    """A hook is added only together with a plugin that needs it, and with a test below."""
    assert sorted(
        [
            "peftcore_commands",
            "peftcore_file_schemas",
            "peftcore_formats",
            "peftcore_methods",
            "peftcore_presets",
            "peftcore_schemes",
            "peftcore_tasks",
            "peftcore_translations",
            *FIRSTRESULT,
        ]
    ) == sorted(HOOKS)
    tested = {name.removeprefix("test_hook_") for name in globals() if name.startswith("test_hook_")}
    assert {name.removeprefix("peftcore_") for name in HOOKS} <= tested


@pytest.mark.parametrize("name", HOOKS)
def test_docstring_says_when_it_runs_what_it_gets_and_what_it_returns(name: str) -> None:
    function = getattr(hookspecs, name)
    text = " ".join((inspect.getdoc(function) or "").split())
    assert "Runs " in text and "Returns " in text
    if inspect.signature(function).parameters:
        assert "Gets " in text


@pytest.mark.parametrize("name", HOOKS)
def test_first_result_is_as_the_docstring_says(name: str) -> None:
    spec = registry().manager.hook.__dict__[name].spec
    assert (
        bool(spec.opts["firstresult"])
        == (name in FIRSTRESULT)
        == ("Stops at the first" in (spec.function.__doc__ or ""))
    )
    assert not spec.opts["historic"]


@pytest.mark.parametrize("name", FIRSTRESULT)
def test_the_cores_own_implementation_comes_last(name: str) -> None:
    implementations = registry().manager.hook.__dict__[name].get_hookimpls()
    assert implementations[0].plugin_name == "peftcore.core_plugin"  # pluggy calls from the end of the list
    assert implementations[0].trylast


def test_hook_methods(fresh_registry: None, answer: Add) -> None:
    """Not firstresult: every plugin is asked, once, when the catalogue is first read."""
    results = registry().manager.hook.peftcore_methods()
    assert {"lora", "ia3", "bitfit"} <= {name for methods in results for name in methods}
    observer = answer("peftcore_methods", lambda: {})
    peftcore.methods()
    peftcore.methods()
    assert observer.calls == []  # read already


def test_hook_presets(fresh_registry: None, answer: Add) -> None:
    """As `peftcore_methods`."""
    results = registry().manager.hook.peftcore_presets()
    assert {"rslora", "full_ft", "qoft"} <= {name for presets in results for name in presets}
    observer = answer("peftcore_presets", lambda: {})
    peftcore.methods(presets=True)
    assert observer.calls == []  # read already


def test_hook_map(answer: Add) -> None:
    model = perceptron()
    wrapper = answer.wrap("peftcore_map")
    derived = peftcore.plan(model, Doubling, target="first").host
    assert [call["model"] for call in wrapper.calls] == [model]
    assert wrapper.results == [derived]

    mapped = derived.override({"first": "attn.q"})
    answer("peftcore_map", lambda model: mapped)
    plan = peftcore.plan(model, Doubling)
    assert plan.host is mapped
    assert [site.path for site in plan.sites] == ["first"]


def test_hook_map_is_not_asked_when_the_user_hands_in_a_map(answer: Add) -> None:
    model = perceptron()
    host = peftcore.plan(model, Doubling, target="first").host
    wrapper = answer.wrap("peftcore_map")
    peftcore.apply(model, Doubling, target="first", host=host)
    assert wrapper.calls == []


def test_hook_map_may_leave_it_to_others(answer: Add) -> None:
    silent = answer("peftcore_map", lambda model: None)
    assert peftcore.plan(perceptron(), Doubling, target="first").host is not None
    assert len(silent.calls) == 1


def test_hook_layer(answer: Add) -> None:
    """An earlier answer decides how a tensor is stored: here, that the module must not be called through."""
    model = perceptron()
    wrapper = answer.wrap("peftcore_layer")
    (site,) = peftcore.plan(model, Doubling, target="first").sites
    assert site.form == "activation"
    assert wrapper.calls == [{"module": model.first, "tensor": "weight"}]
    assert wrapper.results == [site.layer]

    read_only = replace(site.layer, called=False)
    answer("peftcore_layer", lambda module, tensor: read_only if module is model.first else None)
    with pytest.raises(peftcore.errors.UnsupportedSite, match="read, not called"):
        peftcore.plan(model, Doubling, target="first")
    assert peftcore.plan(model, Doubling, target="second").sites[0].form == "activation"


def test_hook_forced_attributes(answer: Add) -> None:
    """Asked once for each class; what it says is seen by the forward alone."""

    class Guarded(nn.Linear):
        fast = True

        def forward(self, input: Tensor) -> Tensor:
            assert not self.fast, "the fast path has no gradient"
            return super().forward(input)

    readied: list[nn.Module] = []
    forced = ForcedAttributes({"fast": False}, ready=readied.append)
    observer = answer("peftcore_forced_attributes", lambda cls: forced if cls is Guarded else None)
    model = nn.Sequential(Guarded(3, 3), Guarded(3, 3), nn.Linear(3, 3))
    injection = peftcore.apply(model, Doubling, target="2")
    model(torch.randn(1, 3))
    assert [call["cls"] for call in observer.calls].count(Guarded) == 1
    assert readied == [model[0], model[1]] and model[0].fast
    injection.remove()
    with pytest.raises(AssertionError, match="fast path"):
        model(torch.randn(1, 3))


def test_hook_schemes(answer: Add) -> None:
    """Not firstresult: every plugin names its own; one name for two places is an error."""
    answer("peftcore_schemes", lambda: {"rounded": "somewhere:Rounded"})
    assert schemes()["rounded"] == "somewhere:Rounded"
    answer("peftcore_schemes", lambda: {"rounded": "elsewhere:Rounded"})
    with pytest.raises(peftcore.errors.PluginError, match=r"(some|else)where:Rounded and in"):
        schemes()


def test_hook_formats(answer: Add) -> None:
    """Not firstresult: every plugin names its own, after those of the core."""
    answer("peftcore_formats", lambda: {"scribbled": "peftcore.files.formats.native:Native"})
    assert next(iter(formats())) == "peftcore"
    assert "scribbled" in formats()
    answer("peftcore_formats", lambda: {"scribbled": "elsewhere:Scribbled"})
    with pytest.raises(peftcore.errors.PluginError, match="format 'scribbled' is in"):
        formats()


def test_hook_translations(answer: Add) -> None:
    """Not firstresult: every plugin names its own."""
    answer("peftcore_translations", lambda: {"peft/SCRIBBLED": "somewhere:Scribbled", "peft/LORA/toy": "elsewhere:Toy"})
    assert peft_methods()["SCRIBBLED"] == "somewhere:Scribbled"
    assert peft_variants("LORA") == {"toy": "elsewhere:Toy"} and "LORA/toy" not in peft_methods()


def test_hook_tasks(answer: Add) -> None:
    """Not firstresult: every plugin names its own, after those of the core; one that is not there says so."""
    answer("peftcore_tasks", lambda: {"scribbling": "peftcore_lab.tasks.chat:Chat", "gone": "nowhere:Gone"})
    assert next(iter(tasks())) == "text-classification"
    assert type(find_task("scribbling")).__name__ == "Chat"
    with pytest.raises(peftcore.errors.PluginError, match="task 'gone' at nowhere:Gone cannot be imported"):
        find_task("gone")


def test_hook_commands(answer: Add) -> None:
    """Not firstresult: every plugin adds its own, when the core has none of that name or all are listed."""
    said: list[str] = []

    def add(app: typer.Typer) -> None:
        app.command("hum")(lambda: said.append("hummed"))

    observer = answer("peftcore_commands", add)
    assert CliRunner().invoke(command_line, ["methods"]).exit_code == 0 and observer.calls == []
    assert CliRunner().invoke(command_line, ["hum"]).exit_code == 0 and said == ["hummed"]
    assert "hum" in CliRunner().invoke(command_line, ["--help"]).output


def test_hook_file_schemas(answer: Add) -> None:
    """Not firstresult: every plugin names its own."""
    answer("peftcore_file_schemas", lambda: {"hum": "core_toys:schema_of_hums"})
    found = CliRunner().invoke(command_line, ["schema", "hum"])
    assert json.loads(found.stdout) == {"type": "object"}


def test_hook_inject(answer: Add) -> None:
    model = perceptron()
    wrapper = answer.wrap("peftcore_inject")
    injection = peftcore.apply(model, Doubling, target="first")
    (call,) = wrapper.calls
    assert call["model"] is model and call["method"] is injection.method and call["config"] is injection.config
    assert wrapper.results == [True]
    injection.remove()

    def elsewhere(model: Any, method: Any, config: Any, surgeon: Any) -> bool:
        for site in surgeon.sites("second"):
            surgeon.graft(site, DoublingOperator, config)
        return True

    answer("peftcore_inject", elsewhere)
    assert list(peftcore.apply(model, Doubling, target="first").operators) == ["second"]


def test_hook_inject_runs_before_anything_changes(answer: Add) -> None:
    model = perceptron()
    before = list(model.state_dict()), type(model.first), model.first.weight.requires_grad
    seen: list[Any] = []

    def look(model: Any, method: Any, config: Any, surgeon: Any) -> None:
        seen.append((list(model.state_dict()), type(model.first), model.first.weight.requires_grad))

    answer("peftcore_inject", look)
    peftcore.apply(model, Doubling, target="first")
    assert seen == [before]


def test_hook_select(answer: Add) -> None:
    model = perceptron()
    wrapper = answer.wrap("peftcore_select")
    injection = peftcore.apply(model, Shift, target=["first", "second"])
    assert wrapper.calls[0]["injection"] is injection
    assert wrapper.results == [True]
    assert all(parameter.requires_grad for parameter in injection.parameters())
    injection.trainable(False)
    assert len(wrapper.calls) == 1
    injection.trainable(True)
    assert len(wrapper.calls) == 2
    injection.remove()

    def only_second(model: Any, method: Any, config: Any, injection: Any) -> bool:
        for parameter in injection.operators["second"].parameters():
            parameter.requires_grad_(True)
        return True

    answer("peftcore_select", only_second)
    injection = peftcore.apply(model, Shift, target=["first", "second"])
    training = {
        path: all(p.requires_grad for p in operator.parameters()) for path, operator in injection.operators.items()
    }
    assert training == {"first": False, "second": True}


def test_hook_merge(answer: Add) -> None:
    model = perceptron()
    injection = peftcore.apply(model, Shift, target="first")
    base = model.first.weight.detach().clone()
    wrapper = answer.wrap("peftcore_merge")
    injection.merge()
    (call,) = wrapper.calls
    assert call["injection"] is injection and call["model"] is model
    assert list(wrapper.results[0]) == [("first", "weight")]
    assert torch.equal(model.first.weight, base + 1)
    injection.unmerge()

    answer("peftcore_merge", lambda injection, **rest: {("first", "weight"): base + 5})
    injection.merge()
    assert torch.equal(model.first.weight, base + 5)
    injection.unmerge()
    assert torch.equal(model.first.weight, base)


def test_hook_merge_is_checked_whoever_answers(answer: Add) -> None:
    model = perceptron()
    injection = peftcore.apply(model, Shift, target="first")
    base = model.first.weight.detach().clone()
    answer("peftcore_merge", lambda injection, **rest: {("first", "weight"): torch.full_like(base, float("nan"))})
    with pytest.raises(peftcore.errors.MergeError, match="finite"):
        injection.merge()
    assert torch.equal(model.first.weight, base) and not injection.merged


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "houlsby_adapter", "bitfit", "ln_tuning", "linear_probe"])
def test_no_hook_runs_in_a_step_or_in_evaluation(method: str) -> None:
    model = transformer()
    injection = peftcore.apply(model, method)
    optimizer = torch.optim.SGD(injection.parameters(), lr=0.1)
    called: list[str] = []
    manager: pluggy.PluginManager = registry().manager
    undo = manager.add_hookcall_monitoring(lambda name, *rest: called.append(name), lambda *rest: None)
    try:
        for _ in range(2):
            optimizer.zero_grad()
            model.train()(token_ids()).square().sum().backward()
            optimizer.step()
        with torch.no_grad():
            model.eval()(token_ids())
        with injection.disabled():
            model(token_ids())
        assert called == []
        peftcore.plan(perceptron(), Doubling, target="first")
        assert called  # the monitor works
    finally:
        undo()
