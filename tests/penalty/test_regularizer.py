"""The penalty in plain PyTorch against autograd through ``torch.linalg.matrix_norm(W, 2)``."""

import copy
import math
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from support.networks import Lambda, mlp
from support.truth import PENALTIES
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from lightning_lip import LipschitzRegularizer
from lightning_lip.penalty.penalties import KNEE, LARGEST_KNEE

# Relative to the largest entry of the gradient. The float64 truth carries the rounding of its own SVD.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5}

COEFFICIENT = 0.3
TARGET = 0.5

NAMES = list(PENALTIES)


net = partial(mlp, 7, 12, 12, 3, dtype=torch.float64)

# With a block as wide as the layers one step is exact.
exact = partial(LipschitzRegularizer, coefficient=COEFFICIENT, target=TARGET, block_size=99)


def spectral_norm(weight):
    return torch.linalg.matrix_norm(weight, 2)


def matrices(model):
    return [m.weight for m in model.modules() if isinstance(m, nn.Linear)]


def autograd_penalty(weights, penalty="product"):
    return COEFFICIENT * PENALTIES[penalty](torch.stack([spectral_norm(w.double()) for w in weights]), TARGET)


def gradients(model):
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def gradients_by(model, differentiate):
    model.zero_grad()
    differentiate()
    found = gradients(model)
    model.zero_grad()
    return found


def check_gradients(got, expected, tolerance):
    assert [g is None for g in got] == [g is None for g in expected]
    for g, e in zip(got, expected, strict=True):
        if g is not None:
            scale = e.abs().max().item()
            torch.testing.assert_close(g, e.to(g.dtype), rtol=0, atol=tolerance * scale)


def check_both_ways(model, regularizer, penalty="product", weights=None, tolerance=TOLERANCE[torch.float64]):
    """Compare the gradients of `add_grad_` and of `value` with those of a penalty through the SVD of the weights."""
    weights = weights or matrices(model)
    expected = gradients_by(model, lambda: autograd_penalty(weights, penalty).backward())
    again = partial(regularizer.add_grad_, advance=False)
    for way in (regularizer.add_grad_, lambda: regularizer.value().backward(), again):
        check_gradients(gradients_by(model, way), expected, tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("penalty", NAMES)
def test_gradients_are_those_of_autograd_through_the_svd(penalty, dtype):
    model = net(dtype=dtype)
    truth = autograd_penalty(matrices(model), penalty).item()
    regularizer = exact(model, penalty=penalty)
    assert truth != 0
    check_both_ways(model, regularizer, penalty, tolerance=TOLERANCE[dtype])
    for value in (regularizer.add_grad_(), regularizer.value()):
        assert value.shape == ()
        assert value.dtype == dtype
        assert value.item() == pytest.approx(truth, rel=TOLERANCE[dtype])


@pytest.mark.parametrize("penalty", NAMES)
def test_a_default_block_reaches_the_same_after_some_steps(penalty):
    model = net()
    expected = gradients_by(model, lambda: autograd_penalty(matrices(model), penalty).backward())
    regularizer = LipschitzRegularizer(model, COEFFICIENT, penalty, target=TARGET, n_iterations=50)
    check_gradients(gradients_by(model, regularizer.add_grad_), expected, 1e-9)


@pytest.mark.parametrize("penalty", NAMES)
@pytest.mark.parametrize("block_size", [1, 3])
def test_both_ways_agree_long_before_convergence(penalty, block_size):
    model = net()
    a, b = (LipschitzRegularizer(model, COEFFICIENT, penalty, block_size=block_size) for _ in range(2))
    for _ in range(3):
        by_value = gradients_by(model, lambda: a.value().backward())
        check_gradients(gradients_by(model, b.add_grad_), by_value, 1e-12)
        change(model)


def test_training_with_either_way_is_training_with_the_svd_in_the_loss():
    def train(term=lambda model, regularizer: 0.0, add=lambda regularizer: None):
        model = net(seed=3)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        regularizer = exact(model)
        x, y = torch.randn(32, 7).double(), torch.randn(32, 3).double()
        for _ in range(30):
            optimizer.zero_grad()
            (nn.functional.mse_loss(model(x), y) + term(model, regularizer)).backward()
            add(regularizer)
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    truth = train(lambda model, regularizer: autograd_penalty(matrices(model)))
    by_value = train(lambda model, regularizer: regularizer.value())
    torch.testing.assert_close(by_value, truth, rtol=0, atol=1e-9)
    torch.testing.assert_close(train(add=LipschitzRegularizer.add_grad_), truth, rtol=0, atol=1e-9)
    assert (train() - truth).abs().max() > 1e-2


def test_gradients_are_added_to_those_that_are_there():
    model = net()
    expected = gradients_by(model, exact(model).add_grad_)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    pointers = [p.grad.data_ptr() for p in model.parameters()]
    exact(model).add_grad_()
    assert [p.grad.data_ptr() for p in model.parameters()] == pointers
    for p, e in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, 1 + (0 if e is None else e) + torch.zeros_like(p))


