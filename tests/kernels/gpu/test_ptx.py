"""Tier 3 of the proof without a GPU: Triton's PTX, run on host memory, with the bytes it asks for.

The executor also holds every launch to: no misaligned or out-of-bounds access, no race within a program or between
programs, no divergent barrier (tests/support/gpu/ptx.py).
"""

import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", minversion="3.3")

from support.gpu import launch, ptx, ptx_grammar, ptx_memory, workloads
from support.iterations import run_apart
from support.truth import blocks

from lightning_lip.kernels import reference
from lightning_lip.kernels.gpu import tables as gpu_tables

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing can be compiled ahead of time under the interpreter", allow_module_level=True)

CASES, penalised, random = workloads.CASES, workloads.penalised, workloads.random
SIGMA = 2e-6
ORTHONORMAL = 1e-6


def n_bytes(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def test_every_instruction_is_known():
    # The tests that execute a kernel with an unknown instruction are skipped: this one fails in their place.
    unknown = workloads.unknown_instructions()
    if unknown:
        names = "\n".join(unknown)
        pytest.fail(f"The executor (tests/support/gpu/ptx_grammar.py) does not know:\n{names}", pytrace=False)


@pytest.mark.parametrize(("name", "size"), workloads.PENALTY_STEPS)
def test_numbers_and_traffic(name, size):
    weights = CASES[name]
    start = blocks(weights, size)
    iteration, memory, grads = penalised(weights, size)
    want = reference.power_step([w.double() for w in weights], [v.double() for v in start], 1)
    torch.testing.assert_close(iteration._sigma.double(), want.sigma, rtol=SIGMA, atol=0)
    for rows in iteration.vectors:
        assert (rows @ rows.mT - torch.eye(len(rows))).abs().max() <= ORTHONORMAL
    c = iteration._factors.double()
    for index, grad in enumerate(grads):
        update = c[index] * torch.outer(want.left[index], want.right[index])
        eps = torch.finfo(grad.dtype).eps
        torch.testing.assert_close(grad.double(), 1 + update, rtol=eps, atol=float(c[index]) * 5e-6)
    traffic = gpu_tables.predicted_traffic(weights, size)
    assert memory.total("weight") == (n_bytes(weights), 0)
    assert memory.total("grad") == (n_bytes(grads), n_bytes(grads))
    assert traffic[:3] == (n_bytes(weights), n_bytes(grads), n_bytes(grads))
    assert max(region.furthest_reread for region in memory.regions) == 0


def swept(weight, size, p, monkeypatch):
    """Return the tile, how often the weight's bytes are read, and how many bytes lie between two reads of one."""
    iteration, memory, tile, rows = workloads.swept(weight, size, p, monkeypatch)
    a = weight.double() if p == weight.shape[1] else weight.double().t()
    images = rows.double() @ a.t()
    vector = torch.linalg.eigh(images @ images.t()).eigenvectors[:, -1]
    t = vector @ images
    truth = (t @ a).norm() / t.norm()
    torch.testing.assert_close(iteration._sigma[0].double(), truth, rtol=SIGMA, atol=0)
    ratio = memory.total("weight")[0] / n_bytes([weight])
    return tile, ratio, max(region.furthest_reread for region in memory.regions)


@pytest.mark.parametrize(("size", "shape", "p", "dtype"), workloads.READ_ONCE, ids=str)
def test_weights_are_read_once_up_to_the_limit(monkeypatch, size, shape, p, dtype):
    tile, ratio, distance = swept(random(*shape, dtype=dtype), size, p, monkeypatch)
    assert not tile.two_pass
    assert ratio == 1.0
    assert distance == 0


@pytest.mark.parametrize(("size", "shape", "p", "dtype"), workloads.READ_TWICE, ids=str)
def test_wider_weights_are_read_twice_in_a_row(monkeypatch, size, shape, p, dtype):
    tile, ratio, distance = swept(random(*shape, dtype=dtype), size, p, monkeypatch)
    assert tile.two_pass
    assert ratio == 2.0
    # The second read of a row block follows on the first: 8 rows of p elements later, and never more.
    assert 0 < distance <= gpu_tables.TWO_PASS_ROWS * p * dtype.itemsize


@pytest.mark.parametrize("size", [1, 8])
def test_results_do_not_depend_on_the_order_of_programs(size):
    weights = CASES["fp32"]
    (first, _, grads), (second, _, others) = (penalised(weights, size, backwards=b) for b in (False, True))
    assert torch.equal(first._sigma, second._sigma)
    assert all(torch.equal(a, b) for a, b in zip(first.vectors, second.vectors, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(grads, others, strict=True))


def test_no_iteration_reads_the_weights_once():
    weights = CASES["fp32"]
    got, memory = workloads.ritz_values(weights, 8)
    want = reference.power_step([w.double() for w in weights], [v.double() for v in blocks(weights, 8)], 0)
    torch.testing.assert_close(got.sigma.double(), want.sigma, rtol=SIGMA, atol=0)
    assert memory.total("weight")[0] == n_bytes(weights)


# Planted faults: the executor must see each of them.


def _penalised_with_fault(name, **options):
    weights, size, hints = workloads.PLANTED[name]
    return penalised(weights, size, **hints, **options)


def without_barrier(number):
    def edit(name, text):
        if name != "sweep":
            return text
        before, after = text.split("bar.sync")[: number + 1], text.split("bar.sync")[number + 1 :]
        return "bar.sync".join(before) + "// dropped" + "bar.sync".join(after)

    return edit


def test_a_dropped_barrier_is_caught():
    text = []
    weights, size, _ = workloads.PLANTED["barrier"]
    penalised(weights, size, edit=lambda name, ptx_text: text.append((name, ptx_text)) or ptx_text)
    n_barriers = dict(text)["sweep"].count("bar.sync")
    caught = 0
    for number in range(n_barriers):
        try:
            penalised(weights, size, edit=without_barrier(number), stop_after="sweep")
        except ptx_memory.ExecutionError as error:
            assert "without a barrier" in str(error)  # noqa: PT017
            caught += 1
        except launch.Stop:
            pass
    # Triton emits some barriers that another one makes superfluous; most must be needed.
    assert caught > n_barriers / 2


@pytest.mark.parametrize("kernel", ["sweep", "update"])
def test_a_false_alignment_hint_is_caught(kernel):
    with pytest.raises(ptx_memory.ExecutionError, match="misaligned 16-byte"):
        _penalised_with_fault(f"alignment of the {kernel}")


def test_a_wrong_mask_is_caught(tmp_path):
    # The last row of the last strip would come from behind the weight.
    old = "mask = (rows < i1)[:, :, None] & (cols < p)[None, None, :]"
    with pytest.raises(ptx_memory.ExecutionError, match="out-of-bounds"):
        _penalised_with_fault("mask", source=(tmp_path, old, old.replace("rows < i1", "rows < i1 + 1")))


def test_a_second_read_of_the_weights_is_counted():
    def edit(name, text):
        return re.sub(r".* ld\.global.*evict_first.*\n", r"\g<0>\g<0>", text) if name == "sweep" else text

    weights, size, _ = workloads.PLANTED["barrier"]
    _, memory, _ = penalised(weights, size, edit=edit)
    assert memory.total("weight")[0] == 2 * n_bytes(weights)
    assert max(region.furthest_reread for region in memory.regions) > 0


def test_a_race_between_programs_is_caught(tmp_path):
    # All strips would write the partial sum of the first.
    old = "local = (index - tl.load(row + STRIP_BEGIN)) * R * ld"
    with pytest.raises(ptx_memory.ExecutionError, match="one program of a launch and written by another"):
        _penalised_with_fault("race", source=(tmp_path, old, "local = (index - index) * R * ld"))


# The grammar: a spelling of what is known changes nothing, and one that is not known is named by one test.


def kernel_of(*statements):
    return ".visible .entry k(\n)\n.reqntid 32\n{\n" + "".join(f"\t{statement};\n" for statement in statements) + "}\n"


def parsed(statement):
    _, (instruction,), _ = ptx_grammar.parse(kernel_of(statement))
    return instruction._replace(text="")


@pytest.mark.parametrize(
    ("plain", "other"),
    [
        ("st.shared.v4.b32 [%r1], {%r2, %r3, %r4, %r5}", "st.shared::cta.v4.b32 [ %r1 + 0 ], { %r2, %r3, %r4, %r5 }"),
        ("st.shared.b64 [%r1], %rd2", "st.weak.shared::cluster.b64 [%r1], %rd2"),
        ("ld.param.b64 %rd1, [k_param_3]", "ld.param::entry.b64 %rd1, [k_param_3]"),
        ("ld.global.v2.b64 {%rd1, %rd2}, [%rd3+8]", "ld.relaxed.gpu.global.cg.v2.b64 {%rd1, %rd2}, [%rd3+8]"),
        ("st.global.b32 [%rd1], %r2", "st.global.L1::evict_last.b32 [%rd1], {%r2}"),
        ("ld.global.b32 %r1, [%rd2]", "ld.volatile.global.b32 %r1, [%rd2]"),
        ("ld.global.b32 %r1, [%rd2]", "ld.global.nc.L2::128B.b32 %r1, [%rd2]"),
        ("bra $L", "bra.uni $L"),
    ],
)  # fmt: skip
def test_another_spelling_is_the_same_instruction(plain, other):
    if plain.startswith("bra"):
        (first, second) = ptx_grammar.parse(kernel_of("$L: ret", plain, other))[1][1:]
        assert first._replace(text="") == second._replace(text="")
    else:
        assert parsed(plain) == parsed(other)


def test_a_cache_policy_is_no_operand():
    hinted = parsed("ld.global.L1::evict_first.L2::cache_hint.b32 {%r1}, [%rd2], %rd3")
    assert hinted.operands == parsed("ld.global.b32 {%r1}, [%rd2]").operands


@pytest.mark.parametrize(
    ("statement", "what"),
    [
        ("frobnicate.b32 %r1, %r2", "opcode frobnicate"),
        ("st.shared::foo.b32 [%r1], %r2", "state space .shared::foo of st"),
        ("ld.global::cta.b32 %r1, [%rd2]", "state space .global::cta of ld"),
        ("ld.tensor.b32 %r1, [%rd2]", "modifier .tensor of ld"),
        ("ld.global.L1::evict_sometimes.b32 %r1, [%rd2]", "modifier .L1::evict_sometimes of ld"),
        ("ld.global.v16.b32 %r1, [%rd2]", "modifier .v16 of ld"),
        ("ld.global.v2.b32 {%r1, %r2, %r3}, [%rd2]", "form ld.global.v2.b32"),
        ("ld.global.L2::cache_hint.b32 %r1, [%rd2]", "2 operands of ld.global.L2::cache_hint.b32"),
        ("ld.global.b32 %r1, [%rd2], %rd3", "3 operands of ld.global.b32"),
        ("add.sat.s32 %r1, %r2, %r3", "modifier .sat of add"),
        ("add.rz.f32 %r1, %r2, %r3", "modifier .rz of add"),
        ("mul.s32 %r1, %r2, %r3", "form mul.s32"),
        ("cvt.f32.f64 %r1, %rd2", "form cvt.f32.f64"),
        ("cvt.rni.s32.f32 %r1, %r2", "modifier .rni of cvt"),
        ("setp.lo.f32 %p1, %r1, %r2", "form setp.lo.f32"),
        ("setp.lt.and.s32 %p1, %r1, %r2, %p2", "modifier .and of setp"),
        ("shfl.sync.bfly.b32 %r1, %r2, 1, 7, -1", "form shfl.sync.bfly.b32"),
        ("mov.u32 %r1, %clusterid.x", "operand %clusterid.x"),
        ("ld.shared.b32 %r1, [other_symbol]", "address [other_symbol]"),
        ("bar.arrive 0", "modifier .arrive of bar"),
        ("bar.sync 1, 64", "2 operands of bar.sync"),
        ("bra $L__nowhere", "label"),
        (".branchtargets $L1", "directive .branchtargets"),
    ],
)
def test_what_is_not_known_is_named(statement, what):
    with pytest.raises(NotImplementedError) as error:
        ptx.Program(kernel_of(statement), 0)
    assert error.value.found == [(statement, what)]


def test_a_cluster_of_programs_is_not_known():
    with pytest.raises(NotImplementedError, match=r"directive \.reqnctapercluster"):
        ptx.Program(kernel_of("ret").replace("\n{", "\n.reqnctapercluster 2\n{"), 0)


def test_all_that_is_unknown_is_named_at_once():
    with pytest.raises(NotImplementedError) as error:
        ptx.Program(
            kernel_of("frobnicate.b32 %r1, %r2", "ret", "frobnicate.b32 %r3, %r4", "add.sat.s32 %r1, %r2, 1"), 0
        )
    assert [what for _, what in error.value.found] == ["opcode frobnicate", "modifier .sat of add"]


def test_the_executor_does_all_that_the_grammar_knows():
    for opcode, form in ptx_grammar.FORMS.items():
        for space in form.spaces or (None,):
            name = ptx.handler_of(SimpleNamespace(opcode=opcode, space=space))
            assert opcode in ptx.CONTROL or hasattr(ptx._Execution, name), name


def executed(*statements):
    """Return %r1 of each of the 32 threads after some statements, as unsigned bits."""
    out = torch.zeros(32, dtype=torch.int32)
    memory = ptx_memory.Memory()
    memory.add("out", out)
    address = ["ld.param.b64 %rd1, [k_param_0]", "mov.u32 %r9, %tid.x", "mad.wide.u32 %rd2, %r9, 4, %rd1"]
    code = kernel_of(*address, *statements, "st.global.b32 [%rd2], %r1")
    ptx.Program(code, 0).launch(memory, [out.data_ptr()], [0])
    return [value % 2**32 for value in out.tolist()]


@pytest.mark.parametrize(
    ("statement", "want"),
    [
        ("prmt.b32 %r1, 0x04030201, 0x08070605, 0x7130", 0x08020401),
        # Selectors with their highest bit set copy the byte's sign.
        ("prmt.b32 %r1, 0x000080FF, 0, 0x1A98", 0x8000FFFF),
        ("min.f32 %r1, 0f7FC00000, 0f3F800000", 0x3F800000),
        ("min.NaN.f32 %r1, 0f7FC00000, 0f3F800000", 0x7FC00000),
        ("abs.f32 %r1, 0f80000001", 1),
        ("abs.ftz.f32 %r1, 0f80000001", 0),
        ("mul.ftz.f32 %r1, 0f80800000, 0f3F000000", 0x80000000),
        ("redux.sync.max.s32 %r1, %r9, -1", 31),
        ("shfl.sync.bfly.b32 %r1, 7, 1, 31, -1", 7),
        ("selp.b32 %r1, 5, 6, 0", 6),
        ("bfe.s32 %r1, 0xF0, 4, 4", 0xFFFFFFFF),
        ("shf.l.wrap.b32 %r1, 0x80000000, 1, 1", 3),
        ("cvt.rn.f16x2.f32 %r1, 0f3F800000, 0f40000000", 0x3C004000),
    ],
)  # fmt: skip
def test_single_instructions(statement, want):
    assert executed(statement) == [want] * 32


def test_a_reduction_over_half_a_warp_is_caught():
    with pytest.raises(ptx_memory.ExecutionError, match="not all threads take part"):
        executed("setp.lt.u32 %p1, %r9, 16", "@%p1 redux.sync.max.s32 %r1, %r9, -1")


PLUGIN = """
import re
import sys


def pytest_collection_modifyitems():
    launch = sys.modules["support.gpu.launch"]
    compiled = launch.compiled

    def respelled(kernel, request):
        text, shared = compiled(kernel, request)
        text = re.sub(r"\\bst\\.shared(::cta)?\\.", "st.shared::foo.", text)
        return re.sub(r"\\bld\\.global\\.", "ld.global.frobnicated.", text), shared

    launch.compiled = respelled
"""


@pytest.mark.timeout(900)  # a second process compiles and decodes all kernels
def test_a_new_spelling_fails_one_test(tmp_path):
    """With two spellings planted that nothing knows, one test fails, and names both; those that execute are skipped."""
    Path(tmp_path, "respelling.py").write_text(PLUGIN)
    python_path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    options = ["-p", "respelling", "-k", "not new_spelling"]
    cases, output = run_apart(__file__, tmp_path, *options, PYTHONPATH=python_path)
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    assert [case.get("name") for case in failed] == [workloads.DECODING], output[-4000:]
    message = failed[0].find("failure").text
    assert "sweep: state space .shared::foo of st in 'st.shared::foo." in message
    assert "rank_one: modifier .frobnicated of ld in " in message
    skipped = [case.find("skipped").get("message") for case in cases if case.find("skipped") is not None]
    assert len(skipped) >= len(workloads.PENALTY_STEPS + workloads.READ_ONCE + workloads.READ_TWICE)
    assert all(f"{workloads.DECODING} fails" in reason for reason in skipped)


def test_nothing_is_skipped_for_a_kernel_that_no_test_decodes(monkeypatch):
    unknown = kernel_of("frobnicate.b32 %r1, %r2")
    monkeypatch.setattr(launch, "compiled", lambda kernel, request: (unknown, 0))
    weights = [random(20, 20)]
    assert all(dict(request.constants).get("R") != 4 for request in workloads.all_requests())
    with pytest.raises(NotImplementedError, match="frobnicate"):
        penalised(weights, 4)


def test_nothing_is_skipped_for_an_instruction_that_only_a_planted_fault_has():
    with pytest.raises(NotImplementedError, match="frobnicate"):
        _penalised_with_fault("barrier", edit=lambda name, text: text.replace("bar.sync", "frobnicate.sync"))
