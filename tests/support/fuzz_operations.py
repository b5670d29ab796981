"""The grammar of ordinary steps, by family: every registered operation, with arguments of many kinds.

What a step may come to is not said here: it is certified, or it is refused, and a certificate is then attacked.
"""

from __future__ import annotations

from support.fuzz_grammar import Production, productions

_MATRIX = "nn.Parameter(torch.randn({k}, {last}))"
_SQUARE = "nn.Linear({last}, {last}, bias={True|False})"

LINEAR = (
    "nn.Linear({last}, {k}, bias={True|False}) -> {m}({x})",
    "nn.Sequential(nn.Linear({last}, {k}), nn.BatchNorm1d({channels})) -> {m}.eval()({x})",
    f"{_MATRIX} -> F.linear({{x}}, {{m}})",
    f"{_MATRIX} -> {{x}} @ {{m}}.T",
    f"{_MATRIX} -> torch.matmul({{x}}, {{m}}.mT)",
    "nn.Parameter(torch.randn({k}, {rows})) -> {m} @ {x}",
    "nn.Buffer(torch.randn({last}, {k})) -> torch.matmul({x}, {m})",
    "nn.Buffer(torch.randn({last}, {k})) -> aten.mm({x}, {m})",
    "nn.Buffer(torch.randn({k}, {last}).to_sparse()) -> torch.sparse.mm({m}, {x}.T).T",
    f"{_MATRIX} -> torch.addmm(torch.ones(()).to({{x}}), {{x}}, {{m}}.T, beta={{0|2}}, alpha={{1|-3|0.5}})",
    f"{_SQUARE} -> {{m}}({{m}}({{x}}))",
    f"{_SQUARE} -> {{m}}({{x}}) + F.linear({{x}}, {{m}}.weight.T)",
    f"{_SQUARE} -> {{m}}({{x}}) @ {{m}}.weight",
    f"{_MATRIX} -> F.linear({{x}}, {{{{m}}.tanh()|{{m}} * 2.5|-{{m}}|F.normalize({{m}})}})",
    f"{_MATRIX} -> F.linear({{x}}, {{{{m}}.exp()|{{m}}.softmax(1)|{{m}}[:1]|{{m}}.cumsum(0)}})",
    f"{_MATRIX} -> F.linear({{x}}, {{m}} * ({{m}} > 0))",
    f"{_MATRIX} -> F.linear({{x}}, {{m}}.T @ {{m}})",
    f"{_MATRIX} -> F.linear({{x}}, torch.linalg.qr({{m}}.T)[0].T)",
    "nn.ParameterList([torch.randn({k}, 2), torch.randn(2, {last})]) -> F.linear({x}, {m}[0] @ {m}[1])",
    "parametrizations.weight_norm(nn.Linear({last}, {k}), dim={0|1|None}) -> {m}({x})",
    "parametrizations.spectral_norm(nn.Linear({last}, {k})) -> {m}({x})",
    "parametrizations.orthogonal(nn.Linear({last}, {k})) -> 3 * {m}({x})",
    "nn.utils.weight_norm(nn.Linear({last}, {k})) -> {m}({x})",
    "nn.utils.spectral_norm(nn.Linear({last}, {k})) -> {m}({x})",
    "prune.random_unstructured(nn.Linear({last}, {k}), 'weight', 0.4) -> {m}({x})",
    "fuzz_modules.parametrized(nn.Linear({last}, {k}), fuzz_modules.Adapter({k}, {last})) -> {m}({x})",
    "fuzz_modules.parametrized(nn.Linear({last}, {k}), fuzz_modules.Scaled({0.5|-2.0})) -> {m}({x})",
    "fuzz_modules.parametrized(nn.Linear({last}, 3), fuzz_modules.Scaled(4.0), 'bias') -> {m}({x})",
    "nn.Bilinear({last}, {last}, 2) -> {m}({x}, {x})",
    "torch.einsum('b...i->b...i', {x})",
    f"{_MATRIX} -> torch.einsum({{'b...i,oi->b...o'|'b...i,oi->bo...'|'b...i,oi->b...'|'...i,oi'}}, {{x}}, {{m}})",
    "nn.Parameter(torch.randn({channels}, {last}, {k})) -> torch.einsum('bc...i,cio->bc...o', {x}, {m})",
    "nn.Buffer(torch.randn({last})) -> torch.matmul({x}, {m})",
    f"{_MATRIX} -> torch.tensordot({{x}}, {{m}}, dims=([-1], [1]))",
    "nn.Parameter(torch.randn({channels}, {last}, {k})) -> torch.bmm({x}.flatten(1, -2).transpose(0, 1), {m})",
    "nn.Parameter(torch.randn({channels}, {last}, {k})) -> "
    "torch.baddbmm({m}[:, :1], {x}.flatten(1, -2).transpose(0, 1), {m}, alpha={2|-0.5})",
)