@pytest.mark.parametrize("scale", [0.0, 0.25, 1024, torch.tensor(3.0)], ids=str)
def test_scale(scale):
    model = net()
    regularizer = exact(model)
    expected = [None if g is None else g * scale for g in gradients_by(model, regularizer.add_grad_)]
    found = []
    got = gradients_by(model, lambda: found.append(regularizer.add_grad_(scale)))
    torch.testing.assert_close([g for g in got if g is not None], [e for e in expected if e is not None])
    assert found[0].item() == pytest.approx(float(scale) * regularizer.value().item())
    assert found[0].shape == ()
    assert not found[0].requires_grad


def test_a_coefficient_of_zero_changes_nothing():
    model = net()
    regularizer = LipschitzRegularizer(model, 0)
    assert regularizer.value().item() == 0
    assert all(not g.any() for g in gradients_by(model, regularizer.add_grad_) if g is not None)


def test_only_the_given_parameters_are_touched():
    model = net()
    found = gradients_by(model, lambda: exact(model).add_grad_(parameters=[model[2].weight]))
    expected = gradients_by(model, exact(model).add_grad_)
    assert [g is None for g in found] == [True, True, False, True, True, True]
    torch.testing.assert_close(found[2], expected[2])


def test_frozen_layers_count_but_are_not_touched():
    model = net()
    model[2].requires_grad_(False)
    assert gradients_by(model, exact(model).add_grad_)[2] is None
    check_both_ways(model, exact(model))
    assert exact(model).bound().item() == pytest.approx(autograd_penalty(matrices(model)).item() / COEFFICIENT)


def test_requires_grad_may_change_during_training():
    model = net()
    regularizer = exact(model)
    for frozen in (0, 2, 4):
        for index in (0, 2, 4):
            model[index].requires_grad_(index != frozen)
        check_both_ways(model, regularizer)


def test_a_wholly_frozen_model_has_a_value_and_no_gradient():
    model = net().requires_grad_(False)
    regularizer = exact(model)
    assert not regularizer.value().requires_grad
    regularizer.add_grad_()
    assert gradients(model) == [None] * 6


@pytest.mark.parametrize("penalty", NAMES)
def test_a_zero_layer_has_no_gradient_and_spoils_no_other(penalty):
    model = net()
    nn.init.zeros_(model[2].weight)
    for way in (exact(model, penalty=penalty).add_grad_, lambda: exact(model, penalty=penalty).value().backward()):
        found = gradients_by(model, way)
        assert all(g.isfinite().all() for g in found if g is not None)
        assert not found[2].any()
        others = [model[0].weight, model[4].weight]
        if penalty in ("product", "softplus_log", "hinge_log"):
            assert not any(found[i].any() for i in (0, 4))
        else:
            model.zero_grad()
            autograd_penalty(others, penalty).backward()
            check_gradients([found[0], found[4]], [w.grad for w in others], TOLERANCE[torch.float64])
    assert exact(model).bound().item() == 0
    assert exact(model).log_bound().item() == -math.inf
    assert exact(model).sigma()[1].item() == 0


