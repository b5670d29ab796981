"""Steps that are after a wrong certificate, by class: each class was found once, and is looked for ever since."""

from __future__ import annotations

from support.fuzz_grammar import Production, productions

_SWITCHED = (
    "{m}.parametrizations.weight[0].on = True ;; {out} = {m}({x}) ;; {m}.parametrizations.weight[0].on = False ;; {out}"
)

WEIGHTS = (
    "fuzz_modules.parametrized(nn.Linear({last}, 3), fuzz_modules.Adapter(3, {last}, {1|10})) -> " + _SWITCHED,
    "fuzz_modules.parametrized(nn.Linear({last}, 2, bias=False), fuzz_modules.Scaled(1.0)) -> "
    "{m}.parametrizations.weight[0].scale = {3|10} ;; {out} = {m}({x}) ;; "
    "{m}.parametrizations.weight[0].scale = 1.0 ;; {out}",
    "parametrizations.weight_norm(nn.Linear({last}, 3)) -> torch.func.functional_call({m}, "
    "dict([('parametrizations.weight.original0', {5|-9} * {m}.parametrizations.weight.original0)]), ({x},))",
    "parametrizations.weight_norm(nn.Linear({last}, 2)) -> torch.func.functional_call({m}, "
    "dict([('parametrizations.weight.original1', {m}.parametrizations.weight.original1 + 2), "
    "('parametrizations.weight.original0', {m}.parametrizations.weight.original0.exp())]), ({x},))",
    "parametrizations.orthogonal(nn.Linear({last}, {last})) -> torch.func.functional_call({m}, "
    "dict([('parametrizations.weight.0.base', {4|-7} * {m}.parametrizations.weight[0].base)]), ({x},))",
    "nn.Linear({last}, 2) -> torch.func.functional_call({m}, dict(weight=4 * {m}.weight), ({x},))",
    "nn.Linear({last}, 2) -> torch.func.functional_call({m}, dict(weight=({m}.weight * 5).detach()), ({x},))",
    "nn.Linear({last}, 2) -> {out} = {m}.weight.data.clone() ;; {m}.weight.data.mul_(5) ;; {out}v = {m}({x}) ;; "
    "{m}.weight.data.copy_({out}) ;; {out}v",
)
WEIGHTS_OF_CONVOLUTIONS = (
    "fuzz_modules.parametrized(nn.Conv1d({channels}, 2, 1), fuzz_modules.Scaled(1.0)) -> "
    "{m}.parametrizations.weight[0].scale = {3|10} ;; {out} = {m}({x}) ;; "
    "{m}.parametrizations.weight[0].scale = 1.0 ;; {out}",
    "parametrizations.weight_norm(nn.Conv1d({channels}, 3, 2)) -> torch.func.functional_call({m}, "
    "dict([('parametrizations.weight.original0', {5|-9} * {m}.parametrizations.weight.original0)]), ({x},))",
)

TO_COMPLEX = (
    "torch.tanh({x} + 1.5j).abs()", "torch.tanh({x} + {1.5j|1.3j})", "({x} * {complex}).abs()", "{x} * {complex}",
    "nn.Buffer(torch.randn({k}, {last}) * 5j) -> F.linear({x} + 0j, {m}).abs()",
    "nn.Parameter(torch.randn({k}, {last}) * 5j) -> F.linear({x} + 0j, {m})", "torch.complex({x}, {y})",
    "torch.view_as_complex({x}.unfold(-1, 2, 2).contiguous())", "{x}.to(torch.complex128)", "torch.fft.fft({x})",
    "torch.fft.rfft({x}, norm='ortho')", "torch.polar({x}.abs(), {x})", "{x} * {2j|(1-3j)}",
    "torch.cat([{x}, {x} * 1j], 1)", "torch.where({mask}, {x} + 0j, {x} * 4j)", "{x} + {complex}",
    "nn.Parameter(torch.randn({k}, {last}) * 2j) -> ({x} @ {m}.imag.T)",
)  # fmt: skip
COMPLEX = (
    "{x}.abs()", "{x}.real", "{x}.imag", "torch.view_as_real({x})", "{x} * {2j|(1+4j)|0.5}", "torch.tanh({x}).abs()",
    "torch.sin({x})", "{x}.sum({d})", "{x}.mean({d}).abs()", "({x} + {x}.conj()).real", "{x}.flatten(1)",
    "{x} / {3|2j}", "torch.cos({x}).abs()", "{x} * {complex}", "torch.sigmoid({x}).real", "{x}.angle()",
    "torch.asinh({x}).imag", "nn.Parameter(torch.randn(2, {last}) * 4j) -> F.linear({x}, {m}).real",
    "torch.atan({x}).abs()", "-{x}", "torch.linalg.vector_norm({x}, dim={d})", "({x} * {x}.conj()).real",
    "{x}.permute({perm})", "torch.fft.ifft({x}).real",
)  # fmt: skip

