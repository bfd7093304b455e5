"""Writes the table of files.md of what reads what in files of LyCORIS and diffusers:
``python docs/generate/files_matrix.py`` (a minute). It needs lycoris-lora and diffusers.

Each cell is one adapter, with noise in every tensor, on a small UNet: saved by one library, loaded by another, and what
the model returns compared. Nothing is written by hand. The table of files in original names, for Flux and its like, is
made by ``original_files_matrix.py``.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import peftcore
from peftcore.errors import CheckpointError, ExportError
from peftcore.files.formats.diffusers import TENSORS as OF_DIFFUSERS
from peftcore.files.formats.kohya import TENSORS as OF_KOHYA
from quantization_matrix import ROOT, table, written

PAGE = ROOT / "docs/files.md"
BEGIN, END = "<!-- files: written by docs/generate/files_matrix.py -->", "<!-- end of the files -->"
EQUAL, MOVED = 1e-3, 1e-2
"""Accepted difference of what the model returns, relative to the largest, and by how much the adapter must move it."""
LINEAR, CONVOLUTIONS = ["to_q", "to_k", "to_v", "net.0.proj"], ["conv1", "conv2", "proj_in"]
PATTERNS = [".*to_[qkv]", ".*net.0.proj"]
REST = [".*conv[12]", ".*proj_in"]


@dataclass(frozen=True)
class Form:
    """A method in one form: how it is applied here, and the network of LyCORIS that is the same."""

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    theirs: Mapping[str, Any] = field(default_factory=dict)
    """Options of the network; none where LyCORIS has no such method."""
    target: list[str] = field(default_factory=lambda: [*LINEAR, *CONVOLUTIONS])
    names: list[str] = field(default_factory=lambda: [*PATTERNS, *REST])
    std: float = 0.1
    loaded: bool = True
    """Whether LyCORIS makes a network of a file; else its network is made first, and gets the file's tensors."""
    drawn: bool = False
    """Whether its network draws ranks in each forward, so that its own file is read by itself for comparison."""