@pytest.mark.parametrize("penalty", NAMES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("wide", [False, True])
def test_bad_weights_show_in_the_value_and_not_in_gradients(wide, bad, penalty):
    model = net()
    layer = model[4] if wide else model[0]  # the vector on the longer side is NaN then: left or right
    layer.weight.data[0, 0] = bad
    regularizer = exact(model, penalty=penalty)
    assert regularizer.value().isnan()
    assert regularizer.bound().isnan()
    value = []
    found = gradients_by(model, lambda: value.append(regularizer.add_grad_()))
    assert value[0].isnan()
    assert not found[4 if wide else 0].any()
    # The other layers get nothing from a coupled penalty, and their own share of an uncoupled one.
    others = found[0 if wide else 4], found[2]
    assert all(g.isfinite().all() for g in others)
    assert any(g.any() for g in others) == (penalty in ("log", "layer_sum", "layer_sum_squares"))


def test_bad_parametrised_weights_do_not_spoil_gradients():
    model = net()
    parametrizations.weight_norm(model[2])
    nn.init.constant_(model[2].parametrizations.weight.original0, math.nan)
    found = gradients_by(model, exact(model).add_grad_)
    assert not any(g.any() for g in found if g is not None)


def test_a_scale_that_overflows_adds_nothing():
    model = net(dtype=torch.float32)
    found = gradients_by(model, lambda: exact(model).add_grad_(math.inf))
    assert not any(g.any() for g in found if g is not None)


@pytest.mark.parametrize("penalty", NAMES)
def test_a_deep_net_with_large_norms_overflows_nowhere(penalty):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(120)))
    for layer in model:
        layer.weight.data.mul_(3 / torch.linalg.matrix_norm(layer.weight.data, 2))
    for way in (exact(model, penalty=penalty).add_grad_, lambda: exact(model, penalty=penalty).value().backward()):
        found = [g for g in gradients_by(model, way) if g is not None]
        assert all(g.isfinite().all() and g.any() for g in found)
    regularizer = exact(model)
    assert regularizer.log_bound().item() == pytest.approx(120 * math.log(3), rel=1e-6)
    assert regularizer.bound().item() == pytest.approx(3.0**120, rel=1e-4)  # 120 roundings of fp32
    for knee, where in ((KNEE, KNEE), (7.0, 7.0), (None, LARGEST_KNEE)):
        value = COEFFICIENT * where * (1 + 120 * math.log(3) - math.log(where))
        assert exact(model, knee=knee).value().item() == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("penalty", NAMES)
def test_a_tied_weight_counts_twice(penalty):
    model = nn.Sequential(*(nn.Linear(5, 5) for _ in range(3))).double()
    model[2].weight = model[0].weight
    weights = [layer.weight for layer in model]
    regularizer = exact(model, penalty=penalty)
    check_both_ways(model, regularizer, penalty, weights)
    assert list(regularizer.spectral_norms()) == ["0", "1"]
    product = torch.stack([spectral_norm(w) for w in weights]).prod().item()
    assert regularizer.bound().item() == pytest.approx(product)


@pytest.mark.parametrize("penalty", NAMES)
def test_a_module_used_three_times_counts_three_times(penalty):
    layer, head = nn.Linear(5, 5).double(), nn.Linear(5, 2).double()

    loop = Lambda(lambda m, x: m.head(m.layer(m.layer(m.layer(x)))), layer=layer, head=head)
    for regularizer in (
        exact(loop, penalty=penalty, example_input=torch.ones(1, 5).double()),
        exact(nn.Sequential(layer, layer, layer, head), penalty=penalty),
    ):
        check_both_ways(loop, regularizer, penalty, [layer.weight] * 3 + [head.weight])


