import copy
import math

import pytest
import torch
from support.networks import Lambda, mlp
from support.truth import linears, norm, product
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from lightning_lip import Certificate, UnsupportedLayerError, certify, rebalance
from lightning_lip.metrics import certified_accuracy, certified_radii
from lightning_lip.paper import PaperRegressor

# Outputs in fp32 against the largest output: each weight is rounded once, 6e-8 of its size.
TOLERANCE = 1e-5


def outputs(model, *shape, n=1000):
    inputs = torch.randn(n, *shape, generator=torch.Generator().manual_seed(1), dtype=next(model.parameters()).dtype)
    with torch.no_grad():
        return model(inputs)


def check_outputs(after, before):
    assert (after - before).abs().max() <= TOLERANCE * before.abs().max()


def check_state(model, expected):
    assert all(torch.equal(a, b) for a, b in zip(expected.values(), model.state_dict().values(), strict=True))


def check(model, example_input, *shape, **settings):
    """Rebalance and check all that is promised; return the result."""
    before, old_product = outputs(model, *shape), product(model)
    result = rebalance(model, example_input, **settings)
    new_product = product(model)
    after = outputs(model, *shape)
    check_outputs(after, before)
    assert result.product_after <= result.product_before
    # Certified: above the float64 norms, by no more than the certificates' slack.
    assert old_product * (1 - 1e-12) <= result.product_before <= old_product * (1 + 1e-8)
    assert new_product * (1 - 1e-12) <= result.product_after <= new_product * (1 + 1e-8)
    assert [layer.norm_after for layer in result.layers] == [pytest.approx(norm(layer)) for layer in linears(model)]
    return result


def refused(model, example_input, *reasons):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UnsupportedLayerError) as caught:
        rebalance(model, example_input)
    for reason in reasons:
        assert reason in str(caught.value)
    check_state(model, before)
    return str(caught.value)


@pytest.mark.parametrize(
    "activation",
    [
        nn.ReLU,
        lambda: nn.ReLU(inplace=True),
        lambda: nn.LeakyReLU(0.2),
        lambda: nn.LeakyReLU(-0.3),
        lambda: nn.PReLU(init=0.4),
        lambda: nn.Sequential(nn.Dropout(0.5), nn.Identity(), nn.ReLU(), nn.Flatten()),
        nn.Identity,
    ],
)
def test_the_same_function_with_a_smaller_product(activation):
    model = mlp(13, 20, 20, 20, 2, activation=activation).eval()
    result = check(model, torch.zeros(1, 13), 13)
    assert result.changed
    assert result.product_after < 0.8 * result.product_before


