"""What LPT's authors make of a small RoBERTa and a small GPT-2 behind late prompts, in float64, all numbers waves:
``python -m peftcore.testing.freeze lpt.py CHECKOUT``.

Their models derive from those of an older transformers than the other tests want. CHECKOUT is a checkout into which
``pip install --target CHECKOUT --no-deps transformers==4.41.2 tokenizers==0.19.1 huggingface_hub==0.23.5`` put it, and
which stands first in PYTHONPATH. Its decorator for
documentation takes other words, and is left out.
"""

import ast
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.registry.evidence import Source
from peftcore.testing import drawn
from peftcore.testing.checkouts import flags, load

SOURCE = Source("authors", "xyltt/LPT", "634c7b2", "encoder-only/models/modeling_roberta.py")
DECODER = "decoder-only/models/modeling_gpt2.py"
VERSIONS = ("torch", "transformers")
SIZES = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2}
SIZES |= {"max_position_embeddings": 16}
WITHOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "intermediate_size": 12}
IDS = [[2, 5, 3, 9, 4, 6, 8], [4, 4, 10, 7, 1, 1, 1]]
"""Of RoBERTa 1 is padding."""
LENGTHS = [7, 4]
LENGTH, LAYER, HIDDEN = 3, 2, 5
PROMPTS = [4, 2]
"""The last tokens of GPT-2's prompts, by place."""
KINDS = {"naive": "NPG", "average": "APPG", "max": "MPPG", "None": None}


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


def loss(y: Tensor) -> Tensor:
    """A scalar of what comes out at tokens, ``[2, 7, 8]``."""
    return (y.square() * wave(y, 0.3) * real()[..., None]).sum()


def rounded(tensor: Tensor | None) -> list[float]:
    assert tensor is not None
    return [round(each, 9) for each in tensor.flatten().tolist()]


def found(model: nn.Module, own: dict[str, Tensor], given: dict[str, Any], rows: Tensor | None) -> dict[str, Any]:
    others = [(name, p) for name, p in model.named_parameters() if "prompt_generator" not in name]
    waves(others, 0.1)
    waves(own.items(), 0.2)
    for parameter in own.values():
        parameter.requires_grad_()
    embedded = None if rows is None else rows.expand(2, -1, -1)
    y = model(**given, prompt_embedding=embedded)[0][:, LENGTH:]
    loss(y).backward()
    gradients = {name: rounded(parameter.grad) for name, parameter in own.items()}
    return {"output": rounded(y.masked_fill(~real()[..., None], 0)), "gradients": gradients}


def numbers(checkout: Path) -> dict[str, dict[str, Any]]:
    """Returns outputs ``[2, 7, 8]`` at tokens, and gradients of the generator or the prompt, by kind of generator and
    model; in training, without dropout."""
    import transformers

    torch.set_default_dtype(torch.float64)
    vars(transformers.file_utils)["add_code_sample_docstrings"] = lambda **words: lambda function: function
    encoder, decoder = load(checkout / SOURCE.script), load(checkout / DECODER)
    ids, mask = torch.tensor(IDS), real().double()
    result: dict[str, dict[str, Any]] = {}
    for kind, generator in KINDS.items():
        more = {"generator_type": generator, "num_prompt_tokens": LENGTH, "proj_down_size": HIDDEN}
        more["add_prompt_layer"] = LAYER
        roberta = encoder.RobertaModel(transformers.RobertaConfig(**SIZES, **WITHOUT, **more)).train()
        dropped = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        gpt2 = decoder.GPT2Model(transformers.GPT2Config(**SIZES, **dropped, **more)).train()
        for name, model, holder in (("roberta", roberta, roberta.encoder), ("gpt2", gpt2, gpt2)):
            given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
            prompt = torch.zeros(LENGTH, 8)
            own = {"prompt": prompt}
            if generator is not None:
                holder.add_prompt_generator()
                own = dict(holder.prompt_generator.named_parameters())
            if name == "gpt2":
                given["seq_lengths"] = torch.tensor(PROMPTS)

            rows = prompt if generator is None else None
            result.setdefault(kind, {})[name] = found(model, own, given, rows)
    return result


def tuned(checkout: Path, generator: str | None, hidden: int, length: int) -> Any:
    """Returns their RoBERTa after those statements of their script that say what trains."""
    import transformers

    vars(transformers.file_utils)["add_code_sample_docstrings"] = lambda **words: lambda function: function
    more = {"generator_type": generator, "num_prompt_tokens": length, "proj_down_size": hidden}
    config = transformers.RobertaConfig(**SIZES, **WITHOUT, **more, add_prompt_layer=LAYER)
    model = load(checkout / SOURCE.script).RobertaPromptTuning(config)
    script = ast.parse((checkout / "encoder-only/run_roberta.py").read_text(encoding="utf-8"))
    (main,) = (each for each in script.body if isinstance(each, ast.FunctionDef) and each.name == "main")
    wanted = ("param.requires_grad = False", "add_prompt_generator()")
    told = [each for each in main.body if any(words in ast.unparse(each) for words in wanted)]
    assert len(told) == 2
    exec(
        compile(ast.Module(told, []), "run_roberta.py", "exec"),
        {"model": model, "args": SimpleNamespace(generator_type=generator)},
    )
    return model


def ours(name: str) -> str:
    """Returns our name of a tensor of theirs."""
    last = name.replace("prompt_embedding.weight", "prompt").rpartition("prompt_generator.")[2]
    return last.replace("proj_", "")


def start(checkout: Path) -> dict[str, Any]:
    """Returns what large tensors start from by their names here: of a generator that is 12,000 wide, of one of 3,000
    rows, and of as many rows without one."""
    cases = {"wide": ("NPG", 12_000, 5), "long": ("NPG", 5, 3000), "alone": (None, 5, 3000)}
    return {
        case: {
            ours(name): drawn(p)
            for name, p in tuned(checkout, *options).named_parameters()
            if p.requires_grad and p.numel() >= 12_000
        }
        for case, options in cases.items()
    }


def trains(checkout: Path) -> dict[str, list[str]]:
    """Returns the names of what trains, by kind of generator, by the names here."""
    found = {}
    for kind, generator in KINDS.items():
        model = tuned(checkout, generator, HIDDEN, LENGTH)
        found[kind] = sorted(ours(name) for name, p in model.named_parameters() if p.requires_grad)
    return found


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the options of their command, by the names here."""
    told = flags((checkout / "encoder-only/run_roberta.sh").read_text())
    generator = {"NPG": "naive"}[told["generator_type"]]
    return {"length": told["num_prompt_tokens"], "hidden": told["proj_down_size"], "generator": generator}
