"""CPT beside peft's, which is its authors': what it computes, its loss, its steps; and beside the model that sees the
examples. (Models of transformers compute losses in float32.)"""

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
from peftcore.errors import ConfigError, UnsupportedSite
from peftcore.testing import against, conformance
from peftcore.testing.hosts import HOSTS
from peftcore_additive.cpt import CPTOperator

pytestmark = pytest.mark.filterwarnings("ignore:::peft")
IDS = [5, 9, 3, 7, 11, 2, 8, 4, 6]
TYPES = [1, 2, 3, 4, 4, 5, 6, 7, 8]
OPTIONS: dict[str, Any] = {"ids": IDS, "types": TYPES, "epsilon": 2.0, "format_epsilon": 1.0, "decay": 0.5}


@conformance("cpt", options={"*": {**OPTIONS, "epsilon": 40.0, "format_epsilon": 40.0}})
def test_conformance(check: Callable[[], None]) -> None:
    check()


def host(name: str = "llama") -> tuple[Any, dict[str, Tensor]]:
    """A host in float64 and a batch padded on the right, whose labels say what counts."""
    model, inputs = HOSTS[name].build()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[1, 0] = -100
    return model.double().requires_grad_(False), {**inputs, "labels": labels}


def adapted(model: nn.Module, **changes: Any) -> tuple[peftcore.Injection, Any]:
    injection = peftcore.apply(model, "cpt", dtype="float64", **{**OPTIONS, **changes})
    return injection, next(each for each in injection.operators.values() if isinstance(each, CPTOperator))


def theirs(base: nn.Module, **changes: Any) -> tuple[Any, Any]:
    options = {**OPTIONS, **changes}
    config = peft.CPTConfig(
        task_type="CAUSAL_LM",
        cpt_token_ids=options["ids"],
        cpt_mask=[1] * len(options["ids"]),
        cpt_tokens_type_mask=options["types"],
        opt_weighted_loss_type="decay",
        opt_loss_decay_factor=options["decay"],
        opt_projection_epsilon=options["epsilon"],
        opt_projection_format_epsilon=options["format_epsilon"],
    )
    model = peft.get_peft_model(deepcopy(base), config).double()
    return model, model.prompt_encoder["default"]


@pytest.mark.parametrize("decay", [0.5, 1.0])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@against("peft 0.21", "cpt")
def test_it_is_that_of_peft(name: str, decay: float) -> None:
    """Rows that stand outside of their balls: logits, loss and gradients. (In peft labels lose what no type says.)"""
    base, inputs = host(name)
    ours, (model, encoder) = deepcopy(base), theirs(base, decay=decay)
    injection, operator = adapted(ours, decay=decay)
    with torch.no_grad():
        encoder.delta_embedding.weight.copy_(0.1 * torch.randn(len(IDS), 16, dtype=torch.float64))
        moves = operator.limits > 0
        operator.delta.copy_(encoder.delta_embedding.weight * moves)  # in peft 1e-10 of answers is left
    assert sum(each.numel() for each in injection.parameters()) == encoder.delta_embedding.weight.numel()
    outputs = []
    for each in (ours, model):
        torch.manual_seed(0)  # of the host's dropout, which is drawn alike
        outputs.append(each.train()(**deepcopy(inputs)))
    bare = deepcopy(base).eval()(**inputs)
    kept = inputs["attention_mask"].bool()
    assert (outputs[0].logits[kept] - bare.logits[kept]).abs().max() > 0.01
    torch.testing.assert_close(outputs[0].logits[kept], outputs[1].logits[:, len(IDS) :][kept], rtol=1e-5, atol=1e-6)
    assert abs(outputs[0].loss - bare.loss) > 0.01
    torch.testing.assert_close(outputs[0].loss, outputs[1].loss, rtol=1e-6, atol=1e-7)
    for each in outputs:
        each.loss.backward()
    gradient = encoder.delta_embedding.weight.grad
    assert gradient.abs().max() > 1e-3 and not operator.delta.grad[~moves[:, 0]].any()
    torch.testing.assert_close(operator.delta.grad, gradient, rtol=1e-5, atol=1e-7)


