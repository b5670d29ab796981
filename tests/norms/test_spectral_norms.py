"""The persistent blocks: how they start, go on, are saved, and follow the model's dtype and shapes."""

import copy
import math
import pickle
import warnings
from functools import partial

import pytest
import torch
from support.networks import mlp
from support.symbol_norms import symbol_at_frequencies, symbol_norm
from support.truth import forward_matrix, linears, norm
from torch import nn
from torch.nn.utils import parametrizations

from lightning_lip.kernels.reference import PENALTY_CODES, power_step
from lightning_lip.kernels.symbol import unpacked
from lightning_lip.norms.spectral_norms import SpectralNorms
from lightning_lip.operators.known import operator_of
from lightning_lip.operators.selection import cover, known_by_type

net = partial(mlp, 20, 30, 30, 1)


def norms_of(model, **kwargs):
    return SpectralNorms(cover(model).operators, **kwargs)


def truth(model):
    return torch.tensor([norm(layer) for layer in linears(model)], dtype=torch.float64)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_blocks_are_clamped_to_the_shorter_side():
    norms = norms_of(net(), block_size=25)
    norms.current()
    assert {k: tuple(v.shape) for k, v in norms.state_dict().items()} == {"0": (20, 20), "2": (25, 30), "4": (1, 1)}
    norms_of(net(), block_size=10**9).current()  # more would not fit into memory


def test_the_first_use_iterates_fifteen_times_from_the_seed():
    model = net()
    norms = norms_of(model, block_size=2, seed=3)
    norms.current()
    generator = torch.Generator().manual_seed(3)
    for name, shape in (("0", (2, 20)), ("2", (2, 30)), ("4", (1, 1))):
        random = torch.linalg.qr(torch.randn(shape, generator=generator).T).Q.T
        expected = power_step([model[int(name)].weight], [random], 15).vectors[0]
        torch.testing.assert_close(norms.state_dict()[name], expected, rtol=0, atol=1e-5)


def test_n_iterations_a_step():
    model = net()
    one, three = norms_of(model, block_size=2), norms_of(model, block_size=2, n_iterations=3)
    for _ in range(3):
        by_one = one.step()
    torch.testing.assert_close(by_one.sigma, three.step().sigma, rtol=1e-6, atol=0)


def test_steps_converge_to_the_truth_and_never_exceed_it():
    model = net()
    norms = norms_of(model)
    for _ in range(200):
        sigma = norms.step().sigma.double()
        assert (sigma <= truth(model) * (1 + 2e-6)).all()
    torch.testing.assert_close(sigma, truth(model), rtol=1e-5, atol=0)


def test_seeds_are_private_and_fix_everything():
    model = net()
    rng = torch.get_rng_state()
    first = norms_of(model, seed=3)
    first.step()
    assert torch.equal(torch.get_rng_state(), rng)
    torch.manual_seed(99)
    second = norms_of(model, seed=3)
    second.step()
    assert same(first.state_dict(), second.state_dict())
    third = norms_of(model, seed=4)
    third.step()
    assert not same(first.state_dict(), third.state_dict())


def test_blocks_do_not_depend_on_default_device_or_dtype():
    model = net()
    expected = norms_of(model)
    expected.current()
    torch.set_default_dtype(torch.float64)
    try:
        other = norms_of(model)
        other.current()
    finally:
        torch.set_default_dtype(torch.float32)
    assert same(other.state_dict(), expected.state_dict())
    with torch.device("meta"):
        other = norms_of(model)
        other.current()
    assert same(other.state_dict(), expected.state_dict())