TO_WHOLE = (
    "{x}.sum({d}, dtype=torch.int64)", "{x}.sum({d}, dtype={torch.int32|torch.int64|torch.bool}).to({dtype})",
    "{x}.sum({dims}, keepdim=True, dtype=torch.int16).double()", "{x} > {0|0.5}", "{x}.long()", "{x}.to(torch.int32)",
    "{x}.bool()", "{x}.contiguous().view(torch.int64)", "{x}.contiguous().view(torch.int64).double()", "{x}.byte()",
    "{x}.contiguous().view(torch.int32).to({dtype}) * 1e-6", "{x}.contiguous().view(torch.float32).double()",
    "{x}.argmax({d})", "{x}.round().long()", "({x} > 0) | ({x} < -1)", "{x}.isnan()", "{x}.type(torch.int64)",
    "{x}.cumsum({d}, dtype=torch.int64)", "{x} == {y}", "{x}.mean({d}, dtype={torch.float32|torch.float16}).double()",
    "{x}.softmax({d}, dtype=torch.float32).double()", "torch.linalg.vector_norm({x}, dim={d}, dtype=torch.float64)",
    "{x}.to({torch.float32|torch.bfloat16|torch.float16}).to({dtype})", "{x}.float()", "{x}.half().double()",
    "{x}.contiguous().view({torch.float16|torch.bfloat16}).double().nan_to_num(0.0, 0.0, 0.0).clamp(-9, 9)",
    "nn.Buffer(torch.zeros(1, dtype=torch.int64)) -> {x}.type_as({m})", "{x}.prod({d}, dtype=torch.int64)",
    "aten._to_copy({x}, dtype={torch.int64|torch.bool})", "{x}.nansum({d}, dtype=torch.int64)", "{x}.int() + {x}",
)  # fmt: skip
WHOLE = (
    "{x}.double()", "{x}.to(torch.float64)", "{x} * 2.5", "{x} + 0.5", "{x}.to(torch.float64) * 3", "{x}.sum({d})",
    "torch.where({x} > 0, 1.0, 0.0).double()", "{x}.flatten(1)", "{x} / 2", "{x}.abs()",
    "{x}.sum(1, dtype=torch.float64)", "{x}.unsqueeze(1)", "torch.atan({x})", "{x}.type(torch.float64)",
    "{x} * torch.ones({last}, dtype=torch.float64)",
)  # fmt: skip

