"""Rules of recurrent layers over sequences of a fixed length, from initial states that do not depend on the input.

Throughout, w = ||W|| of the input's matrix (all gates on top of each other) and u = ||U|| of the state's; dx_t, dh_t,
dc_t are the differences that two sequences make at time t. All bounds have the form ``|dh_t| <= a |dh_{t-1}| + ..
+ b |dx_t|`` with numbers that do not depend on t (the largest of all t). Their solution is a convolution of (|dx_t|)
with a fixed non-negative kernel, so that ``||(dh_1, .., dh_T)|| <= S ||(dx_1, .., dx_T)||`` with the kernel's sum S
(Young's inequality): the value that the recursion reaches after T steps with |dx_t| = 1. It bounds the last state too.

*Tanh or ReLU*, ``h_t = f(W x_t + U h_{t-1} + b)``, both of slope at most 1: ``|dh_t| <= w |dx_t| + u |dh_{t-1}|``.

*LSTM*, ``c_t = f c_{t-1} + i g``, ``h_t = o tanh(c_t)``, of which i, f, o are sigmoids and g is a tanh of parts of
``z = W x_t + U h_{t-1} + b``. ``|c_t| <= |c_{t-1}| + 1``, so ``|c_t| <= C = |c_0| + T``. Elementwise
``|dc_t| <= |dc_{t-1}| + |(C / 4, 1)| |dz|``: f has slope 1/4, and ``|(g i (1 - i), i (1 - g^2))| <= 1``, because
``i^2 (g^2 + (1 - g^2)^2) <= 1``. And ``|dh_t| <= |dc_t| + 1/4 |dz_o|`` (with a projection P, times ||P||), so
``|dc_t| <= |dc_{t-1}| + k |dz|``, ``|dh_t| <= |dc_{t-1}| + k' |dz|``, k^2 = 1 + C^2 / 16, k'^2 = k^2 + 1/16.

*GRU*, ``h_t = (1 - z) n + z h_{t-1}`` with ``n = tanh(W_n x + b_n + r (U_n h_{t-1} + c_n))``. ``|h_t| <= B``,
B = max(1, |h_0|), so that ``|U_n h + c_n| <= D = u B sqrt(m) + max|c_n|`` for m units. Elementwise
``|dn| <= |d(W_n x)| + |d(U_n h)| + D / 4 |da_r|`` with the sigmoid's argument a_r, and
``|dh_t| <= |dh_{t-1}| + |dn| + (B + 1) / 4 |da_z|``. By Cauchy-Schwarz over the three gates
``|dh_t| <= |dh_{t-1}| + K (w |dx_t| + u |dh_{t-1}|)``, ``K^2 = 1 + D^2 / 16 + (B + 1)^2 / 16``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lightning_lip.graph.builder import (
    Builder,
    Dependent,
    Independent,
    RefusedError,
    SampleAxisError,
    arguments_of,
    rule,
)
from lightning_lip.graph.program import Term
from lightning_lip.graph.rules.linear import magnitudes, matrix_operator
from lightning_lip.graph.rules.ranges import range_of
from lightning_lip.rigorous.rounding import sqrt_up, sum_up

LONGEST = 1024
"""Steps of a sequence: the bound is evaluated by as many instructions, two for an LSTM."""

State = tuple[Dependent | None, Dependent | None]
"""What h and c are known by; None where they do not depend on the input, and for c where there is none."""


def _number(builder: Builder, tensors: Sequence[Independent | None], function: Callable[..., float]) -> Term:
    """Return the factor that is a function of tensors' largest magnitudes, read anew where they can change."""

    def read() -> float:
        largest = [0.0 if t is None or 0 in t.shape else float(magnitudes(t, t.compute).max()) for t in tensors]
        return function(*largest)

    if not math.isfinite(read()):
        raise RefusedError("an initial state or a bias is not finite")
    if any(t is not None and t.live for t in tensors):
        return Term(lives=(builder.program.live(read),))
    return Term().times(read())


def _times(value: Dependent, factor: Term, *operators: int) -> Dependent:
    """Return a value after a factor and operators."""
    term = value.term.times(1.0, (*factor.operators, *operators), factor.lives)
    constant = math.nextafter(term.constant + factor.constant, math.inf) if factor.constant else term.constant
    return dataclasses.replace(value, term=dataclasses.replace(term, constant=constant), pending=None)


def _total(builder: Builder, *values: Dependent | None) -> Dependent:
    known = [value for value in values if value is not None]
    inputs = frozenset().union(*(value.inputs for value in known))
    return dataclasses.replace(known[0], term=builder.combine("sum", known), inputs=inputs, pending=None)


