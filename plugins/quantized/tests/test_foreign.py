"""Models that other libraries packed, where something is particular: kernels that do not train, what is saved."""

import json
import logging
from pathlib import Path

import packed_folders
import pytest
import torch
import transformers
from packed_lives import IDS, fill, logits, off
from torch import nn

import peftcore
from peftcore.errors import ExportError, UnsupportedHost, UnsupportedSite
from peftcore.registry.plugins import registry


def needs(plugin: str, package: str) -> None:
    pytest.importorskip(package)
    if plugin not in registry().plugins:
        pytest.skip("the entry points that are installed are of before: pip install -e plugins/quantized")


@pytest.mark.parametrize("name", ["GPTQ", "AWQ"])
def test_a_kernel_for_inference_is_refused_before_anything_changes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("gptqmodel", "gptqmodel")
    model = packed_folders.load(name, packed_folders.write(name, tmp_path))
    kernel = model.model.layers[0].self_attn.q_proj
    before = {path: type(module) for path, module in model.named_modules()}
    monkeypatch.setattr(type(kernel), "SUPPORTS_TRAINING", False)
    with pytest.raises(UnsupportedHost, match="auto_trainable"):
        peftcore.apply(model, "lora")
    monkeypatch.undo()
    kernel.linear_mode = "inference"
    with pytest.raises(UnsupportedHost, match="load the model again"):
        peftcore.apply(model, "lora")
    assert {path: type(module) for path, module in model.named_modules()} == before
    kernel.linear_mode = None
    peftcore.apply(model, "lora")


@pytest.mark.parametrize("name", ["GPTQ", "AWQ"])
def test_evaluation_in_half_precision_leaves_the_gradient(name: str, tmp_path: Path) -> None:
    """There these kernels arrange their codes for inference, and no gradient would go through them any more."""
    needs("gptqmodel", "gptqmodel")
    model = packed_folders.load(name, packed_folders.write(name, tmp_path)).bfloat16()
    injection = peftcore.apply(model, "lora", target="all-linear", seed=0)
    fill(injection)

    def gradients() -> list[torch.Tensor]:
        loss = model.train()(IDS).logits.float().square().sum()
        return list(torch.autograd.grad(loss, list(injection.parameters())))

    before = gradients()
    with torch.no_grad():
        model.eval()(IDS)
    assert all(torch.equal(one, other) and one.any() for one, other in zip(gradients(), before, strict=True))


def test_torchao_that_quantizes_inputs_is_refused_and_made_dense(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    name = "torchao int8, inputs too"
    model = packed_folders.load(name, packed_folders.write(name, tmp_path))
    with pytest.raises(UnsupportedHost, match=r"peftcore\.dequantize"):
        peftcore.apply(model, "lora")
    assert "_peftcore" not in str(vars(model).keys())
    assert peftcore.apply(peftcore.dequantize(model), "lora").summary().sites


class Coded(nn.Module):
    """A layer of a format that nobody here knows."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.zeros(4, 4, dtype=torch.int32))


class Opaque(nn.Linear):
    """A layer whose weight is of a byte."""

    def __init__(self) -> None:
        super().__init__(4, 4, bias=False)
        self.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)


@pytest.mark.parametrize("layer", [Coded, Opaque])
def test_what_nobody_reads_is_not_made_dense_in_name_alone(layer: type[nn.Module]) -> None:
    """The config went, the codes stayed: what was saved loaded as something else."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=8, **sizes))
    model.config.quantization_config = {"quant_method": "toy"}
    model.extra = layer()
    with pytest.raises(UnsupportedSite, match="read"):
        peftcore.dequantize(model)
    assert model.config.quantization_config == {"quant_method": "toy"}
    peftcore.quantize(model, "int8", target="up_proj")
    peftcore.apply(model, "lora", target="up_proj").bake()
    assert model.config.quantization_config == {"quant_method": "toy"}
    with pytest.raises(ExportError):
        model.save_pretrained("nowhere")
    assert not Path("nowhere").exists()


def test_a_packed_folder_is_written_again_from_a_packed_folder(tmp_path: Path) -> None:
    """transformers alone fails here: it cannot turn back how it read the folder."""
    pytest.importorskip("bitsandbytes")
    folder = packed_folders.write("bitsandbytes nf4", tmp_path / "first")
    model = packed_folders.load("bitsandbytes nf4", folder)
    expected = logits(model)
    peftcore.apply(model, "lora")
    model.save_pretrained(tmp_path / "second")
    assert "quantization_config" in json.loads((tmp_path / "second" / "config.json").read_text())
    assert torch.equal(logits(packed_folders.load("bitsandbytes nf4", tmp_path / "second")), expected)


def test_a_gguf_file_trains_is_baked_and_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """transformers makes it dense as it reads it, and calls it quantized all the same."""
    pytest.importorskip("gguf")
    from named_models import write_gguf

    from peftcore.training import PeftcoreCallback

    file = write_gguf(tmp_path / "model.gguf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name)
    injection = peftcore.apply(model, "lora", seed=0)
    ids = torch.tensor([3, 4, 5])
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, save_steps=1, use_cpu=True, report_to="none", disable_tqdm=True, learning_rate=0.05
    )
    rows = [{"input_ids": ids, "labels": ids}] * 4
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[PeftcoreCallback()])
    trainer.train()
    with caplog.at_level(logging.WARNING, "peftcore"):
        trainer.save_model(str(tmp_path / "saved"))
    fresh = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name)
    peftcore.load(fresh, tmp_path / "saved")
    with torch.no_grad():
        expected = model.eval()(ids[None]).logits
        assert torch.equal(fresh.eval()(ids[None]).logits, expected)
        injection.bake()
        peftcore.dequantize(model).save_pretrained(tmp_path / "baked")
        found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "baked").eval()
        assert off(found(ids[None]).logits, expected) <= 1e-5