RECURRENT = {
    2: (
        "nn.{RNN|LSTM|GRU}Cell({last}, 3, bias={True|False}) -> "
        "({m}({x})[0] if isinstance({m}, nn.LSTMCell) else {m}({x}))",
        "nn.RNNCell({last}, 2, nonlinearity='relu') -> {m}({x})",
        "nn.GRUCell({last}, {last}) -> {m}({x}, {x}.tanh())",
        "nn.LSTMCell({last}, {last}) -> {m}({x}, ({x}, 3 * {x}.sin()))[{0|1}]",
    ),
    3: (
        "nn.{RNN|LSTM|GRU}({last}, 2, {1|2}, bidirectional={True|False}, batch_first=True) -> {m}({x})[0]",
        "nn.{RNN|GRU}({last}, 2, bias={True|False}) -> {m}({x}.transpose(0, 1))[{0|1}].transpose(0, 1)",
        "nn.RNN({last}, 2, nonlinearity='relu', batch_first=True) -> {m}({x})[0]",
        "nn.LSTM({last}, 3, proj_size={0|2}, batch_first=True) -> {m}({x})[1][{0|1}].transpose(0, 1)",
    ),
}

_CONV = "groups={1|1|{channels}}, stride={1-3}, dilation={1-2}, padding={0-1}"
_KERNELS = "torch.randn({channels}, {channels}, *[{1|2|3}] * ({rank} - 2))"

CONVOLUTIONS = {
    None: (
        f"nn.Parameter({_KERNELS}) -> (F.conv1d, F.conv2d, F.conv3d)[{{rank}} - 3]"
        "({x}, ({m} - {m}.mean(1, keepdim=True)) / ({m}.var() + 0.1).sqrt())",
        f"nn.Parameter({_KERNELS}) -> "
        "torch.convolution({x}, {m}, None, [{1|2}], [{0|1}], [{1|2}], {True|False}, [0], 1)",
        f"nn.Parameter({_KERNELS}) -> (F.conv1d, F.conv2d, F.conv3d)[{{rank}} - 3]({{x}}, {{m}}, "
        "stride={1-3}, dilation={1-2}, padding={1|'same'|'valid'|0})",
        f"nn.Parameter({_KERNELS}) -> (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[{{rank}} - 3]"
        "({x}, {m}, stride={1-3}, padding={0-1})",
        f"nn.Buffer({_KERNELS}) -> (F.conv1d, F.conv2d, F.conv3d)[{{rank}} - 3]({{x}}, {{m}})",
        f"nn.Parameter({_KERNELS}) -> (F.conv1d, F.conv2d, F.conv3d)[{{rank}} - 3]({{x}}, {{m}}.tanh())",
    ),
    3: (
        f"nn.Conv1d({{channels}}, {{channels}} * {{1|2}}, {{1|2|3}}, {_CONV}) -> {{m}}({{x}})",
        "nn.Conv1d({channels}, 2, {2|3}, padding={1|2|'same'}, padding_mode={'circular'|'reflect'|'replicate'})"
        " -> {m}({x})",
        "nn.ConvTranspose1d({channels}, 2, {2|3}, stride=2, padding={0|1}, output_padding={0|1}) -> {m}({x})",
        "parametrizations.weight_norm(nn.Conv1d({channels}, 2, {1|2|3})) -> {m}({x})",
        "nn.Sequential(nn.Conv1d({channels}, 2, {1|2|3}), nn.BatchNorm1d(2)) -> {m}.eval()({x})",
    ),
    4: (
        f"nn.Conv2d({{channels}}, {{channels}}, {{1|2|3|(2, 3)}}, {_CONV}) -> {{m}}({{x}})",
        "nn.Conv2d({channels}, 2, {2|(3, 1)}, padding={1|'same'}, padding_mode={'circular'|'reflect'|'replicate'})"
        " -> {m}({x})",
        "nn.ConvTranspose2d({channels}, 1, {2|3}, stride={1|2}, padding={0|1}, dilation={1|2}) -> {m}({x})",
        "parametrizations.spectral_norm(nn.Conv2d({channels}, 2, {1|2|3})) -> {m}({x})",
        "nn.Sequential(nn.Conv2d({channels}, 2, 2), nn.BatchNorm2d(2, affine={True|False})) -> {m}.eval()({x})",
    ),
    5: (
        "nn.Conv3d({channels}, 2, {1|2|(1, 2, 2)}, padding={0-1}) -> {m}({x})",
        "nn.ConvTranspose3d({channels}, 1, {1|2}, padding={0|1}) -> {m}({x})",
    ),
}