Step = Callable[[Dependent, State], State]
"""The bounds after one step, by those of its input and of the states before."""


def _simple(builder: Builder, w: int, u: int) -> Step:
    """Return the step of a tanh or ReLU layer."""

    def step(x: Dependent, state: State) -> State:
        h = state[0]
        return _total(builder, _times(x, Term(), w), None if h is None else _times(h, Term(), u)), None

    return step


def _lstm(builder: Builder, w: int, u: int, cell: Callable[..., float], *states: Independent | None) -> Step:
    """Return the step of an LSTM layer; `cell` is the bound C of its cell state, a function of some states' sizes."""

    def root(more: float) -> Callable[..., float]:
        return lambda *sizes: sqrt_up(sum_up([1.0, more, (cell(*sizes) / 4) ** 2 * (1 + 1e-15)]))

    k, k_h = (_number(builder, states, root(more)) for more in (0.0, 1 / 16))

    def step(x: Dependent, state: State) -> State:
        h, c = state

        def total(factor: Term) -> Dependent:
            return _total(builder, c, _times(x, factor, w), None if h is None else _times(h, factor, u))

        return total(k_h), total(k)

    return step


def _gru(
    builder: Builder,
    w: int,
    u: int,
    units: int,
    bias: Independent | None,
    size: Callable[..., float],
    *states: Independent | None,
) -> Step:
    """Return the step of a GRU layer; `size` is the bound B of its state, a function of some states' sizes."""

    def fixed(bias_size: float, *sizes: float) -> float:
        return sum_up([sqrt_up(sum_up([1.0, ((size(*sizes) + 1) / 4) ** 2 * (1 + 1e-15)])), bias_size / 4])

    # K <= sqrt(1 + (B + 1)^2 / 16) + max|c_n| / 4 + u B sqrt(m) / 4, in which all but u is a number.
    first = _number(builder, (bias, *states), fixed)
    second = _number(builder, states, lambda *sizes: size(*sizes) * sqrt_up(units) / 4 * (1 + 1e-15))

    def step(x: Dependent, state: State) -> State:
        h = state[0]
        parts = [_times(x, first, w), _times(x, second, u, w)]
        parts += [] if h is None else [h, _times(h, first, u), _times(h, second, u, u)]
        return _total(builder, *parts), None

    return step


def _operators(builder: Builder, node: torch.fx.Node, *weights: Any) -> list[int]:
    return [builder.operator(*matrix_operator(builder, node, weight)) for weight in weights]


def _new_gate_bias(builder: Builder, bias: Any, units: int) -> Independent | None:
    """Return c_n, the last of the three gates' biases on the state."""
    if not isinstance(bias, Independent):
        return None
    return dataclasses.replace(bias, operation=lambda b: b[2 * units :], sources=(bias,), owner=None)


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def _layers(builder: Builder, node: torch.fx.Node, a: dict[str, Any]) -> Any:
    if "batch_sizes" in a:
        raise RefusedError("packed sequences have no fixed length")
    value = a["input"]
    states = list(a["hx"]) if isinstance(a["hx"], (list, tuple)) else [a["hx"]]
    if not all(isinstance(state, Independent) for state in states):
        raise RefusedError("its initial state depends on the network's input: only constant ones have a bound")
    if not all(isinstance(weight, Independent) for weight in a["params"]):
        raise RefusedError("its weights depend on the network's input")
    if a["train"] and a["dropout"] > 0:
        raise RefusedError("its dropout stays on in eval mode: the network is then random")
    time = 1 if a["batch_first"] else 0
    if not isinstance(value, Dependent) or len(value.shape) != 3 or value.axis not in (1 - time, None):
        raise SampleAxisError
    length, directions = value.shape[time], 2 if a["bidirectional"] else 1
    if length > LONGEST:
        raise RefusedError(f"a sequence of more than {LONGEST} steps has no rule")
    per_layer = len(a["params"]) // (a["num_layers"] * directions)
    layer_input, lasts = value, []
    for layer in range(a["num_layers"]):
        found = []
        for direction in range(directions):
            start = (layer * directions + direction) * per_layer
            found.append(_run(builder, node, layer_input, a["params"][start : start + per_layer], states, length))
        lasts += found
        layer_input = _beside(builder, [h for h, _ in found])
    shapes = [tuple(int(n) for n in part.shape) for part in node.meta["val"]]
    builder.note(node, f"a recurrence of {length} steps")
    last_h = _beside(builder, [h for h, _ in lasts])
    axis = None if value.axis is None else 1
    results = [
        dataclasses.replace(layer_input, shape=shapes[0]),
        dataclasses.replace(last_h, shape=shapes[1], axis=axis),
    ]
    if len(shapes) == 3:
        cells = _beside(builder, [c for _, c in lasts if c is not None])
        results.append(dataclasses.replace(cells, shape=shapes[2], axis=axis))
    return tuple(results)


