import itertools
import math

import pytest
import torch
from support.networks import Lambda
from support.truth import check_bound, operator_norms
from torch import fft, nn

from lightning_lip.certificates.interval import Certificate, certify
from lightning_lip.errors import UnsupportedLayerError
from lightning_lip.graph.bound import NetworkBound

NORMS = ("backward", "ortho", "forward")


@pytest.mark.parametrize(("n", "size", "scale"), [*itertools.product((1, 2, 5, 6), (None, 4, 7), NORMS)])
def test_transforms_of_real_numbers_and_back(n, size, scale):
    n_out = size or n
    forward = {"backward": math.sqrt(n_out), "ortho": 1.0, "forward": 1 / math.sqrt(n_out)}[scale]
    exact = size is None
    model = Lambda(lambda m, x: torch.view_as_real(fft.rfft(x, size, norm=scale)))
    check_bound(model, n, n=1, expected=forward, attained=exact)
    model = Lambda(lambda m, x: torch.view_as_real(fft.fft(x, size, dim=1, norm=scale)).flatten(1))
    check_bound(model, n, n=1, expected=forward, attained=exact)
    n_back = size or max(1, 2 * (n - 1))
    if n == 1 and size is None:
        return
    inverse = {"backward": 1 / math.sqrt(n_back), "ortho": 1.0, "forward": math.sqrt(n_back)}[scale]
    model = Lambda(lambda m, x: fft.irfft(torch.view_as_complex(x), size, norm=scale))
    check_bound(model, n, 2, n=1, expected=inverse * (math.sqrt(2) if n_back > 2 else 1), attained=exact)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: fft.irfft2(fft.rfft2(x, norm="ortho"), s=x.shape[-2:], norm="ortho"),
        lambda m, x: fft.irfftn(fft.rfftn(x, dim=(1, -1)), s=(x.shape[1], x.shape[3]), dim=(1, 3)),
        lambda m, x: fft.ifft2(fft.fft2(x, dim=(2, 1)), dim=(2, 1)).real,
        lambda m, x: fft.ifftn(fft.fftn(x, s=(3, 4)), dim=(-2, -1), norm="forward").imag,
        lambda m, x: fft.rfft(x, dim=-2).abs(),
        lambda m, x: fft.fftshift(fft.fft(x), dim=-1).conj().real,
        lambda m, x: torch.cat([fft.rfft(x).real, fft.rfft(x).imag], 1),
        lambda m, x: fft.irfft(fft.rfft(x) * m.w[:3], n=5),
        lambda m, x: fft.irfft(fft.rfft(x) * m.z, n=4),
        lambda m, x: fft.irfft(m.b * fft.rfft(x) / m.z + m.z, n=4),
        lambda m, x: fft.rfft(x).sum(1).abs() - fft.rfft(x).mean(1).real,
        lambda m, x: fft.irfft2(torch.einsum("bixy,oi->boxy", fft.rfft2(x), m.o)),
        lambda m, x: fft.irfft(fft.rfft(x) @ m.q, n=3),
    ],
)
def test_functions_of_spectra(function):
    torch.manual_seed(0)
    members = {
        "w": nn.Parameter(torch.randn(3)),
        "z": nn.Parameter(torch.randn(3, dtype=torch.complex128)),
        "b": torch.randn(3, dtype=torch.complex128),
        "o": nn.Parameter(torch.randn(2, 2, dtype=torch.complex128)),
        "q": nn.Parameter(torch.randn(3, 2, dtype=torch.complex128)),
    }
    check_complex(Lambda(function, **members), 2, 3, 4)


def check_complex(model, *shape):
    """Compare a bound with Jacobians; ``Module.double`` would make complex parameters real."""
    model.double = lambda: model
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and not parameter.is_complex():
                module._parameters[key] = nn.Parameter(parameter.double())
    return check_bound(model, *shape, n=4)


class SpectralConv(nn.Module):
    """A Fourier layer, as the Fourier neural operator's authors write it."""

    def __init__(self, channels, modes):
        super().__init__()
        self.modes = modes
        self.weights1 = nn.Parameter(torch.rand(channels, channels, modes, modes, dtype=torch.cfloat))
        self.weights2 = nn.Parameter(torch.rand(channels, channels, modes, modes, dtype=torch.cfloat))

    def forward(self, x):
        m = self.modes
        x_ft = fft.rfft2(x)
        out_ft = torch.zeros(
            x.shape[0], x.shape[1], x.size(-2), x.size(-1) // 2 + 1, dtype=torch.cfloat, device=x.device
        )
        out_ft[:, :, :m, :m] = torch.einsum("bixy,ioxy->boxy", x_ft[:, :, :m, :m], self.weights1)
        out_ft[:, :, -m:, :m] = torch.einsum("bixy,ioxy->boxy", x_ft[:, :, -m:, :m], self.weights2)
        return fft.irfft2(out_ft, s=(x.size(-2), x.size(-1)))


def test_a_fourier_neural_operator():
    torch.manual_seed(0)
    model = nn.Sequential(SpectralConv(2, 2), nn.GELU(), nn.Conv2d(2, 1, 1))
    x = torch.randn(2, 2, 6, 6)
    bound = NetworkBound.trace(model, x)
    assert [op.name for op in bound.operators] == ["0.weights1", "0.weights2", "2"]
    gradients = torch.autograd.grad(operator_norms(bound.operators).log().sum(), [*model.parameters()][:2])
    assert all(g.is_complex() and g.abs().sum() > 0 for g in gradients)
    certificate = certify(model, x)
    assert isinstance(certificate, Certificate)
    jacobian = torch.autograd.functional.jacobian(lambda y: model[0](y[None])[0].flatten(), x[0]).flatten(1)
    truth = torch.linalg.matrix_norm(jacobian, 2).item()
    alone = certify(model[:1], x).upper
    assert truth * (1 - 1e-5) <= alone <= 3 * truth


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda m, x: fft.rfft(x), "complex output"),
        (lambda m, x: fft.fft(x, dim=0).real, "mixes the samples"),
        (lambda m, x: fft.fftn(x).real, "mixes the samples"),
        (lambda m, x: fft.rfft(x).tanh().real, "complex"),
        (lambda m, x: fft.rfft(x).angle(), "not known"),
        (lambda m, x: fft.rfft(x).to(torch.int64) * 1.0, "step function"),
        (lambda m, x: fft.rfft(x).sum(1, dtype=torch.int64).double(), "step function"),
        (lambda m, x: fft.rfft(x).view(torch.float64), "another dtype"),
        (lambda m, x: (fft.rfft(x) * fft.rfft(x)).real, "product of two activations"),
        (lambda m, x: (fft.rfft(x) * 2j).real, "complex"),
        (lambda m, x: (x[:, :3] * m.z).real, "complex"),
        (lambda m, x: (fft.rfft(x) * (m.z * math.nan)).real, "not finite"),
        (lambda m, x: (fft.rfft(x) @ (m.z * math.inf).view(3, 1)).real, "not finite"),
        (lambda m, x: fft.rfft(x).abs().square() + 0 * x[:, :3], "power"),
        (lambda m, x: torch.stft(x, 4, return_complex=True).abs(), "not known"),
    ],
)
def test_other_complex_values_are_refused(function, reason):
    model = Lambda(function, z=torch.ones(3, dtype=torch.complex128))
    with pytest.raises(UnsupportedLayerError, match=reason):
        NetworkBound.trace(model, torch.randn(2, 4).double())
