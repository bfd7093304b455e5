"""Writes the folders beside it: adapters of the package `adapters` (1.3.0, with transformers 4.57.6), and what its
models computed with them, in float64, for a batch with padding. Run once, in an environment of its own: ``python
record.py``, or with the names of some of the folders.

Hosts are not written down: their numbers are waves, see `host`. As the package saves prefixes in pickles alone, all is
saved so and then converted.
"""

import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import adapters
import torch
import transformers
from adapters import (
    AdapterFusionConfig,
    ConfigUnion,
    DiReftConfig,
    DoubleSeqBnConfig,
    LoRAConfig,
    LoReftConfig,
    MAMConfig,
    NoReftConfig,
    ParBnConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    ReftConfig,
    SeqBnConfig,
)
from adapters.composition import Fuse
from safetensors.torch import save_file

HERE = Path(__file__).parent
SIZES = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 16}
SIDES = {"vocab_size": 11, "d_model": 8, "encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 12}
SIDES |= {"decoder_ffn_dim": 12, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
SIDES |= {"max_position_embeddings": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
EAGER = {"attn_implementation": "eager"}
"""With "sdpa" that version masks the prefixes of causal models out, and shows padding to prompts."""
IDS = torch.tensor([[1, 5, 3, 9, 2, 7], [4, 4, 10, 6, 0, 0]])
INPUTS = {"input_ids": IDS, "attention_mask": (IDS != 0).long()}
DECODED = {"decoder_input_ids": torch.tensor([[2, 3, 4], [2, 5, 6]])}

FLAT, NETWORK = PrefixTuningConfig(flat=True, prefix_length=3), PrefixTuningConfig(prefix_length=3, bottleneck_size=5)
SEQUENTIAL = SeqBnConfig(reduction_factor=2)
BRANCH = SeqBnConfig(reduction_factor=2, original_ln_before=False)
BEHIND = SeqBnConfig(reduction_factor=2, original_ln_after=False, residual_before_ln=False)
CONFIGS: dict[str, Any] = {
    "bert-prefix": FLAT,
    "bert-prefix_network": NETWORK,
    "bert-prefix_ejected": NETWORK,
    "llama-prefix": PrefixTuningConfig(flat=True, prefix_length=3, leave_out=[1], dropout=0.1),
    "llama-prefix_network": PrefixTuningConfig(prefix_length=3, bottleneck_size=5, non_linearity="relu"),
    "bart-prefix": PrefixTuningConfig(flat=True, prefix_length=3, leave_out=[1, 3]),
    "bart-prefix_network": NETWORK,
    "bert-mam": MAMConfig(NETWORK, ParBnConfig(reduction_factor=2)),
    "bert-prompt": PromptTuningConfig(prompt_length=3, combine="prefix_after_bos"),
    "tagger-prompt": PromptTuningConfig(prompt_length=3),
    "bert-reft": LoReftConfig(r=2),
    "llama-reft_ends": LoReftConfig(r=2, prefix_positions=2, suffix_positions=3),
    "bert-reft_tied": ReftConfig([0, 2], 3, 2, 2, orthogonality=True, tied_weights=True, non_linearity="relu"),
    "llama-reft_free": NoReftConfig(r=2, prefix_positions=2, suffix_positions=1),
    "bert-reft_direct": DiReftConfig(r=2, prefix_positions=2, suffix_positions=1),
    "llama-union": ConfigUnion(FLAT, LoRAConfig(r=2, alpha=6), ParBnConfig(reduction_factor=2)),
    "bert-branch": BRANCH,
    "tagger-branch_attention": DoubleSeqBnConfig(reduction_factor=2, output_adapter=False),
    "bert-behind": BEHIND,
    "llama-behind": BEHIND,
}
FULL = AdapterFusionConfig(
    key=True,
    query=True,
    value=True,
    query_before_ln=False,
    regularization=False,
    residual_before=False,
    temperature=False,
    value_before_softmax=False,
    value_initialized=False,
    dropout_prob=0.25,
)
FUSIONS: dict[str, tuple[Any, Any]] = {
    "llama-dynamic": ("dynamic", SEQUENTIAL),
    "llama-static": ("static", SEQUENTIAL),
    "llama-both": ("static", DoubleSeqBnConfig(reduction_factor=2)),
    "bert-dynamic": ("dynamic", SEQUENTIAL),
    "bert-static": ("static", SEQUENTIAL),
    "tagger-static": ("static", SEQUENTIAL),
    "tagger-full": (FULL, SEQUENTIAL),
    "bert-branch": ("dynamic", BRANCH),
    "bert-both": ("dynamic", DoubleSeqBnConfig(reduction_factor=2)),
    "bert-behind": ("dynamic", BEHIND),
}
"""Options of a fusion, and of the adapters that it fuses."""
LAST: dict[str, Callable[[Any], None]] = {"bert-prefix_ejected": lambda model: model.eject_prefix_tuning("trained")}
"""What is done before saving."""
SINGLE = ("bert-reft",)
"""In float32: the package makes an end of no positions in it."""


@torch.no_grad()
def host(name: str) -> Any:
    """The same numbers as in tests/files/formats/test_adapterhub_padded.py."""
    if name == "bert":
        model = transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, **EAGER))
    elif name == "tagger":
        model = transformers.RobertaForTokenClassification(transformers.RobertaConfig(**SIZES, **EAGER, pad_token_id=0))
    elif name == "llama":
        model = transformers.LlamaModel(transformers.LlamaConfig(**SIZES, **EAGER, num_key_value_heads=2))
    else:
        model = transformers.BartModel(transformers.BartConfig(**SIDES, **EAGER))
    model = model.double().eval()
    for index, (_, parameter) in enumerate(sorted(model.named_parameters())):
        wave = torch.sin(torch.arange(parameter.numel(), dtype=torch.float64) * (0.1 + 0.37 * index) + index)
        parameter.copy_(0.5 * wave.view(parameter.shape))
    return model


@torch.no_grad()
def noise(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if ".trained." in name or name.startswith("classifier"):
            values = torch.randn_like(parameter) * (3.0 if "prompt" in name else 0.3)
            parameter.add_(values.tril(-1) if name.endswith("weight.original") else values)  # whose diagonal is signs
    for name, buffer in model.named_buffers():
        if name.endswith("weight.0.base"):
            buffer.copy_(torch.linalg.qr(buffer)[0])  # orthonormal in float64 too


def converted(folder: Path) -> None:
    for path in folder.glob("*.bin"):
        tensors = torch.load(path, weights_only=True)
        save_file(
            {k: v.clone() for k, v in tensors.items()}, folder / f"{path.stem.removeprefix('pytorch_')}.safetensors"
        )
        path.unlink()


def single(kinds: Iterable[str]) -> None:
    for kind in kinds:
        config = CONFIGS[kind]
        name = kind.partition("-")[0]
        model = host(name)
        torch.manual_seed(0)
        adapters.init(model)
        model.add_adapter("trained", config=config)
        model.set_active_adapters("trained")
        model.to(torch.float32 if kind in SINGLE else torch.float64).eval()
        noise(model)
        LAST.get(kind, lambda model: None)(model)
        folder = HERE / kind
        shutil.rmtree(folder, ignore_errors=True)
        model.save_adapter(str(folder), "trained")
        converted(folder)
        with torch.no_grad():
            output = model(**INPUTS, **(DECODED if name == "bart" else {}))[0]
        if kind == "tagger-prompt":
            output = output[:, config.prompt_length :].contiguous()  # the package keeps the prompt's rows
        save_file({"output": output}, folder / "expected.safetensors")


def fused(kind: str) -> None:
    (options, config), name = FUSIONS[kind], kind.partition("-")[0]
    model = host(name)
    torch.manual_seed(0)
    adapters.init(model)
    for adapter in ("trained", "other"):
        model.add_adapter(adapter, config=config)
    setup = Fuse("trained", "other")
    model.add_adapter_fusion(setup, options)
    model.set_active_adapters(setup)
    model.double().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".trained" in key or ".other" in key:
                parameter.add_(torch.randn_like(parameter) * 0.5)
    folder = HERE / f"fusion-{kind}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for adapter in ("trained", "other"):
        model.save_adapter(str(folder / adapter), adapter, use_safetensors=True, with_head=False)
    model.save_adapter_fusion(str(folder / "fusion"), setup, use_safetensors=True)
    with torch.no_grad():
        output = model(**INPUTS)[0]
    save_file({"output": output}, folder / "expected.safetensors")


if __name__ == "__main__":
    made = sys.argv[1:]
    single(kind for kind in CONFIGS if not made or kind in made)
    for kind in FUSIONS:
        if not made or f"fusion-{kind}" in made:
            fused(kind)
