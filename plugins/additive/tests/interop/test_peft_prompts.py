"""Soft prompts, prefixes and adaption prompts in folders of peft, both ways.

(A plain forward is compared: peft's `generate` gives wrong text with the transformers versions that this project is
for.)"""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft_folders import assert_reads, assert_writes, saved_by_peft
from torch import Tensor, nn

import peftcore
from peftcore.errors import CheckpointError, ExportError, HostMismatch
from peftcore.testing.hosts import HOSTS

pytestmark = pytest.mark.filterwarnings("ignore:::peft")
LENGTH = 4
CAUSAL = {"task_type": "CAUSAL_LM", "num_virtual_tokens": LENGTH}
BOTH = {"task_type": "SEQ_2_SEQ_LM", "num_virtual_tokens": LENGTH}


def host(name: str) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """A host, and its logits without those of peft's rows in front."""
    model, inputs = HOSTS[name].build()
    words = inputs["decoder_input_ids" if name == "t5" else "input_ids"].shape[1]
    return model, lambda adapted: adapted(**inputs).logits[:, -words:]


@pytest.mark.parametrize("name", ["llama", "gpt2", "moe", "t5"])
def test_prompts(name: str, tmp_path: Path) -> None:
    base, run = host(name)
    config = peft.PromptTuningConfig(**(BOTH if name == "t5" else CAUSAL))
    injection = assert_reads(base, config, run, tmp_path)
    assert (injection.method.name, injection.config.length) == ("prompt_tuning", LENGTH)
    written = assert_writes(base, "prompt_tuning", {"length": LENGTH}, run, tmp_path)
    heads = {"llama": 2, "gpt2": 2, "moe": 2, "t5": 2}[name]
    sizes = [written[key] for key in ("token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules")]
    assert sizes == [16, 2, heads, 1]
    assert written["task_type"] == config.task_type
    assert_writes(base, "prompt_tuning", {"length": LENGTH, "init": "uniform", "rank": 2}, run, tmp_path)


@pytest.mark.parametrize("encoder", ["MLP", "LSTM"])
def test_p_tuning_keeps_what_its_network_made(encoder: str, tmp_path: Path) -> None:
    base, run = host("llama")
    options = {"encoder_hidden_size": 8, "encoder_num_layers": 2, "encoder_dropout": 0.5}
    config = peft.PromptEncoderConfig(**CAUSAL, encoder_reparameterization_type=encoder, **options)
    assert assert_reads(base, config, run, tmp_path).method.name == "prompt_tuning"
    own = {"length": LENGTH, "encoder": encoder.lower(), "hidden": 8}
    assert assert_writes(base, "p_tuning", own, run, tmp_path)["peft_type"] == "P_TUNING"
    residual = {"length": LENGTH, "encoder": "residual", "hidden": 8}
    assert assert_writes(base, "p_tuning", residual, run, tmp_path)["peft_type"] == "P_TUNING"
    injection = peftcore.apply(base.train(), "p_tuning", length=LENGTH, encoder="lstm", lstm_dropout=0.9)
    for path in ("once", "twice"):  # no dropout in what is saved
        injection.save(tmp_path / path, format="peft")
    once, twice = ((tmp_path / path / "adapter_model.safetensors").read_bytes() for path in ("once", "twice"))
    assert once == twice and all(operator.training for operator in injection.operators.values())


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "moe"])
def test_prefixes(name: str, projection: bool, tmp_path: Path) -> None:
    """Grouped key heads in llama; what the network makes is kept, and not the network; positions start behind."""
    base, run = host(name)
    config = peft.PrefixTuningConfig(**CAUSAL, prefix_projection=projection, encoder_hidden_size=6)
    injection = assert_reads(base, config, run, tmp_path)
    assert (injection.config.projection, injection.config.behind) == (None, True)
    options = {"length": LENGTH, "projection": 6 if projection else None, "behind": True}
    written = assert_writes(base, "prefix_tuning", options, run, tmp_path)
    kv_heads = {"llama": 1, "gpt2": 2, "moe": 1}[name]
    sizes = [written[key] for key in ("token_dim", "num_layers", "num_attention_heads")]
    assert sizes == [8 * kv_heads, 2, kv_heads] and written["prefix_projection"] is False


