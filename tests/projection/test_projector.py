"""LipschitzProjector: what is certified afterwards, what moved, and what it refuses."""

import math
import pickle
from functools import partial

import pytest
import torch
from sklearn.datasets import load_digits
from support.networks import Lambda, Residual, mlp
from support.symbol_norms import symbol_norm
from support.truth import jacobian_norm, linears, product
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from lightning_lip import LipschitzProjector, UnsupportedLayerError, certify, project
from lightning_lip.certificates.interval import certified_matrix_norm
from lightning_lip.projection.caps import joint_caps


def weights(model):
    return [layer.weight.detach() for layer in linears(model)]


def certified_product(model):
    return math.prod(certified_matrix_norm(w) for w in weights(model))


def copies(model):
    return [p.detach().clone() for p in model.parameters()]


def same(model, before):
    return all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def convolutional(affine=True):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4, affine=affine),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        nn.Flatten(),
        nn.Linear(64, 5),
        nn.LayerNorm(5),
    )


def test_a_step_survives_a_decomposition_that_fails_in_fp32(monkeypatch):
    """As LAPACK's does at times, where clipping has made many singular values equal."""
    svd, failed = torch.linalg.svd, []

    def fail_in_fp32(matrix, full_matrices=True):
        if matrix.dtype == torch.float32:
            failed.append(matrix.shape)
            raise torch.linalg.LinAlgError("linalg.svd: The algorithm failed to converge")
        return svd(matrix, full_matrices)

    torch.manual_seed(0)
    model = mlp(8, 16, 16, 4)
    target = 0.6 * certified_product(model)
    projector = LipschitzProjector(model, target)
    monkeypatch.setattr(torch.linalg, "svd", fail_in_fp32)
    projector.step()
    assert failed
    assert certified_product(model) == pytest.approx(target, rel=1e-3)
    assert all(weight.dtype == torch.float32 for weight in weights(model))


def factors():
    return {"a": nn.Parameter(torch.randn(3, 3)), "b": nn.Parameter(torch.randn(3, 3))}