def test_a_computed_weight_is_not_rounded_by_autocast_either():
    model = nn.Sequential(parametrizations.orthogonal(nn.Linear(6, 6)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert norms_of(model).current().sigma.item() == pytest.approx(1, abs=2e-6)


def test_vectors_made_in_inference_mode_can_be_advanced_later():
    norms = norms_of(net())
    with torch.inference_mode():
        norms.current()
        step = norms.step()
    # Inference tensors can neither be updated in place nor be saved for a backward pass.
    assert not any(t.is_inference() for t in (step.sigma, *step.left, *step.right, *step.vectors))
    norms.step()


@pytest.mark.parametrize("before", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("after", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_model_may_be_cast_later(before, after):
    model = net(dtype=before)
    norms = norms_of(model, block_size=30)
    norms.step()
    model.to(after)
    sigma = norms.step().sigma
    assert sigma.dtype == (torch.float64 if after == torch.float64 else torch.float32)
    torch.testing.assert_close(sigma.double(), truth(model), rtol=1e-12 if after == torch.float64 else 2e-6, atol=0)
    kinds = {v.dtype for v in norms.state_dict().values()}
    assert kinds == {sigma.dtype}


def test_layers_of_different_dtypes():
    model = net()
    model[2].double()
    model[4].bfloat16()
    sigma = norms_of(model, block_size=30).step().sigma
    assert sigma.dtype == torch.float64
    torch.testing.assert_close(sigma, truth(model), rtol=2e-6, atol=0)


def test_state_is_a_copy():
    norms = norms_of(net())
    assert norms.state_dict() == {}
    norms.current()
    state = norms.state_dict()
    for v in state.values():
        v.zero_()
    assert all(v.any() for v in norms.state_dict().values())


def test_loading_leaves_the_given_state_alone():
    norms = norms_of(net(), block_size=2)
    norms.current()
    state = norms.state_dict()
    kept = copy.deepcopy(state)
    other = norms_of(net(), block_size=2)
    other.load_state_dict(state)
    for _ in range(3):
        other.step()
    assert same(state, kept)


def test_a_state_of_another_block_size_warns_and_starts_afresh():
    model = net()
    norms = norms_of(model, block_size=4)
    norms.current()
    other = norms_of(model, block_size=2)
    other.load_state_dict(norms.state_dict())
    with pytest.warns(UserWarning, match="start afresh") as caught:
        other.current()
    messages = [str(w.message) for w in caught]
    assert len(messages) == 1  # the last layer's block is (1, 1) either way
    assert "layer '0' have shape (4, 20)" in messages[0]
    assert "ask for (2, 20) and finite values, not all zero: it and ['2']" in messages[0]
    fresh = norms_of(model, block_size=2)
    fresh.current()
    assert torch.equal(other.state_dict()["2"], fresh.state_dict()["2"])


def test_a_partial_state_starts_the_missing_layers_afresh():
    model = net()
    norms = norms_of(model, block_size=2, seed=1)
    norms.step()
    state = norms.state_dict()
    del state["2"]
    other = norms_of(model, block_size=2)
    other.load_state_dict(state)
    other.current()
    fresh = norms_of(model, block_size=2)
    fresh.current()
    assert torch.equal(other.state_dict()["0"], norms.state_dict()["0"])
    assert torch.equal(other.state_dict()["2"], fresh.state_dict()["2"])


def test_a_state_of_unknown_layers_warns():
    norms = norms_of(net())
    norms.load_state_dict({"gone": torch.ones(8, 30)})
    with pytest.warns(UserWarning, match=r"belong to no selected layer and are dropped: \['gone'\]"):
        norms.current()


def test_a_float64_state_serves_a_float32_model():
    model = net(dtype=torch.float64)
    norms = norms_of(model)
    norms.step()
    other = norms_of(model.float())
    other.load_state_dict(norms.state_dict())
    assert other.step().sigma.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_upper_lies_above_the_spectral_norm(dtype, scale):
    model = net(scale=scale, dtype=dtype)
    for block_size, slack in ((1, 10.0), (8, 3.0), (30, 1 + 1e-5)):
        norms = norms_of(model, block_size=block_size)
        upper = norms.upper().double()
        # The bound holds in exact arithmetic; what it loses to rounding in fp32 is far below 1e-5.
        assert (upper >= truth(model) * (1 - 1e-5)).all()
        assert (upper <= truth(model) * slack).all()


def test_upper_of_a_zero_layer_is_zero():
    model = net()
    nn.init.zeros_(model[2].weight)
    upper = norms_of(model).upper()
    assert upper[1] == 0
    assert (upper[[0, 2]] > 0).all()


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize("block_size", [1, 4, 100])
def test_ritz_values_lie_below_the_singular_values(block_size, scale):
    model = net(scale=scale)
    norms = norms_of(model, block_size=block_size)
    norms.current()
    before = norms.state_dict()
    for layer, values in zip(linears(model), norms.ritz_values(), strict=True):
        singular = torch.linalg.svdvals(layer.weight.detach().double())
        assert values.shape == (min(block_size, len(singular)),)
        assert (values.double() <= singular[: len(values)] * (1 + 1e-5)).all()
        if len(values) == len(singular):
            torch.testing.assert_close(values.double(), singular, rtol=1e-4, atol=1e-5 * scale)
        else:
            assert values[0] > 0.9 * singular[0]
    assert same(before, norms.state_dict())


@pytest.mark.parametrize("groups", [1, 2])
def test_ritz_values_of_a_symbol_are_below_its_norm_at_each_frequency(groups):
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3, groups=groups)
    norms = SpectralNorms([operator_of(layer, "a")])
    [norms.step() for _ in range(300)]
    (values,) = norms.ritz_values()
    wave = unpacked(norms.state_dict()["a"], operator_of(layer, "a").symbol_geometry)
    assert torch.equal(values, values.sort(descending=True).values)
    truth = symbol_norm(layer.weight, 1, 1, groups).item()
    assert values[0].item() == pytest.approx(truth, rel=1e-5)
    of_groups = [
        torch.linalg.matrix_norm(symbol_at_frequencies(part.double(), w.double(), [1, 1], [1, 1]), 2)
        for part, w in zip(layer.weight.detach().chunk(groups), wave.w.chunk(groups), strict=True)
    ]
    torch.testing.assert_close(values, torch.cat(of_groups).sort(descending=True).values.float(), rtol=2e-2, atol=0)


def test_a_depthwise_convolution_keeps_nothing_and_is_saved_without_a_warning():
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 4, 3, groups=4)
    norms = SpectralNorms([operator_of(layer, "a")])
    sigma = norms.step().sigma.clone()
    again = SpectralNorms([operator_of(layer, "a")])
    again.load_state_dict(norms.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(again.step().sigma, sigma)
    (values,) = again.ritz_values()
    channels = [symbol_norm(part, 1, 1).item() for part in layer.weight.detach().chunk(4)]
    assert values.tolist() == pytest.approx(sorted(channels, reverse=True), rel=1e-5)


@pytest.mark.parametrize("bad", [0.0, math.nan])
def test_a_saved_symbol_without_vectors_starts_afresh(bad):
    layer = nn.Conv2d(2, 3, 3)
    norms = SpectralNorms([operator_of(layer, "a")])
    norms.step()
    (state,) = norms.state_dict().values()
    unpacked(state, operator_of(layer, "a").symbol_geometry).v.fill_(bad)
    norms.load_state_dict({"a": state})
    with pytest.warns(UserWarning, match="layer 'a' .* its iteration starts afresh"):
        assert norms.step().sigma.isfinite().all()


def test_saved_maps_of_features_start_afresh_with_one_warning():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3))
    norms = norms_of(model)
    expected = norms.current().sigma
    before = norms_of(model)
    # As of before symbols: blocks of 8 vectors of the size of a layer's input.
    before.load_state_dict({"0": torch.randn(8, 300), "2": torch.randn(8, 256), "4": torch.randn(8, 180)})
    with pytest.warns(UserWarning, match="start afresh") as caught:
        torch.testing.assert_close(before.current().sigma, expected)
    (message,) = [str(w.message) for w in caught]
    assert "layer '0' have shape (8, 300)" in message
    assert "['2', '4']" in message


def test_ritz_values_of_a_convolution_a_zero_layer_and_nan():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(48, 5), nn.Linear(5, 5))
    nn.init.zeros_(model[2].weight)
    nn.init.constant_(model[3].weight, torch.nan)
    operators = cover(model, providers=[partial(known_by_type, convolutions="spatial")]).operators
    model(torch.zeros(1, 2, 4, 4).requires_grad_())  # a convolution takes its size from the first forward pass
    values = SpectralNorms(operators, block_size=32, n_iterations=3).ritz_values()
    singular = torch.linalg.svdvals(forward_matrix(model[0], (2, 4, 4)).detach())
    torch.testing.assert_close(values[0], singular, rtol=1e-4, atol=1e-5)
    assert values[1].tolist() == [0.0] * 5
    assert values[2].isnan().all()


