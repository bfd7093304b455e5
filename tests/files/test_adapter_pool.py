"""`keep_within`: a limit of bytes for adapters; idle ones lie in files, and come back to the bit or not at all."""

import copy
import gc
import os
import pickle
import random
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from core_toys import perceptron, token_ids, transformer
from torch import Tensor, nn

import peftcore
from peftcore.errors import CheckpointError, ConfigError, IdleAdapter, MemoryLimit
from peftcore.files.adapter_pool import FolderStore, bytes_of, digest
from peftcore.files.safe_io import write_tensors
from peftcore.injection.idle_adapters import IdleTensor
from peftcore.testing.hosts import HOSTS

IDS = token_ids()


def outputs(model: nn.Module, x: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(x)


def storages(others: Sequence[Tensor] = ()) -> int:
    """The bytes of all storages of tensors that are alive in this process, without those of others."""
    left_out = {*map(id, others)}
    alive = (each.untyped_storage() for each in tensors() if id(each) not in left_out)
    return sum({each.data_ptr(): each.nbytes() for each in alive}.values())


def tensors() -> list[Tensor]:
    """The tensors that are alive in this process."""
    gc.collect()
    return [each for each in gc.get_objects() if type(each) in (Tensor, nn.Parameter)]


def served(folder: Path, *methods: str) -> tuple[nn.Module, peftcore.AdapterPool, dict[str, Tensor]]:
    """A model with one adapter of each method, all idle, and what each computes."""
    model = transformer()
    pool = peftcore.keep_within(model, "1GB", idle=folder / "idle")
    expected = {}
    for seed, method in enumerate(methods):
        injection = peftcore.apply(model, method, name=method, seed=seed)
        with torch.no_grad():
            for parameter in injection.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        injection.trainable(False)
        expected[method] = peftcore.using(model, method)(outputs, model)
    peftcore.activate(model)
    assert pool.rest(*methods) == []
    return model, pool, expected


def test_amounts_of_memory() -> None:
    for limit, amount in ((5, 5), (0, 0), ("5", 5), ("2KB", 2000), ("1.5 MiB", 3 * 2**19), ("2gb", 2 * 10**9)):
        assert bytes_of(limit) == amount
    for wrong in (-1, True, 1.5, "much", "2 TB", "-3", None):
        with pytest.raises(ConfigError, match="500MB"):
            bytes_of(wrong)  # type: ignore[arg-type]


# Each keeps its values in another way: parameters, integers, buffers that no file has, experts, tensors of the base.
@pytest.mark.parametrize("method", ["lora", "vera", "shira", "houlsby_adapter", "svdiff", "bitfit", "mam_adapter"])
def test_every_kind_of_state_comes_back_to_the_bit(method: str, tmp_path: Path) -> None:
    model = transformer()
    options: dict[str, Any] = {"shira": {"rank": 1}}.get(method, {})
    if method == "mam_adapter":
        method = ["lora", "ia3"]  # type: ignore[assignment]
    peftcore.apply(model, method, name="one", **options).trainable(False)
    injection = peftcore.injections(model)["one"]
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.add_(0.1)
    before = outputs(model)
    held = [each.clone() for _, module in injection.modules() for each in (*module.parameters(), *module.buffers())]
    pool = peftcore.keep_within(model, "1MB", idle=tmp_path)
    peftcore.activate(model)
    pool.limit = 0
    assert pool.idle == ["one"]
    pool.limit = "1MB"
    peftcore.activate(model, "one")
    now = [each for _, module in injection.modules() for each in (*module.parameters(), *module.buffers())]
    assert all(torch.equal(a, b) for a, b in zip(held, now, strict=True))
    assert torch.equal(outputs(model), before)


def test_what_was_changed_is_written_again_and_nothing_else(tmp_path: Path) -> None:
    model, pool, _ = served(tmp_path, "lora")
    (file,) = (tmp_path / "idle").rglob("*.safetensors")
    first = file.stat().st_mtime_ns
    pool.wake("lora")
    pool.rest("lora")
    assert file.stat().st_mtime_ns == first
    injection = peftcore.injections(model)["lora"]
    pool.wake("lora")
    for parameter in injection.parameters():
        parameter.data += 0.1  # which torch does not count
    expected = peftcore.using(model, "lora")(outputs, model)
    pool.rest("lora")
    assert file.stat().st_mtime_ns != first
    assert torch.equal(peftcore.using(model, "lora")(outputs, model), expected)


def test_training_goes_on_where_it_was(tmp_path: Path) -> None:
    def steps(rests: bool) -> Tensor:
        model = transformer()
        injection = peftcore.apply(model, "lora", seed=0)
        pool = peftcore.keep_within(model, "1MB", idle=tmp_path)
        optimizer = injection.optimizer(torch.optim.AdamW, lr=0.1)
        for _ in range(3):
            model(IDS).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if rests:
                assert pool.rest("lora") == ["lora"]  # it trains
                injection.trainable(False)
                with peftcore.activate(model):
                    assert pool.rest("lora") == ["lora"]  # it is chosen round the block
                peftcore.activate(model)
                assert pool.rest("lora") == []
                injection.trainable()
                peftcore.activate(model, "lora")
        return outputs(model)

    assert torch.equal(steps(True), steps(False))


def test_what_was_changed_in_a_file_is_an_error(tmp_path: Path) -> None:
    model, pool, expected = served(tmp_path, "lora", "dora")
    file, other = sorted((tmp_path / "idle").rglob("*.safetensors"))
    whole = file.read_bytes()
    for content in (whole[:-5], b"", bytes([*whole[:-1], whole[-1] ^ 1]), other.read_bytes()):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=file.name):
            peftcore.activate(model, "lora")
        assert sorted(pool.idle) == ["dora", "lora"]
    file.unlink()
    with pytest.raises(CheckpointError, match=file.name):
        peftcore.using(model, "lora")(outputs, model)
    file.write_bytes(whole)
    for name, output in expected.items():
        assert torch.equal(peftcore.using(model, name)(outputs, model), output)