POINTWISE = (
    "torch.sigmoid({x})", "F.hardsigmoid({x})", "F.hardswish({x})", "F.silu({x})", "F.mish({x})", "F.selu({x})",
    "F.gelu({x}, approximate={'none'|'tanh'})", "torch.erf({x})", "F.elu({x}, {1.0|0.5|2.0|-0.5})",
    "aten.elu({x}, {0.7|-1.0}, {1.3|-1.0}, {0.5|2.0|-2.0})", "F.celu({x}, {1.0|0.5|3.0|-1.0})",
    "F.leaky_relu({x}, {0.01|-2.5|0.0|1.5})", "F.rrelu({x}, 0.1, {0.5|3.0}, training={False|False|True})",
    "F.softplus({x}, {1|0.5|5.0|-1.0}, {20|1|0.1|-1})", "F.softshrink({x}, {0.5|0.0})",
    "F.threshold({x}, {0.1|0.0|-1.0}, {0.1|0.0|-1.0|2.0})", "F.relu({x})", "F.relu6({x})", "torch.tanh({x})",
    "F.logsigmoid({x})", "aten.log_sigmoid_forward({x})[0]", "F.hardtanh({x}, {-1.0|0.3}, {1.0|0.3})", "{x}.abs()",
    "-{x}", "torch.neg({x})", "torch.positive({x})", "torch.sin({x})", "torch.cos({x})", "torch.atan({x})",
    "torch.arctan({x})", "torch.asinh({x})", "torch.arcsinh({x})", "{x}.clamp({None|-0.5|0.7}, {0.6|-0.2})",
    "{x}.clamp({buffer}, None)", "torch.clip({x}, {-0.5|0.5})", "{x}.clamp_min({0.1|-1})", "{x}.clamp_max({0.1|-1})",
    "aten.clamp_min({x}, {buffer})", "aten.clamp_max({x}, {buffer})", "torch.clamp({x}, max={y})",
    "{x}.clone().relu_()", "{x}.clone().tanh_()", "F.leaky_relu({x}.clone(), {0.2|-3.0}, inplace=True)",
    "nn.PReLU() -> {m}({x})", "nn.PReLU({channels}, init={0.25|-2.0}) -> {m}({x})",
    "nn.Buffer(torch.randn(1)) -> F.prelu({x}, {m})", "nn.Parameter(torch.randn({channels})) -> F.prelu({x}, {m} * 2)",
    "nn.Parameter(3 * torch.rand({channels})) -> aten._prelu_kernel({x}, "
    "{m}.view(-1, *[1] * ({rank} - 2)))",
    "F.dropout({x}, {0.5|1.0|0.0}, training={False|True})", "F.feature_alpha_dropout({x}, 0.5, training=False)",
    "F.alpha_dropout({x}, 0.5, {False|True})", "torch.feature_dropout({x}, 0.5, False)",
    "torch.native_dropout({x}, 0.3, False)[0]", "nn.Dropout(0.7) -> {m}({x})", "F.softsign({x})", "F.tanhshrink({x})",
    "F.hardshrink({x})", "nn.Softsign() -> {m}({x})", "nn.Tanhshrink() -> {m}({x})",
    "nn.Softshrink({0.5|0.1}) -> {m}({x})", "{x} * torch.sigmoid({x})", "{x} * torch.sigmoid({1.702|-0.5|3} * {x})",
    "{x} / ({x}.abs() + 1)", "{x} / (1 + {x}.abs())", "torch.rsub(torch.tanh({x}), {x}, alpha={1|2})",
    "{x} - torch.tanh({x})", "torch.sub({x}, {x}.tanh(), alpha=1)", "{x}.square()", "{x}.exp()", "{x}.round()",
    "{x}.sign()", "torch.exp({x}.clamp(max=1.0))", "{x}.pow(1)", "{x}.pow(3)", "{x}.fmod(1.0)",
    "F.glu(torch.cat([{x}, {x}], 1), 1)", "torch.sqrt({x}.abs())", "{x}.frac()",
    "{0.5|-2.0} * {x} * ({1.0|0.3} + torch.{erf|tanh|sigmoid}({x} / {1.4142|-0.5}))",
    "0.5 * {x} * (1 + torch.tanh({0.79788456|1.3} * ({x} + {0.044715|0.1} * {x}.pow(3))))",
    "{x} * torch.{sigmoid|tanh|erf|sin|atan}({x} + {1|-0.3})", "{x} * F.relu6({x} + {3|-1}) / {6|-2}",
    "{x} * ({x} + {0.5|2}).clamp({-1.0|0}, {1.0|2.0})", "{x} * torch.tanh(F.softplus({x}, {1|2.0}))",
    "{x} * torch.log1p({x}.exp()).tanh()", "{x} * ({x} {>|<|>=|<=} {0|0.4})", "{x} * ({x} > 0).to({x}.dtype)",
    "torch.where({x} > {0|1}, {x}, {2 * {x}|2 * {x} - 1|0.0|{x}.expm1()|{y}})", "{x}.masked_fill({x} {<|>} {0|1}, 0.0)",
    "{x} / (1 + torch.exp(-{x}))", "1 / (1 + torch.exp({1|-2} * {x}))", "torch.exp(-{x}.{square|abs}() {+|-} {x})",
    "{x} * torch.exp(-{x}.square())", "torch.exp(-{x}.square() / {2|0.1} + 1)", "{x} * torch.rsqrt(1 + {x}.square())",
    "1 / (1 + {2|0.5} * {x}.{square|abs}())", "torch.sqrt({x} * {x} + {0.1|0})", "{x} + torch.sin({2|0.5} * {x}) ** 2",
    "torch.log2({x}.abs() + {1|0.2})",
    "{x} * {x}.sign()", "{x} * torch.sign({x} - 1)", "{x}.tanh() * {y}.{sigmoid|sin|relu}()",
    "{x}.clamp(max={1.0|0.1}).{exp|exp2|expm1}()", "torch.{log|log2|log10|log1p|sqrt|rsqrt}({x}.abs() + {0.3|0})",
    "({x}.relu() + {0.5|0}).reciprocal()", "{x}.clamp(-1, {1|2}).{square()|pow(3)|pow(2.5)}",
    "({x}.relu() + {0.5|0}) ** {-1.5|-2|1.5|0.5}", "{x}.tanh() / ({y}.sigmoid() + {1|0})",
    "{2.0|{buffer}} / (1 + {x}.abs())",
    "{x}.softmax({d}) * {x}.cos()", "({x}.tanh() * {buffer}).sigmoid() * {y}.sin()",
)  # fmt: skip

