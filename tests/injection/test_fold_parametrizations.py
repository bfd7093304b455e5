"""A weight that its module computes is merged as any other, and computed again after that."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from computed_hosts import CONVOLUTIONS, KEPT, WAYS
from core_toys import Perceptron, perceptron, stir
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from transformers import Wav2Vec2Config, Wav2Vec2Model

import peftcore
from peftcore.errors import MergeError
from peftcore.injection.fold_parametrizations import fold, inverted
from peftcore.testing.tools import differences, trace
from peftcore.utils.journal import Journal

X = torch.linspace(-1, 1, 12).view(3, 4)
FIRST = "re:^first$"


def computed(way: str) -> Perceptron:
    model = perceptron()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        WAYS[way](model.first)
    return model.eval()


def adapted(way: str, method: str, later: bool) -> tuple[Perceptron, peftcore.Injection]:
    """A host whose first weight is computed, before or after it was adapted."""
    model = perceptron() if later else computed(way)
    injection = peftcore.apply(model, method, target=FIRST)
    stir(injection, scale=0.3)
    if later:
        WAYS[way](model.first)
    return model.eval(), injection


@pytest.mark.parametrize("later", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
@pytest.mark.parametrize("way", WAYS)
def test_merged_and_back(way: str, method: str, later: bool) -> None:
    model, injection = adapted(way, method, later)
    with torch.no_grad():
        expected = model(X)
        with injection.disabled():
            base = model(X)
    assert (expected - base).abs().max() > 0.01
    before = trace(model)
    for keep in ("cpu", "record", "device"):
        injection.merge(keep)
        torch.testing.assert_close(model(X), expected, rtol=1e-5, atol=1e-6)
        injection.unmerge()
        assert not differences(before, trace(model))
        assert torch.equal(model(X), expected)
    injection.merge(None)
    with pytest.raises(MergeError, match="keep=None"):
        injection.unmerge()
    torch.testing.assert_close(model(X), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("later", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("way", WAYS)
def test_baked(way: str, later: bool) -> None:
    model, injection = adapted(way, "lora", later)
    with torch.no_grad():
        expected = model(X)
    names = set(model.state_dict())
    injection.bake()
    torch.testing.assert_close(model(X), expected, rtol=1e-5, atol=1e-6)
    left = computed(way) if way in KEPT else perceptron()
    assert set(model.state_dict()) == set(left.state_dict()) and (way in KEPT) == (
        set(left.state_dict()) == {name for name in names if "peft." not in name}
    )
    assert (type(model.first) is nn.Linear) == (way not in KEPT)
    left.load_state_dict(model.state_dict())
    torch.testing.assert_close(left(X), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.train()(X), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", CONVOLUTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_convolutions(way: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 6, 3, padding=1)).to(dtype)
    WAYS[way](model[0])
    injection = peftcore.apply(model, "lora", target="re:^0$")
    stir(injection, scale=0.3)
    x = torch.randn(2, 4, 5, dtype=dtype)
    with torch.no_grad():
        expected = model.eval()(x)
        injection.merge()
        close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float64 else {"rtol": 5e-2, "atol": 5e-2}
        torch.testing.assert_close(model(x), expected, **close)
        injection.unmerge()
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("way", ["spectral_norm", "old spectral_norm"])
def test_a_merge_in_training_takes_no_step_of_a_spectral_norm(way: str) -> None:
    model, injection = adapted(way, "dora", False)
    model.train()
    before = trace(model)
    injection.merge()
    injection.unmerge()
    assert not differences(before, trace(model))
    assert model.training and all(module.training for module in model.modules())


def test_a_hooks_weight_is_read_as_it_is_now() -> None:
    """Between forwards, what the hook left at the module is out of date."""
    model, injection = adapted("old weight_norm", "lora", False)
    with torch.no_grad():
        model(X)
        model.first.weight_g.mul_(3)
        injection.merge()
        merged = model(X)
        injection.unmerge()
        torch.testing.assert_close(model(X), merged, rtol=1e-5, atol=1e-6)


def test_other_parametrized_tensors_of_the_module_are_folded_along() -> None:
    model = perceptron()
    WAYS["without an inverse"](model.first)
    parametrize.register_parametrization(model.first, "bias", copy.deepcopy(model.first.parametrizations.weight[0]))
    injection = peftcore.apply(model, "ia3", target=FIRST)  # it acts on both
    stir(injection)
    with torch.no_grad():
        expected = model(X)
        before = trace(model)
        injection.merge()
        assert set(dict(model.first.named_parameters())) == {"weight", "bias"}
        torch.testing.assert_close(model(X), expected)
        injection.unmerge()
        assert not differences(before, trace(model)) and torch.equal(model(X), expected)
        injection.merge()
        model.first.bias.add_(1)
        with pytest.raises(MergeError, match=r"first\.bias"):
            injection.unmerge()


def test_several_merge_onto_a_computed_weight_and_back() -> None:
    for way in WAYS:
        model, one = adapted(way, "lora", False)
        two = peftcore.apply(model, "dora", target=FIRST)
        stir(two)
        with torch.no_grad():
            expected = model(X)
        before = trace(model)
        one.merge(), two.merge()
        torch.testing.assert_close(model(X), expected, rtol=1e-5, atol=1e-6)
        with pytest.raises(MergeError, match="unmerge 'dora' first"):
            one.unmerge()
        two.unmerge(), one.unmerge()
        assert not differences(before, trace(model)), way


def test_removing_gives_the_class_back() -> None:
    for way in WAYS:
        model = computed(way)
        before = trace(model)
        injection = peftcore.apply(model, "lora", target=FIRST)
        stir(injection)
        injection.merge()
        injection.remove()
        assert not differences(before, trace(model)), way


@pytest.mark.parametrize("way", WAYS)
def test_copies_of_a_merged_host_come_back_too(way: str) -> None:
    model, injection = adapted(way, "lora", False)
    with torch.no_grad():
        expected = model(X)
        injection.merge()
        other = copy.deepcopy(model)
        theirs = peftcore.injections(other)["lora"]
        theirs.unmerge()
        assert torch.equal(other(X), expected)
        torch.testing.assert_close(model(X), expected, rtol=1e-5, atol=1e-6)
        injection.unmerge()
        assert torch.equal(model(X), expected)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_position_convolution_of_wav2vec2_is_baked_saved_and_loaded(method: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    stem = {"conv_dim": (8, 8), "conv_kernel": (4, 4), "conv_stride": (2, 2), "num_feat_extract_layers": 2}
    positions = {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "feat_extract_norm": "layer"}
    torch.manual_seed(0)
    model = Wav2Vec2Model(Wav2Vec2Config(**sizes, **stem, **positions)).eval()
    sound = torch.randn(1, 64)
    injection = peftcore.apply(model, method, target=r"re:.*pos_conv_embed\.conv$")
    with torch.no_grad():
        base = model(sound).last_hidden_state
        stir(injection, scale=0.5)
        expected = model(sound).last_hidden_state
        injection.bake()
        assert (expected - base).abs().max() > 0.01
        torch.testing.assert_close(model(sound).last_hidden_state, expected, rtol=1e-4, atol=1e-5)
        model.save_pretrained(tmp_path)
        found, info = Wav2Vec2Model.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values())
        torch.testing.assert_close(found.eval()(sound).last_hidden_state, expected, rtol=1e-4, atol=1e-5)


class Squared(nn.Module):
    """Its weight is a property of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.root = nn.Parameter(torch.rand(4, 4))

    @property
    def weight(self) -> Tensor:
        return self.root**2

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