@pytest.mark.parametrize("sizes", [(4, 1, 3), (1, 9, 1), (1, 1, 1), (3, 1, 8, 1, 2), (30, 2, 30), (5, 64, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_shapes(sizes, bias):
    check(mlp(*sizes, bias=bias), torch.zeros(1, sizes[0]), sizes[0])


def test_a_per_channel_prelu():
    model = mlp(4, 8, 3, activation=lambda: nn.PReLU(8))
    model[1].weight.data = torch.linspace(-1, 2, 8)
    assert check(model, torch.zeros(1, 4), 4).changed


def test_the_factors_are_those_of_the_weights_and_biases():
    model = mlp(6, 12, 8, 3)
    old = copy.deepcopy(model)
    parameters = list(model.parameters())
    result = check(model, torch.zeros(1, 6), 6)
    assert [layer.name for layer in result.layers] == ["0", "2", "4"]
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    before = torch.ones(6, dtype=torch.float64)
    for layer, new, original in zip(result.layers, linears(model), linears(old), strict=True):
        exact = layer.scale[:, None] * original.weight.double() / before
        torch.testing.assert_close(new.weight.double(), exact, rtol=1e-7, atol=0)
        torch.testing.assert_close(new.bias.double(), layer.scale * original.bias.double(), rtol=1e-7, atol=0)
        before = layer.scale
    assert torch.equal(before, torch.ones(3, dtype=torch.float64))
    norms = [layer.norm_after for layer in result.layers]
    assert norms == [pytest.approx(norms[0], rel=1e-6)] * 3


def test_a_trained_network_of_the_paper():
    model = PaperRegressor(seed=1)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 13, generator=generator)
    target = inputs.sin().sum(1, keepdim=True)
    optimizer = model.configure_optimizers()
    for _ in range(300):
        optimizer.zero_grad()
        F.mse_loss(model(inputs), target).backward()
        optimizer.step()
    before = certify(model, inputs)
    result = check(model, inputs, 13)
    after = certify(model, inputs)
    assert isinstance(after, Certificate)
    assert result.product_after < 0.8 * result.product_before
    assert after.bounds["product"] == pytest.approx(result.product_after, rel=1e-8)
    assert before.bounds["product"] == pytest.approx(result.product_before, rel=1e-8)
    # Neither bound is invariant: both gain.
    assert after.bounds["eclipse_fast"] < 0.95 * before.bounds["eclipse_fast"]
    assert after.bounds["combettes_pesquet"] < 0.95 * before.bounds["combettes_pesquet"]
    assert [layer.name for layer in result.layers] == ["net.0", "net.2", "net.4", "net.6"]


def test_in_fp64_the_outputs_agree_to_rounding():
    model = mlp(13, 20, 20, 2, dtype=torch.float64)
    before = outputs(model, 13)
    assert rebalance(model, torch.zeros(1, 13)).changed
    assert (outputs(model, 13) - before).abs().max() < 1e-14


def test_a_second_call_changes_nothing():
    model = mlp(13, 20, 20, 2)
    assert rebalance(model).changed
    weights = copy.deepcopy(model.state_dict())
    result = rebalance(model)
    assert not result.changed
    assert result.product_after == result.product_before
    assert all((layer.scale == 1).all() and layer.norm_after == layer.norm_before for layer in result.layers)
    check_state(model, weights)


def test_one_power_of_two_a_layer_changes_no_bit_of_the_outputs():
    model = mlp(13, 20, 20, 20, 2)
    model[0].weight.data *= 1000
    before = outputs(model, 13)
    result = check(model, torch.zeros(1, 13), 13, per_unit=False)
    assert result.changed
    assert torch.equal(outputs(model, 13), before)
    assert result.product_after == result.product_before
    norms = [layer.norm_after for layer in result.layers]
    assert max(norms) < 4 * min(norms) < 100 * 4 * min(norms) < max(layer.norm_before for layer in result.layers) * 100
    assert all(math.frexp(float(s))[0] == 0.5 for layer in result.layers for s in layer.scale)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_extreme_layers(scale):
    model = mlp(6, 12, 8, 2, bias=False)
    model[0].weight.data *= scale
    model[2].weight.data /= scale
    result = check(model, torch.zeros(1, 6), 6)
    assert result.changed
    assert max(layer.norm_after for layer in result.layers) < 10


def test_what_would_overflow_is_not_written():
    model = mlp(6, 12, 2)
    model[0].weight.data *= 1e-37
    model[0].bias.data.fill_(1e10)
    model[2].weight.data *= 1e30
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"0's bias would not fit into torch.float32 after rescaling"):
        rebalance(model)
    check_state(model, before)


def test_dead_units():
    model = mlp(6, 12, 8, 2)
    model[0].weight.data[:4] = 0
    model[2].weight.data[:, 3:6] = 0
    result = check(model, torch.zeros(1, 6), 6)
    assert result.changed
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_zero_layer_and_a_single_layer_are_left():
    model = mlp(6, 12, 2)
    nn.init.zeros_(model[2].weight)
    result = check(model, torch.zeros(1, 6), 6)
    assert not result.changed
    assert result.product_after == 0
    assert not rebalance(mlp(6, 0, 0, 2), torch.zeros(1, 6)).changed
    result = check(mlp(6, 2), torch.zeros(1, 6), 6)
    assert not result.changed
    assert [layer.name for layer in result.layers] == ["0"]


def test_tokens_and_what_stands_around_the_chain():
    """Layers on each token, functional activations, and things without parameters before and behind."""

    def forward(m, x):
        hidden = F.relu(m.first(torch.tanh(x - m.mean))).flatten(0, 1)
        return m.last(hidden.unflatten(0, (-1, x.shape[1]))).softmax(-1)

    model = Lambda(forward, mean=torch.full((6,), 0.5), first=nn.Linear(6, 12), last=nn.Linear(12, 3))
    assert check(model, torch.zeros(1, 5, 6), 5, 6).changed


def test_a_lightning_module(pl, make_module):
    module = make_module(pl, net=mlp(4, 8, 8, 1))
    with pytest.raises(ValueError, match="Expected `example_input` for a Regressor"):
        rebalance(module)
    module.example_input_array = torch.zeros(2, 4)
    before = outputs(module, 4)
    module.train()
    result = rebalance(module)
    assert result.changed
    assert module.training
    assert [layer.name for layer in result.layers] == ["net.0", "net.2", "net.4"]
    check_outputs(outputs(module, 4), before)


def test_after_training_with_a_trainer(pl, make_trainer, make_module, regression_data):
    module = make_module(pl, net=mlp(4, 8, 8, 1))
    make_trainer(pl, max_epochs=2).fit(module, regression_data)
    check(module, torch.zeros(1, 4), 4)


def test_inside_inference_mode_and_autocast():
    model, other = mlp(6, 12, 2), mlp(6, 12, 2)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        inside = rebalance(model)
    assert inside.product_after == rebalance(other).product_after
    assert torch.equal(model[0].weight, other[0].weight)
    model(torch.zeros(1, 6)).sum().backward()


ACTIVATIONS = [nn.Tanh, nn.GELU, nn.SiLU, nn.ELU, nn.Sigmoid, nn.Softplus, nn.ReLU6, nn.Hardtanh]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_that_are_not_homogeneous_are_refused(activation):
    message = refused(mlp(6, 12, 8, 2, activation=activation), torch.zeros(1, 6), "f(d x) = d f(x) for d > 0")
    # Each by its path.
    assert f"- 1 ({activation.__name__})" in message
    assert f"- 3 ({activation.__name__})" in message


def test_an_activation_of_several_operations_is_named():
    message = refused(mlp(6, 12, 2, activation=nn.Softsign), torch.zeros(1, 6), "by 1 (Softsign)")
    assert message.count("  - ") == 1


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.LayerNorm(12), "1 (LayerNorm), aten.layer_norm.default: it is not known to be positively homogeneous"),
        (nn.BatchNorm1d(12), "1 (BatchNorm1d), aten.batch_norm.default: fuse it into the layer before it"),
        (nn.Softmax(-1), "1 (Softmax)"),
        (nn.Unflatten(1, (3, 4)), "it reshapes the dimension of the hidden units"),
    ],
)
def test_layers_between_are_refused(layer, reason):
    columns = 4 if isinstance(layer, nn.Unflatten) else 12
    refused(nn.Sequential(nn.Linear(6, 12), layer, nn.Linear(columns, 2)), torch.zeros(1, 6), reason)


