"""The cache of Tip-Adapter's authors, its logits, and the gradient of its keys in their first step of training, on
tensors of cosines; what training starts from, what trains, and their configuration:
``python -m peftcore.testing.freeze tip_adapter.py CHECKOUT``."""

import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import yaml
from torch import Tensor

from peftcore.registry.evidence import Source
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "gaopengcuhk/Tip-Adapter", "d0e2d6f", "main.py")
VERSIONS = ("torch",)
ABSENT = ("clip", "datasets", "datasets.utils", "torchvision", "torchvision.transforms")


def wave(shape: Sequence[int], key: str) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.cos(torch.arange(count, dtype=torch.float64) * 1.7 + zlib.crc32(key.encode()) % 97).view(*shape) / 2


class Drawn:
    """Five images with labels in two batches, other augmentations of them in each pass."""

    def __init__(self) -> None:
        self.passes = 0

    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = wave((5, 8), f"images.{self.passes}"), torch.tensor([2, 0, 1, 1, 2])
        self.passes += 1
        yield from ((images[:3], labels[:3]), (images[3:], labels[3:]))


class Watched(torch.optim.AdamW):
    """Keeps the gradient that each step is given."""

    gradients: ClassVar[list[Tensor]] = []
    given: ClassVar[list[Tensor]] = []
    """What trains, as it starts."""

    def __init__(self, parameters: Iterable[Tensor], **options: Any) -> None:
        trained = [*parameters]
        self.given[:] = [each.detach().clone() for each in trained]
        super().__init__(trained, **options)

    def step(self, closure: Any = None) -> Any:
        self.gradients += [p.grad.clone() for group in self.param_groups for p in group["params"]]
        return super().step(closure)


@contextmanager
def on_the_cpu() -> Iterator[None]:
    """Keeps tensors where they are, and in float64."""
    kept = Tensor.cuda, Tensor.half, torch.nn.Module.cuda, torch.optim.AdamW
    try:
        Tensor.cuda = torch.nn.Module.cuda = lambda self: self  # type: ignore[method-assign,assignment]
        Tensor.half = Tensor.double  # type: ignore[method-assign]
        torch.optim.AdamW = Watched  # type: ignore[misc]
        yield
    finally:
        Tensor.cuda, Tensor.half, torch.nn.Module.cuda, torch.optim.AdamW = kept  # type: ignore[method-assign,misc]


def numbers(checkout: Path) -> dict[str, Any]:
    """Returns keys [8, 5] and values [5, 3], the logits of four images [4, 3], and the gradient of the keys [5, 8]."""
    return {name: each.tolist() for name, each in trained(checkout).items()}


def trained(checkout: Path) -> dict[str, Tensor]:
    """Runs their method with training. Returns keys, values, logits and the first gradient."""
    Watched.gradients.clear()
    main = load(checkout / SOURCE.script, absent=ABSENT)
    seen: list[Tensor] = []

    def scored(logits: Tensor, labels: Iterable[int]) -> float:
        seen.append(logits.detach().clone())
        return 100.0

    main.cls_acc = scored
    main.search_hp = lambda *args, **kwargs: (1.0, 3.0)
    clip = SimpleNamespace(encode_image=lambda images: images.clone(), dtype=torch.float64)
    f = wave((4, 8), "features")
    f, labels = f / f.norm(dim=-1, keepdim=True), torch.tensor([0, 1, 2, 0])
    texts = wave((8, 3), "texts")
    with tempfile.TemporaryDirectory() as folder, on_the_cpu():
        config = {"load_cache": False, "augment_epoch": 3, "shots": 2, "cache_dir": folder, "lr": 0.001}
        config |= {"train_epoch": 1, "init_beta": 5.5, "init_alpha": 1.2}
        keys, values = main.build_cache_model(config, clip, Drawn())
        main.run_tip_adapter(config, keys.clone(), values, f, labels, f, labels, texts)
        logits = seen[1]  # the first are CLIP's own
        run = (config, keys.clone(), values, f, labels, f, labels, texts, clip, [(f.clone(), labels)])
        main.run_tip_adapter_F(*run)
    return {"keys": keys, "values": values, "logits": logits, "gradient": Watched.gradients[0]}


def start(checkout: Path) -> dict[str, Any]:
    """Returns what their optimizer is given, as it starts, [5, 8], and the labels beside it."""
    values = trained(checkout)["values"]
    (keys,) = Watched.given
    return {"keys": keys.tolist(), "labels": values.argmax(1).tolist()}


def trains(checkout: Path) -> list[list[int]]:
    """Returns the shapes of what their optimizer is given."""
    trained(checkout)
    return [[*each.shape] for each in Watched.given]


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the options of their configuration for ImageNet."""
    found = yaml.safe_load((checkout / "configs/imagenet.yaml").read_text())
    return {"alpha": found["init_alpha"], "beta": found["init_beta"], "passes": found["augment_epoch"]}