def test_a_file_that_was_damaged_while_the_adapter_was_there_is_written_anew(tmp_path: Path) -> None:
    model, pool, expected = served(tmp_path, "lora")
    (file,) = (tmp_path / "idle").rglob("*.safetensors")
    pool.wake("lora")
    file.write_bytes(b"")
    pool.rest("lora")
    assert torch.equal(peftcore.using(model, "lora")(outputs, model), expected["lora"])


def test_a_full_disk_leaves_it_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = transformer()
    peftcore.apply(model, "lora").trainable(False)
    before = outputs(model)
    pool = peftcore.keep_within(model, "1MB", idle=tmp_path)
    peftcore.activate(model)

    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("peftcore.files.adapter_pool.write_tensors", full)
    with pytest.raises(OSError, match="No space"):
        pool.limit = 0
    assert pool.resident == ["lora"]
    assert torch.equal(peftcore.using(model, "lora")(outputs, model), before)


# --------------------------------------------------------------------------------------------- what idle adapters allow


def test_what_needs_the_values_brings_them_back(tmp_path: Path) -> None:
    model, pool, expected = served(tmp_path, "lora")
    injection = peftcore.injections(model)["lora"]

    def saves() -> None:
        injection.save(tmp_path / "saved")

    def merges() -> None:
        peftcore.activate(model, "lora")
        injection.merge()
        torch.testing.assert_close(outputs(model), expected["lora"], rtol=1e-4, atol=1e-5)
        injection.unmerge()
        peftcore.activate(model)

    def trains() -> None:
        injection.trainable()
        injection.optimizer(torch.optim.SGD, lr=0.1)
        injection.trainable(False)

    for use in (saves, merges, trains, injection.state_dict, lambda: peftcore.deltas(injection)):
        assert pool.rest("lora") == []
        use()
        assert pool.idle == []
    fresh = transformer()
    peftcore.load(fresh, tmp_path / "saved")
    assert torch.equal(outputs(fresh), expected["lora"])
    pool.rest("lora")
    injection.swap(tmp_path / "saved")
    pool.rest("lora")
    assert injection.summary().parameters > 0


def test_a_state_dict_of_the_model_has_the_values_of_idle_ones(tmp_path: Path) -> None:
    model, pool, expected = served(tmp_path, "lora", "vera")
    state = model.state_dict()
    assert pool.idle == ["lora", "vera"]
    pool.wake("lora", "vera")
    there = model.state_dict()
    assert state.keys() == there.keys()
    assert all(torch.equal(state[key], there[key]) for key in there)
    pool.rest("lora", "vera")
    with pytest.raises(IdleAdapter, match=r"pool\.wake"):
        model.state_dict(keep_vars=True)
    before = [each.clone() for each in model.layers[0].self_attn.q_proj.parameters()]
    with pytest.raises(IdleAdapter, match="cannot be loaded"):
        model.load_state_dict({key: each + 1 for key, each in state.items()})
    assert all(map(torch.equal, before, model.layers[0].self_attn.q_proj.parameters()))
    plain = transformer()
    model.load_state_dict(plain.state_dict())  # that of the bare base leaves adapters as they are
    model.load_state_dict({key: each for key, each in state.items() if ".peft." not in key})
    assert torch.equal(peftcore.using(model, "vera")(outputs, model), expected["vera"])


