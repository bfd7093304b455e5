"""accelerate with adapted hosts: prepare with mixed precision, and hooks that place or offload weights."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_hosts import host, inputs
from training_toys import ByRow, Steps, batch, toy

import peftcore
from peftcore.errors import UnsupportedSite
from peftcore.testing.kit import fill
from peftcore.testing.tools import differences, trace

accelerate = pytest.importorskip("accelerate")

METHODS = ("lora", "dora", "ia3", "houlsby_adapter", "bitfit", "ln_tuning", "adalora")
OPTIONS: dict[str, dict[str, Any]] = {"bitfit": {"add_missing_bias": True}}
READ = ["SerialOperator"]
"""Operators whose children's weights are read, not called: accelerate loads these with their parent on request."""


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """accelerate keeps one precision for the process."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def adapted(method: str) -> tuple[nn.Module, peftcore.Injection]:
    model = host("llama").eval()
    injection = peftcore.apply(model, method, seed=0, **OPTIONS.get(method, {}))
    fill(injection)
    return model, injection


def run(model: nn.Module) -> Tensor:
    return model(**inputs("llama")).logits


def expected(method: str) -> tuple[Tensor, Tensor]:
    """Logits with and without the adapter."""
    model, injection = adapted(method)
    torch.manual_seed(3)
    with torch.no_grad():
        whole = run(model)
        with injection.disabled():
            torch.manual_seed(3)
            return whole, run(model)


@pytest.mark.parametrize("method", METHODS)
def test_prepare_with_bf16_gives_the_gradients_of_autocast(method: str) -> None:
    def gradients(model: nn.Module, injection: peftcore.Injection, backward: Callable[[Tensor], None]) -> list[Tensor]:
        backward(model(**inputs("llama")).logits.float().square().mean())
        return [parameter.grad.clone() for parameter in injection.parameters()]

    model, injection = adapted(method)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**inputs("llama")).logits
    output.float().square().mean().backward()
    plain = [parameter.grad.clone() for parameter in injection.parameters()]
    model, injection = adapted(method)
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    optimizer = injection.optimizer(torch.optim.AdamW, lr=0.01, **({"total_steps": 4} if method == "adalora" else {}))
    prepared, optimizer = accelerator.prepare(model, optimizer)
    found = gradients(prepared, injection, accelerator.backward)
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    before = [parameter.detach().clone() for parameter in injection.parameters()]
    optimizer.step()
    optimizer.zero_grad()
    moved = [not torch.equal(p, old) for p, old in zip(injection.parameters(), before, strict=True)]
    assert all(moved)


@pytest.mark.parametrize("keep", [True, False])
def test_unwrapping_keeps_the_grafts(keep: bool) -> None:
    model, injection = adapted("lora")
    reference = run(model).detach()
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    prepared = accelerator.prepare(model)
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=keep)
    assert unwrapped is model
    injection.check()
    assert injection.summary().irregular == ()
    assert any(".peft." in key for key in unwrapped.state_dict())
    output = run(unwrapped)
    assert output.dtype is torch.float32
    assert torch.equal(output, reference) is not keep  # kept, the wrapper goes on casting to bfloat16


@pytest.mark.parametrize("method", [ByRow, Steps])
def test_method_optimizers_are_prepared_like_others(method: Any, tmp_path: Path) -> None:
    """With gradient accumulation, a scheduler, and state that accelerate saves and loads."""
    results = []
    for resumed in (False, True):
        model = toy()
        injection = peftcore.apply(model, method, seed=0)
        optimizer = injection.optimizer(torch.optim.AdamW, lr=0.05, total_steps=4)
        inner = optimizer
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=4)
        accelerator = accelerate.Accelerator(gradient_accumulation_steps=2, cpu=True)
        prepared, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
        if resumed:
            accelerator.load_state(str(tmp_path / "state"))
        for index in range(4 if resumed else 0, 8):
            if index == 4 and not resumed:
                accelerator.save_state(str(tmp_path / "state"))
            with accelerator.accumulate(prepared):
                accelerator.backward(prepared(**batch(index))["loss"])
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        assert inner.steps == 4
        results.append([parameter.detach().clone() for parameter in injection.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def place(model: nn.Module) -> None:
    accelerate.dispatch_model(model, device_map={"": "cpu"}, force_hooks=True)


def offload_to_memory(model: nn.Module) -> None:
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"), preload_module_classes=READ)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("hook", [place, offload_to_memory])
def test_hooks_that_come_after_the_adapter(method: str, hook: Callable[[nn.Module], None]) -> None:
    reference, base = expected(method)
    model, injection = adapted(method)
    hook(model)
    with torch.no_grad():
        output = run(model)
        if hook is place:
            assert torch.equal(output, reference)
        torch.testing.assert_close(output, reference)  # what is offloaded acts on weights, in another order of sums
        with injection.disabled():
            assert torch.equal(run(model), base)
    assert not torch.equal(reference, base)


def test_offloading_to_disk_after_the_adapter(tmp_path: Path) -> None:
    reference, _ = expected("lora")
    model, _ = adapted("lora")
    accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    with torch.no_grad():
        assert torch.equal(run(model), reference)


def test_training_with_hooks_that_place() -> None:
    model, injection = adapted("dora")
    run(model).square().mean().backward()
    plain = [parameter.grad.clone() for parameter in injection.parameters()]
    model, injection = adapted("dora")
    place(model)
    run(model).square().mean().backward()
    assert all(torch.equal(p.grad, old) for p, old in zip(injection.parameters(), plain, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_hooks_that_are_there_before_the_adapter(method: str) -> None:
    """They keep the forward that they call, so the adapter gets inside; removing it leaves them as they were."""
    reference, base = expected(method)
    model = host("llama").eval()
    place(model)
    with torch.no_grad():
        run(model)
    before = trace(model)
    injection = peftcore.apply(model, method, seed=0, **OPTIONS.get(method, {}))
    fill(injection)
    with torch.no_grad():
        assert torch.equal(run(model), reference)
    injection.check()
    assert injection.summary().irregular == ()
    accelerate.hooks.remove_hook_from_submodules(model)
    injection.check()
    with torch.no_grad():
        assert torch.equal(run(model), reference)
    place(model)
    injection.remove()
    with torch.no_grad():
        assert torch.equal(run(model), base)
    assert differences(before, trace(model), passing=("attributes", "hooks")) == ""


def test_removing_an_adapter_leaves_hooks_as_they_were() -> None:
    model = host("llama").eval()
    place(model)
    before = trace(model)
    forwards = {
        name: module.__dict__["_old_forward"] for name, module in model.named_modules() if "_hf_hook" in vars(module)
    }
    peftcore.apply(model, "lora").remove()
    assert differences(before, trace(model)) == ""
    assert forwards == {name: model.get_submodule(name).__dict__["_old_forward"] for name in forwards}


def test_offloaded_weights_are_no_start_for_an_adapter() -> None:
    model = host("llama").eval()
    with torch.no_grad():
        base = run(model)
        offload_to_memory(model)
        with pytest.raises(UnsupportedSite, match="offloaded"):
            peftcore.apply(model, "lora")
        assert torch.equal(run(model), base)
    assert not peftcore.injections(model)
