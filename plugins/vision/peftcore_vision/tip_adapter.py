"""Tip-Adapter.   Zhang et al. 2021, arXiv 2111.03930 (code: gaopengcuhk/Tip-Adapter).

Equation:
    logits' = logits + alpha exp(-beta (1 - f K^T)) L,   K [images, d],   L [images, classes]

The method adds a cache of few labelled images: K are their features and L their one-hot labels; f are the features of
the image to classify. Features are normalized to length 1. The logits are the model's own, for images and the texts of
all classes:

    few = [{"input_ids": texts, "pixel_values": images, "labels": classes}, ...]   # class k is the text of row k
    peftcore.apply(clip, "tip_adapter", data=few)
    clip(input_ids=texts, pixel_values=others).logits_per_image

A fresh adapter is Tip-Adapter, which needs no training. A trained one is Tip-Adapter-F: K trains from this start,
without another normalization, and L is constant. ``train_keys=False`` keeps K constant too. As in the authors' code, a
key is the mean of an image's features over several `passes` through ``data=``, one for each augmentation, and is
normalized afterwards; data without augmentations is read only twice. Keep its order (shuffle=False).

If the model has a classifier instead of texts (as in the authors' code, where the classifier's rows are text features),
``features="input"`` reads the classifier's input, and adds to its output. In models other than CLIP, set ``target=`` to
the module that returns the features.

Parameters: images * d, or none with ``train_keys=False``. A plan without `images` counts one image.

Start: K are the features of the images in ``data=``. A fresh adapter is not an identity; ``alpha=0`` leaves the outputs
unchanged.

Differs from the authors' code: The authors search alpha and beta on validation images; here both are attributes of the
operator, which you can set.

Use it: `peftcore.apply(model, "tip_adapter", features="input", data=[batch])`, with 1 to 16 images a class: it helps
without training, and trains in minutes. With more images K grows; then clip_adapter, whose size is constant, is better.
Where the wording of the texts is the problem, use coop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from peftcore.author import AppliedMethod, Batches, LearningRate, Method, Operator, Site, Surgeon, Tags, Tap
from peftcore.errors import CalibrationError, UnsupportedSite
from peftcore_vision._features import FeatureConfig, FeatureSite, feature_sites
from peftcore_vision._matching import MATCH, MatcherSite, with_logits


class TipAdapterConfig(FeatureConfig):
    """Options of Tip-Adapter."""

    method: Literal["tip_adapter"] = "tip_adapter"
    alpha: NonNegativeFloat = 1.17
    """Weight of the cache's logits."""
    beta: NonNegativeFloat = 1.0
    """Sharpness beta: with a larger value, the most similar images have a larger part of the weight."""
    train_keys: bool = True
    """True trains K (Tip-Adapter-F)."""
    passes: PositiveInt = 10
    """The largest number of passes through the data: one for each augmentation of an image."""
    images: PositiveInt | None = None
    """Number of images in the cache; None: the number of images of the data."""
    classes: PositiveInt | None = None
    """Number of classes; labels are numbers from 0 on. None: the largest label of the data plus one."""


@dataclass(frozen=True)
class Shots:
    """The features and labels of few images."""

    keys: Mapping[str, Tensor]
    """Normalized features of the images, by path of the site: ``[images, d]``."""
    labels: Tensor
    """Labels of the images, ``[images]``."""

    def check(self, path: str, images: int, classes: int) -> None:
        """Check that the images fit the sizes of a cache.

        Raises:
            CalibrationError: the cache is for another number of images or classes.
        """
        if len(self.labels) != images or int(self.labels.max()) >= classes:
            raise CalibrationError(
                f"data= has {len(self.labels)} images with labels up to {int(self.labels.max())}, but the cache of "
                f"{path} is for images={images}, classes={classes}: set both to the numbers of the data"
            )


def few_shots(model: nn.Module, data: Batches, passes: int, sites: Mapping[Site, str]) -> Shots:
    """Return the labels of all images of the data, and their features as a mean over several passes through the data.
    If two consecutive passes give bitwise equal features, the data lacks augmentations, and no further pass runs.

    Args:
        model: the model, which runs in eval mode.
        data: batches for the model, with labels.
        passes: the largest number of passes through the data.
        sites: for each site "output" or "input", depending on which of them the features are.

    Raises:
        CalibrationError: labels are missing, are not one integer for each image, or their order differs between passes.
        UnsupportedSite: the features at a module are not one vector for each image.
    """
    model.eval()
    sums: dict[Site, Tensor] = {}
    last: dict[Site, Tensor] = {}
    labels, count = torch.empty(0), 0
    with torch.no_grad():
        for count in range(1, passes + 1):
            found, own = _one_pass(model, data, sites)
            if count > 1 and not torch.equal(own, labels):
                raise CalibrationError(
                    "data= has another order in each pass: set shuffle=False in the loader, or passes=1"
                )
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
                raise CalibrationError("labels in data= must be class numbers from 0 on, one for each image")
            labels.append(own.long())
            for site, each in rows.items():
                count = sum(len(seen) for seen in labels)
                if not each or each[-1].dim() != 2 or sum(len(seen) for seen in each) != count:
                    shape = tuple(each[-1].shape) if each else "nothing"
                    raise UnsupportedSite(
                        f"{len(own)} images gave {shape} at {site.path}, not one vector for each image; name another "
                        "module in target="
                    )
    return {site: torch.cat(each) for site, each in rows.items()}, torch.cat(labels)