SHAPE = (
    "{x}.view({shape})", "{x}.contiguous().view({shape})", "{x}.reshape({shape})", "aten._unsafe_view({x}, [{shape}])",
    "torch.view_copy({x}, [{shape}])", "{x}.view_as({y})", "{x}.flatten({1|0|-2}, {-1|1})",
    "{x}.reshape_as({y}.flatten(1))", "{x}.flatten(1).unflatten(1, [{sizes}])", "{x}.unsqueeze({0|1|-1|2})",
    "{x}.unsqueeze(2).squeeze({2|2|[1, 2]})", "{x}.squeeze()", "torch.unsqueeze_copy({x}, {1|-1})",
    "torch.squeeze_copy({x}.unsqueeze(1), {1|-1})", "{x}.permute({perm})", "torch.permute_copy({x}, {perm})",
    "{x}.transpose({d}, {e})", "{x}.transpose({D}, {d})", "{x}.transpose(0, 1)", "torch.transpose_copy({x}, {d}, {e})",
    "{x}.flatten(1).t()", "{x}.swapaxes({d}, {e})", "torch.swapdims({x}, {d}, {e})", "{x}.movedim({d}, {e})",
    "torch.moveaxis({x}, {D}, {d})", "{x}.flatten(1).T", "{x}.adjoint()", "{x}.mT", "{x}[..., {1:|:-1|::2|-1:}]",
    "{x}[:, {1:|:-1|::2|-1:|[0, 0, -1]|None}]", "{x}[{:1|1:|::2|0|[1, 0]}]",
    "torch.slice_copy({x}, {d}, 0, None, {1|2})", "{x}.select({d}, {0|-1})", "torch.select_copy({x}, {d}, 0)",
    "{x}.narrow({d}, {0|1}, {1|2})", "{x}.split({1|2}, {d})[{0|-1}]", "{x}.split([1, {x}.shape[{d}] - 1], {d})[0]",
    "torch.cat({x}.split([1, {last} - 1], -1)[::-1], -1)", "torch.split_copy({x}, {1|2}, {d})[0]",
    "torch.split_with_sizes_copy({x}, [1, {last} - 1], -1)[1]", "{x}.chunk(2, {d})[-1]",
    "torch.cat({x}.chunk(2, {D}), {d})", "torch.tensor_split({x}, {2|3}, {d})[1]", "{x}.unbind({d})[-1]",
    "torch.stack({x}.unbind({d})[::-1], {d})", "torch.unbind_copy({x}, {d})[0]",
    "torch.unsafe_split({x}, {1|2}, {d})[0]", "torch.unsafe_chunk({x}, 2, {d})[0]", "{x}.flip({dims})", "{x}.flip(0)",
    "{x}.roll({1|-2}, {d})", "{x}.roll(1)", "{x}.roll((1, -1), ({d}, {e}))",
    "{x}[:, :1].expand(-1, {2|3}, *[-1] * ({rank} - 2))", "{x}.unsqueeze(1).expand(-1, {2|3}, *[-1] * ({rank} - 1))",
    "{x}[:, :1].expand_as({x})", "{x}[..., :1].broadcast_to({x}.shape)", "torch.expand_copy({x}[:, :1], {x}.shape)",
    "{x}.repeat(1, *[{1|2|3}] * ({rank} - 1))", "{x}.repeat(2, *[1] * ({rank} - 1))",
    "{x}.repeat_interleave({2|3}, {d})", "{x}.repeat_interleave(2, 0)", "{x}.tile({(2,)|(1, 2)|(2, 1, 1)})",
    "{x}.unfold({d}, {1|2|3}, {1|2})", "torch.unfold_copy({x}, {d}, 2, {1|2})",
    "nn.Buffer(torch.randint({last}, ({k},))) -> {x}.index_select(-1, {m})",
    "nn.Buffer(torch.randint({channels}, ({k},))) -> {x}[:, {m}]",
    "nn.Buffer(torch.rand({last}) > 0.4) -> {x}[..., {m}]",
    "nn.Buffer(torch.randint({last}, (2, {last}))) -> {x}.flatten(1)[:, {m}]",
    "nn.Buffer(torch.randint({channels}, (2, 3, *[{sizes}][1:]))) -> {x}.gather(1, {m})",
    "nn.Buffer(torch.tensor([1, 0])) -> {x}[{m}]", "{x}.gather(1, {x}.argsort(1))", "{x}.sort(-1)[0]",
    "{x}.unsqueeze(1).diagonal({0|1}, -1, -2)", "torch.diagonal_copy({x}, 0, {d}, {e})", "{x}.diagonal(0, 0, 1)",
    "torch.rot90({x}, {1|2|3}, ({d}, {e}))", "torch.rot90({x}, 1, (0, 1))", "{x}.tril({0|-1|1})", "{x}.triu({0|-1|1})",
    "F.pad({x}, {pad?}, value={0.0|-2.0})", "F.pad({x}, {pad}, mode={'reflect'|'replicate'|'circular'})",
    "torch.constant_pad_nd({x}, {pad?}, {0|1.5})", "aten._pad_enum({x}, {pad}, {1|2|3|0})",
    "aten._pad_circular({x}, {pad})", "F.pad({x}, [0] * (2 * {rank} - 2) + [{0|2}, 2])", "{x}.clone()",
    "aten.contiguous({x})", "aten.alias({x})", "{x}.detach()", "{x} + {x}.detach()", "aten.lift_fresh({x})",
    "aten.lift_fresh_copy({x})", "{x}.to(torch.float64)", "{x}.to({y})", "{x}.type_as({y})",
    "aten._to_copy({x}, dtype=torch.float64)",
    "{x}.sort({d}, descending={True|False})[{0|0|1}]", "{x}.transpose(0, 1).msort()", "{x}.topk({1|2}, {d})[0]",
    "torch.where({x} {>|>=|<|<=} {y}, {{x}, {y}|{y}, {x}})", "torch.where({x} > {y} + 1, {x}, {y})",
    "torch.where({x}[:, :1] {>|<} {x}[:, 1:], {x}[:, :1], {x}[:, 1:])",
    "(lambda a, b: torch.{cat|stack}([torch.where(a > b, a, b), torch.where(a {>|<=} b, {b, a|a, b})], {0|1|-1}))"
    "(*{x}.chunk(2, {1|-1}))",
    "(lambda a, b: torch.cat([{torch.maximum|torch.minimum}(a, b), torch.where(a < b, {a, b|b, a})], {1|-1}))"
    "({x}[:, ::2], {x}[:, {1::2|::2}])",
    "{x}.topk(2, {d}, sorted=False)[0]", "{x}.kthvalue({1|2}, {d}, keepdim={True|False})[0]",
    "{x}.{cummax|cummin}({D})[0]", "{x}.cumsum({D})", "{x}.diff(dim={D}, n={1|2})",
    "{x}.diff(dim=-1, prepend=torch.ones_like({x}[..., :1]))",
    "nn.Buffer(torch.randint({last}, ({last},))) -> torch.zeros_like({x}).index_add(-1, {m}, {x}, alpha={1|-2})",
    "nn.Buffer(torch.randint({last}, ({last},))) -> ({x} * 2).index_add(-1, {m}, {y})",
    "nn.Buffer(torch.randint({last}, ({last},))) -> torch.zeros_like({x}).scatter_add(-1, {m}.expand({x}.shape), {x})",
    "nn.Buffer(torch.randint({last}, ({last},))) -> {y}.scatter_reduce(-1, {m}.expand({x}.shape), {x}, "
    "'{sum|amax|amin|mean|prod}', include_self={True|False})",
    "torch.slice_scatter({x}, {y}[..., 1:], -1, 1)", "torch.select_scatter({x}, {y}.select({d}, 0), {d}, -1)",
    "torch.diagonal_scatter({x}, {y}.diagonal(0, -2, -1), 0, -2, -1)", "aten.copy({x}, {y}[:, :1])",
    "F.fold({x}.flatten(1).unsqueeze(2).expand(-1, -1, 4), (2, 2), 1)", "torch.zeros_like({x}).copy_({y})",
    "torch.channel_shuffle({x}, {2|{channels}})",
    "aten.native_channel_shuffle({x}, 2)", "torch.cat([{x}, {x}[:, :1]], 1).contiguous()",
)  # fmt: skip