class TestExact:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("method", ["joint", "log_clip", "per_layer", "scaling"])
    def test_certified_within_the_target_then_unchanged(self, method, dtype):
        model = mlp(6, 12, 12, 3, dtype=dtype)
        result = project(model, 0.2, method=method)
        assert result.changed
        assert result.certified
        assert certified_product(model) <= 0.2
        assert result.bound <= 0.2
        # What the rounding of the weights' dtype makes necessary, and no more: eps is 8e-3, 1e-3, 1e-7.
        assert result.bound > 0.2 * (1 - 1e-9 - 10 * torch.finfo(dtype).eps)
        before = copies(model)
        again = project(model, 0.2, method=method)
        assert not again.changed
        assert again.distance == 0
        assert same(model, before)

    @pytest.mark.parametrize("method", ["joint", "log_clip", "per_layer", "scaling"])
    def test_a_traced_bound(self, method):
        model = Residual()
        example = torch.zeros(2, 8)
        assert certify(model, example).upper > 1.0
        result = project(model, 1.0, method=method, example_input=example)
        assert certify(model, example).upper <= 1.0
        assert 1 - 1e-6 < result.bound <= 1

    @pytest.mark.parametrize("metric", ["relative", "euclidean"])
    def test_joint_is_the_nearest_point(self, metric):
        model = mlp(6, 12, 12, 3, dtype=torch.float64)
        before = [w.clone() for w in weights(model)]
        svds = [torch.linalg.svd(w, full_matrices=False) for w in before]
        target = product(model) / 1.5
        caps = joint_caps([s.numpy() for _, s, _ in svds], math.log(target), metric=metric)
        result = project(model, target, metric=metric)
        assert result.nearest
        for w, (u, s, v), cap in zip(weights(model), svds, caps.caps, strict=True):
            assert (w - u @ torch.diag(s.clamp(max=cap)) @ v).abs().max() < 1e-8
        share = [s[0] if metric == "relative" else 1.0 for _, s, _ in svds]
        moved = [float((w - b).norm() / x) for w, b, x in zip(weights(model), before, share, strict=True)]
        assert result.distance == pytest.approx(math.hypot(*moved), rel=1e-6)
        # The other method is feasible, and farther.
        other = mlp(6, 12, 12, 3, dtype=torch.float64)
        assert project(other, target, metric=metric, method="log_clip").distance > result.distance
        assert not project(mlp(6, 12, 12, 3), target, method="log_clip").nearest

    def test_convolutions_and_gammas_are_scaled(self):
        model = convolutional()
        example = torch.randn(2, 1, 4, 4)
        before = copies(model)
        result = project(model, 2.0, example_input=example)
        assert certify(model, example).upper <= 2.0
        assert result.bound > 2 * (1 - 1e-5)
        pairs = zip(model.named_parameters(), before, strict=True)
        ratios = {name: p / b for (name, p), b in pairs if not torch.equal(p, b)}
        # Not the kernel before the normalisation: in training the batch's variance would undo it.
        assert set(ratios) == {"1.weight", "3.weight", "5.weight", "6.weight"}
        assert ratios["3.weight"].max() - ratios["3.weight"].min() < 1e-6

    def test_one_gamma_with_two_variances(self):
        model = nn.Sequential(nn.BatchNorm1d(3), nn.Identity(), nn.BatchNorm1d(3)).double().eval()
        model[2].weight = model[0].weight
        model[2].running_var.fill_(1e-4)
        x = torch.zeros(1, 3, dtype=torch.float64)
        result = project(model, 1.0, example_input=x)
        assert 1 - 1e-5 < jacobian_norm(model, x) <= result.bound <= 1.0

    def test_a_normalisation_after_a_matrix_on_the_right(self):
        norm = nn.BatchNorm1d(3)
        norm.weight.data = torch.tensor([100.0, 1.0, 0.01])
        weight = nn.Parameter(norm.weight.detach().diag().roll(1, 0))
        model = Lambda(lambda m, x: m.norm(x @ m.w), norm=norm, w=weight).double().eval()
        x = torch.zeros(1, 3, dtype=torch.float64)
        assert jacobian_norm(model, x) > 9999
        result = project(model, 1.0, example_input=x)
        assert 1 - 1e-5 < jacobian_norm(model, x) <= result.bound <= 1.0

    def test_a_convolution_of_unknown_size(self):
        model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
        projector = LipschitzProjector(model, 0.5, convolutions="spatial")
        assert projector.exact().bound <= 0.5
        with pytest.raises(RuntimeError, match="input size of convolution '0' is not known yet"):
            projector.step()
        model(torch.zeros(1, 1, 6, 6))
        assert not projector.step().changed
        model[2].weight.data.mul_(3)
        assert projector.step().changed
        # A step aims at what the certificate will say, a percent above the estimate.
        model[0].weight.data.mul_(3)
        projector.exact()
        model[0].weight.data.mul_(1.5)
        projector.step()
        before = copies(model)
        assert projector.exact().bound <= 0.5
        assert same(model, before)

    @pytest.mark.parametrize("example_input", [None, torch.zeros(1, 1, 6, 6)], ids=["product", "traced"])
    def test_what_is_held_of_a_convolution_is_its_symbol(self, example_input):
        model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
        projector = LipschitzProjector(model, 0.5, example_input=example_input, n_iterations=20)
        assert projector.exact().bound <= 0.5
        model[2].weight.data.mul_(3)
        projector.step()
        true = math.prod(symbol_norm(model[i].weight.detach(), 1, 1).item() for i in (0, 2))
        # The Riesz factors of the certificates, which a step allows for.
        assert 0.5 / 1.02 <= true <= 0.5 * (1 - 1e-5)
        before = copies(model)
        assert projector.exact().bound <= 0.5
        assert same(model, before)

    def test_one_kernel_at_two_sizes_and_a_matrix_twice(self):
        kernel, matrix = nn.Conv2d(1, 1, 3, padding=1), nn.Linear(4, 4)
        model = nn.Sequential(kernel, nn.MaxPool2d(2), kernel, nn.Flatten(), matrix, nn.ReLU(), matrix)
        example = torch.zeros(2, 1, 4, 4)
        result = project(model, 0.1, example_input=example)
        assert certify(model, example).upper <= 0.1
        assert result.bound > 0.1 * (1 - 1e-5)
        pair = nn.Sequential(matrix, nn.ReLU(), matrix)
        assert project(pair, 1e-3).bound <= 1e-3
        assert certified_matrix_norm(matrix.weight) ** 2 <= 1e-3

    def test_frozen_layers_count_and_stay(self):
        model = mlp(6, 12, 12, 3)
        model[2].weight.requires_grad_(False)
        before = model[2].weight.clone()
        project(model, 0.05)
        assert torch.equal(model[2].weight, before)
        assert certified_product(model) <= 0.05
        model.requires_grad_(False)
        with pytest.raises(ValueError, match=r"no selected layer is trainable: 0\.0.* is the smallest"):
            project(model, 1e-3)

    def test_unselected_layers_of_a_traced_bound_stay(self):
        model = Residual()
        before = model.out.weight.clone()
        project(model, 1.0, example_input=torch.zeros(2, 8), exclude="out")
        assert torch.equal(model.out.weight, before)
        assert certify(model, torch.zeros(2, 8)).upper <= 1.0
        with pytest.raises(ValueError, match="No caps reach the target"):
            project(model, 1e-3, example_input=torch.zeros(2, 8), exclude="out")

    @pytest.mark.parametrize("method", ["joint", "per_layer", "scaling"])
    def test_a_target_below_the_shortcut_of_a_residual(self, method):
        model = Lambda(lambda m, x: x + m.inner(x), inner=nn.Linear(4, 4))
        with pytest.raises(ValueError, match=r"bound is (still )?1"):
            project(model, 0.9, method=method, example_input=torch.zeros(2, 4))

    def test_degenerate_weights(self):
        zero = mlp(3, 4, 2)
        nn.init.zeros_(zero[0].weight)
        before = copies(zero)
        assert project(zero, 1e-6).bound == 0
        assert same(zero, before)
        assert project(nn.Linear(1, 1), 1e-3).bound <= 1e-3
        row = nn.Linear(7, 1)
        assert project(row, 1e-3).bound <= 1e-3

    @pytest.mark.parametrize("scale", [1e-30, 1e30])
    def test_any_magnitude(self, scale):
        model = mlp(6, 12, 3)
        model[0].weight.data.mul_(scale)
        target = product(model) / 1.5
        projector = LipschitzProjector(model, target)
        projector.step()
        assert product(model) <= target * (1 + 1e-4)
        assert projector.exact().bound <= target

    def test_a_target_below_the_rounding_of_the_weights(self):
        model = mlp(8, 16, 4, scale=1e37)
        result = project(model, 1.0)
        assert 0.99 < certified_product(model) <= result.bound <= 1.0

    def test_not_finite(self):
        model = mlp(6, 12, 3)
        model[2].weight.data[0, 0] = math.nan
        with pytest.raises(ValueError, match=r"Layer '2'.*NaN"):
            project(model, 1.0)
        with pytest.raises(ValueError, match=r"layer '2' holds NaN"):
            LipschitzProjector(model, 1.0).step()


