"""Rows that are filled up behind their end, since others are longer, change nothing: no draw, no step."""

from typing import Any

import pytest
import torch
from fleet_toys import applied, llama, next_token, texts
from slowly import quick
from torch import Tensor

import peftcore
from peftcore.errors import TrainingError
from peftcore.training import Fleet, Member

PAD = {"input_ids": 0, "attention_mask": 0, "labels": -100}
STEPS = 3
DROPS = """
adalora adaptformer alora apt arc bd_lora bi_adaptformer ciat deft delora dora dylora fact_tk fact_tt frod gralora hira
hydralora k_adapter kasa longlora lora lora_plus lora_xs loramoe loreft mica miss moelora mola monteclora mtl_lora olora
p_tuning_v2 pal parallel_adapter pissa prefix_tuning psoft pvera randlora repadapter shadow tiny_attention_adapter
tinylora uni_lora vb_lora velora vera
"""
DRAWING: dict[str, dict[str, Any]] = {
    **{name: {"dropout": 0.3} for name in DROPS.split()},
    "adamix": {"consistency": 0.5},
    "boft": {"block_dropout": 0.3, "block_size": 4},
    "oft": {"block_dropout": 0.3, "block_size": 4},
    "loha": {"rank_dropout": 0.3, "module_dropout": 0.3},
    "lokr": {"rank_dropout": 0.3, "module_dropout": 0.3},
    "mam_adapter": {"prefix_dropout": 0.3, "ffn_dropout": 0.3},
    "polytropon": {},
}
"""Methods that draw in training, with options by which they do."""
STILL: dict[str, dict[str, Any]] = {"galore": {}, "galore, few directions": {"rank": 4}, "ia3": {}, "mtl_lora": {}}
"""Others, which compute something of a batch or of gradients."""
ELSEWHERE = {
    "adapter_fusion": "of parts that are adapted before",
    "adapterdrop": "of a number for each forward, which no length changes",
    "dare": "of parameters, when applied",
    "lst": "beside others not in a Llama",
    "text_to_lora": "told a vector with each call, which batches of a fleet do not carry",
    **dict.fromkeys(["controlnet_lllite", "convpass", "dyt", "hypernetwork_a1111", "kadaptation", "mona"], "pictures"),
    **dict.fromkeys(["ir_qlora", "lora_int8", "qa_lora", "qlora"], "packed weights"),
}
"""Methods that may draw, and why they are not tried here."""


def trained(method: str, length: int, draws: int = 5, **options: Any) -> Member:
    """A member with texts of five tokens, in a fleet of its own (0) or beside one with longer texts."""
    model = llama()
    fleet = Fleet(model, pad=PAD)

    def joined(name: str, kind: str, seed: int, own: dict[str, Any], **shape: int) -> Member:
        injection = applied(model, kind, name, seed, **own)
        optimizer = injection.optimizer(torch.optim.AdamW, lr=1e-3, total_steps=STEPS)
        return fleet.join(
            injection, texts(seed, **shape), loss=next_token, optimizer=optimizer, steps=STEPS, seed=draws
        )

    member = joined("own", method, 5, options)
    if length:
        joined("other", "ia3", 6, {}, length=length, rows=3)
    fleet.run()
    return member


def expect_alike(one: Member, other: Member, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(other.losses, one.losses, rtol=0, atol=tolerance)
    torch.testing.assert_close(other.injection.state_dict(), one.injection.state_dict(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("method", quick(sorted(DRAWING), ["lora", "ciat", "dylora", "mola", "p_tuning_v2", "pvera"]))
def test_another_company_draws_the_same(method: str) -> None:
    alone = trained(method, 0, **DRAWING[method])
    for length in (5, 9):
        expect_alike(alone, trained(method, length, **DRAWING[method]))
    assert trained(method, 0, draws=6, **DRAWING[method]).losses != alone.losses


@pytest.mark.parametrize("method", STILL)
def test_what_is_computed_of_a_batch_or_of_gradients_is_the_same(method: str) -> None:
    """A gradient of fewer directions than `rank` is completed by the same ones, and not by what rounding leaves."""
    name, options = method.partition(",")[0], STILL[method]
    expect_alike(trained(name, 0, **options), trained(name, 9, **options))


@pytest.mark.slow
def test_every_method_that_may_draw_is_tried_or_named() -> None:
    may_draw = {
        info.name
        for info in peftcore.methods()
        if info.tags.per_row
        and not info.tags.needs_data
        and (info.tags.random or any("drop" in name for name in peftcore.method(info.name).Config.model_fields))
    }
    assert may_draw - {*ELSEWHERE} == {*DRAWING}


def in_front(batches: list[Any]) -> dict[str, Tensor]:
    longest = max(each["input_ids"].shape[1] for each in batches)
    return {
        key: torch.cat(
            [torch.nn.functional.pad(each[key], (longest - each[key].shape[1], 0), value=PAD[key]) for each in batches]
        )
        for key in PAD
    }


@pytest.mark.parametrize(("dropout", "lengths"), [(0.3, (5, 9)), (0.0, (5, 9)), (0.3, (5, 5))])
def test_rows_that_draw_are_not_filled_up_in_front(dropout: float, lengths: tuple[int, int]) -> None:
    """Which would move their places. What draws nothing may be."""
    model = llama()
    fleet = Fleet(model, collate=in_front)
    for name, seed, length in (("short", 5, lengths[0]), ("long", 6, lengths[1])):
        injection = applied(model, "lora", name, seed, dropout=dropout)
        optimizer = injection.optimizer(torch.optim.AdamW, lr=1e-3)
        fleet.join(injection, texts(seed, length=length), loss=next_token, optimizer=optimizer, steps=1)
    before = {name: value.clone() for name, value in fleet.members["short"].injection.state_dict().items()}
    if dropout and lengths[0] != lengths[1]:
        with pytest.raises(TrainingError, match=r"'short' draws random numbers .* in front"):
            fleet.step()
        torch.testing.assert_close(fleet.members["short"].injection.state_dict(), before, rtol=0, atol=0)
        return
    fleet.step()
    assert not any(torch.equal(value, before[name]) for name, value in
                   fleet.members["short"].injection.state_dict().items() if name.endswith("B"))  # fmt: skip
