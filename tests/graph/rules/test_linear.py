import copy
import math

import pytest
import torch
from support.networks import Lambda, linear, randomised_batch_norm
from support.truth import check_bound, jacobian_norm, norm, operator_norms
from torch import nn
from torch.nn import functional as F

from lightning_lip.certificates.interval import Uncertified, certify
from lightning_lip.errors import UnsupportedLayerError
from lightning_lip.graph.bound import NetworkBound
from lightning_lip.operators.composed import DiagonalOperator, ScaledOperator
from lightning_lip.rigorous.operators import certified_norm


def test_matrix_products_along_the_tokens():
    w = linear(3, 5)
    check_bound(Lambda(lambda m, x: m.w.weight @ x, w=w), 5, 2, expected=norm(w), attained=True)
    check_bound(Lambda(lambda m, x: m.w(x.transpose(1, 2)).transpose(1, 2), w=w), 5, 2, expected=norm(w), attained=True)


def test_learned_scales_are_operators():
    model = Lambda(lambda m, x: m.a(x) * m.gamma.view(1, -1) / m.delta)
    model.a = linear(3, 4)
    model.gamma = nn.Parameter(torch.tensor([1.0, -5.0, 2.0]).double())
    model.delta = nn.Parameter(torch.tensor([0.5, 1.0, 1.0]).double())
    bound = NetworkBound.trace(model, torch.randn(2, 4).double())
    a, gamma, delta = bound.operators
    assert [a.name, delta.name] == ["a", "delta"]
    assert isinstance(gamma, DiagonalOperator)
    check_bound(model, 4, expected=norm(model.a) * 5 * 2)
    (slope,) = torch.autograd.grad(gamma.norm(*gamma.leading_vectors()), model.gamma)
    assert slope.tolist() == [0, -1, 0]
    u = torch.tensor([0.0, 1.0, 0.0]).double()
    assert gamma.norm(u, u).item() == -5
    assert 5 <= certified_norm(gamma) <= 5 * (1 + 1e-13)
    assert gamma.direct_parameter is None
    assert torch.equal(gamma.adjoint(u[None]), gamma.apply(u[None]))
    assert gamma.codomain_shape == (3,)
    model.gamma.data.fill_(math.nan)
    with pytest.raises(ValueError, match="finite entries"):
        certified_norm(gamma)


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_alone(affine):
    bn = randomised_batch_norm(nn.BatchNorm2d(3, affine=affine).double())
    check_bound(nn.Sequential(nn.ReLU(), bn, nn.Tanh()), 3, 2, 2, attained=False)
    bound = NetworkBound.trace(nn.Sequential(bn), torch.randn(2, 3, 2, 2).double())
    (op,) = bound.operators
    assert op.name == "0"
    instance = nn.InstanceNorm2d(3, affine=affine, track_running_stats=True).double()
    instance.load_state_dict(bn.state_dict())
    (same,) = NetworkBound.trace(nn.Sequential(instance), torch.randn(2, 3, 2, 2).double()).operators
    assert operator_norms([same]).item() == operator_norms([op]).item()
    value = jacobian_norm(bn.eval(), torch.randn(1, 3, 2, 2).double())
    assert operator_norms([op]).item() == pytest.approx(value, rel=1e-12)
    bn.running_var.mul_(4)
    assert operator_norms([op]).item() == pytest.approx(value / 2, rel=1e-3)