@against("peft 0.21", "cpt")
def test_its_steps_are_those_of_peft() -> None:
    """Every row that may move comes to the border of its ball and goes along it."""
    base, inputs = host()
    ours, (model, encoder) = deepcopy(base).train(), theirs(base)
    injection, operator = adapted(ours)
    model.train()
    optimizers = [
        injection.optimizer(torch.optim.Adam, lr=0.05),
        torch.optim.Adam([encoder.delta_embedding.weight], lr=0.05),
    ]
    losses = []
    for _ in range(12):
        pair = []
        for each, optimizer in zip((ours, model), optimizers, strict=True):
            loss = each(**deepcopy(inputs)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            pair.append(loss.detach())
        torch.testing.assert_close(pair[0], pair[1], rtol=1e-5, atol=1e-6)
        losses.append(pair[0].item())
    assert losses[-1] < losses[0]
    norms = operator.delta.norm(dim=-1)
    moving = operator.limits[:, 0] > 0
    torch.testing.assert_close(norms[moving], operator.limits[:, 0][moving].to(norms))
    assert not norms[~moving].any()
    model.eval()(**{key: value for key, value in inputs.items() if key != "labels"})  # which brings peft's rows back
    torch.testing.assert_close(operator.delta, encoder.delta_embedding.weight.data, rtol=1e-4, atol=1e-5)


def test_a_fresh_one_is_the_examples() -> None:
    """In the forward and in what is generated; padding on the left moves nothing, for the loss neither."""
    model, inputs = host()
    model.eval().generation_config.eos_token_id = None
    base, ids, examples = deepcopy(model), inputs["input_ids"][:1], torch.tensor([IDS])
    adapted(model)
    whole = torch.cat([examples, ids], 1)
    torch.testing.assert_close(model(ids).logits, base(whole).logits[:, len(IDS) :], rtol=1e-10, atol=1e-10)
    for beams in (1, 3):
        options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams}
        found, expected = model.generate(ids, **options), base.generate(whole, **options)
        assert torch.equal(found[:, ids.shape[1] :], expected[:, whole.shape[1] :])
    right = {key: value[1:] for key, value in inputs.items()}
    right["labels"] = right["input_ids"].masked_fill(right["attention_mask"] == 0, -100)
    count = int(right["attention_mask"].sum())
    left = {key: torch.roll(value, value.shape[1] - count, 1) for key, value in right.items()}
    assert left["attention_mask"][0, 0] == 0
    left["position_ids"] = (left["attention_mask"].cumsum(1) - 1).clamp(min=0)
    model.train()
    torch.testing.assert_close(model(**left).loss, model(**right).loss, rtol=1e-6, atol=1e-7)