def _beside(builder: Builder, values: list[Dependent]) -> Dependent:
    """Return values side by side."""
    return dataclasses.replace(values[0], term=builder.combine("norm", values), pending=None)


def _run(
    builder: Builder,
    node: torch.fx.Node,
    value: Dependent,
    weights: Sequence[Independent],
    states: Sequence[Independent],
    length: int,
) -> tuple[Dependent, Dependent | None]:
    """Return the bounds of one direction of one layer over a sequence: of all h_t together, and of the last c_t."""
    name = str(node.target)
    w, u = _operators(builder, node, *weights[:2])
    units = weights[1].shape[0]
    projection: tuple[int, ...] = ()
    if "lstm" in name:
        if len(weights) in (3, 5):
            projection = tuple(_operators(builder, node, weights[-1]))
        step = _lstm(builder, w, u, lambda c: sum_up([c, float(length - 1)]), states[1])
    elif "gru" in name:
        units //= 3
        bias = _new_gate_bias(builder, weights[3], units) if len(weights) == 4 else None
        step = _gru(builder, w, u, units, bias, lambda h: max(h, 1.0), states[0])
    else:
        step = _simple(builder, w, u)
    state: State = (None, None)
    for _ in range(length):
        h, c = step(value, state)
        state = (h if h is None else _times(h, Term(), *projection), c)
    assert state[0] is not None
    return state[0], state[1]


@rule("lstm_cell")
def _lstm_cell(builder: Builder, node: torch.fx.Node, a: dict[str, Any]) -> Any:
    arguments = arguments_of(node, lambda leaf: leaf)
    h, c = a["hx"]
    no_states: tuple[Independent, ...] = ()
    # A cell state that can change, or is not known to be bounded, has none.
    size, states = range_of(builder, arguments["hx"][1]).magnitude, no_states
    if isinstance(c, Independent):
        size, states = 0.0, (c,)
    elif not math.isfinite(size):
        raise RefusedError("its cell state is not known to be bounded: its gates multiply it")
    w, u = _operators(builder, node, a["w_ih"], a["w_hh"])
    step = _lstm(builder, w, u, lambda *sizes: max(size, *sizes, 0.0), *states)
    return _cell(builder, node, a, step, h, c)


@rule("gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
def _simple_cell(builder: Builder, node: torch.fx.Node, a: dict[str, Any]) -> Any:
    arguments = arguments_of(node, lambda leaf: leaf)
    h = a["hx"]
    no_states: tuple[Independent, ...] = ()
    w, u = _operators(builder, node, a["w_ih"], a["w_hh"])
    step = _simple(builder, w, u)
    if "gru" in str(node.target):
        size, states = range_of(builder, arguments["hx"]).magnitude, no_states
        if isinstance(h, Independent):
            size, states = 1.0, (h,)
        elif not math.isfinite(size):
            raise RefusedError("its state is not known to be bounded: its gates multiply it")
        units = a["w_hh"].shape[0] // 3
        bias = _new_gate_bias(builder, a["b_hh"], units)
        step = _gru(builder, w, u, units, bias, lambda *sizes: max(size, *sizes, 1.0), *states)
    return _cell(builder, node, a, step, h, None)[0]


def _cell(builder: Builder, node: torch.fx.Node, a: dict[str, Any], step: Step, h: Any, c: Any) -> tuple[Any, Any]:
    """Return the bounds of a cell's new states."""
    x = a["input"]
    known = [value for value in (x, h, c) if isinstance(value, Dependent)]
    if any(not value.has_batch_first or len(value.shape) != 2 for value in known):
        raise SampleAxisError
    if not all(isinstance(b, Independent) or b is None for b in (a["b_ih"], a["b_hh"])):
        raise RefusedError("its bias depends on the network's input")
    h, c = (value if isinstance(value, Dependent) else None for value in (h, c))
    if not isinstance(x, Dependent):
        # Its part is a constant.
        x = dataclasses.replace(known[0], term=Term(constant=-math.inf))
    new_h, new_c = step(x, (h, c))
    value = node.meta["val"]
    parts = [value] if isinstance(value, torch.Tensor) else list(value)
    builder.note(node, "a step of a recurrence")
    shaped = [
        None
        if new is None or part is None
        else dataclasses.replace(new, shape=tuple(map(int, part.shape)), axis=known[0].axis)
        for new, part in zip((new_h, new_c), [*parts, None], strict=False)
    ]
    return shaped[0], shaped[1] if len(shaped) > 1 else None