def hooked(module: nn.Module) -> nn.Module:
    module.root = module.weight
    del module.weight
    module.weight = module.root**2
    module.register_forward_pre_hook(lambda module, args: setattr(module, "weight", module.root**2))
    return module


@pytest.mark.parametrize("make", [Squared, lambda: hooked(nn.Linear(4, 4))], ids=["a property", "a hook"])
def test_what_computes_a_weight_in_a_way_of_its_own_is_refused(make: Any) -> None:
    model = nn.Sequential(make())
    injection = peftcore.apply(model, Shifted, target=lambda path, module: path == "0")
    before = trace(model)
    for act in (injection.merge, injection.bake):
        with pytest.raises(MergeError, match=r"0\.weight is computed by .* in a custom way"):
            act()
        assert not differences(before, trace(model)) and not injection.merged


class Shifted(peftcore.author.Method):
    """A shift of the tensor `weight`, whatever holds it."""

    name = "toy_shifted"
    Config = type(
        "ShiftedConfig", (peftcore.author.MethodConfig,), {"__annotations__": {"method": str}, "method": name}
    )
    tags = peftcore.author.Tags(category="reparameterized", paper="none", mergeable=True)
    target = "*"

    def inject(self, model: nn.Module, config: Any, surgeon: Any) -> None:
        for site in surgeon.sites():
            surgeon.replace(site.at("weight"))

    @staticmethod
    def parameter_count(site: Any, config: Any) -> int:
        return 16


