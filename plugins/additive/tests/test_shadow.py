"""ShadowPEFT beside peft's: what it computes, its loss, its gradients, its files; and what generation keeps.

peft hands the guest no cache in versions of transformers that call it `cache`, so generation is compared with the whole
sequence at once."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import peftcore
from peftcore.errors import (
    CheckpointError,
    ConfigError,
    ExportError,
    MissingContext,
    SequenceError,
    TargetError,
    TrainingError,
    UnsupportedSite,
)
from peftcore.testing import against, conformance
from peftcore.testing.hosts import HOSTS
from peftcore_additive.shadow import ShadowOperator

pytestmark = pytest.mark.filterwarnings("ignore:::peft", "ignore:Found missing adapter keys")
LM, CLASSES = "CAUSAL_LM", "SEQ_CLS"


HOSTS_OF_IT = ("llama", "gpt2", "moe", "mistral")
ALL_ROWS = "the guest sees all rows of the batch, so that what it keeps of them lies beside the model's cache"


@conformance(
    "shadow",
    expected_failures={
        **{f"each_pays_for_its_own_rows-{host}": ALL_ROWS for host in HOSTS_OF_IT},
    },
)
def test_conformance(check: Callable[[], None]) -> None:
    check()


def host(name: str = "llama", *, classes: int = 0) -> tuple[Any, dict[str, Tensor]]:
    """A host of four blocks in float64, and a batch padded on the right with labels."""
    torch.manual_seed(0)
    model, inputs = HOSTS[name].build()
    config = deepcopy(model.config)
    config.num_hidden_layers = 4
    if isinstance(getattr(config, "layer_types", None), list):
        config.layer_types = 2 * config.layer_types
    model = type(model)(config)
    if classes:
        config.num_labels, config.pad_token_id = classes, 0
        model = transformers.AutoModelForSequenceClassification.from_config(config)
        labels = torch.tensor([1, 2])
    else:
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    inputs = {**inputs, "labels": labels}
    return model.double().eval().requires_grad_(False), inputs


def adapted(model: nn.Module, **options: Any) -> peftcore.Injection:
    """All of its tensors moved by N(0, 0.1)."""
    injection = peftcore.apply(model, "shadow", dtype="float64", **options)
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return injection


def theirs(base: nn.Module, task: str = LM, **options: Any) -> Any:
    return peft.get_peft_model(deepcopy(base), peft.ShadowConfig(task_type=task, **options)).double()


OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "sizes": (
        {"rank": 3, "scale": 0.7, "update_width": 5, "layers": 2, "guest_weight": 0.3,
         "sizes": {"intermediate_size": 12}},
        {"r": 3, "shadow_alpha": 0.7, "update_hidden_size": 5, "shadow_num_hidden_layers": 2,
         "auxiliary_loss_weight": 0.3, "shadow_intermediate_size": 12},
    ),
    "narrow": (
        {"sizes": {"hidden_size": 8, "num_attention_heads": 2}},
        {"shadow_hidden_size": 8, "shadow_num_attention_heads": 2},
    ),
    "table": ({"own_table": True}, {"share_embeddings": False}),
}  # fmt: skip


def pairs(injection: peftcore.Injection, model: Any) -> list[tuple[Tensor, Tensor]]:
    """Our tensors and those of peft, which has more that nothing reads: in the last block, and a table."""
    tuner, found = model.base_model, []
    for path, operator in injection.operators.items():
        if isinstance(operator, ShadowOperator):
            layer = tuner.model.get_submodule(path)
            for name, ours in operator.named_parameters():
                start, _, rest = name.partition(".")
                stem = f"shadow_{start}" if start in ("down", "up") else f"shadow_update_{start}"
                found.append((ours, layer.get_parameter(f"{stem}.default.{rest}")))
    for name, ours in injection.shared["guest"].named_parameters():
        start, _, rest = name.partition(".")
        where = "shadow_backbone" if start == "network" else "shadow_projection"
        found.append((ours, tuner.get_parameter(f"{where}.default.{rest}")))
    if "head" in injection.shared:
        found.append((injection.shared["head"].weight, tuner.shadow_head["default"].weight))
    return found


def compare(
    ours: Any, injection: peftcore.Injection, model: Any, inputs: dict[str, Tensor], base: nn.Module, table: int = 0
) -> None:
    """In training: outputs, loss and the gradients of all tensors."""
    both = pairs(injection, model)
    inner = injection.config.update_width or injection.config.rank
    unread = table + 2 * (2 * 16 * inner + inner + 16)
    with torch.no_grad():
        for mine, other in both:
            other.copy_(mine)
    trained = [p for name, p in model.named_parameters() if p.requires_grad and "modules_to_save" not in name]
    assert sum(p.numel() for p in injection.parameters()) + unread == sum(p.numel() for p in trained)
    outputs = []
    for each in (ours, model):
        torch.manual_seed(0)
        outputs.append(each.train()(**deepcopy(inputs)))
    bare = base(**inputs)
    assert (outputs[0].logits - bare.logits).abs().max() > 1e-3
    assert abs(outputs[0].loss - bare.loss) > 1e-3
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(outputs[0].loss.double(), outputs[1].loss.double(), rtol=1e-6, atol=1e-7)
    for each in outputs:
        each.loss.backward()
    for mine, other in both:
        assert mine.grad.abs().max() > 1e-6
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-5, atol=1e-8)
    assert sum(p.grad is not None for p in trained) == len(both)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@against("peft 0.21", "shadow")
def test_it_is_that_of_peft(name: str, options: str) -> None:
    """Without the dropout of the correction, which the two draw at other moments; with that of the host."""
    base, inputs = host(name)
    mine, other = OPTIONS[options]
    ours, model = deepcopy(base), theirs(base, **other, shadow_dropout=0.0)
    injection = adapted(ours, **mine, dropout=0.0)
    shares = name == "gpt2" and options in ("plain", "sizes")
    compare(ours, injection, model, inputs, base, table=base.get_input_embeddings().weight.numel() if shares else 0)


@against("peft 0.21", "shadow")
def test_models_that_classify_are_those_of_peft() -> None:
    """The head of the guest is a copy of the model's, and reads the last token."""
    base, inputs = host(classes=3)
    ours, model = deepcopy(base), theirs(base, CLASSES, shadow_dropout=0.0, auxiliary_loss_weight=0.4)
    injection = peftcore.apply(ours, "shadow", dtype="float64", dropout=0.0, guest_weight=0.4)
    torch.testing.assert_close(injection.shared["head"].weight, base.score.weight)
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    compare(ours, injection, model, inputs, base)


