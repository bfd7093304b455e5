"""Configurations of peft: what peft makes of them, fresh; what cannot be had is refused, and nothing changes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import peftcore
from peftcore.errors import ConfigError, PeftcoreError
from peftcore.files.peft_configs import twin
from peftcore.testing import HOSTS

peft = pytest.importorskip("peft")
LM = {"task_type": "CAUSAL_LM"}
CONFIGS: dict[str, Any] = {
    "lora, names": peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"]),
    "lora, of the model": peft.LoraConfig(**LM),
    "lora, all linear, heads, biases": peft.LoraConfig(
        target_modules="all-linear", modules_to_save=["lm_head"], bias="lora_only", **LM
    ),
    "lora, a pattern": peft.LoraConfig(target_modules=r".*layers\.1\..*(q|v)_proj", rank_pattern={"q_proj": 2}),
    "lora, no start at zero": peft.LoraConfig(init_lora_weights=False, target_modules=["q_proj"]),
    "lora, gaussian": peft.LoraConfig(init_lora_weights="gaussian", target_modules=["q_proj"]),
    "rslora": peft.LoraConfig(use_rslora=True, target_modules=["q_proj"]),
    "dora": peft.LoraConfig(use_dora=True, target_modules=["q_proj"]),
    "pissa": peft.LoraConfig(init_lora_weights="pissa", target_modules=["q_proj"]),
    "olora": peft.LoraConfig(init_lora_weights="olora", target_modules=["q_proj"]),
    "lora, orthogonal": peft.LoraConfig(init_lora_weights="orthogonal", target_modules=["q_proj"]),
    "mica": peft.LoraConfig(r=4, init_lora_weights="mica", target_modules=["q_proj"]),
    "kasa": peft.LoraConfig(r=4, kasa_config=peft.KasaConfig(), target_modules=["q_proj"]),
    "velora": peft.LoraConfig(velora_config=peft.VeloraConfig(num_groups=4), target_modules=["q_proj"]),
    "adalora": peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10),
    "ia3": peft.IA3Config(**LM),
    "osf": peft.OSFConfig(target_modules=["q_proj"]),
    "peanut": peft.PeanutConfig(r=4, target_modules=["q_proj"]),
    "pvera": peft.PveraConfig(r=4, target_modules=["q_proj"]),
    "tinylora": peft.TinyLoraConfig(target_modules=["q_proj"]),
    "uni_lora": peft.UniLoraConfig(target_modules=["q_proj"]),
    "vb_lora": peft.VBLoRAConfig(target_modules=["q_proj"], num_vectors=8, vector_length=8),
    "vera": peft.VeraConfig(r=4, target_modules=["q_proj"]),
    "lily": peft.LilyConfig(target_modules=["q_proj"], r=4),
    "loha": peft.LoHaConfig(target_modules=["q_proj"]),
    "lokr": peft.LoKrConfig(target_modules=["q_proj"]),
    "oft": peft.OFTConfig(target_modules=["q_proj"], oft_block_size=8),
    "boft": peft.BOFTConfig(target_modules=["q_proj"], boft_block_size=4),
    "hra": peft.HRAConfig(target_modules=["q_proj"]),
    "fourierft": peft.FourierFTConfig(n_frequency=10, target_modules=["q_proj"]),
    "delora": peft.DeloraConfig(r=4, target_modules=["q_proj"]),
    "adamss": peft.AdamssConfig(r=6, target_modules=["q_proj"]),
    "frod": peft.FrodConfig(target_modules=["q_proj"], progressbar=False),
    "gralora": peft.GraloraConfig(r=4, target_modules=["q_proj"]),
    "c3a": peft.C3AConfig(block_size=4, target_modules=["q_proj"]),
    "waveft": peft.WaveFTConfig(n_frequency=10, target_modules=["q_proj"]),
    "road": peft.RoadConfig(group_size=4, target_modules=["q_proj"]),
    "psoft": peft.PsoftConfig(r=4, target_modules=["q_proj"]),
    "bd_lora": peft.LoraConfig(
        use_bdlora=peft.tuners.lora.BdLoraConfig(target_modules_bd_b=["q_proj"], nblocks=2), target_modules=["q_proj"]
    ),
    "monteclora": peft.LoraConfig(
        monteclora_config=peft.tuners.lora.MontecloraConfig(buffer_size=1), target_modules=["q_proj"]
    ),
    "supertuning": peft.SupertuningConfig(sparsity=0.9, r=2, target_modules=["q_proj"]),
    "beft": peft.BeftConfig(target_modules=["q_proj"]),
    "deft": peft.DeftConfig(r=4, target_modules=["q_proj"]),
    "prompt_tuning": peft.PromptTuningConfig(num_virtual_tokens=3, **LM),
    "prefix_tuning": peft.PrefixTuningConfig(num_virtual_tokens=3, **LM),
    "cpt": peft.CPTConfig(cpt_token_ids=[5, 6, 7], cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[1, 2, 4], **LM),
    "cartridge": peft.CartridgeConfig(num_virtual_tokens=3, **LM),
    "shadow": peft.ShadowConfig(**LM),
}


def host() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model, inputs = HOSTS["llama"].build()
    return model.eval(), inputs


@pytest.mark.share(3)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_is_what_peft_makes_of_it(name: str) -> None:
    model, inputs = host()
    before, generator = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    ours = peftcore.apply(model, CONFIGS[name], seed=3)
    assert torch.equal(torch.get_rng_state(), generator)
    with peftcore.saving_base():
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    other, _ = host()
    torch.manual_seed(3)
    theirs = peft.get_peft_model(other, copy.deepcopy(CONFIGS[name])).eval()
    logits = theirs(**inputs).logits[:, -inputs["input_ids"].shape[1] :]
    torch.testing.assert_close(model(**inputs).logits, logits, atol=2e-6, rtol=1e-4)
    trained = sum(each.numel() for each in theirs.parameters() if each.requires_grad)
    if name not in ("boft", "shadow"):  # peft counts factors that do not act, and what no block reads
        assert sum(each.numel() for each in ours.parameters() if each.requires_grad) == trained
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert any(each.grad is not None and each.grad.abs().max() > 0 for each in ours.parameters())


def test_the_seed_is_torchs_own_unless_one_is_given() -> None:
    drawn = []
    for seed in (1, 1, 2):
        model, _ = host()
        torch.manual_seed(seed)
        drawn.append(
            peftcore.apply(model, CONFIGS["rslora"], name="mine").operators["model.layers.0.self_attn.q_proj"].A
        )
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            peft.LoraConfig(target_modules=["nothing"]),
            "peft does not accept this LoraConfig for this model: Target",
        ),
        (peft.LoraConfig(target_modules=["q_proj"], use_qalora=True, qalora_group_size=4), "use_qalora"),
        (peft.XLoraConfig(hidden_size=32, adapters={}), "XLora|XLORA"),
    ],
)
def test_what_cannot_be_had_is_refused_before_anything_changes(config: Any, message: str) -> None:
    model, inputs = host()
    keys, expected = [*model.state_dict()], model(**inputs).logits
    with pytest.raises(PeftcoreError, match=message):
        peftcore.apply(model, config)
    assert [*model.state_dict()] == keys and torch.equal(model(**inputs).logits, expected)
    assert all(each.requires_grad for each in model.parameters())


@pytest.mark.parametrize("more", [{"target": "attn.q"}, {"train": ["lm_head"]}, {"rank": 4}, {"dtype": "bfloat16"}])
def test_it_comes_without_other_arguments(more: dict[str, Any]) -> None:
    model, _ = host()
    with pytest.raises(ConfigError, match="a peft LoraConfig already contains all options"):
        peftcore.apply(model, CONFIGS["dora"], **more)
    with pytest.raises(ConfigError, match="supported only by apply"):
        peftcore.plan(model, CONFIGS["dora"])


def test_beside_another_adapter_and_under_a_name() -> None:
    model, inputs = host()
    other = peftcore.apply(model, "lora", name="first")
    nn.init.normal_(next(iter(other.parameters())))
    second = peftcore.apply(model, CONFIGS["rslora"], name="second")
    assert [*peftcore.injections(model)] == ["first", "second"] and second.active
    second.remove()
    other.remove()
    fresh, _ = host()
    torch.testing.assert_close(model(**inputs).logits, fresh(**inputs).logits)


def test_a_twin_shares_memory_and_nothing_else() -> None:
    model, _ = host()
    other = twin(model)
    weight, theirs = (each.get_submodule("model.layers.0.self_attn.q_proj").weight for each in (model, other))
    assert theirs is not weight and theirs.data_ptr() == weight.data_ptr()
    theirs.requires_grad_(False)
    theirs.data = torch.zeros(1)
    assert weight.requires_grad and weight.dim() == 2


class Packed(nn.Parameter):
    """A parameter of a class of its own, as bitsandbytes has for quantized weights."""

    scales: torch.Tensor


def test_a_twin_keeps_what_a_parameter_has_beside_its_values() -> None:
    model = nn.Linear(3, 2)
    model.weight = torch.Tensor._make_subclass(Packed, torch.arange(6).reshape(2, 3), False)
    model.weight.scales = torch.ones(2)
    found = twin(model).weight
    assert type(found) is Packed and found is not model.weight
    assert found.scales is model.weight.scales and found.data_ptr() == model.weight.data_ptr()
    found.scales = torch.zeros(2)
    assert model.weight.scales.all()


def test_a_configuration_adapts_a_base_that_bitsandbytes_quantized() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model, inputs = host()
    plain = model.get_submodule("model.layers.0.self_attn")
    packed = bnb.nn.Linear4bit(*plain.q_proj.weight.shape[::-1], bias=False, compute_dtype=torch.float32)
    packed.load_state_dict(plain.q_proj.state_dict())
    plain.q_proj = packed.to("cpu")  # which quantizes it
    before = model(**inputs).logits
    injection = peftcore.apply(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    assert len(injection.grafts) == len(model.get_submodule("model.layers"))
    assert not torch.allclose(model(**inputs).logits, before)
    injection.remove()
    assert torch.equal(model(**inputs).logits, before)
