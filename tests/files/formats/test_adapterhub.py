"""Folders of AdapterHub's `adapters` 1.3.0, written by adapterhub/record.py with the outputs of its models."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import peftcore
from peftcore.errors import CheckpointError, HostMismatch

FOLDERS = sorted(path.parent for path in Path(__file__).parent.glob("adapterhub/*/expected.safetensors"))
SIZES = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "max_position_embeddings": 16}
METHODS = {
    "seq_bn": "pfeiffer_adapter",
    "double_seq_bn": "houlsby_adapter",
    "par_bn": "parallel_adapter",
    "par_bn_learned": "parallel_adapter",
    "lora": "lora",
    "ia3": "ia3",
    "adapter_plus": "pfeiffer_adapter",
    "double_seq_bn_scaled": "houlsby_adapter",
}
CHANGES = [
    ("config", "dropout", 0.1),
    ("config", "phm_layer", True),
    ("config", "scaling", "loud"),
    ("config", "residual_before_ln", "post_add"),
    ("config", "ln_after", True),
    ("config", "non_linearity", "gelu_fast"),
    ("config", "mh_adapter", True),
    ("config", "unheard_of", 1),
    ("config", "architecture", "mtl_lora"),
    (None, "unheard_of", 1),
]


@torch.no_grad()
def host(name: str) -> nn.Module:
    """The same numbers as in record.py."""
    if name == "bert":
        model = transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES))
    else:
        model = transformers.LlamaModel(transformers.LlamaConfig(**SIZES))
    for index, parameter in enumerate(model.parameters()):
        wave = torch.sin(torch.arange(parameter.numel(), dtype=torch.float64) * (0.1 + 0.37 * index) + index)
        parameter.copy_(0.5 * wave.view(parameter.shape))
    return model.eval()


@torch.no_grad()
def output(model: nn.Module) -> Tensor:
    first: Tensor = model(torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]))[0]
    return first


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_what_the_package_computed(folder: Path, tmp_path: Path) -> None:
    name, _, kind = folder.name.partition("-")
    model, expected = host(name), load_file(folder / "expected.safetensors")["output"]
    assert difference(output(model), expected) > 1e-2
    injection = peftcore.load(model, folder)
    assert injection.method.name == METHODS[kind]
    assert difference(output(model), expected) < 1e-5
    injection.save(tmp_path / "native")
    again = host(name)
    peftcore.load(again, tmp_path / "native")
    assert torch.equal(output(again), output(model))


def test_on_the_encoder_alone() -> None:
    """The head in the folder has no place there: that is said, and passed over only when asked for."""
    folder, whole = next(each for each in FOLDERS if each.name == "bert-seq_bn"), host("bert")
    with pytest.raises(CheckpointError, match=r"unknown classifier.bias in model_head.safetensors"):
        peftcore.load(whole.bert, folder)
    peftcore.load(whole.bert, folder, strict=False)
    other = host("bert")
    peftcore.load(other, folder)
    inputs = torch.tensor([[1, 2, 3, 4]])
    assert torch.equal(whole.bert(inputs)[0], other.bert(inputs)[0])


@pytest.mark.parametrize(("part", "key", "value"), CHANGES)
def test_what_is_not_understood_is_refused_by_name(part: str | None, key: str, value: object, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(next(each for each in FOLDERS if each.name == "bert-seq_bn"), folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (config if part is None else config[part])[key] = value
    (folder / "adapter_config.json").write_text(json.dumps(config))
    model = host("bert")
    before = output(model)
    with pytest.raises(CheckpointError, match=rf"adapter_config.json.*{value if key == 'architecture' else key}"):
        peftcore.load(model, folder)
    assert torch.equal(output(model), before)


def test_pickles_and_other_hosts_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(next(each for each in FOLDERS if each.name == "bert-seq_bn"), folder)
    with pytest.raises(HostMismatch, match=r"bert\.encoder\.layer\.0"):
        peftcore.load(host("llama"), folder)
    (folder / "adapter.safetensors").rename(folder / "pytorch_adapter.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_adapter.bin.*pickle"):
        peftcore.load(host("bert"), folder)
