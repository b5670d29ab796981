"""CertifiedMarginLoss: cross-entropy against every perturbation within a radius, by the network's own bound."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_lip import kernels
from lightning_lip.checks import (
    check_choice,
    check_integers,
    check_model,
    check_number,
    check_state,
    check_type,
)
from lightning_lip.graph.bound import Head, NetworkBound
from lightning_lip.losses.margin import (
    MarginForm,
    Options,
    Reduction,
    check_logits,
    check_options,
    check_weight,
    loss_of,
)
from lightning_lip.losses.pairwise import pairwise_bounds
from lightning_lip.operators.convolutions.symbol import Convolutions
from lightning_lip.penalty.differentiable_norms import OUTPUT, DifferentiableNorms

Form = Literal["margin", "emma", "gloro", "lmt"]

START = 0.1
"""The share of eps that the ramp begins with."""


class CertifiedMarginLoss(nn.Module):
    """A loss that trains a classifier for certified accuracy: ordinary layers, used like ``CrossEntropyLoss``.

    A sample of class y is certified at eps if ``z_y - z_j > eps K_yj`` for all j, ``K_yj = ||w_y - w_j|| L``, with the
    rows w of the last linear layer, the head, and L a bound of all before it. The loss is the cross-entropy of the
    logits moved by eps K: see :mod:`lightning_lip.losses.margin` for the forms. L is the bound over the traced graph,
    at *estimated* spectral norms (from below), with a gradient through every one of them; what it certifies in the end
    is said by :class:`~lightning_lip.CertifiedValidation`. Where L overflows, so does the loss: lower L with a penalty
    before.

    The vectors of the estimates advance once for each state of the weights, while the model trains with gradients
    enabled, and not at all otherwise. They are this module's state: make the loss an attribute of the LightningModule,
    and they travel in every checkpoint, loadable with ``weights_only=True``; checkpoints without them load as well. The
    model is held by reference: no parameter appears twice. A copy of the loss belongs to the copied model.

    Args:
        model: The classifier. Its forward pass returns the logits, (B, C), or their log-softmax.
        eps: The radius, in the l2 norm of one input; at least 0.
        head: The last linear layer, on features (B, d), where other operations follow it; `logits` are then its
            outputs. None finds it.
        form: ``"margin"``, ``"emma"`` or ``"gloro"`` with pairwise bounds; ``"lmt"``, the margin form with
            ``sqrt(2) eps L`` for all pairs, L the bound of the whole network, which needs no head (Tsuzuku et al.).
        example_input: An input to trace the graph with: a tensor, a tuple of arguments or a dict of keyword arguments,
            with the batch along the first dimension. None takes the model's ``example_input_array``.
        warmup_steps: Over so many states of the weights, optimiser steps that is, eps grows from a tenth to its value,
            linearly. In eval mode it is the value.
        weight: A factor for each class, (C,).
        ignore_index: Samples with this target do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        label_smoothing: The share of the target that all classes get alike, from 0 to 1.
        block_size: Singular vectors a layer, r.
        n_iterations: Iterations a step.
        seed: Seed of the private generator that the vectors start from.
        backend: ``"reference"``, ``"cpu"`` or ``"gpu"`` to force an implementation of the kernels; None chooses.
        convolutions: Which norm convolutions have, as in :class:`~lightning_lip.LipschitzRegularizer`.

    Raises:
        TypeError: If the model is no module. In a call: for soft targets.
        ValueError: If an argument is out of range, there is no example input, or the head is not found or not one. In a
            call: for logits that are not (B, C).
        UnsupportedLayerError: If an operation of the network has no known finite Lipschitz constant, or, in a call, if
            the model is sharded (FSDP2, tensor parallel).

    Example:
        >>> import torch
        >>> from lightning_lip import CertifiedMarginLoss
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> loss_function = CertifiedMarginLoss(model, eps=0.1, example_input=torch.zeros(1, 4))
        >>> loss = loss_function(model(torch.ones(2, 4)), torch.tensor([0, 2]))
        >>> loss.backward()
    """

    weight: Tensor | None
    _model: nn.Module
    _head: nn.Module | None

    def __init__(
        self,
        model: nn.Module,
        eps: float,
        head: nn.Module | None = None,
        form: Form = "margin",
        *,
        example_input: Any = None,
        warmup_steps: int = 0,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        label_smoothing: float = 0.0,
        block_size: int = 8,
        n_iterations: int = 1,
        seed: int = 0,
        backend: kernels.Backend | None = None,
        convolutions: Convolutions = "symbol",
    ) -> None:
        super().__init__()
        check_model(model, "CertifiedMarginLoss")
        check_choice("form", form, get_args(Form))
        check_options(weight, ignore_index, reduction, label_smoothing)
        check_integers(0, warmup_steps=warmup_steps)
        if head is not None:
            check_type("head", head, nn.Module, "a module of the model")
        self.eps = check_number("eps", eps)
        self.form = form
        self.warmup_steps = warmup_steps
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.register_buffer("weight", weight, persistent=False)
        # By reference, not as submodules, whose parameters would appear twice.
        self.__dict__["_model"], self.__dict__["_head"] = model, head
        given = getattr(model, "example_input_array", None) if example_input is None else example_input
        if given is None:
            raise ValueError("CertifiedMarginLoss needs the network's graph: give an `example_input`, x[:1] say.")
        self._example_input = given
        self._iteration = {"block_size": block_size, "n_iterations": n_iterations, "seed": seed, "backend": backend}
        check_choice("convolutions", convolutions, get_args(Convolutions))
        self._convolutions = convolutions
        self._state: dict[str, Any] | None = None
        self._traced: _HeadNorms | None = None
        self._norms()

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss, shape (), or (B,) without a reduction.

        Args:
            logits: What the model returned, (B, C).
            target: (B,), integer classes in [0, C), or `ignore_index`.
        """
        check_logits(logits, target)
        n_classes = logits.shape[1]
        check_weight(self.weight, n_classes)
        norms = self._norms()
        log_bound = norms.quantity(norms.point)
        if norms.head is None:
            apart = 1 - torch.eye(n_classes, dtype=log_bound.dtype, device=log_bound.device)
            bounds_of = (math.sqrt(2) * self.eps * log_bound.exp() * apart).__getitem__
        else:
            weight = norms.head.matrix.compute()
            if len(weight) != n_classes:
                raise ValueError(
                    f"Expected {len(weight)} logits a sample, as many as the head has outputs, got {n_classes}."
                )
            bounds_of = partial(pairwise_bounds, log_bound, weight, self.eps)
        form: MarginForm = "margin" if self.form == "lmt" else self.form
        options = Options(form, self.weight, self.ignore_index, self.reduction, self.label_smoothing)
        return loss_of(logits, target, bounds_of, options)

    def pairwise_bounds(self) -> Tensor:
        """Return eps K, (C, C), by which the logits' differences can move; shape (), for all pairs, in form ``"lmt"``.

        An *estimate* of that bound, with a gradient where gradients are enabled.
        """
        norms = self._norms()
        log_bound = norms.quantity(norms.point)
        if norms.head is None:
            return math.sqrt(2) * self.eps * log_bound.exp()
        weight = norms.head.matrix.compute()
        return pairwise_bounds(log_bound, weight, self.eps, torch.arange(len(weight), device=weight.device))

    def _norms(self) -> _HeadNorms:
        """Return the norms over the traced graph, which a copy of the loss traces anew."""
        if self._traced is None:
            self._traced = _HeadNorms(
                self._model,
                self._head,
                self.form == "lmt",
                self._example_input,
                self._convolutions,
                self._iteration,
                self.warmup_steps,
            )
            if self._state is not None:
                self._traced.load_state_dict(self._state)
                self._state = None
        return self._traced

    def get_extra_state(self) -> dict[str, Any]:
        """Return the singular vectors and the ramp's position: plain tensors by layer name, and a number."""
        return self._norms().state_dict()

    def set_extra_state(self, state: Any) -> None:
        """Take over what :meth:`get_extra_state` returned.

        Raises:
            TypeError: If it is no mapping.
            ValueError: If it is no such state.
        """
        self._norms().load_state_dict(state)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        # A checkpoint from before the loss was there is complete: the vectors start afresh.
        prefix, missing = args[1], args[4]
        missing[:] = [key for key in missing if key != f"{prefix}_extra_state"]

    def __getstate__(self) -> dict[str, Any]:
        """Leave the traced graph behind, keep its vectors: a copy traces the model that was copied with it."""
        return self.__dict__ | {"_state": self._norms().state_dict(), "_traced": None}