@pytest.mark.parametrize("copying", [copy.deepcopy, pickle.dumps])
def test_a_copy_is_refused_while_some_are_idle_and_right_when_none_is(copying: Any, tmp_path: Path) -> None:
    model, pool, expected = served(tmp_path, "lora")
    with pytest.raises(IdleAdapter, match=r"pool.end\(\)"):
        copying(model)
    pool.wake("lora")
    copied = copying(model)
    copied = pickle.loads(copied) if isinstance(copied, bytes) else copied
    pool.rest("lora")
    assert torch.equal(peftcore.using(copied, "lora")(outputs, copied), expected["lora"])
    with pytest.raises(ConfigError, match="an AdapterPool already"):
        peftcore.keep_within(model, 5, idle=tmp_path)
    peftcore.keep_within(copied, "1MB", idle=tmp_path)


def test_what_the_model_is_converted_to_holds_for_idle_ones(tmp_path: Path) -> None:
    model, pool, _ = served(tmp_path, "lora", "vera")
    there = transformer()
    for name in ("lora", "vera"):
        pool.wake(name)
        peftcore.injections(model)[name].save(tmp_path / name)
        pool.rest(name)
        peftcore.load(there, tmp_path / name, active=False)
    model.double()
    there.double()
    assert pool.idle == ["lora", "vera"]
    for name in ("lora", "vera"):
        now = peftcore.using(model, name)(outputs, model)
        assert now.dtype is torch.float64
        assert torch.equal(now, peftcore.using(there, name)(outputs, there))
        assert {each.dtype for each in peftcore.injections(model)[name].parameters()} == {torch.float64}
    assert pool.bytes == sum(
        each.numel() * 8
        for injection in peftcore.injections(model).values()
        for _, module in injection.modules()
        for each in (*module.parameters(), *module.buffers())
    )
    pool.rest("lora")
    assert model.to("meta").layers[0].self_attn.q_proj.weight.is_meta


def test_a_compiled_model_is_not_compiled_again_when_one_was_away(tmp_path: Path) -> None:
    model, pool, expected = served(tmp_path, "lora", "ia3")
    peftcore.activate(model, "lora")
    outputs(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    outputs(compiled)
    peftcore.activate(model)
    pool.rest("lora")
    peftcore.activate(model, "lora")
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(outputs(compiled), expected["lora"], rtol=1e-5, atol=1e-6)


def test_a_backward_through_one_that_is_away_says_so(tmp_path: Path) -> None:
    model, pool, _ = served(tmp_path, "lora")
    embedded = model.embed_tokens(IDS).detach().requires_grad_()
    with peftcore.activate(model, "lora"):
        model.embed_tokens.register_forward_hook(lambda *_: embedded)
        loss = model(IDS).square().mean()
    pool.rest("lora")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ------------------------------------------------------------------------------------------------------ the pool itself


def test_a_limit_is_set_once_and_lifted(tmp_path: Path) -> None:
    model, pool, expected = served(tmp_path, "lora", "dora")
    with pytest.raises(ConfigError, match=r"pool\.limit"):
        peftcore.keep_within(model, "1GB", idle=tmp_path)
    pool.limit = 10
    assert "2 idle" in repr(pool)
    pool.end()
    pool.end()
    assert not any(isinstance(each, IdleTensor) for each in model.parameters())
    for name, output in expected.items():
        assert torch.equal(peftcore.using(model, name)(outputs, model), output)
    peftcore.keep_within(model, "1GB", idle=tmp_path)


def test_a_limit_that_cannot_be_kept_changes_nothing(tmp_path: Path) -> None:
    model = transformer()
    peftcore.apply(model, "lora")
    with pytest.raises(MemoryLimit, match="'lora'"):
        peftcore.keep_within(model, 10, idle=tmp_path)
    pool = peftcore.keep_within(model, "1MB", idle=tmp_path)
    with pytest.raises(MemoryLimit):
        pool.limit = 10
    assert pool.limit == 10**6


def test_on_the_cpu_idle_adapters_need_a_folder() -> None:
    with pytest.raises(ConfigError, match="idle=path"):
        peftcore.keep_within(transformer(), "1MB")


def test_a_limit_is_of_the_model_that_was_adapted(tmp_path: Path) -> None:
    model = transformer()
    peftcore.apply(model, "lora")
    with pytest.raises(ConfigError, match="its submodule '0' has"):
        peftcore.keep_within(nn.Sequential(model), "1MB", idle=tmp_path)


def test_its_folder_goes_with_the_model_and_with_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "idle").mkdir()
    (tmp_path / "idle" / "mine.txt").write_text("")
    model, pool, _ = served(tmp_path, "lora")
    assert len(os.listdir(tmp_path / "idle")) == 2
    gone = weakref.ref(model)
    del model, pool
    gc.collect()
    assert gone() is None
    assert os.listdir(tmp_path / "idle") == ["mine.txt"]


