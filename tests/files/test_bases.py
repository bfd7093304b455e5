"""The model that an adapter's file names is built, and nothing that a file names runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import peftcore
from peftcore.errors import CheckpointError, HostMismatch, PeftcoreError
from peftcore.files.auto_classes import AUTO_CLASSES
from peftcore.files.safe_io import TensorFile, write_tensors

transformers: Any = pytest.importorskip("transformers")
SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = torch.arange(1, 9)[None]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without a head for classes, and without a pooler."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    transformers.BertForMaskedLM(transformers.BertConfig(**SIZES)).save_pretrained(folder)
    return folder


def moved(injection: peftcore.Injection) -> peftcore.Injection:
    """The adapter with numbers that change the model."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return injection


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(IDS).logits
    return found


def changed(folder: Path, **updates: Any) -> None:
    """Write other values into the envelope of an adapter's file."""
    path = folder / "adapter.safetensors"
    file = TensorFile(path)
    envelope = {**json.loads(file.metadata["peftcore"]), **updates}
    values = file.read(file.shapes)
    write_tensors(path, values, {"peftcore": json.dumps(envelope)})


@pytest.mark.parametrize("format", ["peftcore", "peft"])
def test_a_model_that_writes(format: str, llama: Path, tmp_path: Path) -> None:
    model = transformers.LlamaForCausalLM.from_pretrained(llama)
    bare = logits(model)
    moved(peftcore.apply(model, "lora", rank=2)).save(tmp_path, format=format)
    found: Any = peftcore.load_base(tmp_path, name="mine")
    assert type(found).__name__ == "LlamaForCausalLM" and not found.training
    assert list(peftcore.injections(found)) == ["mine"] and found.config._name_or_path == str(llama)
    assert torch.equal(logits(found), logits(model)) and not torch.equal(logits(found), bare)
    assert not any(each.requires_grad for each in found.parameters() if each.ndim == 2 and each.shape[0] == 2)
    trained: Any = peftcore.load_base(tmp_path, trainable=True, dtype=torch.float64)
    assert trained.dtype == torch.float64 and peftcore.injections(trained)["lora"].summary().trainable


@pytest.mark.parametrize("format", ["peftcore", "peft"])
def test_a_head_that_the_adapter_brings(format: str, bert: Path, tmp_path: Path) -> None:
    """Its size is that of the file, where the configuration of the base has another one."""
    model = transformers.BertForSequenceClassification.from_pretrained(bert, num_labels=5)
    moved(peftcore.apply(model, "lora", rank=2, train=["classifier", "bert.pooler"])).save(tmp_path, format=format)
    found = peftcore.load_base(tmp_path)
    assert logits(found).shape == (1, 5) and torch.equal(logits(found), logits(model))


def test_a_head_that_nobody_brings_is_not_random(bert: Path, tmp_path: Path) -> None:
    model = transformers.BertForSequenceClassification.from_pretrained(bert)
    moved(peftcore.apply(model, "lora", rank=2)).save(tmp_path)
    with pytest.raises(HostMismatch, match=r"no weights for bert\.pooler\.dense\.bias, .*they would be random"):
        peftcore.load_base(tmp_path)


def test_added_tokens(llama: Path, tmp_path: Path) -> None:
    model = transformers.LlamaForCausalLM.from_pretrained(llama)
    model.resize_token_embeddings(44)
    moved(peftcore.apply(model, "lora", rank=2)).save(tmp_path)
    found = peftcore.load_base(tmp_path)
    assert logits(found).shape[-1] == 44
    torch.testing.assert_close(logits(found), logits(model), rtol=1e-5, atol=1e-7)  # the head is one product, or two


def test_a_base_that_the_caller_names(llama: Path, tmp_path: Path) -> None:
    model = transformers.LlamaForCausalLM.from_pretrained(llama)
    moved(peftcore.apply(model, "lora", rank=2)).save(tmp_path / "adapter")
    changed(tmp_path / "adapter", base=None)
    with pytest.raises(CheckpointError, match="names no base; pass base="):
        peftcore.load_base(tmp_path / "adapter")
    assert torch.equal(logits(peftcore.load_base(tmp_path / "adapter", base=llama)), logits(model))