@pytest.mark.share(3)
@pytest.mark.parametrize("options", ["plain", "sizes", "narrow", "table", "classes"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@against("peft 0.21", "shadow")
def test_files_of_peft(name: str, options: str, tmp_path: Path) -> None:
    """Its file is read and written again, with equal logits and an equal loss on both sides."""
    base, inputs = host(name, classes=3 if options == "classes" else 0)
    mine, other = OPTIONS.get(options, ({}, {}))
    model = theirs(base, CLASSES if options == "classes" else LM, **other).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "shadow_" in parameter_name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(str(tmp_path / "theirs"))
    expected, bare = model(**inputs), base(**inputs)
    ours = deepcopy(base)
    read = peftcore.load(ours, tmp_path / "theirs")
    assert (expected.logits - bare.logits).abs().max() > 1e-3
    torch.testing.assert_close(ours(**inputs).logits, expected.logits, rtol=1e-5, atol=1e-6)
    for key, value in mine.items():
        assert getattr(read.config, key) == value
    for folder, kind in (("native", "peftcore"), ("ours", "peft")):
        read.save(tmp_path / folder, format=kind)
        again = deepcopy(base)
        peftcore.load(again, tmp_path / folder)
        assert torch.equal(again(**inputs).logits, ours(**inputs).logits)
    opened = peft.PeftModel.from_pretrained(deepcopy(base), str(tmp_path / "ours")).eval()
    found = opened(**inputs)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-6)


def test_what_files_cannot_hold(tmp_path: Path) -> None:
    base, _ = host()
    theirs(base).save_pretrained(str(tmp_path))
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"mirror"', '"somebody/small"'))
    with pytest.raises(CheckpointError, match="'somebody/small', which peftcore does not download"):
        peftcore.load(deepcopy(base), tmp_path)
    for number, size in (("num_hidden_layers", 10**9), ("hidden_size", 10**9)):
        config.write_text(config.read_text().replace('"somebody/small"', '"mirror"'))
        text = config.read_text().replace(f'"shadow_{number}": null', f'"shadow_{number}": {size}')
        (tmp_path / "large").mkdir(exist_ok=True)
        (tmp_path / "large/adapter_config.json").write_text(text)
        (tmp_path / "large/adapter_model.safetensors").write_bytes(
            (tmp_path / "adapter_model.safetensors").read_bytes()
        )
        with pytest.raises((CheckpointError, ConfigError), match="a guest cannot be larger"):
            peftcore.load(deepcopy(base), tmp_path / "large")
    injection = peftcore.apply(deepcopy(base), "shadow", sizes={"num_key_value_heads": 1})
    with pytest.raises(ExportError, match="no option for num_key_value_heads"):
        injection.save(tmp_path / "out", format="peft")


def test_the_equations() -> None:
    """Step by step, on what the blocks of the adapted model read and return."""
    base, inputs = host()
    model = deepcopy(base)
    injection = adapted(model, rank=3, scale=0.7, update_width=5, layers=2)
    assert injection.shared["guest"].network.config.num_hidden_layers == 2
    read: list[Tensor] = []
    for block in model.model.layers:  # below the graft: what the block itself is given
        block.input_layernorm.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    hidden = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    mirror = transformers.LlamaModel(deepcopy(base.config)).double().eval()
    mirror.layers = mirror.layers[:2]
    mirror.embed_tokens.weight.data = base.model.embed_tokens.weight.data
    mirror.load_state_dict(injection.shared["guest"].network.state_dict(), strict=False)
    shadow = mirror(input_ids=ids, attention_mask=mask).last_hidden_state
    for number, (h, x) in enumerate(zip(hidden, read, strict=False)):
        operator = injection.operators[f"model.layers.{number}"]
        t = operator.state_dict()
        expected = h + 0.7 * (h - shadow) @ t["down.weight"].T @ t["up.weight"].T
        torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-9)
        if number < len(read) - 1:
            out = hidden[number + 1]
            made = [
                F.gelu(out @ t[f"{each}.0.weight"].T + t[f"{each}.0.bias"]) @ t[f"{each}.2.weight"].T
                + t[f"{each}.2.bias"]
                for each in ("transform", "gate")
            ]
            gate = 1 / (1 + torch.exp(-made[1]))
            shadow = (1 - gate) * shadow + gate * made[0]
    assert not hasattr(operator, "gate")


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_generation_keeps_what_the_guest_saw(name: str) -> None:
    """With padding on the left, beams, a static cache and a prompt in two pieces."""
    model, _ = host(name)
    injection = adapted(model, scale=2.0, layers=2)
    model.generation_config.eos_token_id = None
    ids = torch.tensor([[0, 0, 6, 7, 9], [2, 3, 4, 8, 5]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "use_cache": True}
    with injection.disabled():
        bare = model.generate(ids, **options)
    for beams in (1, 3):
        expected = model.generate(ids, **{**options, "num_beams": beams, "use_cache": False})
        assert not torch.equal(expected, bare)
        assert torch.equal(model.generate(ids, **options, num_beams=beams), expected)
    alone = model.generate(ids[:1, 2:], max_new_tokens=6, do_sample=False)
    expected = model.generate(ids, **options)
    assert torch.equal(alone[0, 3:], expected[0, 5:])
    static = transformers.StaticCache(config=model.config, max_cache_len=16)
    assert torch.equal(model.generate(ids, **options, cache=static), expected)
    with peftcore.route(model, [None, injection.name]):
        routed = model.generate(ids, **options)
    assert torch.equal(routed[0], bare[0]) and torch.equal(routed[1], expected[1])
    whole = model(ids[1:], use_cache=False).logits
    cache = transformers.DynamicCache(config=model.config)
    pieces = [model(ids[1:, :2], cache=cache).logits, model(ids[1:, 2:], cache=cache).logits]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-9, atol=1e-9)
    assert len(cache.layers) == model.config.num_hidden_layers + 2
    with injection.disabled():
        model(ids[1:, :1], cache=cache)
    with pytest.raises(SequenceError, match="1 tokens that were processed with the adapter off"):
        model(ids[1:, :1], cache=cache)


