"""A merge writes to no tensor that was there, and takes nothing back that somebody else has written since."""

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from core_toys import Perceptron, Shift, Swap, TiedLanguageModel, perceptron, stir, token_ids
from torch import Tensor, nn
from torch.nn.utils import prune

import peftcore
from peftcore.errors import MergeError
from peftcore.injection.merge_writes import Replaced, held, holders_of, owner_path
from peftcore.injection.originals import OriginalTensor, fingerprint
from peftcore.testing.tools import differences, trace
from peftcore.utils.journal import Journal

X = torch.linspace(-1, 1, 12).view(3, 4)
KEEPS: tuple[Any, ...] = ("cpu", "device", "record")


class Sharing(nn.Module):
    """A model over the parameters of another: the very same objects."""

    def __init__(self, other: Perceptron) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)
        for name in ("first", "second"):
            self.get_submodule(name).weight = other.get_submodule(name).weight
            self.get_submodule(name).bias = other.get_submodule(name).bias

    forward = Perceptron.forward


def over_storage(other: Perceptron) -> nn.Module:
    """A model whose parameters lie in the same memory."""
    model = Perceptron()
    model.load_state_dict(other.state_dict(), assign=True)
    return model


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "bitfit", Shift, Swap], ids=str)
@pytest.mark.parametrize("share", [Sharing, over_storage])
@pytest.mark.parametrize("keep", [*KEEPS, None])
def test_a_frozen_reference_over_the_same_base_stays(keep: Any, share: Any, method: Any) -> None:
    model = perceptron()
    parameters = dict(model.named_parameters())
    teacher = share(model)
    injection = peftcore.apply(model, method, **({} if method == "bitfit" else {"target": ["first", "second"]}))
    stir(injection)
    with torch.no_grad():
        base, adapted = teacher(X), model(X)
    injection.merge(keep)
    assert torch.equal(teacher(X), base) and not torch.equal(adapted, base)
    torch.testing.assert_close(model(X), adapted)
    if keep is None:
        injection.bake()
        assert torch.equal(teacher(X), base)
        assert all(each.requires_grad for each in (*model.parameters(), *parameters.values()))
        return
    injection.unmerge()
    assert all(parameters[name] is each for name, each in model.named_parameters() if "peft" not in name)
    assert torch.equal(teacher(X), base) and torch.equal(model(X), adapted)
    injection.remove()
    assert torch.equal(model(X), base) and all(each.requires_grad for each in teacher.parameters())


def test_an_adapter_is_not_what_the_host_holds_when_merged() -> None:
    """The value that replaces a tensor goes on to train by itself."""
    model = perceptron()
    injection = peftcore.apply(model, Swap, target="re:^first$", train=["second"])
    stir(injection)
    injection.merge()
    merged = {name: each.clone() for name, each in model.state_dict().items() if "peft" not in name}
    stir(injection)
    assert all(torch.equal(model.state_dict()[name], each) for name, each in merged.items())
    injection.unmerge()


def test_what_is_merged_without_effect_is_no_second_name_of_the_base() -> None:
    model = perceptron()
    base = model.first.weight.detach().clone()
    injection = peftcore.apply(model, "lora", target="first")  # nothing yet
    injection.merge()
    with torch.no_grad():
        model.first.weight.zero_()
    with pytest.raises(MergeError, match=r"first\.weight"):
        injection.unmerge()
    with torch.no_grad():
        model.first.weight.copy_(base)
    injection.unmerge()
    assert torch.equal(model.first.weight, base)


def test_ties_stay_ties() -> None:
    model, ids = TiedLanguageModel().eval(), token_ids()
    injection = peftcore.apply(model, Swap, target=["embed_tokens", "lm_head"])
    stir(injection)
    expected, tied = model(ids), model.lm_head.weight
    injection.merge()
    assert model.lm_head.weight is model.embed_tokens.weight is not tied
    torch.testing.assert_close(model(ids), expected)
    injection.unmerge()
    assert model.lm_head.weight is model.embed_tokens.weight is tied


def test_what_is_tied_to_a_merged_tensor_meanwhile_comes_back_with_it() -> None:
    model = perceptron()
    model.third = nn.Linear(4, 6)
    injection = peftcore.apply(model, Shift, target="first")
    old = model.first.weight
    injection.merge()
    model.third.weight = model.first.weight
    injection.unmerge()
    assert model.first.weight is model.third.weight is old


