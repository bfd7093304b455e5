"""Writes the table of readers.md of what other programs read of each method: ``python docs/generate/readers_matrix.py``
(ten minutes; with names of methods, their rows alone, with ``--missing`` those that the page lacks). It needs peft and
diffusers.

Each cell is one adapter with noise in every tensor, exported for one program and read again: by peft and by diffusers
themselves. Folders of peft for other programs are read by peft as well, where the rules of the program say that it
reads all of it; folders of mlx-lm and files for ComfyUI are read by what their pages say that the tensors mean.
"""

from __future__ import annotations

import copy
import functools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import peftcore
from files_matrix import EQUAL, MOVED, quiet
from peftcore.algebra.exporting import export
from peftcore.errors import ExportError, PeftcoreError
from peftcore.files.readers.reader import Reader, readers
from peftcore.testing.kit import fill
from quantization_matrix import HELPERS, ROOT, table, written

PAGE = ROOT / "docs/readers.md"
BEGIN, END = "<!-- readers: written by docs/generate/readers_matrix.py -->", "<!-- end of the readers -->"
RULES_BEGIN, RULES_END = "<!-- rules: written by docs/generate/readers_matrix.py -->", "<!-- end of the rules -->"
RANK = 8
"""Of what is projected."""
MISSING = "--missing"
LOUDER = 5
"""How often the values of an adapter that hardly moves the model are doubled."""
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 40}
IDS = torch.arange(16).view(2, 8)
PICTURES = ("diffusers", "comfyui")
"""The programs that read adapters of models for pictures."""
CONDITIONED, PICTURE = "controlnet_lora", torch.linspace(0, 1, 2 * 3 * 64 * 64).view(2, 3, 64, 64)
"""A method that is given a picture in each call, and one of 8 times the latents."""
TASKED = ("POLY", "MULTITASK_PROMPT_TUNING")
"""Types of peft whose models are told a task; ours take the first one."""
NO_PLACE, NO_EFFECT = "no place", "no effect"
"""The cells of a method that cannot be applied to the model with its own defaults, and of one that changes nothing that
the model returns for the inputs at hand: new words that are not in the text, what acts on packed weights alone."""


class Language:
    """A small Llama, and how the programs for language models read what was written."""

    names = tuple(name for name in readers() if name not in PICTURES)

    @functools.cached_property
    def base(self) -> nn.Module:
        import transformers

        torch.manual_seed(0)
        config = transformers.LlamaConfig(num_attention_heads=4, num_key_value_heads=2, use_cache=False, **SIZES)
        return transformers.LlamaForCausalLM(config).eval()

    @property
    def data(self) -> list[Any]:
        return [{"input_ids": IDS, "labels": IDS}]

    @torch.no_grad()
    def returned(self, model: nn.Module, **beside: Any) -> Tensor:
        found: Tensor = model(input_ids=IDS, **beside).logits
        return found[:, -IDS.shape[1] :]  # a prompt in front has outputs of its own in some libraries

    def read(self, reader: Reader, folder: Path) -> Tensor:
        base = copy.deepcopy(self.base)
        if reader.name == "mlx-lm":
            return self._mlx(base, folder)
        import peft

        model = peft.PeftModel.from_pretrained(base, str(folder)).eval()
        tasked = model.active_peft_config.peft_type in TASKED
        return self.returned(model, **({"task_ids": torch.zeros(len(IDS), dtype=torch.long)} if tasked else {}))

    @torch.no_grad()
    def _mlx(self, base: nn.Module, folder: Path) -> Tensor:
        scale = json.loads((folder / "adapter_config.json").read_text())["lora_parameters"]["scale"]
        tensors = load_file(folder / "adapters.safetensors")
        for name in [name for name in tensors if name.endswith(".lora_a")]:
            path = name.removesuffix(".lora_a")
            base.get_submodule(path).weight += scale * (tensors[name] @ tensors[f"{path}.lora_b"]).T
        return self.returned(base)


