"""LipschitzMixin on real Trainers: the penalty in the loss, and its vectors in the checkpoint."""

import copy
import pickle

import lightning.pytorch as lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from support.trainers import error_to_loss, make_module, make_trainer, weights_of
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lip import LipschitzMixin, LipschitzRegularizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*ReduceLROnPlateau.*"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval.*"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory.*exists and is not empty.*"),
]

COEFFICIENT = 0.05


def data():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(48, 4, generator=generator), torch.randn(48, 1, generator=generator)
    # Not shuffled: a resumed run must see the same batches.
    return DataLoader(TensorDataset(x, y), batch_size=8)


Plain = type(make_module(lightning))


class Penalised(LipschitzMixin, Plain):
    def penalty(self):
        return COEFFICIENT * self.lipschitz_penalty()

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + self.penalty()


class Configured(Penalised):
    def __init__(self, **kwargs):
        super().__init__()
        self.kwargs = kwargs
        self.calls = 0

    def configure_lipschitz(self):
        self.calls += 1
        return LipschitzRegularizer(self, **({"coefficient": COEFFICIENT} | self.kwargs))

    def penalty(self):
        return self.lipschitz_penalty()


def svd_product(weights):
    return COEFFICIENT * torch.stack([torch.linalg.matrix_norm(w, 2) for w in weights]).prod()


def fit(module, max_epochs=5, ckpt_path=None, package=lightning, **settings):
    trainer = make_trainer(package, max_epochs=max_epochs, **settings)
    trainer.fit(module, data(), ckpt_path=ckpt_path)
    return trainer


def vectors_of(module):
    return module.lipschitz_regularizer().state_dict()["vectors"]


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 3}, {"gradient_clip_val": 0.1}], ids=str)
@pytest.mark.parametrize("settings", [{"n_iterations": 20}, {"block_size": 16}], ids=str)
def test_training_equals_the_spectral_norm_by_svd_in_the_loss(options, settings):
    # Converged at every step: by many iterations of the default block, or by a block as wide as the layers.
    def train(term, mixin):
        module = Configured(**settings) if mixin else make_module(lightning, term)
        fit(module, **options)
        return module

    assert error_to_loss(train, svd_product, True) < 1e-3


def test_the_penalty_is_not_rounded_by_mixed_precision():
    values = []

    class Watching(Configured):
        def penalty(self):
            assert torch.is_autocast_enabled("cpu")
            value = super().penalty()
            values.append((value.item(), svd_product([p for p in self.parameters() if p.dim() == 2]).item()))
            assert value.dtype == torch.float32
            return value

    fit(Watching(block_size=16), precision="bf16-mixed", max_epochs=1)
    assert len(values) == 6
    for value, truth in values:
        assert value == pytest.approx(truth, rel=1e-5)


def test_the_default_is_a_thousandth_of_the_product_over_all_layers():
    module = Penalised()
    assert list(module.spectral_norms()) == ["net.0", "net.2", "net.4"]
    product = torch.stack(list(module.spectral_norms().values())).prod()
    assert module.lipschitz_bound().item() == pytest.approx(product.item(), rel=1e-6)
    assert module.lipschitz_penalty().item() == pytest.approx(1e-3 * product.item(), rel=1e-2)
    assert module.lipschitz_penalty().requires_grad
    with torch.no_grad():
        assert not module.lipschitz_bound().requires_grad


@pytest.mark.parametrize("of", ["lipschitz_bound", "lipschitz_log_bound"])
def test_a_bound_in_a_loss_has_its_gradient(of):
    module = Penalised()
    getattr(module, of)().backward()
    factor = 1.0 if of == "lipschitz_log_bound" else module.lipschitz_bound().item()
    for layer in module.net[::2]:
        u, s, v = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
        assert torch.allclose(layer.weight.grad, factor / s[0] * torch.outer(u[:, 0], v[0]), atol=0.02 * factor)


def test_the_configured_regularizer_is_made_once():
    module = Configured(coefficient=2.0, penalty="layer_sum", layers="net.0")
    assert module.calls == 0
    module.lipschitz_penalty()
    module.lipschitz_bound()
    assert list(module.spectral_norms()) == ["net.0"]
    assert module.calls == 1
    norm = module.spectral_norms()["net.0"].item()
    assert module.lipschitz_penalty().item() == pytest.approx(2 * norm, rel=1e-2)
    fit(module, max_epochs=1)
    assert module.calls == 1


def test_nothing_is_registered_in_the_module():
    module, plain = Penalised(), Plain()
    module.lipschitz_penalty()
    assert module.state_dict().keys() == plain.state_dict().keys()
    assert [n for n, _ in module.named_modules()] == [n for n, _ in plain.named_modules()]