_CIRCULAR = "nn.Conv1d({channels}, {1|2}, 3, padding=1, padding_mode='circular')"
PADDED = (
    _CIRCULAR + " -> F.conv1d(F.pad({x}, (1, 1), mode='circular'), {m}.weight, {m}.bias, padding={1|2})",
    _CIRCULAR + " -> {m}.padding_mode = 'zeros' ;; {out} = {m}(F.pad({x}, (1, 1), mode='circular')) ;; "
    "{m}.padding_mode = 'circular' ;; {out}",
    "nn.Conv1d({channels}, 2, {2|3}, padding={1|2}, padding_mode='{circular|reflect|replicate}') -> "
    "F.conv1d(F.pad({x}, {m}._reversed_padding_repeated_twice, mode={m}.padding_mode), {m}.weight, padding={0|1|3})",
    "nn.Conv1d({channels}, {channels}, 3, padding=1, padding_mode='{circular|reflect|replicate}') -> "
    "F.conv1d(F.pad({x}, (1, 1), mode='{circular|reflect|replicate}'), {m}.weight, padding={0|1})",
    "nn.Conv1d({channels}, 2, 2, padding=1, padding_mode='circular') -> "
    "{m}._conv_forward(F.pad({x}, (1, 1)), {m}.weight, {m}.bias)",
    _CIRCULAR + " -> {m}.padding_mode = 'zeros' ;; {out} = {m}({x}) ;; {m}.padding_mode = 'circular' ;; {out}",
)
PADDED_IMAGES = (
    "nn.Conv2d({channels}, 1, 3, padding=1, padding_mode='circular') -> "
    "F.conv2d(F.pad({x}, (1, 1, 1, 1), mode='circular'), {m}.weight, padding={1|2|(0, 1)})",
)

CHANGED = (
    "nn.LocalResponseNorm({2|3}, alpha=1.0, k=1.0) -> {m}.k = {0.01|1e-3} ;; {out} = {m}({x}) ;; {m}.k = 1.0 ;; {out}",
    "nn.LocalResponseNorm(2, alpha=0.01, beta=0.5) -> {m}.alpha = 9.0 ;; {out} = {m}({x}) ;; {m}.alpha = 0.01 ;; {out}",
    "nn.LocalResponseNorm(2, k=2.0) -> {m}.beta = {-1.0|4.0} ;; {out} = {m}({x}) ;; {m}.beta = 0.75 ;; {out}",
    "nn.Softshrink(0.5) -> {m}.lambd = {0.1|0.0} ;; {out} = {m}({x}) ;; {m}.lambd = 0.5 ;; {out}",
    "nn.LeakyReLU(0.1) -> {m}.negative_slope = 4.0 ;; {out} = {m}({x}) ;; {m}.negative_slope = 0.1 ;; {out}",
    "nn.Dropout(0.5) -> {m}.train() ;; {out} = {m}({x}) ;; {m}.eval() ;; {out}",
    "fuzz_modules.Nested() -> {m}.inner.factor = {5.0|-3.0} ;; {out} = {m}({x}) ;; {m}.inner.factor = 1.0 ;; {out}",
    "fuzz_modules.Reader() -> {m}.context = {x} ;; {out} = {m}({x} * 0.1) ;; {m}.context = None ;; {out}",
    "fuzz_modules.Reader() -> {m}({x}.clone())",
    "nn.LayerNorm({last}) -> {m}.eps = 1e-9 ;; {out} = {m}({x}) ;; {m}.eps = 1e-5 ;; {out}",
)
CHANGED_POOLS = (
    "nn.LPPool1d(2, {last}) -> {m}.kernel_size = 2 ;; {m}.stride = 1 ;; {out} = {m}({x}) ;; "
    "{m}.kernel_size, {m}.stride = {last}, None ;; {out}",
    "nn.LPPool1d({4|2}, 2, 2) -> {m}.norm_type = {1|3} ;; {out} = {m}({x}) ;; {m}.norm_type = 2 ;; {out}",
    "nn.LPPool1d(2, 3, 3) -> {m}.stride = 1 ;; {out} = {m}({x}) ;; {m}.stride = 3 ;; {out}",
)