class Pictures:
    """A small UNet, and how the programs for pictures read what was written."""

    names = PICTURES

    @functools.cached_property
    def _made(self) -> tuple[nn.Module, dict[str, Any]]:
        from lycoris_files import unet

        made: tuple[nn.Module, dict[str, Any]] = unet()
        return made

    @property
    def base(self) -> nn.Module:
        return self._made[0]

    @property
    def data(self) -> list[Any]:
        return [lambda model: model(**self._made[1])[0].square().mean()]

    @torch.no_grad()
    def returned(self, model: nn.Module) -> Tensor:
        names = {each.method.name for each in peftcore.injections(model).values()}
        with peftcore.call(model, **({"condition": PICTURE} if CONDITIONED in names else {})):
            found: Tensor = model(**{**self._made[1], "timestep": 0})[0]
        return found

    def read(self, reader: Reader, folder: Path) -> Tensor:
        base = copy.deepcopy(self.base)
        if reader.name != "diffusers":
            peftcore.load(base, folder)
            return self.returned(base)
        from diffusers import StableDiffusionPipeline

        pipe = StableDiffusionPipeline(
            vae=None, text_encoder=None, tokenizer=None, unet=base, scheduler=None, safety_checker=None,
            feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        pipe.load_lora_weights(folder)
        return self.returned(pipe.unet)


Host = Language | Pictures


def applied(host: Host, name: str) -> peftcore.Injection | None:
    """A method with its defaults on a copy of the model, with noise; None where it has no place there."""
    for given in ({}, {"data": host.data}):
        model = copy.deepcopy(host.base)
        try:
            injection = peftcore.apply(model, name, **given)
            fill(injection, 1)
            for _ in range(LOUDER):
                if moved(host, injection):
                    break
                for parameter in injection.parameters():
                    parameter.detach().mul_(2)
        except (PeftcoreError, RuntimeError, TypeError, ValueError):
            continue
        return injection
    return None


def moved(host: Host, injection: peftcore.Injection) -> bool:
    """Whether an adapter changes what the model returns by more than a rounding."""
    ours = host.returned(injection.model)
    return bool((ours - host.returned(host.base)).abs().max() >= MOVED * ours.abs().max())


def cell(host: Host, injection: peftcore.Injection, reader: Reader, ours: Tensor) -> tuple[str, str]:
    """What comes of an adapter for one program, and why it is refused."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "adapter"
        try:
            try:
                done = export(injection, folder, reader)
            except ExportError as error:
                try:
                    done = export(injection, folder, reader, rank=RANK)
                except ExportError:
                    return "refused", str(error)
                return f"{done.error:.1g}", ""
        except PeftcoreError as error:
            return "refused", str(error)
        try:
            theirs = host.read(reader, folder)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            return f"refused by {reader.name}", f"{type(error).__name__}: {error}"
    if theirs.shape != ours.shape:
        return f"other outputs, {tuple(theirs.shape)}", ""
    difference = float((theirs - ours).abs().max() / ours.abs().max())
    return (done.how if difference <= EQUAL else f"differs by {difference:.1g}"), ""


def tried(name: str) -> tuple[dict[str, str], dict[str, str]]:
    """The cells of one method by program, and why what is refused is refused."""
    cells, reasons = dict[str, str](), dict[str, str]()
    with quiet():
        for host in (LANGUAGE, IMAGES):
            injection = applied(host, name)
            if injection is None:
                cells |= dict.fromkeys(host.names, NO_PLACE)
                continue
            if not moved(host, injection):
                cells |= dict.fromkeys(host.names, NO_EFFECT)
                continue
            ours = host.returned(injection.model)
            for each in host.names:
                cells[each], reason = cell(host, injection, readers()[each], ours)
                reasons |= {each: reason} if reason else {}
    return {each: cells[each] for each in COLUMNS}, reasons


LANGUAGE, IMAGES = Language(), Pictures()
COLUMNS = ("peft", "vllm", "sglang", "tgi", "llama.cpp", "mlx-lm", "diffusers", "comfyui")


def rules() -> str:
    """The table of the programs: their versions, where these were read, and the ranks that they take."""
    lines = ["| program | version | rules read in | largest rank |", "|---|---|---|---|"]
    for name in COLUMNS:
        each = readers()[name]
        ranks = (
            "any" if each.ranks is None else f"{each.ranks.most}, above {each.ranks.default} with `{each.ranks.flag}`"
        )
        lines.append(f"| `{name}` | {each.version} | `{each.source}`: {len(each.files)} files | {ranks} |")
    return "\n".join(lines)


def main() -> None:
    """Run every cell and write the page anew."""
    sys.path[:0] = [each for each in HELPERS if each not in sys.path]
    known = [info.name for info in peftcore.methods(presets=False)]
    rows = {name.strip("`"): cells for name, cells in written(PAGE.read_text(encoding="utf-8"), BEGIN, END).items()}
    lacking = [name for name in known if name not in rows]
    for name in lacking if sys.argv[1:] == [MISSING] else sys.argv[1:] or known:
        rows[name], reasons = tried(name)
        shown = {key: text[:160] for key, text in reasons.items()}
        print(name, *rows[name].values(), shown, sep="  ", flush=True)
    put(rules(), RULES_BEGIN, RULES_END)
    put(table([(f"`{name}`", rows[name]) for name in known], list(COLUMNS), "method"), BEGIN, END)


def put(body: str, begin: str, end: str) -> None:
    """Write one table into the page."""
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(f"{page[: page.index(begin)]}{begin}\n{body}\n{page[page.index(end) :]}", encoding="utf-8")


__all__ = ["BEGIN", "COLUMNS", "END", "PAGE", "tried", "written"]

if __name__ == "__main__":
    main()