@against("peft 0.21", "shadow")
def test_generation_is_that_of_peft() -> None:
    """Which has to see the whole sequence at each step; with a cache its guest sees the newest token alone."""
    base, _ = host()
    ours, model = deepcopy(base), theirs(base, shadow_alpha=3.0).eval()
    injection = adapted(ours, scale=3.0)
    with torch.no_grad():
        for mine, other in pairs(injection, model):
            other.copy_(mine)
    for each in (base, ours, model):
        each.generation_config.eos_token_id = None
    ids, options = torch.tensor([[2, 3, 4, 8, 5]]), {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(input_ids=ids, **options, use_cache=False)
    assert not torch.equal(base.generate(ids, **options), expected)
    assert torch.equal(ours.generate(ids, **options, use_cache=True), expected)


def test_checkpoints() -> None:
    """Those that are not reentrant change nothing; the others are refused."""
    base, inputs = host()
    gradients = []
    for reentrant in (None, False, True):
        model = deepcopy(base)
        torch.manual_seed(1)
        injection = adapted(model, dropout=0.0)
        model.train()
        if reentrant is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        if reentrant:
            with pytest.raises(TrainingError, match="use_reentrant': False"):
                model(**inputs)
        else:
            model(**inputs).loss.backward()
            gradients.append([parameter.grad for parameter in injection.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_the_loss_of_the_guest() -> None:
    """In training alone; in a route, of the adapter's own rows; labels of no token, numbers and several classes."""
    base, inputs = host()
    model = deepcopy(base)
    injection = adapted(model, dropout=0.0, guest_weight=0.5)
    plain = model(**inputs).loss
    loss = model.train()(**inputs).loss

    assert loss > plain
    mirror = injection.shared["guest"]
    embeds = base.model.embed_tokens(inputs["input_ids"])
    shadow, _ = mirror({"attention_mask": inputs["attention_mask"]}, embeds, None)
    logits = base.lm_head(shadow)[:, :-1]
    expected = F.cross_entropy(logits.flatten(0, 1), inputs["labels"][:, 1:].flatten())
    torch.testing.assert_close(loss - plain, 0.5 * expected, rtol=1e-5, atol=1e-6)
    with peftcore.route(model, [None, injection.name]):
        routed = model(**inputs).loss
        model.eval()
        difference = routed - model(**inputs).loss
    own = F.cross_entropy(logits[1], inputs["labels"][1, 1:])
    torch.testing.assert_close(difference, 0.5 * own, rtol=1e-5, atol=1e-6)
    nothing = {**inputs, "labels": torch.full_like(inputs["labels"], -100)}
    nothing["labels"][0, 1] = 3
    assert model.train()(**nothing).loss.isfinite()
    for classes, labels in ((1, torch.tensor([0.5, -1.0])), (3, torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]))):
        bare, given = host(classes=classes)
        ours, model = deepcopy(bare), theirs(bare, CLASSES, shadow_dropout=0.0)
        mine = adapted(ours, dropout=0.0)
        with torch.no_grad():
            for one, other in pairs(mine, model):
                other.copy_(one)
        losses = []
        for each in (ours.train(), model.train()):
            given["labels"] = labels.double()
            losses.append(each(**given).loss)
        torch.testing.assert_close(losses[0].double(), losses[1].double(), rtol=1e-6, atol=1e-7)


def test_models_that_classify_tokens() -> None:
    """The guest predicts the label of each token."""
    base, inputs = host()
    config = deepcopy(base.config)
    config.num_labels = 3
    model = transformers.AutoModelForTokenClassification.from_config(config).double().eval()
    model.dropout.p = 0.0
    injection = adapted(model, dropout=0.0, guest_weight=1.0)
    inputs["labels"] = (inputs["input_ids"] % 3).masked_fill(inputs["attention_mask"] == 0, -100)
    difference = -model(**inputs).loss + model.train()(**inputs).loss
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    shadow, _ = injection.shared["guest"]({"attention_mask": inputs["attention_mask"]}, embeds, None)
    logits = injection.shared["head"](shadow)
    expected = F.cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten())
    torch.testing.assert_close(difference.double(), expected, rtol=1e-4, atol=1e-5)


