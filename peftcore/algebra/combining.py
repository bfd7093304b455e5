"""Adapter algebra on whole adapters. `deltas` returns the weight changes of an adapter, `to_lora` converts an adapter
to a LoRA, and `combine` combines several adapters into one. The mathematics is in `peftcore.algebra.merge_math`."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from peftcore.algebra import merge_math
from peftcore.algebra.merge_math import Sign, cat, linear, product
from peftcore.authoring.inputs import second_moments
from peftcore.contract.batches import Data
from peftcore.contract.config import MethodConfig, validate
from peftcore.contract.method import Method
from peftcore.contract.operators import Factors, _Base, changes_bias, is_mergeable
from peftcore.contract.surgeon_protocol import Wishes
from peftcore.errors import ConfigError, MergeError, NotMergeable, UnknownInjection, UnknownMethod, UnsupportedSite
from peftcore.files.save_load import load
from peftcore.forward.state.host_state import state_of
from peftcore.injection.applied import fill
from peftcore.injection.applying import apply_request
from peftcore.injection.injection import Injection, injections
from peftcore.injection.request import Request, check_name
from peftcore.layers.layer import bias_name, put, take
from peftcore.layers.model_locks import changing
from peftcore.layers.pieces import whole
from peftcore.registry.catalogue import method as find_method
from peftcore.targets.sites import Site
from peftcore.utils.progress import through

How = Literal["cat", "linear", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune", "slerp"]
Source = str | os.PathLike[str]
"""The name of an injection on the host, or the folder of a saved adapter."""
LOSSY = 0.01
"""`combine` gives a warning if the relative error at a site is at least this."""


@dataclass(frozen=True, eq=False)
class Change:
    """The change that an adapter makes to one tensor of the host."""

    site: Site
    computed: Tensor | None
    """The change in logical layout. None if `delta` has to compute it from `factors`, which saves the memory of a whole
    weight."""
    factors: Factors | None
    """The factors of the change, if it is low-rank; else None."""

    @property
    @torch.no_grad()
    def delta(self) -> Tensor:
        """Returns the change in logical layout."""
        if self.computed is not None:
            return self.computed
        assert self.factors is not None, "a change has a value or factors"
        return product(self.factors)

    @property
    def is_vector(self) -> bool:
        """Whether the changed tensor is a vector, such as a bias, so that the change has no low-rank form."""
        like = self.computed if self.factors is None else self.factors[0]
        assert like is not None, "a change has a value or factors"
        return like.dim() < self.site.layer.batch_dims + 2

    def nearest(self, rank: int, moment: Tensor | None = None) -> tuple[Factors, float]:
        """Returns an update of at most `rank`, and its relative error. If the change has factors of at most this rank,
        the update is the change itself; otherwise it is the nearest update of this rank. `moment` is the second moment
        of the inputs of a matrix ``[out, in]``. If it is given, the nearest update is the one with the nearest outputs
        for such inputs."""
        if self.factors is not None and self.factors[1].shape[-1] <= rank:
            return self.factors, 0.0
        delta = self.delta
        moment = moment.to(delta) if moment is not None and delta.dim() == 2 else None
        return merge_math.nearest(delta, rank, self.site.layer.batch_dims, moment)


def _precise(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _acting(injection: Injection) -> None:
    stuck = [
        graft.site.path
        for graft in injection.grafts
        if not (graft.operator.trains_only or is_mergeable(graft.operator))
    ]
    if stuck:
        raise NotMergeable(
            f"{injection.method.name} does not change weights, so combine and to_lora cannot use it (first at "
            f"{stuck[0]}): its output is not a function of the weight alone"
        )
    if injection.merged:
        raise MergeError(f"{injection.name!r} is merged, so its base weights are not available; call unmerge() first")


@torch.no_grad()
def changes(injection: Injection) -> dict[str, Change]:
    """Returns the change of each tensor by site path, in float32 or better. The change is the effective value minus the
    base value. Modules that the user named in ``train`` (heads) are left out, because they belong to one task. Tensors
    of operators that act only in training are left out too.

    Raises:
        NotMergeable: an operator has no effective weight.
        MergeError: the injection is merged.
    """
    with changing(injection.model):
        _acting(injection)
        with injection.state.kept(injection.name):
            return _changes(injection)


def _changes(injection: Injection) -> dict[str, Change]:
    found: dict[str, Change] = {}
    now: dict[tuple[str, str], Tensor] = {}  # as the operators before leave it, as it is stored, where several act
    several = _changed_by_several(injection)
    for graft in injection.grafts:
        if graft.by_method and not graft.operator.trains_only:
            site, operator = graft.site, graft.operator
            base = _stored(site, now)
            weight = None if base is None else take(site.layer.logical(base), site.slices, site.layer.batch_dims)
            if changes_bias(operator):
                bias = _bias_change(site, operator, weight, now)
                if bias is not None and bias.any():
                    _note(found, now, several, site.at(bias_name(site.tensor)), bias, None)
            _note(found, now, several, site, *_weight_change(operator, weight))
    return found


def _changed_by_several(injection: Injection) -> set[tuple[str, str]]:
    """Returns the tensors that more than one operator may change, by module path and tensor."""
    counts: Counter[tuple[str, str]] = Counter()
    for graft in injection.grafts:
        path, tensor = graft.site.module_path, graft.site.tensor
        counts.update([(path, tensor)])
        if changes_bias(graft.operator):
            counts.update([(path, bias_name(tensor))])
    return {key for key, count in counts.items() if count > 1}


def _stored(site: Site, now: Mapping[tuple[str, str], Tensor]) -> Tensor | None:
    held = now.get((site.module_path, site.tensor))
    read = site.layer.read(site.module, site.tensor) if held is None else held
    return None if read is None else _precise(whole(read))


def _weight_change(operator: _Base, weight: Tensor | None) -> tuple[Tensor | None, Factors | None]:
    factors = None if weight is None else operator.factors()
    if factors is not None:
        return None, (_precise(factors[0]), _precise(factors[1]), factors[2])
    new: Tensor = operator.merged(weight)  # type: ignore[arg-type]  # only replacements stand for a missing tensor
    return (_precise(new) if weight is None else new - weight), None


def _bias_change(
    site: Site, operator: _Base, weight: Tensor | None, now: Mapping[tuple[str, str], Tensor]
) -> Tensor | None:
    stored = _stored(site.at(bias_name(site.tensor)), now)
    bias = None if stored is None else take(stored, site.slices, site.layer.batch_dims)
    assert weight is not None, "an operator that changes a bias by a weight has a weight"
    new = operator.merged_bias(bias, lambda: weight)
    return new if new is None or bias is None else new - bias


def _note(
    found: dict[str, Change],
    now: dict[tuple[str, str], Tensor],
    several: Collection[tuple[str, str]],
    site: Site,
    delta: Tensor | None,
    factors: Factors | None,
) -> None:
    key, dims = (site.module_path, site.tensor), site.layer.batch_dims
    change = Change(site, delta, factors)
    if key in several:
        base = _stored(site, now)
        if base is None:
            now[key] = change.delta
        else:
            logical = site.layer.logical(base)
            changed = take(logical, site.slices, dims) + change.delta
            now[key] = site.layer.stored(put(logical, changed, site.slices, dims))
    if site.slices is None:  # a replacement sees the tensor as it is stored
        plain = site.layer_of(site.module, site.tensor)
        same = delta is None and plain == site.layer
        delta, site = None if same else plain.logical(site.layer.stored(change.delta)), replace(site, layer=plain)
    before = found.get(site.path)
    if before is not None:
        both = before.factors is not None and factors is not None
        factors = cat([before.factors, factors], [1.0, 1.0]) if both else None  # type: ignore[list-item]
        delta = before.delta + (change.delta if delta is None else delta)
    found[site.path] = Change(site, delta, factors)


def deltas(injection: Injection) -> dict[str, Tensor]:
    """Returns the change that an adapter makes to each tensor, by site path, in logical layout ``[*batch, out, in,
    *kernel]`` and in float32 or better. Tensors that do not change are left out.

    Raises:
        NotMergeable: the method does not change weights.
        MergeError: the injection is merged.
    """
    return {path: change.delta for path, change in changes(injection).items()}


def established(
    model: torch.nn.Module,
    method: type[Method],
    config: MethodConfig,
    name: str,
    selections: Mapping[str, Sequence[Site]],
    *,
    dtype: torch.dtype = torch.float32,
    train: tuple[str, ...] = (),
    untied: tuple[str, ...] = (),
    instead: Sequence[str] = (),
    fill: Callable[[Injection], object],
) -> Injection:
    """Returns a new injection of a method, at given sites (`selections`) and with values that the function `fill`
    writes. The injection is frozen and active, like a loaded one. The injections named in `instead` are deactivated.

    Raises:
        RouteError, CompositionError: the active route or composition uses one of the named injections.
    """
    saved = {
        key: [{"module_path": s.module_path, "tensor": s.tensor, "role": s.role, "slices": s.slices} for s in sites]
        for key, sites in selections.items()
    }
    wishes = Wishes(train=train, dtype=dtype, saved=saved, untied=untied)

    def give(injection: Injection) -> None:
        fill(injection)
        injection.trainable(False)

    with changing(model):
        if (state := state_of(model)) is not None:
            state.choices.check_free(instead)
        return apply_request(Request(model, method(), config, wishes, name=name, instead=instead, fill=give))


@contextmanager
def opened(model: torch.nn.Module, sources: Iterable[Source]) -> Iterator[list[Injection]]:
    """Context manager that yields an injection for each source: an existing injection, or an adapter loaded from a
    folder. Loaded adapters are removed at the end of the block.

    Raises:
        UnknownInjection: a source is neither an injection nor a folder.
    """
    with ExitStack() as stack:
        found = []
        for source in sources:
            injection = injections(model).get(str(source))
            if injection is None and not os.path.isdir(source):
                known = ", ".join(injections(model)) or "none"
                raise UnknownInjection(f"{source!r} is neither a folder nor an injection; this host has: {known}")
            if injection is None:
                injection = load(model, source, name=f"opened-{len(injections(model))}", active=False)
                stack.callback(_close, injection)
            found.append(injection)
        yield found


def _close(injection: Injection) -> None:
    """Remove an adapter that `opened` has loaded. If this is interrupted (KeyboardInterrupt), the removal is completed
    before the interrupt is raised again."""
    try:
        injection.remove()
    except BaseException:
        if injection.state.injections.get(injection.name) is injection:
            injection.remove()
        raise


def warn_of_heads(sources: Iterable[Injection]) -> None:
    """Warn if the adapters have additionally trained modules (heads), because the result leaves them out."""
    heads = sorted({head for each in sources for head in each.wishes.train})
    if heads:
        warnings.warn(f"heads belong to one task and are left out: {', '.join(heads)}", UserWarning, stacklevel=3)


def to_lora(
    injection: Injection, rank: int, name: str | None = None, *, data: Data | None = None
) -> tuple[Injection, dict[str, float]]:
    """Returns a LoRA that makes the weight changes of another adapter, and the relative error of the LoRA at each site.

    The LoRA is exact if the change has factors of at most `rank`; otherwise it is the nearest LoRA of that rank. If the
    change has a smaller rank, the other ranks of the LoRA are initialized as in a new LoRA, so that they add zero and
    can train. The LoRA is frozen and active. The old injection is deactivated, and remains on the host.

    Args:
        data: batches of inputs. If given, the nearest LoRA at a linear layer is the one with the nearest outputs for
            these inputs, and the error is the relative error of the outputs.

    Raises:
        CalibrationError: `data` has no batches, or the model cannot be called with one.
        NotMergeable: the method does not change weights.
        UnsupportedSite: the method changes vectors (biases, norms), which a LoRA cannot change.
        UnknownMethod: LoRA is not installed.
        RouteError, CompositionError: the active route or composition uses the old injection.
    """
    with changing(injection.model):
        made = nearest(injection, rank, data)
        factors = {path: (site, factors) for path, (site, factors, _) in made.items()}
        lora = lora_of(injection.model, factors, name or f"{injection.name}_lora", [injection.name], rank)
        return lora, {path: error for path, (_, _, error) in made.items()}


def nearest(injection: Injection, rank: int, data: Data | None = None) -> dict[str, Made]:
    """Returns, by site path, the updates of at most `rank` that are nearest to the weight changes of an adapter. Each
    has its relative error, as in `to_lora`.

    Raises:
        CalibrationError, NotMergeable, UnsupportedSite: as `to_lora`.
    """
    warn_of_heads([injection])
    found = _matrices(changes(injection))
    moments = {} if data is None else second_moments(injection, data)
    steps = through(found.items(), "factors of changes")
    return {path: (change.site, *change.nearest(rank, moments.get(path))) for path, change in steps}


@torch.no_grad()
def lora_of(
    model: torch.nn.Module,
    made: Mapping[str, tuple[Site, Factors]],
    name: str,
    instead: Sequence[str] = (),
    rank: int | None = None,
) -> Injection:
    """Returns a new LoRA with given updates. It is frozen and active, and the injections named in `instead` are
    deactivated.

    Args:
        made: the updates by site path: the site, and the factors A ``[rank, in, *kernel]``, B ``[out, rank]`` and a
            scale.
        rank: the rank of the LoRA; by default the largest rank of the updates. If an update has a smaller rank, the
            other ranks are initialized as in a new LoRA, so that they add zero and can train.

    Raises:
        UnknownMethod: LoRA is not installed.
        DuplicateInjection: the name is taken.
        RouteError, CompositionError: the active route or composition uses one of the named injections.
    """
    try:
        method = find_method("lora")
    except UnknownMethod as error:
        raise UnknownMethod(f"{error}; the result is a LoRA: pip install peftcore-reparameterized") from None
    rank = rank or max(max(factors[1].shape[-1] for _, factors in made.values()), 1)
    config = validate(method.Config, {"rank": rank, "alpha": float(rank)})
    dtype = max((factors[0].dtype for _, factors in made.values()), key=lambda each: each.itemsize)
    sites = [_as_weight(site) for site, _ in made.values()]

    def give(lora: Injection) -> None:
        for graft, (_, (A, B, scale)) in zip(lora.grafts, made.values(), strict=True):
            own = graft.operator.factors()
            assert own is not None, "LoRA gives its factors"
            own[0].narrow(B.dim() - 2, 0, B.shape[-1]).copy_(A)  # [*batch, rank, in, *kernel]; other ranks stay new
            own[1].narrow(-1, 0, B.shape[-1]).copy_(scale * B)

    return established(model, method, config, name, {"": sites}, dtype=dtype, instead=instead, fill=give)


Made = tuple[Site, Factors, float]
"""The update of one site: the site, the factors of the update, and its relative error."""
Merge = Callable[[str, list[dict[str, Change]], int | None], Made]


def _matrices(found: dict[str, Change]) -> dict[str, Change]:
    vectors = [path for path, each in found.items() if each.is_vector]
    if vectors:
        raise UnsupportedSite(
            f"vectors (biases, norms) have no low-rank form, and the adapter changes {', '.join(vectors[:8])}"
        )
    return found


def _as_weight(site: Site) -> Site:
    """Returns the site, without its role if that is the output of a module. With such a role, an update would act on
    the input of the whole module."""
    return replace(site, role=None) if site.role is not None and site.role.endswith(".output") else site


def combine(
    model: torch.nn.Module,
    sources: Mapping[Source, float],
    how: How = "cat",
    *,
    name: str = "combined",
    rank: int | None = None,
    density: float | None = None,
    sign: Sign = "total",
    seed: int = 0,
) -> Injection:
    """Returns one new adapter that combines several adapters, each with a weight. The new adapter is frozen and active.
    The others are deactivated, and do not change.

    Args:
        model: the host.
        sources: the weight of each adapter, by the name of an injection or the folder of a saved adapter.
        how: "cat" is the exact weighted sum of low-rank updates, as a LoRA whose rank is the sum of their ranks.
            "linear" is the weighted sum of the parameters of adapters that have the same method and options. With all
            other values, the weight changes of the adapters are combined, whatever their methods, and the result is the
            nearest LoRA of `rank`. They are "svd" (the weighted sum), "magnitude_prune", "ties", "dare_linear",
            "dare_ties", and "slerp" (for two adapters; the weights define the position between them). At sites that an
            adapter does not change, its change counts as 0.
        name: name of the new injection.
        rank: the rank of the result; not for "cat" and "linear". A warning is given if the result loses at least one
            percent of the change at a site.
        density: the share of the values that "ties", "dare_*" and "magnitude_prune" keep.
        sign: how TIES elects the sign of a value (see `merge_math.ties`).
        seed: the seed for the values that DARE drops at random.

    Raises:
        ConfigError: `rank` or `density` is missing or does not apply to `how`, or the adapters do not fit together.
        NotMergeable, UnsupportedSite, UnknownInjection, UnknownMethod, CheckpointError: an adapter cannot be loaded, or
            `how` cannot combine what it changes. Nothing was changed.
        RouteError, CompositionError: the active route or composition uses one of the adapters.
    """
    with changing(model):
        check_name(model, name)
        if not sources:
            raise ConfigError("combine needs adapters: {name or folder: weight}")
        _check_use("rank", rank, how not in ("cat", "linear"), how)
        _check_use("density", density, how in ("ties", "dare_linear", "dare_ties", "magnitude_prune"), how)
        if density is not None and not 0 < density <= 1:
            raise ConfigError(f"density={density} must be above 0 and at most 1")
        weights = list(sources.values())
        with opened(model, sources) as adapters:
            instead = [each.name for each in adapters]
            if how == "linear":
                _check_alike(adapters)
                tensors = _averaged([each.state_dict() for each in adapters], weights)
            else:
                warn_of_heads(adapters)
                tasks = [_matrices(changes(each)) for each in adapters]
                merge = _merger(how, weights, density or 1.0, sign, seed)
                made = {
                    path: merge(path, tasks, rank) for path in dict.fromkeys(path for task in tasks for path in task)
                }
        if how != "linear":
            worst = max(made, key=lambda path: made[path][2])
            if (error := made[worst][2]) >= LOSSY:
                text = f"rank {rank} loses {error:.0%} of the change at {worst}; a higher rank loses less"
                warnings.warn(text, UserWarning, stacklevel=2)
            return lora_of(
                model, {path: (site, factors) for path, (site, factors, _) in made.items()}, name, instead, rank
            )
        first = adapters[0]
        wishes, method = first.wishes, type(first.method)
        return established(
            model,
            method,
            first.config,
            name,
            first.selections,
            dtype=wishes.dtype,
            train=wishes.train,
            untied=wishes.untied,
            instead=instead,
            fill=lambda soup: fill(soup, tensors),
        )


def _check_use(option: str, value: object, used: bool, how: str) -> None:
    if used and value is None:
        raise ConfigError(f"how={how!r} needs {option}=")
    if not used and value is not None:
        raise ConfigError(f"how={how!r} has no use for {option}=; remove it")


def _merger(how: How, weights: list[float], density: float, sign: Sign, seed: int) -> Merge:
    """Returns a function that combines the changes of all adapters at one site into one update."""
    generator = torch.Generator().manual_seed(seed)
    if how == "slerp" and (len(weights) != 2 or min(weights) < 0 or not sum(weights)):
        raise ConfigError("slerp needs two adapters, whose weights are not negative and not both 0")
    merges: dict[str, Callable[[list[Tensor]], Tensor]] = {
        "svd": lambda taus: linear(taus, weights),
        "magnitude_prune": lambda taus: linear([merge_math.magnitude_prune(tau, density) for tau in taus], weights),
        "ties": lambda taus: merge_math.ties(taus, weights, density, sign),
        "dare_linear": lambda taus: merge_math.dare_linear(taus, weights, density, generator),
        "dare_ties": lambda taus: merge_math.dare_ties(taus, weights, density, generator, sign),
        "slerp": lambda taus: merge_math.slerp(taus[0], taus[1], weights[1] / sum(weights)),
    }
    if how not in merges and how != "cat":
        raise ConfigError(f"how={how!r} is not one of cat, linear, {', '.join(merges)}")

    def merge(path: str, tasks: list[dict[str, Change]], rank: int | None) -> Made:
        here = [(task[path], weight) for task, weight in zip(tasks, weights, strict=True) if path in task]
        site = here[0][0].site
        if rank is None:
            return site, cat([_factors(path, change) for change, _ in here], [weight for _, weight in here]), 0.0
        known = [task[path].delta if path in task else None for task in tasks]
        like = next(tau for tau in known if tau is not None)
        taus = [torch.zeros_like(like) if tau is None else tau for tau in known]
        return site, *Change(site, merges[how](taus), None).nearest(rank)

    return merge


def _factors(path: str, change: Change) -> Factors:
    if change.factors is None:
        raise ConfigError(f'the change of {path} has no low-rank factors, which "cat" needs; use how="svd" with a rank')
    return change.factors


def _check_alike(adapters: Sequence[Injection]) -> None:
    first = adapters[0]
    shapes = {key: value.shape for key, value in first.state_dict().items()}
    for other in adapters[1:]:
        if type(other.method) is not type(first.method) or other.config != first.config:
            raise ConfigError(
                f'{first.name!r} and {other.name!r} differ in method or options, but how="linear" needs equal ones; '
                'use how="svd"'
            )
        theirs = {key: value.shape for key, value in other.state_dict().items()}
        if other.ties != first.ties:
            where = sorted(dict(first.ties.items() ^ other.ties.items()))[0]
            raise ConfigError(
                f"{first.name!r} and {other.name!r} tie different modules, at {where}, since the file of one of them "
                "unties these, so they have no mean"
            )
        if theirs != shapes:
            wrong = sorted(key for key in shapes.keys() | theirs.keys() if shapes.get(key) != theirs.get(key))
            raise ConfigError(
                f"{first.name!r} and {other.name!r} differ in tensors or their shapes: {', '.join(wrong[:8])}"
            )


def _averaged(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    mean: dict[str, Tensor] = {}
    for key, value in states[0].items():
        every = [state[key] for state in states]
        if value.is_floating_point():
            mean[key] = linear([each.detach() for each in every], weights)
        elif all(torch.equal(value, each) for each in every):
            mean[key] = value.clone()
        else:
            raise ConfigError(
                f"{key} contains choices (integers) that differ between the adapters, so they have no mean"
            )
    return mean
