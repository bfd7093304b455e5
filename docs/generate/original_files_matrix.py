"""Writes the table of files.md of what reads what in files with the original code's names of Flux, Wan and Qwen-Image:
``python docs/generate/original_files_matrix.py`` (a minute). It needs diffusers.

Each cell is one adapter, with noise in every tensor, on a small transformer: written by hand as the program of the
column writes it, or saved by us, loaded by peftcore or diffusers, and what the model returns compared.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import peftcore
from files_matrix import PAGE, quiet, verdict
from peftcore.errors import CheckpointError, ExportError
from quantization_matrix import ROOT, table, written

BEGIN = "<!-- original files: written by docs/generate/original_files_matrix.py -->"
END = "<!-- end of the original files -->"
STD = 0.1


@dataclass(frozen=True)
class Form:
    """An adapter of a model."""

    model: str
    target: list[str]
    method: str = "lora"
    options: Mapping[str, Any] = field(default_factory=dict)
    theirs: bool = False
    """Whether a file of others is tried too."""


def _at(place: str, *layers: str) -> list[str]:
    return [f"{place}.{layer}" for layer in layers]


ATTENTION, FEED_FORWARD = ("to_q", "to_k", "to_v", "to_out.0"), ("net.0.proj", "net.2")
TEXT = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
QKV = _at("transformer_blocks.*.attn", "to_q", "to_k", "to_v")
DOUBLE = [*_at("transformer_blocks.*.attn", *ATTENTION, *TEXT), *_at("transformer_blocks.*", *FEED_FORWARD)]
WAN = _at("blocks.*", *ATTENTION, *FEED_FORWARD)
RANKS = {"overrides": {"*.to_v": {"rank": 3, "alpha": 4.0}}}
FORMS: dict[str, Form] = {
    "Flux, double blocks": Form("flux", DOUBLE, theirs=True),
    "Flux, another rank and scale of v": Form("flux", QKV, options=RANKS),
    "Flux, q and v alone": Form("flux", [QKV[0], QKV[2]]),
    "Flux, `dora` at q, k and v": Form("flux", QKV, "dora"),
    "Flux, `dora` at q and v alone": Form("flux", [QKV[0], QKV[2]], "dora"),
    "Flux, `loha` at q, k and v": Form("flux", QKV, "loha"),
    "Wan, blocks": Form("wan", WAN, theirs=True),
    "Wan, self-attention alone": Form("wan", _at("blocks.*.attn1", *ATTENTION)),
    "Wan from images, blocks": Form("wan_from_images", [*WAN, "add_k_proj", "add_v_proj"], theirs=True),
    "Qwen-Image": Form("qwen_image", [*DOUBLE, "img_in", "proj_out"], theirs=True),
}
"""What is tried: linear maps below these."""
COLUMNS = {
    "sd-scripts' or musubi's file: peftcore": "their_kohya",
    "ComfyUI's file: peftcore": "their_comfyui",
    "ours, `kohya`: peftcore": "kohya",
    "ours, `kohya`: diffusers": "kohya_diffusers",
    "ours, `kohya/diffusion_model`: peftcore": "dotted",
    "ours, `kohya/diffusion_model`: diffusers": "dotted_diffusers",
    "ours, `diffusers`: diffusers": "diffusers_diffusers",
}
"""Whose file, and who reads it. A file of others is compared with what diffusers makes of it."""


def _helpers() -> Any:
    folder = str(ROOT / "tests/side_by_side")
    sys.path[:0] = [] if folder in sys.path else [folder]
    return importlib.import_module("original_files")


class Trial:
    """One form on a transformer: our adapter, and where files are written."""

    def __init__(self, name: str, folder: Path) -> None:
        self.form, self.folder, self.helpers = FORMS[name], folder, _helpers()
        self.base, self.inputs = self.helpers.MODELS[self.form.model].build()
        self.bare = self.returned(self.base)
        self.model = deepcopy(self.base)
        torch.manual_seed(7)
        sizes = {"rank": 2, "alpha": 3.0}
        self.injection = peftcore.apply(
            self.model, self.form.method, target=self.form.target, **sizes | self.form.options
        )
        with torch.no_grad():
            for parameter in self.injection.parameters():
                parameter.add_(STD * torch.randn_like(parameter))
        self.ours = self.returned(self.model)
        self.reasons: dict[str, str] = {}

    @torch.no_grad()
    def returned(self, model: nn.Module) -> Tensor:
        """What a transformer returns."""
        result: Tensor = model(**self.inputs)[0]
        return result

    def saved(self, format: str) -> Path:
        """Save one file in a format, once."""
        path = self.folder / f"{format.replace('/', '_')}.safetensors"
        if not path.exists():
            self.injection.save(path, format=format)
        return path

    def read(self, path: Path) -> Tensor:
        """What the model returns with an adapter that peftcore reads."""
        host = deepcopy(self.base)
        peftcore.load(host, path)
        return self.returned(host)

    def read_by_diffusers(self, path: Path) -> Tensor | None:
        """What it returns with an adapter that diffusers reads; None where diffusers refuses it."""
        pipe = self.helpers.pipeline(self.form.model, deepcopy(self.base))
        try:
            pipe.load_lora_weights(path)
        except (ValueError, KeyError, IndexError, RuntimeError, AssertionError) as error:
            self.reasons["diffusers"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            return None
        return self.returned(pipe.transformer)

    def _theirs(self, form: str) -> str:
        if not self.form.theirs:
            return "none"
        here = {site.module_path for site in self.injection.sites}
        names = {n: each for n, each in self.helpers.names_of(self.base).items() if here.issuperset(each.paths)}
        names = {name: each for name, each in names.items() if "processor" not in name}
        path = self.folder / f"their_{form}.safetensors"
        self.helpers.write(self.base, path, form, names, std=STD)
        expected = self.read_by_diffusers(path)
        return "refused by diffusers" if expected is None else verdict(expected, self.read(path), self.bare)

    def their_kohya(self) -> str:
        return self._theirs("kohya")

    def their_comfyui(self) -> str:
        return self._theirs("comfyui")

    def kohya(self) -> str:
        return verdict(self.ours, self.read(self.saved("kohya")), self.bare)

    def dotted(self) -> str:
        return verdict(self.ours, self.read(self.saved("kohya/diffusion_model")), self.bare)

    def _in_diffusers(self, format: str) -> str:
        found = self.read_by_diffusers(self.saved(format))
        return "refused by diffusers" if found is None else verdict(self.ours, found, self.bare)

    def kohya_diffusers(self) -> str:
        return self._in_diffusers("kohya")

    def dotted_diffusers(self) -> str:
        return self._in_diffusers("kohya/diffusion_model")

    def diffusers_diffusers(self) -> str:
        return self._in_diffusers("diffusers")

    def cell(self, column: str) -> str:
        """What comes of one column."""
        make: Callable[[], str] = getattr(self, column)
        try:
            return make()
        except (ExportError, CheckpointError) as error:
            self.reasons["ours"] = str(error)
            return "refused"


def tried(name: str) -> tuple[dict[str, str], dict[str, str]]:
    """Returns the cells of one form by column, and why what is refused is refused."""
    with tempfile.TemporaryDirectory() as place, quiet():
        trial = Trial(name, Path(place))
        return {column: trial.cell(way) for column, way in COLUMNS.items()}, trial.reasons


def main() -> None:
    """Run every cell and write the page anew."""
    names = sys.argv[1:] or list(FORMS)
    rows = []
    for name in names:
        cells, reasons = tried(name)
        print(name, *cells.values(), reasons, sep="  ", flush=True)
        rows.append((name, cells))
    if names != list(FORMS):
        return
    page = PAGE.read_text(encoding="utf-8")
    body = table(rows, list(COLUMNS), "adapter")
    PAGE.write_text(f"{page[: page.index(BEGIN)]}{BEGIN}\n{body}\n{page[page.index(END) :]}", encoding="utf-8")


__all__ = ["BEGIN", "COLUMNS", "END", "FORMS", "PAGE", "tried", "written"]

if __name__ == "__main__":
    main()
