"""Adapters for llama.cpp: what it makes of the file is what the adapter does.

Bases in GGUF and such files were run in llama.cpp itself (xllamacpp 2026.10.11549) for Llama, Qwen2 and Qwen3: the
log-probabilities of all tokens differ by at most 2e-5.
"""

from pathlib import Path

import pytest
import torch
import transformers
from exported_hosts import SIZES, logits, noisy
from gguf_files import PAIR, written
from torch import Tensor, nn

import peftcore.files.save_load
from peftcore.errors import CheckpointError, ExportError
from peftcore.files.formats.format import recognize
from peftcore.files.formats.gguf import FILE, GGUF, neighbours
from peftcore.files.formats.gguf_header import GGUFFile
from peftcore.files.readers.check import check
from peftcore.files.readers.reader import reader_named

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


def test_it_is_described_and_not_loaded(tmp_path: Path) -> None:
    """The header is what the package gguf reads."""
    noisy(host("llama"), "lora", rank=3, target=TARGET).save(tmp_path / "a", format="gguf")
    assert isinstance(recognize(tmp_path / "a"), GGUF) and not GGUF.recognizes(tmp_path)
    read = gguf.GGUFReader(tmp_path / "a" / FILE)
    for path in (tmp_path / "a", tmp_path / "a" / FILE):
        about = GGUF().describe(path)
        (file,) = about.files
        assert {name: [*shape] for name, shape in file.shapes.items()} == {
            each.name: [*map(int, each.shape)][::-1] for each in read.tensors
        }
        said = {key: field.contents() for key, field in read.fields.items() if not key.startswith("GGUF.")}
        assert isinstance(file, GGUFFile) and file.options == said and set(file.dtypes.values()) == {torch.float32}
        assert about.kind == "lora" and about.host == "llama" and "blk.0.attn_q.weight" in about.sites
        assert about.options == {"adapter.type": "lora", "adapter.lora.alpha": 3.0} and len(about.sites) == 15
        assert "does not load them" in about.problem and peftcore.files.save_load.describe(path) == about
    with pytest.raises(CheckpointError, match="does not load them"):
        peftcore.load(host("llama"), tmp_path / "a")


def test_what_llama_cpp_does_with_a_file(tmp_path: Path) -> None:
    reader = reader_named("llama.cpp")
    options = {"adapter_type": "lora", "adapter_lora_alpha": 8.0, "general_tags": ["a", "b"]}
    good = check(written(tmp_path / "good.gguf", "adapter", PAIR, **options), reader)
    assert good.as_trained and [row.what for row in good.rows if row.tensors] == ["blk.0.attn_q"]
    norms = {**PAIR, "blk.0.attn_norm.weight": torch.ones(4), "blk.0.attn_q.bias": torch.ones(6)}
    report = check(written(tmp_path / "b.gguf", "adapter", norms, adapter_type="lora"), reader)
    verdicts = {row.what: row.verdict.value for row in report.rows if row.verdict != "read"}
    assert verdicts == {"blk.0.attn_norm.weight": "dropped", "blk.0.attn_q.bias": "refused"}
    other = check(written(tmp_path / "c.gguf", "adapter", PAIR, adapter_type="hira"), reader)
    assert other.verdict == "refused" and "of the type lora" in other.reasons[0]
    assert check(written(tmp_path / "d.gguf", "adapter", PAIR), reader).verdict == "refused"
    [row] = check(tmp_path / "good.gguf", reader_named("vllm")).rows
    assert row.verdict == "refused" and row.why.endswith("export writes one from the original adapter")


def test_files_that_are_no_adapter_are_refused(tmp_path: Path) -> None:
    reader = reader_named("llama.cpp")
    with pytest.raises(CheckpointError, match=r"not an adapter: its general\.type is 'model'"):
        check(written(tmp_path / "a.gguf", "model", PAIR), reader)
    with pytest.raises(CheckpointError, match=r"lora_b without the other factor"):
        check(written(tmp_path / "b.gguf", "adapter", {"x.weight.lora_b": torch.ones(2, 2)}), reader)


def test_other_methods_models_and_modules_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"llama\.cpp reads only low-rank factors"):
        noisy(host("llama"), "dora").save(tmp_path / "a", format="gguf")
    plain = nn.Sequential(nn.Linear(4, 4)).double()
    with pytest.raises(ExportError, match=r"not for models outside of transformers.*convert_lora_to_gguf"):
        noisy(plain, "lora", target=["0"]).save(tmp_path / "a", format="gguf")
    model = host("llama")
    model.model.layers[0].extra = nn.Linear(4, 4).double()
    with pytest.raises(ExportError, match=r"no tensor for model\.layers\.0\.extra"):
        noisy(model, "lora", target=["extra"]).save(tmp_path / "a", format="gguf")
    assert not list(tmp_path.iterdir())
