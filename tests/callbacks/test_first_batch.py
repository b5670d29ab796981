"""`example_input="batch"`: the graph is traced with the first training batch, before its forward pass."""

import lightning.pytorch as lightning
import pytest
import torch
from support.trainers import make_module, weights_of
from torch import nn

from lightning_lip import LipschitzConstraint, LipschitzMonitor, LipschitzPenalty, certify

POINT = torch.zeros(1, 4)


def same(one, other):
    return torch.equal(weights_of(one), weights_of(other))


def norms(module):
    return torch.stack([torch.linalg.matrix_norm(module.net[i].weight, 2) for i in (0, 2, 4)])


@pytest.mark.parametrize(
    "make",
    [
        lambda example: [LipschitzPenalty(0.1, example_input=example)],
        lambda example: [LipschitzMonitor(), LipschitzPenalty(0.1, example_input=example)],
        lambda example: [LipschitzPenalty(0.1, example_input=example), LipschitzMonitor()],
        lambda example: [LipschitzConstraint(0.05, example_input=example)],
    ],
    ids=["penalty", "monitor first", "monitor last", "constraint"],
)
def test_trains_as_with_the_input_itself(fit, pl, make):
    expected, reference = fit(*make(POINT), package=pl, max_epochs=2)
    module, trainer = fit(*make("batch"), package=pl, max_epochs=2)
    assert same(module, expected)
    assert not same(module, fit(package=pl, max_epochs=2)[0])
    assert trainer.callback_metrics["lipschitz/bound"] == reference.callback_metrics["lipschitz/bound"]


def test_the_monitors_own_iteration(fit):
    _, trainer = fit(LipschitzMonitor(example_input="batch"))
    _, reference = fit(LipschitzMonitor(example_input=POINT))
    assert trainer.callback_metrics["lipschitz/bound"] == reference.callback_metrics["lipschitz/bound"]


def test_a_key_of_a_batch_of_another_form(fit):
    class Keyed(type(make_module(lightning))):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch["x"], batch["y"]), batch_idx)

    data = torch.utils.data.DataLoader([{"y": x[:1], "x": x} for x in torch.randn(12, 4)], batch_size=4)
    fit(penalty := LipschitzPenalty(example_input="batch:x"), module=Keyed(), data=data)
    assert penalty.regularizer.bound_kind == "bound"
    with pytest.raises(ValueError, match=r"finds no input in the first training batch, a dict with the keys"):
        fit(LipschitzPenalty(example_input="batch"), module=Keyed(), data=data)


def test_a_graph_without_a_bound_is_refused_since_the_input_is_explicit(fit, make_module):
    class Squared(nn.Linear):
        def forward(self, x):
            return super().forward(x).square()

    with pytest.raises(ValueError, match="power has no finite"):
        fit(LipschitzPenalty(example_input="batch"), module=make_module(lightning, net=Squared(4, 1)))


@pytest.mark.parametrize("epochs", [1, 2])
def test_resumed_equals_uninterrupted_bit_for_bit(fit, tmp_path, epochs):
    def callbacks():
        return [LipschitzMonitor(), LipschitzPenalty(0.1, example_input="batch", warmup_steps=20)]

    whole, _ = fit(*callbacks(), max_epochs=3)
    _, first = fit(*callbacks(), max_epochs=epochs)
    first.save_checkpoint(tmp_path / "part.ckpt")
    resumed, trainer = fit(*callbacks(), max_epochs=3, ckpt_path=tmp_path / "part.ckpt")
    assert same(whole, resumed)
    # The histories of the figures go on too.
    assert (
        len(trainer.callbacks[0].state_dict()["histories"]["lipschitz"][0])
        == len(first.callbacks[0].state_dict()["histories"]["lipschitz"][0]) * 3 // epochs
    )


def test_resumed_in_the_middle_of_an_epoch(fit, tmp_path):
    saving = lightning.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=5, save_top_k=-1, filename="{step}")
    fit(LipschitzPenalty(0.1, example_input="batch"), saving, enable_checkpointing=True)
    # Lightning does not go on in the middle of the data: what is told apart is where the input came from.
    resumed, other = (
        fit(LipschitzPenalty(0.1, example_input=example), ckpt_path=tmp_path / "step=5.ckpt")[0]
        for example in ("batch", POINT)
    )
    assert same(resumed, other)


def test_a_loaded_state_is_kept_until_the_first_batch(fit):
    fit(first := LipschitzPenalty(0.1, example_input="batch"))
    loaded = first.state_dict()
    seen = []

    class Look(lightning.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            seen.append(penalty.state_dict()["regularizer"]["vectors"])

    penalty = LipschitzPenalty(0.1, example_input="batch")
    penalty.load_state_dict(loaded)
    fit(penalty, Look())
    assert all(torch.equal(seen[0][name], block) for name, block in loaded["regularizer"]["vectors"].items())


def test_fits_again_with_another_network(fit, make_module):
    penalty, monitor = LipschitzPenalty(0.1, example_input="batch"), LipschitzMonitor()
    fit(penalty, monitor)
    module = make_module(lightning, net=nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1)))
    fit(penalty, monitor, module=module)
    assert list(penalty.regularizer.spectral_norms()) == ["net.0", "net.2"]


def test_the_constraint_holds_from_the_first_forward_pass_on(fit, make_module):
    module, seen = make_module(lightning), []
    module.register_forward_pre_hook(lambda *_: seen.append(float(norms(module).prod())) if module.training else None)
    _, trainer = fit(LipschitzConstraint(0.05, example_input="batch"), module=module)
    assert 0 < seen[0] <= 0.05
    assert certify(module, POINT).upper <= 0.05
    assert trainer.callbacks[0].state_dict()["target"] == 0.05


@pytest.mark.parametrize("example_input", [None, "batch"])
def test_the_hooks_of_the_first_batch_are_gone_after_it(fit, example_input):
    penalty = LipschitzPenalty(example_input=example_input)
    skips = penalty.on_before_zero_grad is None  # where Lightning passes over None
    assert callable(penalty.on_train_batch_start)
    fit(penalty)
    assert (penalty.on_train_batch_start is None) == skips
    assert (penalty.on_before_backward is None) == skips


@pytest.mark.parametrize("watch", [{}, {"monitor": "lipschitz/product"}])
def test_who_monitors_what_this_training_does_not_log_is_told_at_the_start(fit, make_module, tmp_path, watch):
    monitor = watch.get("monitor", "lipschitz/bound")
    checkpoint = lightning.callbacks.ModelCheckpoint(tmp_path, monitor=monitor)
    stopping = lightning.callbacks.EarlyStopping(monitor)
    example, right = (POINT, "bound") if watch else (None, "product")
    for own in ([LipschitzPenalty(example_input=example)], [LipschitzMonitor(example_input=example)]):
        module = make_module(lightning)
        before = weights_of(module).clone()
        message = rf"Monitored by (ModelC|Early)\w+ and (ModelC|Early)\w+: .*Use monitor='lipschitz/{right}'"
        with pytest.raises(RuntimeError, match=message):
            fit(*own, checkpoint, stopping, module=module, enable_checkpointing=True)
        assert torch.equal(weights_of(module), before)
    # What only warns, or is logged by the other of two, may be watched.
    fit(LipschitzPenalty(example_input=example), lightning.callbacks.EarlyStopping(monitor, strict=False))
    own_layers = LipschitzMonitor(layers="net.*", example_input=None if watch else POINT)
    fit(LipschitzPenalty(example_input=example), own_layers, lightning.callbacks.EarlyStopping(monitor))
