"""LipschitzMonitor: what the loggers hold is read back and compared with the weights."""

import math

import lightning.pytorch as lightning
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from support.trainers import TwoNets, svd_norms
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import metadata
from torch import nn

from lightning_lip import CertifiedValidation, LipschitzMixin, LipschitzMonitor, LipschitzPenalty
from lightning_lip.callbacks.monitoring.source import HEALTH
from lightning_lip.callbacks.tensorboard.figures import heat_map, share_chart

LAYERS = ["net.0", "net.2", "net.4"]


def read_events(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0, "histograms": 0})
    events.Reload()
    return events


def layout_of(events):
    tensor = events.Tensors("custom_scalars__config__")[-1].tensor_proto
    return layout_pb2.Layout.FromString(tensor.string_val[0])


@pytest.fixture
def train(fit, tmp_path):
    """Train with a TensorBoard logger; return the module and the events."""

    def run(callbacks, package=lightning, **settings):
        logger = package.loggers.TensorBoardLogger(tmp_path, name="", version="run")
        defaults = {"max_epochs": 2, "log_every_n_steps": 4, "logger": logger}
        module, _ = fit(*callbacks, package=package, **(defaults | settings))
        return module, read_events(logger.log_dir)

    return run


def test_holds_every_tag_with_a_penalty(train, pl):
    # The monitor stands before the penalty: the order must not matter.
    module, events = train([LipschitzMonitor(), LipschitzPenalty(0.05)], package=pl)
    tags = {f"lipschitz/{kind}/{name}" for kind in ("spectral_norm", "log_share", *HEALTH) for name in LAYERS}
    tags |= {"lipschitz/product", "lipschitz/product_upper", "lipschitz/penalty"}
    assert tags <= set(events.Tags()["scalars"])
    assert "lipschitz/spectral_norms" in events.Tags()["images"]
    # 24 steps, every 4th: Lightning's own x-axis, which counts from 0.
    assert [e.step for e in events.Scalars("lipschitz/product")] == [3, 7, 11, 15, 19, 23]
    last = {tag: events.Scalars(tag)[-1].value for tag in tags}
    norms = svd_norms(module)
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
    assert (series.value, series.lower) == ("lipschitz/product",) * 2
    assert series.upper == "lipschitz/product_upper"
    known = set(events.Tags()["scalars"])
    assert {tag for chart in category.chart for tag in chart.multiline.tag} <= known


def test_watches_without_a_penalty_and_changes_nothing(train):
    plain, _ = train([])
    watched, events = train([LipschitzMonitor()])
    assert torch.equal(plain.net[0].weight, watched.net[0].weight)
    assert "lipschitz/penalty" not in events.Tags()["scalars"]
    assert events.Scalars("lipschitz/product")[-1].value == pytest.approx(math.prod(svd_norms(watched)), rel=1e-5)


def test_upper_bound_with_narrow_blocks(train):
    # Blocks of 2 on layers of 8 x 8: the bound is loose, never below.
    module, events = train([LipschitzMonitor(block_size=2, n_iterations=20)])
    product = math.prod(svd_norms(module))
    assert events.Scalars("lipschitz/product")[-1].value == pytest.approx(product, rel=1e-3)
    assert product * 1.01 < events.Scalars("lipschitz/product_upper")[-1].value < product * 8**1.5


def test_two_named_penalties_have_their_own_tags_and_charts(train):
    penalties = [
        LipschitzPenalty(0.05, layers="net.0", name="front"),
        LipschitzPenalty(0.1, exclude="net.0", name="rest"),
    ]
    _, events = train([*penalties, LipschitzMonitor()])
    tags = set(events.Tags()["scalars"])
    assert {"lipschitz/front/penalty", "lipschitz/rest/penalty", "lipschitz/rest/spectral_norm/net.4"} <= tags
    assert [category.title for category in layout_of(events).category] == ["lipschitz/front", "lipschitz/rest"]


def test_two_monitors_pair_with_the_penalties_of_their_name(train):
    penalties = [LipschitzPenalty(0.05, layers="net.0"), LipschitzPenalty(0.1, exclude="net.0", name="rest")]
    _, events = train([LipschitzMonitor(name="rest"), *penalties, LipschitzMonitor()])
    tags = {tag for tag in events.Tags()["scalars"] if "/spectral_norm/" in tag}
    assert tags == {"lipschitz/spectral_norm/net.0"} | {f"lipschitz/rest/spectral_norm/net.{i}" for i in (2, 4)}
    for tag in ("lipschitz/product", "lipschitz/penalty", "lipschitz/rest/product", "lipschitz/rest/penalty"):
        assert [e.step for e in events.Scalars(tag)] == [3, 7, 11, 15, 19, 23]