def test_an_adapter_that_is_removed_leaves_no_file(tmp_path: Path) -> None:
    model, _, _ = served(tmp_path, "lora", "ia3")
    peftcore.injections(model)["lora"].remove()
    assert len(list((tmp_path / "idle").rglob("*.safetensors"))) == 1


def test_files_hold_tensors_of_any_dtype(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    values = {
        "complex": torch.randn(3, dtype=torch.complex64),
        "bits": torch.tensor([1, 200], dtype=torch.uint16),
        "infinite": torch.tensor([[float("inf"), float("nan")]]),
        "none": torch.zeros(0, 3),
        "one": torch.tensor(2.0, dtype=torch.bfloat16),
    }
    store.keep(1, values)
    back = store.values(1, values)
    assert all(back[name].dtype is each.dtype and digest(back[name]) == digest(each) for name, each in values.items())
    write_tensors(next(tmp_path.rglob("1.safetensors")), {"other": torch.zeros(1)}, {})
    with pytest.raises(CheckpointError, match="does not hold"):
        store.values(1, ["one"])
    store.drop(1)
    store.drop(1)


@pytest.mark.parametrize(("adapters", "limit"), [(80, 2000), pytest.param(1000, 20_000, marks=pytest.mark.slow)])
def test_a_thousand_adapters_within_a_limit(adapters: int, limit: int, tmp_path: Path) -> None:
    """Every request is answered as by an adapter that was loaded freshly, and the storages that are alive are never
    more than the limit."""
    torch.manual_seed(0)
    chance, x = random.Random(0), torch.randn(3, 4)
    kinds = [("lora", {"rank": rank, "target": ["first", "second"]}) for rank in (1, 3, 5)]
    kinds += [("ia3", {"target": "first"}), ("dora", {"rank": 2, "target": ["first", "second"]})]
    files = adapters // 10
    for number in range(files):
        method, options = kinds[number % 5]
        injection = peftcore.apply(perceptron(), method, seed=number, **options)
        with torch.no_grad():
            for parameter in injection.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
        injection.save(tmp_path / str(number))
    expected = []
    for number in range(files):
        plain = perceptron()
        peftcore.load(plain, tmp_path / str(number))
        expected.append(outputs(plain, x))
    model = perceptron()
    others = tensors()  # of other tests, held: some would go meanwhile, or change
    pool = peftcore.keep_within(model, limit, idle=tmp_path / "idle")
    for number in range(adapters):
        peftcore.load(model, tmp_path / str(number % files), name=f"n{number}", active=False)
        assert pool.bytes <= limit
    assert len(pool.resident) + len(pool.idle) == adapters
    assert storages(others) == pool.bytes
    modules = [module for each in peftcore.injections(model).values() for _, module in each.modules()]
    tables = [table for module in modules for table in (module._parameters, module._buffers) if table]
    for _ in range(150):
        chosen = [chance.randrange(adapters) for _ in range(chance.choice((1, 3)))]
        if len(chosen) == 1:
            found = peftcore.using(model, f"n{chosen[0]}")(outputs, model, x)
            assert torch.equal(found, expected[chosen[0] % files])
        else:
            found = peftcore.using(model, [f"n{number}" for number in chosen])(outputs, model, x)
            wanted = torch.stack([expected[number % files][row] for row, number in enumerate(chosen)])
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        there = (each for table in tables for each in table.values() if each is not None)
        assert sum(each.untyped_storage().nbytes() for each in there) == pool.bytes <= limit
    del found, wanted
    assert storages(others) == pool.bytes
    del others


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "houlsby_adapter", "ln_tuning", "vera", "prompt_tuning"])
def test_adapters_take_what_is_planned(method: str, tmp_path: Path) -> None:
    """By the pool's count, and by the storages that come into being: as many bytes for each, however many there are."""
    model = HOSTS["llama"].build()[0]
    each = peftcore.plan(model, method).resident
    pool = peftcore.keep_within(model, "1GB", idle=tmp_path / "idle")
    before = storages()
    for number in range(1, 5):
        peftcore.apply(model, method, name=f"{method}-{number}", seed=number)
        peftcore.activate(model)
        assert pool.bytes == number * each
        assert storages() - before == number * each
