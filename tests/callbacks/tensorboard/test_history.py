"""What the figures keep of a long training."""

from lightning_lip.callbacks.tensorboard.history import MAX_STEPS, History


def test_a_history_is_thinned():
    history = History()
    for step in range(5 * MAX_STEPS):
        history.remember(step, [1.0], [0.0])
    assert len(history.steps) <= MAX_STEPS
    assert len(history.norms) == len(history.shares) == len(history.steps)
    assert set(history.steps) == set(range(0, 5 * MAX_STEPS, history.spacing))
    assert History.of(history.state()) == history