def test_a_named_monitor_leaves_other_penalties_to_log_themselves(train):
    module, events = train([LipschitzPenalty(0.05, name="all"), LipschitzMonitor(layers="net.0", name="first")])
    scalars = {tag for tag in events.Tags()["scalars"] if tag.startswith("lipschitz/")}
    first = ("product", "product_upper", *(f"{k}/net.0" for k in ("spectral_norm", "log_share", *HEALTH)))
    wanted = {f"lipschitz/first/{name}" for name in first} | {"lipschitz/all/product", "lipschitz/all/penalty"}
    assert scalars == wanted
    norms = svd_norms(module)
    assert events.Scalars("lipschitz/first/product")[-1].value == pytest.approx(norms[0], rel=1e-5)
    assert events.Scalars("lipschitz/all/product")[-1].value == pytest.approx(math.prod(norms), rel=1e-5)


def test_the_penalty_is_logged_beside_a_monitor_of_other_layers(train):
    module, events = train([LipschitzMonitor(layers="net.2"), LipschitzPenalty(0.05)])
    norms = svd_norms(module)
    assert events.Scalars("lipschitz/penalty")[-1].value == pytest.approx(0.05 * math.prod(norms), rel=1e-5)
    assert events.Scalars("lipschitz/product")[-1].value == pytest.approx(norms[1], rel=1e-5)
    assert len(events.Scalars("lipschitz/product")) == 6


def test_two_monitors_need_names(make_trainer):
    with pytest.raises(RuntimeError, match="state_key"):
        make_trainer(lightning, callbacks=[LipschitzMonitor(), LipschitzMonitor()])


def test_takes_the_mixins_layers(train, make_module):
    base = type(make_module(lightning))

    class Module(LipschitzMixin, base):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + 0.05 * self.lipschitz_penalty()

    module, events = train([LipschitzMonitor()], module=Module())
    # The mixin's default coefficient; the factor in the loss is the user's own.
    product = math.prod(svd_norms(module))
    assert events.Scalars("lipschitz/penalty")[-1].value == pytest.approx(1e-3 * product, rel=1e-5)


def test_steps_of_an_accumulated_gradient(train):
    _, events = train([LipschitzMonitor()], accumulate_grad_batches=3)
    assert [e.step for e in events.Scalars("lipschitz/product")] == [3, 7]  # 8 steps, every 4th


def test_resumed_history(fit, tmp_path):
    def run(epochs, ckpt_path=None):
        logging = {"logger": TensorBoardLogger(tmp_path, name=""), "log_every_n_steps": 4}
        return fit(LipschitzMonitor(block_size=2), max_epochs=epochs, ckpt_path=ckpt_path, **logging)[1]

    run(1).save_checkpoint(tmp_path / "one.ckpt")
    resumed, uninterrupted = (run(2, path).callbacks[0].state_dict() for path in (tmp_path / "one.ckpt", None))
    assert resumed["histories"] == uninterrupted["histories"]
    assert resumed["histories"]["lipschitz"][0] == [3, 7, 11, 15, 19, 23]
    assert torch.equal(resumed["own"]["vectors"]["net.2"], uninterrupted["own"]["vectors"]["net.2"])


def test_a_history_of_other_layers_is_not_drawn_beside_these(fit, tmp_path):
    def monitor(layers, epochs, ckpt_path=None):
        settings = {"logger": TensorBoardLogger(tmp_path, name=""), "log_every_n_steps": 4, "ckpt_path": ckpt_path}
        return fit(LipschitzMonitor(layers), max_epochs=epochs, **settings)[1]

    monitor(None, 1).save_checkpoint(tmp_path / "three.ckpt")
    histories = monitor(["net.0", "net.2"], 2, tmp_path / "three.ckpt").callbacks[0].state_dict()["histories"]
    assert histories["lipschitz"][0] == [15, 19, 23]
    assert [len(row) for row in histories["lipschitz"][1]] == [2, 2, 2]


