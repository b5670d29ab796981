"""A model's forward pass as a graph of tensor operations, by ``torch.export``, in eval mode.

Chosen after trying: ``strict=False`` keeps every operation at the level of ``torch.nn.functional`` (one node for a
convolution, a layer norm, a GELU), the path of the module that calls it, and refuses control flow that depends on the
input's values. ``torch.fx`` would stop at any Python control flow and hides what a module of another package computes.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from lightning_lip.checks import check_model
from lightning_lip.errors import UnsupportedLayerError
from lightning_lip.graph.whole_modules import WholeModule, traced_whole
from lightning_lip.models.inputs import (
    FAILURES,
    BatchDim,
    call_arguments,
    check_batch_dim,
    check_example,
    floating_dtype,
    traced_example,
)
from lightning_lip.models.modules import (
    eval_mode,
    is_wrapper,
    parametrizations_uncached,
    state_kept,
    walk,
)
from lightning_lip.models.sharding import refuse_sharded


@dataclass(frozen=True)
class TracedModel:
    """The graph, and how its names lead back to the live model.

    Attributes:
        model: The model, without wrappers.
        graph: The graph of one forward pass with a batch of two.
        stored: Reads the live parameter or buffer, or the constant, behind a placeholder's name.
        owners: For a placeholder's name: the owning module, its name, the key in it.
        inputs: Names of the placeholders of the model's inputs, in order.
        outputs: Names of the nodes that the model returns, in order; the graph's other results are changed buffers.
        written: For the name of a placeholder that the forward pass gives another value: the buffer's name.
        modules: The calls of modules traced as one node, by index.
        names: The modules' names by id, as :func:`lightning_lip.operators.selection.cover` gives them.
        batch_dim: 0 where the inputs are a batch of two along their first dimensions, None where they are one sample.
    """

    model: nn.Module
    graph: torch.fx.Graph
    stored: dict[str, Callable[[], Tensor]]
    owners: dict[str, tuple[nn.Module, str, str]]
    inputs: list[str]
    outputs: list[str]
    written: dict[str, str]
    modules: list[WholeModule]
    names: dict[int, str]
    batch_dim: BatchDim

    def tensor(self, argument: object) -> Tensor | None:
        """Return the live parameter, buffer or constant that an argument of an operation is; None for anything else."""
        read = self.stored.get(argument.name) if isinstance(argument, torch.fx.Node) else None
        return None if read is None else read()


def trace(model: nn.Module, example_input: object, batch_dim: BatchDim = 0) -> TracedModel:
    """Trace one forward pass in eval mode; the model and the generators of random numbers are left as they were.

    Args:
        model: The model; torch.compile and DDP wrappers are looked through.
        example_input: A tensor, a tuple of positional arguments or a dict of keyword arguments. All tensors in it have
            the batch along the first dimension; a batch of one is repeated, a larger one cut to two. A factor that
            the forward pass computes from the size of the batch is taken at two.
        batch_dim: None takes the whole input as one sample, as it is.

    Raises:
        TypeError: If the model is no module.
        ValueError: If the tensors have no common batch dimension, there is none, or the forward pass fails on them.
        UnsupportedLayerError: If the forward pass cannot be traced: control flow that depends on the input's values,
            say.
    """
    check_model(model, "A bound over the traced graph")
    check_batch_dim(batch_dim)
    while is_wrapper(model):
        model = next(iter(model.children()))
    refuse_sharded(
        model, "A bound over the traced graph", "Leave the example input out: the product over the layers remains."
    )
    scripted = [name for name, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)]
    if scripted:
        names_of = ", ".join(name or "(the model itself)" for name in scripted[:5])
        raise UnsupportedLayerError(
            f"{names_of}: compiled by torch.jit, whose operations cannot be traced. Use the module it was made from."
        )
    modules: list[WholeModule] = []
    with as_traced(model), traced_whole(model, modules):
        args, kwargs = call_arguments(traced_example(example_input, floating_dtype(model), batch_dim))
        try:
            program = torch.export.export(model, args, dict(kwargs), strict=False)
            if any(_mutates(node) for node in program.graph.nodes):
                # An in-place operation changes all views of its argument; this writes it as a new tensor.
                program = program.run_decompositions({})
        except UnsupportedLayerError:
            raise
        except FAILURES as error:
            check_example(model, args, kwargs, batch_dim)
            _refuse_inference_tensors(model, error)
            _refuse_own_state(model, error)
            raise UnsupportedLayerError(
                f"The forward pass of {type(model).__name__} cannot be traced by torch.export, so its Lipschitz bound "
                "is not known (control flow that depends on the input's values has none in general). Trace the part "
                f"of the model that can be. The reason given: {error}"
            ) from error
    names: dict[int, str] = {}
    for found in walk(model):
        names.setdefault(id(found.module), found.name)
    stored, owners = _stored_tensors(model, program, names)
    # Not the signature's: where an input is no tensor it lists the value instead of the name.
    inputs = [n.name for n in program.graph.nodes if n.op == "placeholder" and n.name not in stored]
    signature = program.graph_signature
    outputs = [str(name) for name in signature.user_outputs]
    changed = {*signature.buffers_to_mutate.values(), *getattr(signature, "parameters_to_mutate", {}).values()}
    read = {**signature.inputs_to_buffers, **signature.inputs_to_parameters}
    written = {placeholder: name for placeholder, name in read.items() if name in changed}
    return TracedModel(model, program.graph, stored, owners, inputs, outputs, written, modules, names, batch_dim)


def _refuse_inference_tensors(model: nn.Module, error: Exception) -> None:
    """Say what is wrong with a model that was made in inference mode, where it could not be traced.

    Raises:
        UnsupportedLayerError: If it was.
    """
    made = [name for name, tensor in model.named_parameters() if tensor.is_inference()]
    if made:
        raise UnsupportedLayerError(
            f"{type(model).__name__} was made under torch.inference_mode() ({made[0]!r} is an inference tensor), which "
            "torch.export does not take. Make or load the model outside of it, or give a copy that is made outside of "
            "it: copy.deepcopy(model)."
        ) from error


def _refuse_own_state(model: nn.Module, error: Exception) -> None:
    """Say what is wrong where a parametrization replaces its own tensors in the forward pass, as orthogonium's do.

    Raises:
        UnsupportedLayerError: If the forward pass replaced one of a parametrized model.
    """
    if "set_ on a graph input" in str(error) and any(map(parametrize.is_parametrized, model.modules())):
        raise UnsupportedLayerError(
            f"A parametrization in {type(model).__name__} replaces tensors of its own in each forward pass, eval mode "
            "included: the weights that it returns change from call to call. Store them: "
            "torch.nn.utils.parametrize.remove_parametrizations on each parametrized module of a copy."
        ) from error


@contextlib.contextmanager
def as_traced(model: nn.Module) -> Iterator[None]:
    """Run a forward pass as it is traced: in eval mode, uncompiled, without gradients; undo all that it changes."""
    with (
        eval_mode(model),
        state_kept(model),
        _detached_from_trainer(model),
        parametrizations_uncached(),
        torch.compiler.set_stance("force_eager"),
        torch.inference_mode(False),
        torch.no_grad(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def _mutates(node: torch.fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and bool(schema.is_mutable)


@contextlib.contextmanager
def _detached_from_trainer(model: nn.Module) -> Iterator[None]:
    """Take the Trainer from every LightningModule: `self.log` in a traced forward would read a tensor's value."""
    kept = [
        (m, key, vars(m)[key])
        for m in model.modules()
        for key in ("_trainer", "_fabric")
        if vars(m).get(key) is not None
    ]
    for m, key, _ in kept:
        vars(m)[key] = None
    try:
        yield
    finally:
        for m, key, value in kept:
            vars(m)[key] = value


