"""LightningCLI builds every callback from YAML and from the command line, with both Lightning packages."""

import importlib
import inspect

import pytest
import torch
import yaml
from support.trainers import QUIET

import lightning_lip

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # jsonargparse's look at NumPy's names

CALLBACKS = sorted(lightning_lip.callbacks.__all__)


def squared_log(log_sigma, log_bound):  # without annotations: the CLI must take it all the same
    return log_bound.square()


def to_xy(batch):
    return batch["x"], batch["y"]


# Every argument of every callback; `layers` and `exclude` as a name and as a list, callables by their import path.
ARGUMENTS = {
    "LipschitzPenalty": {
        "coefficient": 1e-3,
        "penalty": "hinge_log",
        "layers": ["net.0", "net.2"],
        "exclude": "net.2",
        "target": 2.0,
        "block_size": 4,
        "n_iterations": 2,
        "every_n_steps": 3,
        "warmup_steps": 5,
        "seed": 1,
        "example_input": "batch:0",
        "name": "a",
        "knee": 50.0,
        "unknown": "refuse",
        "batch_dim": None,
        "convolutions": "spatial",
    },
    "LipschitzMonitor": {
        "layers": "net.*",
        "exclude": ["net.2"],
        "block_size": 4,
        "n_iterations": 2,
        "seed": 1,
        "example_input": None,
        "figures_every_n_epochs": 0,
        "certified": {"class_path": "CertifiedValidation", "init_args": {"eps": [0.1], "task": "regression"}},
        "name": "a",
        "unknown": "refuse",
        "health": False,
        "summary": False,
        "batch_dim": None,
        "convolutions": "spatial",
    },
    "NoisyValidation": {
        "noise_levels": [0.0, 0.2],
        "feature_min": [0.0, 0.0, 0.0, 0.0],
        "feature_max": 1.5,
        "symmetric": True,
        "seed": 1,
        "batch_to_xy": f"{__name__}.to_xy",
        "prefix": "val/noise",
    },
    "CertifiedValidation": {
        "eps": [0.1, 0.2],
        "task": "regression",
        "batch_to_xy": f"{__name__}.to_xy",
        "prefix": "test",
        "max_inputs": 8,
        "batch_dim": None,
        "head": "net.2",
        "curve": "curve.csv",
    },
    "LipschitzConstraint": {
        "target": 3.0,
        "method": "log_clip",
        "metric": "euclidean",
        "layers": ["net.*"],
        "exclude": "net.2",
        "every_n_steps": 2,
        "initial_target": 5.0,
        "tighten_steps": 4,
        "example_input": None,
        "block_size": 4,
        "n_iterations": 2,
        "seed": 1,
        "name": "a",
        "batch_dim": None,
        "convolutions": "spatial",
    },
    "SpectralCaps": {
        "radius": "mup",
        "layers": ["net.*"],
        "exclude": "net.2",
        "block_size": 4,
        "n_iterations": 2,
        "every_n_steps": 2,
        "seed": 1,
        "name": "a",
        "unknown": "refuse",
        "convolutions": "spatial",
    },
    "MaxNorm": {"max_value": 3.0, "layers": ["net.*"], "exclude": "net.2", "unknown": "refuse"},
}


@pytest.fixture
def cli(pl, make_module, tmp_path):
    """Return a LightningCLI of a regression module, run with the arguments given; without any command, not run."""
    module = type(make_module(pl))
    data = torch.utils.data.TensorDataset(torch.ones(8, 4), torch.ones(8, 1))

    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            return torch.utils.data.DataLoader(data, batch_size=4)

        val_dataloader = train_dataloader

    def build(config=None, arguments=(), run=False):
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump({"trainer": QUIET | ({} if config is None else {"callbacks": config})}))
        make = importlib.import_module(f"{pl.__name__}.cli").LightningCLI
        args = [*(["fit"] if run else []), f"--config={path}", *arguments]
        return make(module, Data, args=args, run=run, save_config_callback=None)

    return build


def built(cli, name):
    (callback,) = [c for c in cli.trainer.callbacks if type(c).__name__ == name]
    return callback


