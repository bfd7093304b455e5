"""The MAM adapter: numbers of the authors' RoBERTa, its equations written a second time in float64, and its two parts
applied one by one."""

from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from hybrid_equations import (
    ATTENTIONS,
    FEED_FORWARDS,
    LAYERS,
    TINY,
    Place,
    Tensors,
    assert_frozen,
    attention_by,
    compare,
    copies,
    fill,
    host,
    in_front,
    prefix,
    waves,
)
from torch import Tensor, nn

import peftcore
from peftcore.errors import ConfigError, NotMergeable, TargetError, UnsupportedSite
from peftcore.testing import against, conformance, frozen, same_defaults, same_start

NUMBERS = Path(__file__).parent / "numbers" / "mam_adapter.json"
CODE: Any = {
    "repository": "jxhe/unify-parameter-efficient-tuning",
    "commit": "3222ce2",
    "script": "src/transformers/models/roberta/modeling_roberta.py",
}
SMALL = {"prefix_length": 4, "prefix_mid_dim": 6, "ffn_bottleneck": 5}


# Hosts of tasks are narrower than the networks that make prefixes for large ones.
@conformance("mam_adapter", options={"task": {"prefix_length": 8, "prefix_mid_dim": 32}})
def test_conformance(check: Callable[[], None]) -> None:
    check()


def apply(model: nn.Module, **options: Any) -> peftcore.Injection:
    injection = peftcore.apply(model, "mam_adapter", dtype="float64", **{**SMALL, **options})
    fill(injection)
    return injection


def expected(
    name: str, base: Any, run: Any, tensors: dict[str, Tensors], ends: Callable[[str], str] = lambda last: last
) -> Tensor:
    """What the host gives with the equations around its modules; adapters add behind the module of `branch_ends`."""
    hooks = []
    for first, last in [(a.format(layer), b.format(layer)) for layer in LAYERS for a, b in FEED_FORWARDS[name]]:
        own, read = tensors[f"ffn/{last}"], {}

        def before(module: Any, args: Any, read: Any = read) -> None:
            (read["x"],) = args

        def after(module: Any, args: Any, y: Tensor, own: Any = own, read: Any = read) -> Tensor:
            z = read.pop("x") @ own["down.weight"].T + own["down.bias"]
            return y + own.get("scale", 4.0) * (torch.where(z > 0, z, 0.0) @ own["up.weight"].T + own["up.bias"])

        hooks += [
            base.get_submodule(first).register_forward_pre_hook(before),
            base.get_submodule(ends(last)).register_forward_hook(after),
        ]

    def edit(path: str, attend: Any, key: Tensor, value: Tensor) -> Tensor:
        own = tensors[f"prefix/{path}:attention"]
        stack = "_".join(step for step in path.split(".") if not step.isdigit())
        front_key, front_value = prefix(own, tensors.get(f"shared:prefix/{stack}_4x6"), key.shape[1], 4)
        return attend(in_front(front_key, key), in_front(front_value, value))

    with attention_by(base, edit):
        output = run(base)
    for hook in hooks:
        hook.remove()
    return output


def places(injection: peftcore.Injection, layers: int = 2, width: int = 8) -> Iterator[Place]:
    """Our tensors by the names in the authors' RoBERTa. The last matrix of their network has all layers below each
    other, of each its keys above its values."""
    whole, (shared, *_) = slice(None), [*injection.shared.values(), None]
    network = shared is not None
    if network:
        parts = {"wte.weight": "embedding.weight", "control_trans.0.weight": "hidden.weight"}
        parts["control_trans.0.bias"] = "hidden.bias"
        for theirs, ours in parts.items():
            yield shared.get_parameter(ours), [f"prefix.{theirs}"], whole
    for layer in range(layers):
        operator: Any = injection.operators[f"prefix/encoder.layer.{layer}.attention.self:attention"]
        if network:
            rows = slice(2 * width * layer, 2 * width * (layer + 1))
            yield operator.out.weight, ["prefix.control_trans.2.weight"], rows
            yield operator.out.bias, ["prefix.control_trans.2.bias"], rows
        else:
            names = [f"prefix.decoder_self_attn_{kind}.{layer}.weight" for kind in ("key", "value")]
            yield operator.prefix, names, whole
        for name, parameter in injection.operators[f"ffn/encoder.layer.{layer}.output.dense"].named_parameters():
            theirs = name.replace("down", "down_proj").replace("up", "up_proj")
            yield parameter, [f"encoder.layer.{layer}.ef_ffn_adapter.{theirs}"], whole


VARIANTS: dict[str, dict[str, Any]] = {
    "network": {},
    "direct": {"prefix_mid_dim": None},
    "learned": {"ffn_scale": "learned"},
}


