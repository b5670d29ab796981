"""LipschitzMonitor: what the loggers hold is read back and compared with the weights."""

import math

import lightning.pytorch as lightning
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from torch import nn

from lightning_lip import CertifiedValidation, LipschitzMixin, LipschitzMonitor, LipschitzPenalty, NoisyValidation
from lightning_lip.callbacks._figures import heat_map, share_chart
from lightning_lip.callbacks.monitor import MAX_HISTORY, _Source

LAYERS = ["net.0", "net.2", "net.4"]


def read_events(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    events.Reload()
    return events


def layout_of(events):
    tensor = events.Tensors("custom_scalars__config__")[-1].tensor_proto
    return layout_pb2.Layout.FromString(tensor.string_val[0])


def norms_of(module):
    return [float(torch.linalg.matrix_norm(module.net[i].weight.detach().double(), 2)) for i in (0, 2, 4)]


@pytest.fixture
def train(make_module, make_trainer, regression_data, tmp_path):
    """Train with a TensorBoard logger; return the module and the events."""

    def run(callbacks, package=lightning, module=None, **settings):
        module = module or make_module(package)
        logger = package.loggers.TensorBoardLogger(tmp_path, name="", version="run")
        defaults = {"max_epochs": 2, "log_every_n_steps": 4, "logger": logger}
        trainer = make_trainer(package, callbacks=callbacks, **(defaults | settings))
        trainer.fit(module, regression_data)
        return module, read_events(logger.log_dir) if trainer.logger is logger else None

    return run


def test_holds_every_tag_with_a_penalty(train, pl):
    # The monitor stands before the penalty: the order must not matter.
    module, events = train([LipschitzMonitor(), LipschitzPenalty(0.05)], package=pl)
    tags = {f"lipschitz/{kind}/{name}" for kind in ("spectral_norm", "log_share") for name in LAYERS}
    tags |= {"lipschitz/product", "lipschitz/product_upper", "lipschitz/penalty"}
    assert tags <= set(events.Tags()["scalars"])
    assert "lipschitz/spectral_norms" in events.Tags()["images"]
    # 24 steps, every 4th: Lightning's own x-axis, which counts from 0.
    assert [e.step for e in events.Scalars("lipschitz/product")] == [3, 7, 11, 15, 19, 23]
    last = {tag: events.Scalars(tag)[-1].value for tag in tags}
    norms = norms_of(module)
    assert [last[f"lipschitz/spectral_norm/{name}"] for name in LAYERS] == pytest.approx(norms, rel=1e-5)
    assert last["lipschitz/product"] == pytest.approx(math.prod(norms), rel=1e-5)
    assert last["lipschitz/penalty"] == pytest.approx(0.05 * math.prod(norms), rel=1e-5)
    assert sum(last[f"lipschitz/log_share/{name}"] for name in LAYERS) == pytest.approx(math.log(math.prod(norms)))
    assert last["lipschitz/product_upper"] >= math.prod(norms) * (1 - 1e-5)


def test_layout_shows_all_layers_in_one_chart_and_the_interval_as_a_margin(train):
    _, events = train([LipschitzMonitor(), LipschitzPenalty(0.05)])
    (category,) = layout_of(events).category
    charts = {chart.title: chart for chart in category.chart}
    assert list(charts["spectral norms"].multiline.tag) == [f"lipschitz/spectral_norm/{name}" for name in LAYERS]
    (series,) = charts["product, with its upper bound"].margin.series
    assert (series.value, series.lower, series.upper) == (
        "lipschitz/product",
        "lipschitz/product",
        "lipschitz/product_upper",
    )
    known = set(events.Tags()["scalars"])
    assert {tag for chart in category.chart for tag in chart.multiline.tag} <= known


def test_watches_without_a_penalty_and_changes_nothing(train):
    plain, _ = train([])
    watched, events = train([LipschitzMonitor()])
    assert torch.equal(plain.net[0].weight, watched.net[0].weight)
    assert "lipschitz/penalty" not in events.Tags()["scalars"]
    assert events.Scalars("lipschitz/product")[-1].value == pytest.approx(math.prod(norms_of(watched)), rel=1e-5)


def test_upper_bound_with_narrow_blocks(train):
    # Blocks of 2 on layers of 8 x 8: the bound is loose, never below.
    module, events = train([LipschitzMonitor(block_size=2, n_iterations=20)])
    product = math.prod(norms_of(module))
    assert events.Scalars("lipschitz/product")[-1].value == pytest.approx(product, rel=1e-3)
    assert product * 1.01 < events.Scalars("lipschitz/product_upper")[-1].value < product * 8**1.5


def test_own_selection(train):
    _, events = train([LipschitzMonitor(layers="net.2"), LipschitzPenalty(0.05)])
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("lipschitz/spectral_norm/")]
    assert tags == ["lipschitz/spectral_norm/net.2"]


def test_two_named_penalties_have_their_own_tags_and_charts(train):
    penalties = [
        LipschitzPenalty(0.05, layers="net.0", name="front"),
        LipschitzPenalty(0.1, exclude="net.0", name="rest"),
    ]
    _, events = train([*penalties, LipschitzMonitor()])
    tags = set(events.Tags()["scalars"])
    assert {"lipschitz/front/penalty", "lipschitz/rest/penalty", "lipschitz/rest/spectral_norm/net.4"} <= tags
    assert [category.title for category in layout_of(events).category] == ["lipschitz/front", "lipschitz/rest"]