def test_a_batch_norm_can_be_fused_as_the_message_says():
    model = mlp(6, 12, 2)
    norm = nn.BatchNorm1d(12)
    norm(torch.randn(64, 12) * 3 + 1)
    nn.init.uniform_(norm.weight, 0.5, 2)
    whole = nn.Sequential(model[0], norm.eval(), model[1], model[2]).eval()
    fused = nn.Sequential(nn.utils.fuse_linear_bn_eval(model[0].eval(), norm), model[1], model[2])
    before = outputs(whole, 6)
    assert check(fused, torch.zeros(1, 6), 6).changed
    check_outputs(outputs(fused, 6), before)


@pytest.mark.parametrize(
    ("front", "example", "reason"),
    [
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten()), torch.zeros(1, 1, 4, 4), "0.0 (Conv2d)"),
        (nn.Sequential(nn.Embedding(5, 4), nn.Flatten()), torch.zeros(1, 2, dtype=torch.long), "0.0 (Embedding)"),
        (nn.BatchNorm1d(8), torch.zeros(1, 8), "0 (BatchNorm1d)"),
    ],
)
def test_parameters_outside_of_the_chain_are_refused(front, example, reason):
    model = nn.Sequential(front, nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 2))
    refused(model, example, reason, "it has parameters, but stands before, behind or beside the chain")
    # The part that is a chain, as the message says.
    assert rebalance(model[1:]).changed


