"""What one forward pass showed of a model: its layers' operators, and the normalisations in their places."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from lightning_lip.errors import UnsupportedLayerError
from lightning_lip.models.inputs import FAILURES, call_arguments
from lightning_lip.models.modules import eval_mode, state_kept
from lightning_lip.models.sharding import is_dealt_out
from lightning_lip.operators.base import LinearOperator
from lightning_lip.operators.convolutions.paddings import padding_pairs
from lightning_lip.operators.convolutions.symbol import Convolutions
from lightning_lip.usage.normalisation import Placed, place_normalisations
from lightning_lip.usage.observer import Observer
from lightning_lip.usage.operators import operator_in_use
from lightning_lip.usage.records import Use
from lightning_lip.usage.values import Stored

AWAITED = object()
"""Stands for inputs of a forward pass that is still to come."""


class Observation:
    """What an :class:`~lightning_lip.usage.observer.Observer` saw of a model.

    Args:
        model: The model.
        observer: It, after one forward pass.
    """

    def __init__(self, model: nn.Module, observer: Observer) -> None:
        self._model = model
        self._uses = observer.uses
        self._normalisations = observer.normalisations
        self._normalising = {id(call.module) for call in observer.normalisations}
        self._is_dealt_out = is_dealt_out(model)
        self._by_layer: dict[int, list[Use]] = {}
        for use in observer.uses.values():
            self._by_layer.setdefault(id(use.weight.owner.layer), []).append(use)
        self._made: dict[int, Use] = {}
        """The uses of the operators that were made here, by their ids."""

    def operators_of(
        self, module: nn.Module, name: str, convolutions: Convolutions = "symbol"
    ) -> Sequence[LinearOperator]:
        """Return the operators of the weights that a module owns; none for a normalisation, or a table of a head.

        Args:
            module: The module.
            name: Its name in the model.
            convolutions: Which norm convolutions have.

        Raises:
            UnsupportedLayerError: If its parameters multiplied nothing, or cannot be worked with.
        """
        operators = []
        for use in self._by_layer.get(id(module), []):
            operator = operator_in_use(use, convolutions)
            if self._is_dealt_out and operator.direct_parameter is None:
                raise UnsupportedLayerError(
                    "it is no whole matrix, and the model's weights are DTensors (FSDP2, tensor parallel)"
                )
            self._made[id(operator)] = use
            operators.append(operator)
        if not operators and not self._is_counted_elsewhere(module):
            raise UnsupportedLayerError("the first forward pass multiplied nothing by its parameters")
        return operators

    def input_shape_of(self, convolution: nn.Module) -> tuple[int, ...] | None:
        """Return the shape of the first input of a convolution of torch.nn, (c_in, *spatial); None if it saw none."""
        called = [use.convolution for use in self._by_layer.get(id(convolution), []) if use.convolution is not None]
        module: Any = convolution
        if not called or module.padding_mode == "zeros":
            return called[0][2] if called else None
        channels, *spatial = called[0][2]  # the module pads by itself before
        pairs = padding_pairs(module.padding, module.kernel_size, module.dilation)
        return channels, *(size - sum(pair) for size, pair in zip(spatial, pairs, strict=True))

    def _is_counted_elsewhere(self, module: nn.Module) -> bool:
        """Whether a module is a normalisation, or holds parameters only that multiply in other modules."""
        own = {id(p) for p in module._parameters.values() if p is not None}
        used = {id(p) for use in self._uses.values() for p in use.weight.parameters}
        return id(module) in self._normalising or (bool(own) and own <= used)

    def use_of(self, operator: LinearOperator) -> Use | None:
        """Return how an operator's weight was used; None if that was not seen."""
        if id(operator) in self._made:
            return self._made[id(operator)]
        parameters = {id(p) for p in operator.parameters}
        for use in self._uses.values():
            is_own = isinstance(use.weight, Stored) or use.weight.owner.layer is operator.module
            if is_own and {id(p) for p in use.weight.parameters} == parameters:
                return use
        return None

    def place(
        self, operators: Sequence[LinearOperator], chosen: Collection[int], leave_out: bool, batch_statistics: bool
    ) -> Placed:
        """Return the operators with the selected normalisations; see :func:`.place_normalisations`.

        Where `batch_statistics` is False batch normalisations are left out; the layers before them have their own norm.
        """
        calls = [call for call in self._normalisations if batch_statistics or call.variance is None]
        if self._is_dealt_out:  # their gains are shards
            calls = []
        return place_normalisations(self._model, operators, self.use_of, calls, chosen, leave_out)


def observe(model: nn.Module, inputs: object) -> Observation:
    """Return what one forward pass shows: in eval mode, with the model's state given back.

    Args:
        model: The model.
        inputs: A tensor, a tuple of positional arguments or a dict of keyword arguments.

    Raises:
        ValueError: If the forward pass fails on them.
    """
    args, kwargs = call_arguments(inputs)
    observer = Observer(model)
    with state_kept(model), eval_mode(model), torch.inference_mode(False), torch.no_grad(), observer:
        try:
            model(*args, **kwargs)
        except FAILURES as error:
            raise ValueError(
                f"Expected `inputs` to be an input of {type(model).__name__}: a tensor, a tuple of arguments "
                f"or a dict of keyword ones. The forward pass fails on it: {type(error).__name__}: {error}"
            ) from error
    return Observation(model, observer)


@dataclass
class _Watched:
    """What watches a model's training step, and how many asked for it."""

    observer: Observer
    restore: Callable[[], None]
    n_waiting: int = 0


_WATCHED: WeakKeyDictionary[nn.Module, _Watched] = WeakKeyDictionary()


def begin(model: nn.Module) -> None:
    """Watch the next call of a model's ``training_step``, until :func:`end` is called as often as this.

    All who ask share one observer, so that none sees what another does. The calls after it are not touched.
    """
    if model not in _WATCHED:
        observer = Observer(model)
        _WATCHED[model] = _Watched(observer, _around_next_step(model, observer))
    _WATCHED[model].n_waiting += 1


def _around_next_step(model: Any, observer: Observer) -> Callable[[], None]:
    """Enter a context in the next call of ``training_step``; return what gives the method back before."""
    step, attributes = model.training_step, vars(model)
    own = attributes.get("training_step")

    def restore() -> None:
        if attributes.get("training_step") is watched:
            del attributes["training_step"]
            if own is not None:
                attributes["training_step"] = own

    @functools.wraps(step)
    def watched(*args: Any, **kwargs: Any) -> Any:
        restore()
        with observer:
            return step(*args, **kwargs)

    attributes["training_step"] = watched
    return restore


def seen(model: nn.Module) -> Observation | None:
    """Return what the training step showed so far, and look no further; None where it multiplied nothing yet."""
    watched = _WATCHED.get(model)
    if watched is None or not watched.observer.uses:
        return None
    watched.observer.stop()
    return Observation(model, watched.observer)


def end(model: nn.Module) -> None:
    """Forget what was seen, once everyone is done who called :func:`begin`."""
    watched = _WATCHED[model]
    watched.n_waiting -= 1
    if not watched.n_waiting:
        watched.restore()
        del _WATCHED[model]