@pytest.mark.parametrize(
    ("updates", "words"),
    [
        ({"base": "/nowhere/at/all"}, "does not exist; pass base="),
        ({"base": "someone/base"}, "someone/base is not in the hub's cache; pass fetch=True"),
        ({"base": "someone/base", "base_revision": "../../x"}, "not a valid revision of the base"),
        ({"host": "os.system"}, "made on 'os.system', which no Auto class"),
        ({"host": "transformers.models.bert.modeling_bert.BertModel"}, "BertModel', which no Auto class"),
        ({"host": "torch.nn.modules.container.Sequential"}, "no Auto class"),
        ({"host": ""}, "does not say on which class"),
    ],
)
def test_what_a_file_may_not_name(updates: dict[str, str], words: str, llama: Path, tmp_path: Path) -> None:
    model = transformers.LlamaForCausalLM.from_pretrained(llama)
    peftcore.apply(model, "lora", rank=2).save(tmp_path)
    changed(tmp_path, **updates)
    with pytest.raises(CheckpointError, match=words):
        peftcore.load_base(tmp_path)


@pytest.mark.parametrize("known", [True, False])
def test_no_code_of_the_base_runs(known: bool, llama: Path, tmp_path: Path) -> None:
    """A model type of transformers is built by its own class, and any other is refused."""
    base, ran = tmp_path / "base", tmp_path / "ran"
    transformers.LlamaForCausalLM.from_pretrained(llama).save_pretrained(base)
    model = transformers.LlamaForCausalLM.from_pretrained(base)
    moved(peftcore.apply(model, "lora", rank=2)).save(tmp_path / "adapter")
    (base / "evil.py").write_text(f"open({str(ran)!r}, 'w')\n")
    names = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    config = json.loads((base / "config.json").read_text()) | {"auto_map": names}
    config |= {"attn_implementation": "someone/kernels", "_attn_implementation": "someone/kernels"}
    config |= {} if known else {"model_type": "evil"}
    (base / "config.json").write_text(json.dumps(config))
    if known:
        assert torch.equal(logits(peftcore.load_base(tmp_path / "adapter")), logits(model))
    else:
        with pytest.raises(CheckpointError, match="contains its own code, which load_base does not run"):
            peftcore.load_base(tmp_path / "adapter")
    assert not ran.exists()


@pytest.mark.parametrize("name", ["trust_remote_code", "code_revision", "use_safetensors", "local_files_only"])
def test_what_the_caller_may_not_change(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"load_base does not accept {name}="):
        peftcore.load_base(tmp_path, **{name: True})


def test_no_pickle_is_opened(llama: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    model = transformers.LlamaForCausalLM.from_pretrained(llama)
    model.save_pretrained(base)
    torch.save(model.state_dict(), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    peftcore.apply(model, "lora", rank=2).save(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"cannot be built: .*safetensors"):
        peftcore.load_base(tmp_path / "adapter", base=base)


def test_a_base_that_is_an_adapter_itself(llama: Path, tmp_path: Path) -> None:
    """Transformers would open another base then, the one that this one names."""
    model = transformers.LlamaForCausalLM.from_pretrained(llama)
    injection = peftcore.apply(model, "lora", rank=2)
    model.save_pretrained(tmp_path / "base")
    injection.save(tmp_path / "base", format="peft")
    injection.save(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="it is an adapter itself"):
        peftcore.load_base(tmp_path / "adapter", base=tmp_path / "base")


def test_another_base_is_refused(llama: Path, tmp_path: Path) -> None:
    model = transformers.LlamaForCausalLM.from_pretrained(llama)
    peftcore.apply(model, "lora", rank=2).save(tmp_path / "adapter")
    wider = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, "hidden_size": 32}))
    wider.save_pretrained(tmp_path / "wider")
    with pytest.raises(HostMismatch, match="another base"):
        peftcore.load_base(tmp_path / "adapter", base=tmp_path / "wider")


def test_every_error_is_ours(tmp_path: Path) -> None:
    with pytest.raises(PeftcoreError, match="does not exist"):
        peftcore.load_base(tmp_path / "none")


def test_the_list_is_that_of_transformers() -> None:
    for name, (mapping, _) in AUTO_CLASSES.items():
        assert issubclass(getattr(transformers, name), transformers.models.auto.auto_factory._BaseAutoModelClass)
        assert len(getattr(transformers, mapping)), mapping


def test_a_configuration_writes_nothing_to_a_terminal(llama: Path, tmp_path: Path) -> None:
    """What another library says about it is one line of characters that can be printed."""
    model = transformers.LlamaForCausalLM.from_pretrained(llama)
    peftcore.apply(model, "lora", rank=2).save(tmp_path / "adapter")
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text(json.dumps({"model_type": "\x1b[2J\x07evil"}))
    with pytest.raises(CheckpointError, match="cannot be built") as caught:
        peftcore.load_base(tmp_path / "adapter", base=tmp_path / "base")
    assert str(caught.value).isprintable() and "evil" in str(caught.value)
