"""One tiny model under all the names that a MODEL can have: a folder, a GGUF file, a folder of one, a folder in an
installed package, a name on the Hub (in the local cache); and one of timm by its architecture."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import timm
import transformers
from timm.models import save_for_hf

HUB, TIMM = "someone/tiny", "timm:test_vit"
WORDS = ("<pad>", "<s>", "</s>", "Ġ", "m", "y", "my", "fine", "phone", "the", "lovely", "awful", "so", "good", "bad")
MERGES = ("m y",)
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }} {{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}a {% endif %}"
)
LAYERS, WIDTH, INNER = 2, 16, 24
SHAPES = {
    "attn_norm": (WIDTH,),
    "attn_q": (WIDTH, WIDTH),
    "attn_k": (WIDTH, WIDTH),
    "attn_v": (WIDTH, WIDTH),
    "attn_output": (WIDTH, WIDTH),
    "ffn_norm": (WIDTH,),
    "ffn_gate": (INNER, WIDTH),
    "ffn_up": (INNER, WIDTH),
    "ffn_down": (WIDTH, INNER),
}


def write_gguf(file: Path) -> Path:
    """Write a random Llama with a tokenizer and a chat template, as llama.cpp lays it out."""
    import gguf

    draw = np.random.default_rng(0)
    out = gguf.GGUFWriter(file, "llama")
    out.add_context_length(64)
    out.add_embedding_length(WIDTH)
    out.add_block_count(LAYERS)
    out.add_feed_forward_length(INNER)
    out.add_head_count(2)
    out.add_head_count_kv(2)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_rope_dimension_count(WIDTH // 2)
    out.add_vocab_size(len(WORDS))
    out.add_tokenizer_model("gpt2")
    out.add_token_list(WORDS)
    out.add_token_types([3, 3, 3, *[1] * (len(WORDS) - 3)])  # of control, then normal ones
    out.add_token_merges(MERGES)
    out.add_pad_token_id(0)
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    out.add_chat_template(TEMPLATE)
    shapes = {"token_embd": (len(WORDS), WIDTH), "output_norm": (WIDTH,), "output": (len(WORDS), WIDTH)}
    shapes |= {f"blk.{layer}.{name}": shape for layer in range(LAYERS) for name, shape in SHAPES.items()}
    for name, shape in shapes.items():
        values = draw.normal(float(len(shape) == 1), 0.3, shape)  # around 1 in norms
        out.add_tensor(f"{name}.weight", values.astype(np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return file


def cached(folder: Path, name: str, cache: Path) -> None:
    """Put a folder into a cache of the Hub, as huggingface_hub lays it out."""
    repository, commit = cache / f"models--{name.replace('/', '--')}", "0" * 40
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit, encoding="utf-8")


@pytest.fixture(scope="session")
def made_names(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Mapping[str, str]]:
    """Where all of it lies, and the names by kind; the dense ones are what transformers reads from the GGUF file."""
    pytest.importorskip("gguf", reason="gguf is not installed")
    place = tmp_path_factory.mktemp("named")
    (place / "ggufs").mkdir()
    file = write_gguf(place / "ggufs" / "tiny.gguf")
    model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    model.hf_quantizer.remove_quantization_config(model)
    model.save_pretrained(place / "dense")
    transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(place / "dense")
    package = place / "installed" / "holds_tiny"
    shutil.copytree(place / "dense", package / "model")
    (package / "__init__.py").write_text("raise AssertionError('it was imported')", encoding="utf-8")
    cached(place / "dense", HUB, place / "hub")
    save_for_hf(timm.create_model(TIMM.removeprefix("timm:")), str(place / "vit"), safe_serialization=True)
    cached(place / "vit", "timm/test_vit.r160_in1k", place / "hub")
    names = {
        "folder": place / "dense",
        "hub": HUB,
        "package": "package:holds_tiny/model",
        "gguf": file,
        "gguf-folder": file.parent,
        "timm": TIMM,
        "timm-folder": place / "vit",
        "timm-hub": "timm/test_vit.r160_in1k",
    }
    return place, {kind: str(name) for kind, name in names.items()}


@pytest.fixture
def names(made_names: tuple[Path, Mapping[str, str]], monkeypatch: pytest.MonkeyPatch) -> Mapping[str, str]:
    """The names by kind; the Hub's are in the local cache, and nothing else is."""
    place, named = made_names
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(place / "hub"))
    monkeypatch.syspath_prepend(str(place / "installed"))
    assert "holds_tiny" not in sys.modules
    return named