def contents(callback):
    """Return what a callback holds, as text; of a callback in it what that one holds."""
    return repr(
        {k: contents(v) if isinstance(v, lightning_lip.CertifiedValidation) else v for k, v in vars(callback).items()}
    )


def test_the_arguments_are_complete():
    assert sorted(ARGUMENTS) == [name for name in CALLBACKS if name in lightning_lip.__all__]
    for name, arguments in ARGUMENTS.items():
        assert list(arguments) == list(inspect.signature(getattr(lightning_lip, name)).parameters)


@pytest.mark.parametrize("path", ["{}", "lightning_lip.{}", "lightning_lip.callbacks.{}"])
@pytest.mark.parametrize("name", CALLBACKS)
def test_every_argument_from_yaml(cli, name, path):
    callback = built(cli([{"class_path": path.format(name), "init_args": ARGUMENTS[name]}]), name)
    assert type(callback) is getattr(lightning_lip, name)
    resolved = {key: to_xy if key == "batch_to_xy" else value for key, value in ARGUMENTS[name].items()}
    if "certified" in resolved:
        resolved["certified"] = lightning_lip.CertifiedValidation(**resolved["certified"]["init_args"])
    assert contents(callback) == contents(getattr(lightning_lip, name)(**resolved))


def test_trains_from_the_command_line(cli):
    arguments = ["--trainer.callbacks+=LipschitzPenalty", "--trainer.callbacks.coefficient=1e-2"]
    arguments += ["--trainer.callbacks.layers=net.*", "--trainer.callbacks+=LipschitzMonitor"]
    penalty = built(cli(arguments=arguments, run=True), "LipschitzPenalty")
    assert penalty.coefficient == 1e-2
    assert penalty.state_dict()["n_steps"] == 2


def test_own_penalty_without_annotations(cli):
    config = [{"class_path": "LipschitzPenalty", "init_args": {"penalty": f"{__name__}.squared_log"}}]
    penalty = built(cli(config, run=True), "LipschitzPenalty")
    log_sigma = penalty.regularizer.log_sigma()
    assert float(penalty.penalty_of(log_sigma)) == pytest.approx(1e-3 * float(log_sigma.sum()) ** 2)


@pytest.mark.parametrize("value", ["[1, 4]", "abc", "{x: 1}"])
def test_an_example_input_that_holds_no_tensor(cli, value):
    arguments = ["--trainer.callbacks+=LipschitzPenalty", f"--trainer.callbacks.example_input={value}"]
    with pytest.raises(ValueError, match=r"cannot hold tensors: set self.example_input_array"):
        cli(arguments=arguments, run=True)


@pytest.mark.parametrize(
    ("argument", "match"),
    [("penalty=prodct", "'softplus_log', 'hinge_log'"), ("coefficient=abc", "float"), ("coeficient=1", "coeficient")],
)
def test_a_wrong_argument_is_told(cli, capsys, argument, match):
    with pytest.raises(SystemExit):
        cli(arguments=["--trainer.callbacks+=LipschitzPenalty", f"--trainer.callbacks.{argument}"])
    assert match in capsys.readouterr().err


def test_printed_configuration_builds_the_same_again(cli, capsys, tmp_path):
    config = [{"class_path": name, "init_args": ARGUMENTS[name]} for name in CALLBACKS]
    with pytest.raises(SystemExit):
        cli(config, ["--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"]
    assert [entry["class_path"] for entry in printed] == [f"lightning_lip.{name}" for name in CALLBACKS]
    again = cli(printed)
    assert {type(c).__name__ for c in again.trainer.callbacks} >= set(CALLBACKS)
    assert built(again, "NoisyValidation").batch_to_xy is to_xy


@pytest.mark.parametrize("name", CALLBACKS)
def test_help_names_every_argument(cli, capsys, name):
    with pytest.raises(SystemExit):
        cli(arguments=[f"--trainer.callbacks.help={name}"])
    text = capsys.readouterr().out
    assert all(f"--trainer.callbacks.{argument}" in text for argument in ARGUMENTS[name])