STATE = (
    "nn.Buffer(torch.ones(())) -> {m}.add_(1) ;; {x} * {m}",
    "nn.Buffer(torch.ones(())) -> {m}.mul_({2|-3}) ;; {x} * {m}.clone()",
    "nn.Buffer(torch.ones({last})) -> {out} = {x} * {m} ;; {m}.mul_(1.5) ;; {out}",
    "nn.Buffer(torch.eye({last})) -> {m}.mul_(2) ;; F.linear({x}, {m})",
    "nn.Buffer(torch.ones(())) -> {out} = {m} + 1 ;; {m}.copy_({out}) ;; {x} * {out}",
    "nn.Buffer(torch.ones(())) -> {m} = {m} + 1 ;; {x} * {m}", "0 -> {m} += 1 ;; {x} * {m}",
    "[1.0] -> {m}.append({m}[-1] * 2) ;; {x} * {m}[-1]", "dict(n=1) -> {m}['n'] += 2 ;; {x} * {m}['n']",
    "0 -> {m} += 1 ;; {x} * 3 if {m} % 2 else {x}", "{x} * random.random()",
    "{x} * random.{uniform(1, 9)|gauss(0, 3)|randint(1, 9)}", "{x} * float(np.random.rand())",
    "{x} * float(np.random.{normal()|exponential()})", "{x} * torch.from_numpy(np.random.rand({last})).to({x})",
    "{x} * torch.rand(())", "{x} * torch.rand({last}).to({x})", "{x} + torch.randn({last}).to({x})",
    "{x} * random.choice([1.0, 5.0])", "torch.Generator().manual_seed(0) -> {x} * torch.rand((), generator={m})",
    "random.Random(0) -> {x} * {m}.random()", "np.random.default_rng(0) -> {x} * {m}.random()",
    "np.random.RandomState(0) -> {x} * {m}.rand()", "torch.bernoulli(torch.full(({last},), 0.5)).to({x}) * {x}",
    "fuzz_modules.parametrized(nn.Linear({last}, 2), fuzz_modules.Counting()) -> {m}({x})",
    "nn.Buffer(torch.zeros({last})) -> {m}.add_({x}.detach().flatten(0, -2).mean(0)) ;; {x} + {m}",
    "nn.Buffer(torch.zeros({last})) -> {m} = {x}.detach().flatten(0, -2)[0] ;; {x} - {m}",
    "None -> {m} = {m} or 0 ;; {m} += 1 ;; {x} * {m}", "random.shuffle([1, 2, 3]) -> {x} * 2",
    "0 -> {m} += 1 ;; {x} * 2", "{x} * (3 if torch.is_grad_enabled() else 1)", "{x} * (3 if {x}.requires_grad else 1)",
    "{x} if torch.is_inference_mode_enabled() else {x} * 2",
)  # fmt: skip

