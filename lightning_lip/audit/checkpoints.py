"""A network from a checkpoint or from an importable name, without running code that a file holds."""

from __future__ import annotations

import importlib
import inspect
import io
import os
import pickle
import pickletools
import sys
import textwrap
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_lip.errors import AuditError

RECORDED_KEY = "lightning_lip_module"
"""The key under which a checkpoint may name the class that it belongs to."""

RECORDED_CLASSES = frozenset({"lightning_lip.paper:PaperRegressor"})
"""The classes that a file may name: importing any name that stands in a file would let the file choose what runs."""

HYPER_PARAMETERS = ("hparams", "module_arguments", "hyper_parameters")
"""Where Lightning keeps hyper-parameters; a later key's values win. The first two are of its versions before 1.0."""

SUFFIXES = frozenset({".bin", ".ckpt", ".pt", ".pth"})
"""A target that ends in one of these is taken for a file, even if there is none."""

LONGEST_PICKLE = 2**26
"""Bytes of a refused file that are searched for what it would import."""

UNSAFE = "--unsafe-load-pickle"


def load_network(target: str, module: str | None = None, unsafe_load_pickle: bool = False) -> nn.Module:
    """Return the network that a target names, on the CPU where it comes from a file.

    Of a file only tensors and plain values are read (``torch.load(weights_only=True)``), and no name that stands in it
    is imported, but for those of :data:`RECORDED_CLASSES`. The names that the caller gives are imported, which runs
    their code; the working folder is searched last.

    Args:
        target: A file, or a name as `module`.
        module: For a file, what the weights belong to: ``"package.module:name"`` or ``"package.module.name"`` of a
            LightningModule, which is built with the file's hyper-parameters, of another class or a function, which is
            called without arguments, or of a module, which is used as it is.
        unsafe_load_pickle: Load the file's pickle whatever is in it, which runs the code in it, and let Lightning
            import the classes that LightningCLI wrote into its hyper-parameters.

    Raises:
        AuditError: If the target cannot be found, read, built or filled with the file's weights.
    """
    if not _is_file(target):
        if module is not None or unsafe_load_pickle:
            option = f"--module {module}" if module is not None else UNSAFE
            raise AuditError(f"{option} goes with a checkpoint, and there is no file {target!r}.")
        return _build(target)
    path = Path(target)
    contents = _read(path, unsafe_load_pickle)
    if isinstance(contents, nn.Module):
        return contents
    if not isinstance(contents, Mapping):
        raise AuditError(f"Expected a checkpoint or a state_dict in {target}, got a {type(contents).__name__}.")
    module = module or _recorded(contents)
    if module is None:
        raise AuditError(
            f"{target} holds weights, but not the code of their network: name it with --module package.module:Class."
        )
    if "pytorch-lightning_version" in contents:
        with _working_folder():
            class_ = _import(module)
        if _is_lightning_class(class_):
            return _from_lightning(class_, dict(contents), path, unsafe_load_pickle)
    model = _build(module)
    _fill(model, _state_dict(contents, path), path)
    return model


def read_tensors(path: Path) -> Any:
    """Read a file of tensors and plain values; nothing in it is run.

    Raises:
        AuditError: If there is no such file, it is damaged, or it holds anything else.
    """
    return _read(path, unsafe=False)


def described(error: Exception) -> str:
    """Return an error's type and its message, at most 800 characters, in one line."""
    name, message = type(error).__name__, str(error)
    return textwrap.shorten(f"{name}: {message}" if message else name, 800, placeholder=" ...")


def _is_file(target: str) -> bool:
    path = Path(target)
    return path.exists() or os.sep in target or "/" in target or path.suffix.lower() in SUFFIXES