def test_modules_that_keep_lists_of_their_weights_follow() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.RNN(4, 6))
    injection = peftcore.apply(model, InRecurrent)
    stir(injection)
    x = torch.randn(5, 2, 4)
    with torch.no_grad():
        expected = model(x)[0]
        injection.merge()
        assert model[0]._flat_weights[0] is model[0].weight_ih_l0
        torch.testing.assert_close(model(x)[0], expected)
        injection.unmerge()
        assert torch.equal(model(x)[0], expected)


class InRecurrent(peftcore.author.Method):
    """A value for one weight of a recurrent layer."""

    name = "toy_in_recurrent"
    Config = type(
        "InRecurrentConfig", (peftcore.author.MethodConfig,), {"__annotations__": {"method": str}, "method": name}
    )
    tags = peftcore.author.Tags(category="selective", paper="none", mergeable=True)
    target = "re:^0$"

    def inject(self, model: nn.Module, config: Any, surgeon: Any) -> None:
        for site in surgeon.sites():
            surgeon.replace(site.at("weight_ih_l0"))

    @staticmethod
    def parameter_count(site: Any, config: Any) -> int:
        return 24


class Marked(nn.Parameter):
    """A class of parameters of the host's own."""


def test_the_class_and_the_attributes_of_a_parameter_are_kept() -> None:
    model = perceptron()
    model.first.weight = Marked(model.first.weight.detach())
    model.first.weight.decay = 0.5
    injection = peftcore.apply(model, Shift, target="first")
    injection.merge()
    assert type(model.first.weight) is Marked and model.first.weight.decay == 0.5
    assert not model.first.weight.requires_grad
    injection.bake()
    assert model.first.weight.requires_grad


def test_a_base_that_trains_is_refused() -> None:
    model = perceptron()
    injection = peftcore.apply(model, Shift, target="first")
    model.first.weight.requires_grad_(True)
    before = trace(model)
    for act in (injection.merge, injection.bake):
        with pytest.raises(MergeError, match=r"first\.weight of the base trains"):
            act()
        assert not differences(before, trace(model))
    model.first.weight.requires_grad_(False)
    injection.merge()


@pytest.mark.parametrize("keep", [*KEEPS, None])
def test_only_what_was_asked_for_is_kept(keep: Any) -> None:
    model = perceptron()
    injection = peftcore.apply(model, "lora", target="first")
    stir(injection)
    old = weakref.ref(model.first.weight)
    injection.merge(keep)
    gc.collect()
    assert (old() is not None) == (keep in ("cpu", "device"))


# Writers that write while merged


def loaded(model: Perceptron) -> None:
    with torch.no_grad():
        fresh = {name: each + 1 for name, each in Perceptron().state_dict().items()}
    model.load_state_dict(fresh, strict=False)


def assigned(model: Perceptron) -> None:
    model.load_state_dict(Perceptron().state_dict(), strict=False, assign=True)


def stepped(model: Perceptron) -> None:
    model.first.weight.requires_grad_(True)
    model(X).sum().backward()
    torch.optim.AdamW([model.first.weight], lr=0.1).step()
    model.first.weight.requires_grad_(False)


def module_replaced(model: Perceptron) -> None:
    model.first = copy.deepcopy(model.first)


def one_bit(model: Perceptron) -> None:
    model.first.weight.view(-1).view(torch.int32)[7] ^= 1


def rows_exchanged(model: Perceptron) -> None:
    model.first.weight.data = model.first.weight.data[[1, 0, 2, 3, 4, 5]].clone()


def behind_the_counter(model: Perceptron) -> None:
    model.first.weight.detach().numpy()[0, 0] = 7