def residual(m, x):
    hidden = m.a(x).relu()
    return m.c(hidden + m.b(hidden))


def two_outputs(m, x):
    hidden = m.a(x).relu()
    return m.b(hidden), hidden


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (residual, "its output is used 2 times, as in a residual network, by b (Linear), "),
        (lambda m, x: m.c(m.b(m.a(x).relu()) + x), "it also takes another value, as a residual or a branch does"),
        (lambda m, x: m.c(torch.cat([m.a(x)[:, :3], x[:, :3]], 1)), "it is not known to be positively homogeneous"),
        (two_outputs, "its output is used 2 times"),
        (lambda m, x: (m.a(x), m.b(x)), "it is an output of the network, but not the last layer's"),
        (lambda m, x: x @ m.a.weight, "it has parameters, but stands before"),
        (lambda m, x: x.relu(), "Lambda has no linear layer"),
    ],
    ids=["residual", "skip", "concatenated", "two outputs", "separate", "no layer", "nothing"],
)
def test_branches_are_refused(forward, reason):
    model = Lambda(forward, a=nn.Linear(6, 6), b=nn.Linear(6, 6), c=nn.Linear(6, 6))
    message = refused(model, torch.zeros(1, 6), reason)
    # Only what is wrong is named.
    assert forward is not residual or message.count("  - ") == 1


def test_layers_of_the_model_itself_are_named_by_their_parameters():
    inner, outer = nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.randn(2, 8))
    model = Lambda(lambda m, x: F.linear(F.relu(F.linear(x, m.inner)), m.outer), inner=inner, outer=outer)
    result = rebalance(model, torch.zeros(1, 4))
    assert result.changed
    assert [layer.name for layer in result.layers] == ["inner", "outer"]


def test_a_residual_around_the_whole_chain_is_no_obstacle():
    model = Lambda(lambda m, x: x + m.net(x), net=mlp(6, 12, 6))
    assert check(model, torch.zeros(1, 6), 6).changed
    # Its bound, 1 + product, is the smaller for it.


def tie_memory(model):
    model[2].weight.data = model[0].weight.data


def tie_unreached(model):
    """Share a weight with what the forward pass does not reach."""
    model.append(nn.Identity())
    model[3].weight = model[0].weight


COMPUTED = "its weight is computed, or no parameter"


@pytest.mark.parametrize(
    ("change", "reasons"),
    [
        (lambda m: m.extend([nn.ReLU(), m[2]]), ["shared"]),
        (lambda m: setattr(m[2], "weight", m[0].weight), ["its weight is shared with another layer, or used more"]),
        (lambda m: setattr(m[2], "bias", m[0].bias), ["its bias is shared"]),
        (tie_memory, ["lies in another layer's memory"]),
        (tie_unreached, ["its weight is shared"]),
        (
            lambda m: m[0].weight.requires_grad_(False),
            ["0 (Linear), aten.linear.default: its weight is frozen"],
        ),
        (lambda m: m[2].bias.requires_grad_(False), ["its bias is frozen"]),
        (lambda m: parametrizations.weight_norm(m[0]), ["0 (ParametrizedLinear)", COMPUTED]),
        (lambda m: parametrizations.spectral_norm(m[0]), ["0 (ParametrizedLinear)", COMPUTED]),
        (lambda m: prune.random_unstructured(m[2], "weight", amount=0.5), ["2 (Linear)", COMPUTED]),
        (lambda m: m.half(), ["only dense fp32 and fp64 are rescaled", "torch.float16"]),
        (lambda m: m.bfloat16(), ["only dense fp32 and fp64 are rescaled", "torch.bfloat16"]),
    ],
)
def test_weights_that_cannot_be_rescaled_are_refused(change, reasons):
    model = mlp(6, 6, 6)
    change(model)
    message = refused(model, torch.zeros(1, 6, dtype=model[0].weight.dtype), *reasons)
    assert COMPUTED not in reasons or message.count("  - ") == 1