@pytest.mark.parametrize("variant", VARIANTS)
@against("authors", "mam_adapter", **CODE)
def test_the_authors_numbers(variant: str) -> None:
    """Of a batch with padding, in training."""
    transformers = pytest.importorskip("transformers")
    config = transformers.RobertaConfig(**TINY, layer_norm_eps=1e-5, pad_token_id=1)
    model = waves(transformers.RobertaModel(config, add_pooling_layer=False))
    options = {"prefix_length": 3, "prefix_mid_dim": 6, "ffn_bottleneck": 5, **VARIANTS[variant]}
    injection = peftcore.apply(model, "mam_adapter", dtype="float64", **options)
    ids = torch.tensor([[2, 5, 3, 9, 4], [4, 10, 7, 1, 1]])
    numbers = frozen(NUMBERS)[variant]
    assert_frozen(model, {"input_ids": ids, "attention_mask": (ids != 1).long()}, places(injection), numbers)


@pytest.mark.parametrize("options", [{}, {"prefix_mid_dim": None}, {"ffn_scale": "learned"}], ids=str)
@pytest.mark.parametrize("name", ATTENTIONS)
def test_equation(name: str, options: dict[str, Any]) -> None:
    base, _, run = host(name)
    model = deepcopy(base)
    injection = apply(model, **options)
    plain = run(base)
    tensors = copies(injection)
    theirs = expected(name, base, run, {path: each for path, each in tensors.items() if each})
    assert (theirs - plain).abs().max() > 1e-3 * plain.abs().max()
    compare(injection, tensors, run(model), theirs)


def test_training_with_the_hosts_dropout() -> None:
    """In the authors' RoBERTa the adapter joins behind the dropout of the feed-forward; outputs and gradients, with the
    same draws."""
    base, _, run = host("bert")
    model = deepcopy(base)
    injection = apply(model, prefix_dropout=0.0, ffn_dropout=0.0)
    for each in (model, base):
        each.train()
        for path, module in each.named_modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.3 if path.endswith("output.dropout") else 0.0
    tensors = copies(injection)

    def drawn(each: Any) -> Tensor:
        torch.manual_seed(3)
        return run(each)

    behind = expected("bert", base, drawn, tensors, lambda last: last.replace(".dense", ".dropout"))
    inside = expected("bert", base, drawn, tensors)
    assert (behind - inside).norm() > 1e-2 * inside.norm()
    compare(injection, tensors, drawn(model), behind)


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "t5", "moe"])
def test_it_is_its_parts_one_after_the_other(name: str) -> None:
    model, _, _ = host(name)
    model = model.float()
    other = deepcopy(model)
    options = {"length": 4, "projection": 6, "behind": False}, {"bottleneck": 5, "scale": 4.0}
    parts = [peftcore.apply(other, m, **o) for m, o in zip(("prefix_tuning", "parallel_adapter"), options, strict=True)]
    injection = peftcore.apply(model, "mam_adapter", **SMALL)
    fill(injection)
    names = {
        **{f"prefix/{k}": v for k, v in parts[0].operators.items()},
        **{f"ffn/{k}": v for k, v in parts[1].operators.items()},
    }
    assert injection.operators.keys() == names.keys()
    for key, operator in injection.operators.items():
        names[key].load_state_dict(operator.state_dict())
    for key, shared in injection.shared.items():
        parts[0].shared[key.removeprefix("prefix/")].load_state_dict(shared.state_dict())
    _, inputs, _ = host(name)
    ours, theirs = model(**inputs).logits, other(**inputs).logits
    assert torch.equal(ours, theirs)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    for key, operator in injection.operators.items():
        for mine, its in zip(operator.parameters(), names[key].parameters(), strict=True):
            assert torch.equal(mine.grad, its.grad)


def roberta(**sizes: int) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.RobertaConfig(**{**TINY, **sizes})
    model: nn.Module = transformers.RobertaModel(config, add_pooling_layer=False)
    return model


@against("authors", "mam_adapter", **CODE, part="start")
def test_start() -> None:
    """The network of the prefix as torch starts its layers, and an adapter that adds nothing."""
    told, found = frozen(NUMBERS, "start"), {}
    for layers, width in ((30, 200), (1, 20000)):
        model = roberta(num_hidden_layers=layers, hidden_size=300)
        options: dict[str, Any] = {"prefix_length": 200, "prefix_mid_dim": width, "ffn_bottleneck": 150}
        groups: dict[str, list[Tensor]] = {}
        for own, (name,), _ in places(peftcore.apply(model, "mam_adapter", **options), layers, 300):
            groups.setdefault(name.rpartition(".ef_ffn_adapter.")[2], []).append(own.detach().flatten())
        found[layers] = {name: torch.cat(parts) for name, parts in groups.items()}
    assert told.keys() == found[1].keys()
    for name, each in told.items():
        same_start(found[1 if name == "prefix.control_trans.0.bias" else 30][name], each)