def test_embeddings_in_place_of_ids() -> None:
    base, inputs = host()
    model = deepcopy(base)
    adapted(model)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    embeds = model.get_input_embeddings()(ids)
    expected = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(model(inputs_embeds=embeds, attention_mask=mask).logits, expected)
    model = deepcopy(base)
    adapted(model, sizes={"hidden_size": 8, "num_attention_heads": 2})
    with pytest.raises(SequenceError, match="pass input_ids="):
        model(inputs_embeds=embeds, attention_mask=mask)


def test_some_blocks_and_other_adapters(tmp_path: Path) -> None:
    """Blocks may be left out; an adapter of the token table is seen by the guest; the head may be trained along."""
    base, inputs = host()
    model = deepcopy(base)
    ids = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    injection = adapted(model, target=["model.layers.1", "model.layers.3"])
    assert [path for path in injection.operators if "layers" in path] == ["model.layers.1", "model.layers.3"]
    with pytest.raises(ExportError, match="some blocks between the targets are left out"):
        injection.save(tmp_path / "peft", format="peft")
    assert (model(**ids).logits - base(**ids).logits).abs().max() > 1e-3
    expected = model(**ids).logits
    injection.save(tmp_path)
    again = deepcopy(base)
    peftcore.load(again, tmp_path)
    assert torch.equal(again(**ids).logits, expected)
    model = deepcopy(base)
    lora = peftcore.apply(model, "lora", target=["model.embed_tokens"], dtype="float64")
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.normal_()
    adapted(model, train=["lm_head"], dropout=0.0)
    expected = model(**ids).logits
    lora.merge()
    torch.testing.assert_close(model(**ids).logits, expected)
    lora.unmerge()
    model.train()(**inputs).loss.backward()
    assert all(parameter.grad is not None for parameter in lora.parameters())


