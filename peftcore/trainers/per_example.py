"""Computes the gradients of single examples, which differential privacy needs for clipping. The model runs under
`torch.vmap`, in which each row of the batch has its own copy of the parameters.

The copies are expanded parameters, which need no additional memory until backward. For any loss that is the mean or the
sum over the rows, one backward computes the same gradients as a loop over the rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from peftcore.errors import PeftcoreError, TrainingError
from peftcore.injection.injection import injections


class PerExample(nn.Module):
    """A wrapper of a model whose backward writes the gradients of single examples into the attribute `grad_sample` of
    each trainable parameter.

    `grad_sample` has the shape ``[rows, *parameter.shape]``; after several batches before the optimizer's step, it is a
    list of such tensors. Optimizers of Opacus read this form with ``grad_sample_mode="no_op"``. `grad` is not changed.
    In evaluation, or when gradients are disabled, the model runs unchanged.

    Args:
        model: a model with a batch in the first dimension of all its inputs and outputs, adapted or not. Rows are
            computed independently, and have independent random numbers.
        reduction: how the loss combines its rows, ``"mean"`` or ``"sum"``.
    """

    def __init__(self, model: nn.Module, reduction: Literal["mean", "sum"] = "mean") -> None:
        super().__init__()
        if reduction not in ("mean", "sum"):
            raise TrainingError(
                f"reduction={reduction!r} is neither 'mean' nor 'sum': pass the one that the loss function uses"
            )
        self.model = model
        self.reduction = reduction
        self._forwards = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the model's output for a batch. An output that is a scalar for a single row, such as a loss, has one
        number for each row.

        Raises:
            TrainingError: inputs differ in the number of rows; `torch.vmap` cannot run the model, since the model reads
                values or other rows; or a method adds a loss, but the output has no loss to add it to.
        """
        if not (self.training and torch.is_grad_enabled()):
            return self.model(*args, **kwargs)
        self._forwards += 1
        leaves, structure = pytree.tree_flatten((args, kwargs))
        rows = _rows(leaves)
        trained = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        if rows == 0:  # Poisson sampling draws empty batches
            for parameter in trained.values():
                _keep(parameter, parameter.new_zeros(0, *parameter.shape))
            return self.model(*args, **kwargs)
        own = {name: self._own(value, rows) for name, value in trained.items()}
        dims = [0 if isinstance(leaf, Tensor) and leaf.dim() else None for leaf in leaves]
        form: list[Any] = []  # the output's structure, with what is no tensor in its place

        def one(tensors: Mapping[str, Tensor], *row: Any) -> tuple[Any, ...]:
            alone = [value if dim is None else value.unsqueeze(0) for value, dim in zip(row, dims, strict=True)]
            given, named = pytree.tree_unflatten(alone, structure)
            output = torch.func.functional_call(self.model, dict(tensors), given, named)
            self._refuse_own_losses()
            values, spec = pytree.tree_flatten(output)
            form[:] = [spec, [None if isinstance(value, Tensor) else value for value in values]]
            form.append([isinstance(value, Tensor) for value in values])
            return tuple(_of_row(value) for value in values if isinstance(value, Tensor))

        try:
            dims_of_own = dict.fromkeys(own, 0)
            made = iter(torch.vmap(one, in_dims=(dims_of_own, *dims), randomness="different")(own, *leaves))
        except PeftcoreError:
            raise
        except (RuntimeError, ValueError) as error:
            raise TrainingError(
                "torch.vmap cannot run the model on single examples: it reads values, changes buffers or needs "
                "other rows (batch norm in training). Put such modules in evaluation, or replace them; models of "
                f"transformers need set_attn_implementation('eager'): {error}"
            ) from error
        spec, others, is_tensor = form
        values = [next(made) if tensor else other for tensor, other in zip(is_tensor, others, strict=True)]
        return pytree.tree_unflatten(values, spec)

    def _own(self, parameter: nn.Parameter, rows: int) -> Tensor:
        """Returns a leaf tensor that repeats the parameter for each row and shares its memory. A hook of the leaf
        stores its gradient in the parameter's `grad_sample`."""
        leaf = parameter.detach().expand(rows, *parameter.shape).requires_grad_()
        leaf.register_hook(partial(self._take, parameter, self._forwards))  # type: ignore[no-untyped-call]
        return leaf

    def _take(self, parameter: nn.Parameter, forward: int, gradient: Tensor) -> None:
        if forward != self._forwards:
            for each in self.model.parameters():
                each.grad_sample = None  # type: ignore[attr-defined] # nobody steps with half of them
            raise TrainingError(
                "one backward goes through two forwards of PerExample, whose rows would count as different examples: "
                "pass both inputs in one batch, and run backward before the next forward"
            )
        _keep(parameter, gradient.detach() * (len(gradient) if self.reduction == "mean" else 1))

    def _refuse_own_losses(self) -> None:
        for name, injection in injections(self.model).items():
            if injection.state.recorder.losses.waits(injection.state, name):
                injection.losses()  # nobody else takes them
                raise TrainingError(
                    f"{name!r} adds its own loss, but the model's output has no loss to which it could be added: pass "
                    "labels, or use a method without its own loss"
                )


def _rows(leaves: list[Any]) -> int:
    """Returns the number of rows, which has to be the same in all input tensors."""
    found = {len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()}
    if len(found) != 1:
        raise TrainingError(
            f"the inputs have {sorted(found)} rows: PerExample needs the same batch size in the first dimension of all"
        )
    return found.pop()


def _of_row(value: Tensor) -> Tensor:
    if value.dim() and len(value) != 1:
        raise TrainingError(
            f"an output has shape {list(value.shape)} for one row, without the batch in its first dimension"
        )
    return value.squeeze(0) if value.dim() else value


def _keep(parameter: nn.Parameter, gradients: Tensor) -> None:
    """Append the gradients of a batch's rows to those of earlier batches, in the form that Opacus uses."""
    earlier = getattr(parameter, "grad_sample", None)
    kept = gradients if earlier is None else [*(earlier if isinstance(earlier, list) else [earlier]), gradients]
    parameter.grad_sample = kept  # type: ignore[attr-defined]
