"""Reports of routers: against gates computed beside the model; repeated forwards, routes, beams, compilers; what stays
behind; as text, JSON and a picture."""

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import peftcore
from peftcore.errors import ExportError, NoRouters
from peftcore.testing import HOSTS
from peftcore.testing.kit import fill

EXPERTS = 3


def adapted(name: str = "default", seed: int = 1, model: Any = None, **options: Any) -> tuple[Any, Any]:
    model = HOSTS["llama"].build()[0].double().eval() if model is None else model
    options = {"heads": EXPERTS, "rank": 2, "dropout": 0.0, "target": "mlp.up", **options}
    injection = peftcore.apply(model, "hydralora", name=name, dtype="float64", **options)
    fill(injection, seed)
    return model, injection


def tokens(seed: int = 3) -> dict[str, Tensor]:
    ids = torch.randint(1, 16, (2, 5), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}


def gates_of(model: Any, injection: Any, inputs: Any) -> dict[str, Tensor]:
    """The gates ``[tokens that count, experts]``, from what modules are given."""
    found: dict[str, Tensor] = {}
    hooks = []
    for path, op in injection.operators.items():

        def see(m: Any, args: Any, path: str = path, op: Any = op) -> None:
            found[path] = (args[0] @ op.gate.T).softmax(-1)[inputs["attention_mask"] != 0]

        hooks.append(model.get_submodule(path).register_forward_pre_hook(see))
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return found


def test_shares_balance_and_entropy() -> None:
    model, injection = adapted()
    inputs = tokens()
    expected = gates_of(model, injection, inputs)
    with injection.reporting(), torch.no_grad():
        model(**inputs)
        assert len(injection.report().routers) == len(expected)  # so far
    report = injection.report()
    assert [row.path for row in report.routers] == list(expected)
    for row in report.routers:
        gates = expected[row.path]
        mean = gates.mean(0)
        assert (row.choices, row.padding, row.dropped, row.loads) == (8, 2, 0, (1.0,) * EXPERTS)
        torch.testing.assert_close(torch.tensor(row.shares), mean.float())
        for found, p in ((row.balance, mean), (row.entropy, gates)):
            entropy = torch.distributions.Categorical(p).entropy().mean() / torch.tensor(EXPERTS).log()
            assert abs(found - float(entropy)) < 1e-6
    assert 0.5 < report.routers[0].entropy <= report.routers[0].balance <= 1


def test_backward_counts_nothing_twice() -> None:
    model, injection = adapted()
    model.train().enable_input_require_grads()
    for reentrant in (False, True):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        with injection.reporting():
            model(**tokens()).logits.square().sum().backward()
        assert [row.choices for row in injection.report().routers] == [8] * len(injection.operators)


def test_in_a_route_each_counts_its_rows() -> None:
    """Also where equal operators of several adapters would run as one."""
    model, one = adapted("one")
    _, two = adapted("two", 2, model)
    inputs = tokens()
    expected = {each.name: gates_of_alone(model, each, inputs) for each in (one, two)}
    with torch.no_grad(), peftcore.route(model, ["one", "two"]):
        output = model(**inputs).logits
        with one.reporting(), two.reporting():
            watched = model(**inputs).logits
    torch.testing.assert_close(watched, output, rtol=1e-10, atol=1e-12)
    for row, (injection, count, padding) in enumerate(((one, 3, 2), (two, 5, 0))):
        for found in injection.report().routers:
            assert (found.choices, found.padding) == (count, padding)
            alone = expected[injection.name][row][found.path]
            torch.testing.assert_close(torch.tensor(found.shares), torch.tensor(alone), rtol=1e-5, atol=1e-6)


def gates_of_alone(model: Any, injection: Any, inputs: Any) -> list[dict[str, Any]]:
    """The mean shares of each row by itself."""
    found = []
    for row in range(2):
        with peftcore.activate(model, injection.name), injection.reporting(), torch.no_grad():
            model(**{name: value[row : row + 1] for name, value in inputs.items()})
        found.append({each.path: each.shares for each in injection.report().routers})
    return found


def test_beams_are_rows_and_a_prompts_padding_does_not_count() -> None:
    model, injection = adapted()
    way = {"num_beams": 3, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "use_cache": True}
    with injection.reporting():
        model.generate(**tokens(), **way, pad_token_id=0)
    for row in injection.report().routers:
        assert row.choices == 3 * (8 + 2 * 3) and row.padding == 3 * 2  # three steps behind the prompt


@pytest.mark.slow
def test_a_compiled_model_is_watched() -> None:
    model, injection = adapted()
    inputs = tokens()
    with torch.no_grad():
        expected = model(**inputs).logits
    torch.compiler.reset()
    model.compile(backend="eager")
    with torch.no_grad():
        model(**inputs)
        with injection.reporting():
            watched = model(**inputs).logits
        again = model(**inputs).logits
    torch.compiler.reset()
    torch.testing.assert_close(watched, expected)
    torch.testing.assert_close(again, expected)
    assert [row.choices for row in injection.report().routers] == [8] * len(injection.operators)


def test_nothing_is_left_behind() -> None:
    model, injection = adapted()
    before = {path: sorted(vars(each)) for path, each in injection.operators.items()}
    with injection.reporting():
        model(**tokens())
        with injection.reporting():
            model(**tokens())
        assert injection.report().routers[0].choices == 8  # the outer block goes on
        model(**tokens())
    assert injection.report().routers[0].choices == 16
    model(**tokens())
    assert injection.report().routers[0].choices == 16
    assert {path: sorted(vars(each)) for path, each in injection.operators.items()} == before


def test_a_block_that_cannot_be_entered_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(injection: peftcore.Injection) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise KeyboardInterrupt

    _, injection = adapted()
    before, calls = {path: sorted(vars(each)) for path, each in injection.operators.items()}, 0
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(peftcore.Injection, "_replan", interrupted)
        injection.reporting().__enter__()
    assert {path: sorted(vars(each)) for path, each in injection.operators.items()} == before


def test_only_what_routes_reports() -> None:
    model, injection = adapted()
    with pytest.raises(NoRouters, match="run the model within"):
        injection.report()
    lora = peftcore.apply(model, "lora", name="plain")
    with pytest.raises(NoRouters, match="no routers"):
        lora.report()
    with pytest.raises(NoRouters, match="no routers"), lora.reporting():
        pass


def test_a_router_that_did_not_run_has_no_choices() -> None:
    model, injection = adapted()
    with injection.reporting(), injection.disabled():
        model(**tokens())
    row = injection.report().routers[0]
    assert (row.choices, row.shares, row.balance) == (0, (), 0.0)
    assert json.loads(injection.report().json())["routers"][0]["choices"] == 0


def test_tables_json_and_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    model, injection = adapted()
    with injection.reporting():
        model(**tokens())
    report = injection.report()
    path = report.routers[0].path
    head, columns, *rows = str(report).splitlines()
    assert "hydralora" in head and columns.startswith("router") and len(rows) == len(report.routers)
    assert rows[0].split()[:4] == [path, "token", "8", "2"]
    console = Console(width=200, record=True)
    console.print(report)
    assert path in console.export_text()
    assert json.loads(report.json()) == json.loads(json.dumps(report.to_dict()))
    report.plot(tmp_path / "routers.png")
    assert (tmp_path / "routers.png").read_bytes().startswith(b"\x89PNG")
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ExportError, match="pip install matplotlib"):
        report.plot(tmp_path / "other.png")