@pytest.mark.parametrize(
    ("layer", "bn", "shape"),
    [
        (nn.Linear(4, 3), nn.BatchNorm1d(3), (4,)),
        (nn.Conv2d(2, 4, 3, 2, 1, groups=2), nn.BatchNorm2d(4), (2, 5, 5)),
        (nn.ConvTranspose1d(4, 6, 3, 2, groups=2), nn.BatchNorm1d(6), (4, 5)),
        (nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"), nn.BatchNorm1d(3), (2, 6)),
    ],
    ids=["linear", "conv", "transposed", "circular"],
)
@pytest.mark.parametrize("inplace", [False, True])
def test_batch_norm_is_fused_with_the_layer_before_it(layer, bn, shape, inplace):
    randomised_batch_norm(bn)
    model = nn.Sequential(layer, bn, nn.ReLU(inplace=inplace)).double().eval()
    x = torch.randn(2, *shape).double()
    bound = NetworkBound.trace(model, x)
    (op,) = bound.operators
    assert isinstance(op, ScaledOperator)
    assert op.name == "0+1"
    truth = jacobian_norm(nn.Sequential(layer, bn), x[:1])
    assert operator_norms(bound.operators).item() == pytest.approx(truth, rel=1e-9)
    # fp64 weights: the certificate is the product of both norms.
    assert certified_norm(op) >= truth
    u, v = torch.randn(2, *op.codomain_shape).double(), torch.randn(2, *op.domain_shape).double()
    assert (op.adjoint(u) * v).sum().item() == pytest.approx((u * op.apply(v)).sum().item())
    assert op.norm(u[0].flatten(), v[0].flatten()).item() == pytest.approx((u[0] * op.apply(v)[0]).sum().item())
    assert len(op.parameters) == 2
    through_norm = torch.autograd.grad(op.norm(u[0].flatten(), v[0].flatten()), op.parameters)
    through_map = torch.autograd.grad((u[0] * op.apply(v[:1])[0]).sum(), op.parameters)
    for a, b in zip(through_norm, through_map, strict=True):
        assert b.abs().sum() > 0
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    op.base.module.float()
    assert truth <= certified_norm(op) <= 1.35 * truth
    assert op.weight().shape == layer.weight.shape


@pytest.mark.parametrize(
    "product",
    [
        lambda m, x: x @ m.w,
        lambda m, x: torch.mm(x, m.w),
        lambda m, x: torch.matmul(x, m.w),
        lambda m, x: torch.addmm(m.bn.bias, x, m.w),
        lambda m, x: F.linear(x, m.w.t()),
    ],
    ids=["at", "mm", "matmul", "addmm", "linear"],
)
@pytest.mark.parametrize(
    "w", [torch.diag(torch.tensor([100.0, 1.0, 0.01])).roll(1, 0), torch.arange(15.0).cos().view(5, 3)]
)
def test_batch_norm_scales_the_columns_of_a_matrix_on_the_right(product, w):
    bn = nn.BatchNorm1d(3).double()
    bn.weight.data = torch.tensor([100.0, 1.0, 0.01]).double()
    model = Lambda(lambda m, x: m.bn(product(m, x)), bn=bn)
    model.w = nn.Parameter(w.double())
    value, truth = check_bound(model, len(w))
    x = torch.randn(2, len(w)).double()
    assert truth <= certify(model, x).upper
    assert certify(model.float(), x.float()).upper == pytest.approx(value, rel=1e-5)


def test_one_matrix_normalised_as_it_is_and_transposed():
    bn = randomised_batch_norm(nn.BatchNorm1d(3)).double()
    model = Lambda(lambda m, x: m.bn(F.linear(m.bn(x @ m.w), m.w)), bn=bn)
    model.w = nn.Parameter(torch.randn(3, 3).double())
    check_bound(model, 3)


def two_norms(**second):
    """Two batch normalisations with one gamma; what else the second one shall have, as its attributes."""
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Identity(), nn.BatchNorm1d(3)).double().eval()
    for bn in model[::2]:
        randomised_batch_norm(bn)
    model[2].weight = model[0].weight
    for key, value in second.items():
        setattr(model[2], key, value)
    return model


def squared_gamma(model):
    """A product with gamma, then a normalisation with the same gamma."""
    bn = model[0]
    return Lambda(lambda m, x: F.batch_norm(x * bn.weight, bn.running_mean, bn.running_var, bn.weight), bn=bn)


def two_scales_of_one_weight(model):
    """One matrix twice, normalised with two gammas that one module holds."""
    a, bn = linear(3, 3), model[0]

    def function(m, x):
        for gamma in (m.first, m.second):
            x = F.batch_norm(m.a(x), m.bn.running_mean, m.bn.running_var, gamma)
        return x

    both = Lambda(function, a=a, bn=bn)
    both.first = nn.Parameter(torch.tensor([0.01, 0.02, 0.03]).double())
    both.second = nn.Parameter(torch.tensor([30.0, 20.0, 10.0]).double())
    return both


