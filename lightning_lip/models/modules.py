"""Walking a user's modules, and contexts that leave modes and buffers as they were."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
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
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Give every buffer its object and its values back at the end of the context."""
    kept = [
        (m, key, buffer, buffer.clone())
        for m in model.modules()
        for key, buffer in m._buffers.items()
        if buffer is not None and not is_lazy(buffer) and not buffer.is_meta
    ]
    try:
        yield
    finally:
        for m, key, buffer, values in kept:
            if not torch.equal(buffer, values):
                buffer.copy_(values)
            m._buffers[key] = buffer