IMAGES = (
    "F.fold(F.unfold({x}, {2|(1, 2)}), {x}.shape[-2:], {2|(1, 2)})",
    "F.unfold({x}, {2|(2, 3)}, {1|2}, {0|1}, {1|2})",
    "F.pixel_shuffle(torch.cat([{x}] * 4, 1), 2)",
    "F.pixel_unshuffle({x}[..., :2, :2], 2)",
    "aten.reflection_pad2d({x}, [1, {0|1}, {0|2}, 1])",
    "aten.replication_pad2d({x}, [1, {0|1}, {0|2}, 1])",
)

POOLING = {
    3: (
        "F.max_pool1d({x}, {2|3}, {1|2|3}, {0|1}, {1|2}, {True|False})",
        "aten.max_pool1d_with_indices({x}, [2], [{1|2}], [{0|1}])[0]",
        "F.avg_pool1d({x}, {2|3}, {1|2}, {0|1}, {True|False}, {True|False})",
        "F.adaptive_avg_pool1d({x}, {1|2|3|5})",
        "F.adaptive_max_pool1d({x}, {1|2|3|5})",
        "F.lp_pool1d({x}, {2|1|4}, {2|3}, {1|2})",
        "nn.LPPool1d({2|1|4|float('inf')}, {2|3}, {1|2}, ceil_mode={True|False}) -> {m}({x})",
        "F.interpolate({x}, scale_factor={2|1.5}, mode={'nearest'|'linear'|'nearest-exact'})",
        "F.interpolate({x}, size={2|5|8}, mode='linear', align_corners={True|False})",
        "aten.upsample_nearest1d({x}, [{1|3|8}])",
    ),
    4: (
        "F.max_pool2d({x}, {2|(2, 3)}, {1|2|(2, 1)}, {0|1}, {1|2}, {True|False})",
        "F.max_pool2d({x}, {2|3}, {1|2}, {0|1}, return_indices=True)[0]",
        "F.avg_pool2d({x}, {2|(2, 3)}, {1|2}, {0|1}, {True|False}, {True|False}, {None|3|-2})",
        "F.adaptive_avg_pool2d({x}, {1|2|(3, None)|(2, 5)})",
        "aten._adaptive_avg_pool2d({x}, [{1|2|3}, 2])",
        "F.adaptive_max_pool2d({x}, {1|2|(2, 3)})",
        "nn.LPPool2d({2|4|1}, {2|(2, 3)}, {1|2}, ceil_mode={True|False}) -> {m}({x})",
        "F.interpolate({x}, scale_factor={2|0.5}, mode={'nearest'|'bilinear'|'bicubic'|'nearest-exact'})",
        "F.interpolate({x}, size=(2, 5), mode={'bilinear'|'bicubic'}, align_corners={True|False}, antialias=True)",
        "F.fractional_max_pool2d({x}, 2, output_size=2)",
    ),
    5: (
        "F.max_pool3d({x}, {2|(1, 2, 2)}, {1|2}, {0|1})",
        "F.max_pool3d({x}, 2, 1, return_indices=True)[0]",
        "F.avg_pool3d({x}, {2|3}, {1|2}, {0|1}, {True|False}, {True|False}, {None|3})",
        "F.adaptive_avg_pool3d({x}, {1|2|(1, 2, 3)})",
        "aten._adaptive_avg_pool3d({x}, [2, 1, 2])",
        "F.adaptive_max_pool3d({x}, {1|2|(1, 2, 3)})",
        "nn.LPPool3d(2, 2, {1|2}) -> {m}({x})",
        "F.interpolate({x}, size=(2, 4, 3), mode={'nearest'|'trilinear'|'nearest-exact'})",
        "aten.reflection_pad3d({x}, [1, 0, 0, 1, 0, 0])",
        "aten.replication_pad3d({x}, [1, 0, 0, 1, 0, 0])",
    ),
}

