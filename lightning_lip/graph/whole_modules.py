"""Modules that a trace keeps whole, as one node: they mark their output, and are recorded as they are when called."""

from __future__ import annotations

import contextlib
import copy
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_lip.constants.modules import registered_rule
from lightning_lip.errors import UnsupportedLayerError
from lightning_lip.models.modules import (
    keeps_forward,
)

WHOLE_MODULES = (nn.Softsign, nn.Tanhshrink, nn.Softshrink, nn.LPPool1d, nn.LPPool2d, nn.LPPool3d, nn.LocalResponseNorm)
"""Modules whose graph hides what they are (a quotient, a difference, a power), so that they are traced as one node."""


@torch.library.custom_op(
    "lightning_lip::whole_module",
    mutates_args=(),
    schema="(Tensor output, Tensor[] inputs, Tensor[] stored, int index) -> Tensor",
)
def _whole_module(output: Tensor, inputs: list[Tensor], stored: list[Tensor], index: int) -> Tensor:
    return output.clone()


@_whole_module.register_fake
def _(output: Tensor, inputs: list[Tensor], stored: list[Tensor], index: int) -> Tensor:
    return torch.empty_like(output)


WHOLE_MODULE = torch.ops.lightning_lip.whole_module.default
"""Marks the output of a module that is traced as one node."""


@dataclass(frozen=True)
class WholeModule:
    """One call of a module that is traced as one node.

    Attributes:
        module: The module.
        called: A module of its class with its attributes, and those of the modules in it, as they were at the call, and
            the live parameters and buffers.
        writes: Whether the call wrote into a tensor that it was given.
    """

    module: nn.Module
    called: nn.Module
    writes: bool

    @property
    def counting(self) -> nn.Module:
        """Return the module whose constant counts: the live one, unless the forward pass calls it in another state."""
        return self.module if _is_as_it_was(self.module, self.called, set()) else self.called


def _is_as_it_was(now: Any, then: Any, seen: set[int]) -> bool:
    """Whether a value is what it was at a call, by the copy made then: the same numbers, texts, modules, containers."""
    if now is then or id(now) in seen:
        return True
    if type(now) is not type(then) or isinstance(now, Tensor):
        return False
    seen.add(id(now))
    if isinstance(now, nn.Module):
        # The mode, and what marks the output, are the trace's own.
        now, then = ({k: v for k, v in vars(m).items() if k not in ("training", "forward")} for m in (now, then))
    if isinstance(now, dict):
        return list(now) == list(then) and all(_is_as_it_was(now[key], then[key], seen) for key in now)
    if isinstance(now, (list, tuple, deque)):
        return len(now) == len(then) and all(_is_as_it_was(a, b, seen) for a, b in zip(now, then, strict=True))
    return repr(now) == repr(then)


@contextlib.contextmanager
def traced_whole(model: nn.Module, modules: list[WholeModule]) -> Iterator[None]:
    """Let the modules that are traced as one node mark their output; fills `modules`."""
    replaced: dict[int, tuple[nn.Module, bool, Any]] = {}

    def mark(module: nn.Module) -> None:
        forward = module.forward

        def marked(*args: Any, **kwargs: Any) -> Tensor:
            called = _as_it_is(module, {}, replaced)
            stored = [*module.parameters(), *module.buffers()]
            inputs = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            versions = [x._version for x in inputs]
            output = forward(*args, **kwargs)
            if not isinstance(output, Tensor):
                raise UnsupportedLayerError(
                    f"A module with a registered constant must return one tensor; {type(module).__name__} returned "
                    f"{type(output).__name__}."
                )
            modules.append(WholeModule(module, called, versions != [x._version for x in inputs]))
            result: Tensor = WHOLE_MODULE(output, inputs, stored, len(modules) - 1)
            return result

        replaced[id(module)] = module, "forward" in vars(module), vars(module).get("forward")
        vars(module)["forward"] = marked

    for module in model.modules():
        if registered_rule(module) is not None or any(keeps_forward(module, kind) for kind in WHOLE_MODULES):
            mark(module)
    try:
        yield
    finally:
        for module, had, forward in replaced.values():
            if had:
                vars(module)["forward"] = forward
            else:
                del vars(module)["forward"]


def _as_it_is(value: Any, copies: dict[int, Any], replaced: Mapping[int, tuple[nn.Module, bool, Any]]) -> Any:
    """Return a value with the modules and containers in it copied as they are; other objects and tensors are shared.

    Parameters and buffers stay those of the module's own dictionaries, where a new value is seen.

    Args:
        value: A module, a container or anything else.
        copies: The copies that were made so far, by the id of what they are of.
        replaced: The forwards that stand aside for the trace.
    """
    if id(value) in copies:
        return copies[id(value)]
    kept: Any = value
    if isinstance(value, nn.Module):
        kept = copies[id(value)] = object.__new__(type(value))
        for key, entry in vars(value).items():
            is_live = key in ("_parameters", "_buffers") or key.endswith("_hooks")
            vars(kept)[key] = entry if is_live else _as_it_is(entry, copies, replaced)
        _, had, forward = replaced.get(id(value), (value, "forward" in vars(value), vars(value).get("forward")))
        vars(kept).pop("forward", None)
        if had:
            vars(kept)["forward"] = forward
    elif isinstance(value, (list, dict, deque)) and type(value).__module__ in ("builtins", "collections"):
        kept = copies[id(value)] = copy.copy(value)
        places: Iterable[Any] = value if isinstance(value, dict) else range(len(value))
        for place in places:
            kept[place] = _as_it_is(value[place], copies, replaced)
    elif isinstance(value, set):
        kept = copy.copy(value)
    elif type(value) is tuple:
        kept = tuple(_as_it_is(entry, copies, replaced) for entry in value)
    return kept
