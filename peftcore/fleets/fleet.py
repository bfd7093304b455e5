"""Many adapters trained in shared steps on one base: each has separate data, loss and optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel.distributed import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from peftcore.errors import TrainingError, UnknownInjection
from peftcore.fleets import adapter_checkpoints
from peftcore.fleets.feeds import Data
from peftcore.fleets.losses import SHIFTED, Loss, counted, kind_of, loss_of, numbers, shares
from peftcore.fleets.member import Member
from peftcore.fleets.outputs import FEW, MORE, Outputs
from peftcore.fleets.rows import Batch, Collate, count_of, filled_in_front, taken, together
from peftcore.forward.context.counter_based_random import mixed
from peftcore.forward.context.row_random_numbers import Streams
from peftcore.forward.state.host_state import state_of
from peftcore.forward.state.own_losses import loss_in
from peftcore.injection.injection import Injection, injections
from peftcore.injection.switching import activate, route
from peftcore.layers.fsdp import in_group, is_sharded
from peftcore.layers.pieces import ENGINE, is_cut, is_partitioned
from peftcore.utils.progress import Progress

TARGETS = ("labels",)


class Fleet:
    """Trains many adapters at once, each as a member of the fleet. In each step the batches of all members run through
    the base in one forward, and each member's rows use its adapter. Each member's loss is computed from its rows, and
    its optimizer takes a step.

        fleet = Fleet(model)
        for rank in (4, 8, 16):
            with peftcore.activate(model):  # start values come from the base alone, without other adapters (dora)
                injection = peftcore.apply(model, "lora", name=f"rank{rank}", rank=rank)
            fleet.join(injection, data, optimizer=injection.optimizer(torch.optim.AdamW, lr=1e-3), steps=200)
        fleet.run()

    A member gets the same values as if it trained alone, up to rounding, as long as the base itself has neither dropout
    nor batch statistics. Random draws of adapters depend on the member's seed, its step and the target module. The
    caller sets the training mode, ``model.train()``, as in any loop.

    Before the first shared step, the fleet runs two forwards of the base without adapters, with two and with three
    rows. They show which dimensions of an output index the rows. For example, a matrix of similarities between all
    texts and all pictures is cut in both dimensions, so a member gets the similarities between its own texts and its
    own pictures.

    Under DistributedDataParallel, pass the wrapped model, with ``find_unused_parameters=True`` if members take part in
    different numbers of forwards; under FSDP2, pass the sharded model. All processes create the same fleet, each with
    its own part of the data. A member ends at the same step in all processes. For adapters that were applied after the
    model was wrapped, the fleet averages the gradients over the processes, so the same adapters have to join in all
    processes.

    Args:
        model: the adapted model, or a wrapper around it.
        targets: names of batch entries, such as labels, that are passed to the losses but not to the model. With them,
            the model would compute a loss over the rows of all members.
        pad: padding values by name of the tensor: ``{"input_ids": 0, "attention_mask": 0, "labels": -100}``. A tensor
            is padded at the end of each dimension in which other batches are longer.
        collate: a function that replaces padding and concatenation. It gets a list of batches, and returns one batch
            with all their rows in order.
        autocast: the dtype for torch's autocast; None without autocast.

    Attributes:
        members: all members by name, including those that are done.
        forwards: the number of forwards of the base so far.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        targets: Iterable[str] = TARGETS,
        pad: Mapping[str, float] | None = None,
        collate: Collate | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.model, self.members = model, dict[str, Member]()
        self.targets, self.pad, self.collate, self.autocast = tuple(targets), dict(pad or {}), collate, autocast
        self.forwards = 0
        self._host: nn.Module | None = None
        self._norms: dict[str, nn.Module] = {}
        self._outputs = Outputs()

    # ------------------------------------------------------------------------------------------------------ members

    def join(
        self,
        injection: Injection | str,
        data: Data,
        *,
        optimizer: Optimizer,
        loss: Loss | None = None,
        schedule: LRScheduler | None = None,
        steps: int | None = None,
        clip: float | None = None,
        accumulate: int = 1,
        seed: int = 0,
        stop: Callable[[Member], bool] | None = None,
        folder: str | Path | None = None,
        save_every: int | None = None,
        resume: bool = False,
    ) -> Member:
        """Add an adapter as a member, which trains from the next step on.

        Args:
            injection: the adapter, or its name. It has to be trainable.
            data: batches, which are repeated until `steps` are taken; or a function that returns the batches of an
                epoch, given the epoch's number. A batch is a mapping of names to values: tensors with one row for each
                example, lists with one entry for each example, and values that are the same for all members.
            optimizer: an optimizer over the adapter's parameters: ``injection.optimizer(torch.optim.AdamW, lr=...)``.
            loss: a function ``(output, batch) -> loss``. It gets the model's output for the member's rows, and these
                rows of the batch (including labels). It returns the mean loss over the rows. The default is the loss
                that a model of transformers computes from logits and labels. Reading an output that cannot be cut into
                rows is a TrainingError.
            schedule: the schedule of the learning rate; it takes a step after each step of the optimizer.
                `ReduceLROnPlateau` gets the loss of the step.
            steps: the number of optimizer steps; None for one epoch.
            clip: the maximum norm of all its gradients together.
            accumulate: the number of batches in one step. If the model's own loss is a mean over tokens, the loss of
                the step is the mean over the tokens of all these batches.
            seed: the seed of the adapter's random draws in training, and of the order of data that shuffles.
            stop: a function that is called with the member after each step; if it returns True, the member ends early.
                After a resume ``member.losses`` includes the earlier steps.
            folder: the folder for its checkpoints, different for each member. A checkpoint is written when the member
                is done, after each `save_every` steps and by `Fleet.save`.
            save_every: the number of steps between checkpoints.
            resume: whether to continue from the newest checkpoint in `folder`, if there is one. This also works if the
                member had ended: with more steps, after it left the fleet, or after a loss that was not finite.

        Returns:
            The member.

        Raises:
            RouteError: rows of the adapter cannot be distinguished; the message says what to do instead.
            TrainingError: the adapter is frozen, the base trains too, the optimizer has other parameters or needs more
                than gradients, the method's schedule does not fit into the steps, the loss is unknown, or the folder
                belongs to another training.
            CheckpointError: the checkpoint is damaged, or belongs to another training. The message lists the
                differences.
        """
        found = self._named(injection) if isinstance(injection, str) else injection
        self._check(found)
        made = Member(
            found,
            data,
            loss_of(found.model) if loss is None else loss,
            optimizer,
            schedule,
            steps,
            clip,
            accumulate,
            seed,
            stop,
            None if folder is None else Path(folder),
            save_every,
        )
        made.of_tokens = loss is None
        if resume and made.folder is None:
            raise TrainingError(f"resume of {found.name!r} needs folder=..., the folder of its checkpoints")
        if made.folder is not None:
            self._check_folder(made.name, made.folder)
            if resume:
                made.resume()
            adapter_checkpoints.claim(made.folder, made.training, takes_over=resume)
        self._host = found.model
        self._norms = {path: each for path, each in found.model.named_modules() if isinstance(each, _BatchNorm)}
        self.members[made.name] = made
        return made

    def leave(self, name: str) -> Member:
        """Remove a member from the fleet, between two steps. Its adapter stays on the model, with its current values.

        Raises:
            UnknownInjection: the fleet has no such member.
        """
        if name not in self.members:
            raise UnknownInjection(f"the fleet has no member {name!r}; there are: {', '.join(self.members) or 'none'}")
        member = self.members.pop(name)
        member.end("it left")
        return member

    def _check_folder(self, name: str, folder: Path) -> None:
        for each in self.members.values():
            if each.name != name and each.folder is not None and each.folder.resolve() == folder.resolve():
                raise TrainingError(
                    f"{each.name!r} has its checkpoints in {folder}, and each member needs a separate folder: pass "
                    f"folder={str(folder / name)!r}"
                )

    @property
    def active(self) -> list[Member]:
        """The members that still train."""
        return [each for each in self.members.values() if not each.done]

    def _named(self, name: str) -> Injection:
        for module in self.model.modules():
            if name in (found := injections(module)):
                return found[name]
        raise UnknownInjection(
            f"the model has no injection named {name!r}: call peftcore.apply(model, ..., name={name!r}) first"
        )

    def _check(self, injection: Injection) -> None:
        name = injection.name
        if name in self.members and not self.members[name].done:
            raise TrainingError(f"{name!r} is already in the fleet; call leave({name!r}) first")
        if all(each is not injection.model for each in self.model.modules()):
            raise TrainingError(f"{name!r} is on another model than the fleet's; apply it to the fleet's model")
        if self._host is not None and injection.model is not self._host:
            raise TrainingError(
                f"{name!r} is on another part of the model than the other members; apply it to the same module"
            )
        own = {id(each) for found in injections(injection.model).values() for each in found.parameters()}
        base = [path for path, each in self.model.named_parameters() if each.requires_grad and id(each) not in own]
        if base:
            raise TrainingError(
                f"{len(base)} parameters of the base train, such as {base[0]}, but all members share the base: freeze "
                "them (requires_grad_(False)), or train a copy for each adapter: peftcore.apply(..., train=[...])"
            )
        if any(map(is_partitioned, injection.parameters())):
            raise TrainingError(f"{ENGINE}: train a fleet with DDP or FSDP2")
        held = {id(each) for other in self.active for each in other.parameters()}
        if any(id(each) in held for each in injection.parameters() if each.requires_grad):
            raise TrainingError(
                f"{name!r} shares trainable parameters with another member; apply it with parameters of its own"
            )

    # -------------------------------------------------------------------------------------------------------- steps

    def step(self) -> list[Member]:
        """Take one step of every member that still trains, and return these members. The list is empty if all are done.

        If the data, the model's forward or backward, or a loss raises an error, no member takes the step, and the next
        call runs the same batches again. Only buffers that a method updates in its forward, such as the direction of
        VeLoRA, keep their update, as running statistics do in torch.

        If a member's optimizer, method or schedule raises an error, this member is restored to the state before the
        step. All other members take the step, and the next call runs this member's batches again.

        After the steps, `stop` is called and checkpoints are written. If this raises an error, the steps still count,
        and the next call first repeats the failed action. All members are handled before the first error is raised.

        Raises:
            TrainingError: batches cannot be joined, the model computed a loss over all rows, the base computes
                statistics of batches, or a member was frozen after it joined.
        """
        self._settle(self.members.values(), [])
        active = self.active
        for member in active:
            member.check_trains()
        windows = {each: window for each in active if (window := each.window())}
        if not windows:
            self._settle(active, [])
            return []
        self._check_base()
        counts = {each: self._counts(each, window) for each, window in windows.items()}
        found: dict[Member, list[Tensor]] = {each: [] for each in windows}
        for member in windows:
            member.zero()
        try:
            for turn in range(max(map(len, windows.values()))):
                batches = {each: window[turn] for each, window in windows.items() if turn < len(window)}
                self._backward(batches, counts, turn, found)
        except BaseException:
            for member in windows:
                member.zero()
            raise
        self._reduce([*windows])
        values = numbers([sum(losses[1:], losses[0]) for losses in found.values()])
        taken = self._agreed({each: (loss, sum(counts[each])) for each, loss in zip(found, values, strict=True)})
        errors: list[Exception] = []
        for member, (loss, tokens) in taken.items():
            try:
                if math.isfinite(loss):
                    member.take_step(loss, tokens)
                else:
                    member.fail(loss)
                member.forwards += len(windows[member])
            except Exception as error:
                member.zero()
                error.add_note(
                    f"This error was raised in step {member.step + 1} of {member.name!r}, which was not taken."
                )
                errors.append(error)
        self._settle(active, errors)
        return [*windows]

    def _settle(self, members: Iterable[Member], errors: list[Exception]) -> None:
        """Call `settle` for all members, then raise the first error, if there is any."""
        for member in members:
            try:
                member.settle()
            except Exception as error:
                error.add_note(f"This error was raised after step {member.step} of {member.name!r}, which was taken.")
                errors.append(error)
        if errors:
            raise errors[0]

    def run(self) -> list[Member]:
        """Take steps until all members are done, with a progress bar. Returns all members. For a member whose loss
        became NaN or infinite, `failed` is True and `ended` names the step."""
        bar = Progress("training a fleet")
        bar.expect(max((each.steps - each.step for each in self.active if each.steps is not None), default=0))
        try:
            while self.step():
                bar.step()
        finally:
            bar.close()
        return [*self.members.values()]

    def save(self) -> None:
        """Write a checkpoint of every member that has a folder."""
        for member in self.members.values():
            if member.folder is not None:
                member.save()

    @property
    def alone(self) -> int:
        """The number of forwards of the base that separate trainings of the members would have needed."""
        return sum(each.forwards for each in self.members.values())

    def _counts(self, member: Member, window: list[Batch]) -> list[int]:
        shifted = member.of_tokens and kind_of(member.injection.model) == SHIFTED
        return [counted(batch, count_of(batch, member.name), shifted) for batch in window]

    def _check_base(self) -> None:
        mixing = [path for path, each in self._norms.items() if each.training]
        if mixing:
            raise TrainingError(
                f"{mixing[0]} computes statistics of the batch, which would mix the members: call "
                f"model.get_submodule({mixing[0]!r}).eval(), also for other such modules, or train the adapters one by "
                "one"
            )

    def _backward(
        self,
        batches: Mapping[Member, Batch],
        counts: Mapping[Member, list[int]],
        turn: int,
        found: dict[Member, list[Tensor]],
    ) -> None:
        """Run one forward with the batches of these members, and one backward."""
        host = self._host
        assert host is not None
        whole = self._moved(together({each.name: batch for each, batch in batches.items()}, self.pad, self.collate))
        bounds, names, rows = {}, list[str](), 0
        for member, batch in batches.items():
            size = count_of(batch, member.name)
            bounds[member] = rows, rows + size
            names += [member.name] * size
            rows += size
        rank = torch.distributed.get_rank() if in_group() else 0
        seeds = {each.name: mixed(each.seed, each.step, turn, *([rank] if rank else ())) for each in batches}
        inputs = {key: value for key, value in whole.items() if key not in self.targets}
        if len(bounds) > 1 and not self._outputs.learned:
            self._learn(inputs, rows)
        with torch.enable_grad(), self._casting(), route(host, names, seeds=seeds):
            output = self.model(**inputs)
            self._check_no_loss(output, inputs)
            self._check_fillings(batches, bounds, whole)
            if len(bounds) > 1 and not self._outputs.know(output):
                self._learn(inputs, rows)
            total: Tensor | None = None
            for member, (start, stop) in bounds.items():
                own = output if len(bounds) == 1 else self._outputs.part(output, start, stop, rows)
                loss = member.loss_function(own, taken(whole, [*range(start, stop)]))
                if not isinstance(loss, Tensor) or loss.dim():
                    raise TrainingError(f"the loss of {member.name!r} must be a scalar tensor, but is {loss!r:.80}")
                share = shares(counts[member], member.of_tokens)[turn]
                loss = (loss + member.injection.losses().to(loss.device)) * share
                found[member].append(loss.detach())
                total = loss if total is None else total + loss
        self.forwards += 1
        assert total is not None
        total.backward()  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _learn(self, inputs: Batch, rows: int) -> None:
        """Find which dimensions of the output index the rows, by running the base on `FEW` rows of a batch and on
        `MORE` rows."""
        host = self._host
        state = None if host is None else state_of(host)
        assert host is not None and state is not None
        few, more = (taken(inputs, [0, 1, rows - 1][:count]) for count in (FEW, MORE))
        streams = Streams(next(iter(host.parameters())).device)
        before = streams.states()
        try:
            with self._casting(), activate(host), state.recorder.unrepeated():
                one = self.model(**few)
                streams.set(before)
                self._outputs.learn(one, self.model(**more))
        finally:
            streams.set(before)

    def _casting(self) -> AbstractContextManager[Any]:
        if self.autocast is None:
            return nullcontext()
        assert self._host is not None
        device = next(iter(self._host.parameters())).device
        return torch.autocast(device.type, dtype=self.autocast)

    def _moved(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Returns a batch on the model's device."""
        assert self._host is not None
        device = next(iter(self._host.parameters())).device
        return {key: each.to(device) if isinstance(each, Tensor) else each for key, each in batch.items()}

    def _check_no_loss(self, output: Any, inputs: Mapping[str, Any]) -> None:
        if loss_in(output, inputs) is not None:
            raise TrainingError(
                "the model computed a loss over the rows of all members: name the inputs it is computed from, "
                f"Fleet(..., targets={(*self.targets, '...')})"
            )

    def _check_fillings(
        self, batches: Mapping[Member, Batch], bounds: Mapping[Member, tuple[int, int]], whole: Batch
    ) -> None:
        """Check that `collate` did not pad in front of the rows of members that draw random numbers by position."""
        for member, (start, stop) in bounds.items() if self.collate is not None else ():
            routed = member.injection.state.now().route
            drew = routed is not None and member.name in routed.drew
            if drew and filled_in_front(batches[member], taken(whole, [*range(start, stop)])):
                raise TrainingError(
                    f"{member.name!r} draws random numbers by token position, but the collate function shifts the "
                    "tokens by padding shorter rows in front. Pad at the end, or make all rows equally long"
                )

    def _agreed(self, found: dict[Member, tuple[float, int]]) -> dict[Member, tuple[float, int]]:
        """Returns the loss and the number of tokens of each member. If several processes train together, returns the
        mean of their losses and the sum of their tokens, so that all processes end a member at the same step."""
        if not (in_group() and self._reduces()):
            return found
        assert self._host is not None
        device = next(iter(self._host.parameters())).device
        told = torch.tensor([*found.values()], device=device, dtype=torch.float64)
        torch.distributed.all_reduce(told)
        count = torch.distributed.get_world_size()
        return {each: (loss / count, int(tokens)) for each, (loss, tokens) in zip(found, told.tolist(), strict=True)}

    def _reduces(self) -> bool:
        return isinstance(self.model, DistributedDataParallel) or is_sharded(self.model)

    def _reduce(self, members: Iterable[Member]) -> None:
        """Average the gradients of adapters that were applied after the model was wrapped over all processes.
        DistributedDataParallel and FSDP2 do not average these."""
        if not (in_group() and self._reduces()):
            return
        # A private attribute: nothing public tells which parameters the wrapper has seen.
        seen = {id(each) for each in getattr(self.model, "_module_parameters", ())}
        for parameter in (each for member in members for each in member.parameters()):
            if parameter.grad is not None and id(parameter) not in seen and not is_cut(parameter):
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad.div_(torch.distributed.get_world_size())

    def __iter__(self) -> Iterator[Member]:
        return iter(self.members.values())

    def __len__(self) -> int:
        return len(self.members)

    def __repr__(self) -> str:
        return f"Fleet({', '.join(map(repr, self.members.values())) or 'no members'})"
