import copy
import math
import random
from collections import deque

import numpy as np
import pytest
import torch
from support.networks import Lambda, linear
from support.truth import norm, value_of
from torch import nn

from lightning_lip.certificates.interval import certify
from lightning_lip.constants import modules as constants
from lightning_lip.errors import UnsupportedLayerError
from lightning_lip.graph.bound import NetworkBound
from lightning_lip.models.modules import state_kept
from lightning_lip.operators.convolutions.recorded import RecordedConvolution


def test_a_region_with_its_own_autocast_is_refused():
    def function(m, x):
        with torch.autocast("cpu", torch.bfloat16):
            return m.a(x)

    with pytest.raises(UnsupportedLayerError, match="autocast"):
        NetworkBound.trace(Lambda(function, a=nn.Linear(3, 3)), torch.randn(2, 3))


def test_a_region_without_gradients_is_traced():
    def function(m, x):
        with torch.no_grad():
            return m.a(x)

    layer = linear(3, 3)
    assert value_of(Lambda(function, a=layer), torch.randn(2, 3).double()) == pytest.approx(norm(layer))


def test_buffers_that_the_forward_changes_are_no_outputs():
    def function(m, x):
        m.mean.mul_(0.9).add_(x.detach().mean())
        return 2 * x

    model = Lambda(function)
    model.register_buffer("mean", torch.zeros(()))
    assert value_of(model, torch.randn(2, 3)) == pytest.approx(2.0)
    assert model.mean == 0


def test_data_dependent_control_flow_is_refused():
    model = Lambda(lambda m, x: x if x.sum() > 0 else 2 * x)
    with pytest.raises(UnsupportedLayerError, match="cannot be traced"):
        NetworkBound.trace(model, torch.randn(2, 3))


@pytest.mark.parametrize(
    ("example", "reason"),
    [
        (3.0, "at least one tensor"),
        (torch.tensor(1.0), "first dimension"),
        ((torch.randn(2, 3), torch.randn(3, 3)), "first dimension"),
        (torch.randn(0, 3), "first dimension"),
    ],
)
def test_examples_without_a_batch_are_refused(example, reason):
    with pytest.raises(ValueError, match=reason):
        NetworkBound.trace(nn.Identity(), example)


X = torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("example", "got", "reason"),
    [
        ((X, X), r"\(Tensor of shape \(2, 4\), Tensor of shape \(2, 4\)\)", "TypeError"),
        ({"y": X}, r"\(y=Tensor of shape \(2, 4\)\)", "TypeError"),
        ([X], r"\(list\)", "TypeError"),
        ({"x": X, "input": X}, r"\(x=Tensor.*, input=Tensor.*\)", "TypeError"),
        (torch.zeros(3, 5), r"\(Tensor of shape \(2, 5\)\)", "RuntimeError"),
    ],
)
def test_an_example_that_the_forward_does_not_take_is_told_from_one_that_cannot_be_traced(example, got, reason):
    model = nn.Linear(4, 2)
    expected = (
        rf"(?s)`example_input`.*Linear, whose forward takes \(input.*taken as {got} with a batch of 2: {reason}: "
    )
    with pytest.raises(ValueError, match=expected) as caught:
        NetworkBound.trace(model, example)
    assert not isinstance(caught.value, UnsupportedLayerError)
    with pytest.raises(ValueError, match="whose forward takes"):
        certify(model, example)


@pytest.mark.parametrize("error", [TypeError, ValueError, AttributeError, AssertionError, KeyError, StopIteration])
def test_errors_of_the_export_are_refusals(error):
    def function(m, x):
        if type(x) is not torch.Tensor:  # the export's stand-in
            raise error("no fake tensors here")
        return x

    with pytest.raises(UnsupportedLayerError, match=r"cannot be traced(?s:.*)no fake tensors here"):
        NetworkBound.trace(Lambda(function), X)
    assert not certify(Lambda(function), X).certified


def test_arguments_that_are_no_tensors_are_kept():
    assert value_of(Lambda(lambda m, x, k: k * x), (torch.randn(2, 3), 3)) == pytest.approx(3.0)