def test_takes_the_mixins_layers(train, make_module):
    base = type(make_module(lightning))

    class Module(LipschitzMixin, base):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + 0.05 * self.lipschitz_penalty()

    module, events = train([LipschitzMonitor()], module=Module())
    # The mixin's default coefficient is 1: the factor in the loss is the user's own.
    assert events.Scalars("lipschitz/penalty")[-1].value == pytest.approx(math.prod(norms_of(module)), rel=1e-5)


def test_steps_of_an_accumulated_gradient(train):
    _, events = train([LipschitzMonitor()], accumulate_grad_batches=3)
    assert [e.step for e in events.Scalars("lipschitz/product")] == [3, 7]  # 8 steps, every 4th


def test_every_logger_and_none(make_module, make_trainer, regression_data, tmp_path):
    loggers = [CSVLogger(tmp_path, version="csv"), TensorBoardLogger(tmp_path, name="", version="tb")]
    for logger in (loggers, loggers[0], False):
        trainer = make_trainer(lightning, callbacks=[LipschitzMonitor()], logger=logger, log_every_n_steps=4)
        trainer.fit(make_module(lightning), regression_data)
        assert float(trainer.callback_metrics["lipschitz/product"]) > 0
    header = (tmp_path / "lightning_logs" / "csv" / "metrics.csv").read_text().splitlines()[0]
    assert "lipschitz/spectral_norm/net.2" in header
    assert "lipschitz/product" in read_events(tmp_path / "tb").Tags()["scalars"]


def test_resumed_history(make_module, make_trainer, regression_data, tmp_path):
    def trainer(epochs):
        logger = TensorBoardLogger(tmp_path, name="")
        return make_trainer(
            lightning, callbacks=[LipschitzMonitor(block_size=2)], max_epochs=epochs, log_every_n_steps=4, logger=logger
        )

    first = trainer(1)
    first.fit(make_module(lightning), regression_data)
    first.save_checkpoint(tmp_path / "one.ckpt")
    torch.load(tmp_path / "one.ckpt", weights_only=True)
    second = trainer(2)
    second.fit(make_module(lightning), regression_data, ckpt_path=tmp_path / "one.ckpt")
    whole = trainer(2)
    whole.fit(make_module(lightning), regression_data)
    resumed, uninterrupted = (t.callbacks[0].state_dict() for t in (second, whole))
    assert resumed["histories"] == uninterrupted["histories"]
    assert resumed["histories"]["lipschitz"][0] == [3, 7, 11, 15, 19, 23]
    assert torch.equal(resumed["own"]["vectors"]["net.2"], uninterrupted["own"]["vectors"]["net.2"])


def test_changes_no_mode_and_no_buffer(train):
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))

    class Check(lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            assert all(m.training for m in pl_module.modules())

    module, _ = train([LipschitzMonitor(exclude="net.1"), Check()], module=_module_with(net))
    assert int(module.net[1].num_batches_tracked) == 24


def _module_with(net):
    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net

        def training_step(self, batch, batch_idx):
            return nn.functional.mse_loss(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01)

    return Module()


def test_a_zero_layer_is_logged(train, make_module):
    module = make_module(lightning)
    with torch.no_grad():
        module.net[2].weight.zero_()
    module.net[2].weight.requires_grad_(False)
    _, events = train([LipschitzMonitor()], module=module)
    assert events.Scalars("lipschitz/spectral_norm/net.2")[-1].value == 0
    assert events.Scalars("lipschitz/product")[-1].value == 0


def test_history_is_thinned():
    source = _Source("lipschitz", None, None)
    for step in range(5 * MAX_HISTORY):
        source.remember(step, [1.0], [0.0])
    assert len(source.steps) <= MAX_HISTORY
    assert len(source.norms) == len(source.shares) == len(source.steps)
    assert set(source.steps) == set(range(0, 5 * MAX_HISTORY, source.spacing))


@pytest.mark.parametrize("n_layers", [1, 4, 100])
def test_heat_map_labels(n_layers):
    names = [f"block.{i}.linear" for i in range(n_layers)]
    figure = heat_map(names, [10], [[1.0] * n_layers])
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels[0] == names[0]
    assert len(labels) == min(n_layers, math.ceil(n_layers / math.ceil(n_layers / 40)))


def test_no_heat_map_before_the_first_logging_step():
    assert heat_map(["a"], [], []) is None


def test_bad_arguments():
    with pytest.raises(ValueError, match="`n_iterations` to be an integer of at least 1, got 0"):
        LipschitzMonitor(n_iterations=0)


@pytest.mark.parametrize(("every", "steps"), [(1, [7, 15, 23, 31]), (2, [15, 31]), (0, None)])
def test_figures_every_n_epochs(train, every, steps):
    _, events = train([LipschitzMonitor(figures_every_n_epochs=every)], max_epochs=4, limit_train_batches=8)
    if steps is None:
        assert not events.Tags()["images"]
    else:
        assert [e.step for e in events.Images("lipschitz/spectral_norms")] == steps


def test_the_other_tags_that_the_readme_names(make_module, make_trainer, regression_data, tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    certified = CertifiedValidation((0.1,), task="regression")
    callbacks = [LipschitzMonitor(certified=certified), NoisyValidation(noise_levels=(0.0, 0.2))]
    trainer = make_trainer(lightning, callbacks=callbacks, logger=logger, max_epochs=1, log_every_n_steps=4)
    trainer.fit(make_module(lightning), regression_data, regression_data)
    tags = set(read_events(logger.log_dir).Tags()["scalars"])
    assert {"lipschitz/certified", "val/certified_worst_case_mae/eps=0.1"} <= tags
    assert {"val/noisy_mae/eta=0", "val/noisy_mae/eta=0.2"} <= tags
