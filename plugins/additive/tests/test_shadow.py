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
    UnsupportedSite,
)
from peftcore.testing import against, conformance
from peftcore.testing.hosts import HOSTS
from peftcore_additive.shadow import ShadowOperator

pytestmark = pytest.mark.filterwarnings("ignore:::peft", "ignore:Found missing adapter keys")
LM, CLASSES = "CAUSAL_LM", "SEQ_CLS"


@conformance("shadow")
def test_conformance(check: Callable[[], None]) -> None:
    check()


def host(name: str = "llama", *, classes: int = 0) -> tuple[Any, dict[str, Tensor]]:
    """A host in float64, and a batch padded on the right with labels."""
    torch.manual_seed(0)
    model, inputs = HOSTS[name].build()
    if classes:
        config = deepcopy(model.config)
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
        {"rank": 3, "scale": 0.7, "update_width": 5, "layers": 2, "guest_weight": 0.3, "sizes": {"intermediate_size": 12}},
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
    """Our tensors and those of peft, which are all but a table that nothing reads and copies of modules."""
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
    ours: Any, injection: peftcore.Injection, model: Any, inputs: dict[str, Tensor], base: nn.Module, unread: int = 0
) -> None:
    """In training: outputs, loss and the gradients of all tensors."""
    both = pairs(injection, model)
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
    reached = 0
    for mine, other in both:
        assert (mine.grad is None) == (other.grad is None)
        if mine.grad is not None:
            reached += 1
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-5, atol=1e-8)
    assert reached == len(both) - 8  # nothing reads what the last block makes of the shadow


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
    compare(ours, injection, model, inputs, base, unread=base.get_input_embeddings().weight.numel() if shares else 0)


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
