from dataclasses import replace

from support.contenders import peer_named

from lightning_lip.bench.steps import measure, report


def a_row(name, added, **changes):
    peer = peer_named(name)
    own = 0.1 if name.startswith("penalty") else None
    times = (9.0, 10.0, 11.0), (1, 1, 1), added, own
    row = measure.Row(name, name, peer.operator, peer.vectors, 5, *times, None, 0, 0, None, 0, 0, "")
    return replace(row, **changes)


def findings_of(*rows):
    return report.findings(measure.Result("small", "small", 4, 3, 100, 120, True, 0.01, {}, rows))


def test_findings_state_ratios_at_the_same_r_and_apart_for_reshaped_kernels():
    held = {"share": 0.03, "allowed_bytes": 1000}
    lines = findings_of(
        a_row("plain", (0, 0, 0)),
        a_row("penalty_r8", (1.6, 2.0, 2.5), **held, own_ms=0.2, held_bytes=900, peak_bytes=1000),
        a_row("penalty_r1", (0.8, 1.0, 1.0), **held, own_ms=0.4, held_bytes=900, peak_bytes=2000),
        a_row("penalty_sparing", (0.8, 1.0, 1.0)),
        a_row("autograd_block_loop", (4, 6, 8)),
        a_row("autograd_loop", (-0.8, 0.5, 0.8)),
        a_row("gradient_penalty", (20, 20, 20), n_blocks=1),
        a_row("torch_spectral_norm", (1, 1, 1)),
    )
    assert lines == [
        "The penalty (r = 8) takes 0.2 ms a step, 2.0% of a plain 10 ms: its budget of 3.0% is kept.",
        "  It adds 0.0009 MB, at the peak 0.001 MB: 1% of the parameters and r vectors a layer, 0.001 MB, is kept.",
        "The penalty (r = 1) takes 0.4 ms a step, 4.0% of a plain 10 ms: its budget of 3.0% is exceeded.",
        "  It adds 0.0009 MB, at the peak 0.002 MB: 1% of the parameters and r vectors a layer, 0.001 MB, is exceeded.",
        "One read of the penalised weights with a read and a write of their gradients takes 0.01 ms.",
        "With r = 8 it adds 2 ms (1.6 to 2.5) to a whole step. In that time, peers add:",
        "  without norms: gradient_penalty 10 x (once).",
        "  the true operators: autograd_block_loop (r = 8) 3 x (1.6 to 5), autograd_loop (r = 1) 0.25 x (-0.5 to 0.5).",
        "  kernels as matrices (c_out, -1): torch_spectral_norm (r = 1) 0.5 x (0.4 to 0.625).",
        "With r = 1 it adds 1 ms (0.8 to 1) to a whole step. In that time, peers add:",
        "  the true operators: autograd_loop (r = 1) 0.5 x (-1 to 1).",
        "  kernels as matrices (c_out, -1): torch_spectral_norm (r = 1) 1 x (1 to 1.25).",
    ]


def test_findings_state_no_ratio_where_the_steps_vary_by_more():
    lines = findings_of(a_row("plain", (0, 0, 0)), a_row("penalty_r8", (-1, 2, 4)), a_row("exact_svd", (6, 6, 6)))
    assert lines[-1].startswith("With r = 8 it adds 2 ms (-1 to 4) to a whole step: no more than the steps vary")
    assert not any("exact_svd" in line for line in lines)