class TestStep:
    @pytest.mark.parametrize("target", [2.0, 10.0])
    @pytest.mark.parametrize("optimizer", ["sgd", "adam"])
    def test_training_stays_within_the_target(self, optimizer, target):
        digits = load_digits()
        x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
        model = mlp(64, 128, 128, 128, 10)
        adam, sgd = torch.optim.Adam, partial(torch.optim.SGD, momentum=0.9)
        stepper = adam(model.parameters(), 1e-3) if optimizer == "adam" else sgd(model.parameters(), 0.05)
        projector = LipschitzProjector(model, target)
        projector.exact()
        excess, generator = [], torch.Generator().manual_seed(0)
        for step in range(150):
            rows = torch.randperm(len(x), generator=generator)[:50]
            stepper.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            stepper.step()
            assert not projector.step().certified
            if step % 10 == 9:
                excess.append(product(model) / target - 1)
        assert max(excess) <= 1e-4
        assert max(excess) > -1e-2  # the constraint is active
        assert (model(x).argmax(1) == y).float().mean() > 0.8
        assert projector.exact().bound <= target

    def test_weights_within_the_target_stay(self):
        model = mlp(6, 40, 40, 3)
        projector = LipschitzProjector(model, product(model) * (1 + 1e-3), block_size=4)
        before = copies(model)
        for _ in range(3):
            assert not projector.step().changed
        assert same(model, before)

    def test_a_step_on_projected_weights_changes_nothing(self):
        model = mlp(6, 40, 40, 3)
        target = product(model) / 1.5
        projector = LipschitzProjector(model, target)
        assert projector.step().changed
        assert target * (1 - 1.1e-4) < product(model) < target * (1 - 0.9e-4)
        before = copies(model)
        assert not projector.step().changed
        assert same(model, before)

    @pytest.mark.parametrize("factor", [1.5, 100.0])
    def test_equals_the_exact_projection_though_the_block_is_small(self, factor):
        # Beyond a factor of 2 the singular values are exact; below, the block must grow: a random matrix has many
        # singular values near its norm.
        results = []
        for call in ("step", "exact"):
            model = mlp(60, 80, 80, 60)
            target = product(model) / factor
            projector = LipschitzProjector(model, target, block_size=2)
            getattr(projector, call)()
            results.append(weights(model))
            assert product(model) <= target * (1 + 1e-4)
        for w, exact in zip(*results, strict=True):
            assert (w - exact).norm() <= 2e-3 * exact.norm()

    def test_every_nth_step_is_exact(self):
        model = mlp(6, 12, 3)
        projector = LipschitzProjector(model, 0.1, exact_every_n_steps=3)
        assert [projector.step().certified for _ in range(6)] == [False, False, True] * 2

    def test_frozen_layers_may_fill_the_target(self):
        model = mlp(4, 8, 2).requires_grad_(False)
        projector = LipschitzProjector(model, certified_product(model) * (1 + 1e-9))
        assert not projector.exact().changed
        assert not projector.step().changed

    def test_a_new_target(self):
        model = mlp(6, 12, 3)
        projector = LipschitzProjector(model, 1.0)
        projector.exact()
        projector.target = 0.5
        projector.step()
        assert product(model) <= 0.5
        with pytest.raises(ValueError, match="`target` to be a positive finite number, got 0"):
            projector.target = 0

    def test_an_unfrozen_layer_is_projected(self):
        model = mlp(6, 12, 3)
        model[0].weight.requires_grad_(False)
        projector = LipschitzProjector(model, 1e-2)
        projector.step()
        before = model[0].weight.clone()
        model[0].weight.requires_grad_(True)
        model[0].weight.data.mul_(1.5)
        projector.step()
        assert not torch.equal(model[0].weight, before * 1.5)

    @pytest.mark.parametrize("method", ["log_clip", "per_layer", "scaling"])
    @pytest.mark.parametrize("traced", [False, True])
    def test_other_methods(self, method, traced):
        model = Residual()
        example = torch.zeros(2, 8) if traced else None
        projector = LipschitzProjector(model, target := product(model) / 1.5, method=method, example_input=example)
        result = projector.step()
        assert result.changed
        bound = certify(model, torch.zeros(2, 8)).upper if traced else product(model)
        assert bound <= target * (1 + 1e-4)
        # Per layer, a norm below its cap stays there: the product falls short of the target.
        assert bound > target * (0.5 if method == "per_layer" else 1 - 1e-3)
        assert result.bound == pytest.approx(bound, rel=1e-4)

    @pytest.mark.parametrize(("dtype", "ratio"), [(torch.float32, 1e5), (torch.float32, 1e18), (torch.float64, 1e18)])
    def test_norms_far_apart(self, dtype, ratio):
        # Clipped by a factor that no subtraction survives.
        model = mlp(40, 40, 40, dtype=dtype)
        model[0].weight.data.mul_(ratio)
        model[2].weight.data.div_(ratio)
        result = LipschitzProjector(model, 1.0, method="per_layer").step()
        assert result.changed
        assert certified_matrix_norm(model[0].weight.detach()) == pytest.approx(result.norms["0"], rel=1e-6)

    def test_bfloat16(self):
        model = mlp(20, 40, 40, 5, dtype=torch.bfloat16)
        target = product(model) / 1.5
        projector = LipschitzProjector(model, target)
        projector.step()
        assert product(model) <= target * (1 + 0.02)  # bf16 rounds each entry to 8 bits
        assert projector.exact().bound <= target

    def test_a_resumed_run_equals_the_uninterrupted_one(self):
        def make(seed):
            model = mlp(30, 60, 60, 5, seed=seed)
            return model, LipschitzProjector(model, 2.0, block_size=4, exact_every_n_steps=7)

        def run(n_first):
            model, projector = make(seed=0)
            for step in range(20):
                if step == n_first:
                    torch.save((model.state_dict(), projector.state_dict()), "run.pt")
                    saved = torch.load("run.pt", weights_only=True)
                    model, projector = make(seed=9)
                    model.load_state_dict(saved[0])
                    projector.load_state_dict(saved[1])
                generator = torch.Generator().manual_seed(step)
                for p in model.parameters():
                    p.data.add_(torch.randn(p.shape, generator=generator), alpha=0.02)
                projector.step()
            return model

        assert same(run(None), copies(run(11)))

    def test_a_block_that_does_not_fit_starts_afresh(self):
        saved = LipschitzProjector(mlp(6, 12, 3), 1.0)
        saved.step()
        other = LipschitzProjector(mlp(4, 12, 3), 1.0)
        with pytest.warns(UserWarning, match=r"layer '0' have shape \(6, 6\).* for \(4, r\)"):
            other.load_state_dict(saved.state_dict())
        other.step()