@pytest.mark.parametrize("penalty", ["product", "layer_sum"])
@pytest.mark.parametrize(
    "parametrise",
    [parametrizations.weight_norm, parametrizations.orthogonal, parametrizations.spectral_norm],
    ids=lambda f: f.__name__,
)
def test_gradients_are_pulled_back_through_parametrisations(parametrise, penalty):
    model = net()
    model[2].weight.data.mul_(3)
    parametrise(model[2])
    model[0].eval()
    model.eval()
    expected = gradients_by(model, lambda: autograd_penalty(matrices(model), penalty).backward())
    model.train()
    model[0].eval()
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    regularizer = exact(model, penalty=penalty)
    for way in (regularizer.add_grad_, lambda: regularizer.value().backward()):
        found = gradients_by(model, way)
        for f, e in zip(found, expected, strict=True):
            assert (f is None) == (e is None)
            if f is not None:
                # The norm of an orthogonal matrix does not change with its original: absolute.
                torch.testing.assert_close(f, e, rtol=1e-9, atol=1e-12)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert list(regularizer.spectral_norms()) == ["0", "2", "4"]


def test_a_partly_frozen_parametrisation():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(5, 4).double()))
    magnitude, direction = model[0].parametrizations.weight.parameters()
    magnitude.requires_grad_(False)
    autograd_penalty(matrices(model)).backward()
    expected = direction.grad.clone()
    model.zero_grad()
    exact(model).add_grad_()
    exact(model).add_grad_()  # onto a gradient that is there
    torch.testing.assert_close(direction.grad, 2 * expected)
    assert magnitude.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_weights(dtype):
    model = net(dtype=dtype)
    wide = copy.deepcopy(model).double()
    truth = autograd_penalty(matrices(wide))
    truth.backward()
    regularizer = exact(model)
    for way in (regularizer.add_grad_, lambda: regularizer.value().backward()):
        found = gradients_by(model, way)
        assert all(g is None or g.dtype == dtype for g in found)
        check_gradients(found, [p.grad for p in wide.parameters()], torch.finfo(dtype).eps)
    assert regularizer.value().dtype == torch.float32
    # The value itself is that of the rounded weights, in fp32.
    assert regularizer.value().item() == pytest.approx(truth.item(), rel=1e-6)


def test_autocast_changes_nothing():
    model = net(dtype=torch.float32)
    expected = gradients_by(model, exact(model).add_grad_)
    value = exact(model).value()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        regularizer = exact(model)
        assert torch.equal(regularizer.value(), value)
        by_value = gradients_by(model, lambda: regularizer.value().backward())
        check_gradients(by_value, expected, TOLERANCE[torch.float32])
        check_gradients(gradients_by(model, exact(model).add_grad_), expected, 0)
        bound, upper = regularizer.bound(), regularizer.sigma_upper()
    assert torch.equal(regularizer.bound(), bound)
    assert torch.equal(regularizer.sigma_upper(), upper)


@pytest.mark.parametrize(("before", "after"), [(torch.float64, torch.float32), (torch.float32, torch.float64)], ids=str)
def test_the_model_may_be_cast_after_construction(before, after):
    model = net(dtype=before)
    regularizer = exact(model)
    regularizer.add_grad_()
    model.to(after)
    # Blocks that were fp32 are orthonormal to fp32's rounding until the next step.
    regularizer.iterate()
    check_both_ways(model, regularizer, tolerance=TOLERANCE[after])
    assert regularizer.value().dtype == after


def same_state(a, b):
    a, b = a["vectors"], b["vectors"]
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def advances(regularizer, act):
    before = copy.deepcopy(regularizer.state_dict())
    act()
    return not same_state(regularizer.state_dict(), before)


def started():
    model = net()
    regularizer = LipschitzRegularizer(model, 1.0, block_size=2)
    regularizer.sigma()
    return model, regularizer


def change(model):
    with torch.no_grad():
        model[0].weight.mul_(0.99)


def test_value_advances_once_for_each_state_of_the_weights():
    model, regularizer = started()
    assert advances(regularizer, regularizer.value)
    assert not advances(regularizer, regularizer.value)
    change(model)
    assert advances(regularizer, regularizer.value)
    assert not advances(regularizer, lambda: regularizer.value().backward())


def test_value_advances_for_a_replaced_weight_of_the_same_version():
    model, regularizer = started()
    model[0].weight = nn.Parameter(torch.randn(12, 7).double())
    regularizer.value()
    old = model[0].weight  # kept, so that its memory is not given to the new one
    model[0].weight = nn.Parameter(torch.randn(12, 7).double())
    assert model[0].weight._version == old._version
    assert advances(regularizer, regularizer.value)


