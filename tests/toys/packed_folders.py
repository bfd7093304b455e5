"""Quantized models in folders, and the dense weights that they stand for, computed apart from peftcore.

What a library packs, it packs here; folders of GPTQ and AWQ, and of block-wise float8, are packed by hand, since their
codes come from calibration or need a GPU, and read again by the formula of their format.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftcore

VOCABULARY = 40
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUP = 32
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def config(vocabulary: int = VOCABULARY) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(vocab_size=vocabulary, max_position_embeddings=64, **SIZES)


def dense(vocabulary: int = VOCABULARY) -> Any:
    """The model before it is packed; always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config(vocabulary))


def _words(codes: Tensor, dim: int = -1, order: list[int] | None = None) -> Tensor:
    """Codes of four bits, eight of a dimension in an int32."""
    parts = codes.movedim(dim, -1).to(torch.int64).unflatten(-1, (-1, 8))
    parts = parts if order is None else parts[..., order]
    words = sum((parts[..., index] << (4 * index) for index in range(8)), torch.zeros((), dtype=torch.int64))
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).movedim(-1, dim).contiguous()


def _four_bits(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes ``[out, in]``, scales and zeros ``[out, groups]``, and what they stand for."""
    groups = weight.unflatten(1, (-1, GROUP))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = ((high - low) / 15).half().float()
    zero = (-low / scale).round().clamp(1, 15)
    codes = (groups / scale[..., None] + zero[..., None]).round().clamp(0, 15)
    return codes.flatten(1), scale, zero, ((codes - zero[..., None]) * scale[..., None]).flatten(1)


def _gptq(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    codes, scale, zero, stands = _four_bits(weight)
    of_group = (torch.arange(weight.shape[1]) // GROUP).int()
    scales = scale.T.half().contiguous()
    return {"qweight": _words(codes.T, 0), "qzeros": _words(zero.T - 1), "scales": scales, "g_idx": of_group}, stands


def _awq(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    codes, scale, zero, stands = _four_bits(weight)
    packed = {"qweight": _words(codes.T, order=AWQ_ORDER), "qzeros": _words(zero.T, order=AWQ_ORDER)}
    return {**packed, "scales": scale.T.half().contiguous()}, stands


def _float8(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    blocks = weight.unflatten(1, (-1, GROUP)).unflatten(0, (-1, GROUP))  # [out / 32, 32, in / 32, 32]
    scale = blocks.abs().amax((1, 3)) / 448
    codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    stands = (codes.float() * scale[:, None, :, None]).flatten(2).flatten(0, 1)
    return {"weight": codes.flatten(2).flatten(0, 1), "weight_scale_inv": scale}, stands


def _ct4(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    groups = weight.unflatten(1, (-1, GROUP))
    scale = groups.abs().amax(-1) / 7
    codes = (groups / scale[..., None]).round().clamp(-8, 7)
    packed = {"weight_packed": _words(codes.flatten(1) + 8), "weight_scale": scale}
    return {**packed, "weight_shape": torch.tensor(weight.shape)}, (codes * scale[..., None]).flatten(1)


@dataclass(frozen=True)
class Form:
    """One way in which a folder is packed."""

    distribution: str
    """Of the library that packs and reads it."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """What stands in the folder's config, where it is packed by hand."""
    by_hand: Callable[[Tensor], tuple[dict[str, Tensor], Tensor]] | None = None
    quantizing: Callable[[], Any] | None = None
    """transformers' configuration, where the library packs it."""
    scheme: str = ""
    """Of `peftcore.quantize`, where transformers does not load it; its folder is the dense one."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of that scheme."""
    tolerance: float = 1e-5
    """How far outputs may be from those of the weights in float32, relative to their norm: a kernel in half precision,
    or inputs that are rounded too."""

    @property
    def installed(self) -> bool:
        return version(self.distribution) is not None


def version(distribution: str) -> str | None:
    """The installed version."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torchao(name: str, **options: Any) -> Any:
    import torchao.quantization

    return transformers.TorchAoConfig(getattr(torchao.quantization, name)(**options))


def _torchao_int4() -> Any:
    from torchao.quantization import PerGroup

    return _torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity=PerGroup(GROUP))


def _nf4() -> Any:
    return transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False}
GPTQ |= {"checkpoint_format": "gptq", "lm_head": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
AWQ |= {"modules_to_not_convert": ["lm_head"]}
FLOAT8 = {"quant_method": "fp8", "weight_block_size": [GROUP, GROUP], "activation_scheme": "dynamic"}
FLOAT8 |= {"modules_to_not_convert": ["lm_head"]}
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
COMPRESSED = {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"]}
COMPRESSED |= {"quantization_status": "compressed"}
COMPRESSED |= {"config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}}}
TRAINABLE = {"backend": "auto_trainable"}
FORMS: dict[str, Form] = {
    "bitsandbytes nf4": Form("bitsandbytes", quantizing=_nf4),
    "bitsandbytes fp4": Form(
        "bitsandbytes",
        quantizing=lambda: transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    ),
    "bitsandbytes int8": Form(
        "bitsandbytes", quantizing=lambda: transformers.BitsAndBytesConfig(load_in_8bit=True), tolerance=0.03
    ),
    "torchao int8": Form("torchao", quantizing=lambda: _torchao("Int8WeightOnlyConfig")),
    "torchao float8": Form("torchao", quantizing=lambda: _torchao("Float8WeightOnlyConfig")),
    "torchao int4": Form("torchao", quantizing=_torchao_int4),
    "torchao int8, inputs too": Form(
        "torchao", quantizing=lambda: _torchao("Int8DynamicActivationInt8WeightConfig"), tolerance=0.03
    ),
    "HQQ": Form("hqq", scheme="hqq-4", options={"group_size": GROUP}),
    "peftcore nf4": Form("peftcore-quantized", scheme="nf4"),
    "peftcore int8": Form("peftcore-quantized", scheme="int8"),
    "quanto int8": Form("optimum-quanto", quantizing=lambda: transformers.QuantoConfig(weights="int8")),
    "quanto int4": Form("optimum-quanto", quantizing=lambda: transformers.QuantoConfig(weights="int4")),
    "GPTQ": Form("gptqmodel", {**GPTQ, **TRAINABLE}, _gptq, tolerance=2e-3),
    "AWQ": Form("gptqmodel", {**AWQ, **TRAINABLE}, _awq, tolerance=2e-3),
    "compressed-tensors": Form("compressed-tensors", COMPRESSED, _ct4),
    "compressed-tensors, dequantized": Form("compressed-tensors", {**COMPRESSED, "dequantize": True}, _ct4),
    "float8 of transformers": Form("transformers", FLOAT8, _float8),
}


def write(name: str, folder: Path, vocabulary: int = VOCABULARY) -> Path:
    """Write the folder of a form: packed, or dense where its library packs as it loads and cannot write."""
    form, model = FORMS[name], dense(vocabulary)
    model.save_pretrained(folder)
    if form.by_hand is not None:
        state = load_file(folder / "model.safetensors")
        for key in [key for key in state if key.endswith("_proj.weight")]:
            packed, _ = form.by_hand(state.pop(key))
            state |= {f"{key.removesuffix('weight')}{part}": value for part, value in packed.items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**settings, "quantization_config": dict(form.config)}))
    elif form.quantizing is not None and (packs := load(name, folder)).hf_quantizer.is_serializable():
        packs.save_pretrained(folder / "packed")
        return folder / "packed"
    return folder


def load(name: str, folder: Path) -> Any:
    """The model in a folder; its library packs one that is dense."""
    form = FORMS[name]
    said = "quantization_config" in json.loads((folder / "config.json").read_text())
    how = {} if said or form.quantizing is None else {"quantization_config": form.quantizing()}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=torch.float32, **how)
    return peftcore.quantize(model, form.scheme, **form.options) if form.scheme else model


def reference(name: str, folder: Path) -> Any:
    """The model in float32 with the weights that the packed ones stand for: by the formula of the format, or what the
    packed module, as its library runs it, makes of the identity."""
    form, model = FORMS[name], dense()
    packed = load(name, folder).train() if form.by_hand is None else None
    for path, module in model.named_modules():
        if not isinstance(module, nn.Linear) or path == "lm_head":
            continue
        if form.by_hand is not None:
            module.weight.data = form.by_hand(module.weight.data)[1]
        else:
            assert packed is not None
            with torch.no_grad():
                module.weight.data = packed.get_submodule(path)(torch.eye(module.in_features)).T.contiguous()
    return model