@pytest.mark.parametrize(
    "model",
    [
        two_norms(running_var=torch.full((3,), 1e-4).double()),
        two_norms(eps=100.0),
        two_norms(running_var=two_norms()[0].running_var, eps=100.0),
        squared_gamma(two_norms()),
        two_scales_of_one_weight(two_norms()),
    ],
    ids=["variance", "both", "eps", "product", "one weight"],
)
def test_other_scales_are_other_operators(model):
    x = torch.randn(2, 3).double()
    bound = NetworkBound.trace(model, x)
    assert [op.multiplicity for op in bound.operators] == [1, 1]
    assert len({op.name for op in bound.operators}) == 2
    check_bound(model, 3)
    # One module used twice is one operator.
    twice = NetworkBound.trace(nn.Sequential(model, nn.ReLU(), model), x)
    assert [op.multiplicity for op in twice.operators] == [2, 2]


def test_operators_of_one_module_have_names_of_their_own():
    bn = randomised_batch_norm(nn.BatchNorm1d(3)).double()

    def function(m, x):
        for eps in (1e-5, 1e-3, 1e-1, 1.0):
            x = F.batch_norm(x, m.bn.running_mean, m.bn.running_var, m.bn.weight, eps=eps)
        return x

    bound = NetworkBound.trace(Lambda(function, bn=bn), torch.randn(2, 3).double())
    assert [op.name for op in bound.operators] == ["bn", "bn@3", "bn@3#2", "bn@3#3"]
    check_bound(Lambda(function, bn=bn), 3)


def test_one_layer_normalised_twice_in_one_way_is_one_operator():
    a, bn = linear(3, 3), randomised_batch_norm(nn.BatchNorm1d(3)).double()
    model = nn.Sequential(a, bn, nn.Tanh(), a, bn)
    (op,) = NetworkBound.trace(model, torch.randn(2, 3).double()).operators
    assert (op.name, op.multiplicity) == ("0+1", 2)
    check_bound(model, 3)


def test_batch_norm_after_a_shared_output_stays_apart():
    a, bn = linear(3, 4), randomised_batch_norm(nn.BatchNorm1d(3).double())

    def function(m, x):
        y = m.a(x)
        return m.bn(y) + y

    bound = NetworkBound.trace(Lambda(function, a=a, bn=bn), torch.randn(2, 4).double())
    assert [op.name for op in bound.operators] == ["a", "bn"]
    check_bound(Lambda(function, a=a, bn=bn), 4)


def test_a_scaled_operator_with_a_bad_scale_is_no_certificate():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    (op,) = NetworkBound.trace(model, torch.randn(2, 2)).operators
    model[1].weight.data[0] = math.nan
    with pytest.raises(ValueError, match="finite scale"):
        certified_norm(op)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(2, 3, 3, padding=1), (2, 4, 4)),
        (nn.Conv2d(2, 3, (3, 2), stride=2, dilation=(1, 2), padding="valid"), (2, 7, 6)),
        (nn.Conv1d(2, 3, 4, padding="same"), (2, 7)),
        (nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), (2, 4, 4)),
        (nn.Conv1d(2, 2, 3, padding="same", padding_mode="replicate"), (2, 6)),
        (nn.ConvTranspose2d(2, 3, 3, 2, 1, output_padding=1), (2, 3, 3)),
        (nn.Conv3d(1, 2, 2), (1, 3, 3, 3)),
    ],
)
def test_convolutions_at_the_traced_size(layer, shape):
    check_bound(layer, *shape, attained=True, n=1)


