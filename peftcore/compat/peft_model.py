"""`PeftModel`, a subclass of peft's `PeftModel` that wraps a model adapted by peftcore, for libraries that require
peft's class."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import peft
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from peftcore.compat.arguments import check_no_more, without_peft_arguments
from peftcore.compat.configs import AdapterConfig, apply_beside, check_same_state, config_of, drop_nothing
from peftcore.compat.folders import config_in, save_folder
from peftcore.compat.schedules import check_driven, has_schedule
from peftcore.compat.training_state import digests, load_training_state, save_training_state
from peftcore.compat.tuner import Tuner
from peftcore.errors import ConfigError, MergeError, TrainingError, UnsupportedHost
from peftcore.files.auto_classes import peft_task_of
from peftcore.files.save_load import load
from peftcore.forward.state.host_state import known
from peftcore.injection.injection import Injection, injections, installed
from peftcore.injection.switching import activate, route
from peftcore.layers.fsdp import whole_from

BASE = "__base__"
"""The name that means "no adapter" in peft's argument `adapter_names`."""
ALONE = "default"
"""The name of the adapter that peft saves directly into a folder, and not into a subfolder with the adapter's name."""


class PeftModel(peft.PeftModel):  # type: ignore[misc]
    """A subclass of `peft.PeftModel` that wraps a model adapted by peftcore.

    All state is in the adapted model, so changes by functions of `peftcore` are visible here, and vice versa. One
    adapter is active and trains, as in peft, unless `peftcore.activate` activates others.

    Args:
        model: the model; changed in place. If `peft_config` is None, it has to be adapted already, and is not changed.
        peft_config: a method, as `peftcore.apply` accepts it, or a configuration of peft.
        adapter_name: the adapter's name.
        options: other arguments of `peftcore.apply`.

    Raises:
        PeftcoreError: as `peftcore.apply`; the model was not changed.
        UnsupportedHost: the model is a `PeftModel` already.
        ConfigError: `peft_config` is None, and the model has no adapters.
    """

    by_task: ClassVar[dict[str, type[PeftModel]]] = {}
    """The class for each task type of peft."""

    def __init_subclass__(cls, task: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if task is not None:
            PeftModel.by_task[task] = cls

    def __init__(self, model: nn.Module, peft_config: Any = None, adapter_name: str = ALONE, **options: Any) -> None:
        options = without_peft_arguments(options)
        if isinstance(model, peft.PeftModel):
            raise UnsupportedHost(
                "the model is a PeftModel already: add_adapter(name, ...) adds one more; to start anew, pass "
                "model.unload() or model.merge_and_unload()"
            )
        if peft_config is None and not injections(model):
            raise ConfigError('the model has no adapters: name a method, PeftModel(model, "lora", rank=8)')
        nn.Module.__init__(self)
        self._given: dict[str, Any] = {}
        self._last: list[str] = []
        self._set_meanwhile: str | None = None
        self._merged_meanwhile: list[str] = []
        self._drop_nothing_more: list[Injection] = []
        self._before: dict[str, dict[str, bytes]] = {}
        self._adapters_disabled = False
        if peft_config is not None:
            apply_beside(model, adapter_name, peft_config, options)
            self._note_config(adapter_name, peft_config)
        self.base_model = Tuner(model)
        self._note_state()
        if peft_config is not None:
            self.set_adapter(adapter_name)

    @classmethod
    def for_task(cls, task: str | None) -> type[PeftModel]:
        """Returns the class for a task type of peft. If there is none for the task, or if this class is already for a
        task, returns this class."""
        return PeftModel.by_task.get(task or "", cls) if cls is PeftModel else cls

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = ALONE,
        is_trainable: bool = False,
        *,
        revision: str | None = None,
        **options: Any,
    ) -> PeftModel:
        """Returns the model with a saved adapter, in any format that `peftcore.load` reads, such as a folder of peft.

        Args:
            model: the model; changed in place.
            model_id: the path or repository of the adapter, as in `peftcore.load`.
            adapter_name: the adapter's name.
            is_trainable: whether the adapter trains; if not, the model is set to evaluation mode, as in peft.
            revision: as in `peftcore.load`.
            options: arguments of peft with values that peftcore supports.

        Raises:
            CheckpointError, HostMismatch, NewerFormat, UnknownMethod, HubError: as `peftcore.load`.
            ConfigError: an argument of peft has a value that peftcore does not support.
        """
        check_no_more(options)
        if isinstance(model, peft.PeftModel):
            raise UnsupportedHost("the model is a PeftModel already: model.load_adapter(folder, name) loads one more")
        load(model, model_id, name=adapter_name, trainable=is_trainable, revision=revision)
        config = config_in(model_id)
        found = cls.for_task(task_for(model, config))(model)
        found._note_config(adapter_name, config)
        found.set_adapter(adapter_name, inference_mode=not is_trainable)
        return found if is_trainable else found.eval()

    @property
    def adapters(self) -> dict[str, Injection]:
        """The adapters by name, as peftcore's `Injection` objects."""
        return injections(self.get_base_model())

    def get_base_model(self) -> nn.Module:
        """Returns the adapted model."""
        model: nn.Module = self.base_model.model
        return model

    def get_output_embeddings(self) -> nn.Module | None:
        """Returns the model's output head, for callers such as trainers of TRL that use its weight directly.

        Raises:
            ConfigError: an adapter changes or trains the head, so its own weight alone would give wrong outputs.
        """
        model: Any = self.get_base_model()
        head: nn.Module | None = model.get_output_embeddings()
        for injection in self.adapters.values():
            for site in (site for graft in injection.grafts for site in graft.holders):
                if injection.module_at(site.module_path) is head:
                    raise ConfigError(
                        f"{injection.name!r} changes the output head {site.module_path}, but callers of "
                        "get_output_embeddings() use its bare weight: leave the head out of target= and train="
                    )
        return head

    @property
    def peft_config(self) -> dict[str, peft.PeftConfig]:
        """The configuration of each adapter: the configuration of peft from which it was made, or an
        `AdapterConfig`."""
        found = self.adapters
        self._given = {name: self._given.get(name) or config_of(injection) for name, injection in found.items()}
        return dict(self._given)

    @property
    def peft_type(self) -> Any:
        """The `peft_type` of the active adapter's configuration. If the adapter was not made from a configuration of
        peft, the name of its method."""
        return self.active_peft_config.peft_type

    @property
    def active_adapters(self) -> list[str]:
        """The names of the active adapters; within `disable_adapter`, those that will be active after the block."""
        return [name for name, injection in self.adapters.items() if injection.active] or self._last

    @property
    def active_adapter(self) -> str:
        """The name of the active adapter, or of the first of several."""
        return self.active_adapters[0]

    @property
    def has_active_enabled_adapter(self) -> bool:
        """True if an adapter is active."""
        return any(injection.active for injection in self.adapters.values())

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Returns the output of the adapted model.

        Args:
            adapter_names: the name of the adapter for each row of the batch; ``"__base__"`` for no adapter.

        Raises:
            TrainingError: in training, an adapter's dropout is on although dropout was switched off in the model; or
                the schedule of a method was not advanced after an optimizer's step.
        """
        if self.training and self.base_model.dropout_is_off:
            self._drop_nothing()
        if self.training:
            for injection in self.adapters.values():
                check_driven(injection)
        with self._routed(adapter_names, 1):
            return self.get_base_model()(*args, **kwargs)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the result of the adapted model's method of this name."""
        model: Any = self.get_base_model()
        return model.prepare_inputs_for_generation(*args, **kwargs)

    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Returns the result of the adapted model's `generate`; `adapter_names` is as in `forward`."""
        model: Any = self.get_base_model()
        with self._routed(adapter_names, kwargs.get("num_beams") or model.generation_config.num_beams or 1):
            return model.generate(*args, **kwargs)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Context manager in which the model computes exactly what the base model computes. Merged adapters are
        unmerged within the block. If `set_adapter` is called within the block, that adapter becomes active at the end
        of the block."""
        self._last, before, self._adapters_disabled = self.active_adapters, self._adapters_disabled, True
        merged = [name for name, injection in self.adapters.items() if injection.merged]
        self._merged_meanwhile = self._merged_meanwhile if before else merged
        try:
            with ExitStack() as stack:
                for name in reversed(merged):  # what was merged on top goes first
                    stack.enter_context(self.adapters[name].disabled())
                stack.enter_context(activate(self.get_base_model()))
                yield
        finally:
            self._adapters_disabled = before
            if not before:
                chosen, self._set_meanwhile, self._merged_meanwhile = self._set_meanwhile, None, []
                if chosen in self.adapters:
                    activate(self.get_base_model(), chosen)

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Make one adapter the only active and the only trainable adapter. Within `disable_adapter`, it becomes active
        at the end of the block.

        Args:
            adapter_name: the name of the adapter.
            inference_mode: True freezes the adapter.

        Raises:
            UnknownInjection: an adapter of this name does not exist.
            MergeError: another adapter is merged.
        """
        if self._adapters_disabled:
            known(self.get_base_model(), [adapter_name])
            if others := [name for name in self._merged_meanwhile if name != adapter_name]:
                raise MergeError(
                    f"{others[0]!r} is merged, and will be merged again when disable_adapter() ends: call "
                    "unmerge_adapter() before that block"
                )
            self._set_meanwhile = adapter_name
        else:
            activate(self.get_base_model(), adapter_name)
        self._last = [adapter_name]
        for name, injection in self.adapters.items():
            injection.trainable(name == adapter_name and not inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Make adapters trainable, or freeze them.

        Raises:
            UnknownInjection: an adapter of this name does not exist.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else [*adapter_names]
        state = known(self.get_base_model(), names)
        for name in names:
            installed(state)[name].trainable(requires_grad)

    def add_adapter(self, adapter_name: str, peft_config: Any, **options: Any) -> None:
        """Add a fresh adapter, which is frozen and inactive until `set_adapter`.

        Args:
            adapter_name: the name of the adapter.
            peft_config: a method or a configuration, as for `peftcore.apply`, or an entry of the attribute
                `peft_config`.
            options: other arguments of `peftcore.apply`.

        Raises:
            PeftcoreError: as `peftcore.apply`.
            ConfigError: `peft_config` is the entry of an adapter with state that neither options nor parameters
                describe.

        After an error nothing is changed.
        """
        like = [name for name, config in self.peft_config.items() if config is peft_config]
        injection = apply_beside(self.get_base_model(), adapter_name, peft_config, options)
        try:
            for name in like:
                check_same_state(injection, self.adapters[name])
        except ConfigError:
            injection.remove()
            raise
        injection.trainable(False)
        self._note_state()
        self._note_config(adapter_name, peft_config)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter. If it is the only active one, the first remaining adapter becomes active.

        Raises:
            UnknownInjection: an adapter of this name does not exist.
            ConfigError: it is the last adapter.
            MergeError: it is merged, and cannot be unmerged.
        """
        injection = installed(known(self.get_base_model(), [adapter_name]))[adapter_name]
        others = [name for name in self.adapters if name != adapter_name]
        if not others:
            raise ConfigError(f"{adapter_name!r} is the last adapter: model.unload() returns the model without any")
        acted = self.active_adapters == [adapter_name]
        injection.remove()
        self._last = [name for name in self._last if name != adapter_name]
        self._merged_meanwhile = [name for name in self._merged_meanwhile if name != adapter_name]
        for noted in (self._given, self._before):
            noted.pop(adapter_name, None)
        if acted:
            warnings.warn(f"{adapter_name!r} was active and is deleted; {others[0]!r} is active now", stacklevel=2)
            self.set_adapter(others[0])

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        *,
        revision: str | None = None,
        **options: Any,
    ) -> Any:
        """Load an adapter, which is inactive until `set_adapter`. If an adapter of this name exists, load the saved
        values into it instead, as transformers' Trainer does to resume a training.

        Args:
            model_id: the path or repository of the adapter, as in `peftcore.load`.
            adapter_name: the name of the adapter.
            is_trainable: whether a new adapter is trainable; an existing adapter keeps its setting. If False, the model
                is set to evaluation mode, as in peft.
            revision: as in `peftcore.load`.
            options: arguments of peft with values that peftcore supports.

        Raises:
            CheckpointError, HostMismatch, NewerFormat, UnknownMethod, HubError: as `peftcore.load`.
            ConfigError: an argument of peft has a value that peftcore does not support.
            SwapError: an adapter of this name exists, with another method, other options or other sites.
            TrainingError: an adapter of this name exists and has a schedule, `is_trainable` is True, and the folder
                contains no training state.

        Returns:
            The result of torch's `load_state_dict`, with empty lists of missing and unexpected keys.
        """
        check_no_more(options)
        there = self.adapters.get(adapter_name)
        if there is not None:
            if not (is_trainable and load_training_state(there, Path(model_id))):
                if is_trainable and has_schedule(there):
                    raise TrainingError(
                        f"{there.method.name} has a schedule, and {model_id} lacks its state, as it was not "
                        "saved during training: to train on from its values, call "
                        "PeftModel.from_pretrained(model, folder, is_trainable=True)"
                    )
                there.swap(model_id, revision=revision)
        else:
            model = self.get_base_model()
            load(model, model_id, name=adapter_name, trainable=is_trainable, active=False, revision=revision)
            self._note_state()
            self._note_config(adapter_name, config_in(model_id))
        if not is_trainable:
            self.eval()
        return _IncompatibleKeys([], [])

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        selected_adapters: Sequence[str] | None = None,
        is_main_process: bool = True,
        state_dict: Any = None,
        safe_serialization: bool = True,
    ) -> None:
        """Save the adapters: ``default`` in the folder itself, others in subfolders with their names. The format is
        peft's, or peftcore's for adapters that peft's format cannot store. `from_pretrained` and `peftcore.load` read
        both. If an adapter is trainable, and has a schedule or changes non-persistent buffers in each step, the folder
        also has this training state.

        Args:
            save_directory: the folder.
            selected_adapters: names of adapters; all by default.
            is_main_process: whether this process writes.
            state_dict: for a model that is sharded over processes, the whole values that the Trainer gathered. Only the
                process that has them saves. For other models it is ignored.
            safe_serialization: has to be True.

        Raises:
            ConfigError: `safe_serialization` is False.
            ExportError: the model is sharded over processes, and `state_dict` lacks the whole values of the adapters.
            UnknownInjection: an adapter of this name does not exist.
        """
        if not safe_serialization:
            raise ConfigError("peftcore writes no pickles: remove safe_serialization")
        names = list(self.adapters) if selected_adapters is None else [*selected_adapters]
        state = known(self.get_base_model(), names)
        wanted = [each for name in names for each in state.injections[name].parameters()]
        with whole_from(self, state_dict, wanted):
            for name in names if is_main_process else ():
                folder = Path(save_directory)
                folder = folder if name == ALONE else folder / name
                save_folder(installed(state)[name], folder)
                save_training_state(installed(state)[name], folder, self._before.get(name, {}))

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = True) -> None:
        """Merge adapters into the weights until `unmerge_adapter` is called. On an error, none of them is merged.

        Args:
            adapter_names: the adapters to merge, by default the active ones. Inactive adapters cannot be merged.
            safe_merge: ignored, since values are always checked.

        Raises:
            NotMergeable: the method cannot be merged.
            MergeError: as `Injection.merge`.
        """
        before = [injection for injection in self.adapters.values() if injection.merged]
        try:
            for injection in self._named(adapter_names):
                injection.merge()
        except BaseException:
            self._unmerge_all_but(before)
            raise

    def unmerge_adapter(self) -> None:
        """Restore the weights from before the merge, bit for bit.

        Raises:
            MergeError: as `Injection.unmerge`.
        """
        self._unmerge_all_but([])

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = True, adapter_names: Sequence[str] | None = None
    ) -> nn.Module:
        """Returns the base model, after adapters (by default the active ones) were merged into it and all adapters were
        removed.

        Raises:
            NotMergeable, MergeError: as `merge_adapter`; the adapters are then still installed.
        """
        self.merge_adapter(adapter_names)
        for injection in reversed(self.adapters.values()):
            if injection.merged:
                injection.bake()
        return self.unload()

    def unload(self) -> nn.Module:
        """Returns the base model, after all adapters were removed from it."""
        model = self.get_base_model()
        for injection in self.adapters.values():
            injection.remove()
        return model

    def get_layer_status(self) -> NoReturn:
        """Raises ConfigError, since the model has no layers of peft."""
        raise ConfigError(
            "the model has no layers of peft: call print(adapter.summary()) for each of model.adapters.values()"
        )

    def get_model_status(self) -> NoReturn:
        """Raises ConfigError, since the model has no layers of peft."""
        self.get_layer_status()

    def _note_state(self) -> None:
        """Record digests of the initial state between steps of each new adapter, to detect later whether it changed."""
        for name, injection in self.adapters.items():
            if name not in self._before:
                self._before[name] = digests(injection)

    def _drop_nothing(self) -> None:
        """Turn off the dropout of active adapters. Trainers do not do this, since they change only torch's dropout
        modules."""
        for injection in self.adapters.values():
            if injection.active and not any(each is injection for each in self._drop_nothing_more):
                drop_nothing(injection)
                self._drop_nothing_more.append(injection)

    def _named(self, names: Sequence[str] | None) -> list[Injection]:
        state = known(self.get_base_model(), names or [])
        return [installed(state)[name] for name in (self.active_adapters if names is None else names)]

    def _unmerge_all_but(self, kept: Sequence[Injection]) -> None:
        for injection in reversed(self.adapters.values()):  # what was merged on top goes first
            if injection not in kept:
                injection.unmerge()

    def _note_config(self, name: str, config: Any) -> None:
        """Record the configuration from which an adapter was made, if it is a configuration of peft or the entry of
        another adapter."""
        if isinstance(config, peft.PeftConfig) and not (isinstance(config, AdapterConfig) and config.method):
            self._given[name] = config

    @contextmanager
    def _routed(self, names: Sequence[str] | None, copies: int) -> Iterator[None]:
        """Context manager in which each row of the batch uses its adapter in `names`. If `names` is None, nothing
        changes.

        Raises:
            UnknownInjection: an adapter of this name does not exist.
        """
        if names is None:
            yield
            return
        if self._adapters_disabled:
            raise ConfigError("adapter_names cannot be used within disable_adapter(): remove one of the two")
        with route(self.get_base_model(), [None if name == BASE else name for name in names], copies=copies):
            yield


def task_for(model: nn.Module, peft_config: Any) -> str | None:
    """Returns peft's task type for a model: from `peft_config` if it is a configuration of peft, otherwise from the
    model's class."""
    if isinstance(peft_config, peft.PeftConfig) and not isinstance(peft_config, AdapterConfig):
        return (
            None
            if peft_config.task_type is None
            else str(getattr(peft_config.task_type, "value", peft_config.task_type))
        )
    return peft_task_of(model)