def trained(injection: peftcore.Injection) -> None:
    with torch.no_grad():
        for each in injection.parameters():
            each.add_(0.5 * torch.randn_like(each))


@pytest.mark.parametrize("name", ["llama", "gpt2", "moe"])
def test_cartridges(name: str, tmp_path: Path) -> None:
    """The frozen rows too, and how many they are; two that act together are peft's that is composed of them."""
    base, run = host(name)
    base = base.eval()
    text = {"input_ids": torch.randint(1, 30, (1, 8))}
    config = peft.CartridgeConfig(**CAUSAL, num_frozen_tokens=2)
    injection = assert_reads(base, config, run, tmp_path)
    assert (injection.method.name, injection.config.length, injection.config.frozen) == ("cartridge", LENGTH, 2)
    options = {"length": LENGTH, "frozen": 2, "data": [text]}
    written = assert_writes(base, "cartridge", options, run, tmp_path)
    assert (written["peft_type"], written["num_frozen_tokens"]) == ("CARTRIDGE", 2)
    ours = deepcopy(base)
    for each in ("one", "two"):
        own = peftcore.apply(ours, "cartridge", name=each, length=LENGTH, data=[text])
        trained(own)
        own.save(tmp_path / each, format="peft")
    peft.compose_cartridge_adapters([str(tmp_path / "one"), str(tmp_path / "two")], output_path=str(tmp_path / "both"))
    theirs = peft.PeftModel.from_pretrained(deepcopy(base), str(tmp_path / "both")).eval()
    both = deepcopy(base)
    assert peftcore.load(both, tmp_path / "both").config.length == 2 * LENGTH
    with torch.no_grad():
        expected = run(theirs)
        for model in (ours, both):
            torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-5)


def test_a_window_of_attention_is_told_of(tmp_path: Path) -> None:
    """In peft the prefix leaves the window as words do; here all tokens see it."""
    base, run = host("mistral")
    assert base.config.sliding_window == 3
    theirs = saved_by_peft(base, peft.PrefixTuningConfig(**CAUSAL), tmp_path / "theirs")
    with pytest.warns(UserWarning, match="window of 3"):
        injection = peftcore.load(base, tmp_path / "theirs")
    with pytest.warns(UserWarning, match="window of 3"):
        injection.save(tmp_path / "ours", format="peft")
    assert (run(base) - run(theirs.eval())).abs().max() > 0.01


def test_a_head_trains_along_in_a_classifying_decoder(tmp_path: Path) -> None:
    """Peft trains the head of a classifier by itself; in front of soft prompts' paths it puts less."""
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_labels=3
    )
    config.pad_token_id = None
    base = transformers.LlamaForSequenceClassification(config)
    ids = torch.randint(1, 40, (1, 6))

    def run(model: nn.Module) -> Tensor:
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits

    task = {"task_type": "SEQ_CLS", "num_virtual_tokens": LENGTH, "modules_to_save": ["score"]}
    injection = assert_reads(base, peft.PromptTuningConfig(**task), run, tmp_path)
    assert injection.trained_along == ("score.weight",)
    options = {"length": LENGTH, "train": ["score"]}
    written = assert_writes(base, "prompt_tuning", options, run, tmp_path)
    assert (written["task_type"], written["modules_to_save"]) == ("SEQ_CLS", ["score"])