class SameConv(nn.Conv2d):
    """A convolution that pads by itself, as ports from other frameworks do."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


def test_functional_convolutions():
    check_bound(nn.Sequential(SameConv(2, 3, 3, 2)), 2, 5, 5, n=1, attained=True)
    kernel = Lambda(lambda m, x: F.conv1d(x, m.kernel, padding=1, groups=2))
    kernel.kernel = nn.Parameter(torch.randn(4, 1, 3))
    check_bound(kernel, 2, 5, n=1, attained=True)
    transposed = Lambda(lambda m, x: F.conv_transpose1d(x, m.kernel, stride=2, output_padding=1))
    transposed.kernel = nn.Parameter(torch.randn(2, 3, 3))
    check_bound(transposed, 2, 5, n=1, attained=True)
    unpadded = Lambda(lambda m, x: F.conv1d(x, m.c.weight), c=nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"))
    check_bound(unpadded, 2, 5, n=1, attained=True)
    sized = Lambda(lambda m, x: m.c(x, output_size=[7]), c=nn.ConvTranspose1d(2, 2, 3, 2))
    check_bound(sized, 2, 3, n=1, attained=True)
    with pytest.raises(UnsupportedLayerError, match="channels or places"):
        NetworkBound.trace(Lambda(lambda m, x: m.c(x), c=nn.Conv1d(2, 2, 1)), torch.randn(2, 5))


class StandardisedConv(nn.Conv2d):
    """A convolution with standardised weights, as timm writes it."""

    def forward(self, x):
        flat = self.weight.reshape(1, self.out_channels, -1)
        kernel = F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=1e-6).reshape_as(self.weight)
        return F.conv2d(x, kernel, self.bias, self.stride, self.padding, self.dilation, self.groups)


def standardised(m, x):
    mean, var = m.c.weight.mean((1, 2, 3), keepdim=True), m.c.weight.var((1, 2, 3), keepdim=True, unbiased=False)
    return F.conv2d(x, (m.c.weight - mean) / torch.sqrt(var + 1e-5), m.c.bias, stride=2)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(StandardisedConv(2, 4, 3, 2, 1, groups=2)), (2, 5, 5)),
        (nn.Sequential(StandardisedConv(2, 3, 1), randomised_batch_norm(nn.BatchNorm2d(3))), (2, 4, 4)),
        (Lambda(standardised, c=nn.Conv2d(2, 3, 3)), (2, 5, 4)),
        (Lambda(lambda m, x: F.conv1d(x, m.c.weight * 2, padding="same"), c=nn.Conv1d(2, 2, 3)), (2, 5)),
        (Lambda(lambda m, x: F.conv_transpose1d(x, m.c.weight.exp(), stride=3), c=nn.Conv1d(2, 2, 2)), (2, 4)),
    ],
    ids=["timm", "fused", "by hand", "scaled", "transposed"],
)
def test_computed_kernels(model, shape):
    check_bound(model, *shape, n=1, attained=True)
    (op,) = NetworkBound.trace(model, torch.randn(2, *shape).double()).operators
    x, y = torch.randn(op.domain_shape).double(), torch.randn(op.codomain_shape).double()
    found = torch.autograd.grad(op.norm(y.flatten(), x.flatten()), op.parameters)
    expected = torch.autograd.grad((y * op.apply(x[None])[0]).sum(), op.parameters)
    assert found[0].abs().sum() > 0
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    single = copy.deepcopy(model).float()
    truth = flat_norm(model, *shape)
    assert truth * (1 - 1e-6) <= certify(single, torch.randn(2, *shape)).upper <= 1.6 * truth


def test_constant_kernels():
    def blur(m, x):
        kernel = (m.taps[:, None] * m.taps[None, :])[None, None].expand(3, 1, 3, 3)
        return F.conv2d(F.pad(x, [1, 1, 1, 1], mode="reflect"), kernel, stride=2, groups=3)

    pooled = Lambda(blur, taps=torch.tensor([0.25, 0.5, 0.25]))
    check_bound(pooled, 3, 6, 6)
    (op,) = NetworkBound.trace(pooled, torch.randn(2, 3, 6, 6).double()).operators
    assert op.parameters == ()
    stored = Lambda(lambda m, x: F.conv1d(x, m.kernel, dilation=2), kernel=torch.randn(2, 1, 3))
    check_bound(stored, 1, 7, n=1, attained=True)
    (op,) = NetworkBound.trace(stored, torch.randn(2, 1, 7).double()).operators
    assert op.name == "kernel"
    stored.kernel.mul_(3)
    assert operator_norms([op]).item() == pytest.approx(flat_norm(stored, 1, 7))
    twice = Lambda(lambda m, x: F.conv1d(F.conv1d(x, m.kernel), m.kernel.abs()), kernel=torch.randn(2, 2, 1))
    check_bound(twice, 2, 4, n=1)
    assert len(NetworkBound.trace(twice, torch.randn(2, 2, 4).double()).operators) == 2
    whole = Lambda(lambda m, x: F.conv1d(x, m.kernel), kernel=torch.full((1, 1, 2), math.inf))
    assert isinstance(certify(whole, torch.randn(2, 1, 4)), Uncertified)


def flat_norm(model, *shape):
    """The norm of an affine model's Jacobian."""
    return jacobian_norm(model.double().eval(), torch.zeros(1, *shape).double())