class TestRefusals:
    def test_a_sharded_weight(self):
        class DTensor(torch.Tensor):
            pass

        model = nn.Linear(3, 3)
        model.weight = nn.Parameter(torch.randn(3, 3).as_subclass(DTensor))
        with pytest.raises(UnsupportedLayerError, match=r"LipschitzProjector .* those of .* are sharded"):
            LipschitzProjector(model, 1.0)

    def test_a_parametrised_weight(self):
        model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
        with pytest.raises(UnsupportedLayerError, match=r"0: its weight is parametrised.*\n.*exclude=\['0'\]"):
            LipschitzProjector(model, 1.0)
        model[0].requires_grad_(False)
        assert project(model, 0.1).bound <= 0.1

    @pytest.mark.parametrize(
        ("make", "shape", "message"),
        [
            (
                lambda: convolutional(affine=False),
                (1, 4, 4),
                r"0\+1: a batch normalisation without gamma.*\n.*\['0', '1'\]",
            ),
            (
                lambda: Lambda(lambda m, x: m.inner(x) / m.t, inner=nn.Linear(3, 3), t=nn.Parameter(torch.ones(1))),
                (3,),
                "does not scale with it",
            ),
            (lambda: Lambda(lambda m, x: F.linear(x, m.a @ m.b), **factors()), (3,), "computed from 2 parameters"),
            (
                lambda: Lambda(lambda m, x: F.linear(F.linear(x, m.a), m.a @ m.b), **factors()),
                (3,),
                "would also change",
            ),
        ],
        ids=["a batch norm without gamma", "a division by a parameter", "two parameters", "a parameter in two ways"],
    )
    def test_weights_that_cannot_be_written(self, make, shape, message):
        with pytest.raises(UnsupportedLayerError, match=message):
            LipschitzProjector(make(), 1.0, example_input=torch.zeros(2, *shape))

    def test_a_transposed_use_is_followed(self):
        model = Lambda(lambda m, x: F.linear(torch.relu(m.code(x)), m.code.weight.t()), code=nn.Linear(6, 3))
        project(model, 0.1, example_input=torch.zeros(2, 6))
        assert certify(model, torch.zeros(2, 6)).upper <= 0.1

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"target": 0.0}, "`target` to be a positive finite number"),
            ({"target": math.inf}, "`target` to be a positive finite number"),
            ({"target": "2"}, "`target` to be a positive finite number"),
            ({"method": "nearest"}, "`method` to be one of"),
            ({"metric": "l1"}, "`metric` to be one of"),
            ({"block_size": 0}, "`block_size` to be an integer of at least 1"),
            ({"n_iterations": 1.5}, "`n_iterations` to be an integer of at least 1"),
            ({"exact_every_n_steps": -1}, "`exact_every_n_steps` to be an integer of at least 0"),
            ({"layers": "none"}, "matches no module"),
        ],
    )
    def test_bad_arguments(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            LipschitzProjector(mlp(3, 2), **({"target": 1.0} | arguments))

    def test_a_replaced_weight(self):
        model = mlp(4, 8, 2)
        projector = LipschitzProjector(model, 0.1)
        model[0].weight = nn.Parameter(torch.randn(8, 4))
        for projection in (projector.step, projector.exact):
            with pytest.raises(RuntimeError, match=r"weights of \['0'\] are other parameters"):
                projection()

    def test_a_copy(self):
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            pickle.dumps(LipschitzProjector(mlp(3, 2), 1.0))