def opened(model: nn.Module) -> None:
    """A gate far from zero, and beyond what a tanh gives."""
    for name, parameter in model.named_parameters():
        if "adaption_gate" in name:
            parameter.data.fill_(1.5)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_adaption_prompts(name: str, layers: int, tmp_path: Path) -> None:
    base, run = host(name)
    config = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=LENGTH, adapter_layers=layers)
    injection = assert_reads(base, config, run, tmp_path, opened)
    assert list(injection.operators) == [f"model.layers.{each}.self_attn:attention" for each in (0, 1)[-layers:]]
    for tanh in (True, False):
        ours, theirs = (host(name)[0] for _ in range(2))
        ours.load_state_dict(base.state_dict())
        theirs.load_state_dict(base.state_dict())
        own = peftcore.apply(ours.eval(), "llama_adapter", length=LENGTH, layers=layers, tanh=tanh)
        for operator in own.operators.values():
            nn.init.constant_(operator.gate, 0.7)
        own.save(tmp_path / f"tanh-{tanh}", format="peft")
        tuned = peft.PeftModel.from_pretrained(theirs, str(tmp_path / f"tanh-{tanh}")).eval()
        assert (run(ours) - run(base)).abs().max() > 0.01
        torch.testing.assert_close(run(tuned), run(ours), rtol=1e-5, atol=1e-5)


def refused(method: str, match: str, path: Path, name: str = "llama", **options: Any) -> None:
    base, _ = host(name)
    injection = peftcore.apply(base, method, **options)
    for each in injection.parameters():
        nn.init.normal_(each)
    with pytest.raises(ExportError, match=match):
        injection.save(path, format="peft")
    assert not path.exists()


def test_what_peft_cannot_hold(tmp_path: Path) -> None:
    path, text = tmp_path / "none", {"input_ids": torch.arange(1, 5)[None]}
    refused("prefix_tuning", "behind=True", path, behind=False)
    refused("prefix_tuning", "gate", path, gate=True)
    refused("prefix_tuning", "every attention", path, target="*layers.0.self_attn")
    refused("prefix_tuning", "this host is an encoder", path, name="bert")
    refused("cartridge", "every attention", path, target="*layers.0.self_attn", length=3, data=[text])
    refused("llama_adapter", "different gates for its heads", path)
    refused("llama_adapter", "top layers", path, target="*layers.0.self_attn")
    refused("llama_adapter", "without o_proj", path, name="gpt2")
    refused("prompt_tuning", "first row", path, name="bert")
    refused("prompt_tuning", "encoder", path, name="t5", target="decoder")


def test_what_is_not_read(tmp_path: Path) -> None:
    base, _ = host("t5")
    saved_by_peft(base, peft.PrefixTuningConfig(**BOTH), tmp_path / "t5")
    with pytest.raises(CheckpointError, match="prefixes of some layers into other layers"):
        peftcore.load(base, tmp_path / "t5")
    base, _ = host("bert")
    task = {"task_type": "SEQ_CLS", "num_virtual_tokens": LENGTH}
    saved_by_peft(base, peft.PromptTuningConfig(**task), tmp_path / "bert")
    with pytest.raises(HostMismatch, match="pools the first row of the prompt"):
        peftcore.load(base, tmp_path / "bert")
    base, _ = host("gpt2")
    config = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=LENGTH, adapter_layers=1)
    saved_by_peft(base, config, tmp_path / "gpt2")
    with pytest.raises(CheckpointError, match="without o_proj"):
        peftcore.load(base, tmp_path / "gpt2")
    base, _ = host("llama")
    saved_by_peft(base, peft.PromptTuningConfig(**CAUSAL), tmp_path / "short")
    config_file = tmp_path / "short" / "adapter_config.json"
    options = json.loads(config_file.read_text())
    config_file.write_text(json.dumps({**options, "num_virtual_tokens": 5}))
    with pytest.raises(CheckpointError, match="has 4 rows, but its options say 5"):
        peftcore.load(base, tmp_path / "short")
    saved_by_peft(base, peft.CartridgeConfig(**CAUSAL, num_frozen_tokens=LENGTH), tmp_path / "frozen")
    with pytest.raises(CheckpointError, match="no trainable token"):
        peftcore.load(base, tmp_path / "frozen")
    config_file.write_text(json.dumps({**options, "invented": 5}))
    with pytest.raises(CheckpointError, match="invented = 5"):
        peftcore.load(base, tmp_path / "short")
