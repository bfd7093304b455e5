"""Lists of methods: each part takes its steps, keeps its rule, sees its data, in one optimizer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from training_hosts import host, inputs, trainer

import peftcore
from peftcore.errors import CalibrationError, ConfigError, TrainingError
from peftcore.training import MethodOptimizer, PeftcoreCallback

PARTS: list[dict[str, Any]] = [
    {"method": "adalora", "target_rank": 4},
    {"method": "galore", "target": "*.output.dense", "rank": 2},
    {"method": "bitfit", "target": "*.LayerNorm"},
]


def labelled() -> dict[str, torch.Tensor]:
    return {**inputs("bert"), "labels": torch.tensor([0, 2])}


def ranks(injection: peftcore.Injection) -> int:
    return sum(int(o.E.count_nonzero()) for key, o in injection.operators.items() if key.startswith("0/"))


def test_parts_take_steps_and_keep_their_rules() -> None:
    model = host("bert").train()
    injection = peftcore.apply(model, PARTS, train=["classifier"])
    optimizer = injection.optimizer(torch.optim.AdamW, lr=0.01, total_steps=4)
    assert isinstance(optimizer, MethodOptimizer)
    before = {key: value.clone() for key, value in injection.state_dict().items()}
    for _ in range(4):
        optimizer.zero_grad()
        model(**labelled()).loss.backward()
        optimizer.step()
    assert ranks(injection) == 4 * 4
    assert all(not torch.equal(value, before[key]) for key, value in injection.state_dict().items())
    shapes = {key: optimizer.state[o.value]["exp_avg"].shape for key, o in injection.operators.items() if key[0] == "1"}
    assert {tuple(sorted(shape)) for shape in shapes.values()} == {(2, 16), (2, 24)}


def test_parts_without_steps_or_rules_have_a_plain_optimizer() -> None:
    injection = peftcore.apply(host("bert"), ["lora", {"method": "bitfit", "target": "*.LayerNorm"}])
    assert type(injection.optimizer(torch.optim.AdamW, lr=0.01)) is torch.optim.AdamW


def test_a_schedule_in_a_part_must_know_its_length() -> None:
    model = host("bert")
    injection = peftcore.apply(model, PARTS)
    optimizer = injection.optimizer(torch.optim.AdamW, lr=0.01)
    model(**labelled()).loss.backward()
    with pytest.raises(TrainingError, match="total_steps"):
        optimizer.step()


def test_the_trainer_resumes_a_list_exactly(tmp_path: Path) -> None:
    results = []
    for checkpoint in (None, str(tmp_path / "checkpoint-3")):
        model = host("bert")
        injection = peftcore.apply(model, PARTS, seed=0, train=["classifier"])
        optimizers = (injection.optimizer(torch.optim.AdamW, lr=0.05), None)
        run = trainer(model, "bert", tmp_path, [PeftcoreCallback()], optimizers=optimizers)
        run.train(resume_from_checkpoint=checkpoint)
        assert ranks(injection) == 4 * 4
        results.append({key: value.clone() for key, value in injection.state_dict().items()})
    assert all(torch.equal(value, results[1][key]) for key, value in results[0].items())


def test_a_part_sees_its_data() -> None:
    curious: list[dict[str, Any]] = [
        {"method": "child_tuning_d", "target": ["query"], "share": 0.2},
        {"method": "lora", "target": ["value"]},
    ]
    with pytest.raises(CalibrationError, match="child_tuning_d looks at data"):
        peftcore.apply(host("bert"), curious)
    with pytest.raises(CalibrationError, match="remove data="):
        peftcore.apply(host("bert"), curious[1:], data=[labelled()])
    injection = peftcore.apply(host("bert"), curious, data=[labelled()])
    masks = [operator.mask for key, operator in injection.operators.items() if key.startswith("0/")]
    share = sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)
    assert share == pytest.approx(0.2, abs=0.01)
    assert isinstance(injection.optimizer(torch.optim.AdamW, lr=0.01), MethodOptimizer)


def test_a_part_of_which_data_would_decide_options_is_refused() -> None:
    """Its own options would stand there without a word: of SPT-LoRA, updates everywhere, whatever the budget."""
    model = host("bert")
    parts: list[Any] = [{"method": "spt_lora", "target": ["query", "value"]}, {"method": "ia3", "target": "query"}]
    with pytest.raises(ConfigError, match=r"spt_lora decides from data how it adapts \d+ single sites"):
        peftcore.apply(model, parts, data=[labelled()])
    assert not peftcore.injections(model)


def test_every_method_that_looks_at_data_finds_the_same_as_a_part() -> None:
    data = labelled()
    told: dict[str, dict[str, Any]] = {
        "cartridge": {"length": 2, "target": "self"},  # which acts inside of attentions
        "spt_lora": {"entries": 3},
        "tip_adapter": {"features": "input", "images": len(data["labels"]), "classes": 3, "target": "classifier"},
    }
    curious = [info.name for info in peftcore.methods() if info.tags.needs_data]
    assert {"child_tuning_d", "fish_mask", "lqer"} <= set(curious)
    curious.remove("perfusion")  # which acts on what reads a text beside, and a BERT has none
    curious.remove("sparse_adapter")  # what it ranks is drawn for each path, of which a part is a part
    for method in curious:
        own = {"target": ["query", "value"], **told.get(method, {})}
        alone = peftcore.apply(host("bert"), method, **own, data=[data]).state_dict()
        parts: list[Any] = [{"method": method, **own}, {"method": "ia3", "target": "query"}]
        part = peftcore.apply(host("bert"), parts, data=[data]).parts["0"].state_dict()
        assert alone and part.keys() == alone.keys(), method
        assert all(torch.equal(value, part[key]) for key, value in alone.items()), method