def _stored_tensors(
    model: nn.Module, program: torch.export.ExportedProgram, names: dict[int, str]
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, tuple[nn.Module, str, str]]]:
    """Return readers of the live tensors behind the placeholders, and their owners."""
    # A tied parameter belongs to the first module that holds it.
    first: dict[int, tuple[nn.Module, str]] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                first.setdefault(id(parameter), (module, key))
    stored: dict[str, Callable[[], Tensor]] = {}
    owners: dict[str, tuple[nn.Module, str, str]] = {}
    signature = program.graph_signature
    for placeholder, path in signature.inputs_to_parameters.items():
        parent, _, key = path.rpartition(".")
        module = model.get_submodule(parent)
        module, key = first.get(id(module._parameters.get(key)), (module, key))
        owners[placeholder] = (module, names.get(id(module), parent), key)
        stored[placeholder] = _reader(module._parameters, key)
    constants = {**program.constants, **program.state_dict}
    for placeholder, path in {**signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}.items():
        parent, _, key = path.rpartition(".")
        owner = _submodule(model, parent)
        if owner is not None and owner._buffers.get(key) is not None:
            owners[placeholder] = (owner, names.get(id(owner), parent), key)
            stored[placeholder] = _reader(owner._buffers, key)
        else:
            constant = constants[path]
            stored[placeholder] = lambda constant=constant: constant  # type: ignore[misc]
    return stored, owners


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _reader(slots: Mapping[str, Tensor | None], key: str) -> Callable[[], Tensor]:
    def read() -> Tensor:
        tensor = slots[key]
        if tensor is None:
            raise RuntimeError(f"A tensor {key!r} of the traced model is gone: trace the model again.")
        return tensor

    return read