_NAN = "{float('nan')|float('inf')|-float('inf')}"
_SPOILT = f"torch.where(torch.arange({{last}}) == 1, {_NAN}, 0.5)"
NOT_FINITE = (
    f"nn.Buffer({_SPOILT}) -> {{x}} + {{m}}", f"nn.Parameter({_SPOILT}) -> {{m}} - {{x}}",
    f"nn.Buffer({_SPOILT}) -> torch.maximum({{x}}, {{m}})",
    f"nn.Buffer({_SPOILT}) -> torch.where({{mask}}, {{x}}, {{m}})",
    f"nn.Buffer({_SPOILT}) -> F.linear({{x}}, torch.ones({{last}}, {{last}}).to({{x}}), {{m}})",
    f"nn.Buffer({_SPOILT}) -> torch.cat([{{x}}.flatten(0, -2)[:2], {{m}}.expand(2, -1)], 1)",
    f"nn.Buffer({_SPOILT}) -> {{x}} * {{m}}", f"nn.Buffer({_SPOILT}) -> {{x}}.clamp({{m}})",
    f"nn.Buffer({_SPOILT}) -> torch.clamp({{x}}, max={{m}})", f"nn.Buffer({_SPOILT}) -> {{x}} / {{m}}",
    f"{{x}}.clamp(max={_NAN})", f"{{x}}.clamp({_NAN}, 1.0)", f"{{x}}.masked_fill({{mask}}, {_NAN})",
    f"torch.where({{mask}}, {{x}}, {_NAN})", f"F.pad({{x}}, (0, 1), value={_NAN})", f"{{x}} + {_NAN}",
    f"{{x}} * {_NAN}", f"F.hardtanh({{x}}, -1.0, {_NAN})", f"F.threshold({{x}}, {_NAN}, 0.0)", f"{{x}} - {_NAN}",
    f"F.leaky_relu({{x}}, {_NAN})", f"F.elu({{x}}, {_NAN})", f"F.softplus({{x}}, {_NAN})",
    f"{{x}} + torch.full(({{last}},), {_NAN}).to({{x}})", f"torch.add({{x}}, {{y}}, alpha={_NAN})",
    f"F.layer_norm({{x}}, ({{last}},), None, {_SPOILT}.to({{x}}))", f"F.layer_norm({{x}}, ({{last}},), eps={_NAN})",
    f"nn.PReLU(init={_NAN}) -> {{m}}({{x}})", "nn.Linear({last}, 2) -> {x} + torch.log(-{m}.weight[0].abs())",
    *(
        f"fuzz_modules.spoilt(nn.BatchNorm1d({{channels}}), '{key}', {_NAN}) -> {{m}}.eval()({{x}})"
        for key in ("running_mean", "running_var", "bias", "weight")
    ),
    *(f"fuzz_modules.spoilt(nn.Linear({{last}}, 2), '{key}', {_NAN}) -> {{m}}({{x}})" for key in ("bias", "weight")),
    f"nn.BatchNorm1d({{channels}}, eps={_NAN}) -> {{m}}.eval()({{x}})",
)  # fmt: skip
NOT_FINITE_CONVOLUTIONS = (
    f"fuzz_modules.spoilt(nn.Conv1d({{channels}}, 2, 2), 'bias', {_NAN}) -> {{m}}({{x}})",
    f"fuzz_modules.spoilt(nn.GroupNorm(1, {{channels}}), 'bias', {_NAN}) -> {{m}}({{x}})",
    f"nn.Conv1d({{channels}}, 2, 3, padding=1) -> F.conv1d(F.pad({{x}}, (1, 1), value={_NAN}), {{m}}.weight)",
)

CACHED = (
    "fuzz_modules.parametrized(nn.Linear({last}, 3), fuzz_modules.LargerInEval()) -> {m}({x})",
    "parametrizations.spectral_norm(nn.Linear({last}, {k})) -> 4 * {m}({x})",
    "fuzz_modules.parametrized(nn.Linear({last}, 3), fuzz_modules.LargerInEval()) -> F.linear({x}, {m}.weight)",
)
CACHED_CONVOLUTIONS = (
    "fuzz_modules.parametrized(nn.Conv1d({channels}, 3, 2), fuzz_modules.LargerInEval()) -> {m}({x})",
)