class _HeadNorms(DifferentiableNorms):
    """The norms over a network's graph, the bound before its head, and the ramp of eps as a factor of that bound."""

    def __init__(
        self,
        model: nn.Module,
        head: nn.Module | None,
        is_whole: bool,
        example_input: Any,
        convolutions: Convolutions,
        iteration: dict[str, Any],
        warmup_steps: int,
    ) -> None:
        selection = {"layers": None, "exclude": None, "unknown": "refuse", "convolutions": convolutions}
        super().__init__(model, example_input, None, selection, iteration)
        assert isinstance(self._bound, NetworkBound)
        self.head: Head | None = None if is_whole else self._bound.head(head)
        if self.head is None and not is_whole:
            raise ValueError(
                f"{type(model).__name__} does not end in one linear layer on features of shape (B, d): name the layer "
                'whose outputs are the logits with `head`, or take form="lmt".'
            )
        self.point = OUTPUT if self.head is None else self.add_point(self.head.features)
        self._warmup_steps = warmup_steps
        self._n_states = 0

    def evaluate(self, number: int, advance: bool) -> Tensor:
        """Return a log bound, shape (), with the logarithm of the ramp's factor added while the model trains."""
        before = self._step_version
        value = super().evaluate(number, advance)
        self._n_states += advance and self._step_version != before
        if not self._model.training or self._n_states > self._warmup_steps:
            return value
        return value + math.log(START + (1 - START) * max(0, self._n_states - 1) / self._warmup_steps)

    def state_dict(self) -> dict[str, Any]:
        """Return the vectors, and how many states of the weights the ramp has seen."""
        return {**super().state_dict(), "n_states": self._n_states}

    def load_state_dict(self, state: Any) -> None:
        """Take over what :meth:`state_dict` returned."""
        check_state(state, ("vectors", "n_states"), "CertifiedMarginLoss")
        check_integers(0, n_states=state["n_states"])
        super().load_state_dict(state)
        self._n_states = state["n_states"]