HISTORY = [[3, 7], [[1.0, math.nan], [math.inf, 2]], [[0.0, math.nan], [math.inf, 0.5]], 1, 2]
VECTORS = {"net.0": torch.ones(2, 4)}


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"histories": None}, TypeError, "`histories` to be a mapping"),
        ({"histories": {"a": "steps"}}, TypeError, r"`histories\['a'\]` to be a list \[steps"),
        ({"histories": {"a": HISTORY[:4]}}, ValueError, r"`histories\['a'\]` to be a list \[steps"),
        ({"histories": {"a": [[0.5, 7], *HISTORY[1:]]}}, ValueError, r"`histories\['a'\]: steps\[0\]` to be an int"),
        ({"histories": {"a": [[-1, 7], *HISTORY[1:]]}}, ValueError, r"`histories\['a'\]: steps\[0\]` to be an int"),
        ({"histories": {"a": [*HISTORY[:3], 0, 2]}}, ValueError, r"`histories\['a'\]: spacing` .* at least 1, got 0"),
        ({"histories": {"a": [*HISTORY[:4], "2"]}}, ValueError, r"`histories\['a'\]: seen` .* at least 0, got '2'"),
        ({"histories": {"a": [[3, 7], [["x", 1], [2, 3]], *HISTORY[2:]]}}, TypeError, "norms and shares"),
        ({"histories": {"a": [[3, 7], 5, *HISTORY[2:]]}}, TypeError, r"`histories\['a'\]` to be a list"),
        ({"histories": {"a": [[3], *HISTORY[1:]]}}, ValueError, "1 steps, 2 and 2 rows, of lengths"),
        ({"histories": {"a": [[3, 7], [[1.0], [2, 3]], *HISTORY[2:]]}}, ValueError, r"lengths \[1, 2\]"),
        ({"histories": {"a": [*HISTORY, {"a/x": 1.0}]}}, ValueError, r"`histories\['a'\]` to be a list \[steps"),
        ({"histories": {"a": [*HISTORY, 1.0, 2.0]}}, TypeError, r"`histories\['a'\]: first` to be a mapping"),
        ({"histories": {"a": [*HISTORY, {"a/x": 1.0}, {"a/x": "2"}]}}, TypeError, r"`histories\['a'\]: last`"),
        (
            {"histories": {"a": [*HISTORY, {"a/x": 1.0}, {"a/y": 2.0}]}},
            ValueError,
            "first and a last value of",
        ),
        ({"own": "vectors"}, TypeError, "The state's `own` expected a state"),
        ({"own": {}}, ValueError, "The state's `own` expected a state"),
        ({"own": {"vectors": [1]}}, TypeError, r"`own\['vectors'\]` to be a mapping"),
        ({"own": {"vectors": {"net.0": torch.ones(4)}}}, TypeError, r"`own\['vectors'\]\['net.0'\]`"),
        ({"own": {"vectors": {"net.0": None}}}, TypeError, r"`own\['vectors'\]\['net.0'\]`"),
    ],
)
def test_a_state_is_checked_value_by_value(changed, error, message):
    ends = {"lipschitz/product": math.nan}, {"lipschitz/product": 2.0}
    right = {"histories": {"lipschitz": HISTORY, "lipschitz/a": [*HISTORY, *ends]}, "own": {"vectors": VECTORS}}
    monitor = LipschitzMonitor()
    monitor.load_state_dict(right)
    with pytest.raises(error, match=message):
        monitor.load_state_dict(right | changed)
    assert monitor.state_dict() == right


