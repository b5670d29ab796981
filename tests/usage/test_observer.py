"""What a forward pass shows, against what the modules are known to compute."""

import contextlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from lightning_lip.usage.observer import Observer
from lightning_lip.usage.values import Stored


class Calls(nn.Module):
    """Calls a function of itself and its input, with given parameters."""

    def __init__(self, function, **parameters):
        super().__init__()
        self.function = function
        for name, shape in parameters.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))

    def forward(self, x):
        return self.function(self, x)


def observed(model, *inputs):
    with Observer(model) as observer:
        model(*inputs)
    return observer


def layouts(observer):
    return {use.weight.full_name: use.layouts for use in observer.uses.values()}


@pytest.mark.parametrize(
    ("function", "layout"),
    [
        (lambda m, x: F.linear(x, m.w.T), "columns"),
        (lambda m, x: x @ m.w, "columns"),
        (lambda m, x: torch.addmm(x.new_zeros(6), x, m.w), "columns"),
        (lambda m, x: torch.mm(x, mat2=m.w), "columns"),
        (lambda m, x: (m.w.T @ x.T).T, "columns"),
        (lambda m, x: torch.einsum("bi,io->bo", x, m.w), "columns"),
        (lambda m, x: F.linear(x, m.w.t().to(x.dtype).contiguous()), "columns"),
        (lambda m, x: torch.cat([x @ part for part in m.w.chunk(2, dim=1)], 1), "columns"),
        (lambda m, x: x @ m.w[:, :3], "columns"),
    ],
)
def test_a_matrix_is_found_whole_by_its_slot_however_it_multiplies(function, layout):
    model = Calls(function, w=(4, 6))
    (use,) = observed(model, torch.randn(3, 4)).uses.values()
    assert isinstance(use.weight, Stored)
    assert use.weight.compute() is model.w
    assert use.weight.full_name == "w"
    assert layout in use.layouts


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x * m.w,
        lambda m, x: x + m.w,
        lambda m, x: F.embedding(x.long().clamp(0, 2), m.w),
        lambda m, x: x @ x.T @ m.w.detach().new_ones(3, 4),
        lambda m, x: x @ F.dropout(m.w, 0.5).T,  # another matrix each time
    ],
)
def test_what_does_not_multiply_as_a_weight_is_not_found(function):
    assert observed(Calls(function, w=(3, 4)), torch.rand(3, 4)).uses == {}