UPSAMPLING = {
    3: (
        "aten._upsample_nearest_exact1d({x}, [{2|5}])",
        "aten.upsample_linear1d({x}, [{2|8}], {True|False}, {None|0.7})",
    ),
    4: (
        "aten.upsample_nearest2d({x}, [{2|5}, 4])",
        "aten.upsample_bilinear2d({x}, [5, 3], {True|False})",
        "aten.upsample_bicubic2d({x}, [{2|5}, 4], {True|False})",
        "aten._upsample_nearest_exact2d({x}, [3, 5])",
        "aten._upsample_bilinear2d_aa({x}, [2, {3|5}], {True|False})",
        "aten._upsample_bicubic2d_aa({x}, [2, {3|5}], {True|False})",
    ),
    5: (
        "aten.upsample_nearest3d({x}, [2, 4, {1|3}])",
        "aten._upsample_nearest_exact3d({x}, [2, 4, {1|3}])",
        "aten.upsample_trilinear3d({x}, [2, {3|4}, 3], {True|False})",
    ),
}

_STATISTICS = "torch.zeros({channels}), torch.rand({channels}) + {0.01|0.5}"

NORMALISATIONS = (
    "nn.LayerNorm({last}, eps={1e-5|0.1}, elementwise_affine={True|False}) -> {m}({x})",
    "nn.LayerNorm([{sizes}], eps={1e-5|0.1}) -> {m}({x})",
    "nn.Parameter(3 * torch.randn({last})) -> F.layer_norm({x}, ({last},), {m}, None, {0.1|0.01})",
    "aten.native_layer_norm({x}, [{last}], None, None, 0.05)[0]",
    "nn.RMSNorm({last}, eps={0.1|1e-3}) -> {m}({x})",
    "F.rms_norm({x}, ({last},), {buffer}, {0.1|1e-5})",
    "nn.GroupNorm({1|{channels}}, {channels}, eps={1e-5|0.1}) -> {m}({x})",
    "F.group_norm({x}, {1|{channels}}, eps=0.02)",
    "aten.native_group_norm({x}, None, None, 2, {channels}, {places}, 1, 0.1)[0]",
    "F.instance_norm({x}, eps={1e-5|0.1})",
    "nn.InstanceNorm1d({channels}, affine=True, track_running_stats={True|False}) -> {m}.eval()({x})",
    "nn.BatchNorm1d({channels}, affine={True|False}, eps={1e-5|0.1}) -> {m}.eval()({x})",
    "nn.BatchNorm1d({channels}, track_running_stats=False) -> {m}({x})",
    f"nn.ParameterList([{_STATISTICS}]) -> F.batch_norm({{x}}, {{m}}[0].detach(), {{m}}[1].detach(), "
    "{m}[0] + 2, eps=0.01)",
    f"nn.ParameterList([{_STATISTICS}]) -> aten._native_batch_norm_legit_no_training({{x}}, None, None, "
    "{m}[0].detach(), {m}[1].detach(), 0.1, 1e-3)[0]",
    f"nn.ParameterList([{_STATISTICS}]) -> torch.native_batch_norm({{x}}, None, None, {{m}}[0].detach(), "
    "{m}[1].detach(), {False|True}, 0.1, 1e-3)[0]",
    "nn.LocalResponseNorm({1|2|3}, alpha={1.0|1e-2}, beta={0.75|0.5}, k={1.0|2.0|0.3}) -> {m}({x})",
    "F.local_response_norm({x}, 2)",
    "F.normalize({x}, dim={d}, eps={1e-12|0.5})",
    "torch.softmax({x}, {D})",
    "F.log_softmax({x}, {d})",
    "aten._softmax({x}, {d}, False)",
    "aten._log_softmax({x}, {d}, False)",
    "F.softmin({x}, {d})",
    "F.gumbel_softmax({x}, dim={d})",
)