def test_put_on_while_merged_it_is_not_undone() -> None:
    for way in ("weight_norm", "pruned", "without an inverse"):
        model = perceptron()
        injection = peftcore.apply(model, "lora", target=FIRST)
        stir(injection)
        injection.merge()
        WAYS[way](model.first)
        with torch.no_grad():
            expected = model(X)
        with pytest.raises(MergeError, match=r"first\.weight: changed after"):
            injection.unmerge()
        injection.bake()
        assert torch.equal(model(X), expected)


def test_what_others_do_to_the_module_meanwhile_stays() -> None:
    model, injection = adapted("pruned", "lora", False)
    theirs = model.first.register_forward_pre_hook(lambda *_: None)
    injection.merge()
    calls: list[int] = []
    theirs.remove()
    model.first.register_forward_pre_hook(lambda *_: calls.append(1))
    model.first.register_buffer("more", torch.ones(2))
    injection.unmerge()
    model(X)
    assert len(model.first._forward_pre_hooks) == 2 and len(calls) == 1  # the pruning's, and the new one
    assert set(model.first._buffers) == {"weight_mask", "more"}


def test_fold_and_unfold() -> None:
    for way in WAYS:
        module = computed(way).first
        before = trace(module)
        value = nn.Parameter(torch.ones(6, 4), requires_grad=False)
        journal = Journal()
        tensors = fold(journal, module, "weight", value)
        assert type(module) is nn.Linear and module.weight is value and tensors["weight"] is value
        assert list(module.state_dict()) == ["weight", "bias"] and not module._forward_pre_hooks, way
        assert not module._state_dict_hooks
        module.load_state_dict({name: each.clone() for name, each in module.state_dict().items()})
        journal.undo()
        assert not differences(before, trace(module)), way


def test_an_inverse_is_taken_where_it_gives_the_value_and_asks_nothing_of_the_module() -> None:
    value = torch.randn(6, 4, generator=torch.Generator().manual_seed(5))
    for way in WAYS:
        module = computed(way).first.train()
        if not parametrize.is_parametrized(module):
            continue
        before = trace(module)
        found = inverted(module.parametrizations.weight, value)
        assert not differences(before, trace(module)), way
        assert (found is not None) == (way in KEPT), way
    dead = torch.zeros(6, 4)  # a weight norm has no direction for it
    assert inverted(parametrizations.weight_norm(nn.Linear(4, 6)).parametrizations.weight, dead) is None


def test_a_pruned_source_of_a_parametrization_is_folded() -> None:
    model = computed("with an inverse")
    prune.l1_unstructured(model.first.parametrizations.weight, "original", 0.5)
    injection = peftcore.apply(model, "lora", target=FIRST)
    stir(injection)
    with torch.no_grad():
        expected = model(X)
        before = trace(model)
        injection.merge()
        torch.testing.assert_close(model(X), expected)
        injection.unmerge()
    assert not differences(before, trace(model))
