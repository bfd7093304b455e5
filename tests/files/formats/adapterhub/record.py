"""Writes the folders beside it: adapters of the package `adapters` (1.3.0, with transformers 4.57.6), and what its
models computed with them. Run once, in an environment of its own: ``python record.py``.

Hosts are not written down: their numbers are waves, see `host`.
"""

import shutil
from pathlib import Path

import adapters
import torch
import transformers
from adapters import AdapterPlusConfig, DoubleSeqBnConfig, IA3Config, LoRAConfig, ParBnConfig, SeqBnConfig
from safetensors.torch import save_file

HERE = Path(__file__).parent
SIZES = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "max_position_embeddings": 16}
CONFIGS = {
    "seq_bn": SeqBnConfig(reduction_factor=2),
    "double_seq_bn": DoubleSeqBnConfig(reduction_factor=2),
    "par_bn": ParBnConfig(reduction_factor=2),
    "par_bn_learned": ParBnConfig(reduction_factor=2, scaling="learned"),
    "lora": LoRAConfig(r=2, alpha=6, intermediate_lora=True),
    "ia3": IA3Config(),
    "adapter_plus": AdapterPlusConfig(reduction_factor=2),
    "double_seq_bn_scaled": DoubleSeqBnConfig(reduction_factor=2, scaling="channel"),
}


@torch.no_grad()
def host(name: str) -> torch.nn.Module:
    """The same numbers as in tests/files/formats/test_adapterhub.py."""
    if name == "bert":
        model = transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES))
    else:
        model = transformers.LlamaModel(transformers.LlamaConfig(**SIZES))
    for index, parameter in enumerate(model.parameters()):
        wave = torch.sin(torch.arange(parameter.numel(), dtype=torch.float64) * (0.1 + 0.37 * index) + index)
        parameter.copy_(0.5 * wave.view(parameter.shape))
    return model.eval()


for name in ("bert", "llama"):
    for kind, config in CONFIGS.items():
        model = host(name)
        adapters.init(model)
        model.add_adapter("trained", config=config)
        model.set_active_adapters("trained")
        torch.manual_seed(0)
        own = [p for key, p in model.named_parameters() if ".trained." in key or key.startswith("classifier")]
        for parameter in own:
            parameter.data.normal_(0, 0.1)
        folder = HERE / f"{name}-{kind}"
        shutil.rmtree(folder, ignore_errors=True)
        model.save_adapter(str(folder), "trained", use_safetensors=True)
        with torch.no_grad():
            output = model.eval()(torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]))[0]
        save_file({"output": output}, folder / "expected.safetensors")