WRITERS: dict[str, Callable[[Perceptron], Any]] = {
    "loaded": loaded,
    "assigned": assigned,
    "half": lambda model: model.half(),
    "double": lambda model: model.double(),
    "stepped": stepped,
    "data": lambda model: model.first.weight.data.mul_(2),
    "new data": lambda model: setattr(model.first.weight, "data", torch.ones(6, 4)),
    "numpy": behind_the_counter,
    "one bit": one_bit,
    "rows exchanged": rows_exchanged,
    "another parameter": lambda model: setattr(model.first, "weight", nn.Parameter(torch.ones(6, 4))),
    "another module": module_replaced,
    "a linear layer": lambda model: setattr(model, "first", nn.Linear(4, 6)),
    "gone": lambda model: delattr(model, "first"),
    "meta": lambda model: model.first.to_empty(device="meta"),
    "dense": lambda model: setattr(model.first, "weight", None),
}


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("write", WRITERS)
def test_what_was_written_meanwhile_is_not_taken_back(write: str, keep: Any) -> None:
    model = perceptron()
    injection = peftcore.apply(model, "lora", target=["first", "second"])
    stir(injection)
    injection.merge(keep)
    with torch.no_grad() if write != "stepped" else torch.enable_grad():
        WRITERS[write](model)
    before = trace(model)
    for act in (injection.unmerge, injection.remove, injection.disabled().__enter__):
        with pytest.raises(MergeError, match=r"first\.weight.*changed after.*bake\(\)"):
            act()
        assert injection.merged and not differences(before, trace(model), "values of " if write == "meta" else ())
    kept = {
        name: each.detach().clone()
        for name, each in model.named_parameters()
        if "peft" not in name and not each.is_meta
    }
    injection.bake()
    assert not peftcore.injections(model)
    assert all(torch.equal(model.get_parameter(name), each) for name, each in kept.items())


COMPUTED: dict[str, Callable[[nn.Module], object]] = {
    "a pruning mask": lambda module: prune.identity(module, "weight"),
    "the older weight norm": nn.utils.weight_norm,
    "the older spectral norm": nn.utils.spectral_norm,
    "weight norm": nn.utils.parametrizations.weight_norm,
}


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("how", COMPUTED)
def test_a_weight_that_is_computed_since_is_not_taken_back(how: str, keep: Any) -> None:
    """Even of the same values: what was put back would be computed again in the next forward."""
    model = perceptron()
    injection = peftcore.apply(model, "lora", target="first")
    stir(injection)
    injection.merge(keep)
    COMPUTED[how](model.first)
    model.eval()
    merged, there = model(X), trace(model)
    with pytest.raises(MergeError, match="changed after"):
        injection.unmerge()
    assert not differences(there, trace(model)) and torch.equal(model(X), merged)
    injection.bake()
    torch.testing.assert_close(model(X), merged)


@pytest.mark.parametrize("keep", KEEPS)
def test_what_changes_no_bit_hinders_nobody(keep: Any) -> None:
    model = perceptron()
    injection = peftcore.apply(model, "lora", target=["first", "second"])
    stir(injection)
    expected, base = model(X), perceptron()
    injection.merge(keep)
    model.load_state_dict({name: each.clone() for name, each in model.state_dict().items()}, assign=True)
    model.train(), model.eval(), model.requires_grad_(False)
    model.first.weight.data = model.first.weight.data.clone()
    model.second.weight.data = model.second.weight.data.mT.contiguous().mT
    injection.unmerge()
    assert torch.equal(model(X), expected)
    injection.remove()
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), base.parameters(), strict=True))