@against("authors", "mam_adapter", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    options: dict[str, Any] = {"prefix_length": 3, "prefix_mid_dim": 6, "ffn_bottleneck": 5}
    injection, sizes = peftcore.apply(roberta(), "mam_adapter", **options), Counter[str]()
    for own, (name,), _ in places(injection):
        sizes[name] += own.numel()
    assert sizes == frozen(NUMBERS, "trains")
    assert sum(value.numel() for value in injection.parameters()) == sizes.total()


@against("authors", "mam_adapter", **CODE, part="defaults")
def test_defaults_are_the_authors() -> None:
    """By the shapes too."""
    model, _, _ = host("bert")
    shapes = peftcore.plan(model, "mam_adapter").shapes
    assert shapes["shared:prefix/bert_encoder_layer_attention_self_30x800.embedding.weight"] == (30, 16)
    assert shapes["prefix/bert.encoder.layer.0.attention.self:attention.out.weight"] == (32, 800)
    assert shapes["ffn/bert.encoder.layer.0.output.dense.down.weight"] == (512, 16)
    injection = peftcore.apply(model, "mam_adapter")
    assert injection.operators["ffn/bert.encoder.layer.0.output.dense"].scale == 4.0
    same_defaults(injection.config, frozen(NUMBERS, "defaults"))


def test_parameters_are_those_of_the_formula() -> None:
    model, _, _ = host("t5")
    prefixes = 6 * 2 * 16 * (6 + 1) + 3 * (4 * 16 + (16 + 1) * 6)
    adapters = 4 * (2 * 16 * 5 + 5 + 16)
    assert peftcore.plan(model, "mam_adapter", **SMALL).trainable == prefixes + adapters
    assert sum(p.numel() for p in apply(model).parameters()) == prefixes + adapters


def test_overrides_reach_the_part_that_has_the_option() -> None:
    model, _, _ = host("llama")
    overrides = {"*.1.*": {"ffn_bottleneck": 2, "prefix_mid_dim": 3}, "*.0.mlp*": {"ffn_scale": 1.0}}
    operators = apply(model, overrides=overrides).operators
    assert operators["ffn/model.layers.1.mlp.down_proj"].down.out_features == 2
    assert operators["ffn/model.layers.0.mlp.down_proj"].down.out_features == 5
    assert [operators[f"ffn/model.layers.{layer}.mlp.down_proj"].scale for layer in LAYERS] == [1.0, 4.0]
    assert operators["prefix/model.layers.1.self_attn:attention"].out.in_features == 3
    assert operators["prefix/model.layers.0.self_attn:attention"].out.in_features == 6
    with pytest.raises(ConfigError, match="bottleneck"):
        peftcore.plan(model, "mam_adapter", overrides={"*": {"bottleneck": 2}})


def paths(**arguments: Any) -> set[str]:
    model, _, _ = host("llama")
    return {site.path for site in peftcore.plan(model, "mam_adapter", **arguments).sites if site.path}


def test_target_names_attentions_and_feed_forwards() -> None:
    attention, last = "model.layers.0.self_attn", "model.layers.1.mlp.down_proj"
    mine = {f"{attention}:attention", last}
    assert paths(target=[attention, last]) == mine
    assert paths(target=attention) == {f"{attention}:attention"}
    left = paths(exclude="model.layers.0.*")
    assert left
    assert all(path.startswith("model.layers.1.") for path in left)
    assert not any("self_attn" in path for path in paths(exclude="attn.core"))


def test_hosts_without_such_an_attention_are_refused() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_sizes": [8, 8], "depths": [1, 1], "num_stages": 2}
    convnext = transformers.ConvNextModel(transformers.ConvNextConfig(**sizes))
    with pytest.raises(TargetError):
        peftcore.apply(convnext, "mam_adapter")
    bloom = transformers.BloomModel(transformers.BloomConfig(hidden_size=8, n_layer=1, n_head=2, vocab_size=9))
    with pytest.raises(UnsupportedSite, match="attention interface"):
        peftcore.apply(bloom, "mam_adapter")
    assert not peftcore.injections(bloom)


def test_a_file_holds_both_parts(tmp_path: Path) -> None:
    model, _, run = host("t5")
    injection = apply(model, exclude="*.0.*", ffn_scale=2.0)
    injection.save(tmp_path)
    fresh, _, _ = host("t5")
    loaded = peftcore.load(fresh, tmp_path)
    assert loaded.config == injection.config
    assert torch.equal(run(fresh), run(model))


def test_cannot_be_merged() -> None:
    model, _, _ = host("llama")
    with pytest.raises(NotMergeable, match="mam_adapter"):
        apply(model).merge()
