"""What the authors of prefix-propagation make of a small RoBERTa and a small Longformer, in float64, all numbers waves:
``python -m peftcore.testing.freeze prefix_propagation.py CHECKOUT``.

Their models derive from those of an older transformers than the other tests want. PYTHONPATH begins with a folder into
which ``pip install --target FOLDER --no-deps transformers==4.41.2 tokenizers==0.19.1 huggingface_hub==0.23.5`` put it.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.registry.evidence import Source
from peftcore.testing import drawn
from peftcore.testing.checkouts import flags, load

SOURCE = Source("authors", "MonliH/prefix-propagation", "fc868c5", "model/longformer.py")
VERSIONS = ("torch", "transformers")
SIZES = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2}
SIZES |= {"max_position_embeddings": 24, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SIZES |= {"intermediate_size": 12, "pad_token_id": 1, "type_vocab_size": 1}
IDS = [[2, 5, 3, 9, 4, 6, 8], [4, 4, 10, 7, 1, 1, 1]]
LENGTHS = [7, 4]
LENGTH, PROJECTION, WINDOW = 3, 5, 4


def wave(like: Tensor, k: float) -> Tensor:
    return torch.sin(torch.arange(like.numel(), dtype=torch.float64) * k + k).view_as(like)


@torch.no_grad()
def waves(tensors: Iterable[tuple[str, Tensor]], start: float) -> None:
    """Fill tensors in the order of their names."""
    for index, (_, tensor) in enumerate(sorted(tensors)):
        tensor.copy_(0.5 * wave(tensor, start + 0.37 * index))


def real() -> Tensor:
    """Which tokens are no padding, ``[2, 7]``."""
    return torch.arange(7) < torch.tensor(LENGTHS)[:, None]


def rounded(tensor: Tensor | None) -> list[float]:
    assert tensor is not None
    return [round(each, 9) for each in tensor.flatten().tolist()]


def found(whole: Any, model: nn.Module, windows: bool) -> dict[str, Any]:
    waves(model.named_parameters(), 0.1)
    own = dict(whole.propagated_prefix_encoder.named_parameters())
    waves(own.items(), 0.2)
    mask = torch.cat([torch.ones(2, LENGTH), real().double()], dim=1)
    given: dict[str, Any] = {"attention_mask": mask, "token_type_ids": torch.zeros_like(mask, dtype=torch.long)}
    if windows:  # as its classifier makes them: the first token, and the rows
        given["global_attention_mask"] = (torch.arange(LENGTH + 7) <= LENGTH).long().expand(2, -1)
    _, propagated = whole.get_prompt(batch_size=2)
    y = model(torch.tensor(IDS), propagated_prefix=propagated, **given)[0][:, LENGTH : LENGTH + 7]
    (y.square() * wave(y, 0.3) * real()[..., None]).sum().backward()
    gradients = {name: rounded(parameter.grad) for name, parameter in own.items()}
    return {"output": rounded(y.masked_fill(~real()[..., None], 0)), "gradients": gradients}


def numbers(checkout: Path) -> dict[str, dict[str, Any]]:
    """Returns outputs ``[2, 7, 8]`` at tokens, and gradients of what is added to the rows, by width of the network that
    makes it and model; in training, without dropout."""
    import transformers

    torch.set_default_dtype(torch.float64)
    longformer, roberta = (load(checkout / f"model/{name}.py", checkout) for name in ("longformer", "roberta"))
    result: dict[str, dict[str, Any]] = {}
    for width in (None, PROJECTION):
        more = {"pre_seq_len": LENGTH, "add_pre_seq_len": None, "propagate_prefix": "only"}
        more |= {"prefix_projection": width is not None, "prefix_hidden_size": width, "propagate_prefix_scalar": False}
        more |= {"additional_non_frozen_embeds": None, "use_offset_pool_tok": True}
        plain = roberta.RobertaPrefixForSequenceClassification(transformers.RobertaConfig(**SIZES, **more)).train()
        config = transformers.LongformerConfig(**SIZES, **more, attention_window=WINDOW)
        long = longformer.LongformerPrefixForSequenceClassification(config).train()
        result[str(width)] = {
            "roberta": found(plain, plain.roberta, False),
            "longformer": found(long, long.longformer, True),
        }
    return result


def start(checkout: Path) -> dict[str, Any]:
    """Returns what is added to 5,000 rows of a Longformer is drawn from."""
    import transformers

    more = {"pre_seq_len": 5000, "add_pre_seq_len": None, "propagate_prefix": "only", "prefix_projection": False}
    more |= {"propagate_prefix_scalar": False, "additional_non_frozen_embeds": None, "use_offset_pool_tok": True}
    config = transformers.LongformerConfig(**SIZES, **more, attention_window=WINDOW)
    model = load(checkout / "model/longformer.py", checkout).LongformerPrefixForSequenceClassification(config)
    return {"prefix": drawn(model.propagated_prefix_encoder.embedding.weight)}


def trains(checkout: Path) -> dict[str, list[int]]:
    """Returns the sizes of what trains in a Longformer that classifies, by their names, with as many additional words
    as their command has."""
    import transformers

    told = flags((checkout / "run_script/hyperpartisan_longformer_propagation.sh").read_text())
    more = {"pre_seq_len": told["pre_seq_len"], "add_pre_seq_len": None, "propagate_prefix": told["propagate_prefix"]}
    more |= {"additional_non_frozen_embeds": told["additional_non_frozen_embeds"], "propagate_prefix_scalar": False}
    more |= {"prefix_projection": False, "use_offset_pool_tok": True}
    config = transformers.LongformerConfig(**SIZES, **more, attention_window=WINDOW)
    model = load(checkout / "model/longformer.py", checkout).LongformerPrefixForSequenceClassification(config)
    return {name: list(p.shape) for name, p in model.named_parameters() if p.requires_grad}


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the options of their command."""
    told = flags((checkout / "run_script/hyperpartisan_longformer_propagation.sh").read_text())
    return {"length": told["pre_seq_len"], "dropout": told["hidden_dropout_prob"]}