REDUCTIONS = (
    "{x}.mean({dim?}, keepdim={True|False})", "{x}.sum({dim?}, keepdim={True|False})", "{x}.sum({D})", "{x}.mean()",
    "{x}.sum({dims}, dtype=torch.float64)", "{x}.amax({dim?}, keepdim={True|False})", "{x}.amin({dim?})", "{x}.amax()",
    "{x}.max({d})[0]", "{x}.min({D}, keepdim=True)[0]", "{x}.max({d})[1].double()", "{x}.max()", "torch.max({x}, {y})",
    "torch.min({x}, {buffer})", "{x}.logsumexp({dim?}, keepdim={True|False})",
    "torch.linalg.vector_norm({x}, {2|1|3|2.5|float('inf')|0.5|0|-1}, {dim?}, keepdim={True|False})",
    "torch.linalg.norm({x}, dim={d})", "{x}.norm(p={2|1|3|float('inf')|0}, dim={dims}, keepdim={True|False})",
    "aten.frobenius_norm({x}, {dims})", "aten.norm({x}, {2|3|1}, [{d}], {True|False})", "{x}.norm()", "{x}.std({d})",
    "{x}.std({dim?}, correction={0|1|0.5}, keepdim={True|False})",
    "{x}.var({d})", "{x}.prod({d})", "{x}.cumprod({d})", "{x}.median({d})[0]", "{x}.nanmean({d})",
)  # fmt: skip

