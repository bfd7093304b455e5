"""Side-tuning: numbers of the authors' merges; the equation beside a side network that stands alone, in decoders and
encoders, with padding and types of tokens; generation with what the side network keeps; what it leaves alone."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from sines import wave, waves
from torch import Tensor, nn

import peftcore
from peftcore.errors import ConfigError, MissingContext, SequenceError, TargetError, TrainingError, UnsupportedSite
from peftcore.testing import HOSTS, against, conformance, frozen, same_defaults, same_start
from peftcore.testing.kit import fill

NUMBERS = Path(__file__).parent / "numbers" / "side_tuning.json"
CODE: Any = {"repository": "jozhang97/side-tuning", "commit": "dea3456"}
CODE["script"] = "tlkit/models/sidetune_architecture.py"
ALL_ROWS = "the guest sees all rows of the batch, so that what it keeps of them lies beside the model's cache"


@conformance(
    "side_tuning",
    expected_failures={
        **{f"each_pays_for_its_own_rows-{host}": ALL_ROWS for host in ("llama", "bert", "gpt2", "moe", "mistral")},
        "each_block_may_run_again-bert": "both are blended behind the last block, which has no gradient for what was "
        "made outside of it when it runs in a reentrant checkpoint; it is refused",
    },
)
def test_conformance(check: Callable[[], None]) -> None:
    check()


def gpt2() -> Any:
    sizes: dict[str, Any] = {"vocab_size": 11, "n_embd": 8, "n_head": 2, "n_positions": 8, "n_inner": 12, "n_layer": 3}
    sizes |= {"bos_token_id": None, "eos_token_id": None}
    return transformers.GPT2Model(transformers.GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


@against("authors", "side_tuning", **CODE)
@pytest.mark.parametrize("merge", ["alpha", "sum", "product"])
def test_numbers_of_the_authors(merge: Any) -> None:
    """A GPT-2 of three layers, and one of one beside it with a table of its own, in training."""
    numbers, model = frozen(NUMBERS)[merge], gpt2().double().train()
    waves(dict(model.named_parameters()), 0.4)
    injection = peftcore.apply(model, "side_tuning", merge=merge, own_table=True, alpha=0.7, dtype="float64")
    trained = dict(injection.shared["guest"].network.named_parameters())
    waves(trained, 0.9)
    assert ("blend" in injection.shared) == (merge == "alpha")
    if merge == "alpha":
        trained["alpha"] = injection.shared["blend"].alpha
        trained["alpha"].data.fill_(0.7)  # in float64
    y = model(torch.tensor([[2, 5, 3, 9, 4], [8, 10, 7, 6, 2]])).last_hidden_state
    (y.square() * wave(y.shape, 0.3)).sum().backward()
    expect(y, numbers["output"])
    assert len(numbers["gradients"]) == (len(trained) if merge == "alpha" else 2)
    for name, value in numbers["gradients"].items():
        expect(trained[name].grad, value)


def expect(value: Tensor | None, numbers: list[float]) -> None:
    assert value is not None and any(numbers)
    torch.testing.assert_close(value.flatten(), torch.tensor(numbers, dtype=torch.float64), rtol=1e-8, atol=2e-9)


@against("authors", "side_tuning", **CODE, part="start")
def test_start_of_the_share_is_the_authors() -> None:
    """The side network is of the model's own class, which draws its start; their networks are of pictures."""
    same_start(peftcore.apply(gpt2(), "side_tuning").shared["blend"].alpha, frozen(NUMBERS, "start")["alpha"])


@against("authors", "side_tuning", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    """With a table of its own, as their side networks have all layers of their own."""
    model = gpt2()
    injection = peftcore.apply(model, "side_tuning", own_table=True)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for p in injection.parameters()}
    side, blend = injection.shared["guest"].network, injection.shared["blend"]
    found = {
        "base": [],
        "side": sorted(name for name, p in side.named_parameters() if id(p) in trained),
        "blend": [f"{name}s" for name, p in blend.named_parameters() if id(p) in trained],
    }
    assert found == frozen(NUMBERS, "trains") and len(trained) == len(found["side"]) + 1


@against("authors", "side_tuning", **CODE, part="defaults")
def test_defaults_are_the_authors() -> None:
    same_defaults(peftcore.apply(gpt2(), "side_tuning").config, frozen(NUMBERS, "defaults"))


FAMILIES = {
    "llama": ("model", "norm", "embed_tokens"),
    "gpt2": ("transformer", "ln_f", "wte"),
    "bert": ("bert", "encoder.layer.1", "embeddings.word_embeddings"),
    "roberta": ("roberta", "encoder.layer.1", "embeddings.word_embeddings"),
}
"""Of each host: its stack, where its last states are, and its token table."""


