"""Few images with labels, as a model sees them: the features of each, and its label."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.author import Batches, Site
from peftcore.errors import CalibrationError, UnsupportedSite


@dataclass(frozen=True)
class Shots:
    """Few images, by their features and labels."""

    keys: Mapping[str, Tensor]
    """Normalized features of the images, by path of the site: ``[images, d]``."""
    labels: Tensor
    """Labels of the images, ``[images]``."""

    def check(self, path: str, images: int, classes: int) -> None:
        """Check that a cache has room for them.

        Raises:
            CalibrationError: there are other numbers of images or classes.
        """
        if len(self.labels) != images or int(self.labels.max()) >= classes:
            raise CalibrationError(
                f"the data has {len(self.labels)} images with labels up to {int(self.labels.max())}, and the cache of "
                f"{path} is of images={images}, classes={classes}: say these of the data"
            )


def few_shots(model: nn.Module, data: Batches, passes: int, sites: Mapping[Site, str]) -> Shots:
    """Return the images of the data, with the mean of their features over passes. Where two passes are the same to the
    bit, nothing is augmented, and passes end.

    Args:
        model: runs in eval mode.
        data: its batches, with labels.
        passes: how often it is gone through, at most.
        sites: modules, and whether features are their "output" or their "input".

    Raises:
        CalibrationError: labels are missing, are not integers, one for each image, or are in another order in another
            pass.
        UnsupportedSite: features of a module are not vectors, one for each label.
    """
    model.eval()
    sums: dict[Site, Tensor] = {}
    last: dict[Site, Tensor] = {}
    labels, count = torch.empty(0), 0
    with torch.no_grad():
        for count in range(1, passes + 1):
            found, own = _one_pass(model, data, sites)
            if count > 1 and not torch.equal(own, labels):
                raise CalibrationError("data comes in another order at each pass: shuffle=False, or passes=1")
            sums = {site: sums[site] + each if sums else each for site, each in found.items()}
            same = bool(last) and all(torch.equal(each, last[site]) for site, each in found.items())
            labels, last = own, found
            if same:
                break
        means = {site.path: each / count for site, each in sums.items()}
        return Shots({path: each / each.norm(dim=-1, keepdim=True) for path, each in means.items()}, labels)


def _one_pass(model: nn.Module, data: Batches, sites: Mapping[Site, str]) -> tuple[dict[Site, Tensor], Tensor]:
    """Return the features of all images at each site, in float32 at least, and their labels."""
    rows: dict[Site, list[Tensor]] = {site: [] for site in sites}
    labels: list[Tensor] = []
    with ExitStack() as hooks:
        for site, which in sites.items():

            def look(
                module: nn.Module, args: Any, kwargs: Any, output: Any, site: Site = site, of: str = which
            ) -> None:
                f: Tensor = output if of == "output" else next(iter((*args, *kwargs.values())))
                rows[site].append(f.detach().to(torch.promote_types(f.dtype, torch.float32)))

            hooks.callback(site.module.register_forward_hook(look, with_kwargs=True).remove)
        for batch in data:
            batch.output()
            own = batch.labels()
            if own.dim() != 1 or own.is_floating_point() or not len(own) or int(own.min()) < 0:
                raise CalibrationError("labels are numbers of classes, from 0 on: one for each image")
            labels.append(own.long())
            for site, each in rows.items():
                count = sum(len(seen) for seen in labels)
                if not each or each[-1].dim() != 2 or sum(len(seen) for seen in each) != count:
                    shape = tuple(each[-1].shape) if each else "nothing"
                    raise UnsupportedSite(f"{len(own)} images gave {shape} at {site.path}, not a vector for each")
    return {site: torch.cat(each) for site, each in rows.items()}, torch.cat(labels)