MIXING = (
    "aten.native_group_norm({x}, None, None, 1, {channels} * 2, {places}, {1|2}, 0.1)[0]",
    "aten.native_group_norm({x}, None, None, 1, {channels}, 2 * {places}, 1, 0.1)[0]",
    "F.group_norm({x}.flatten(0, 1).unsqueeze(0), 1).view({x}.shape)", "{x} - {x}.mean(0)", "{x} + {x}.flip(0)",
    "F.group_norm({x}.transpose(0, 1), 1)", "F.layer_norm({x}, {x}.shape)", "{x}.flatten(1).T.softmax(1)",
    "aten.native_layer_norm({x}.flatten(1).T, [2], None, None, 0.1)[0]", "{x}.sum(0, keepdim=True) + {x}",
    "{x}.roll(1, 0)", "{x}.roll(1)", "{x}[[1, 0]]", "{x}[:1] + {x}", "{x}.reshape(-1, 2)",
    "{x}.flatten().view(2, -1).relu()", "{x}.flatten(1).T.reshape(2, -1)", "F.max_pool1d({x}.flatten(1).T, 2)",
    "{x} + {x}.amax(0)", "{x}.cumsum(0)", "F.instance_norm({x}.transpose(0, 1))",
    "nn.BatchNorm1d({channels}, track_running_stats=False) -> {m}.eval()({x})", "torch.cat([{x}[1:], {x}[:1]])",
    "F.avg_pool1d({x}.flatten(1).T.unsqueeze(0), 2).squeeze(0)", "{x}.expand(2, *{x}.shape)",
    "nn.Linear(2, 2) -> {m}({x}.flatten(1).T).T", "nn.PReLU(2) -> {m}({x}.flatten(1).T)", "{x}.median(0)[0] + {x}",
    "aten.native_group_norm({x}, None, None, 2 * {channels}, 1, {places}, 1, 0.1)[0]",
    "aten.native_group_norm({x}, None, None, 2, {places}, {channels}, {1|{places}}, 0.1)[0]",
    "{x}.unsqueeze(0).expand(3, *[-1] * ({rank})).flatten(0, 1)", "F.adaptive_avg_pool1d({x}.flatten(1).T, 1)",
    "nn.Conv1d(2, 2, 1) -> {m}({x}.flatten(1).unsqueeze(0)).squeeze(0)", "{x}.flatten(1).T.unfold(1, 2, 1)",
    "nn.Conv1d({last}, 2, 1) -> {m}({x}.flatten(0, -2).T)",
    "aten.instance_norm({x}.flatten(1)[None], None, None, None, None, True, 0.1, 0.1, False)",
)  # fmt: skip

RAW = (
    "nn.Buffer(torch.tensor([1, 2])) -> {x}[:, :2].repeat_interleave({m}, 1)",
    "{x}.repeat_interleave(torch.tensor([2] * {last}), -1)",
    "{x}.repeat_interleave(torch.ones({channels}, dtype=torch.long), {1|-1})",
    "torch.repeat_interleave({x}, torch.tensor(2), {d})", "torch.add({x}, {x} + 0j, alpha={3j|1j}).abs()",
    "torch.sub({x}, {x} * 1j, alpha=2j)", "torch.rsub({x}, {x} * 1j, alpha=2j).real", "{x} + 2j", "{x} * 2j",
    "2j - {x}", "{x} / 2j", "{x} * True", "{x}.clamp(min=torch.tensor(0))", "{x}.sum(())", "{x}.mean([])",
    "{x}.unbind(0)[0]", "torch.stack({x}.unbind(0))", "{x}.norm(p='fro')", "{x}.norm(p='nuc', dim=(-2, -1))",
    "torch.linalg.norm({x}, 'fro', dim=(-2, -1))", "{x}.norm(dim=None)", "{x}.squeeze(())", "{x}.flip(())",
    "{x}.index_select({d}, torch.tensor([0]))", "{x}[..., torch.tensor(0)]",
    "{x}[:, torch.tensor([True] + [False] * ({channels} - 1))]", "torch.cat([{x}])",
    "torch.cat([{x}, torch.empty(0).to({x})])", "torch.where({mask}, {x}, {buffer})", "torch.where({mask}, 0, {x})",
    "{x}.expand({x}.shape)", "{x} ** 1", "{x} @ torch.ones({last}).to({x})",
    "torch.matmul({x}, torch.ones({last}, dtype={dtype}))", "torch.tensordot({x}, torch.ones({last}, 2).to({x}), 1)",
    "{x}.pow(2.0).sum()", "{x} * {x}.shape[-1]", "{x}.item() if {x}.numel() == 1 else {x}",
    "{x} if {x}.sum() > 0 else -{x}", "torch.full_like({x}, 2.0) * {x}",
    "torch.ops.aten.lift_fresh(torch.tensor(2.0).to({x})) * {x}", "{x}.unfold(-1, {last}, 1)",
    "{x}.as_strided({x}.shape, {x}.stride())",
    "torch.utils.checkpoint.checkpoint(torch.tanh, {x}, use_reentrant=False)", "torch.vmap(torch.tanh)({x})",
    "{x}.apply_(abs)", "torch.cond({x}.sum() > 0, lambda t: t.tanh(), lambda t: t.sin(), ({x},))",
    "{x}.new_tensor([1.0]) * {x}", "{x}.numpy(force=True).sum() + {x}", "torch.block_diag(*{x}.flatten(1).unbind(0))",
    "{x}.index_add(1, torch.tensor([0]), {x}[:, :1])", "{x}.scatter(1, torch.zeros_like({x}).long(), 1.0)",
    "{x}.index_fill({d}, torch.tensor([0]), 2.0)", "{x}.masked_select({mask}.expand({x}.shape))", "{x}.nonzero()",
    "{x}.unique()", "torch.diff({x}, dim={d})", "{x}.diag_embed()", "torch.cdist({x}.flatten(1), {x}.flatten(1))",
    "torch.trapz({x})", "{x}.to_sparse().to_dense()", "torch.nan_to_num({x})",
)  # fmt: skip