def built(name: str) -> tuple[Any, dict[str, Tensor]]:
    """In float64, with a batch of which one row has padding: on the left where positions allow for it."""
    torch.manual_seed(0)
    ids = torch.tensor([[3, 7, 5, 9, 4], [0, 0, 8, 6, 2]])
    if name == "roberta":
        sizes = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        sizes |= {"intermediate_size": 24, "max_position_embeddings": 20, "pad_token_id": 0, "type_vocab_size": 2}
        model: Any = transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**sizes))
    else:
        model = HOSTS[name].build()[0]
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    if name in ("bert", "roberta"):
        inputs["token_type_ids"] = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 1, 0]])
    for module in model.modules():  # that both draw the same proves nothing
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for key in ("hidden_dropout_prob", "attention_probs_dropout_prob", "embd_pdrop", "resid_pdrop", "attn_pdrop"):
        if key in model.config.to_dict():
            setattr(model.config, key, 0.0)
    return model.double().eval().requires_grad_(False), inputs


def adapted(model: nn.Module, **options: Any) -> peftcore.Injection:
    """All of its tensors moved by N(0, 0.1)."""
    injection = peftcore.apply(model, "side_tuning", dtype="float64", **options)
    fill(injection)
    return injection


NARROW = {"hidden_size": 8, "intermediate_size": 12}
OPTIONS: dict[str, dict[str, Any]] = {
    "shared": {"layers": 2, "alpha": -0.5},
    "narrow": {"sizes": NARROW, "merge": "sum"},
    "own": {"own_table": True, "merge": "product"},
}


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("name", FAMILIES)
def test_equation(name: str, kind: str) -> None:
    """With a side network of transformers that is run by itself on the same ids, blended by a hook in another copy of
    the host, in training: outputs, and the gradients of all tensors."""
    base, inputs = built(name)
    model = deepcopy(base)
    injection = adapted(model, **OPTIONS[kind])
    guest: Any = injection.shared["guest"]
    stack, end, table = FAMILIES[name]
    config = deepcopy(base.config)
    config.num_hidden_layers = OPTIONS[kind].get("layers", 1)
    for key, value in OPTIONS[kind].get("sizes", {}).items():
        setattr(config, "n_inner" if (name, key) == ("gpt2", "intermediate_size") else key, value)
    alone = type(base.get_submodule(stack))(config).double()
    values = {key: value.clone() for key, value in guest.network.state_dict().items()}
    assert (f"{table}.weight" in values) == (kind != "shared")
    values.setdefault(f"{table}.weight", base.get_submodule(f"{stack}.{table}").weight.clone())
    assert {key.split(".")[0] for key in alone.load_state_dict(values, strict=False).missing_keys} <= {"pooler"}
    others = dict(alone.named_parameters())
    up = guest.projection.weight.detach().clone().requires_grad_() if kind == "narrow" else None
    a = injection.shared["blend"].alpha.detach().clone().requires_grad_() if kind == "shared" else None

    def blended(module: nn.Module, args: Any, output: Any) -> Any:
        h = output[0] if isinstance(output, tuple) else output
        s = alone(**inputs).last_hidden_state
        s = s if up is None else s @ up.T
        y = {"narrow": h + s, "own": h * s}.get(kind)
        if a is not None:
            y = h / (1 + torch.exp(-a)) + s / (1 + torch.exp(a))
        return (y, *output[1:]) if isinstance(output, tuple) else y

    unchanged = base(**inputs).logits
    base.get_submodule(f"{stack}.{end}").register_forward_hook(blended)
    ours, expected = model.train()(**inputs).logits, base.train()(**inputs).logits
    real = inputs["attention_mask"].bool() if ours.dim() == 3 else ...
    assert (expected - unchanged)[real].abs().max() > 1e-3 * unchanged.abs().max()
    torch.testing.assert_close(ours[real], expected[real], rtol=1e-9, atol=1e-9)
    direction = torch.randn_like(ours)
    for output in (ours, expected):
        (output * direction)[real].sum().backward()
    pairs = {key: (p, others[key]) for key, p in guest.network.named_parameters()}
    pairs |= {} if up is None else {"projection": (guest.projection.weight, up)}
    pairs |= {} if a is None else {"alpha": (injection.shared["blend"].alpha, a)}
    assert len(pairs) == sum(1 for _ in injection.parameters())
    for key, (mine, other) in pairs.items():
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-7, atol=1e-9, msg=key)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_keeps_what_the_side_network_saw(name: str, beams: int) -> None:
    """With padding on the left, beams and a static cache: the tokens that are generated without any cache."""
    model, inputs = built(name)
    injection = adapted(model, alpha=-3.0)
    model.generation_config.eos_token_id = None
    options: dict[str, Any] = {**inputs, "max_new_tokens": 5, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    expected = model.generate(**options, use_cache=False)
    assert torch.equal(model.generate(**options, use_cache=True), expected)
    assert torch.equal(model.generate(**options, use_cache=True, cache_implementation="static"), expected)
    with injection.disabled():
        assert not torch.equal(model.generate(**options), expected)


def test_backward_does_not_touch_the_model() -> None:
    model, inputs = built("llama")
    adapted(model)
    tracked: list[bool] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda module, args, output: tracked.append(output.requires_grad))
    model(**inputs).logits.sum().backward()
    assert tracked == [False, False]