def test_the_modules_of_torch():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert layouts(observed(layer, torch.randn(2, 3, 8))) == {
        name: {"rows"} for name in ("self_attn.in_proj_weight", "self_attn.out_proj", "linear1", "linear2")
    }
    # In eval mode without gradients attention has a fast path, which calls one function for all.
    with torch.no_grad():
        assert len(layouts(observed(layer.eval(), torch.randn(2, 3, 8)))) == 4
    for kind, name in ((nn.LSTM, "l0"), (nn.GRU, "l0"), (nn.RNN, "l0")):
        found = layouts(observed(kind(4, 5), torch.randn(3, 2, 4)))
        assert found == {f"weight_ih_{name}": {"rows"}, f"weight_hh_{name}": {"rows"}}
    for cell in (nn.LSTMCell, nn.GRUCell, nn.RNNCell):
        assert set(layouts(observed(cell(4, 5), torch.randn(2, 4)))) == {"weight_ih", "weight_hh"}
    apart = nn.MultiheadAttention(8, 2, kdim=4, vdim=4, batch_first=True)
    found = layouts(observed(apart, torch.randn(2, 3, 8), torch.randn(2, 3, 4), torch.randn(2, 3, 4)))
    assert set(found) == {"q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj"}
    assert layouts(observed(nn.Conv1d(2, 3, 3), torch.randn(1, 2, 9))) == {"": {"convolution"}}


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = F.batch_norm(self.weight.view(1, len(self.weight), -1), None, None, training=True).view_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def test_a_computed_kernel_is_computed_anew_with_gradients():
    conv = Standardised(3, 4, 3, padding=1)
    (use,) = observed(conv, torch.randn(2, 3, 6, 6)).uses.values()
    with torch.no_grad():
        conv.weight.mul_(torch.rand(4, 1, 1, 1) + 1)
        conv.weight.add_(1.0)
    kernel = use.weight.compute()
    rows = conv.weight.detach().flatten(1)
    rows = (rows - rows.mean(1, keepdim=True)) / (rows.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    assert torch.allclose(kernel.flatten(1), rows, atol=1e-5)
    assert use.weight.parameters == (conv.weight,)
    kernel.square().sum().backward()
    assert conv.weight.grad is not None
    assert use.convolution[2] == (3, 6, 6)


def test_a_parametrised_weight_is_computed_from_its_originals():
    layer = weight_norm(nn.Linear(4, 3))
    (use,) = observed(layer, torch.randn(2, 4)).uses.values()
    assert torch.equal(use.weight.compute(), layer.weight)
    assert {id(p) for p in use.weight.parameters} == {id(p) for p in layer.parametrizations.parameters()}
    assert use.weight.owner.layer is layer


def test_a_loop_and_several_results_are_one_use():
    shared = nn.Linear(4, 4)
    model = Calls(lambda m, x: m.inner(m.inner(m.inner(x))))
    model.inner = shared
    (use,) = observed(model, torch.randn(2, 4)).uses.values()
    assert len(use.outputs) == 3


def test_a_tied_table_is_the_weight_of_the_head():
    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.table.weight

        def forward(self, tokens):
            return self.head(self.table(tokens))

    assert layouts(observed(Language(), torch.tensor([[1, 2]]))) == {"head": {"rows"}}


def behind(model, x):
    """The types of what is behind each layer, and whether both are one operator."""
    return {
        use.weight.full_name: [
            [None if call is None else (type(call.module).__name__, call.fits) for call in output.consumers]
            for output in use.outputs
        ]
        for use in observed(model, x).uses.values()
    }


class Flow(nn.Module):
    """A layer whose output goes through a function of it and a normalisation."""

    def __init__(self, function, norm, layer=None):
        super().__init__()
        self.function, self.norm, self.layer = function, norm, layer or nn.Linear(4, 6)

    def forward(self, x):
        return self.function(self.layer(x), self.norm)


@pytest.mark.parametrize(
    ("function", "fits"),
    [
        (lambda h, n: n(h.transpose(1, 2)), True),
        (lambda h, n: n(F.dropout(h, 0.1).permute(0, 2, 1).contiguous()), True),
        (lambda h, n: n(h.reshape(-1, 6)), True),
        (lambda h, n: n(h.view(2, 5, 6, 1).squeeze(-1).mT), True),
        (lambda h, n: n(h.reshape(2, 6, 5)), False),  # other channels, of the same size
        (lambda h, n: n(F.relu(h).transpose(1, 2)), False),
    ],
)
def test_views_between_a_layer_and_a_batch_norm_are_followed_with_its_channels(function, fits):
    assert behind(Flow(function, nn.BatchNorm1d(6)), torch.randn(2, 5, 4)) == {"layer": [[("BatchNorm1d", fits)]]}


@pytest.mark.parametrize(
    "function",
    [
        lambda h, n: n(h),
        lambda h, n: n(F.relu(h)),
        lambda h, n: n(h.transpose(1, 2).contiguous().transpose(1, 2)),
        lambda h, n: n(h.float().clone()),
    ],
)
@pytest.mark.parametrize("norm", [nn.LayerNorm(6), nn.RMSNorm(6), nn.LayerNorm(6, elementwise_affine=False)])
def test_a_normalisation_is_the_only_consumer(function, norm):
    found = behind(Flow(function, norm), torch.randn(2, 5, 4))
    assert [len(own) for own in found["layer"]] == [1]
    assert found["layer"][0][0] is not None


@pytest.mark.parametrize(
    "function",
    [
        lambda h, n: n(h) + h,
        lambda h, n: n(h + 1),
        lambda h, n: n(torch.tanh(h)),
        lambda h, n: n(h.add_(1)),
        lambda h, n: n(h.chunk(2, -1)[0].repeat(1, 1, 2)),
        lambda h, n: (n(h), h * 2)[0],
    ],
)
def test_what_has_other_uses_is_not_behind_a_normalisation_only(function):
    (consumers,) = behind(Flow(function, nn.LayerNorm(6)), torch.randn(2, 5, 4))["layer"]
    assert None in consumers


class Written(nn.Module):
    """Llama's RMSNorm."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((6,), 2.0))

    def forward(self, x):
        x = x.float()
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Grown(Written):
    """Not invariant: grows with its input."""

    def forward(self, x):
        return self.weight * x * x.norm(dim=-1, keepdim=True)


def test_a_written_out_normalisation_is_found_by_trying():
    model = Flow(lambda h, n: n(h), Written())
    generator = torch.get_rng_state()
    (call,) = observed(model, torch.randn(2, 5, 4, generator=torch.Generator())).normalisations
    assert torch.equal(torch.get_rng_state(), generator)
    assert call.gain.compute() is model.norm.weight
    assert behind(model, torch.randn(2, 5, 4)) == {"layer": [[("Written", False)]]}
    assert observed(Flow(lambda h, n: n(h), Grown()), torch.randn(2, 5, 4)).normalisations == []
    (consumers,) = behind(Flow(lambda h, n: n(h) + h, Written()), torch.randn(2, 5, 4))["layer"]
    assert None in consumers


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_and_autocast_show_the_same(reentrant):
    model = Flow(lambda h, n: n(h), nn.LayerNorm(6))
    forward = model.forward
    model.forward = lambda x: checkpoint(forward, x, use_reentrant=reentrant)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert behind(model, torch.randn(2, 5, 4, requires_grad=True)) == {"layer": [[("LayerNorm", False)]]}


def test_compiled_modules_are_watched_and_compile_afterwards():
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    inner = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
    model = torch.compile(inner, backend=backend)
    x = torch.randn(3, 4)
    assert behind(model, x) == {"0": [[("BatchNorm1d", True)]]}
    assert not compiled
    model(x)
    assert len(compiled) == 1
    assert behind(model, x) == {"0": [[("BatchNorm1d", True)]]}
    model(x)
    assert len(compiled) == 1  # what was compiled before stays


def test_nothing_changes_and_nothing_is_left_behind():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 6), Written(), nn.Dropout()
    )
    twin = torch.nn.Sequential(*[torch.load(save(m), weights_only=False) for m in model])
    x = torch.randn(2, 3, 6, 6)
    torch.manual_seed(1)
    with Observer(model) as observer:
        y = model(x)
    assert not observer._known
    torch.manual_seed(1)
    assert torch.equal(y, twin(x))
    y.sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.overrides._get_current_function_mode() is None


def save(module):
    import io

    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return file


def test_a_forward_pass_that_fails_leaves_nothing_behind():
    model = nn.Sequential(nn.Linear(4, 6), Written(), nn.Linear(5, 5))
    with contextlib.suppress(RuntimeError), Observer(model):
        model(torch.randn(2, 4))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.overrides._get_current_function_mode() is None
