"""Observer: watches one forward pass, and finds the weights in it and what normalises their outputs."""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from lightning_lip.usage import functions
from lightning_lip.usage.records import Normalisation, Output, Use
from lightning_lip.usage.values import (
    Arranged,
    Computed,
    Item,
    Stored,
    Value,
    derived,
    is_value,
    stored_tensors,
    whole_matrix,
)
from lightning_lip.usage.written_out import candidates, written_out


@dataclass(frozen=True)
class _Followed:
    """A layer's output but for views, and where its channels are; None if they moved, or more than views was done."""

    output: Output
    channel: int | None


class _Mode(TorchFunctionMode):
    """Has another function call those of torch."""

    def __init__(self, call: Callable[..., Any]) -> None:
        super().__init__()
        self._call = call

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self._call(func, args, kwargs or {})


class Observer:
    """Watches the functions of torch that a forward pass calls, without changing what they return.

    While it is entered, compiled functions and modules run eagerly, and what was compiled stays. It works under
    autocast, gradient checkpointing, DDP and FSDP2 (whose weights are whole then), and with module hooks. It keeps no
    activation alive. What runs without torch's functions (TorchScript, operators of C++) is not seen.

    Args:
        model: The model whose parameters are meant.

    Attributes:
        uses: The weights that multiplied activations, by identity.
        normalisations: The calls of normalisations, in their order.
        is_watching: Whether it still looks; it does nothing any more once that is False.
    """

    def __init__(self, model: nn.Module) -> None:
        self.uses: dict[Hashable, Use] = {}
        self.normalisations: list[Normalisation] = []
        self.is_watching = True
        self._model = model
        self._stored: dict[int, tuple[Tensor, Stored]] = {}
        self._known: dict[int, tuple[weakref.ref[Tensor], Value | _Followed | None]] = {}
        self._numbers: dict[Hashable, int] = {}
        self._inside: list[tuple[Normalisation | None, Tensor | None, Any]] = []
        self._context = contextlib.ExitStack()

    def __enter__(self) -> Observer:
        """Start to watch."""
        self._find_stored()
        for module in candidates(self._model):
            for handle in (
                module.register_forward_pre_hook(self._enter_module),
                module.register_forward_hook(self._leave_module),
            ):
                self._context.callback(handle.remove)
        self._context.enter_context(_eagerly())
        self._context.enter_context(_Mode(self.call))
        return self

    def __exit__(self, *exception: Any) -> None:
        """Stop, and let go of all tensors."""
        self._context.close()
        self.stop()

    def stop(self) -> None:
        """Look no further: what is found stays."""
        self.is_watching = False
        self._stored, self._known, self._inside = {}, {}, []

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function, and look at what it was given and returned."""
        name = functions.name_of(func) if self.is_watching else ""
        if not name:
            return func(*args, **kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not tensors:
            return func(*args, **kwargs)
        values = {id(tensor): self._lookup(tensor) for tensor in tensors}
        # Asked before the call, which may change the shape of an argument.
        first = args[0] if args and isinstance(args[0], Tensor) else None
        result = func(*args, **kwargs)
        known = list(values.values())
        if all(isinstance(value, (Stored, Computed)) for value in known):
            self._compute(name, func, leaves, spec, values, args, kwargs, result)
            return result
        used = self._multiply(name, func, args, kwargs, values, result)
        normalisation = self._normalise(func, args, kwargs, values)
        self._scale(name, leaves, values)
        is_read = _has_tensor(result) or functions.writes(func, kwargs)
        for tensor in {id(tensor): tensor for tensor in tensors}.values() if is_read else ():
            followed = values[id(tensor)]
            if not isinstance(followed, _Followed):
                continue
            if tensor is first and isinstance(result, Tensor) and self._follow(name, func, args, kwargs, result):
                continue
            followed.output.consumers.append(normalisation)
            if result is tensor:
                self._remember(result, None)
        if used:
            self._outputs(used, result)
        return result

    def _compute(
        self,
        name: str,
        func: Callable[..., Any],
        leaves: list[Any],
        spec: Any,
        values: dict[int, Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
    ) -> None:
        """Remember what a function returned for values only."""
        own = [values[id(leaf)] if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        results = [result] if isinstance(result, Tensor) else result
        if not isinstance(results, (list, tuple)):
            return
        if not functions.repeatable(func, args, kwargs):
            for tensor in results:
                if isinstance(tensor, Tensor) and id(tensor) not in self._stored:
                    self._remember(tensor, None)
            return
        if isinstance(result, Tensor) and (name in functions.CASTS or name == "data") and result.is_floating_point():
            self._remember(result, own[0])
            return
        described = (repr(func), str(spec), *(v.identity if is_value(v) else repr(v) for v in own))
        identity = self._numbers.setdefault(described, len(self._numbers))
        shape = tuple(result.shape) if isinstance(result, Tensor) else ()
        value = Computed(func, tuple(own), spec, identity, shape)
        if isinstance(result, Tensor):
            self._remember(result, value)
            return
        for index, tensor in enumerate(results):
            if isinstance(tensor, Tensor):
                self._remember(tensor, derived(Item(index), value, tensor.shape, ("item", index)))

    def _multiply(
        self,
        name: str,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        values: dict[int, Any],
        result: Any,
    ) -> list[tuple[Use, functions.Multiplied]]:
        """Find the weights among a function's arguments; return those whose output it returns."""
        if name == "einsum":
            return self._contract(args, values)
        used = []
        for product in functions.multiplied(func, args, kwargs):
            for tensor in product.weights:
                weight = values.get(id(tensor)) if isinstance(tensor, Tensor) else None
                if not is_value(weight) or not tensor.is_floating_point() or not weight.parameters:
                    continue
                layout: functions.Layout = product.layout
                if layout == "convolution":
                    use = self._use(weight, layout)
                    if use.convolution is None:
                        rank = len(weight.shape) - 1
                        settings = functions.convolution_geometry(name, args, kwargs)
                        use.convolution = name, settings, tuple(product.value.shape[-rank:])
                elif len(weight.shape) == 2:
                    whole, is_transposed = whole_matrix(weight)
                    if is_transposed:
                        layout = "columns" if layout == "rows" else "rows"
                    use = self._use(whole, layout)
                    if whole.shape != weight.shape and whole.shape != weight.shape[::-1]:
                        use.is_seen = False  # slices of it
                elif len(weight.shape) == 3 and name in ("bmm", "matmul", "baddbmm"):
                    use = self._use(weight, "blocks")
                else:
                    continue
                if product.output is None:
                    use.is_seen = False
                else:
                    used.append((use, product))
        return used

    def _contract(self, args: tuple[Any, ...], values: dict[int, Any]) -> list[tuple[Use, functions.Multiplied]]:
        """Find the weight of an einsum."""
        equation, *operands = args
        if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
            operands = list(operands[0])
        for index, tensor in enumerate(operands):
            weight = values.get(id(tensor)) if isinstance(tensor, Tensor) else None
            if not is_value(weight):
                continue
            parts = functions.contraction(equation, len(operands), index)
            if parts is None or not weight.parameters:
                continue
            sizes = [[weight.shape[d] for d in dims] for dims in (parts.blocks, parts.rows, parts.columns)]
            if not parts.blocks and len(weight.shape) == 2 and len(parts.rows) == 1:
                whole, _ = whole_matrix(weight)
                self._use(whole, "columns").is_seen = False
                continue
            blocks, rows, columns = (int(torch.Size(size).numel()) for size in sizes)
            shape = (blocks, rows, columns) if parts.blocks else (rows, columns)
            order = (*parts.blocks, *parts.rows, *parts.columns)
            matrix = derived(Arranged(order, shape), weight, shape, (order, shape))
            self._use(matrix, "blocks" if parts.blocks else "columns").is_seen = False
        return []

    def _use(self, weight: Value, layout: functions.Layout) -> Use:
        use = self.uses.setdefault(weight.identity, Use(weight))
        use.layouts.add(layout)
        return use

    def _outputs(self, used: list[tuple[Use, functions.Multiplied]], result: Any) -> None:
        """Follow what layers returned."""
        tensor = result[0] if isinstance(result, (tuple, list)) else result
        for use, product in used:
            if not isinstance(tensor, Tensor):
                use.is_seen = False
                continue
            output = Output(use)
            use.outputs.append(output)
            rank = len(use.weight.shape) - 1 if product.layout == "convolution" else 1
            self._remember(tensor, _Followed(output, tensor.dim() - rank))

    def _normalise(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], values: dict[int, Any]
    ) -> Normalisation | None:
        """Enter a normalisation, if the function is one."""
        found = functions.normalised(func, args, kwargs)
        if found is None or not isinstance(found.value, Tensor):
            return None
        gain, variance = (values.get(id(t)) if isinstance(t, Tensor) else None for t in (found.gain, found.variance))
        gain, variance = (value if is_value(value) else None for value in (gain, variance))
        owner = gain.owner if variance is None and gain is not None else None if variance is None else variance.owner
        event = Normalisation(None if owner is None else owner.layer, gain, variance, found.eps)
        followed = values.get(id(found.value))
        if isinstance(followed, _Followed):
            self._place(event, followed, found.value)
        self.normalisations.append(event)
        return event

    def _place(self, event: Normalisation, followed: _Followed, tensor: Tensor) -> None:
        event.output = followed.output
        event.fits = event.variance is not None and followed.channel == 1 and tensor.dim() > 1

    def _scale(self, name: str, leaves: list[Any], values: dict[int, Any]) -> None:
        """Take the gain of a written-out normalisation: what multiplies in it."""
        event = self._inside[-1][0] if self._inside else None
        if event is not None and event.gain is None and name in functions.PRODUCTS:
            gains = [values[id(leaf)] for leaf in leaves if isinstance(leaf, Tensor) and is_value(values[id(leaf)])]
            event.gain = next((gain for gain in gains if gain.parameters), None)

    def _follow(
        self, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor
    ) -> bool:
        """Whether a function only changed the view of a layer's output, or is undone with it; if so, follow on."""
        followed = self._lookup(args[0])
        if not isinstance(followed, _Followed):
            return False
        channel = followed.channel
        if name in functions.HOMOGENEOUS:
            channel = None
        elif name in functions.VIEWS:
            if channel is not None and result is not args[0]:
                channel = functions.channel_after(func, args, kwargs, channel, result)
        else:
            return False
        self._remember(result, _Followed(followed.output, channel))
        return True

    def _enter_module(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """See whether a module's own forward normalises its input."""
        event, tensor, known = None, None, None
        if self.is_watching and len(inputs) == 1 and isinstance(inputs[0], Tensor):
            tensor = inputs[0]
            self.is_watching = False
            try:
                event = written_out(module, tensor)
            finally:
                self.is_watching = True
            if event is not None:
                self.normalisations.append(event)
                known = self._known.pop(id(tensor), None)
                followed = self._value(known, tensor)
                if isinstance(followed, _Followed):
                    self._place(event, followed, tensor)
                    followed.output.consumers.append(event)
        self._inside.append((event, tensor, known))

    def _leave_module(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if self._inside:
            _, tensor, known = self._inside.pop()
            if tensor is not None and known is not None:
                self._known[id(tensor)] = known

    def _find_stored(self) -> None:
        """Find where the model's tensors are now."""
        for tensor, stored in stored_tensors(self._model):
            self._stored.setdefault(id(tensor), (tensor, stored))

    def _lookup(self, tensor: Tensor) -> Value | _Followed | None:
        """Return what is known of a tensor."""
        value: Value | _Followed | None = self._value(self._known.get(id(tensor)), tensor)
        if value is not None:
            return value
        if id(tensor) not in self._stored and isinstance(tensor, nn.Parameter):
            self._find_stored()  # FSDP2 sets whole parameters in the place of shards
        stored = self._stored.get(id(tensor))
        return None if stored is None else stored[1]

    def _value(self, known: Any, tensor: Tensor | None) -> Any:
        return known[1] if known is not None and known[0]() is tensor else None

    def _remember(self, tensor: Tensor, value: Value | _Followed | None) -> None:
        self._known[id(tensor)] = weakref.ref(tensor), value


def _has_tensor(result: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(result))


@contextlib.contextmanager
def _eagerly() -> Iterator[None]:
    """Run what is compiled as it was written, inside the context: compiled code calls no functions of torch."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