def test_an_interrupted_run_resumed_is_the_uninterrupted_run(tmp_path):
    def run(max_epochs, ckpt_path=None):
        module = Configured(block_size=2)  # far from converged, so that lost vectors would show
        trainer = fit(
            module,
            max_epochs,
            ckpt_path,
            enable_checkpointing=True,
            default_root_dir=tmp_path,
            callbacks=[ModelCheckpoint(tmp_path, filename=f"{max_epochs}", save_top_k=-1)],
        )
        return module, trainer

    whole, _ = run(4)
    _, first = run(2)
    path = first.checkpoint_callback.best_model_path
    resumed, _ = run(4, path)
    assert torch.equal(weights_of(resumed), weights_of(whole))
    for name, vectors in vectors_of(whole).items():
        assert torch.equal(vectors_of(resumed)[name], vectors)
    checkpoint = torch.load(path, weights_only=True)
    assert set(checkpoint["lipschitz"]["vectors"]) == {"net.0", "net.2", "net.4"}
    del checkpoint["lipschitz"]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    forgetful, _ = run(4, tmp_path / "old.ckpt")
    # A checkpoint from before the mixin loads; its vectors start afresh, and here that shows.
    assert torch.isfinite(weights_of(forgetful)).all()
    assert not torch.equal(weights_of(forgetful), weights_of(whole))


def test_vectors_survive_loading_and_saving_without_use(tmp_path):
    module = Penalised()
    trainer = fit(module, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    expected = torch.load(tmp_path / "first.ckpt", weights_only=True)["lipschitz"]["vectors"]
    loaded = Penalised.load_from_checkpoint(tmp_path / "first.ckpt")
    again = {}
    loaded.on_save_checkpoint(again)
    assert again["lipschitz"]["vectors"].keys() == expected.keys()
    assert all(torch.equal(again["lipschitz"]["vectors"][k], v) for k, v in expected.items())
    assert all(torch.equal(vectors_of(loaded)[k], v) for k, v in expected.items())


def test_loading_replaces_the_vectors_in_use(tmp_path):
    module = Penalised()
    fit(module, max_epochs=1).save_checkpoint(tmp_path / "m.ckpt")
    other = Penalised()
    other.lipschitz_penalty()
    other.on_load_checkpoint(torch.load(tmp_path / "m.ckpt", weights_only=True))
    assert all(torch.equal(vectors_of(other)[k], v) for k, v in vectors_of(module).items())


def test_a_mixin_that_was_never_used_adds_nothing_to_the_checkpoint():
    checkpoint = {}
    Penalised().on_save_checkpoint(checkpoint)
    assert checkpoint == {}
    module = Penalised()
    module.on_load_checkpoint({})
    assert module.lipschitz_penalty().isfinite()


def test_the_modules_own_checkpoint_hooks_still_run():
    class Base(Plain):
        def on_save_checkpoint(self, checkpoint):
            checkpoint["own"] = 1

        def on_load_checkpoint(self, checkpoint):
            self.loaded = checkpoint["own"]

    class Module(LipschitzMixin, Base):
        pass

    module, checkpoint = Module(), {}
    module.lipschitz_penalty()
    module.on_save_checkpoint(checkpoint)
    assert checkpoint.keys() == {"own", "lipschitz"}
    module.on_load_checkpoint(checkpoint)
    assert module.loaded == 1


def test_validation_before_fitting_and_looking_during_it():
    class Looking(Configured):
        def validation_step(self, batch, batch_idx):
            before = copy.deepcopy(vectors_of(self)) if "_lipschitz_regularizer" in vars(self) else None
            self.log("bound", self.lipschitz_bound())
            self.lipschitz_penalty()
            self.spectral_norms()
            if before:
                assert all(torch.equal(vectors_of(self)[k], v) for k, v in before.items())

        def val_dataloader(self):
            return data()

    looking, blind = Looking(), Configured()
    trainer = make_trainer(lightning)
    trainer.validate(looking, verbose=False)
    with torch.no_grad():
        assert trainer.callback_metrics["bound"].item() == pytest.approx(looking.lipschitz_bound().item())
    # Validation looks at the penalty and changes nothing of the training.
    fit(looking, max_epochs=2)
    fit(blind, max_epochs=2)
    assert torch.equal(weights_of(looking), weights_of(blind))


def test_lbfgs_with_a_line_search():
    class Quasi(Configured):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), line_search_fn="strong_wolfe")

    module, without = Quasi(coefficient=0.5, block_size=16), Quasi(coefficient=0.0)
    fit(module, max_epochs=1)
    fit(without, max_epochs=1)
    assert weights_of(module).isfinite().all()
    assert module.lipschitz_bound() < 0.5 * without.lipschitz_bound()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copy_has_its_own_regularizer(copied):
    module = Penalised()
    module.lipschitz_penalty()
    bound = module.lipschitz_bound().item()
    other = copied(module)
    with torch.no_grad():
        other.net[0].weight.mul_(3)
    assert other.lipschitz_bound().item() == pytest.approx(3 * bound, rel=1e-5)
    assert module.lipschitz_bound().item() == bound


def test_the_other_lightning():
    pytorch_lightning = pytest.importorskip("pytorch_lightning")
    module = type("Module", (LipschitzMixin, type(make_module(pytorch_lightning, net=nn.Linear(4, 2)))), {})()
    module.training_step = lambda batch: module(batch[0]).square().mean() + module.lipschitz_penalty()
    before = module.lipschitz_bound().item()
    fit(module, 1, package=pytorch_lightning)
    assert module.lipschitz_bound().item() < before
    checkpoint = {}
    module.on_save_checkpoint(checkpoint)
    assert "lipschitz" in checkpoint


def test_the_mixin_must_come_first():
    with pytest.raises(TypeError, match=r"class Late\(LipschitzMixin, LightningModule\)"):

        class Late(lightning.LightningModule, LipschitzMixin):
            pass