def test_batches_of_one_and_of_many_are_traced_as_two():
    layer = linear(2, 3)
    for batch in (1, 2, 7):
        assert value_of(layer, torch.randn(batch, 3).double()) == pytest.approx(norm(layer), rel=1e-9)


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Softsign(), nn.Dropout(0.5))
    model[3].eval()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    NetworkBound.trace(model, torch.randn(2, 3, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.rand(1), expected)
    assert [m.training for m in model] == [True, True, True, False]
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert all("forward" not in vars(m) for m in model.modules())


@pytest.mark.skipif(torch.__version__ < (2, 7), reason="torch.export of 2.6 refuses compiled submodules")
def test_compiled_and_wrapped_models():
    model = Lambda(lambda m, x: m.inner(x), inner=torch.compile(nn.Sequential(nn.Linear(3, 3), nn.ReLU())))
    bound = NetworkBound.trace(torch.compile(model), torch.randn(2, 3))
    assert [op.name for op in bound.operators] == ["inner.0"]
    assert [node.path for node in bound.explain()] == ["inner.0", "inner.1"]


def test_lightning_modules_that_log_in_forward(pl, make_trainer, regression_data, make_module):
    module = make_module(pl)
    original = type(module).forward

    def forward(self, x):
        self.log("mean", x.mean(), on_step=True)
        return original(self, x)

    type(module).forward = forward
    trainer = make_trainer(pl, max_steps=1)
    trainer.fit(module, regression_data)
    bound = NetworkBound.trace(module, torch.randn(2, 4))
    assert [op.name for op in bound.operators] == ["net.0", "net.2", "net.4"]
    assert module.trainer is trainer


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x * m.state.add_(1),
        lambda m, x: (x * m.state, m.state.mul_(1.5))[0],
        lambda m, x: x * m.state.copy_(m.state + 1),
    ],
)
def test_a_buffer_that_the_forward_writes_and_the_output_reads_is_refused_by_name(function):
    model = Lambda(function, state=torch.ones(()))
    with pytest.raises(UnsupportedLayerError, match="changes the buffer 'state', and the output depends on it"):
        NetworkBound.trace(model, torch.randn(2, 3))
    assert model.state == 1


class LargerInEval(nn.Module):
    def forward(self, weight):
        return weight if self.training else 3 * weight


@pytest.mark.parametrize("make", [lambda: nn.Linear(4, 4), lambda: nn.Conv1d(4, 4, 1)], ids=["linear", "conv"])
def test_cached_parametrizations_are_computed_in_eval_mode(make):
    layer = nn.utils.parametrize.register_parametrization(make().double(), "weight", LargerInEval())
    x = torch.randn(2, 4, 1).double() if isinstance(layer, nn.Conv1d) else torch.randn(2, 4).double()
    model = nn.Sequential(layer)
    expected = certify(model, x).upper
    assert expected == pytest.approx(3 * norm(layer.parametrizations.weight.original.flatten(1)))
    with nn.utils.parametrize.cached():
        model(x)
        cached = layer.weight
        found = certify(model, x, data=x)
        assert layer.weight is cached
    assert found.upper == pytest.approx(expected)
    assert found.lower == pytest.approx(expected)


def advance(m, x):
    m.count += 1
    m.history.append(m.count)
    m.named["last"] = m.count
    m.seen.add(m.count)
    m.plain.add_(1)
    m.buffer = m.buffer + 1
    for generator in (m.python, random):
        generator.random()
    for generator in (m.numpy, m.legacy, np.random.mtrand._rand):
        generator.normal()
    torch.rand((), generator=m.torch)
    torch.rand(())
    return 2 * x


def state_of(m):
    numpy_state = m.numpy.bit_generator.state, *(str(g.get_state()) for g in (m.legacy, np.random.mtrand._rand))
    numbers = m.count, list(m.history), dict(m.named), set(m.seen), m.plain.tolist(), m.buffer.tolist()
    generators = m.python.getstate(), random.getstate(), m.torch.get_state().tolist(), torch.get_rng_state().tolist()
    return *numbers, *generators, *numpy_state