def test_changes_no_mode_and_no_buffer(train, make_module):
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))

    class Check(lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            assert all(m.training for m in pl_module.modules())

    train([LipschitzMonitor(exclude="net.1"), Check()], module=make_module(lightning, net=net))
    assert int(net[1].num_batches_tracked) == 24


def test_a_zero_layer_is_logged(train, make_module):
    module = make_module(lightning)
    with torch.no_grad():
        module.net[2].weight.zero_()
    module.net[2].weight.requires_grad_(False)
    _, events = train([LipschitzMonitor()], module=module)
    assert events.Scalars("lipschitz/spectral_norm/net.2")[-1].value == 0
    assert events.Scalars("lipschitz/product")[-1].value == 0


def test_weights_that_are_not_finite_stop_no_training(train, make_module):
    module = make_module(lightning)
    with torch.no_grad():
        module.net[0].weight.fill_(math.nan)
        module.net[2].weight.fill_(math.inf)
    _, events = train([LipschitzMonitor()], module=module)
    assert math.isnan(events.Scalars("lipschitz/product")[-1].value)
    assert {"lipschitz/spectral_norms", "lipschitz/log_shares"} <= set(events.Tags()["images"])


class Steps(lightning.Callback):
    """Keeps the weights of each layer before and after every batch, and counts the copies that the monitor holds."""

    def __init__(self):
        self.before, self.after, self.n_copies = [], [], []

    def weights(self, module):
        return [p.detach().clone() for p in module.parameters() if p.dim() == 2]

    def on_train_batch_start(self, trainer, pl_module, *_):
        self.before.append(self.weights(pl_module))
        self.count(trainer)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.count(trainer)

    def count(self, trainer):
        (monitor,) = (c for c in trainer.callbacks if isinstance(c, LipschitzMonitor))
        self.n_copies.append(sum(len(source.weights._kept) for source in monitor._sources))

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.after.append(self.weights(pl_module))


def test_health_of_every_layer(train):
    _, events = train([steps := Steps(), LipschitzMonitor(), LipschitzPenalty(0.05)])
    for index, name in enumerate(LAYERS):
        logged = {kind: events.Scalars(f"lipschitz/{kind}/{name}") for kind in HEALTH}
        for position, step in enumerate([3, 7, 11, 15, 19, 23]):
            before, after = steps.before[step][index].double(), steps.after[step][index].double()
            norm = float(after.norm())
            wanted = {
                "weight_norm": norm,
                "stable_rank": norm**2 / float(torch.linalg.svdvals(after)[0]) ** 2,
                "update_ratio": float((after - before).norm() / before.norm()),
            }
            assert wanted["update_ratio"] > 1e-4
            for kind, value in wanted.items():
                event = logged[kind][position]
                assert (event.step, event.value) == (step, pytest.approx(value, rel=1e-4)), kind


def test_weights_are_copied_for_a_logging_step_only(train):
    _, events = train([LipschitzMonitor(layers="net.*"), steps := Steps()], max_epochs=1)
    # At the start of each batch and right before its step; every fourth one is logged.
    assert steps.n_copies == [0, 0, 0, 0, 0, 0, 0, 3] * 3
    assert len(events.Scalars("lipschitz/update_ratio/net.0")) == 3


def test_health_can_be_switched_off(train, told):
    _, events = train([LipschitzMonitor(health=False, summary=False)])
    assert not {tag.split("/")[1] for tag in events.Tags()["scalars"]} & set(HEALTH)
    assert not any(text.startswith("LipschitzMonitor after") for text in told)
    (category,) = layout_of(events).category
    assert not {chart.title for chart in category.chart} & {"weight norms", "stable ranks", "update ratios"}


def test_the_update_of_a_batch_with_two_optimizers_is_that_of_both(train):
    _, events = train([LipschitzMonitor(), steps := Steps()], module=TwoNets())
    for index, name in enumerate(["a", "b.0", "b.2"]):
        before, after = steps.before[-1][index], steps.after[-1][index]
        ratio = float((after - before).norm() / before.norm())
        assert events.Scalars(f"lipschitz/update_ratio/{name}")[-1].value == pytest.approx(ratio, rel=1e-4)


def test_the_health_of_a_convolution_is_its_kernels(train, make_module):
    net = nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 2, padding=1), nn.Flatten(), nn.Linear(27, 1))
    _, events = train([LipschitzMonitor(n_iterations=20)], module=make_module(lightning, net=net))
    norm = float(net[1].weight.detach().norm())
    sigma = events.Scalars("lipschitz/spectral_norm/net.1")[-1].value
    assert events.Scalars("lipschitz/weight_norm/net.1")[-1].value == pytest.approx(norm, rel=1e-5)
    assert events.Scalars("lipschitz/stable_rank/net.1")[-1].value == pytest.approx(norm**2 / sigma**2, rel=1e-5)


def test_a_page_at_the_end_tells_first_and_last_values(train, told):
    _, events = train([LipschitzMonitor(), LipschitzPenalty(0.05)])
    (page,) = (text for text in told if text.startswith("LipschitzMonitor after 24 steps"))
    lines = [line.split() for line in page.splitlines()[1:]]
    assert lines[0] == ["layer", "spectral", "norm", "weight", "norm", "stable", "rank", "update", "ratio"]
    for name, line in zip(LAYERS, lines[1:4], strict=True):
        wanted = [name]
        for kind in ("spectral_norm", *HEALTH):
            values = [event.value for event in events.Scalars(f"lipschitz/{kind}/{name}")]
            wanted += [f"{values[0]:.3g}", "->", f"{values[-1]:.3g}"]
        assert line == wanted
    assert [line[0] for line in lines[4:]] == [f"lipschitz/{n}" for n in ("product", "product_upper", "penalty")]