RESHAPES = frozenset({"view", "reshape", "_unsafe_view", "flatten", "unflatten", "unsqueeze", "squeeze"})
"""Operations that keep all elements in their order, by :func:`operation_name`."""


def operation_name(node: torch.fx.Node) -> str:
    """Return the operation's name in aten, without the trailing underscore of in-place ones; empty for others."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return ""
    return target._schema.name.removeprefix("aten::").removesuffix("_")


def module_paths(node: torch.fx.Node) -> list[str]:
    """Return the paths of the modules whose forward holds the operation, outermost first; empty for the model."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = (str(entry[0]).removeprefix("L['self']").removeprefix("L__self__").lstrip(".") for entry in stack.values())
    return [".".join(part for part in path.split(".") if part != "_orig_mod") for path in paths]


def module_path(node: torch.fx.Node) -> str:
    """Return the path of the innermost module whose forward holds the operation; empty for the model itself."""
    return next(reversed(module_paths(node)), "")


_SAME_DIFFERENCES = frozenset({"log_softmax", "alias", "clone", "contiguous", "detach", "to", "_to_copy"})
"""Operations on logits (B, C) that keep the difference of any two of a sample's."""


def head_node(traced: TracedModel, head: nn.Module | None = None) -> torch.fx.Node | None:
    """Return the linear operation whose outputs are the logits; None where the output shows none.

    Args:
        traced: The graph.
        head: The module whose forward holds it; None for the last operation, but for a log-softmax after it.

    Raises:
        ValueError: If `head` is called more than once, or not as one linear operation.
    """
    if head is None:
        last: list[torch.fx.Node] = [node for node in traced.graph.nodes if node.name in traced.outputs]
        while len(last) == 1 and operation_name(last[0]) in _SAME_DIFFERENCES:
            last = last[0].all_input_nodes
        return last[0] if len(last) == 1 and operation_name(last[0]) == "linear" else None
    names = names_of(traced.model, head, "head")
    calls: list[torch.fx.Node] = [
        n for n in traced.graph.nodes if operation_name(n) == "linear" and module_path(n) in names
    ]
    if len(calls) != 1:
        raise ValueError(
            f"Expected `head` to be one linear layer of the model, called once, got a {type(head).__name__} with "
            f"{len(calls)} linear operations in the traced forward pass."
        )
    return calls[0]