def test_a_network_that_was_trained_before_is_where_it_starts() -> None:
    """A share of nothing for the model leaves what that network makes."""
    model, inputs = built("llama")
    other = deepcopy(model)
    for parameter in other.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    other.model.embed_tokens.weight.data = model.model.embed_tokens.weight.data.clone()
    other.lm_head.weight.data = model.lm_head.weight.data.clone()
    injection = peftcore.apply(model, "side_tuning", layers=2, alpha=-1000.0, dtype="float64")
    injection.shared["guest"].take(other.model)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(model(**inputs).logits[real], other(**inputs).logits[real])


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    """Blocks that run again give the same gradients; where both are blended in one that is reentrant, it is refused."""
    model, inputs = built(name)
    injection = adapted(model)
    model.train()
    found = []
    for again in (False, True):
        if again:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        if again and reentrant and name == "bert":
            with pytest.raises(TrainingError, match="use_reentrant': False"):
                model(**inputs)
            return
        model(**inputs).logits.square().sum().backward()
        found.append([p.grad.clone() for p in injection.parameters()])
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first, second)


def test_each_blends_what_those_before_left_and_another_place() -> None:
    model, inputs = built("llama")
    base = deepcopy(model)
    for name, target in (("one", None), ("two", None), ("inside", "model.layers.0")):
        injection = adapted(model, name=name, **({} if target is None else {"target": target}))
        assert [site.module_path for site in injection.sites][-1] == (target or "model.norm")
        injection.shared["blend"].alpha.data.fill_(1000.0)  # all of it is the model's
    torch.testing.assert_close(model(**inputs).logits, base(**inputs).logits)
    states = []
    for name in ("one", "two"):
        guest: Any = peftcore.injections(model)[name].shared["guest"]
        embeds = base.model.embed_tokens(inputs["input_ids"])
        states.append(guest({"attention_mask": inputs["attention_mask"]}, embeds, None)[0])
        peftcore.injections(model)[name].shared["blend"].alpha.data.zero_()
    h = base.model(**inputs).last_hidden_state
    expected = base.lm_head(((h + states[0]) / 2 + states[1]) / 2)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(model(**inputs).logits[real], expected[real])


@pytest.mark.parametrize(
    ("name", "options", "error", "reason"),
    [
        ("llama", {"overrides": {"*": {"alpha": 1.0}}}, ConfigError, "no overrides"),
        ("llama", {"layers": 3}, ConfigError, "a guest cannot be larger"),
        ("llama", {"sizes": {"colour": 3}}, ConfigError, "colour is not a size"),
        ("llama", {"alpha": float("inf")}, ConfigError, "alpha"),
        ("t5", {}, UnsupportedSite, "one stack of tokens"),
        ("encoder", {}, UnsupportedSite, "one stack of tokens"),
        ("vit", {}, UnsupportedSite, "one stack of tokens"),
        ("mlp", {}, TargetError, "matches nothing"),
    ],
)
def test_what_is_refused(name: str, options: dict[str, Any], error: type[Exception], reason: str) -> None:
    model = HOSTS[name].build()[0]
    with pytest.raises(error, match=reason):
        peftcore.apply(model, "side_tuning", **options)


def test_parts_of_the_model_alone_and_other_numbers_of_tokens_are_refused() -> None:
    model, inputs = built("llama")
    adapted(model)
    with pytest.raises(MissingContext, match="by itself"):
        model.model.norm(torch.randn(1, 3, 16).double())
    model.model.layers[-1].register_forward_hook(lambda module, args, output: output[:, 1:])
    with pytest.raises(SequenceError, match="but the side network's have"):
        model(**inputs)
