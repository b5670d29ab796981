"""Walking a user's modules, and contexts that leave modes and buffers as they were."""

from __future__ import annotations

import contextlib
import operator
import random
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize


@contextlib.contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Put a module into eval mode inside the context; each submodule gets its own mode back."""
    training = [m for m in module.modules() if m.training]
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for m in training:
            m.training = True


def keeps_forward(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is of a kind, and neither its class nor the module itself has replaced that kind's forward."""
    return isinstance(module, kind) and type(module).forward is kind.forward and "forward" not in vars(module)


def is_lora(module: nn.Module) -> bool:
    """Whether a module is a LoRA adapter around another one, as in peft."""
    return hasattr(module, "base_layer") and hasattr(module, "lora_A")


@dataclass(frozen=True)
class Found:
    """A module as it was met in the model: its name there, and how often containers repeat it."""

    name: str
    module: nn.Module
    occurrences: int


def is_wrapper(module: nn.Module) -> bool:
    """Whether a module only wraps another one (torch.compile, DDP), so that its attribute is not part of names."""
    names = {cls.__name__ for cls in type(module).__mro__}
    return bool(names & {"OptimizedModule", "DistributedDataParallel", "DataParallel", "_FabricModule"})


def _children(module: nn.Module) -> Iterator[tuple[str, nn.Module, int]]:
    """Yield the children with their number of entries: a module that a container holds k times is called k times."""
    children = [
        (key, child)
        for key, child in module._modules.items()
        if child is not None and not (key == "parametrizations" and parametrize.is_parametrized(module))
    ]
    is_container = isinstance(module, (nn.Sequential, nn.ModuleList))
    entries = Counter(id(child) for _, child in children)
    for key, child in children:
        yield key, child, entries[id(child)] if is_container else 1


def walk(module: nn.Module, prefix: str = "", occurrences: int = 1) -> Iterator[Found]:
    """Yield every module under every name it has, without wrappers, with the number of entries in containers."""
    if is_wrapper(module):
        for _, child, _ in _children(module):
            yield from walk(child, prefix, occurrences)
        return
    yield Found(prefix, module, occurrences)
    if is_lora(module):
        return
    for key, child, count in _children(module):
        yield from walk(child, f"{prefix}.{key}" if prefix else key, occurrences * count)


@contextlib.contextmanager
def parametrizations_uncached() -> Iterator[None]:
    """Compute parametrised tensors anew, inside ``parametrize.cached()`` too: what it keeps may be of another mode."""
    enabled, parametrize._cache_enabled = parametrize._cache_enabled, 0
    try:
        yield
    finally:
        parametrize._cache_enabled = enabled


LARGEST_CONTAINER = 10_000
"""Entries of a list, dict, set or deque up to which its contents are kept: larger ones are data."""


_HOOKS = vars(nn.Module()).keys() - {"_parameters", "_buffers", "_modules"}
"""What every module has for its hooks, which no forward pass changes: to look into all of them takes time."""


@contextlib.contextmanager
def state_kept(model: nn.Module) -> Iterator[None]:
    """Give everything that a forward pass may change its value back at the end of the context.

    That is: the modules' attributes, what lists, dicts, sets and deques among them hold, the values of buffers and
    other tensors that are no parameters, the attributes of objects that serve as hooks of the forward pass, and the
    generators of random numbers of torch, Python and NumPy.
    """
    undo: list[Callable[[], object]] = []
    seen: set[int] = set()
    for module in model.modules():
        # A module's own __setattr__ and __delattr__ have no part in this.
        attributes = vars(module)
        undo.append(partial(_restore_container, attributes, list(attributes.items())))
        for key, value in attributes.items():
            if key not in _HOOKS:
                _keep(value, undo, seen)
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            if not isinstance(hook, (FunctionType, MethodType, nn.Module)):
                _keep(getattr(hook, "__dict__", None), undo, seen)
    python = random.getstate()
    _keep(np.random.mtrand._rand, undo, seen)
    with torch.random.fork_rng():
        try:
            yield
        finally:
            for restore in undo:
                restore()
            random.setstate(python)


def _keep(value: object, undo: list[Callable[[], object]], seen: set[int]) -> None:
    """Collect what gives a value, and all in it, its present contents back."""
    if id(value) in seen or isinstance(value, nn.Parameter):
        return
    seen.add(id(value))
    entries: Iterable[object] = ()
    if isinstance(value, Tensor):
        if not is_lazy(value) and not value.is_meta and value.layout == torch.strided and not value.is_quantized:
            undo.append(partial(_restore_tensor, value, value.detach().clone()))
    elif isinstance(value, torch.Generator):
        undo.append(partial(value.set_state, value.get_state()))
    elif isinstance(value, random.Random):
        undo.append(partial(value.setstate, value.getstate()))
    elif isinstance(value, np.random.RandomState):
        undo.append(partial(value.set_state, value.get_state(legacy=False)))
    elif isinstance(value, np.random.Generator):
        undo.append(partial(setattr, value.bit_generator, "state", value.bit_generator.state))
    elif isinstance(value, (dict, list, set, deque)) and len(value) <= LARGEST_CONTAINER:
        kept = list(value.items() if isinstance(value, dict) else value)
        undo.append(partial(_restore_container, value, kept))
        entries = value.values() if isinstance(value, dict) else kept
    elif isinstance(value, tuple):
        entries = value
    for entry in entries:
        _keep(entry, undo, seen)


@contextlib.contextmanager
def parameters_kept(model: nn.Module) -> Iterator[None]:
    """Give the model's parameters their values back at the end of the context; it holds a copy of them meanwhile."""
    kept = [(p, p.detach().clone()) for p in model.parameters() if not is_lazy(p) and not p.is_meta]
    try:
        yield
    finally:
        for parameter, values in kept:
            _restore_tensor(parameter, values)


@torch.no_grad()
def _restore_tensor(tensor: Tensor, values: Tensor) -> None:
    if not torch.equal(tensor, values):
        tensor.copy_(values)


def _restore_container(container: Any, kept: list[Any]) -> None:
    """Give a container its entries back, in their order; untouched if they are there."""
    if isinstance(container, dict):
        now = list(container.items())
        if len(now) == len(kept) and all(a is b and v is w for (a, v), (b, w) in zip(now, kept, strict=True)):
            return
    elif len(container) == len(kept) and all(map(operator.is_, container, kept)):
        return
    container.clear()
    (container.extend if isinstance(container, (list, deque)) else container.update)(kept)