def _read(path: Path, unsafe: bool) -> Any:
    if not path.exists():
        raise AuditError(f"There is no file {path}.")
    if path.is_dir():
        raise AuditError(f"{path} is a folder, as sharded checkpoints are: consolidate it into one file first.")
    try:
        with warnings.catch_warnings():
            # Of the pickle's protocol, before it refuses the file for what is in it.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=not unsafe)
    # A damaged file can make the reader raise anything, and so can the code in a file that is loaded unsafely.
    except Exception as error:
        names = [] if unsafe else _names_in(path)
        if names:
            raise AuditError(
                f"{path} was refused: it holds objects whose loading can run code ({', '.join(names)}), and nothing "
                f"of it was run. Save a state_dict instead; or, if you trust whoever made the file, {UNSAFE} loads it "
                "and runs the code in it."
            ) from error
        # PyTorch's message advises to load without weights_only, whatever is wrong.
        is_advice = isinstance(error, pickle.UnpicklingError) and not unsafe
        reason = "it cannot be decoded" if is_advice else described(error)
        raise AuditError(f"{path} is damaged, or no file that torch.save wrote: {reason}.") from error


def _names_in(path: Path) -> list[str]:
    """Return what a file's pickle imports beyond tensors, by reading it without running it."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    # It knows the files of torch.save only, and fails in any way on others.
    except Exception:
        pass
    names: set[str] = set()
    strings: list[str] = []
    try:
        file = _pickle_in(path)
        while True:
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name == "GLOBAL":
                    names.add(str(argument).replace(" ", "."))
                elif opcode.name == "STACK_GLOBAL":
                    names.add(".".join(strings[-2:]))
                elif isinstance(argument, str):
                    strings.append(argument)
    # The end of the pickles: the file's, or where tensors follow or damage begins.
    except (
        ValueError,
        LookupError,
        OSError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
        NotImplementedError,
        RuntimeError,
    ):
        pass
    return sorted(name for name in names if not _is_harmless(name))


def _pickle_in(path: Path) -> io.BytesIO:
    """Return the start of the pickle inside a file of torch.save, or of a file that is a pickle itself.

    It is in memory because a damaged length would make a file's reader ask for that much.
    """
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            return io.BytesIO(file.read(LONGEST_PICKLE))
    with zipfile.ZipFile(path) as archive:
        name = next((name for name in archive.namelist() if name.endswith("data.pkl")), "data.pkl")
        with archive.open(name) as record:
            return io.BytesIO(record.read(LONGEST_PICKLE))


def _is_harmless(name: str) -> bool:
    """Whether a name belongs to a tensor, or is not a name at all, as in a damaged file."""
    return (
        name.startswith(("torch._utils.", "collections.OrderedDict"))
        or name.endswith("Storage")
        or not all(part.isidentifier() for part in name.split("."))
    )


def _recorded(contents: Mapping[Any, Any]) -> str | None:
    name = contents.get(RECORDED_KEY)
    return name if isinstance(name, str) and name in RECORDED_CLASSES else None


@contextmanager
def _working_folder() -> Iterator[None]:
    """Search the working folder after everything else: a console command's path does not have it."""
    folder = os.getcwd()
    is_new = folder not in sys.path
    if is_new:
        sys.path.append(folder)
    try:
        yield
    finally:
        if is_new and folder in sys.path:
            sys.path.remove(folder)


def _import(name: str) -> Any:
    module_name, _, attribute = name.partition(":") if ":" in name else name.rpartition(".")
    if not module_name or not attribute:
        raise AuditError(f"Expected a file, or a name as package.module:Class, got {name!r}.")
    try:
        module = importlib.import_module(module_name)
    # Importing runs the user's code, which may raise anything.
    except Exception as error:
        raise AuditError(f"{module_name!r} of {name!r} cannot be imported: {described(error)}") from error
    try:
        return reduce(getattr, attribute.split("."), module)
    except AttributeError as error:
        raise AuditError(f"The module {module_name!r} has no {attribute!r}: {error}.") from error


def _build(name: str) -> nn.Module:
    with _working_folder():
        found = _import(name)
        if isinstance(found, nn.Module):
            return found
        if not callable(found):
            raise AuditError(f"Expected {name} to be a torch.nn.Module or to return one, got a {type(found).__name__}.")
        try:
            model = found()
        # The user's code may raise anything.
        except Exception as error:
            raise AuditError(
                f"{name} cannot be called without arguments: {described(error)}. Name a function that returns the "
                "network, instead."
            ) from error
    if not isinstance(model, nn.Module):
        raise AuditError(f"Expected {name} to return a torch.nn.Module, got a {type(model).__name__}.")
    return model