def test_a_padding_that_is_not_the_modules_own():
    conv = nn.Conv1d(1, 1, 3, padding=1, padding_mode="circular").double()
    conv.weight.data.fill_(1.0)
    pads = {
        "amounts": lambda m, x: F.conv1d(F.pad(x, (5, 5), mode="circular"), m.c.weight),
        "one side": lambda m, x: F.conv1d(F.pad(x, (2, 0), mode="circular"), m.c.weight),
        "mode": lambda m, x: F.conv1d(F.pad(x, (1, 1), mode="replicate"), m.c.weight),
        "both": lambda m, x: F.conv1d(F.pad(x, (5, 5), mode="replicate"), m.c.weight),
        "value": lambda m, x: F.conv1d(F.pad(x, (1, 1), value=2.0), m.c.weight),
        "twice": lambda m, x: F.conv1d(F.pad(F.pad(x, (1, 1), mode="circular"), (1, 1)), m.c.weight),
    }
    for name, function in pads.items():
        model = Lambda(function, c=conv)
        upper = certify(model, torch.randn(2, 1, 6).double()).upper
        assert flat_norm(model, 1, 6) <= upper, name
    assert flat_norm(Lambda(pads["both"], c=conv), 1, 6) > 6.4
    # The module's own, wherever it is written, and before a part of the kernel's last dimension only.
    own = Lambda(lambda m, x: F.conv1d(F.pad(x, (1, 1), mode="circular"), m.c.weight), c=conv)
    check_bound(own, 1, 6, n=1, expected=3.0, attained=True)
    sided = nn.Conv2d(2, 2, (3, 2), padding=(2, 1), padding_mode="reflect")
    check_bound(sided, 2, 4, 3, n=1, attained=True)
    swapped = Lambda(lambda m, x: F.conv2d(F.pad(x, (2, 2, 1, 1), mode="reflect"), m.c.weight), c=sided)
    check_bound(swapped, 2, 4, 3, n=1)


@pytest.mark.parametrize("modes", [("circular", "reflect"), ("zeros", "circular"), ("replicate", "zeros")])
def test_convolutions_that_share_a_kernel_pad_each_in_its_own_way(modes):
    first, second = (nn.Conv1d(1, 1, 3, padding=1, padding_mode=mode).double() for mode in modes)
    second.weight = first.weight
    first.weight.data = torch.tensor([[[1.0, 1.0, 1.2]]]).double()
    model = Lambda(lambda m, x: m.b(x) + 0 * m.a(x), a=first, b=second)
    bound = NetworkBound.trace(model, torch.randn(2, 1, 6).double())
    assert [op.name for op in bound.operators] == ["b", "a"]
    truths = [flat_norm(conv, 1, 6) for conv in (second, first)]
    assert operator_norms(bound.operators).tolist() == pytest.approx(truths)
    assert all(truth <= certified_norm(op) for op, truth in zip(bound.operators, truths, strict=True))
    check_bound(model, 1, 6, n=1, attained=True)
    # The same padding is the same operator.
    first.padding_mode = "zeros"
    (op,) = NetworkBound.trace(nn.Sequential(first, first), torch.randn(2, 1, 6).double()).operators
    assert op.multiplicity == 2