PRODUCTS = (
    "{x} + {y}", "{x} - {y}", "torch.add({x}, {y}, alpha={2|-0.5|0})", "torch.sub({x}, {y}, alpha={2|-0.5})",
    "torch.rsub({x}, {y}, alpha={3|-1})", "torch.subtract({x}, {y}, alpha={1|0.5})", "1 - {x}", "{x} + {buffer}",
    "{buffer} - {x}", "{x} + {x}[:, :1]", "{x} + {parameter}", "{x} - {x}.mean({d}, keepdim=True)",
    "{x} + {x}.flip(0)", "{x}.unsqueeze(1) + {x}.unsqueeze(2)", "{x} * {2.5|-0.3|0|True}", "{x} * {buffer}",
    "{parameter} * {x}", "torch.multiply({x}, {buffer})", "torch.mul({x}, {parameter}.exp())", "{x} * {mask}",
    "{x} / {2.5|-0.3}", "{x} / {positive}", "torch.divide({x}, {positive})", "torch.true_divide({x}, {buffer})",
    "{x} / {parameter}", "torch.div({x}, {0.3|2}, rounding_mode={'floor'|'trunc'})", "{x} // 0.5", "1 / {x}",
    "{x} * {y}", "{x} * {x}[:, :1]", "{x} / (1 + {y}.abs())", "{x}.clone().mul_({2|-3})",
    "{x}.clone().add_({y}, alpha={2|-1})", "{x} * {x}.sigmoid()", "torch.maximum({x}, {y})",
    "torch.minimum({x}, {buffer})", "torch.maximum({x}, {x}[:, :1])", "torch.where({mask}, {x}, {y})",
    "torch.where({mask}, {x}, {0.0|3})", "torch.where({x} > 0, {x}, {y})", "torch.where({mask}, {x}, {x}[:, :1])",
    "{x}.masked_fill({mask}, {0.0|-2})", "{x}.masked_fill({x} > 0, 1.0)", "torch.cat([{x}, {y}], {d})",
    "torch.cat([{x}, {y}, {x}], {D})", "torch.concat([{x}, {y}.relu()], {d})",
    "torch.concatenate([{x}, 2 * {y}], {d})", "torch.stack([{x}, {y}], {0|1|-1})",
    "torch.cat([{x}, torch.ones_like({x})], 1)", "{x} @ {y}.mT", "torch.bmm({x}, {y}.mT)", "{x} * {x}.shape[0]",
    "{x} * (len({x}) + 0.5)", "{x} + torch.zeros_like({x})", "torch.addcmul({x}, {buffer}, {y})",
    "torch.lerp({x}, {y}, {0.3|-2.0})", "torch.lerp({x}, {buffer}, torch.rand({last}).to({x}))",
    "torch.addcmul({x}, {y}, {buffer}, value={-2|0.5})", "torch.addcmul({x}, {x}, {y})",
    "torch.cdist({x}, {y}, p={2.0|1.0|3.0|0.5})", "nn.Buffer(torch.randn(3, {last})) -> torch.cdist({x}, {m})",
    "{x} * ({x}.norm(dim=-1, keepdim=True) / ({x}.norm(dim=-1, keepdim=True).mean(1, keepdim=True) + 1e-3))",
    "{out} = {x}.norm(dim=-1, keepdim=True) ;; {x} * ({out} / ({out}.mean(1, keepdim=True) + {1e-3|0.0}))",
    "{x} * torch.arange({last}).to({x})",
)  # fmt: skip


SPECTRA = (
    "torch.fft.irfft(torch.fft.rfft({x}, {None|4}, {d}, '{ortho|forward|backward}'), dim={d})",
    "torch.view_as_real(torch.fft.{fft|ifft}({x}, dim={D}, norm={None|'ortho'}))",
    "torch.fft.rfft({x}).{abs()|real|imag}",
    "torch.fft.irfft(torch.view_as_complex(torch.stack([{x}, {y}], -1)), {None|3})",
    "torch.fft.ifft({x}).abs()",
    "torch.fft.{fft2|ifft2|rfft2|fftn|ifftn|rfftn}({x}, dim=(-1,)).abs()",
    "torch.fft.irfftn(torch.fft.rfftn({x}, dim=[-1]), dim=[-1])",
    "torch.fft.irfft2(torch.fft.rfft2({x}, dim=(1, -1)), {x}.shape[1:2] + {x}.shape[-1:], (1, -1))",
    "torch.fft.fftshift(torch.fft.fft({x}), dim=-1).conj().real",
    "torch.fft.ifftshift({x}, dim={D})",
    "nn.Parameter(torch.randn({last}) + 0j) -> torch.fft.ifft(torch.fft.fft({x}) * {m}).real",
    "nn.Parameter(torch.randn({last}, 2) + 1j) -> (torch.fft.fft({x}) @ {m}).real",
    "aten.view_as_complex(torch.stack([{x}, {x}], -1)).resolve_conj().imag",
    "aten.resolve_neg(torch.fft.fft({x})).real",
    "aten._conj(torch.fft.fft({x})).real",
    "aten.conj(torch.fft.fft({x})).real",
    "torch.fft.ifft2(torch.fft.fft2({x}, dim=(1, -1)), dim=(1, -1)).real",
    "aten._neg_view({x})",
    "torch.fft.fft({x}).conj().imag",
)

OPERATIONS: tuple[Production, ...] = (
    *productions("linear", LINEAR),
    *(p for rank, templates in RECURRENT.items() for p in productions("recurrent", templates, rank)),
    *productions("spectrum", SPECTRA),
    *(p for rank, templates in CONVOLUTIONS.items() for p in productions("convolution", templates, rank)),
    *productions("pointwise", POINTWISE),
    *productions("shape", SHAPE),
    *productions("shape", IMAGES, 4),
    *productions("shape", ("aten.reflection_pad1d({x}, [1, {0|2}])", "aten.replication_pad1d({x}, [2, {0|1}])"), 3),
    *(p for rank, templates in POOLING.items() for p in productions("pooling", templates, rank)),
    *productions("normalisation", NORMALISATIONS),
    *productions("reduction", REDUCTIONS),
    *productions("product", PRODUCTS),
    *(p for rank, templates in UPSAMPLING.items() for p in productions("upsampling", templates, rank)),
)
"""All of them."""