def _is_lightning_class(found: Any) -> bool:
    """Whether this is a LightningModule's class, of either of Lightning's packages."""
    return isinstance(found, type) and issubclass(found, nn.Module) and hasattr(found, "load_from_checkpoint")


def _from_lightning(class_: Any, contents: dict[str, Any], path: Path, unsafe: bool) -> nn.Module:
    hyper_parameters: dict[str, Any] = {}
    for key in HYPER_PARAMETERS:
        kept = contents.pop(key, None) or {}
        if not isinstance(kept, Mapping):
            raise AuditError(f"Expected the entry {key!r} of {path} to be a dict, got a {type(kept).__name__}.")
        hyper_parameters.update(kept)
    if not unsafe:
        hyper_parameters = _plain(hyper_parameters, class_, path)
    contents |= {HYPER_PARAMETERS[-1]: hyper_parameters, "optimizer_states": []}
    load: Callable[..., nn.Module] = class_.load_from_checkpoint
    # Where there is no such argument, the module's constructor would get it.
    options = {"weights_only": not unsafe} if "weights_only" in inspect.signature(load).parameters else {}
    # Lightning reads files itself, before 2.6 without weights_only: it gets what was read here.
    buffer = io.BytesIO()
    try:
        torch.save(contents, buffer)
        buffer.seek(0)
        with _working_folder():
            model = load(buffer, map_location="cpu", **options)
    # The user's constructor may raise anything.
    except Exception as error:
        names = ", ".join(map(str, hyper_parameters)) or "none, as without save_hyperparameters()"
        raise AuditError(
            f"{class_.__name__} cannot be built from {path} (hyper-parameters in the file: {names}): "
            f"{described(error)}. Name the class that the file was made from, or a function that returns the network."
        ) from error
    missing = sorted(set(model.state_dict()) - set(_state_dict(contents, path)))
    # A strict class has loaded all of its weights, from keys that it may have renamed.
    if missing and not getattr(model, "strict_loading", True):
        raise AuditError(
            f"{path} lacks weights of {class_.__name__}, which would be audited as they were initialised: "
            f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}."
        )
    return model


def _plain(hyper_parameters: dict[str, Any], class_: type, path: Path) -> dict[str, Any]:
    """Return the hyper-parameters without what would make Lightning import and call names that stand in the file."""
    names = [name for name, value in hyper_parameters.items() if _names_a_class(value)]
    if names:
        raise AuditError(
            f"{path} was refused: its hyper-parameters {', '.join(names)} name classes to import and call. Name a "
            f"function that returns the network with --module; or, if you trust whoever made the file, {UNSAFE} "
            "imports and calls them."
        )
    recorded = hyper_parameters.get("_class_path")
    if recorded is not None and recorded != f"{class_.__module__}.{class_.__qualname__}":
        raise AuditError(f"{path} says that its class is {recorded}, not {class_.__name__}: name it with --module.")
    return {name: value for name, value in hyper_parameters.items() if name not in ("_instantiator", "_class_path")}


def _names_a_class(value: object) -> bool:
    if isinstance(value, Mapping):
        return "class_path" in value or any(map(_names_a_class, value.values()))
    return isinstance(value, (list, tuple)) and any(map(_names_a_class, value))


def _state_dict(contents: Mapping[Any, Any], path: Path) -> Mapping[str, Any]:
    state = contents.get("state_dict", contents)
    is_state = isinstance(state, Mapping) and any(isinstance(value, torch.Tensor) for value in state.values())
    if not is_state or not all(isinstance(key, str) for key in state):
        raise AuditError(
            f"{path} holds no weights: expected a state_dict, or one under the key 'state_dict', got the keys "
            f"{textwrap.shorten(', '.join(map(str, contents)) or '(none)', 200, placeholder=' ...')}."
        )
    return dict(state)


def _fill(model: nn.Module, state: Mapping[str, Any], path: Path) -> None:
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise AuditError(
            f"The weights in {path} are not those of {type(model).__name__}: {described(error)}"
        ) from error