class CacheOperator(Operator):
    """Stores the features and labels of few images, and adds logits for other images."""

    labels: Tensor

    def __init__(self, site: FeatureSite, config: TipAdapterConfig) -> None:
        super().__init__(site)
        self.alpha, self.beta, self.features = config.alpha, config.beta, config.features
        images, self.classes = config.images or 1, config.classes or 1
        keys = torch.zeros(images, site.width)
        if config.train_keys:
            self.keys = nn.Parameter(keys)
        else:
            self.register_buffer("keys", keys)
        self.register_buffer("labels", torch.zeros(images, dtype=torch.long))
        self.seen = Tap()  # from the projection to the logits

    def wrong_values(self, values: Mapping[str, Tensor]) -> Iterator[str]:
        labels = values.get("labels")
        if labels is not None and not 0 <= int(labels.min()) <= int(labels.max()) < self.classes:
            yield f"labels holds others than 0 to {self.classes - 1}"

    def at(self, form: str, module: nn.Module) -> Callable[..., Any]:
        return self._match if form == MATCH else self

    def forward(self, call: Callable[..., Any], f: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = call(f, *args, **kwargs)
        if self.features == "input":
            return output + self.said(f, output)
        self.seen.put(output)
        return output

    def _match(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the model that compares images and texts."""
        output, f = call(*args, **kwargs), self.seen.take()
        return with_logits(output, lambda logits: logits + self.said(f, logits), self.classes)

    def said(self, f: Tensor, logits: Tensor) -> Tensor:
        """Return the term that the cache adds to the logits [..., classes], for features [..., d]."""
        f = f / f.norm(dim=-1, keepdim=True)
        (keys,) = self.cast(f, self.keys)
        near = (self.beta * (f @ keys.T - 1)).exp()  # [..., images]
        of_class = self.labels[:, None] == torch.arange(logits.shape[-1], device=f.device)
        return (self.alpha * near @ of_class.to(near)).to(logits.dtype)


class TipAdapter(Method):
    """A cache of few images with labels, whose logits are added to those of the model.

    Example:
        injection = peftcore.apply(model, "tip_adapter", features="input", data=[batch])
    """

    name = "tip_adapter"
    Config = TipAdapterConfig
    tags = Tags(
        category="vision", paper="2111.03930", identity_at_init=False, identity_options={"alpha": 0.0}, needs_data=True
    )
    learning_rate = LearningRate(
        1e-3, "gaopengcuhk/Tip-Adapter@d0e2d6f, configs/imagenet.yaml", on="CLIP RN50, ImageNet, 16 images a class"
    )
    target = ("head",)
    found: Shots | None = None

    def inject(self, model: nn.Module, config: TipAdapterConfig, surgeon: Surgeon) -> None:
        for site in feature_sites(surgeon, config):
            if config.at(site.path).features == "input":
                surgeon.graft(site, CacheOperator, config)
            else:
                root = replace(site, module=model, module_path="", form=MATCH)
                surgeon.graft(MatcherSite(**vars(site)), CacheOperator, config, (root,))

    def structure(
        self, model: nn.Module, data: Batches, config: TipAdapterConfig, sites: Sequence[Site]
    ) -> Mapping[str, Mapping[str, Any] | None]:
        self.found = few_shots(model, data, config.passes, {site: config.at(site.path).features for site in sites})
        sizes = {"images": len(self.found.labels), "classes": int(self.found.labels.max()) + 1}
        return {
            site.path: {name: size for name, size in sizes.items() if dict(config.at(site.path))[name] is None}
            for site in sites
        }

    def calibrate(self, model: nn.Module, data: Batches, config: TipAdapterConfig, injection: AppliedMethod) -> None:
        grafts: list[Any] = [graft for graft in injection.grafts if graft.by_method]
        if self.found is None:  # a part of a hybrid, whose sizes are told
            with injection.whole.disabled():
                features = {graft.site: graft.operator.features for graft in grafts}
                self.found = few_shots(model, data, config.passes, features)
        for graft in grafts:
            self.found.check(graft.site.path, len(graft.operator.labels), graft.operator.classes)
            with torch.no_grad():
                graft.operator.keys.copy_(self.found.keys[graft.site.path])
                graft.operator.labels.copy_(self.found.labels)
        self.found = None

    @staticmethod
    def parameter_count(site: FeatureSite, config: TipAdapterConfig) -> int:
        return (config.images or 1) * site.width if config.train_keys else 0