def test_all_state_is_given_back():
    model = Lambda(advance, buffer=torch.zeros(()))
    model.count, model.history, model.named, model.seen, model.plain = 0, [0], {"last": 0}, {0}, torch.zeros(1)
    model.python, model.numpy, model.legacy = random.Random(0), np.random.default_rng(0), np.random.RandomState(0)
    model.torch = torch.Generator()
    history, before = model.history, state_of(model)
    with state_kept(model):
        model(torch.ones(2, 3))
        assert all(a != b for a, b in zip(state_of(model), before, strict=True))
    assert state_of(model) == before
    assert model.history is history
    counting = Lambda(lambda m, x: (m.history.append(1), setattr(m, "count", m.count + 1), 2 * x)[-1])
    counting.history, counting.count = [], 0
    assert certify(counting, torch.randn(2, 3)).upper == pytest.approx(2.0)
    assert (counting.history, counting.count) == ([], 0)


class Counting(nn.Module):
    uses = 0

    def forward(self, weight):
        self.uses += 1
        return weight * self.uses


@pytest.mark.parametrize("refused", [True, False])
def test_a_parametrization_that_counts_is_as_it_was(refused):
    layer = nn.utils.parametrize.register_parametrization(nn.Linear(3, 3), "weight", Counting())
    counting, before = layer.parametrizations.weight[0], layer.parametrizations.weight[0].uses
    result = certify(Lambda(lambda m, x: m.layer(x) ** 2 if refused else m.layer(x), layer=layer), torch.randn(2, 3))
    assert not result.certified
    assert counting.uses == before


class Steps(nn.Module):
    """``x -> gain x``, with the gain kept in one place or another inside of the module."""

    def __init__(self, parent=None):
        super().__init__()
        self.inner = nn.Module()
        self.inner.settings = {"gains": [1.0], "queue": deque([1.0])}
        self.gain = nn.Parameter(torch.ones(()))
        self.pair = (nn.Module(), 1)
        self.pair[0].gain = 1.0
        object.__setattr__(self, "parent", parent)

    def total(self):
        settings = self.inner.settings
        return settings["gains"][0] * settings["queue"][0] * self.pair[0].gain * self.gain.detach().item()

    def forward(self, x):
        return self.total_traced() * x

    def total_traced(self):
        settings = self.inner.settings
        return settings["gains"][0] * settings["queue"][0] * self.pair[0].gain * self.gain


@pytest.fixture
def steps(monkeypatch):
    monkeypatch.setattr(constants, "_RULES", {})
    constants.register_constant(Steps, Steps.total)


SETTINGS = {
    "list": lambda m, gain: m.inner.settings["gains"].__setitem__(0, gain),
    "deque": lambda m, gain: m.inner.settings["queue"].__setitem__(0, gain),
    "module in a tuple": lambda m, gain: setattr(m.pair[0], "gain", gain),
    "dict": lambda m, gain: m.inner.settings.update(gains=[gain]),
}


@pytest.mark.usefixtures("steps")
@pytest.mark.parametrize("change", SETTINGS.values(), ids=SETTINGS)
def test_settings_of_modules_inside_one_that_is_traced_as_one_are_those_of_the_call(change):
    def function(m, x):
        change(m.steps, 5.0)
        first = m.steps(x)
        change(m.steps, 1.0)
        return m.steps(first)

    model = Lambda(function, steps=Steps())
    bound = NetworkBound.trace(model, X)
    assert math.exp(bound.log_bound(torch.zeros(0))) == pytest.approx(5.0)
    assert certify(model, X).upper == pytest.approx(5.0)
    with torch.no_grad():
        model.steps.gain.mul_(2)
    # The parameter is read anew.
    assert math.exp(bound.log_bound(torch.zeros(0))) == pytest.approx(20.0)