SIZES = {"rank": 4, "alpha": 3.0}
THEIRS = {"lora_dim": 4, "conv_lora_dim": 4, "alpha": 3.0, "conv_alpha": 3.0}
OUTPUTS = {"side": "outputs", "block_size": 2}
BLOCKS = {"lora_dim": 2, "conv_lora_dim": 2}
POINTS = [*LINEAR, "proj_in"]
TLORA = {"rank": 4, "min_rank": 1, "alpha": 4.0}
TERMS = {"A": "product", "B": "lora", "C": "none", "D": "none", "E": "none"}
PLAIN = {"target": ["to_q", "to_k", "to_v"], "names": [".*to_[qkv]"]}
FORMS: dict[str, Form] = {
    "`lora`": Form("lora", SIZES, {"network_module": "locon", **THEIRS}),
    "`locon` with cores": Form(
        "locon",
        {**SIZES, "conv_rank": 4, "conv_alpha": 3.0, "use_tucker": True},
        {"network_module": "locon", "use_tucker": True, **THEIRS},
        std=0.2,
    ),
    "`dora`": Form("dora", SIZES, {"network_module": "locon", "weight_decompose": True, **THEIRS}),
    "`loha`": Form("loha", SIZES, {"network_module": "loha", **THEIRS}, std=0.3),
    "`lokr`": Form("lokr", SIZES, {"network_module": "lokr", **THEIRS}, std=0.3),
    "`dylora`": Form(
        "dylora",
        SIZES,
        {"network_module": "dylora", "lora_dim": 4, "alpha": 3.0},
        LINEAR,
        PATTERNS,
        std=0.3,
        drawn=True,
    ),
    "`tlora` from the principal part": Form(
        "tlora",
        {**TLORA, "start": "weight", "part": "principal"},
        {"network_module": "tlora", **THEIRS, "alpha": 4.0, "conv_alpha": 4.0},
        POINTS,
        [*PATTERNS, ".*proj_in"],
        std=0.2,
    ),
    "`tlora`": Form("tlora", TLORA, target=POINTS),
    "`pissa`": Form("pissa", {"rank": 4, "alpha": 4.0}, target=POINTS),
    "`oft`, outputs": Form("oft", OUTPUTS, {"network_module": "diag-oft", **BLOCKS}),
    "`oft`, outputs, `rescaled`": Form(
        "oft", {**OUTPUTS, "rescaled": True}, {"network_module": "diag-oft", "rescaled": True, **BLOCKS}
    ),
    "`oft`, outputs, `constraint`": Form(
        "oft", {**OUTPUTS, "constraint": 0.01}, {"network_module": "diag-oft", "constraint": 0.01, **BLOCKS}
    ),
    "`oft`, inputs": Form("oft", {"block_size": 2}),
    "`boft`, outputs": Form(
        "boft",
        {"side": "outputs", "block_size": 4, "factors": 2},
        {"network_module": "boft", "lora_dim": 2, "conv_lora_dim": 4, "rescaled": True},
    ),
    "`ia3`, inputs": Form(
        "ia3", {"scale_inputs": ["*"]}, {"network_module": "ia3", "train_on_input": True}, std=0.3, loaded=False
    ),
    "`ia3`, outputs without a bias": Form(
        "ia3", {"scale_inputs": []}, {"network_module": "ia3"}, std=0.3, loaded=False, **PLAIN
    ),
    "`ia3`, outputs beside a bias": Form("ia3", {"scale_inputs": []}, std=0.3),
    "`glora`": Form("glora", {"rank": 4, **TERMS}, {"network_module": "glora", **THEIRS}),
    "`attention_only`": Form("attention_only", {}, {"network_module": "full"}, LINEAR, PATTERNS),
    "`ln_tuning`": Form("ln_tuning", {}, {"train_norm": True}, ["*.norm1", "*.norm2", "*.norm3"], [".*norm[123]?$"]),
}
"""What is tried. LyCORIS's names are in the table above this one in the page."""
COLUMNS = {
    "LyCORIS's file: peftcore": "theirs",
    "ours for kohya: peftcore": "kohya",
    "ours for kohya: LyCORIS": "kohya_lycoris",
    "ours for kohya: diffusers": "kohya_diffusers",
    "ours for diffusers: peftcore": "diffusers",
    "ours for diffusers: diffusers": "diffusers_diffusers",
}
"""Whose file, and who reads it."""


def _helpers() -> Any:
    folder = str(ROOT / "tests/side_by_side")
    sys.path[:0] = [] if folder in sys.path else [folder]
    return importlib.import_module("lycoris_files")


