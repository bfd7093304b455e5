"""What DeiT's authors train of an image transformer with ``--attn-only``:
``python -m peftcore.testing.freeze attention_only.py CHECKOUT``."""

from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import timm
from torch import nn

from peftcore.registry.evidence import Source
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "facebookresearch/deit", "7e160fe", "main.py")
VERSIONS = ("torch", "timm")
ABSENT = ("datasets", "engine", "losses", "samplers", "augment", "models", "models_v2")


class Chosen(Exception):
    """What trains is chosen, and an optimizer would be made."""


def trains(checkout: Path) -> list[str]:
    """Returns the names of what trains."""
    module, model = load(checkout / SOURCE.script, absent=ABSENT), tiny()

    def stop(*args: Any) -> None:
        raise Chosen

    module.build_dataset, module.create_model = lambda **options: (range(8), 3), lambda *args, **options: model
    module.ModelEma, module.create_optimizer = MagicMock(), stop
    try:
        module.main(module.get_args_parser().parse_args(["--attn-only", "--device=cpu", "--no-pin-mem"]))
    except Chosen:
        return [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    raise AssertionError("it did not come to an optimizer")


def tiny() -> nn.Module:
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
    return timm.models.VisionTransformer(**sizes)