@pytest.mark.parametrize("make", [lambda: linear(4, 4), lambda: nn.Conv1d(1, 1, 3, padding=1).double()])
def test_a_hook_of_a_parametrised_layer_may_use_weights_of_its_own(make):
    """What is computed in a parametrised layer's forward is not thereby its weight."""
    layer, other = nn.utils.parametrizations.weight_norm(make()), make()
    function, shape = (F.linear, (4,)) if isinstance(layer, nn.Linear) else (F.conv1d, (1, 6))
    padding = {} if isinstance(layer, nn.Linear) else {"padding": 1}
    originals = layer.parametrizations.weight

    def own_part():
        return originals[0](originals.original0 * 50, originals.original1)

    for weight in (lambda: 100 * other.weight, lambda: 100 * layer.weight, own_part):
        hook = layer.register_forward_hook(lambda m, i, o, weight=weight: function(o, weight(), **padding))
        model = Lambda(lambda m, x: m.layer(x), layer=layer, other=other)
        x = torch.randn(2, *shape).double()
        assert len(NetworkBound.trace(model, x).operators) == 2
        assert flat_norm(model, *shape) <= certify(model, x).upper
        hook.remove()
    hook = layer.register_forward_hook(lambda m, i, o: function(o, m.weight, **padding))
    (op,) = NetworkBound.trace(nn.Sequential(layer, nn.Tanh(), layer), torch.randn(2, *shape).double()).operators
    assert op.multiplicity == 4
    hook.remove()


def test_weights_of_every_origin():
    model = Lambda(lambda m, x: F.linear(F.linear(F.linear(m.p(x), m.own), m.buffer), m.own * 2))
    model.p = nn.utils.parametrizations.weight_norm(linear(4, 4))
    model.own = nn.Parameter(torch.randn(4, 4).double())
    model.register_buffer("buffer", torch.randn(4, 4).double())
    bound = NetworkBound.trace(model, torch.randn(2, 4).double())
    names = [op.name for op in bound.operators]
    assert names[:3] == ["p", "own", "buffer"]
    assert [op.direct_parameter is model.own for op in bound.operators] == [False, True, False, False]
    assert [bool(op.parameters) for op in bound.operators] == [True, True, False, True]
    own = torch.linalg.matrix_norm(model.own, 2).item()
    buffer = torch.linalg.matrix_norm(model.buffer, 2).item()
    p = torch.linalg.matrix_norm(model.p.weight, 2).item()
    check_bound(model, 4, expected=p * own * buffer * 2 * own)
    (slope,) = torch.autograd.grad(bound.operators[3].norm(*torch.eye(4).double()[:2]), model.own)
    assert slope[0, 1] == 2
    del model.own
    with pytest.raises(RuntimeError, match="trace the model again"):
        bound.operators[1].weight()


def test_parametrized_convolution():
    conv = nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 3, 3, padding=1))
    check_bound(nn.Sequential(conv), 2, 5, n=1, attained=True)


def test_tied_weights_and_repeated_modules_are_counted():
    a, b = linear(4, 4), linear(4, 4)
    b.weight = a.weight
    model = nn.Sequential(a, nn.Tanh(), b, a)
    bound = NetworkBound.trace(model, torch.randn(2, 4).double())
    (op,) = bound.operators
    assert (op.name, op.multiplicity, op.direct_parameter is a.weight) == ("0", 3, True)
    log_sigma = torch.tensor([0.5], requires_grad=True)
    bound.log_bound(log_sigma).backward()
    assert log_sigma.grad.item() == 3
    assert bound.log_bound(log_sigma).item() == pytest.approx(1.5)


def test_one_kernel_at_two_sizes_is_two_operators():
    conv = nn.Conv1d(1, 1, 3)
    model = Lambda(lambda m, x: m.c(m.c(x)), c=conv)
    bound = NetworkBound.trace(model, torch.randn(2, 1, 9))
    assert [op.name for op in bound.operators] == ["c", "c@1x7"]
    check_bound(model, 1, 9)