@torch.no_grad()
def returned(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """What a UNet returns, at the timestep 0, where all ranks of all methods act."""
    result: Tensor = model(**{**inputs, "timestep": 0})[0]
    return result


def verdict(one: Tensor, other: Tensor, base: Tensor) -> str:
    """What two results come to, beside that of the bare base."""
    scale = one.abs().max()
    if (one - base).abs().max() < MOVED * scale:
        return "hardly moved"
    if (one - other).abs().max() <= EQUAL * scale:
        return "equal"
    if (other - base).abs().max() <= 1e-6 * scale:
        return "passed over"
    return f"differs by {(one - other).abs().max() / scale:.1g}"


class Trial:
    """One form on a UNet: our adapter, and where its files are written."""

    def __init__(self, name: str, folder: Path) -> None:
        self.form, self.folder, self.helpers = FORMS[name], folder, _helpers()
        self.base, self.inputs = self.helpers.unet()
        self.bare = returned(self.base, self.inputs)
        self.model = deepcopy(self.base)
        torch.manual_seed(7)
        self.injection = peftcore.apply(self.model, self.form.method, target=self.form.target, **self.form.options)
        with torch.no_grad():
            for parameter in self.injection.parameters():
                parameter.add_(self.form.std * torch.randn_like(parameter))
        self.ours = returned(self.model, self.inputs)
        self.reasons: dict[str, str] = {}

    def saved(self, name: str) -> Path:
        """Save in a format, once."""
        if not (self.folder / name).exists():
            self.injection.save(self.folder / name, format=name.replace("_", "/"))
        return self.folder / name

    def theirs(self) -> str:
        if not self.form.theirs:
            return "none"
        path, host = self.folder / "their.safetensors", deepcopy(self.base)
        expected = self.helpers.theirs(host, path, self.form.std, names=self.form.names, **self.form.theirs)
        if self.form.drawn:
            (self.folder / "again").mkdir()
            path = path.rename(self.folder / "again" / OF_KOHYA)
            expected = self.helpers.read_by_them(host, path.parent)
        peftcore.load(host, path)
        return verdict(returned(expected, self.inputs), returned(host, self.inputs), self.bare)

    def kohya(self) -> str:
        return self._again(self.saved("kohya"))

    def diffusers(self) -> str:
        return self._again(self.saved("diffusers"))

    def _again(self, folder: Path) -> str:
        host = deepcopy(self.base)
        peftcore.load(host, folder)
        return verdict(self.ours, returned(host, self.inputs), self.bare)

    def kohya_lycoris(self) -> str:
        folder, form = self.saved("kohya_lycoris"), self.form
        if form.loaded:
            host = self.helpers.read_by_them(self.base, folder)
        else:
            host = self.helpers.read_into_their_network(self.base, folder, names=form.names, **form.theirs)
        found = verdict(self.ours, returned(host, self.inputs), self.bare)
        return found if form.loaded else f"{found}, in its network"

    def kohya_diffusers(self) -> str:
        return self._in_diffusers(self.saved("kohya"), OF_KOHYA)

    def diffusers_diffusers(self) -> str:
        return self._in_diffusers(self.saved("diffusers"), OF_DIFFUSERS)

    def _in_diffusers(self, folder: Path, file: str) -> str:
        from diffusers import StableDiffusionPipeline

        pipe = StableDiffusionPipeline(
            vae=None, text_encoder=None, tokenizer=None, unet=deepcopy(self.base), scheduler=None, safety_checker=None,
            feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        try:
            pipe.load_lora_weights(folder, weight_name=file)
        except (ValueError, KeyError, RuntimeError, NotImplementedError) as error:
            self.reasons["diffusers"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            return "refused by diffusers"
        return verdict(self.ours, returned(pipe.unet, self.inputs), self.bare)

    def cell(self, column: str) -> str:
        """What comes of one column."""
        make: Callable[[], str] = getattr(self, column)
        try:
            return make()
        except ExportError as error:
            self.reasons[column.partition("_")[0]] = str(error)
            return "refused"
        except CheckpointError as error:
            self.reasons[column] = str(error)
            return "refused"


def tried(name: str) -> tuple[dict[str, str], dict[str, str]]:
    """Returns the cells of one form by column, and why what is refused is refused."""
    with tempfile.TemporaryDirectory() as place, quiet():
        trial = Trial(name, Path(place))
        return {column: trial.cell(way) for column, way in COLUMNS.items()}, trial.reasons


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Leave out what the libraries say meanwhile."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def main() -> None:
    """Run every cell and write the page anew."""
    names = sys.argv[1:] or list(FORMS)
    rows, reasons = [], dict[str, dict[str, str]]()
    for name in names:
        cells, reasons[name] = tried(name)
        print(name, *cells.values(), reasons[name], sep="  ", flush=True)
        rows.append((name, cells))
    if names != list(FORMS):
        return
    page = PAGE.read_text(encoding="utf-8")
    body = table(rows, list(COLUMNS), "method")
    PAGE.write_text(f"{page[: page.index(BEGIN)]}{BEGIN}\n{body}\n{page[page.index(END) :]}", encoding="utf-8")


__all__ = ["BEGIN", "COLUMNS", "END", "FORMS", "PAGE", "tried", "written"]

if __name__ == "__main__":
    main()