def test_without_a_logger_the_page_is_told_too(fit, told):
    fit(LipschitzMonitor(), max_epochs=2)
    (page,) = (text for text in told if text.startswith("LipschitzMonitor after 24 steps"))
    assert "update ratio" in page


@pytest.mark.parametrize("n_layers", [1, 4, 100])
def test_heat_map_labels(n_layers):
    names = [f"block.{i}.linear" for i in range(n_layers)]
    figure = heat_map(names, [10], [[1.0] * n_layers])
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels[0] == names[0]
    assert len(labels) == min(n_layers, math.ceil(n_layers / math.ceil(n_layers / 40)))


def test_spectra_are_the_singular_values(train):
    # Blocks of 8 on layers of at most 8: all singular values. Two epochs of 12 steps.
    module, events = train([LipschitzMonitor(n_iterations=10)])
    tags = [f"lipschitz/spectrum/{name}" for name in LAYERS]
    assert set(tags) <= set(events.Tags()["histograms"])
    for tag, index in zip(tags, (0, 2, 4), strict=True):
        histograms = events.Histograms(tag)
        assert [h.step for h in histograms] == [11, 23]
        values = torch.linalg.svdvals(module.net[index].weight.detach().double())
        last = histograms[-1].histogram_value
        assert (last.num, last.max) == (len(values), pytest.approx(float(values[0]), rel=1e-4))
        assert last.sum_squares == pytest.approx(float(values.square().sum()), rel=1e-4)


def test_log_shares_are_drawn_and_sum_to_the_log_of_the_product(train):
    module, events = train([LipschitzMonitor(), LipschitzPenalty(0.05)])
    assert [e.step for e in events.Images("lipschitz/log_shares")] == [11, 23]
    shares = [events.Scalars(f"lipschitz/log_share/{name}")[-1].value for name in LAYERS]
    figure = share_chart(LAYERS, [10, 20], [[2.0, 1.0, -0.5], shares], "product")
    (axes,) = figure.axes
    line = axes.lines[-1].get_ydata()
    assert list(line) == pytest.approx([2.5, math.log(math.prod(svd_norms(module)))], rel=1e-4)
    # Above zero the layers of the first step stand on each other, below it the rest hangs.
    tops = [max(path.vertices[:, 1].max() for path in area.get_paths()) for area in axes.collections]
    lows = [min(path.vertices[:, 1].min() for path in area.get_paths()) for area in axes.collections]
    assert max(tops) == pytest.approx(3.0)
    assert min(lows) == pytest.approx(min(-0.5, sum(min(share, 0.0) for share in shares)))


@pytest.mark.parametrize("n_layers", [1, 12, 100])
def test_log_shares_of_one_step_a_zero_layer_and_many_layers(n_layers):
    names = [f"block.{i}.linear" for i in range(n_layers)]
    rows = [[0.1] * n_layers, [-math.inf] + [0.1] * (n_layers - 1), [0.2] * n_layers]
    for steps in (1, 3):
        figure = share_chart(names, list(range(steps)), rows[:steps], "bound")
        figure.canvas.draw()
        assert len(figure.axes) == (1 if n_layers <= 12 else 2)  # a colour bar instead of a legend
        total = figure.axes[0].lines[-1].get_ydata()
        assert [bool(math.isfinite(y)) for y in total] == ([True] * 2 if steps == 1 else [True, False, True])
    assert share_chart(names, [], [], "bound") is heat_map(names, [], []) is None


def session_of(events):
    """Return what TensorBoard keeps of a run's hyperparameters and metrics: the first entry of each."""
    contents = [events.summary_metadata[tag] for tag in (metadata.SESSION_START_INFO_TAG, metadata.EXPERIMENT_TAG)]
    start, experiment = (summary.plugin_data.content for summary in contents)
    hparams = metadata.parse_session_start_info_plugin_data(start).hparams
    values = {name: getattr(value, value.WhichOneof("kind")) for name, value in hparams.items()}
    infos = metadata.parse_experiment_plugin_data(experiment)
    metrics = [info.name.tag for info in infos.metric_infos]
    return values, {info.name for info in infos.hparam_infos}, metrics