def test_value_does_not_advance_where_nothing_is_trained():
    model, regularizer = started()
    with torch.no_grad():
        assert not advances(regularizer, regularizer.value)
    with torch.inference_mode():
        assert not advances(regularizer, regularizer.value)
    model.eval()
    assert not advances(regularizer, regularizer.value)
    assert regularizer.value().requires_grad
    model.train()
    assert advances(regularizer, regularizer.value)


def test_value_in_eval_mode_is_that_of_the_present_weights():
    model, regularizer = started()
    model.train()
    regularizer.value()
    change(model)
    model.eval()
    assert regularizer.value().item() == pytest.approx(regularizer.bound().item(), rel=1e-12)


def test_add_grad_advances_unless_it_is_told_not_to():
    _, regularizer = started()
    assert not advances(regularizer, lambda: regularizer.add_grad_(advance=False))
    assert advances(regularizer, regularizer.add_grad_)


def test_iterate_advances_and_touches_no_gradient():
    model, regularizer = started()
    assert advances(regularizer, regularizer.iterate)
    assert not advances(regularizer, regularizer.value)
    assert gradients(model) == [None] * 6


@pytest.mark.parametrize(
    "look", ["spectral_norms", "bound", "log_bound", "sigma", "log_sigma", "sigma_upper", "state_dict"]
)
def test_looking_does_not_advance(look):
    model, regularizer = started()
    with torch.no_grad():  # with gradients a bound is part of a loss
        assert not advances(regularizer, getattr(regularizer, look))
        change(model)
        assert not advances(regularizer, getattr(regularizer, look))
    assert model.training
    assert gradients(model) == [None] * 6


def test_looking_sees_the_present_weights():
    model = net()
    regularizer = exact(model)
    for _ in range(2):
        for (name, sigma), weight in zip(regularizer.spectral_norms().items(), matrices(model), strict=True):
            assert sigma.shape == ()
            assert not sigma.requires_grad
            assert sigma.item() == pytest.approx(spectral_norm(weight).item(), rel=1e-12), name
        product = math.prod(spectral_norm(w).item() for w in matrices(model))
        assert regularizer.bound().item() == pytest.approx(product, rel=1e-12)
        assert regularizer.log_bound().item() == pytest.approx(math.log(product), rel=1e-12)
        torch.testing.assert_close(regularizer.sigma_upper(), regularizer.sigma(), rtol=1e-7, atol=0)
        change(model)


def test_a_value_may_be_differentiated_after_the_weights_changed():
    model = net()
    regularizer = exact(model)
    expected = gradients_by(model, lambda: regularizer.value().backward())
    value = regularizer.value()
    change(model)
    regularizer.iterate()
    check_gradients(gradients_by(model, value.backward), expected, 1e-14)


def test_weights_may_be_replaced():
    model = net()
    regularizer = exact(model)
    regularizer.value()
    model[0].weight = nn.Parameter(torch.randn(12, 7).double())
    model.load_state_dict(net(seed=5).state_dict() | {"0.weight": torch.randn(12, 7).double()}, assign=True)
    check_both_ways(model, regularizer)


def test_value_under_functional_call():
    model = net()
    regularizer = exact(model)
    other = {k: v.detach().clone().requires_grad_() for k, v in net(seed=2).named_parameters()}

    penalised = Lambda(lambda m: regularizer.value(), net=model)
    value = torch.func.functional_call(penalised, {f"net.{k}": v for k, v in other.items()}, ())
    value.backward()
    assert other["0.weight"].grad.any()
    assert gradients(model) == [None] * 6


def test_inference_first_and_training_later():
    model = net()
    regularizer = exact(model)
    with torch.inference_mode():
        assert regularizer.value().item() == pytest.approx(COEFFICIENT * regularizer.bound().item())
        regularizer.spectral_norms()
        regularizer.sigma_upper()
        regularizer.iterate()
    regularizer.value().backward()
    regularizer.add_grad_()
    assert model[0].weight.grad.any()


