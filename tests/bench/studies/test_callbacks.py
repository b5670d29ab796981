"""bench/studies/callbacks.py: the cost of a callback in a Trainer's step, on a few steps."""

import lightning.pytorch as pl
import pytest
from support.contenders import csv_rows

from lightning_lip.bench.studies import callbacks


class Counts(pl.Callback):
    """Counts the steps that it is there for."""

    def __init__(self):
        self.batches = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append(trainer.global_step)


@pytest.mark.parametrize("tensorboard", [False, True])
def test_the_callback_comes_and_goes(tensorboard, monkeypatch):
    monkeypatch.setattr(callbacks, "BLOCK", 5)
    there, always = Counts(), Counts()
    comparison = callbacks.Comparison("", lambda: there, lambda: [always], tensorboard=tensorboard)
    times = callbacks.measure(comparison, blocks=4)
    assert len(times[False]) == len(times[True]) == 4
    assert all(time > 0 for values in times.values() for time in values)
    assert always.batches == list(range(5 * 12))
    # With, without, without, with: blocks of five steps.
    assert there.batches == [i for i in range(5 * 12) if i // 5 % 4 in (0, 3)]


def test_command_writes_a_row_for_each_comparison(tmp_path, monkeypatch, capsys):
    fake = [[100.0, 110.0, 120.0], [105.0, 121.0, 126.0]]
    monkeypatch.setattr(callbacks, "_in_a_process", lambda name, blocks: fake)
    callbacks.main(["--quick", "--output", str(tmp_path)])
    rows, _ = csv_rows(tmp_path / "callbacks.csv")
    assert [row["callback"] for row in rows] == list(callbacks.COMPARISONS)
    assert {(row["processes"], row["blocks"], row["ratio_p50"]) for row in rows} == {("2", "6", "1.0500")}
    assert "1.05" in capsys.readouterr().out


def test_failure_of_a_process_is_told():
    with pytest.raises(RuntimeError, match="invalid choice"):
        callbacks._in_a_process("no such comparison", 1)
