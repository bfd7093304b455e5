"""Edited attention through the life of a host: copies, pickles, training, routes, removal."""

import pickle
import subprocess
import sys
import textwrap
from copy import deepcopy
from pathlib import Path
from typing import Any

import attention_hosts
import pytest
import torch
from attention_hosts import METHODS, host, inputs
from torch import Tensor

import peftcore
from peftcore.errors import NotMergeable
from peftcore.testing.tools import differences, trace

NAMES = ["llama", "gpt2", "bert", "t5"]


def logits(model: Any, given: dict[str, Tensor]) -> Tensor:
    output: Tensor = model(**given).logits
    return output


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_goes_its_own_way(name: str) -> None:
    model, given = host(name, "sdpa"), inputs(name)
    injection = peftcore.apply(model, METHODS["in_front"])
    before = logits(model, given)
    copy = deepcopy(model)
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.zero_()
    assert torch.equal(logits(copy, given), before)
    assert not torch.allclose(logits(model, given), before, atol=1e-3)
    copy.set_attn_implementation("eager")  # the copy reads its own config
    assert model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(logits(copy, given), before, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_pickle_works_in_a_fresh_process(tmp_path: Path) -> None:
    cases, given = [], inputs("llama")
    for implementation in ("eager", "sdpa"):
        model = host("llama", implementation)
        peftcore.apply(model, METHODS["in_front"])
        with torch.no_grad():
            cases.append((model, given, logits(model, given)))
    (tmp_path / "models.pickle").write_bytes(pickle.dumps(cases))
    program = f"""
        import pickle, sys, torch
        torch.set_num_threads(1)
        sys.path.insert(0, {str(Path(attention_hosts.__file__).parent)!r})
        for model, given, expected in pickle.load(open({str(tmp_path / "models.pickle")!r}, "rb")):
            with torch.no_grad():
                assert torch.equal(model(**given).logits, expected)
            torch.compiler.reset()
            compiled = torch.compile(model, fullgraph=True, backend="eager")
            torch.testing.assert_close(compiled(**given).logits, expected, rtol=1e-5, atol=1e-5)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, timeout=300)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_removal_leaves_no_trace(name: str, method: str) -> None:
    model, given = host(name, "sdpa"), inputs(name)
    before, base = trace(model), logits(model, given)
    injection = peftcore.apply(model, METHODS[method])
    moved = logits(model, given)
    with injection.disabled():
        assert torch.equal(logits(model, given), base)
    assert torch.equal(logits(model, given), moved)
    injection.remove()
    assert differences(before, trace(model)) == ""
    assert torch.equal(logits(model, given), base)


def test_merging_is_refused() -> None:
    injection = peftcore.apply(host("llama"), METHODS["in_front"])
    with pytest.raises(NotMergeable):
        injection.merge()


def test_merging_leaves_out_what_acts_in_training_alone() -> None:
    model = host("llama")
    injection = peftcore.apply(model, METHODS["in_front"])
    for operator in injection.operators.values():
        operator.trains_only = True
    assert injection.merge().tensors == 0


@pytest.mark.parametrize("name", NAMES)
def test_projections_follow_the_other_injections(name: str) -> None:
    """What the attention's own matrices make of a prompt is the same whether another injection that adapts them is
    merged or not, and that of the bare base in rows which that one does not serve."""
    model, given = host(name, "sdpa"), inputs(name)
    peftcore.apply(model, METHODS["beside"])
    alone = logits(model, given)
    lora = peftcore.apply(model, "lora", target="all-linear")
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.normal_(0, 0.3)
    both = logits(model, given)
    assert (both - alone).abs().max() > 1e-2
    with peftcore.route(model, ["beside", "lora"]):
        routed = logits(model, given)
    torch.testing.assert_close(routed[0], alone[0], rtol=1e-5, atol=1e-5)
    lora.merge()
    torch.testing.assert_close(logits(model, given), both, rtol=1e-4, atol=1e-4)


def without_dropout(model: Any) -> None:
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or name == "p"):
                setattr(module, name, 0.0)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing_loses_nothing(name: str, reentrant: bool) -> None:
    """transformers turns the cache off then: what lives in the cache would be gone without a word."""
    model, given = host(name, "sdpa").train(), inputs(name)
    without_dropout(model)
    injection = peftcore.apply(model, METHODS["in_front"])

    def step() -> tuple[Tensor, list[Tensor]]:
        for parameter in injection.parameters():
            parameter.grad = None
        output = logits(model, given)
        output.square().mean().backward()
        return output.detach(), [parameter.grad.clone() for parameter in injection.parameters()]

    plain = step()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    again = step()
    torch.testing.assert_close(plain[0], again[0], rtol=1e-5, atol=1e-5)
    for one, other in zip(plain[1], again[1], strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * one.abs().max().item())


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_host_in_bfloat16(implementation: str) -> None:
    given = inputs("llama")
    wide = host("llama", implementation)
    narrow = deepcopy(wide).bfloat16()
    for model in (wide, narrow):
        injection = peftcore.apply(model, METHODS["in_front"], seed=0)
        assert {parameter.dtype for parameter in injection.parameters()} == {torch.float32}
    valid = given["attention_mask"].bool()
    low, high = logits(narrow, given)[valid], logits(wide, given)[valid]
    assert low.dtype == torch.bfloat16
    assert (low.float() - high).abs().max() < 0.06 * high.abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        assert (logits(wide, given)[valid].float() - high).abs().max() < 0.06 * high.abs().max()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", NAMES)
def test_rows_have_their_own_edits(name: str, implementation: str) -> None:
    """Prefixes of different lengths, another kind of edit, and the bare base, side by side in one batch."""
    model = host(name, implementation)
    one = inputs(name)
    given = {key: torch.cat([value, value]) for key, value in one.items()}  # four rows, two of them padded
    long = peftcore.apply(model, METHODS["in_front"], name="long", length=5)
    short = peftcore.apply(model, METHODS["in_front"], name="short", length=2)
    turned = peftcore.apply(model, METHODS["turned"], name="turned")
    alone = {None: None, "long": long, "short": short, "turned": turned}
    expected = []
    rows = ["long", "short", None, "turned"]
    for row, name_of_row in enumerate(rows):
        with peftcore.activate(model, *([] if alone[name_of_row] is None else [name_of_row])):
            expected.append(logits(model, given)[row])
    with peftcore.route(model, rows):
        routed = logits(model, given)
    seen = given["attention_mask"].bool() if routed.shape[1] == given["attention_mask"].shape[1] else ...
    torch.testing.assert_close(routed[seen], torch.stack(expected)[seen], rtol=1e-5, atol=1e-5)
    assert (expected[0] - expected[2]).abs().max() > 1e-2


def test_rows_without_edits_are_one_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever acts on them elsewhere: their keys and values are not copied for each adapter."""
    model, given = host("llama", "sdpa"), inputs("llama")
    given = {key: torch.cat([value, value]) for key, value in given.items()}
    peftcore.apply(model, METHODS["in_front"], name="edited", length=5)
    for name in ("one", "two"):
        peftcore.apply(model, "lora", name=name)
    rows: list[int] = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def counted(query: Tensor, *args: Any, **options: Any) -> Tensor:
        rows.append(len(query))
        return attention(query, *args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    with peftcore.route(model, ["one", "edited", None, "two"]):
        logits(model, given)
    assert rows and sorted(set(rows)) == [1, 3] and rows.count(1) == rows.count(3)


def test_routed_rows_generate_as_alone() -> None:
    model, given = host("llama", "sdpa"), inputs("llama")
    for name, length in (("long", 5), ("short", 2)):
        peftcore.apply(model, METHODS["in_front"], name=name, length=length)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    with peftcore.route(model, ["short", "long"]):
        together = model.generate(**given, **options)
    for row, name in enumerate(["short", "long"]):
        with peftcore.activate(model, name):
            assert torch.equal(model.generate(**given, **options)[row], together[row])
