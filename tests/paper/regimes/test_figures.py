"""The figures: what they show and in which colours."""

import pytest
from support.disk import full_disk
from support.records import EQUAL, PRODUCT_BEST, synthetic

from lightning_lip.paper.regimes import figures, settings, tuning
from lightning_lip.paper.regimes.settings import REGIMES, Setting
from lightning_lip.paper.settings import NOISE_LEVELS


def test_every_regime_has_one_colour_in_every_figure(tmp_path):
    table = synthetic(PRODUCT_BEST)
    for figure in (figures.training(table), figures.validation(table), figures.front(table)):
        for axes in figure.axes:
            lines = {line.get_label(): line.get_color() for line in axes.lines}
            for regime in REGIMES:
                assert lines[settings.LABELS[regime]] == figures.COLOURS[regime]
            assert axes.get_xlabel()
            assert axes.get_ylabel()
    assert len(figures.validation(table).axes) == len(NOISE_LEVELS)


def test_a_full_disk_leaves_the_earlier_figure(tmp_path):
    path = tmp_path / "figure_1_region.png"
    path.write_text("valid")
    with pytest.raises(OSError, match="File too large"), full_disk(1000):
        figures.write_figures({}, None, tmp_path)
    assert path.read_text() == "valid"
    assert sorted(file.name for file in tmp_path.iterdir()) == [path.name, "tensorboard"]


def test_the_front_shows_the_path_over_the_coefficients():
    mae = tuple((3.0 + k, 4.0, 5.0, 9.0 - k) for k in range(len(settings.GRID)))
    sweep = tuning.Sweep(Setting(criterion=""), "product", mae)
    (axes,) = figures.front(synthetic(EQUAL), [sweep]).axes
    assert axes.lines[-1].get_xydata()[1] == pytest.approx([4.0, 8.0])