@pytest.mark.parametrize("argument", ["block_size", "n_iterations"])
@pytest.mark.parametrize("value", [0, -1, 1.0, True, None, "8"])
def test_arguments(argument, value):
    with pytest.raises(ValueError, match=f"`{argument}` to be an integer of at least 1, got {value!r}"):
        norms_of(net(), **{argument: value})


def test_a_weight_that_is_not_finite_shows_and_comes_back():
    model = net()
    norms = norms_of(model)
    norms.step()
    good = model[0].weight.detach().clone()
    nn.init.constant_(model[0].weight, torch.nan)
    assert norms.step().sigma.isnan().tolist() == [True, False, False]
    assert norms.current().sigma.isnan().tolist() == [True, False, False]
    model[0].weight.data.copy_(good)
    for _ in range(100):
        sigma = norms.step().sigma
    torch.testing.assert_close(sigma.double(), truth(model), rtol=1e-5, atol=0)


def test_a_model_that_starts_with_nan_does_not_raise():
    model = net()
    nn.init.constant_(model[0].weight, torch.nan)
    assert norms_of(model).step().sigma.isnan().tolist() == [True, False, False]


def test_saved_vectors_that_are_not_finite_start_afresh():
    model = net()
    norms = norms_of(model)
    norms.current()
    norms.load_state_dict({name: torch.full_like(block, torch.nan) for name, block in norms.state_dict().items()})
    with pytest.warns(UserWarning, match=r"not all zero: it and \['2', '4'\], which do not fit either, start afresh"):
        assert norms.current().sigma.isfinite().all()