def test_what_is_refused() -> None:
    model, inputs = host()
    for sizes, said in (
        ({"hidden_size": 64}, "hidden_size=64 is too large for a guest network: the model has 16"),
        ({"vocabulary": 3}, "vocabulary is not a size"),
        ({"tie_word_embeddings": 1}, "is not a size"),
        ({"vocab_size": 4}, "is not a size"),
        ({"pad_token_id": 1}, "is not a size"),
        ({"_attn_implementation": 1}, "is not a size"),
    ):
        with pytest.raises(ConfigError, match=said):
            peftcore.apply(deepcopy(model), "shadow", sizes=sizes)
    with pytest.raises(ConfigError, match="layers cannot change at single sites"):
        peftcore.apply(deepcopy(model), "shadow", overrides={"model.layers.1": {"layers": 2}})
    with pytest.raises(ConfigError, match="num_hidden_layers=5 is too large for a guest network: the model has 4"):
        peftcore.apply(deepcopy(model), "shadow", layers=5)
    for name in ("bert", "t5", "vit", "dit", "encoder", "mlp"):
        with pytest.raises((UnsupportedSite, TargetError)):
            peftcore.apply(HOSTS[name].build()[0], "shadow")
    adapted(model)
    hidden = torch.zeros(1, 3, 16, dtype=torch.float64)
    with pytest.raises(MissingContext, match="a block was called by itself"):
        model.model.layers[0](hidden)
    other, inputs = host()
    prompt = peftcore.apply(other, "prompt_tuning", length=2)
    adapted(other)
    with pytest.raises(SequenceError, match="the guest network read"):
        other(**inputs)
    assert prompt.active