def entry_nodes(traced: TracedModel, module: nn.Module) -> list[torch.fx.Node]:
    """Return the values that a module's operations take from outside of it, each once."""
    names = names_of(traced.model, module, "until")
    inside = [node for node in traced.graph.nodes if names & set(module_paths(node))]
    return list(dict.fromkeys(source for node in inside for source in node.all_input_nodes if source not in inside))


def names_of(model: nn.Module, module: nn.Module, argument: str) -> set[str]:
    """Return the names under which a model holds a module, the value of `argument`, without the prefixes of wrappers.

    Raises:
        ValueError: If it does not hold it.
    """
    found = {name for name, m in model.named_modules(remove_duplicate=False) if m is module}
    if not found:
        raise ValueError(f"Expected `{argument}` to be a module of the model, got another {type(module).__name__}.")
    return {".".join(part for part in name.split(".") if part != "_orig_mod") for name in found}


class Sizes:
    """Sizes of traced tensors that the values of stored ones decide: how many elements of a mask are true, say."""

    def __init__(self) -> None:
        self._known: dict[Any, int] = {}

    def learn(self, example: Tensor, shape: Sequence[int]) -> None:
        """Take over the sizes of a traced tensor, which are known now."""
        for size, known in zip(example.shape, shape, strict=True):
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                self._known[size.node.expr] = int(known)

    def number(self, size: int | torch.SymInt) -> int | None:
        """Return a size, or what is computed from sizes; None if it depends on the values of an unknown tensor."""
        if not isinstance(size, torch.SymInt):
            return int(size)
        known = size.node.expr.subs(self._known)
        return int(known) if known.is_Integer else None

    def of(self, example: Tensor) -> tuple[int, ...] | None:
        """Return the shape of a traced tensor; None where it depends on the values of a tensor that is not known."""
        known = tuple(n for n in map(self.number, example.shape) if n is not None)
        return known if len(known) == example.dim() else None

    def note(self, node: torch.fx.Node) -> None:
        """Write the shape of a node's first tensor to ``node.meta["sizes"]``; None where it is not known."""
        first = next((v for v in pytree.tree_leaves(node.meta.get("val")) if isinstance(v, Tensor)), None)
        node.meta["sizes"] = None if first is None else self.of(first)


_GREATER, _LESS = ("gt", "ge", "greater", "greater_equal"), ("lt", "le", "less", "less_equal")

_PARTS = ("slice", "select", "narrow", "unsqueeze")


def extreme_of_two(node: torch.fx.Node) -> tuple[str, list[Any]] | None:
    """Return "maximum" or "minimum" and its two arguments, if an operation takes that of two values.

    ``where(a > b, a, b)`` is the maximum of a and b, and continuous, unlike other choices.
    """
    name = operation_name(node)
    if name in ("maximum", "minimum") or (name in ("max", "min") and len(node.all_input_nodes) == 2):
        return f"{name[:3]}imum", list(node.args[:2])
    if name != "where" or len(node.args) != 3:
        return None
    condition, *chosen = node.args
    comparison = operation_name(condition) if isinstance(condition, torch.fx.Node) else ""
    if comparison not in (*_GREATER, *_LESS):
        return None
    compared = list(condition.args[:2])  # type: ignore[union-attr]
    for pair, takes_greater in ((compared, comparison in _GREATER), (compared[::-1], comparison in _LESS)):
        if all(map(_is_same, pair, chosen)):
            return "maximum" if takes_greater else "minimum", chosen
    return None


def _is_same(a: Any, b: Any) -> bool:
    """Whether two arguments are one value: a node, or the same part of one, written twice."""
    if a is b or not isinstance(a, torch.fx.Node) or not isinstance(b, torch.fx.Node):
        return a is b or (isinstance(a, int) and isinstance(b, int) and a == b)
    is_part = a.target is b.target and operation_name(a) in _PARTS and not a.kwargs and not b.kwargs
    return is_part and len(a.args) == len(b.args) and all(map(_is_same, a.args, b.args))