def test_one_call_follows_replaced_weights_and_loaded_blocks():
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    start = copy.deepcopy(model.state_dict())
    norms = norms_of(model)
    arguments = (PENALTY_CODES["layer_sum"], 1.0, 1.0, True, None)
    for factor in (1.0, 3.0):
        model.load_state_dict({key: factor * value for key, value in start.items()}, assign=True)
        assert norms.penalise_(*arguments).item() == pytest.approx(truth(model).sum().item(), rel=1e-5)
    norms.load_state_dict(norms.state_dict())
    assert norms.penalise_(*arguments).item() == pytest.approx(truth(model).sum().item(), rel=1e-5)
    again = pickle.loads(pickle.dumps(norms))
    assert again.penalise_(*arguments).item() == pytest.approx(truth(model).sum().item(), rel=1e-5)


@pytest.mark.parametrize("case", ["computed", "two dtypes", "removed"])
def test_one_call_is_refused_where_no_kernel_serves_all(case):
    model = net()
    norms = norms_of(model)
    if case == "computed":
        norms = norms_of(nn.Sequential(model, parametrizations.weight_norm(nn.Linear(1, 3))))
    if case == "two dtypes":
        model[0].double()
    if case == "removed":
        del model[0].weight
    assert norms.penalise_(PENALTY_CODES["log"], 1.0, 1.0, True, None) is None
    assert all(p.grad is None for p in model.parameters())
