"""What the ladder of LST's authors makes of the states of a small T5 encoder, in float64, on tensors of cosines:
``python -m peftcore.testing.freeze lst.py CHECKOUT``.

Blocks of their side network are of the backbone's kind, and so is the norm behind them; those of `lst` are the same in
all hosts. Torch's own blocks of that kind, and its norm, stand here in the place of theirs: numbers are of what the
ladder does around them. Their transformers does not run here as a whole; the stack needs little of it.
"""

import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor, nn

from peftcore.registry.evidence import Source
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "ylsung/Ladder-Side-Tuning", "1798e82", "seq2seq/third_party/models/t5/modeling_side_t5.py")
VERSIONS = ("torch",)
ABSENT = ("transformers.activations", "transformers.file_utils", "transformers.utils", "seq2seq.adapters")
ABSENT += ("seq2seq.third_party.models.t5.modeling_side_outputs", "seq2seq.third_party.models.t5.configuration_t5")
ABSENT += ("seq2seq.hypercomplex.layers", "seq2seq.hypercomplex.inits")
SIZES: dict[str, Any] = {"vocab_size": 11, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_heads": 2}
SIZES |= {"dropout_rate": 0.0, "layer_norm_epsilon": 1e-6, "relative_attention_num_buckets": 8}
HOST: dict[str, Any] = {
    "feed_forward_proj": "relu",
    "is_decoder": False,
    "use_cache": False,
    "output_attentions": False,
}
HOST |= {"output_hidden_states": False, "use_return_dict": False}
# The ladder of their scripts; gates do not start at zero here.
TUNED: dict[str, Any] = {"use_gate": "learnable", "gate_T": 0.1, "gate_alpha": 0.0, "add_residual_after": False}
TUNED |= {"add_bias_sampling": True, "encoder_side_layers": None, "decoder_side_layers": None}
TUNED |= {"train_task_adapters": False, "prefix_tuning": False}
NARROW = 4
IDS = [[2, 5, 3, 9, 4], [4, 10, 7, 0, 0]]


def wave(shape: Sequence[int], key: str) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.cos(torch.arange(count, dtype=torch.float64) * 1.7 + zlib.crc32(key.encode()) % 97).view(*shape) / 2


class Model(nn.Module):
    """Stands for the base of their models."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def init_weights(self) -> None: ...

    def get_extended_attention_mask(self, mask: Tensor, shape: Any, device: Any) -> Tensor:
        return (1 - mask[:, None, None]) * -10000.0

    def get_head_mask(self, mask: None, layers: int) -> list[None]:
        return [None] * layers


class Block(nn.TransformerEncoderLayer):
    """A block of the side network, called as theirs are."""

    def __init__(self) -> None:
        options: dict[str, Any] = {"activation": "gelu", "batch_first": True, "norm_first": True}
        super().__init__(NARROW, 2, 4 * NARROW, dropout=0.0, **options)

    def forward(self, z: Tensor, attention_mask: Tensor, **others: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        return super().forward(z, src_key_padding_mask=attention_mask[:, 0, 0] < 0), None


def authors(checkout: Path) -> Any:
    """Returns the module of T5. Packages around it are empty."""
    for name in ("transformers", *(f"seq2seq{end}" for end in ("", ".third_party.models", ".third_party.models.t5"))):
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = [str(checkout / name.replace(".", "/"))]
    sys.modules["transformers.utils.model_parallel_utils"] = MagicMock(unsafe=True)  # has names that start with assert
    sys.modules["transformers.modeling_utils"] = MagicMock(PreTrainedModel=Model)
    bases = ("ModelOutput", "BaseModelOutput", "BaseModelOutputWithPastAndCrossAttentions")
    sys.modules["transformers.modeling_outputs"] = MagicMock(**{base: type(base, (), {}) for base in bases})
    mixin = type("GenerationMixin", (), {})
    sys.modules["seq2seq.third_party.generation_utils"] = MagicMock(GenerationMixin=mixin)
    return load(checkout / SOURCE.script, root=checkout, absent=ABSENT)


def numbers(checkout: Path) -> dict[str, Any]:
    """Returns what stands in the place of the last state, ``[2, 5, 8]``, for two rows of which one has padding, and
    gradients of the side network, flat; in training, without dropout."""
    module = authors(checkout)
    limits = {"task_adapter_layers_encoder": None, "task_adapter_layers_decoder": None, "task_adapter_in_decoder": True}
    reduction = SIZES["d_model"] // NARROW
    adapter = SimpleNamespace(task_reduction_factor=reduction, bitfit=False, **limits)
    embeddings = nn.Embedding(SIZES["vocab_size"], SIZES["d_model"])
    stack = module.T5Stack(SimpleNamespace(**SIZES, **HOST, **TUNED), embeddings, adapter_config=adapter).double()
    stack.side_block = nn.ModuleList([Block() for _ in range(SIZES["num_layers"])])
    stack.final_side_layer_norm = nn.LayerNorm(NARROW)
    stack.side_final_upsample = nn.Linear(NARROW, SIZES["d_model"])
    with torch.no_grad():
        for name, parameter in stack.double().train().named_parameters():
            parameter.copy_(wave(parameter.shape, name) / (10 if "gate" in name else 1))
            parameter.requires_grad_("side" in name)
    ids = torch.tensor(IDS)
    *_, side = stack(input_ids=ids, attention_mask=(ids != 0).double(), return_dict=False)
    y = stack.side_final_upsample(side)
    (y.square() * wave(y.shape, "direction"))[ids != 0].sum().backward()
    own = {name: rounded(p.grad) for name, p in stack.named_parameters() if "side" in name}
    return {"output": rounded(y), "gradients": own}


def rounded(tensor: Tensor | None) -> list[float]:
    assert tensor is not None
    return [round(each, 9) for each in tensor.flatten().tolist()]