def test_the_loss_by_hand() -> None:
    """Of the examples and the question in one sequence: answers weigh 0.25 and 0.5, labels 1."""
    model, inputs = host()
    base, ids = deepcopy(model), inputs["input_ids"][:1]
    adapted(model.train())
    labels = ids.clone()
    labels[0, 1:3] = -100
    logits = base(torch.cat([torch.tensor([IDS]), ids], 1)).logits[0]
    said = torch.cat([torch.tensor(IDS).masked_fill(torch.tensor(TYPES) % 4 != 0, -100), labels[0]])[1:]
    weights = torch.tensor([0.0, 0.0, 0.25, 0.25, 0.0, 0.0, 0.0, 0.5] + [1.0] * ids.shape[1])
    losses = F.cross_entropy(logits[:-1], said, reduction="none")
    expected = (losses * weights).sum() / (said != -100).sum()
    torch.testing.assert_close(model(ids, labels=labels).loss, expected, rtol=1e-6, atol=1e-7)
    items = torch.tensor(10)  # of all forwards of a step
    shared = model(ids, labels=labels, num_items_in_batch=items).loss
    torch.testing.assert_close(shared, expected * (labels[:, 1:] != -100).sum() / items, rtol=1e-6, atol=1e-7)
    bare = base.eval()(torch.cat([torch.tensor([IDS]), ids], 1)).logits[:, len(IDS) :]
    model.eval()
    torch.testing.assert_close(
        model(ids, labels=labels).loss, base.loss_function(bare, labels, vocab_size=bare.shape[-1])
    )


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_files_of_peft(name: str, tmp_path: Path) -> None:
    """The file has the examples and what they moved by as one, on both sides."""
    base, inputs = host(name)
    base = base.float().eval()
    ids = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    kept = inputs["attention_mask"].bool()
    model, encoder = theirs(base)
    model = model.float().eval()
    with torch.no_grad():
        encoder.delta_embedding.weight.normal_(0, 0.1)
        expected = model(**ids).logits[:, len(IDS) :][kept]
    model.save_pretrained(str(tmp_path / "theirs"))
    ours = deepcopy(base)
    read = peftcore.load(ours, tmp_path / "theirs")
    assert (read.method.name, read.config.model_dump(exclude={"method", "overrides"})) == ("cpt", OPTIONS)
    with torch.no_grad():
        assert (base(**ids).logits[kept] - expected).abs().max() > 0.01
        torch.testing.assert_close(ours(**ids).logits[kept], expected, rtol=1e-4, atol=1e-5)
    read.save(tmp_path / "native")
    again = deepcopy(base)
    peftcore.load(again, tmp_path / "native")
    assert torch.equal(again(**ids).logits, ours(**ids).logits)
    mine = deepcopy(base)
    injection = peftcore.apply(mine, "cpt", **OPTIONS)
    for each in injection.parameters():
        nn.init.normal_(each, 0, 0.1)
    injection.save(tmp_path / "ours", format="peft")
    assert (
        peftcore.load(deepcopy(base), tmp_path / "ours").config.model_dump(exclude={"method", "overrides"}) == OPTIONS
    )
    opened = peft.PeftModel.from_pretrained(deepcopy(base), str(tmp_path / "ours")).eval()
    with torch.no_grad():
        found = opened(**ids).logits[:, len(IDS) :][kept]
        torch.testing.assert_close(found, mine(**ids).logits[kept], rtol=1e-4, atol=1e-5)


def test_the_head_may_train_along(tmp_path: Path) -> None:
    """It scores the prompt's rows, too, with the values that train."""
    base, inputs = host()
    model = deepcopy(base).train()
    injection, operator = adapted(model, train=["lm_head"])
    before = model(**inputs).loss
    before.backward()
    head = next(each.operator for each in injection.grafts if each.trained_along)
    with torch.no_grad():
        head.value.add_(torch.randn_like(head.value), alpha=0.1)
    assert operator.delta.grad.abs().max() > 0 and head.value.grad.abs().max() > 0
    assert abs(model(**inputs).loss - before) > 1e-3
    injection.save(tmp_path)
    again = deepcopy(base).train()
    peftcore.load(again, tmp_path)
    torch.testing.assert_close(again(**inputs).loss, model(**inputs).loss)


def test_other_optimizers_leave_what_is_computed_within() -> None:
    model, inputs = host()
    injection, operator = adapted(model.train())
    optimizer = torch.optim.SGD(injection.parameters(), lr=100.0)
    model(**inputs).loss.backward()
    optimizer.step()
    moving = operator.limits[:, 0] > 0
    moved = (operator.rows(operator.start) - operator.start).norm(dim=-1)
    assert (operator.delta.norm(dim=-1) > 2 * operator.limits[:, 0])[moving].all()
    torch.testing.assert_close(moved, operator.limits[:, 0].to(moved))


def test_what_is_refused(tmp_path: Path) -> None:
    model, _ = host()
    with pytest.raises(ConfigError, match="types= has 1 entries, but ids= has 2"):
        peftcore.apply(model, "cpt", ids=[1, 2], types=[1])
    with pytest.raises(ConfigError, match="outside of the vocabulary"):
        peftcore.apply(model, "cpt", ids=[1, 10_000])
    for name in ("bert", "t5"):
        with pytest.raises(UnsupportedSite, match="does not predict tokens"):
            peftcore.apply(HOSTS[name].build()[0], "cpt", ids=[1, 2])
    config = transformers.Gemma2Config(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    with pytest.raises(UnsupportedSite, match="final_logit_softcapping"):
        peftcore.apply(transformers.Gemma2ForCausalLM(config), "cpt", ids=[1, 2])