def test_several_regularizers_on_one_model():
    model = net()
    single = gradients_by(model, exact(model).add_grad_)
    first, second = exact(model, layers="0"), exact(model, exclude="0", penalty="layer_sum")

    sum_of_others = autograd_penalty([model[2].weight, model[4].weight], "layer_sum")
    truth = autograd_penalty([model[0].weight]) + sum_of_others
    expected = gradients_by(model, truth.backward)
    both = gradients_by(model, lambda: (first.add_grad_(), second.add_grad_()))
    check_gradients(both, expected, TOLERANCE[torch.float64])
    check_gradients(gradients_by(model, exact(model).add_grad_), single, 0)


def test_the_model_is_not_changed():
    model = net()
    before, keys = copy.deepcopy(model.state_dict()), set(vars(model))
    modules = list(model.modules())
    regularizer = LipschitzRegularizer(model, 1.0, example_input=torch.ones(1, 7).double())
    regularizer.value()
    regularizer.bound()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.state_dict().keys() == before.keys()
    assert set(vars(model)) == keys
    assert list(model.modules()) == modules
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)


def test_state_survives_a_file_without_pickled_code():
    model, regularizer = started()
    regularizer.add_grad_()
    torch.save(regularizer.state_dict(), "state.pt")
    other = LipschitzRegularizer(model, 1.0, block_size=2, seed=9)
    other.value()
    other.load_state_dict(torch.load("state.pt", weights_only=True))
    assert same_state(other.state_dict(), regularizer.state_dict())  # before the first use too
    change(model)
    expected = gradients_by(model, regularizer.add_grad_)
    check_gradients(gradients_by(model, other.add_grad_), expected, 0)
    assert same_state(other.state_dict(), regularizer.state_dict())


def test_loading_a_state_forgets_the_last_step():
    _, regularizer = started()
    state = regularizer.state_dict()
    value = regularizer.value()
    regularizer.iterate()
    regularizer.load_state_dict(state)
    # Iterated once from the loaded vectors, not taken from what was there before.
    assert torch.equal(regularizer.value(), value)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("penalty", ["product", "softplus_log"])
def test_a_copy_with_its_model_is_independent(copied, penalty):
    model = net()
    if copied is copy.deepcopy:  # torch does not pickle parametrised modules
        parametrizations.weight_norm(model[2])
    regularizer = LipschitzRegularizer(model, 1.0, penalty, block_size=2)
    regularizer.value()
    model2, regularizer2 = copied((model, regularizer))
    assert same_state(regularizer2.state_dict(), regularizer.state_dict())
    with torch.no_grad():
        bound = regularizer.bound().item()
        model2[0].weight.data.mul_(5)
        assert regularizer.bound().item() == bound
        assert regularizer2.bound().item() == pytest.approx(5 * bound)
    regularizer2.add_grad_()
    assert model2[0].weight.grad.any()
    assert model[0].weight.grad is None


def test_a_penalty_of_ones_own():
    def own(log_sigma, log_bound):
        return log_bound.square() + (2 * log_sigma).exp().max()

    model = net()

    def by_autograd():
        s = torch.stack([spectral_norm(w) for w in matrices(model)])
        (COEFFICIENT * (s.log().sum().square() + s.square().max())).backward()

    expected = gradients_by(model, by_autograd)
    regularizer = exact(model, penalty=own)
    for way in (regularizer.add_grad_, lambda: regularizer.value().backward()):
        check_gradients(gradients_by(model, way), expected, TOLERANCE[torch.float64])


def test_penalty_of_takes_hypothetical_norms():
    model = nn.Sequential(layer := nn.Linear(3, 3), layer, nn.Linear(3, 3))
    regularizer = LipschitzRegularizer(model, 7.0)
    # Without the coefficient, with multiplicities.
    assert regularizer.penalty_of(torch.tensor([2.0, 3.0]).log()).item() == pytest.approx(12)
    assert regularizer.log_bound_of(torch.tensor([2.0, 3.0]).log()).item() == pytest.approx(math.log(12))


