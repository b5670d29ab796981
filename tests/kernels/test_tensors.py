"""Products of fp32 are taken in fp32 inside a context, whatever the program allows, and it gets its settings back."""

from types import SimpleNamespace

import pytest
import torch
from support.networks import mlp

from lightning_lip.certificates.interval import certify
from lightning_lip.certificates.jacobians import largest_jacobian_norm
from lightning_lip.kernels.tensors import full_fp32

BACKENDS = torch.backends
IS_NEW = hasattr(BACKENDS.cuda.matmul, "fp32_precision")
newer = pytest.mark.skipif(not IS_NEW, reason="this torch has the older switches only")


def places():
    cpu, cudnn = BACKENDS.mkldnn, BACKENDS.cudnn
    return [BACKENDS.cuda.matmul, cudnn.conv, cudnn.rnn, cpu.matmul, cpu.conv, cpu.rnn]


def settings():
    """Return what all switches say; the older ones raise where the newer ones say different things."""
    said = []
    for read in (
        torch.get_float32_matmul_precision,
        lambda: BACKENDS.cuda.matmul.allow_tf32,
        lambda: BACKENDS.cudnn.allow_tf32,
        *((lambda place=place: place.fp32_precision) for place in (places() if IS_NEW else ())),
    ):
        try:
            said.append(read())
        except RuntimeError:
            said.append("raises")
    return said


@pytest.fixture(autouse=True)
def _given_back():
    before = [place.fp32_precision for place in places()] if IS_NEW else []
    yield
    torch.set_float32_matmul_precision("highest")
    BACKENDS.cudnn.allow_tf32 = True
    if IS_NEW:
        BACKENDS.fp32_precision = "none"
        for place, precision in zip(places(), before, strict=True):
            place.fp32_precision = precision


def allow_by_precision():
    torch.set_float32_matmul_precision("medium")


def allow_by_switches():
    BACKENDS.cuda.matmul.allow_tf32 = True
    BACKENDS.cudnn.allow_tf32 = True


def allow_by_newer_switches():
    BACKENDS.cuda.matmul.fp32_precision = "tf32"
    BACKENDS.mkldnn.matmul.fp32_precision = "bf16"


def allow_everywhere():
    BACKENDS.fp32_precision = "tf32"


@newer
@pytest.mark.parametrize(
    "allow", [lambda: None, allow_by_precision, allow_by_switches, allow_by_newer_switches, allow_everywhere]
)
def test_all_products_are_in_fp32_and_the_settings_as_before(allow):
    allow()
    before = settings()
    with full_fp32():
        assert [place.fp32_precision for place in places()] == ["ieee"] * 6
    assert settings() == before
    with pytest.raises(KeyError), full_fp32():
        raise KeyError
    assert settings() == before


@newer
def test_what_follows_a_wider_setting_still_does():
    BACKENDS.fp32_precision = "tf32"
    with full_fp32():
        pass
    BACKENDS.fp32_precision = "ieee"
    assert BACKENDS.cuda.matmul.fp32_precision == "ieee"


def test_the_older_switches(monkeypatch):
    allow_by_precision()
    monkeypatch.setattr(BACKENDS.cuda, "matmul", SimpleNamespace())
    before = torch.get_float32_matmul_precision(), BACKENDS.cudnn.allow_tf32
    with full_fp32():
        assert (torch.get_float32_matmul_precision(), BACKENDS.cudnn.allow_tf32) == ("highest", False)
    assert (torch.get_float32_matmul_precision(), BACKENDS.cudnn.allow_tf32) == before


@newer
def test_the_measurements_of_a_certificate_are_in_fp32():
    model, seen = mlp(4, 8, 2), []
    x = torch.randn(2, 4)
    model.register_forward_hook(lambda *_: seen.append(BACKENDS.cuda.matmul.fp32_precision))
    allow_by_switches()
    assert certify(model, x).certified
    # The first is the export, which reads the older switches.
    assert seen[0] == "tf32"
    assert set(seen[1:]) == {"ieee"}
    seen.clear()
    largest_jacobian_norm(model, x, dtype=torch.float32)
    assert set(seen) == {"ieee"}
    assert BACKENDS.cuda.matmul.allow_tf32
