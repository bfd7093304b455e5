"""What the two attentions of LongLoRA's authors give for states in training, and its derivative by the states, on
tensors of cosines; what their script starts from and trains, with which options:
``python -m peftcore.testing.freeze longlora.py CHECKOUT``.

Their code hands groups to the kernel of flash attention; here a function stands for it that does what its
documentation says: causal attention inside each of the sequences between two entries of `cu_seqlens`."""

import sys
import textwrap
import zlib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from peftcore.registry.evidence import Source
from peftcore.testing import drawn
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "dvlab-research/LongLoRA", "d4eb344", "llama_attn_replace.py")
VERSIONS = ("torch", "transformers", "peft")
ABSENT = ("flash_attn.bert_padding", "flash_attn.flash_attn_interface")
SIZES: dict[str, Any] = {"hidden_size": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 2}


def wave(shape: Sequence[int], key: str) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.cos(torch.arange(count, dtype=torch.float64) * 1.7 + zlib.crc32(key.encode()) % 97).view(*shape) / 2


def kernel(qkv: Tensor, bounds: Tensor, longest: int, dropout: float, softmax_scale: None, causal: bool) -> Tensor:
    """Causal attention of packed tokens, [tokens, 3, heads, width]."""
    assert causal and softmax_scale is None and not dropout and longest == 4
    return torch.cat(
        [
            nn.functional.scaled_dot_product_attention(
                *qkv[start:stop].permute(1, 2, 0, 3).unsqueeze(1), is_causal=True
            )[0].transpose(0, 1)
            for start, stop in pairwise(bounds.tolist())
        ]
    )


def unpad(x: Tensor, mask: Tensor) -> tuple[Tensor, None, Tensor, int]:
    """Pack rows that have no padding."""
    assert mask.all()
    rows, length = x.shape[:2]
    return x.flatten(0, 1), None, torch.arange(rows + 1, dtype=torch.int32) * length, length


def attention() -> SimpleNamespace:
    """What their functions ask of a Llama's attention."""
    width = SIZES["hidden_size"]
    module = SimpleNamespace(training=True, num_heads=4, num_key_value_heads=2, num_key_value_groups=2, head_dim=2)
    module.hidden_size, module.config = width, SimpleNamespace(pretraining_tp=1)
    for part, rows in (("q", 8), ("k", 4), ("v", 4), ("o", width)):
        linear = nn.Linear(width, rows, bias=False).double()
        linear.weight.data.copy_(4 * wave((rows, width), f"{part}_proj"))
        setattr(module, f"{part}_proj", linear)
    rotary = LlamaRotaryEmbedding(LlamaConfig(**SIZES))
    module.rotary_emb = lambda v, seq_len: rotary(v, torch.arange(seq_len)[None])
    return module


def numbers(checkout: Path) -> dict[str, Any]:
    """Returns the output ``[1, 16, 8]`` and the derivative of a weighted sum of it, by the kind of attention."""
    sys.modules["flash_attn"] = flash = ModuleType("flash_attn")
    flash.__version__ = "2"  # type: ignore[attr-defined]
    module, found = load(checkout / SOURCE.script, absent=ABSENT), {}
    module.unpad_input, module.flash_attn_varlen_qkvpacked_func = unpad, kernel
    module.pad_input = lambda x, indices, rows, length: x.unflatten(0, (rows, length))
    hidden = torch.full((16, 16), torch.finfo(torch.float64).min, dtype=torch.float64).triu(1)[None, None]
    masks = {"flash": torch.ones(1, 16, dtype=torch.bool), "noflash": hidden}
    for kind, mask in masks.items():
        states = wave((1, 16, 8), "states").requires_grad_()
        forward = getattr(module, f"forward_{kind}attn")
        output = forward(attention(), states, mask, 1)[0]  # 1: today's apply_rotary_pos_emb has another argument there
        (slope,) = torch.autograd.grad((output * wave((1, 16, 8), "direction")).sum(), [states])
        found[kind] = {"output": output.tolist(), "slope": slope.tolist()}
    return found


def tiny(width: int) -> LlamaForCausalLM:
    sizes: Any = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 9}
    return LlamaForCausalLM(LlamaConfig(hidden_size=width, **sizes))


def adapted(checkout: Path, model: nn.Module) -> tuple[Any, Any]:
    """Returns the model that the lines of their script make, and their configuration of peft."""
    script = load(checkout / "fine-tune.py", root=checkout, absent=(*ABSENT, "gptneox_attn_replace", "datasets"))
    text = (checkout / "fine-tune.py").read_text()
    lines = text[text.index("    if training_args.low_rank_training:") : text.index("    model.config.use_cache")]
    told = {name: field.default for name, field in script.TrainingArguments.__dataclass_fields__.items()}
    space = {"training_args": SimpleNamespace(**told), "model_args": script.ModelArguments(), "model": model}
    exec(compile(textwrap.dedent(lines), "fine-tune.py", "exec"), space | vars(peft), found := {})
    return found["model"], found["config"]


def start(checkout: Path) -> dict[str, Any]:
    """Returns what A and B of the four matrices of an attention of width 1600 start from."""
    named = dict(adapted(checkout, tiny(1600))[0].named_parameters())
    factors = {
        key: torch.cat([each.flatten() for name, each in named.items() if f"lora_{key}" in name]) for key in "AB"
    }
    return {key: drawn(each) for key, each in factors.items()}


def trains(checkout: Path) -> dict[str, int]:
    """Returns what trains of a small Llama, by name: how many numbers."""
    named = adapted(checkout, tiny(8))[0].named_parameters()
    return {name.removeprefix("base_model.model."): each.numel() for name, each in named if each.requires_grad}


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the options of the lines of their script, the share of a group, and what trains along by default."""
    sys.modules["flash_attn"] = flash = ModuleType("flash_attn")
    flash.__version__ = "2"  # type: ignore[attr-defined]
    ratio = load(checkout / SOURCE.script, absent=ABSENT).group_size_ratio
    model, config = adapted(checkout, tiny(8))
    trained = {name for name, each in model.named_parameters() if each.requires_grad}
    along = {
        f"train_{key}s": any(word in name for name in trained)
        for key, word in (("norm", "norm"), ("embedding", "embed"))
    }
    return {"rank": config.r, "alpha": config.lora_alpha, "dropout": config.lora_dropout, "group_ratio": ratio, **along}