def test_pruning_made_permanent_is_no_obstacle():
    model = mlp(6, 12, 2)
    prune.random_unstructured(model[2], "weight", amount=0.5)
    prune.remove(model[2], "weight")
    assert check(model, torch.zeros(1, 6), 6).changed


def test_one_layer_under_two_names_is_one_layer():
    model = mlp(6, 6, 6)
    assert rebalance(Lambda(lambda m, x: m.net(x), net=model, head=model[2]), torch.zeros(1, 6)).changed


def test_numbers_that_are_not_finite():
    model = mlp(6, 12, 2)
    model[2].weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="Expected finite numbers in 2's weight"):
        rebalance(model)
    model = mlp(6, 12, 2)
    model[0].bias.data[0] = math.inf
    weights = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="Expected finite numbers in 0's bias"):
        rebalance(model)
    check_state(model, weights)


def test_an_example_input_is_needed_where_nothing_tells_it():
    with pytest.raises(ValueError, match="Expected `example_input` for a Sequential"):
        rebalance(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2)))
    with pytest.raises(ValueError, match="Expected `example_input` for a Linear"):
        rebalance(nn.Linear(2, 2))


def test_stored_networks_keep_the_gain():
    model = mlp(6, 12, 2)
    rebalance(model)
    torch.save(model.state_dict(), "weights.pt")
    fresh = mlp(6, 12, 2, seed=1)
    fresh.load_state_dict(torch.load("weights.pt"))
    assert not rebalance(fresh).changed


def trained_classifier(seed):
    """A classifier of three blobs with a direction that all logits have in common."""
    torch.manual_seed(seed)
    net = mlp(4, 32, 32, 5)
    x = torch.randn(400, 4)
    y = (x @ torch.randn(4, 5)).argmax(1)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    with torch.no_grad():
        net[4].weight += 2 * torch.randn(32)
    return net, x, y


@pytest.mark.parametrize("seed", range(3))
def test_with_a_head_no_sample_loses_its_pairwise_certificate(seed):
    net, x, y = trained_classifier(seed)
    levels = [0.0, 0.01, 0.02, 0.05, 0.1, 0.2]

    def radii(model):
        return certified_radii(model(x), y, certify(model, x[:1]).head.features, model[4].weight)

    def shares(model):
        return certified_accuracy(model(x), y, certify(model, x[:1]).head.features, levels, model[4].weight)

    plain = copy.deepcopy(net)
    rebalance(plain, x[:1])
    before, old, logits = radii(net), shares(net), net(x).detach()
    result = rebalance(net, x[:1], head=net[4])
    assert result.changed
    assert result.product_after < 0.97 * result.product_before
    check_outputs(net(x), logits)
    assert (radii(net) >= before * (1 - 1e-4)).all()  # the logits are rounded anew
    assert (shares(net) >= old).all()
    assert shares(net).sum() > old.sum()
    assert radii(net).mean() > radii(plain).mean()
    assert result.product_after == pytest.approx(
        certify(net, x[:1]).head.features * torch.pdist(net[4].weight.double()).max().item(), rel=1e-6
    )


def test_a_head_is_the_last_layer():
    net = mlp(3, 4, 2)
    with pytest.raises(ValueError, match="to be the last layer, 2, got Linear"):
        rebalance(net, head=net[0])


def test_with_a_head_a_constant_classifier_and_a_single_layer_are_left():
    constant, single = mlp(3, 4, 2), nn.Sequential(nn.Linear(3, 2))
    nn.init.ones_(constant[2].weight)
    for model in (constant, single):
        before = copy.deepcopy(model.state_dict())
        assert not rebalance(model, head=model[-1]).changed
        check_state(model, before)
