"""What two modules of tiny attention of its authors give one behind the other, as in their layer of RoBERTa, on tensors
of sines: ``python -m peftcore.testing.freeze tiny_attention_adapter.py CHECKOUT``.

What trains says their model, which derives from that of an older transformers. PYTHONPATH begins with a folder into
which ``pip install --target FOLDER --no-deps transformers==4.41.2 tokenizers==0.19.1 huggingface_hub==0.23.5`` put it.
"""

import ast
import inspect
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftcore.registry.evidence import Source
from peftcore.testing import drawn
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "cindermond/tiny-attn", "03eee7e", "rewriter/model/tiny_attn.py")
VERSIONS = ("torch", "transformers")
WIDTH, HEADS, COUNT = 4, 2, 2


def wave(*shape: int, step: float) -> Tensor:
    return (torch.arange(math.prod(shape), dtype=torch.float64) * step + step).sin().view(shape)


def numbers(checkout: Path) -> dict[str, list[float]]:
    """Returns the output, and the gradients of the input and of all tensors, each flat: ``"0.norm.weight"``."""
    module = load(checkout / SOURCE.script)
    layers = [module.TinyAttention(6, 6, WIDTH, HEADS, attention_dropout=0.0).double() for _ in range(COUNT)]
    with torch.no_grad():
        for index, layer in enumerate(layers):
            for place, (_, tensor) in enumerate(sorted(layer.named_parameters())):
                tensor.copy_(wave(*tensor.shape, step=0.7 + 0.3 * place + 0.11 * index))
    h = wave(2, 5, 6, step=0.9).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    y = h
    for layer in layers:
        y = y + layer.train()(y, mask) / COUNT
    (y * wave(2, 5, 6, step=0.3) * mask[..., None]).sum().backward()
    assert h.grad is not None
    found = {"y": (y * mask[..., None]).flatten().tolist(), "h": h.grad.flatten().tolist()}
    for index, layer in enumerate(layers):
        found |= {f"{index}.{name}": tensor.grad.flatten().tolist() for name, tensor in layer.named_parameters()}
    return found


def start(checkout: Path) -> dict[str, Any]:
    """Returns what tensors are drawn from, by their names, of a stream 4,200 wide and an attention of 1,400."""
    layer = load(checkout / SOURCE.script).TinyAttention(4200, 4200, 1400)
    return {name: drawn(tensor) for name, tensor in layer.named_parameters()}


def trains(checkout: Path) -> dict[str, list[int]]:
    """Returns the sizes of what trains in a RoBERTa of two layers that classifies, after those statements of their
    script that freeze it; by the layer and their name of a tensor, and by the name in a head of transformers."""
    import transformers

    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    theirs = load(checkout / "rewriter/model/RobertaForSC.py", root=checkout).RobertaForSC
    rest = {"is_rewriter": False, "rewriter_nhead": 1, "rewriter_d_hid": 4, "rewriter_dropout": 0.0}
    rest |= {"rewriter_nlayers": 1, "n_labels": 2, "attention_emd": 1, "structure": "m0"}
    model = theirs(transformers.RobertaConfig(vocab_size=11, **sizes), output_nlayers=1, **rest)
    script = ast.parse((checkout / "rewriter/run/train_rewriter.py").read_text(encoding="utf-8"))
    loops = ("for p in model.roberta.embeddings", "for name, p in model.roberta.encoder")
    told = [each for each in ast.walk(script) if isinstance(each, ast.For) and ast.unparse(each).startswith(loops)]
    assert len(told) == 2
    exec(compile(ast.Module(told, []), "train_rewriter.py", "exec"), {"model": model})  # type: ignore[arg-type]
    found = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            inner = re.fullmatch(r".*layer\.(\d+)\..*tiny_attn\.(.*)", name)
            found[f"{inner[1]}.{inner[2]}" if inner else name.replace("linears.0", "dense")] = list(p.shape)
    return found


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the defaults of their constructor, by the names here."""
    options = inspect.signature(load(checkout / SOURCE.script).TinyAttention).parameters
    names = {"width": "attention_embd", "heads": "attention_head", "dropout": "attention_dropout"}
    return {ours: options[name].default for ours, name in names.items()}
