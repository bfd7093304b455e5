"""CoCoOp, conditional context optimization.   Zhou et al. 2022, arXiv 2203.05557 (code: KaiyangZhou/CoOp).

Equation:
    v_m(x) = v_m + W2 relu(W1 f(x) + b1) + b2,   v [M, d],   W1 [p // reduction, p],   W2 [d, p // reduction]
    t_k(x) = g([SOS; v_1(x) ... v_M(x); name_k; EOS]),   p(k | x) = softmax_k(scale * cos(f(x), t_k(x)))

As in coop, trained context vectors are in front of the names of classes; here a small network shifts them for each
image x. It reads the image's p features f(x), normalized to length 1. As in coop, texts contain placeholder words for
the vectors, and the texts of a batch are the classes:

    peftcore.apply(clip, "cocoop", init_ids=[320, 1125, 539, 320])   # "a photo of a"
    clip(input_ids=texts_of_all_classes, pixel_values=images).logits_per_image

Each image has separate texts, so B images and K classes are B K texts. ``text_embeds`` then have the shape [B, K, p].
Text features cannot be computed without images, since they depend on the image.

Parameters: M d + (p + 1) (p // reduction) + (p // reduction + 1) d. The method cannot be merged, and text features
cannot be cached.

Start: v starts as N(0, 0.02), or as the embeddings of `init_ids`; the network as torch's linear layers do. No start is
an identity.

Differs from the authors' code: The authors run and train one image at a time; here the texts of all images are one
batch of the text tower, which takes more memory.

Use it: `peftcore.apply(model, "cocoop")`, where an adapter trained on few classes has to work for names of unseen
classes; for seen classes coop is better, and B times faster for B images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import PositiveInt
from torch import Tensor, nn

from peftcore.author import LearningRate, Method, Site, Surgeon, Tags, Tap
from peftcore.errors import MissingContext, SequenceError, UnsupportedSite
from peftcore_vision._features import image_projection
from peftcore_vision._matching import MATCH, of_own_texts
from peftcore_vision._prompt_words import TOWER, PlacesConfig, PlacesOperator, put_at, text_sites, words

FEATURES = "features"
"""The form of a site at the projection that returns image features."""


class CoCoOpConfig(PlacesConfig):
    """Options of CoCoOp."""

    method: Literal["cocoop"] = "cocoop"
    length: PositiveInt = 4
    """Number M of context vectors."""
    reduction: PositiveInt = 16
    """Divisor of the number of features; the quotient is the width of the network's hidden layer."""


@dataclass(frozen=True, eq=False)
class ConditionedSite(Site):
    """A token table with context vectors that image features shift."""

    features: int = 0
    """Number p of features of an image."""


class ConditionedOperator(PlacesOperator):
    """Inserts context vectors, shifted by an image, at their positions among the embedded tokens."""

    observes = frozenset({FEATURES})

    def __init__(self, site: ConditionedSite, config: CoCoOpConfig, names: tuple[str, ...]) -> None:
        super().__init__(site, config, names)
        narrow = site.features // config.reduction
        if not narrow:
            raise UnsupportedSite(f"images have {site.features} features; use a reduction of {site.features} at most")
        self.context = nn.Parameter(words(site, config)[0])  # [M, d]
        self.down, self.up = nn.Linear(site.features, narrow), nn.Linear(narrow, site.out_features)
        self.seen, self.shifted = Tap(), Tap()  # from the projection to the tower, and from there to the table

    def at(self, form: str, module: nn.Module) -> Callable[..., Any]:
        acts = {FEATURES: self._look, TOWER: self._repeat, MATCH: self._match}
        return acts.get(form, self)

    def forward(self, call: Callable[..., Any], ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        embedded: Tensor = call(ids, *args, **kwargs)
        shifted = self.shifted.get()
        if shifted is None:
            raise MissingContext(
                "the text table was called without its tower, so the image is unknown; call the whole model, with "
                "texts and images"
            )
        (context,) = self.cast(embedded, shifted)
        return put_at(self.held(ids), context.repeat_interleave(len(ids) // len(context), 0), embedded)

    def _look(self, call: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        f = call(*args, **kwargs)
        self.seen.put(f)
        return f

    def _repeat(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the text encoder on all texts, repeated for each image."""
        given, f = {**dict(zip(self.names, args, strict=False)), **kwargs}, self.seen.take()
        if f is None:
            raise MissingContext("words depend on the image: call the whole model, with texts and images")
        f = f / f.norm(dim=-1, keepdim=True)
        weights = self.cast(f, self.down.weight, self.down.bias, self.up.weight, self.up.bias, self.context)
        shift = nn.functional.linear(nn.functional.linear(f, *weights[:2]).relu(), *weights[2:4])  # [images, d]
        self.shifted.put(weights[4] + shift[:, None])  # [images, M, d]
        many = {name: given[name].repeat(len(f), 1) for name in ("input_ids", "attention_mask")
                if given.get(name) is not None}  # fmt: skip
        return self._note(call, **{**given, **many})

    def _match(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the model that compares images and texts."""
        if kwargs.get("return_loss"):
            raise SequenceError(
                "return_loss=True computes the loss of pairs of images and texts, but these texts are classes: leave "
                "it out, and compute the loss from the logits"
            )
        return of_own_texts(call(*args, **kwargs))


class CoCoOp(Method):
    """Trained words in front of the names of classes, which each image shifts."""

    name = "cocoop"
    Config = CoCoOpConfig
    tags = Tags(category="vision", paper="2203.05557", identity_at_init=False, per_row=False)
    learning_rate = LearningRate(
        2e-3,
        "KaiyangZhou/CoOp@ff61507, configs/trainers/CoCoOp/vit_b16_c4_ep10_batch1_ctxv1.yaml",
        on="CLIP ViT-B/16, 16 images a class, one image a step",
        optimizer="SGD",
        momentum=0.9,
    )
    target = ("embed",)

    def inject(self, model: nn.Module, config: CoCoOpConfig, surgeon: Surgeon) -> None:
        projection = image_projection(surgeon)
        for site, tower in text_sites(surgeon):
            root = replace(projection, module=model, module_path="", form=MATCH)
            holders = (tower, replace(projection, form=FEATURES), root)
            table = ConditionedSite(**vars(site), features=projection.width)
            surgeon.graft(table, ConditionedOperator, config, holders, names=tower.arguments)

    @staticmethod
    def parameter_count(site: ConditionedSite, config: CoCoOpConfig) -> int:
        narrow = site.features // config.reduction
        return config.count * site.out_features + (site.features + 1) * narrow + (narrow + 1) * site.out_features
