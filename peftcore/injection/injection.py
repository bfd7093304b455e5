"""The `Injection`: a handle on one applied method, to switch, train, merge, save and remove it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from peftcore.contract.compositions import Stack
from peftcore.contract.installed_methods import AppliedMethod, Installed
from peftcore.contract.operators import Combiner, InputOperator, trainable_numbers
from peftcore.contract.surgeon_protocol import Graft, Wishes
from peftcore.errors import (
    AdapterInUse,
    CompositionError,
    InactiveSite,
    MergeError,
    NoRouters,
    RouteError,
    SwapError,
    UnknownInjection,
)
from peftcore.forward.choice.scopes import Chosen
from peftcore.forward.class_swap import is_reached
from peftcore.forward.context.routers import Ledger
from peftcore.forward.state.host_state import HostState, drop_state, state_of
from peftcore.forward.state.slot import slot_of
from peftcore.injection import merging, router_report, swapping
from peftcore.injection.applied import HybridPart, choose_trained, parts_of
from peftcore.injection.freezing import freeze, thaw
from peftcore.injection.originals import Fingerprint, Keep
from peftcore.injection.router_report import RouterReport
from peftcore.injection.summary import Summary
from peftcore.layers.layer import GRAFTED
from peftcore.layers.model_locks import changing
from peftcore.layers.pieces import ENGINE, is_partitioned
from peftcore.libraries.save_pretrained import note_form
from peftcore.surgery.installation import release, uninstall
from peftcore.surgery.surgeon import RecordingSurgeon
from peftcore.surgery.watched_sites import watched_sites
from peftcore.targets.sites import Site
from peftcore.utils.journal import Journal

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo


class AdapterFiles(Protocol):
    """The functions of `peftcore.files.save_load` that the methods of an `Injection` call. That module is in a higher
    layer of the package, so it is not imported here."""

    def save(self, injection: Injection, path: Path, formats: Sequence[str], weights: bool, metrics: Any, /) -> None:
        """Write an adapter into a folder or a file."""

    def push(
        self, injection: Injection, repository: str, formats: Sequence[str], metrics: Any, **options: Any
    ) -> CommitInfo | None:
        """Upload an adapter to a model hub."""

    def located(self, path: str | os.PathLike[str], revision: str | None, /) -> Path:
        """Returns the local path of a saved adapter. An adapter on a model hub is downloaded."""

    def values_of(self, injection: Injection, path: Path, /) -> Injection:
        """Returns a saved adapter, read for the model of an injection but not installed in it."""


class Injection(Installed):
    """One method that was applied to a host, under a name. `apply` and `load` return an injection, and
    `injections(model)` returns all of them. Once an injection is removed, its methods that would act on the host raise
    UnknownInjection.

    Attributes:
        name: its name on this host.
        model: the host.
        method: the method.
        config: its options.
    """

    _files: ClassVar[AdapterFiles]
    """The functions that save and load adapters. `peftcore.files.save_load` sets this attribute."""

    def __init__(self, name: str, surgeon: RecordingSurgeon, state: HostState) -> None:
        super().__init__(name, surgeon)
        self._surgeon: RecordingSurgeon = surgeon
        self.wishes: Wishes = surgeon.wishes
        self.state = state
        self.made_of: dict[str, Fingerprint] = {}
        """Fingerprints of the base weights from which operators were computed, by key of the operator."""
        self._merge: merging.MergeInForce | None = None
        self._low_memory = False
        self._chosen: list[bool] = []  # which tensors its method lets train, since somebody last asked it
        self._ledgers: dict[str, Ledger] = {}

    @property
    def whole(self) -> Injection:
        return self

    @property
    def parts(self) -> dict[str, HybridPart]:
        return parts_of(self._surgeon, self)

    def owner(self, graft: Graft) -> AppliedMethod:
        """Returns the injection to which a graft (an installed operator) belongs. For a hybrid, returns the part to
        which it belongs."""
        owner: AppliedMethod = self
        for part in filter(None, graft.part.split("/")):
            owner = owner.parts[part]
        return owner

    @property
    def selections(self) -> dict[str, list[Site]]:
        """The sites of each target that the method selected. They are stored in files, so that loading does not resolve
        the targets again."""
        return self._surgeon.selections

    def base_modules(self) -> Iterator[nn.Module]:
        """Yields the host's own modules, without the operators of any injection."""
        yield from self._surgeon.resolver.modules.values()

    @property
    def main_selection(self) -> list[Site]:
        """The sites of the user's target, or of the default target. For a hybrid, these are the sites of all parts."""
        return [site for key, sites in self.selections.items() if not key.rpartition("/")[2] for site in sites]

    @property
    def trained_along(self) -> tuple[str, ...]:
        """Paths of the host's parameters that train because the user named them, or a module that holds them, in
        `train`."""
        own = [graft.site for graft in self.grafts if graft.trained_along]
        return tuple(f"{site.module_path}.{site.tensor}".lstrip(".") for site in own)

    @property
    def ties(self) -> Mapping[str, tuple[str, ...]]:
        """The other parameters of the host that share the tensor of an operator's site (tied weights), by the
        operator's name in files."""
        return self._surgeon.ties

    @property
    def active(self) -> bool:
        """Whether it acts in this thread."""
        return self.name in self.state.current()

    @property
    def merged(self) -> bool:
        """Whether its effect is in the host's weights now."""
        return self._merge is not None

    @property
    def low_memory(self) -> bool:
        """Whether to save memory at the cost of speed; False by default. If True, weight operators (dora, oft, hra)
        compute the effective weight in training, once in forward and again in backward, instead of using their
        activation form. Expert and attention modules that these operators change run again as a whole in backward.
        `generate` and `cache_weights` do not cache effective weights."""
        return self._low_memory

    @low_memory.setter
    def low_memory(self, mode: bool) -> None:
        with changing(self.model):
            self._alive()
            self._low_memory = mode
            self._replan()

    def enabled(self) -> Chosen:
        """Activate this injection in addition to the active ones. As a context manager, this holds until the end of the
        block. If a composition is in force, the injection acts in all of its branches.

        Raises:
            RouteError: a route is in force, and it assigns no row to this injection.
        """
        self._alive()
        choice, name = self.state.now(), self.name
        if choice.route is not None and name not in choice.route.names:
            raise RouteError(f"a route is in force and assigns no row to {name!r}: name it in the route")
        composition = choice.composition
        if composition is not None and name not in choice.bound:
            composition = Stack(composition, name)
        active = choice.active if choice.route is not None else self.state.ordered((*choice.active, name))
        return Chosen(self.state, replace(choice, active=active, composition=composition))

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Context manager in which the injection is inactive, and outputs are bit-identical to those without it. A
        merged injection is unmerged until the end of the block. The injection's rows in a route, and its parts in a
        composition, run the base model without adapters. All other rows and parts stay as they are.

        Raises:
            MergeError: it is merged and cannot be unmerged; or it cannot be merged again at the end of the block.
            AdapterInUse: it is merged, and a forward of the model is running at the beginning or at the end of the
                block.
            CompositionError: the composition in force needs it to combine outputs (`Fuse`).

        If merging again fails at the end of the block, by any error or Ctrl-C, the injection stays active and unmerged.
        The weights are then those of the base, bit for bit, and a note on the error says this.
        """
        self._alive()
        choice = self.state.now()
        if self.name in choice.bound and any(isinstance(graft.operator, Combiner) for graft in self.grafts):
            raise CompositionError(
                f"{self.name!r} combines the outputs of others in a composition, so it cannot be disabled: exit the "
                "composition first"
            )
        merged = None
        try:
            with changing(self.model):
                merged = self._merge
                self.unmerge()
            with self.state.choices.block(self.state.now().without(self.name)):
                yield
        finally:
            if merged is not None:
                self._merge_again(merged)

    def trainable(self, mode: bool = True) -> None:
        """Make the injection's parameters trainable, or freeze them. No other parameter of the host changes."""
        with changing(self.model):
            self._alive()
            with self.state.kept(*([self.name] if mode else [])), Journal() as journal:  # then it trains, and stays
                if mode:
                    choose_trained(journal, self)
                    journal.set(self, "_chosen", [parameter.requires_grad for parameter in self.parameters()])
                else:
                    freeze(journal, self.parameters())

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the injection's tensors by ``<site path>.<operator tensor>``, without the injection's name, as in
        files. They are the operators' own tensors, not copies. An idle adapter (offloaded to CPU or disk) is restored
        first. Its tensors have values until it is offloaded again."""
        with self.state.kept(self.name):
            return super().state_dict()

    def losses(self) -> Tensor:
        """Returns the sum of the method's losses in the last training forward of the model in this thread. Use it if
        the model's output contains no loss; otherwise the method's losses were already added to that loss. The result
        has shape ``[]`` and an autograd graph, so you can add it to your loss.

            loss = criterion(model(x), y) + injection.losses()

        A call resets the sum: further calls return zero until the next forward. The sum is also zero if the method adds
        no losses. In a route it covers the rows of this injection.
        """
        self._alive()
        losses = self.state.recorder.losses.take(self.state, self.name)
        if losses:
            return sum(losses[1:], losses[0])
        return torch.zeros((), device=next((each.device for each in self.parameters()), None))

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """Context manager in which the routers of a mixture of experts record sums of their gates, for `report`. All
        forwards in which the injection acts count, in every thread. A forward that backward repeats (checkpointing)
        counts once. Recording costs a few operations per router, and two numbers per expert. A compiled model is
        compiled again at the beginning and at the end of the block.

            with injection.reporting():
                model(**batch)
            print(injection.report())

        Raises:
            NoRouters: none of its operators is a router.
        """
        self._alive()
        routers = router_report.routers_of(self.name, self.operators)
        within = any("ledger" in vars(router) for router in routers.values())
        with Journal(temporary=True) as journal:
            journal.afterwards(self._replan)
            if within:  # else the sums stay, for `report`
                journal.set(self, "_ledgers", self._ledgers)
            self._ledgers = {path: Ledger() for path in routers}
            for path, router in routers.items():
                journal.put(router, "", "ledger", self._ledgers[path])
            self._replan()  # while they are watched, those of several adapters do not run as one
            yield

    def report(self) -> RouterReport:
        """Returns statistics of the routers of a mixture of experts, recorded in the last block of `reporting` or so
        far in the current block: the share of each expert, the balance of the shares, the entropy of the gates, and
        dropped tokens. Padding does not count. The report prints as a table, and has the methods ``.json()``,
        ``.to_dict()`` and ``.plot("routers.png")``.

        Raises:
            NoRouters: the injection has no routers, or they were not recorded yet.
        """
        routers = router_report.routers_of(self.name, self.operators)
        if not self._ledgers:
            raise NoRouters(
                f"the routers of {self.name!r} were not recorded: run the model within injection.reporting()"
            )
        return router_report.report(self.name, self.method.name, routers, self._ledgers)

    def optimizer(
        self, cls: Callable[..., Optimizer], *, lr: float, total_steps: int | None = None, **options: Any
    ) -> Optimizer:
        """Returns a torch optimizer of class `cls` over the method's parameter groups, with the method's rule for
        gradients.

        Args:
            cls: any torch optimizer, such as ``torch.optim.AdamW``.
            lr: the learning rate; methods may use another one for some parameters.
            total_steps: the number of steps of the training, for methods with a schedule.
            options: the other options of the optimizer.

        Raises:
            TrainingError: the injection is frozen, or the method's schedule does not fit into `total_steps`.
        """
        self._alive()
        from peftcore.training.optimizer import method_optimizer

        with self.state.kept(self.name):
            return method_optimizer(self, cls, lr, total_steps, options)

    def merge(
        self,
        keep: Keep = "cpu",
        *,
        into: merging.Into = "float",
        max_error: float = merging.BOUND,
        weight: float = 1.0,
    ) -> merging.MergeReport:
        """Merge the injection into the host's weights. Merging again in the same way changes nothing.

        The injection has to be active in every thread, without a route or a composition. While it is merged it acts in
        every forward, so activating other injections without it is refused.

        The tensors of the host are not written to, since other models may share them. New tensors replace them in all
        modules of the host, and `unmerge` restores the old tensors. Therefore a graph that was captured by hand
        (``torch.cuda.CUDAGraph``) has to be captured again after `merge` and after `unmerge`. Compiled functions use
        the new tensors automatically. Tensors that FSDP2 shards are an exception: their values are overwritten.

        A weight that its module computes from others (weight norm, pruning, any parametrization of torch) stays
        computed if the computation can produce the merged value, as a weight norm can. Otherwise it is a plain
        parameter while merged, and permanently after `bake`.

        Args:
            keep: how the originals are kept for `unmerge`. "device" keeps the tensors themselves; "cpu" keeps them in
                CPU memory (a copy, of tensors on other devices); "record" keeps a compressed record of the differences
                in ulps; None keeps nothing, so `unmerge` is impossible. Codes of quantized weights, and the parameters
                of computed weights, are kept where they are.
            into: how quantized weights are written: "float" makes their modules dense; "same" packs the merged weights
                again, which costs accuracy: the report says how much at each site.
            max_error: the error (norm of the difference over norm of the weight) above which packing again is refused.
            weight: the factor of the change that is written: 0.5 writes half of it, -1 subtracts it from the weights.

        Returns:
            A report of the written tensors; it prints as a table.

        Raises:
            ConfigError: an argument has a value that is not listed above.
            NotMergeable: the method has no merged form.
            MemoryLimit: the merged tensors certainly do not fit into the free memory of a GPU.
            MergeError: the injection is already merged with other arguments, or is not active in every thread; a tensor
                of the base trains; the result would not be finite; or a weight cannot be packed again with an error of
                at most `max_error`. No weight was changed.
            AdapterInUse: a forward of the model is running, in this thread or another one. No weight was changed. (A
                forward that begins during the merge waits for its end.)
        """
        wanted = merging.MergeOptions(keep, into, max_error, weight)
        with changing(self.model):
            self._alive()
            return self._merge_as(wanted).report

    def _merge_as(self, wanted: merging.MergeOptions, whole: Journal | None = None) -> merging.MergeInForce:
        merged = self._merge
        if merged is None:
            kept, alone = self.state.kept(self.name), self._between_forwards("merged", everyone=True)
            with kept, alone, (whole or Journal()).part() as journal:
                journal.afterwards(self._rewritten)
                merged = merging.merge(self, journal, wanted)
                with self.state.choices.unchanged():  # another thread may have chosen meanwhile
                    merging.check_choices(self)
                    self._note(journal, merged)
                self._rewritten()
        elif merged.wanted != wanted:
            raise MergeError(f"{self.name!r} is merged already, with {merged.wanted}; unmerge() it first")
        return merged

    def _merge_again(self, merged: merging.MergeInForce) -> None:
        with changing(self.model):
            if self.state.injections.get(self.name) is not self:
                return  # removed in the block
            try:
                self._merge_as(merged.wanted)
            except BaseException as error:
                if self._merge is None:
                    error.add_note(
                        f"Merging {self.name!r} again at the end of disabled() failed: it stays unmerged, and the "
                        "weights are those of the base. Call merge() to merge it again."
                    )
                raise

    @property
    def made_dense(self) -> tuple[str, ...]:
        """The paths of quantized modules that are dense while it is merged."""
        return () if self._merge is None else self._merge.report.dense

    def unmerge(self) -> None:
        """Restore the host's tensors, bit for bit. The injection then acts through its operators again.

        Raises:
            MergeError: it was merged with ``keep=None``, another injection was merged on top, or the merged tensors
                were loaded, trained, cast or replaced since; nothing was changed.
            AdapterInUse: a forward of the model is running; nothing was changed.
        """
        with changing(self.model):
            self._alive()
            if self._merge is not None:
                with self._between_forwards("unmerged", everyone=True), Journal() as journal:
                    self._unmerge(journal, self._merge)

    def _unmerge(self, journal: Journal, merged: merging.MergeInForce) -> None:
        journal.afterwards(self._rewritten)
        merging.unmerge(self, journal, merged)
        self._note(journal, None)
        self._rewritten()

    @contextmanager
    def _between_forwards(self, done: str, everyone: bool) -> Iterator[None]:
        """Context manager in which no forward that uses this injection runs; with `everyone`, no forward of the model
        at all. Such forwards that begin inside the block wait for its end.

        Raises:
            AdapterInUse: such a forward is already running.
        """
        with self.state.exchanging(self.name, everyone) as running:
            if any(everyone or self.name in choice.named for choice in running):
                which = "" if everyone else " that uses it"
                raise AdapterInUse(
                    f"{self.name!r} cannot be {done} now: a forward of the model{which} runs, and would compute a part "
                    "with it and a part without it. Wait until the forward has ended, then try again"
                )
            yield

    def bake(self) -> None:
        """Merge permanently and remove the injection: the host keeps the injection's effect (`merge_and_unload` of
        peft).

        Raises:
            NotMergeable, MergeError, AdapterInUse: as `merge`; the injection is still there.
            RouteError, CompositionError: as `remove`.
        """
        with changing(self.model), self._leaving(everyone=True) as journal:
            merged = self._merge or self._merge_as(merging.MergeOptions(keep=None), journal)
            merging.let_go(journal, merged)
            self._note(journal, None)
            self._take_out(journal)
            if merged.report.dense:
                note_form(journal, self.model, merged.report.dense)

    def _note(self, journal: Journal, merge: merging.MergeInForce | None) -> None:
        """Record whether the injection is merged."""
        others = tuple(name for name in self.state.merged if name != self.name)
        journal.set(self, "_merge", merge)
        journal.set(self.state, "merged", others if merge is None else (*others, self.name))

    def remove(self) -> None:
        """Remove this injection: modules, classes, hooks, requires_grad and weights are as they were before it was
        applied. The other active injections stay active; if another thread or task chose this one, the next forward
        there raises UnknownInjection.

        Raises:
            MergeError: it is merged, and `unmerge` is impossible.
            RouteError, CompositionError: a route or composition that is in force here uses it.
            AdapterInUse: a forward that uses the injection is running; or the injection is merged, and any forward of
                the model is running. Nothing was changed.
        """
        with changing(self.model), self._leaving(everyone=self.merged) as journal:
            if self._merge is not None:
                self._unmerge(journal, self._merge)
            self._take_out(journal)

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        format: str | Sequence[str] = "peftcore",
        weights: bool = False,
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the adapter alone into the folder `path`, or into one file.

        If the model's weights are sharded over processes (FSDP2), all processes call this, and the first one writes.

        Args:
            path: a folder; it is created if missing, and files of the same format in it are replaced. A path that ends
                with ".safetensors" is a single file, for formats that allow one (peftcore's own, "diffusers", "kohya").
            format: "peftcore" (``adapter.safetensors``, and a readable ``adapter.json``), the format of another library
                ("peft", "diffusers", "kohya"), or a list of several. It may name the model of a pipeline:
                "diffusers/text_encoder_2".
            weights: record a digest of the base weights at the sites, so that `load` refuses a base with other weights.
            metrics: numbers for the model card, by name, as ``{"accuracy": 0.93}``, or by data set and name, as
                ``{"glue": {"accuracy": 0.93}}``.

        Raises:
            ExportError: the format of another library cannot store this adapter, or not in a single file; or metrics
                are not numbers, or were passed for a single file. Nothing was written.
        """
        formats = (format,) if isinstance(format, str) else tuple(format)
        with changing(self.model):
            self._alive()
            with self.state.kept(self.name):
                self._files.save(self, Path(path), formats, weights, metrics)

    def swap(
        self,
        source: str | os.PathLike[str] | Injection | Mapping[str, Tensor],
        *,
        revision: str | None = None,
    ) -> None:
        """Replace the values of this adapter by those of another adapter of the same method. The name, the tensor
        objects and the choice of active adapters do not change, so the model is not traced or compiled again
        (`hotswap_adapter` of peft).

            served = peftcore.load(model, "adapters/news", name="slot", room={"rank": 64})
            served.swap("adapters/law")  # of any rank up to 64, and any alpha

        From then on this injection computes what the other adapter would compute if it were loaded. The other adapter
        must have the same target modules and the same options, with two exceptions. Options that determine tensor sizes
        may be smaller than the reserved room (`room` of `load`). If the scale is different, the values are multiplied
        to compensate. This injection keeps its own dropout.

        A swap is refused while a forward of the model, or a call of `using`, names this injection. Compiled forwards,
        and forwards of parts of the model that run by themselves, are not detected: swap between them. A generation in
        which each step is a separate call continues with its cache of keys and values.

        Args:
            source: anything that `load` accepts; or an adapter of this model or of a model of the same shape; or a
                state dict from `state_dict` of an adapter with the same options.
            revision: see `load`.

        Raises:
            SwapError: the values cannot be replaced exactly, because the other adapter has another method, other target
                modules, options or dtypes, or a rank above the reserved room; this injection is in use in a forward or
                a call of `using`; or DeepSpeed has sharded it (ZeRO-3).
            MergeError: this injection is merged, or the other adapter is computed from weights into which an adapter is
                merged.
            CheckpointError, HubError, HostMismatch, NewerFormat, UnknownMethod: as `load`.
            MemoryLimit: this injection is idle, and the memory is not enough to restore it.

        After an error nothing is changed.
        """
        self._check_swappable()
        if source is self:
            return
        if isinstance(source, Mapping):
            self._swap(lambda: swapping.matched_state(self, source))
        elif isinstance(source, Injection):
            self._swap(lambda: swapping.matched(self, source), source)
        else:
            place = self._files.located(source, revision)  # other threads can change the model while it is fetched
            self._swap(lambda: swapping.matched(self, self._files.values_of(self, place)))

    def _swap(self, find: Callable[[], swapping.Swap], source: Injection | None = None) -> None:
        other = self if source is None else source
        with changing(self.model, other.model), self.state.kept(self.name), other.state.kept(other.name):
            self._check_swappable()
            found = find()
            with swapping.exchanging(self.state, self.name):
                swapping.write(self, found)

    def _check_swappable(self) -> None:
        self._alive()
        if self.merged:
            raise MergeError(f"{self.name!r} is merged, so its values are in the base's weights: unmerge() it first")
        if any(map(is_partitioned, self.parameters())):
            raise SwapError(f"{ENGINE}: load the other adapter into the model before deepspeed.initialize")

    def push_to_hub(
        self,
        repo_id: str,
        *,
        format: str | Sequence[str] = "peftcore",
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
        metrics: Mapping[str, Any] | None = None,
    ) -> CommitInfo | None:
        """Upload the adapter alone, with its model card, to a repository on a model hub. Returns the `CommitInfo` of
        huggingface_hub; as a string it is the URL of the commit. A missing repository is created. A ``README.md`` that
        peftcore did not write is kept. If the model's weights are sharded over processes, all processes call this; the
        first one uploads, and the other ones get None.

        Args:
            repo_id: "owner/name".
            format: see `save`.
            private: True makes a new repository private; by default the owner's setting applies.
            revision: a branch, which is created if missing; the main branch by default.
            commit_message: the message of the commit.
            token: the token for huggingface_hub; by default the token of ``hf auth login`` or ``HF_TOKEN``.
            create_pr: True proposes the commit as a pull request.
            metrics: see `save`.

        Raises:
            ExportError: as in `save`; nothing was uploaded.
            HubError: huggingface_hub or the token is missing, or the hub refuses or does not respond. The message says
                what to do.
        """
        self._alive()
        with self.state.kept(self.name):
            return self._files.push(
                self,
                repo_id,
                (format,) if isinstance(format, str) else tuple(format),
                metrics,
                private=private,
                revision=revision,
                message=commit_message or f"Upload an adapter of {self.method.name}",
                token=token,
                create_pr=create_pr,
            )

    def summary(self) -> Summary:
        """Returns a summary of the injection, including mixed or broken states."""
        parameters = list(self.parameters())
        training = [parameter.requires_grad for parameter in parameters]
        return Summary(
            name=self.name,
            method=self.method.name,
            sites=len(self.grafts),
            parameters=sum(parameter.numel() for parameter in parameters),
            trainable=trainable_numbers(module for _, module in self.modules()),
            active=self.active,
            merged=self.merged,
            dtypes=tuple(sorted({str(p.dtype).removeprefix("torch.") for p in parameters})),
            devices=tuple(sorted({str(p.device) for p in parameters})),
            irregular=tuple(self._irregular(training)),
        )

    def check(self) -> None:
        """Verify that every operator is still installed at its site and will be called.

        Raises:
            InactiveSite: sites were replaced or patched, or lost their operators; the message names them.
        """
        broken = list(self._broken())
        if broken:
            raise InactiveSite(
                f"{self.name!r} is not fully installed any more: {'; '.join(broken)}. Call remove(), then apply or "
                "load it again"
            )

    def __repr__(self) -> str:
        return f"Injection({self.summary()})"

    def _irregular(self, training: list[bool]) -> Iterator[str]:
        if any(training) and not all(training) and training != self._chosen:
            yield f"{sum(training)} of {len(training)} tensors train"
        yield from self._broken()

    def _broken(self) -> Iterator[str]:
        for graft in self.grafts:
            for site in graft.holders:
                if fault := self.fault(site, graft):
                    yield fault
                elif self._module(site.module_path) is not site.module:
                    yield f"{site.path} was replaced"

    def fault(self, site: Site, graft: Graft) -> str:
        """Returns the reason why a call of a site's module does not reach an operator, as text; empty if it does."""
        slot = slot_of(site.module)
        swapped = any(GRAFTED in vars(cls) for cls in type(site.module).__mro__)
        mounts = () if slot is None else slot.mounts.get(self.name, ())
        if not swapped or all(mount.operator is not graft.operator for mount in mounts):
            return f"{site.path} lost its operator"
        return "" if is_reached(site.module) else f"{site.path} has a forward set on the instance"

    @cached_property
    def _modules(self) -> dict[str, nn.Module]:
        return {site.module_path: site.module for graft in self.grafts for site in graft.holders}

    def module_at(self, path: str) -> nn.Module:
        """Returns the module that was at a path when the injection was applied, even if it has moved. For a path that
        is not the path of a site, returns the current module at that path."""
        return self._modules.get(path) or self.model.get_submodule(path)

    def _module(self, path: str) -> nn.Module | None:
        """Returns the module that is at a path now; None if the path does not exist any more."""
        try:
            return self.model.get_submodule(path)
        except AttributeError:
            return None

    def _rewritten(self) -> None:
        for graft in self.grafts:
            for site in graft.holders:
                if (slot := slot_of(site.module)) is not None:
                    slot.rewritten = object()
        self._replan()

    def _replan(self) -> None:
        for slot in self.state.slots:  # those too that hold attributes alone: plans depend on what is merged
            slot.changed()
        self.state.replan()

    def stored_anew(self, module: nn.Module) -> None:
        """Update the layers (`Layer`) of a module's sites, after the module was quantized or made dense."""
        self._surgeon.stored_anew(module)

    def check_routable(self, by_tokens: bool = False) -> None:
        """Verify that rows of a batch can be distinguished at every site, and with `by_tokens` the tokens of each row.

        Raises:
            RouteError: the method or a site cannot distinguish rows or tokens. For example, an expert receives only the
                tokens that are routed to it, and position tables receive no rows.
        """
        if not self.method.tags.per_row:
            raise RouteError(
                f"{self.method.name} acts on the whole batch, so it cannot be routed by rows: activate it for all rows"
            )
        if any(site.layer.in_pieces for graft in self.grafts for site in graft.holders):
            raise RouteError(
                f"{self.name!r} acts on tensor-parallel layers, which run all rows at once: activate one adapter for "
                "all rows, or route in the model before it is parallelized"
            )
        for site in self.sites:
            if not site.separable:
                raise RouteError(
                    f"{self.name!r} acts on {site.path}, where rows of the batch cannot be distinguished: exclude it, "
                    "or activate one adapter for all rows"
                )
            if by_tokens and not site.of_tokens:
                raise RouteError(
                    f"{self.name!r} acts on {site.path}, which does not process each token independently: route whole "
                    "rows, without `since`"
                )

    def check_combinable(self) -> None:
        """Verify that the module outputs of this injection can be combined with those of other injections.

        Raises:
            CompositionError: the injection acts inside attention, on a module's input, or on the whole sequence or
                batch.
        """
        inside = any(graft.site.form == "attention" for graft in self.grafts)
        if inside or not self.method.tags.per_row or any(isinstance(g.operator, InputOperator) for g in self.grafts):
            raise CompositionError(
                f"{self.name!r} ({self.method.name}) does not act only on module outputs, so its outputs cannot be "
                "summed, averaged, split or fused with others: use peftcore.Stack"
            )

    def _alive(self) -> None:
        if self.state.injections.get(self.name) is not self:
            raise UnknownInjection(f"injection {self.name!r} is not on its host any more")

    @contextmanager
    def _leaving(self, everyone: bool) -> Iterator[Journal]:
        """Context manager that yields the journal (undo record) in which the injection is removed from the host. If it
        was removed, its offloaded values are deleted at the end.

        Raises:
            AdapterInUse: as `_between_forwards`.
        """
        self._alive()
        state = self.state
        state.choices.check_free([self.name])
        try:
            with self._between_forwards("removed", everyone), Journal() as journal:
                yield journal
        finally:
            if state.residency is not None and self.name not in state.injections:
                state.residency.remove(self.name)

    def _take_out(self, journal: Journal) -> None:
        """Remove the injection's operators from the model. If no injection remains, unfreeze the base."""
        state, name = self.state, self.name
        journal.afterwards(state.choices.restore, state.choices.saved(shared=1))
        journal.afterwards(self._replan)
        watched_sites(state).forget(journal, self._surgeon, name)
        uninstall(journal, self._surgeon, state, name)
        state.forget(journal, name)
        if not state.injections:
            thaw(journal, state.frozen)
            release(journal, self.model, state)
            if state.can_go():  # else others are told first that their choice is gone
                drop_state(journal, self.model)


def installed(state: HostState) -> dict[str, Injection]:
    """Returns the injections of a host's state by name, in the order in which they were applied."""
    return cast("dict[str, Injection]", state.injections)


def injections(model: nn.Module) -> dict[str, Injection]:
    """Returns the host's injections by name, in the order in which they were applied."""
    state = state_of(model)
    return dict(installed(state)) if state else {}
