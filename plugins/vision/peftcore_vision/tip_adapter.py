"""Tip-Adapter.   Zhang et al. 2021, arXiv 2111.03930 (code: gaopengcuhk/Tip-Adapter).

Equation:
    logits' = logits + alpha exp(-beta (1 - f K^T)) L,   K [images, d],   L [images, classes]

A cache of few images with labels: K are their features and L their labels, one-hot; f are the features of an image that
is classified. Features have length one, and logits are the model's own, of images and the texts of all classes:

    few = [{"input_ids": texts, "pixel_values": images, "labels": classes}, ...]   # class k is the text of row k
    peftcore.apply(clip, "tip_adapter", data=few)
    clip(input_ids=texts, pixel_values=others).logits_per_image

Fresh it is Tip-Adapter, which trains nothing. Trained it is Tip-Adapter-F: K moves from there, without being normalized
anew, and L stays. ``train_keys=False`` keeps K as it is. As in the authors' code a key is the mean of an image's
features, normalized afterwards, over as many `passes` through ``data=`` as they draw augmentations; data without any is
gone through twice. Keep its order (shuffle=False).

Where a classifier has the place of the texts (the authors' own form: text features as its rows), ``features="input"``
reads the classifier's input, and adds to its output. ``target=`` names what returns features in models other than CLIP.

Parameters: images * d, or none. A plan without `images` counts one.

Start: K are the features of the images in ``data=``: not an identity; ``alpha=0`` is the model itself.

Differs from the authors' code: The authors search alpha and beta on validation images: both are attributes of the
operator.

Use it: `peftcore.apply(model, "tip_adapter", features="input", data=[batch])`, with 1 to 16 images a class: it is good
at once, and trains in minutes. With more, K grows, and clip_adapter, of one size whatever there is, is better; so is
coop where the words are the problem.
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
    """How much nearer images count more."""
    train_keys: bool = True
    """Whether K trains."""
    passes: PositiveInt = 10
    """How often the data is gone through, at most: once for each augmentation of an image."""
    images: PositiveInt | None = None
    """Images in the cache; None: as many as the data has."""
    classes: PositiveInt | None = None
    """Classes of their labels, from 0 on; None: up to the largest label of the data."""


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
                f"data= has {len(self.labels)} images with labels up to {int(self.labels.max())}, but the cache of "
                f"{path} is for images={images}, classes={classes}: set both to the numbers of the data"
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
    """The features and labels of few images, and the logits that they give other images."""

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
        """Return what the cache adds to logits [..., classes] of features [..., d]."""
        f = f / f.norm(dim=-1, keepdim=True)
        (keys,) = self.cast(f, self.keys)
        near = (self.beta * (f @ keys.T - 1)).exp()  # [..., images]
        of_class = self.labels[:, None] == torch.arange(logits.shape[-1], device=f.device)
        return (self.alpha * near @ of_class.to(near)).to(logits.dtype)


class TipAdapter(Method):
    """A cache of few images with labels, whose logits are added to the model's.

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
