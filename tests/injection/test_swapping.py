"""`Injection.swap`: after it the adapter computes what the other one does, freshly loaded, in the same tensors and the
same compiled graph; what cannot be swapped exactly is refused, and nothing was changed then."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from core_toys import token_ids, transformer
from torch import Tensor, nn

import peftcore
from peftcore.errors import CheckpointError, ConfigError, HostMismatch, MergeError, SwapError, UnknownInjection

IDS = token_ids()
ROOMY: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "lora": ({"rank": 2, "alpha": 3.0}, {"rank": 5, "alpha": 7.0}, {"rank": 6}),
    "lora_plus": ({"rank": 2}, {"rank": 5, "alpha": 7.0}, {"rank": 6}),
    "dora": ({"rank": 2, "alpha": 3.0}, {"rank": 5, "alpha": 7.0}, {"rank": 6}),
    "hira": ({"rank": 2}, {"rank": 5}, {"rank": 6}),
    "loha": ({"rank": 2, "alpha": 3.0}, {"rank": 3, "alpha": 7.0}, {"rank": 4}),
    "locon": ({"rank": 2, "alpha": 3.0}, {"rank": 5, "alpha": 7.0}, {"rank": 6}),
    "houlsby_adapter": ({"bottleneck": 2}, {"bottleneck": 5}, {"bottleneck": 6}),
    "parallel_adapter": ({"bottleneck": 2}, {"bottleneck": 5}, {"bottleneck": 6}),
    "pissa": ({"rank": 2, "alpha": 3.0}, {"rank": 3, "alpha": 7.0}, {"rank": 4}),
    "olora": ({"rank": 2, "alpha": 3.0}, {"rank": 3, "alpha": 7.0}, {"rank": 4}),
    "qlora": ({"rank": 2, "alpha": 3.0}, {"rank": 3, "alpha": 7.0}, {"rank": 4}),
    "adaptformer": ({"bottleneck": 2}, {"bottleneck": 5}, {"bottleneck": 6}),
}
"""The options of two adapters and of a place for both, by method."""
FIXED = ("vera", "ia3", "bitfit", "ln_tuning", "oft", "boft", "lokr", "lora_xs", "ssf", "compacter", "randlora")


def noisy(injection: peftcore.Injection, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def saved(folder: Path, method: Any, seed: int = 0, **options: Any) -> Path:
    injection = peftcore.apply(transformer(), method, seed=seed, **options)
    noisy(injection, seed)
    injection.save(folder)
    return folder


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS)


def fresh(folder: Path) -> Tensor:
    model = transformer()
    peftcore.load(model, folder)
    return outputs(model)


@pytest.mark.share(2)
@pytest.mark.parametrize("method", [*ROOMY, *FIXED])
def test_it_computes_what_the_other_one_does_in_the_same_tensors(method: str, tmp_path: Path) -> None:
    options = ROOMY.get(method, ({}, {}, {}))
    first, second = saved(tmp_path / "a", method, 0, **options[0]), saved(tmp_path / "b", method, 1, **options[1])
    model = transformer()
    slot = peftcore.load(model, first, name="slot", room=options[2])
    before = list(slot.parameters())
    torch.testing.assert_close(outputs(model), fresh(first), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(outputs(model), fresh(second), atol=1e-3)
    for folder in (second, first, second):
        slot.swap(folder)
        torch.testing.assert_close(outputs(model), fresh(folder), rtol=1e-6, atol=1e-6)
    assert all(a is b for a, b in zip(before, slot.parameters(), strict=True))
    slot.save(tmp_path / "c")
    torch.testing.assert_close(fresh(tmp_path / "c"), fresh(second), rtol=1e-6, atol=1e-6)


def test_equal_shapes_give_equal_bits(tmp_path: Path) -> None:
    first, second = saved(tmp_path / "a", "lora", 0), saved(tmp_path / "b", "lora", 1, alpha=8.0)
    model = transformer()
    peftcore.load(model, first, name="slot").swap(second)
    assert torch.equal(outputs(model), fresh(second))


@pytest.mark.parametrize(
    "method",
    [
        "lora",
        *(pytest.param(each, marks=pytest.mark.slow) for each in ("dora", "ia3", "houlsby_adapter", "vera", "loha")),
    ],
)
def test_a_compiled_model_is_not_compiled_again(method: str, tmp_path: Path) -> None:
    options = ROOMY.get(method, ({}, {}, {}))
    first, second = saved(tmp_path / "a", method, 0, **options[0]), saved(tmp_path / "b", method, 1, **options[1])
    model = transformer()
    slot = peftcore.load(model, first, name="slot", room=options[2])
    outputs(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    outputs(compiled)
    with torch.compiler.set_stance("fail_on_recompile"):
        for folder in (second, first):
            slot.swap(folder)
            torch.testing.assert_close(outputs(compiled), fresh_eagerly(folder), rtol=1e-5, atol=1e-6)


def fresh_eagerly(folder: Path) -> Tensor:
    with torch.compiler.set_stance("force_eager"):
        return fresh(folder)


def test_the_compiled_test_would_see_another_rank_without_room(tmp_path: Path) -> None:
    model = transformer()
    slot = peftcore.load(model, saved(tmp_path / "a", "lora", rank=2), name="slot")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    outputs(compiled)
    operator = next(iter(slot.operators.values()))
    operator.A, operator.B = nn.Parameter(torch.zeros(3, 8)), nn.Parameter(torch.zeros(8, 3))
    with torch.compiler.set_stance("fail_on_recompile"), pytest.raises(RuntimeError, match="recompile"):
        outputs(compiled)


# ------------------------------------------------------------------------------------------------------- what it takes


def test_it_takes_an_adapter_of_this_model_or_of_another(tmp_path: Path) -> None:
    model, other = transformer(), transformer()
    slot = peftcore.load(model, saved(tmp_path / "a", "dora"), name="slot")
    for host in (model, other):
        source = peftcore.load(host, saved(tmp_path / "b", "dora", 1), name="source", active=False)
        noisy(source, 3 + (host is model))
        source.save(tmp_path / "now")
        slot.swap(source)
        assert torch.equal(outputs(model), fresh(tmp_path / "now"))
    slot.swap(slot)


def test_it_takes_files_of_other_libraries(tmp_path: Path) -> None:
    model = transformer()
    slot = peftcore.load(model, saved(tmp_path / "a", "lora", rank=2), name="slot", room={"rank": 8})
    source = peftcore.load(transformer(), saved(tmp_path / "b", "lora", 1, rank=3, alpha=5.0))
    source.save(tmp_path / "theirs", format="peft")
    slot.swap(tmp_path / "theirs")
    torch.testing.assert_close(outputs(model), fresh(tmp_path / "b"), rtol=1e-6, atol=1e-6)


def test_it_takes_a_state_dict(tmp_path: Path) -> None:
    model, other = transformer(), transformer()
    slot = peftcore.load(model, saved(tmp_path / "a", "lora"), name="slot")
    state = peftcore.load(other, saved(tmp_path / "b", "lora", 1)).state_dict()
    slot.swap(state)
    assert torch.equal(outputs(model), fresh(tmp_path / "b"))
    name = next(iter(state))
    for wrong, what in (
        ({**state, name: state[name][:2]}, "has shape"),
        ({**state, name: state[name].double()}, "has dtype"),
        ({**state, "more": state[name]}, "unknown more"),
        ({key: each for key, each in state.items() if key != name}, "missing"),
    ):
        with pytest.raises(SwapError, match=what):
            slot.swap(wrong)
    assert torch.equal(outputs(model), fresh(tmp_path / "b"))


def test_values_that_a_method_finds_wrong_are_refused_in_a_state_dict(tmp_path: Path) -> None:
    slot = peftcore.load(transformer(), saved(tmp_path / "a", "shira", rank=1))
    state = {key: each.clone() for key, each in slot.state_dict().items()}
    name = next(key for key, each in state.items() if not each.is_floating_point())
    state[name] += 10**6
    with pytest.raises(SwapError, match="outside of the 64 entries"):
        slot.swap(state)


def test_a_hybrid_is_swapped_whole(tmp_path: Path) -> None:
    small = [{"method": "lora", "rank": 2}, "ia3"]
    first, second = saved(tmp_path / "a", small), saved(tmp_path / "b", small, 1)
    model = transformer()
    slot = peftcore.load(model, first, name="slot")
    slot.swap(second)
    assert torch.equal(outputs(model), fresh(second))


def test_options_that_change_nothing_are_those_of_the_other_one(tmp_path: Path) -> None:
    slot = peftcore.load(transformer(), saved(tmp_path / "a", "vera", d_initial=0.1), name="slot")
    slot.swap(saved(tmp_path / "b", "vera", 1, d_initial=0.5))
    assert slot.config.d_initial == 0.5
    roomy = peftcore.load(transformer(), saved(tmp_path / "c", "lora", rank=2), name="slot", room={"rank": 4})
    roomy.swap(saved(tmp_path / "d", "lora", 1, rank=3))
    assert roomy.config.rank == 4


def test_what_is_drawn_from_a_seed_and_lies_in_no_file_is_swapped_too(tmp_path: Path) -> None:
    first = saved(tmp_path / "a", "fourierft", n_frequency=10)
    second = saved(tmp_path / "b", "fourierft", 1, n_frequency=10, entry_seed=7)
    model = transformer()
    slot = peftcore.load(model, first, name="slot")
    slot.swap(second)
    assert torch.equal(outputs(model), fresh(second))
    slot.save(tmp_path / "c")
    assert torch.equal(fresh(tmp_path / "c"), fresh(second))


class MaskedConfig(peftcore.author.MethodConfig):
    method: Literal["masked"] = "masked"
    first: int = 0
    dropout: float = 0.0


class MaskedOperator(peftcore.author.Operator):
    """Adds to some outputs: which ones is drawn from an option, and lies in no file."""

    def __init__(self, site: peftcore.author.Site, config: MaskedConfig) -> None:
        super().__init__(site)
        self.input_dropout = config.dropout
        self.bias = nn.Parameter(torch.ones(site.out_features))
        self.register_buffer("mask", (torch.arange(site.out_features) >= config.first).float(), persistent=False)

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        return call(x) + self.bias * self.mask


class Masked(peftcore.author.Method):
    """Added to some outputs."""

    name = "masked"
    Config = MaskedConfig
    tags = peftcore.author.Tags(category="additive", paper="2106.09685", identity_at_init=False)
    target = ("attn.q",)

    def inject(self, model: nn.Module, config: MaskedConfig, surgeon: peftcore.author.Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.graft(site, MaskedOperator, config)

    @staticmethod
    def parameter_count(site: peftcore.author.Site, config: MaskedConfig) -> int:
        return site.out_features


def test_what_no_file_has_goes_with_the_options_or_is_refused() -> None:
    """Options that cannot be taken over would draw it otherwise where the adapter is saved and loaded."""
    model, other, third = transformer(), transformer(), transformer()
    slot = peftcore.apply(model, Masked, dropout=0.5)
    source = peftcore.apply(other, Masked, first=3, dropout=0.5)
    with pytest.raises(SwapError, match="computed with other options"):
        slot.swap(peftcore.apply(third, Masked, first=3))
    assert not torch.equal(outputs(model), outputs(other))
    slot.swap(source)
    assert torch.equal(outputs(model), outputs(other))
    assert slot.config.first == 3


def test_dropouts_stay_its_own(tmp_path: Path) -> None:
    slot = peftcore.load(transformer(), saved(tmp_path / "a", "lora", dropout=0.1), name="slot")
    slot.swap(saved(tmp_path / "b", "lora", 1, dropout=0.5))
    assert {each.input_dropout for each in slot.operators.values()} == {0.1}
    assert slot.config.dropout == 0.1
    assert torch.equal(outputs(slot.model), fresh(tmp_path / "b"))


# -------------------------------------------------------------------------------------------------- where it is in use


def test_in_a_route_its_rows_have_the_new_values(tmp_path: Path) -> None:
    model = transformer()
    slot = peftcore.load(model, saved(tmp_path / "a", "lora"), name="slot", active=False)
    peftcore.load(model, saved(tmp_path / "b", "ia3"), name="other", active=False)
    with torch.no_grad(), peftcore.route(model, ["slot", "other"]):
        before = model(IDS)
        slot.swap(saved(tmp_path / "c", "lora", 1))
        after = model(IDS)
    assert torch.equal(before[1], after[1])
    torch.testing.assert_close(after[0], fresh(tmp_path / "c")[0], rtol=1e-5, atol=1e-6)


def test_cached_effective_weights_are_made_anew(tmp_path: Path) -> None:
    model = transformer()
    slot = peftcore.load(model, saved(tmp_path / "a", "dora"), name="slot")
    with peftcore.cache_weights(model):
        outputs(model)
        slot.swap(saved(tmp_path / "b", "dora", 1))
        torch.testing.assert_close(outputs(model), fresh(tmp_path / "b"), rtol=1e-5, atol=1e-6)


def test_while_merged_it_is_refused(tmp_path: Path) -> None:
    model = transformer()
    slot = peftcore.load(model, saved(tmp_path / "a", "lora"), name="slot")
    other = saved(tmp_path / "b", "lora", 1)
    slot.merge()
    before = outputs(model)
    with pytest.raises(MergeError, match="unmerge"):
        slot.swap(other)
    assert torch.equal(outputs(model), before)
    slot.unmerge()
    slot.swap(other)
    slot.bake()
    torch.testing.assert_close(outputs(model), fresh(other), rtol=1e-5, atol=1e-5)
    with pytest.raises(UnknownInjection):
        slot.swap(other)


def test_in_a_call_or_a_forward_that_names_it_it_is_refused(tmp_path: Path) -> None:
    model = transformer()
    slot = peftcore.load(model, saved(tmp_path / "a", "lora"), name="slot")
    other = saved(tmp_path / "b", "lora", 1)
    before = outputs(model)
    with pytest.raises(SwapError, match="in use"):
        peftcore.using(model, "slot")(slot.swap, other)
    refused: list[SwapError] = []

    def within(*_: Any) -> None:
        worker = threading.Thread(target=attempt)
        worker.start()
        worker.join()

    def attempt() -> None:
        try:
            slot.swap(other)
        except SwapError as error:
            refused.append(error)

    hook = model.layers[0].register_forward_hook(within)
    assert torch.equal(outputs(model), before)
    hook.remove()
    assert len(refused) == 1
    peftcore.using(model, None)(slot.swap, other)
    assert torch.equal(outputs(model), fresh(other))


def test_a_forward_that_begins_meanwhile_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = transformer()
    slot = peftcore.load(model, saved(tmp_path / "a", "lora"), name="slot")
    other = saved(tmp_path / "b", "lora", 1)
    found: list[Tensor] = []
    worker = threading.Thread(target=lambda: found.append(outputs(model)))
    copy: Callable[..., Tensor] = Tensor.copy_

    def slowly(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not worker.ident:
            worker.start()
            worker.join(0.3)
            assert worker.is_alive()
        return copy(self, *args, **kwargs)

    state = {key: each.clone() for key, each in peftcore.load(transformer(), other).state_dict().items()}
    monkeypatch.setattr(Tensor, "copy_", slowly)
    slot.swap(state)
    monkeypatch.undo()
    worker.join()
    assert torch.equal(found[0], fresh(other))


def test_one_that_trains_goes_on_with_the_same_parameters(tmp_path: Path) -> None:
    model = transformer()
    slot = peftcore.load(model, saved(tmp_path / "a", "lora"), name="slot", trainable=True)
    optimizer = slot.optimizer(torch.optim.SGD, lr=0.1)
    slot.swap(saved(tmp_path / "b", "lora", 1))
    model(IDS).square().mean().backward()
    optimizer.step()
    assert not torch.allclose(outputs(model), fresh(tmp_path / "b"), atol=1e-4)


def test_a_backward_through_the_old_values_says_so(tmp_path: Path) -> None:
    model = transformer()
    slot = peftcore.load(model, saved(tmp_path / "a", "lora"), name="slot", trainable=True)
    loss = model(IDS).square().mean()
    slot.swap(saved(tmp_path / "b", "lora", 1))
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation|overwritten"):
        loss.backward()


# ------------------------------------------------------------------------------------------------------ what is refused


def test_what_does_not_fit_is_refused_before_anything_changes(tmp_path: Path) -> None:
    model = transformer()
    slot = peftcore.load(model, saved(tmp_path / "a", "lora", rank=4), name="slot")
    before = outputs(model)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "adapter.json").write_text("{")
    for wrong, error, what in (
        (saved(tmp_path / "b", "dora", rank=4), SwapError, "adapter of lora, but the other adapter is one of dora"),
        (saved(tmp_path / "c", "lora", rank=5), SwapError, "room for .4, 8.*room="),
        (saved(tmp_path / "d", "lora", target="mlp.down"), SwapError, "has other operators than"),
        (saved(tmp_path / "e", "lora", rank=4, dtype="bfloat16"), SwapError, "bfloat16, expected torch.float32"),
        (tmp_path / "text", CheckpointError, "text"),
    ):
        with pytest.raises(error, match=what):
            slot.swap(wrong)
    deep = peftcore.apply(transformer(depth=3), "lora", rank=4)
    deep.save(tmp_path / "deep")
    with pytest.raises(HostMismatch):
        slot.swap(tmp_path / "deep")
    assert torch.equal(outputs(model), before)
    assert slot.config.rank == 4


def test_options_that_no_tensor_holds_are_compared(tmp_path: Path) -> None:
    slot = peftcore.load(transformer(), saved(tmp_path / "a", "houlsby_adapter", activation="gelu"), name="slot")
    with pytest.raises(SwapError, match="contains other modules"):
        slot.swap(saved(tmp_path / "b", "houlsby_adapter", 1, activation="relu"))
    vera = peftcore.load(transformer(), saved(tmp_path / "c", "vera"), name="slot")
    with pytest.raises(SwapError, match="basis_1"):
        vera.swap(saved(tmp_path / "d", "vera", 1, projection_seed=1))


def test_room_that_is_too_small_or_no_option_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", "lora", rank=4)
    model = transformer()
    with pytest.raises(SwapError, match="room for"):
        peftcore.load(model, folder, room={"rank": 2})
    with pytest.raises(ConfigError, match="ranks"):
        peftcore.load(model, folder, room={"ranks": 8})
    assert not peftcore.injections(model)
    assert torch.equal(outputs(model), outputs(transformer()))