@pytest.mark.usefixtures("steps")
def test_settings_that_the_forward_leaves_alone_are_read_anew():
    model = nn.Sequential(Steps())
    bound = NetworkBound.trace(model, X)
    SETTINGS["list"](model[0], 3.0)
    assert math.exp(bound.log_bound(torch.zeros(0))) == pytest.approx(3.0)


@pytest.mark.usefixtures("steps")
def test_a_module_that_knows_its_parent_is_copied_once():
    model = nn.Sequential(nn.Linear(4, 4))
    model.append(Steps(parent=model))
    assert certify(model, X).certified


def test_a_model_that_was_made_in_inference_mode_is_refused_by_its_name():
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    refused = certify(model, X).refused[0]
    assert "made under torch.inference_mode() ('0.weight'" in refused
    assert certify(copy.deepcopy(model), X).certified


def test_an_example_that_was_made_in_inference_mode_is_taken():
    with torch.inference_mode():
        example = torch.randn(2, 4)
        assert NetworkBound.trace(nn.ReLU(), example).explain()
    assert certify(nn.Linear(4, 3), example).certified


@pytest.mark.parametrize(
    "asks",
    [
        lambda x: x.sum() > 0,
        lambda x: bool((x > 0).any()),
        lambda x: x[0, 0].item() > 0,
        lambda x: x.tolist()[0][0] > 0,
        lambda x: int(x.abs().max()) > 2,
        lambda x: float(x.mean()) > 0,
        lambda x: len(x.nonzero()) > 7,
        lambda x: torch.equal(x, x.abs()),
        lambda x: torch.allclose(x, x.abs()),
        lambda x: x.numpy().sum() > 0,
        lambda x: not x.isfinite().all(),
        lambda x: x.unique().numel() > 3,
        lambda x: max(x[0], key=float) > 0,
    ],
)
def test_no_value_of_the_input_reaches_a_python_decision(asks):
    """So one export is enough: the traced forward pass holds no numbers of the input that could change the graph."""
    model = Lambda(lambda m, x: 3 * x if asks(x) else x)
    example = torch.randn(2, 4)
    asks(example)
    with pytest.raises(UnsupportedLayerError, match="cannot be traced"):
        NetworkBound.trace(model, example)


def test_what_a_forward_does_to_parameters_where_it_cannot_be_traced_is_undone():
    def function(m, x):
        m.a.weight.data.mul_(2)
        return m.a(x)

    model = Lambda(function, a=nn.Linear(4, 4))
    before = model.a.weight.detach().clone()
    assert "cannot be traced" in certify(model, X).refused[0]
    assert torch.equal(model.a.weight, before)


class Seen:
    """A hook that keeps what it has seen."""

    def __init__(self):
        self.shapes, self.with_gradients = [], 0

    def __call__(self, module, inputs, *output):
        self.shapes.append(tuple(inputs[0].shape))
        self.with_gradients += torch.is_grad_enabled()


def test_hooks_that_are_objects_are_as_they_were():
    model, before, after = nn.Sequential(nn.Conv1d(1, 2, 3)), Seen(), Seen()
    model[0].register_forward_pre_hook(before)
    model[0].register_forward_hook(after)
    recorded = RecordedConvolution("0", model[0])
    x = torch.randn(2, 1, 5)
    assert certify(model, x, data=x).certified
    assert before.shapes == after.shapes == []
    assert before.with_gradients == after.with_gradients == 0
    assert recorded.spatial is None
    model(torch.randn(2, 1, 7))
    assert (before.shapes, after.with_gradients, recorded.spatial) == ([(2, 1, 7)], 1, (7,))


def test_an_autocast_region_that_is_left_open_is_refused():
    def function(m, x):
        torch.autocast("cpu", torch.bfloat16).__enter__()
        try:
            return m.a(x)
        finally:
            torch.clear_autocast_cache()
            torch.set_autocast_enabled("cpu", False)
            torch.autocast_decrement_nesting()  # or every later region of this process keeps the weights that it cast

    assert "cannot be traced" in certify(Lambda(function, a=nn.Linear(4, 4)), X).refused[0]
