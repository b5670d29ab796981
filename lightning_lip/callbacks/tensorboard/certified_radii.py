"""What a validation's certified radii are shown as: a histogram, a curve, and the curve's numbers in a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_lip.callbacks.tensorboard.figures import certified_curve
from lightning_lip.reporting.documents import replacing, write_csv

N_LEVELS = 100
"""Evenly spaced norms at which the curve is given, besides 0."""

FILE_NAME = "certified_accuracy.csv"
"""The file in a logger's folder."""


def curve(radii: Tensor, eps: Sequence[float]) -> tuple[list[float], list[float]]:
    """Return norms from 0 to the largest finite radius, those of `eps` among them, and the certified accuracy at each.

    At 0 that is the accuracy. A radius is the largest norm at which a sample is certified.

    Args:
        radii: The samples' certified radii, shape (N,), 0 where the prediction is wrong.
        eps: Norms, at least 0.
    """
    ordered = radii.double().cpu().sort().values
    largest = max([0.0, *ordered[ordered.isfinite()][-1:].tolist(), *eps])
    levels = sorted({0.0, *eps, *(largest * step / N_LEVELS for step in range(1, N_LEVELS + 1))})
    # A radius of 0 is no sample's that is classified correctly.
    least = torch.tensor(levels, dtype=torch.float64).clamp(min=5e-324)
    below = torch.searchsorted(ordered, least)
    return levels, (1 - below.double() / len(ordered)).tolist()


def show(
    trainer: Any,
    radii: Tensor,
    eps: Sequence[float],
    accuracy: float,
    prefix: str,
    path: Path | None,
    folder: Path | None,
) -> None:
    """Give the loggers a histogram and the curve, and write the curve's numbers; on the first rank.

    Args:
        trainer: The trainer, whose loggers are asked for ``add_histogram`` and ``add_figure``.
        radii: As for :func:`curve`.
        eps: As for :func:`curve`.
        accuracy: The accuracy without a perturbation.
        prefix: First part of the tags.
        path: A CSV file to write, with the curve as a PNG file beside it; None for :data:`FILE_NAME` in `folder`.
        folder: The folder of the logger, if there is one.
    """
    levels, shares = curve(radii, eps)
    writers = [logger.experiment for logger in trainer.loggers]
    figure = None
    if path is not None or any(hasattr(writer, "add_figure") for writer in writers):
        figure = certified_curve(levels, shares, accuracy)
    for writer in writers:
        finite = radii[radii.isfinite()]  # others are refused
        if hasattr(writer, "add_histogram") and len(finite):
            writer.add_histogram(f"{prefix}/certified_radius", finite, trainer.global_step)
        if hasattr(writer, "add_figure") and figure is not None:
            writer.add_figure(f"{prefix}/certified_accuracy", figure, trainer.global_step)
    file = folder / FILE_NAME if path is None and folder is not None else path
    if file is None:
        return
    about = {"step": trainer.global_step, "epoch": trainer.current_epoch, "samples": len(radii)}
    rows = [(f"{level:.6g}", f"{share:.6f}", f"{accuracy:.6f}") for level, share in zip(levels, shares, strict=True)]
    write_csv(file, ("eps", "certified_accuracy", "accuracy"), rows, about)
    if path is not None and figure is not None:
        with replacing(path.with_suffix(".png")) as beside:
            figure.savefig(beside)
