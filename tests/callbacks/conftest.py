import inspect

import lightning.pytorch as lightning
import pytest


@pytest.fixture
def fit(make_module, make_trainer, regression_data):
    """Return a function that trains with callbacks, by default the small module on the small data.

    It returns the module and the trainer. `validation` may be True, for the training data. Of a checkpoint only
    tensors and plain values are read.
    """

    def run(*callbacks, package=lightning, module=None, data=None, validation=None, ckpt_path=None, **settings):
        module = module or make_module(package)
        trainer = make_trainer(package, callbacks=callbacks, **settings)
        data = regression_data if data is None else data
        # Lightning 2.5 does not have the argument.
        restricted = {"weights_only": True} if "weights_only" in inspect.signature(trainer.fit).parameters else {}
        trainer.fit(module, data, data if validation is True else validation, ckpt_path=ckpt_path, **restricted)
        return module, trainer

    return run