IN_PLACE = (
    "{x}.add_(1) ;; {x}", "{out} = {x}.clone() ;; {out}[:, :1] = 0 ;; {out}",
    "{out} = {x}.clone() ;; {out}[:, :1] *= 5 ;; {out}",
    "{out} = torch.zeros_like({x}) ;; {out}.copy_({x} * 2) ;; {out}",
    "{out} = {x}.clone() ;; {out}.view(2, -1).mul_(4) ;; {out}",
    "{out} = {x}.clone() ;; {out}v = {out}[:, 0] ;; {out}v.mul_(7) ;; {out}",
    "{out} = {x} * 1 ;; {out}.fill_(2.0) ;; {out} + {x}", "{out} = {x}.clone() ;; {out}[0] = {x}[1] ;; {out}",
    "{out} = {x}.clone() ;; {out}[:1] += {x}[1:] ;; {out}",
    "nn.Buffer(torch.zeros({last})) -> {m}.copy_({x}.flatten(0, -2)[1]) ;; {x} + {m}",
    "{out} = {x} * 1 ;; torch.tanh({out}, out={out}) ;; {out}", "{out} = {x} * 2 ;; {out}.detach().mul_(5) ;; {out}",
    "{out} = {x} * 1 ;; {out}.data.mul_(5) ;; {out}",
)  # fmt: skip


HAZARDS: dict[str, tuple[Production, ...]] = {
    "weights computed again": (
        *productions("weights computed again", WEIGHTS),
        *productions("weights computed again", WEIGHTS_OF_CONVOLUTIONS, 3),
    ),
    "complex": (*productions("complex", TO_COMPLEX), *productions("complex", COMPLEX, kind="complex")),
    "whole numbers": (*productions("whole numbers", TO_WHOLE), *productions("whole numbers", WHOLE, kind="whole")),
    "padding beside a pad": (
        *productions("padding beside a pad", PADDED, 3),
        *productions("padding beside a pad", PADDED_IMAGES, 4),
    ),
    "changed modules": (*productions("changed modules", CHANGED), *productions("changed modules", CHANGED_POOLS, 3)),
    "state": tuple(productions("state", STATE)),
    "not finite": (*productions("not finite", NOT_FINITE), *productions("not finite", NOT_FINITE_CONVOLUTIONS, 3)),
    "cached": (*productions("cached", CACHED), *productions("cached", CACHED_CONVOLUTIONS, 3)),
    "mixing of samples": tuple(productions("mixing of samples", MIXING)),
    "raw exceptions": tuple(productions("raw exceptions", RAW)),
    "in place": tuple(productions("in place", IN_PLACE)),
}
"""The productions of each class, by its name."""
