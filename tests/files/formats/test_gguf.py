"""Adapters for llama.cpp: what it makes of the file is what the adapter does.

Bases in GGUF and such files were run in llama.cpp itself (xllamacpp 2026.10.11549) for Llama, Qwen2 and Qwen3: the
log-probabilities of all tokens differ by at most 2e-5.
"""

from pathlib import Path

import pytest
import torch
import transformers
from exported_hosts import SIZES, logits, noisy
from torch import Tensor, nn

import peftcore
from peftcore.errors import CheckpointError, ExportError
from peftcore.files.formats.format import recognize
from peftcore.files.formats.gguf import FILE, GGUF, neighbours

gguf = pytest.importorskip("gguf")
HEADS = {"attn_q": 4, "attn_k": 2}
MODULES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TARGET = [*(path.rpartition(".")[2] for path in MODULES.values()), "lm_head"]


def host(kind: str) -> nn.Module:
    torch.manual_seed(0)
    named = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[kind]
    sizes = {**SIZES, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 20}
    sizes |= {"head_dim": 8, "tie_word_embeddings": False} if kind != "qwen2" else {"tie_word_embeddings": False}
    config = getattr(transformers, f"{named}Config")(**sizes)
    return getattr(transformers, f"{named}ForCausalLM")(config).double().eval()


@torch.no_grad()
def as_llama_cpp(file: Path, kind: str) -> Tensor:
    """Its arithmetic, as of src/llama-adapter.h and llama-graph.cpp: W x + alpha / rank * B A x, where rows of a head
    of Llama's queries and keys alternate between the halves that transformers has."""
    model, read = host(kind), gguf.GGUFReader(file)
    alpha = float(read.fields["adapter.lora.alpha"].contents())
    tensors = {each.name: torch.tensor(each.data).double() for each in read.tensors}
    for name in [name for name in tensors if name.endswith(".lora_a")]:
        stem = name.removesuffix(".weight.lora_a")
        A, B = tensors[name], tensors[f"{stem}.weight.lora_b"]
        leaf = stem.rpartition(".")[2]
        if leaf in HEADS and kind in ("llama", "mistral"):
            width = len(B) // HEADS[leaf]
            rows = [head * width + (i % 2) * (width // 2) + i // 2 for head in range(HEADS[leaf]) for i in range(width)]
            B = torch.empty_like(B).index_copy_(0, torch.tensor(rows), B)
        path = "lm_head" if stem == "output" else f"model.layers.{stem.split('.')[1]}.{MODULES[leaf]}"
        model.get_submodule(path).weight += alpha / len(A) * (B @ A)
    return logits(model)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_what_llama_cpp_computes(kind: str, tmp_path: Path) -> None:
    model = host(kind)
    injection = noisy(model, "rslora", rank=3, target=TARGET, overrides={"*.v_proj": {"rank": 2, "alpha": 5.0}})
    injection.save(tmp_path / "a", format="gguf")
    assert not torch.allclose(logits(model), logits(host(kind)), rtol=1e-2)
    assert torch.allclose(as_llama_cpp(tmp_path / "a" / FILE, kind), logits(model), rtol=1e-4, atol=1e-5)
    read = gguf.GGUFReader(tmp_path / "a" / FILE)
    said = {key: read.fields[key].contents() for key in ("general.type", "adapter.type", "general.architecture")}
    architecture = "llama" if kind == "mistral" else kind
    assert said == {"general.type": "adapter", "adapter.type": "lora", "general.architecture": architecture}


def test_rows_that_are_rotated_together_are_neighbours() -> None:
    assert neighbours(torch.arange(8), 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert neighbours(torch.arange(12).view(6, 2), 1)[:, 0].tolist() == [0, 6, 2, 8, 4, 10]


def test_it_is_recognized_and_not_loaded(tmp_path: Path) -> None:
    noisy(host("llama"), "lora").save(tmp_path / "a", format="gguf")
    assert isinstance(recognize(tmp_path / "a"), GGUF) and not GGUF.recognizes(tmp_path)
    for attempt in (lambda: peftcore.load(host("llama"), tmp_path / "a"), lambda: GGUF().describe(tmp_path / "a")):
        with pytest.raises(CheckpointError, match="written, not read"):
            attempt()


def test_other_methods_models_and_modules_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"llama\.cpp reads low-rank factors"):
        noisy(host("llama"), "dora").save(tmp_path / "a", format="gguf")
    plain = nn.Sequential(nn.Linear(4, 4)).double()
    with pytest.raises(ExportError, match=r"none of transformers.*convert_lora_to_gguf"):
        noisy(plain, "lora", target=["0"]).save(tmp_path / "a", format="gguf")
    model = host("llama")
    model.model.layers[0].extra = nn.Linear(4, 4).double()
    with pytest.raises(ExportError, match=r"no tensor for model\.layers\.0\.extra"):
        noisy(model, "lora", target=["extra"]).save(tmp_path / "a", format="gguf")
    assert not list(tmp_path.iterdir())
