"""Runs training scripts of other libraries with an adapter, out of checkouts of these:

    python tests/running/real_scripts.py timm=FOLDER diffusers=FOLDER

Of each script a copy is changed in a few counted lines and trains a tiny model on a few pictures for some steps. Then
the adapter's file loads on a fresh model and is what the script's own checkpoint holds, and no weight of the base has
changed by a bit. The last line of each says how many lines were changed and how many tensors were compared.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
MOST = 5
"""Lines that may change."""


@dataclass(frozen=True)
class Change:
    """A line of ours in a script."""

    where: Literal["before", "instead of", "behind"]
    line: str
    """An expression for the one line of the script that is meant, without its indent."""
    ours: str


@dataclass(frozen=True)
class Port:
    """A script, and how it is run."""

    script: str
    changes: tuple[Change, ...]
    run: Callable[[Path, Callable[..., None]], str]
    """Runs the script in an empty folder by the function that it is given, and returns what was compared."""


def changed(text: str, changes: tuple[Change, ...]) -> str:
    """Returns a script with our lines.

    Raises:
        LookupError: a line is not there, or there are several.
    """
    lines = text.splitlines()
    for each in changes:
        found = [number for number, line in enumerate(lines) if re.fullmatch(each.line, line.strip())]
        if len(found) != 1:
            raise LookupError(f"{len(found)} lines are {each.line!r}")
        (number,) = found
        indent = lines[number][: len(lines[number]) - len(lines[number].lstrip())]
        first, last = {"before": (number, number), "instead of": (number, number + 1), "behind": (number + 1,) * 2}[
            each.where
        ]
        lines[first:last] = [indent + each.ours]
    return "\n".join(lines) + "\n"


def pictures(folder: Path, count: int, size: int) -> list[Path]:
    """Writes pictures of noise."""
    from PIL import Image

    folder.mkdir(parents=True)
    made = torch.randint(0, 256, (count, size, size, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    paths = [folder / f"{number}.png" for number in range(count)]
    for path, values in zip(paths, made, strict=True):
        Image.fromarray(values.numpy()).save(path)
    return paths


def compared(base: dict[str, Tensor], held: dict[str, Tensor]) -> str:
    """Verifies that the tensors of a base are what a script wrote."""
    moved = [name for name, value in base.items() if name not in held or not torch.equal(held[name].cpu(), value)]
    assert base and not moved, f"the base changed: {moved[:4]}"
    return f"{len(base)} tensors of the base are equal to the bit"


def timm(folder: Path, run: Callable[..., None]) -> str:
    import timm as library

    import peftcore

    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}

    def fresh() -> Any:
        return library.create_model("vit_tiny_patch16_224", num_classes=2, **sizes)

    model = fresh()
    torch.save(model.state_dict(), folder / "base.pth")
    for split in ("train", "val"):
        for label in ("a", "b"):
            pictures(folder / "data" / split / label, 8, 32)
    run(
        "--data-dir", folder / "data", "--train-split", "train", "--val-split", "val", "--device", "cpu",
        "--model", "vit_tiny_patch16_224", "--model-kwargs", *(f"{key}={value}" for key, value in sizes.items()),
        "--initial-checkpoint", folder / "base.pth", "--num-classes", 2, "--input-size", 3, 32, 32, "--batch-size", 4,
        "--epochs", 2, "--warmup-epochs", 0, "--opt", "adamw", "--lr", 1e-2, "--workers", 0, "--seed", 0,
        "--output", folder, "--experiment", "run",
    )  # fmt: skip
    held = torch.load(folder / "run/last.pth.tar", weights_only=False)["state_dict"]
    base = torch.load(folder / "base.pth")
    said = compared(base, held)
    again = fresh()
    again.load_state_dict(base)
    injection = peftcore.load(again, folder / "run")
    ours, adapter = again.state_dict(), injection.state_dict()
    assert ours.keys() == held.keys() and all(torch.equal(ours[name], held[name]) for name in ours)
    assert len(ours) - len(base) == len(adapter)
    assert all(bool(value.any()) for name, value in adapter.items() if name.endswith(".B"))
    with torch.no_grad():
        image = torch.randn(1, 3, 32, 32)
        after = again.eval()(image)
        injection.remove()
        before = again(image)
    moved = float((after - before).abs().max() / before.abs().max())
    assert moved > 1e-3
    return f"{said}; the adapter's {len(adapter)} tensors are those of the checkpoint, and move outputs by {moved:.2g}"


def diffusers(folder: Path, run: Callable[..., None]) -> str:
    import diffusers as library

    import peftcore

    sys.path.insert(0, str(ROOT / "tests/toys"))
    import painters

    torch.manual_seed(0)
    scheduler = library.DDPMScheduler(num_train_timesteps=10, steps_offset=1, clip_sample=False)
    parts = {"vae": painters.autoencoder(), "text_encoder": painters.clip(), "tokenizer": painters.clip_tokenizer()}
    pipe = library.StableDiffusionPipeline(
        unet=painters.unet(), scheduler=scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False, **parts,
    )  # fmt: skip
    pipe.save_pretrained(folder / "base")
    lines = [{"file_name": path.name, "text": "zero"} for path in pictures(folder / "data", 8, 16)]
    (folder / "data/metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run(
        "--pretrained_model_name_or_path", folder / "base", "--train_data_dir", folder / "data", "--resolution", 16,
        "--train_batch_size", 2, "--max_train_steps", 6, "--learning_rate", 1e-2, "--output_dir", folder / "run",
        "--cache_dir", folder / "cache", "--seed", 0, "--report_to", "tensorboard",
    )  # fmt: skip
    base = library.UNet2DConditionModel.from_pretrained(folder / "base/unet")
    weights = {name: value.clone() for name, value in base.state_dict().items()}
    whole = library.StableDiffusionPipeline.from_pretrained(folder / "run", safety_checker=None)
    said = compared(weights, whole.unet.state_dict())
    inputs = torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 6, base.config.cross_attention_dim)
    with torch.no_grad():
        before = base(*inputs).sample
        injection = peftcore.load(base, folder / "run/adapter")
        after = base(*inputs).sample
    assert all(bool(value.any()) for name, value in injection.state_dict().items() if name.endswith(".B"))
    moved = float((after - before).abs().max() / before.abs().max())
    assert moved > 1e-3 and all(torch.equal(base.state_dict()[name], value) for name, value in weights.items())
    return f"{said}; the adapter's {len(injection.state_dict())} tensors move outputs by {moved:.2g}"


IMPORT = "import peftcore"
PORTS = {
    "timm": Port(
        "train.py",
        (
            Change("behind", "import torch", IMPORT),
            Change(
                "before",
                r"if args\.head_init_scale is not None:",
                'peftcore.apply(model, "lora", target="all-linear", train=["head"])',
            ),
            Change("before", r"if best_metric is not None:", 'peftcore.injections(model)["lora"].save(output_dir)'),
        ),
        timm,
    ),
    "diffusers": Port(
        "examples/text_to_image/train_text_to_image.py",
        (
            Change("behind", "import accelerate", IMPORT),
            Change(
                "before",
                "# Create EMA for the unet.",
                'adapter = peftcore.apply(unet, "lora", target="all-layers")',
            ),
            Change("instead of", r"unet\.parameters\(\),", "adapter.parameters(),"),
            Change("before", r"accelerator\.end_training\(\)", 'adapter.save(args.output_dir + "/adapter")'),
        ),
        diffusers,
    ),
}


def main() -> None:
    """Run the scripts of the checkouts that are given."""
    for argument in sys.argv[1:]:
        name, _, checkout = argument.partition("=")
        port = PORTS[name]
        assert len(port.changes) <= MOST
        text = changed((Path(checkout) / port.script).read_text("utf-8"), port.changes)
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            script = folder / "script.py"
            script.write_text(text, "utf-8")

            def run(*arguments: object, script: Path = script) -> None:
                environment = {**os.environ, "PYTHONPATH": os.environ.get("PYTHONPATH", ""), "ACCELERATE_USE_CPU": "1"}
                done = subprocess.run(
                    [sys.executable, str(script), *map(str, arguments)], env=environment, cwd=script.parent,
                    capture_output=True, text=True, check=False,
                )  # fmt: skip
                assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]

            said = port.run(folder, run)
        commit = subprocess.run(
            ["git", "-C", checkout, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip()
        print(f"{name} {port.script} at {commit or 'no commit'}: {len(port.changes)} lines; {said}", flush=True)


if __name__ == "__main__":
    main()