class Chain(nn.Module):
    """Layers in a list, which may be put in another order."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


@pytest.mark.parametrize("when", ["before", "meanwhile"])
@pytest.mark.parametrize("keep", KEEPS)
def test_modules_that_moved_are_merged_where_they_are(keep: Any, when: str) -> None:
    model = Chain()
    injection = peftcore.apply(model, "dora", target=["layers.0", "layers.2"])
    stir(injection, scale=0.5)
    injection.merge() if when == "meanwhile" else None
    model.layers = nn.ModuleList([model.layers[1], model.layers[2], model.layers[0]])
    injection.unmerge()
    expected = model(X)
    injection.merge(keep)
    torch.testing.assert_close(model(X), expected)
    injection.unmerge()
    assert torch.equal(model(X), expected)


def test_what_would_go_beside_the_model_is_refused() -> None:
    """A replaced module, one that lost its operator, one whose forward was set: the outputs would not stay."""

    def replaced(model: Chain) -> None:
        model.layers[0] = nn.Linear(4, 4)

    def patched(model: Chain) -> None:
        model.layers[0].forward = lambda x: x

    def ungrafted(model: Chain) -> None:
        model.layers[0].__class__ = nn.Linear

    for change, words in ((replaced, "replaced"), (patched, "forward set"), (ungrafted, "lost its operator")):
        model = Chain()
        injection = peftcore.apply(model, "lora", target=["layers.0", "layers.2"])
        stir(injection)
        change(model)
        before = trace(model)
        for act in (injection.merge, injection.bake):
            with pytest.raises(MergeError, match=rf"layers\.0.*{words}|{words}.*layers\.0"):
                act()
            assert not differences(before, trace(model))


def test_what_is_on_no_device_is_refused() -> None:
    model = perceptron()
    injection = peftcore.apply(model, "lora", target="first")
    model.first.to("meta")
    with pytest.raises(MergeError, match=r"first cannot be merged, keep 'lora' active: .*offloaded"):
        injection.merge()


def test_a_bias_that_was_added_goes_again() -> None:
    model = nn.Sequential(nn.Linear(4, 6, bias=False))
    injection = peftcore.apply(model, "bitfit", add_missing_bias=True)
    stir(injection)
    expected = model(X)
    for keep in (*KEEPS, None):
        injection.merge(keep)
        torch.testing.assert_close(model(X), expected)
        if keep is None:
            break
        merged = model[0].bias.detach().clone()
        model[0].bias.data.add_(1)
        with pytest.raises(MergeError, match=r"0\.bias"):
            injection.unmerge()
        model[0].bias.data.copy_(merged)
        injection.unmerge()
        assert model[0].bias is None and torch.equal(model(X), expected)


def test_the_one_below_waits_also_for_one_that_cannot_be_unmerged() -> None:
    model = perceptron()
    one, two = (peftcore.apply(model, Shift, name=name, target="first") for name in ("one", "two"))
    one.merge(), two.merge(None)
    merged = model.first.weight.detach().clone()
    with pytest.raises(MergeError, match="unmerge 'two' first"):
        one.unmerge()
    two.bake()
    with pytest.raises(MergeError, match=r"first\.weight: changed after"):
        one.unmerge()
    one.bake()
    assert torch.equal(model.first.weight, merged)


def test_a_failure_in_the_middle_leaves_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    model = perceptron()
    injection = peftcore.apply(model, "ia3", target=["first", "second"])
    stir(injection)
    before, made = trace(model), []
    plain = Replaced.put

    def break_off(self: Replaced, journal: Journal) -> None:
        plain(self, journal)
        made.append(self)
        if len(made) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Replaced, "put", break_off)
    for keep in (*KEEPS, None):
        made.clear()
        with pytest.raises(KeyboardInterrupt):
            injection.merge(keep)
        assert not differences(before, trace(model)) and not injection.merged


def test_holders_are_modules_of_the_base() -> None:
    model = TiedLanguageModel()
    model.register_buffer("same", model.inner.bias.detach())
    peftcore.apply(model, "lora", target="inner")
    found = holders_of(model)
    tied = found[id(model.lm_head.weight)]
    assert [(path, name) for path, _, name in tied] == [("embed_tokens", "weight"), ("lm_head", "weight")]
    assert found[id(model.same)] == [("", model, "same")]
    assert {path for each in found.values() for path, _, _ in each} == {"", "embed_tokens", "inner", "lm_head"}


def test_where_a_tensor_is() -> None:
    model = perceptron()
    model.plain = torch.ones(1)
    assert held(model.first, "bias") is model.first.bias and held(model, "plain") is model.plain
    assert held(model, "nothing") is None and held(nn.Linear(2, 2, bias=False), "bias") is None
    assert [owner_path(key) for key in (("a.b", "weight"), ("a", "b.weight"), ("", "weight"), ("", "a.weight"))] == [
        "a.b",
        "a.b",
        "",
        "a",
    ]


def test_one_tensor_is_replaced_and_comes_back() -> None:
    model = perceptron()
    old, new = model.first.weight, nn.Parameter(torch.ones(6, 4))
    holders = [("first", model.first, "weight")]
    replaced = Replaced(("first", "weight"), holders, new, OriginalTensor(old), fingerprint(new))
    assert model.first.weight is old
    replaced.put(Journal())
    assert model.first.weight is new and list(replaced.changed({model.first})) == []
    assert tuple(replaced.outgoing()) == (old,) and tuple(replaced.incoming()) == (new,)

    def never(key: Any, tensor: Tensor) -> Tensor:
        raise AssertionError

    journal = Journal()
    assert tuple(replaced.undo(journal, holders_of(model), never)) == (old,) and model.first.weight is old
    assert list(replaced.changed({model.first})) == ["first.weight"]
    journal.undo()
    assert list(replaced.changed(set())) == ["first.weight"]  # its module is not in the host