@pytest.mark.parametrize(
    ("own", "got"),
    [
        (lambda log_sigma, log_bound: log_sigma, r"shape \(3,\)"),
        (lambda log_sigma, log_bound: log_bound[None], r"shape \(1,\)"),
        (lambda log_sigma, log_bound: 1.0, "float"),
        (lambda log_sigma, log_bound: None, "NoneType"),
    ],
)
@pytest.mark.parametrize("method", ["value", "add_grad_"])
def test_a_penalty_that_returns_no_scalar(own, got, method):
    regularizer = LipschitzRegularizer(net(), 1.0, own)
    with pytest.raises(ValueError, match=rf"penalty to return a tensor of shape \(\), got {got}\."):
        getattr(regularizer, method)()


@pytest.mark.parametrize("coefficient", [-1e-9, -1, math.nan, math.inf, -math.inf, True, False, "1", None, [1.0]])
def test_coefficient_must_be_a_finite_number_of_at_least_zero(coefficient):
    with pytest.raises(ValueError, match="`coefficient` to be a finite number of at least 0, got"):
        LipschitzRegularizer(net(), coefficient)


@pytest.mark.parametrize("coefficient", [0, 1, 1e-30, np.float64(0.5)])
def test_coefficients(coefficient):
    assert LipschitzRegularizer(net(), coefficient).coefficient == float(coefficient)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"penalty": "nope"}, "Unknown penalty 'nope'"),
        ({"target": 0}, "`target` to be a positive"),
        ({"block_size": 0}, "`block_size` to be an integer of at least 1"),
        ({"layers": "x"}, "`layers`: 'x' matches no module"),
    ],
)
def test_arguments_are_checked_at_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        LipschitzRegularizer(net(), 1.0, **arguments)


def test_a_layer_that_is_pruned_later_is_an_error():
    model = net()
    regularizer = LipschitzRegularizer(model, 1.0)
    prune.l1_unstructured(model[2], "weight", 0.5)
    for method in (regularizer.value, regularizer.add_grad_, regularizer.bound):
        with pytest.raises(RuntimeError, match=r"'2' is no longer a parameter of its own.*select the layers again"):
            method()


@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (6, 1)])
@pytest.mark.parametrize("penalty", NAMES)
def test_degenerate_shapes(shape, penalty):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(*shape)).double()
    # log sigma changes sign at 1, where hinge and log would have little to compare.
    model[0].weight.data.mul_(2 / spectral_norm(model[0].weight.data))
    check_both_ways(model, LipschitzRegularizer(model, COEFFICIENT, penalty, target=TARGET), penalty)


class Added(nn.Module):
    """A parametrization that adds a tensor of its own, and a sum over another one."""

    def __init__(self, shape):
        super().__init__()
        self.delta, self.shift = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.zeros(3))

    def forward(self, weight):
        return weight + self.delta + self.shift.sum()


@pytest.mark.parametrize("make", [lambda: nn.Linear(5, 4), lambda: nn.Conv2d(2, 3, 3)], ids=["linear", "convolution"])
def test_parameters_that_have_one_gradient_get_one_each(make):
    torch.manual_seed(0)
    layer = make()
    parametrize.register_parametrization(layer, "weight", Added(layer.weight.shape))
    example = torch.zeros(1, 2, 6, 6) if isinstance(layer, nn.Conv2d) else None
    regularizer = LipschitzRegularizer(nn.Sequential(layer), 1.0, "log", example_input=example)
    added = layer.parametrizations.weight[0]
    original, delta, shift = layer.parametrizations.weight.original, added.delta, added.shift

    def check():
        torch.testing.assert_close(delta.grad, original.grad)
        torch.testing.assert_close(shift.grad, original.grad.sum().expand(3))

    regularizer.add_grad_()
    check()
    once = original.grad.clone()
    assert once.norm() > 0.1
    regularizer.add_grad_(advance=False)
    check()
    # One tensor for both parameters would be added to twice. What a block that did not advance gives differs a little:
    # its vectors are half a step older.
    assert (original.grad - 2 * once).norm() < 0.1 * once.norm()