@pytest.mark.parametrize("saves", [True, False])
def test_hyperparameters_stand_beside_the_users_own(train, pl, make_module, tmp_path, saves):
    base = type(make_module(pl))

    class Module(base):
        def __init__(self, width=8, nested=None):
            super().__init__()
            if saves:
                self.save_hyperparameters()

    monitors = pl.callbacks.EarlyStopping("val_loss", check_on_train_epoch_end=False, strict=False)
    penalty = LipschitzPenalty(0.05, layers=["net.0", "net.2"], target=2.0)
    _, events = train([LipschitzMonitor(), penalty, monitors], package=pl, module=Module(nested={"lr": 0.1}))
    values, columns, metrics = session_of(events)
    own = {"width": 8.0, "nested/lr": 0.1} if saves else {}
    assert values == own | {
        "lipschitz/penalty": "product",
        "lipschitz/coefficient": 0.05,
        "lipschitz/target": 2.0,
        "lipschitz/knee": 100.0,
        "lipschitz/every_n_steps": 1.0,
        "lipschitz/warmup_steps": 0.0,
        "lipschitz/layers": "net.0, net.2",
        "lipschitz/convolutions": "symbol",
    }
    assert columns == set(values)
    assert metrics == ["val_loss", "lipschitz/bound", "lipschitz/product", "lipschitz/penalty"]
    assert metadata.SESSION_END_INFO_TAG in events.summary_metadata
    # From hparams.yaml modules are built: it holds the user's own alone.
    text = (tmp_path / "run" / "hparams.yaml").read_text()
    assert ("width: 8" in text) == saves
    assert "lipschitz" not in text


def test_hyperparameters_without_a_penalty_have_the_same_columns(train):
    _, events = train([LipschitzMonitor(certified=CertifiedValidation())])
    values, columns, metrics = session_of(events)
    assert values == {"lipschitz/penalty": "none", "lipschitz/coefficient": 0.0}
    assert columns == {f"lipschitz/{name}" for name in LipschitzPenalty().hyperparameters}
    assert metrics[:2] == ["lipschitz/certified", "lipschitz/lower"]


def test_penalties_of_ones_own_are_named_in_the_hyperparameters():
    def my_penalty(log_sigma, log_bound):
        return log_bound

    named = LipschitzPenalty(0.1, my_penalty, layers=nn.Linear(2, 2), exclude="net.*").hyperparameters
    assert (named["penalty"], named["layers"], named["exclude"]) == ("my_penalty", "Linear", "net.*")


@pytest.mark.parametrize("settings", [{"log_every_n_steps": 5}, {"log_every_n_steps": 4, "max_steps": 10}])
def test_the_last_step_is_logged(train, settings):
    module, events = train([LipschitzMonitor(), LipschitzPenalty(0.05)], **settings)
    last = settings.get("max_steps", 24) - 1
    every = settings["log_every_n_steps"]
    product = events.Scalars("lipschitz/product")
    assert [e.step for e in product] == [*range(every - 1, last, every), last]
    assert product[-1].value == pytest.approx(math.prod(svd_norms(module)), rel=1e-4)


def test_nothing_is_logged_where_logging_is_off(train):
    _, events = train([LipschitzMonitor()], log_every_n_steps=0)
    assert "lipschitz/product" not in events.Tags()["scalars"]


def test_certified_interval_in_the_layout(train):
    callbacks = [LipschitzMonitor(), CertifiedValidation(task="regression")]  # also where it stands for itself
    _, events = train(callbacks, validation=True, max_epochs=1)
    (category,) = layout_of(events).category
    (chart,) = [chart for chart in category.chart if "certified" in chart.title]
    (series,) = chart.margin.series
    values = [events.Scalars(tag)[-1] for tag in (series.lower, series.value, series.upper)]
    assert 0 < values[0].value <= values[2].value
    assert len({e.step for e in values}) == 1  # or TensorBoard could draw no band


@pytest.mark.parametrize(("every", "steps"), [(1, [7, 15, 23, 31]), (2, [15, 31]), (0, None)])
def test_figures_every_n_epochs(train, every, steps):
    _, events = train([LipschitzMonitor(figures_every_n_epochs=every)], max_epochs=4, limit_train_batches=8)
    if steps is None:
        assert not events.Tags()["images"]
    else:
        assert [e.step for e in events.Images("lipschitz/spectral_norms")] == steps
