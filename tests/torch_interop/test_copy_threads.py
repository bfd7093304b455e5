"""Copies, pickles and threads: each copy is a host of its own, each thread acts as it chose."""

import copy
import io
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import interop_hosts
import pytest
import torch
from interop_hosts import METHODS, adapt, encoder, inputs
from torch import Tensor, nn

import peftcore

HERE = Path(interop_hosts.__file__).parent


@pytest.mark.parametrize("method", METHODS)
def test_deepcopy_is_a_host_of_its_own(method: str) -> None:
    model, x = encoder(), inputs()
    injection = adapt(model, method)
    expected = model(x)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), expected)
    theirs = peftcore.injections(twin)[method]
    assert theirs is not injection and theirs.model is twin
    assert not {id(p) for p in theirs.parameters()} & {id(p) for p in model.parameters()}
    assert {id(p) for p in theirs.parameters()} <= {id(p) for p in twin.parameters()}
    theirs.remove()
    assert type(twin.head) is nn.Linear and not [key for key in twin.state_dict() if "peft" in key]
    assert all(parameter.requires_grad for parameter in twin.parameters())
    assert torch.equal(model(x), expected) and injection.active
    assert not torch.allclose(twin(x), expected, atol=1e-3)


def test_copy_trains_alone() -> None:
    model, x = encoder(), inputs()
    adapt(model, "dora")
    expected = model(x)
    twin = copy.deepcopy(model)
    twin(x).square().sum().backward()
    torch.optim.SGD((p for p in twin.parameters() if p.requires_grad), lr=1.0).step()
    assert not torch.allclose(twin(x), expected, atol=1e-3)
    assert torch.equal(model(x), expected) and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_copy_keeps_the_active_set_and_merges(method: str) -> None:
    model, x = encoder(), inputs()
    base = model(x)
    injection = adapt(model, method)
    acting = model(x)
    injection.merge()
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(x), acting, rtol=1e-4, atol=1e-5)
    theirs = peftcore.injections(twin)[method]
    assert theirs.merged
    theirs.remove()
    assert torch.equal(twin(x), base)
    assert injection.merged
    injection.unmerge()
    peftcore.activate(model)
    assert torch.equal(copy.deepcopy(model)(x), base)


def test_copy_of_one_layer_acts_as_the_layer() -> None:
    model = encoder(2)
    adapt(model, "lora")
    x = torch.randn(2, 5, 16)
    expected = model.blocks[0](x)
    layer = copy.deepcopy(model.blocks[0])
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("method", METHODS)
def test_torch_save_and_load_of_the_whole_model(method: str) -> None:
    model, x = encoder(), inputs()
    adapt(model, method)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(x), model(x))
    injection = peftcore.injections(loaded)[method]
    injection.check()
    injection.remove()
    assert not [key for key in loaded.state_dict() if "peft" in key]


SCRIPT = """
import sys, pickle, torch
torch.set_num_threads(1)
with open(sys.argv[1], "rb") as file:
    model, x, adapted, base = pickle.load(file)
import peftcore
assert torch.equal(model(x), adapted), "it acts"
injections = peftcore.injections(model)
for injection in injections.values():
    injection.check()
    assert injection.active
model(x).square().sum().backward()
assert all(p.grad is not None for i in injections.values() for p in i.parameters()), "it trains"
with peftcore.activate(model):
    assert torch.equal(model(x), base), "it can be switched off"
for injection in list(injections.values()):
    injection.remove()
assert torch.equal(model(x), base), "it leaves"
"""


@pytest.mark.slow
def test_pickle_acts_in_a_fresh_process(tmp_path: Path) -> None:
    model, x = encoder(), inputs()
    base = model(x).detach()
    for method in ("lora", "dora", "ia3", "houlsby_adapter", "linear_probe"):  # no two of them replace one tensor
        adapt(model, method)
    adapted = model(x).detach()
    assert not torch.allclose(adapted, base, atol=1e-3)
    path = tmp_path / "model.pickle"
    path.write_bytes(pickle.dumps((model, x, adapted, base)))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}
    subprocess.run([sys.executable, "-c", SCRIPT, str(path)], check=True, env=environment, timeout=120)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("gradients_on", [True, False])
def test_four_threads_with_different_active_sets_do_not_meet(method: str, gradients_on: bool) -> None:
    model, x = encoder(), inputs()
    for seed, name in enumerate(("a", "b", "c")):
        adapt(model, method, name=name, seed=seed, scale=0.2)
    sets: list[tuple[str, ...]] = [(), ("a",), ("b", "c"), ("a", "b", "c")]
    expected: dict[tuple[str, ...], Tensor] = {}
    with torch.set_grad_enabled(gradients_on):
        for active in sets:
            with peftcore.activate(model, *active):
                expected[active] = model(x).detach()
    assert len({tuple(value.flatten().tolist()) for value in expected.values()}) == len(sets)
    peftcore.activate(model, "a")
    barrier, wrong, errors = threading.Barrier(len(sets), timeout=60), [], []

    def serve(active: tuple[str, ...]) -> None:
        try:
            with torch.set_grad_enabled(gradients_on):
                for turn in range(12):
                    with peftcore.activate(model, *active):
                        barrier.wait()  # all have chosen, none has run
                        if not torch.equal(model(x), expected[active]):
                            wrong.append((active, turn))
        except BaseException as error:
            barrier.abort()
            errors.append(error)

    threads = [threading.Thread(target=serve, args=(active,)) for active in sets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not errors and not wrong
    with torch.set_grad_enabled(gradients_on):
        assert torch.equal(model(x), expected[("a",)])


def test_threads_that_end_leave_nothing_behind() -> None:
    model, x = encoder(), inputs()
    adapt(model, "lora")
    for _ in range(3):
        thread = threading.Thread(target=lambda: peftcore.activate(model).__exit__(None, None, None))
        thread.start()
        thread.join(30)
    with peftcore.activate(model):
        base = model(x)
    assert not torch.equal(model(x), base)
    from peftcore.forward.state.host_state import state_of

    assert not state_of(model).choices.own


def test_backward_in_another_thread_uses_the_set_of_the_forward() -> None:
    """Weight operators compute again in backward; autograd may run that in a thread of its own."""
    model, x = encoder(), inputs()
    for seed, name in enumerate(("a", "b")):
        adapt(model, "dora", name=name, seed=seed)
    ours = peftcore.injections(model)["a"]

    def gradient(later: bool) -> list[Tensor]:
        with peftcore.activate(model, "a"):
            loss = model(x).square().sum()
            if not later:
                loss.backward()
        if later:
            thread = threading.Thread(target=loss.backward)
            thread.start()
            thread.join(60)
        found = [parameter.grad.clone() for parameter in ours.parameters()]
        assert all(parameter.grad is None for parameter in peftcore.injections(model)["b"].parameters())
        model.zero_grad()
        return found

    for now, later in zip(gradient(False), gradient(True), strict=True):
        torch.testing.assert_close(now, later)