class Adapter(nn.Module):
    """A low-rank update of a weight while it is switched on, as LoRA's."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Parameter(torch.randn(1, 4)), nn.Parameter(torch.randn(4, 1))
        self.on = False

    def forward(self, weight):
        return weight + 5 * (self.up @ self.down).view_as(weight) if self.on else 2 * weight


def switched_on(m, x):
    m.layer.parametrizations.weight[0].on = True
    y = m.layer(x)
    m.layer.parametrizations.weight[0].on = False
    return y


def with_other_parameters(m, x):
    own = m.layer.parametrizations.weight
    return torch.func.functional_call(m.layer, {"parametrizations.weight.original0": 5 * own.original0}, (x,))


@pytest.mark.parametrize("make", [lambda: linear(4, 4), lambda: nn.Conv1d(4, 4, 1).double()], ids=["linear", "conv"])
@pytest.mark.parametrize("kind", ["switched on", "other parameters"])
def test_a_parametrised_weight_is_bounded_as_the_graph_computes_it(make, kind):
    torch.manual_seed(0)
    layer = make()
    shape = (4,) if isinstance(layer, nn.Linear) else (4, 1)
    if kind == "switched on":
        nn.utils.parametrize.register_parametrization(layer, "weight", Adapter())
    else:
        nn.utils.parametrizations.weight_norm(layer)
    at_rest = torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item()
    model = Lambda(switched_on if kind == "switched on" else with_other_parameters, layer=layer)
    true = flat_norm(model, *shape)
    assert true > 2 * at_rest
    assert certify(model, torch.randn(2, *shape).double()).upper == pytest.approx(true, rel=1e-6)
    (op,) = NetworkBound.trace(model, torch.randn(2, *shape).double()).operators
    assert op.name == "layer"
    u, v = torch.linalg.svd(op.weight().detach().flatten(1))[::2]
    gradients = op.norm_gradients(u[:, 0], v[0], op.parameters)
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)


def test_a_parametrised_layer_called_twice_is_one_operator_and_called_in_two_states_is_two():
    layer = nn.utils.parametrize.register_parametrization(linear(4, 4), "weight", Adapter())
    twice = Lambda(lambda m, x: m.layer(torch.tanh(m.layer(x))), layer=layer)
    (op,) = NetworkBound.trace(twice, torch.randn(2, 4).double()).operators
    assert (op.name, op.multiplicity) == ("layer", 2)
    both = Lambda(lambda m, x: switched_on(m, torch.tanh(m.layer(x))), layer=layer)
    operators = NetworkBound.trace(both, torch.randn(2, 4).double()).operators
    assert [(op.multiplicity, op.name.partition("@")[0]) for op in operators] == [(1, "layer"), (1, "layer")]
    functional = Lambda(lambda m, x: F.linear(F.linear(x, m.w.exp()), m.w.exp()), w=nn.Parameter(torch.randn(3, 3)))
    (op,) = NetworkBound.trace(functional, torch.randn(2, 3)).operators
    assert op.multiplicity == 2


def test_a_lost_parametrization_is_told():
    layer = nn.utils.parametrizations.weight_norm(linear(4, 4))
    (op,) = NetworkBound.trace(nn.Sequential(layer), torch.randn(2, 4).double()).operators
    nn.utils.parametrize.remove_parametrizations(layer, "weight")
    with pytest.raises(RuntimeError, match="lost its parametrization"):
        op.weight()


def test_a_weight_of_many_products_is_computed_once_each():
    class Bjorck(nn.Module):
        def forward(self, weight):
            for _ in range(15):
                weight = 1.5 * weight - 0.5 * weight @ weight.mT @ weight
            return weight

    layer = linear(4, 4)
    layer.weight.data /= 2
    nn.utils.parametrize.register_parametrization(layer, "weight", Bjorck())
    (op,) = NetworkBound.trace(nn.Sequential(layer), torch.randn(2, 4).double()).operators
    torch.testing.assert_close(op.weight(), layer.weight)  # each of 4^15 paths takes an hour


@pytest.mark.parametrize("padding", [1, 2, (0,)])
def test_a_circular_convolution_with_a_padding_of_its_own_beside(padding):
    torch.manual_seed(3)
    conv = nn.Conv1d(1, 2, 3, padding=1, padding_mode="circular").double()
    conv.weight.data.abs_()

    def function(m, x):
        return F.conv1d(F.pad(x, (1, 1), mode="circular"), m.conv.weight, m.conv.bias, padding=padding)

    model = Lambda(function, conv=conv)
    true = flat_norm(model, 1, 4)
    upper = certify(model, torch.randn(2, 1, 4).double()).upper
    assert true <= upper <= 1.6 * true
