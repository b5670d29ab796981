"""What a model's operators are called, how often they count, and what is refused, by name."""

import copy
import re

import pytest
import torch
from support.networks import Lambda
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from lightning_lip.errors import UnsupportedLayerError
from lightning_lip.kernels.tensors import without_autocast
from lightning_lip.models.modules import eval_mode
from lightning_lip.operators.base import MatrixOperator, ParametrizedMatrixOperator
from lightning_lip.operators.selection import cover


class Net(nn.Module):
    """A container, a nested one, and a head: the usual shape of a user's module."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 4), nn.Dropout()))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.net(x))


def names(model, layers=None, exclude=None):
    return [op.name for op in cover(model, layers, exclude).operators]


def counts(model, **kwargs):
    return {op.name: op.multiplicity for op in cover(model, **kwargs).operators}


ALL = ["net.0", "net.2.0", "head"]


@pytest.mark.parametrize(
    ("layers", "exclude", "expected"),
    [
        (None, None, ALL),
        ("head", None, ["head"]),
        ("net.0", None, ["net.0"]),
        ("net", None, ["net.0", "net.2.0"]),
        ("net.*", None, ["net.0", "net.2.0"]),
        ("net.[0-1]", None, ["net.0"]),
        ("*.0", None, ["net.0", "net.2.0"]),
        ("*", None, ALL),
        (["head", "net.0"], None, ["net.0", "head"]),
        (("head",), None, ["head"]),
        (None, "head", ["net.0", "net.2.0"]),
        (None, "net", ["head"]),
        (None, ["net.0", "head"], ["net.2.0"]),
        (None, "head.weight", ["net.0", "net.2.0"]),
        (None, "head.bias", ALL),
        (None, "*.bias", ALL),
        ("net", "net.2", ["net.0"]),
    ],
)
def test_selection_and_exclusion_by_name_and_pattern(layers, exclude, expected):
    assert names(Net(), layers, exclude) == expected


def test_selection_by_module():
    model = Net()
    assert names(model, layers=model.net) == ["net.0", "net.2.0"]
    assert names(model, layers=[model.head, "net.0"]) == ["net.0", "head"]
    assert names(model, layers=model) == ALL
    assert names(model, exclude=model.net[2]) == ["net.0", "head"]


def test_patterns_are_case_sensitive():
    with pytest.raises(ValueError, match="'Net' matches no module"):
        names(Net(), layers="Net")


@pytest.mark.parametrize("argument", ["layers", "exclude"])
def test_a_pattern_that_matches_nothing_lists_what_exists(argument):
    listing = r"net\.0 \(Linear\), net\.2\.0 \(Linear\), head \(Linear\)"
    with pytest.raises(ValueError, match=rf"`{argument}`: 'bod\*' matches no module.*{listing}"):
        cover(Net(), **{argument: ["head", "bod*"]})
    with pytest.raises(ValueError, match=rf"`{argument}`: Linear module matches no module.*{listing}"):
        cover(Net(), **{argument: nn.Linear(1, 1)})


def test_nothing_left_lists_what_exists():
    with pytest.raises(ValueError, match=r"No layer with a weight matches layers='net\.1'.*net\.0 \(Linear\)"):
        cover(Net(), layers="net.1")
    with pytest.raises(ValueError, match=r"No layer with a weight matches .*exclude='\*'"):
        cover(Net(), exclude="*")
    with pytest.raises(ValueError, match=r"Layers with weights are: none\."):
        cover(nn.ReLU())


@pytest.mark.parametrize("argument", ["layers", "exclude"])
def test_selection_of_wrong_type(argument):
    with pytest.raises(TypeError, match=f"`{argument}` to hold module names, .* or types of modules, got 3"):
        cover(Net(), **{argument: [3]})
    with pytest.raises(TypeError, match=rf"`{argument}` to hold module names, .*, got <class 'int'>"):
        cover(Net(), **{argument: int})
    for wrong in (3, {"head": 1}, len):
        with pytest.raises(TypeError, match=rf"`{argument}` to be a module name, .*, got {re.escape(repr(wrong))}"):
            cover(Net(), **{argument: wrong})
    with pytest.raises(ValueError, match=f"`{argument}` is empty"):
        cover(Net(), **{argument: []})


def test_an_alias_selects_and_excludes_like_the_first_name():
    model = Net()
    model.last = model.head
    assert counts(model) == {"net.0": 1, "net.2.0": 1, "head": 1}
    assert names(model, layers="last") == ["head"]
    assert names(model, exclude="last") == ["net.0", "net.2.0"]
    sequence = nn.Sequential(nn.Linear(2, 2), layer := nn.Linear(2, 2), layer)
    assert counts(sequence, layers="2") == {"1": 2}
    assert counts(sequence, exclude="2") == {"0": 1}


def test_a_linear_layer_alone_is_a_model():
    (op,) = cover(nn.Linear(3, 2)).operators
    assert op.name == ""
    with pytest.raises(ValueError, match=r"Layers with weights are: \(the model itself\) \(Linear\)"):
        cover(nn.Linear(3, 2), exclude="weight")


def test_torch_compile_does_not_show_in_names():
    assert names(torch.compile(Net())) == ALL
    model = Net()
    model.net[2] = torch.compile(model.net[2])
    model.head = torch.compile(model.head)
    assert names(model) == ALL
    assert names(model, layers="head") == ["head"]
    assert names(model, layers=model.net) == ["net.0", "net.2.0"]
    assert names(model, layers=model.head) == ["head"]
    model = Net()
    model.compile()
    assert names(model) == ALL


def test_data_parallel_does_not_show_in_names():
    assert names(nn.DataParallel(Net())) == ALL
    assert names(torch.compile(nn.DataParallel(Net()))) == ALL


def test_ddp_does_not_show_in_names():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        assert names(nn.parallel.DistributedDataParallel(Net())) == ALL
        assert names(nn.parallel.DistributedDataParallel(nn.Linear(2, 2))) == [""]
    finally:
        torch.distributed.destroy_process_group()


def test_a_users_attribute_named_module_does_show():
    assert names(Lambda(None, module=nn.Linear(2, 2))) == ["module"]


def test_a_tied_weight_is_one_operator_that_counts_twice():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    assert counts(model) == {"0": 2, "1": 1}
    assert counts(model, exclude="2") == {"0": 1, "1": 1}
    assert counts(model, layers=["1", "2"]) == {"1": 1, "2": 1}


def test_equal_weights_are_not_tied():
    layer = nn.Linear(4, 4)
    assert counts(nn.Sequential(layer, copy.deepcopy(layer))) == {"0": 1, "1": 1}


def test_a_module_that_a_container_holds_k_times_counts_k_times():
    layer = nn.Linear(4, 4)
    assert counts(nn.Sequential(layer, nn.ReLU(), layer, layer)) == {"0": 3}
    assert counts(nn.ModuleList([layer, layer])) == {"0": 2}
    block = nn.Sequential(layer, nn.ReLU(), layer)
    assert counts(nn.Sequential(block, block, nn.Linear(4, 4))) == {"0.0": 4, "2": 1}
    # A dict, and attributes, are names for one thing.
    assert counts(nn.ModuleDict({"a": layer, "b": layer})) == {"a": 1}


class OwnForward(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class EmptySubclass(nn.Linear):
    pass


def patched():
    layer = nn.Linear(3, 3)
    layer.forward = lambda x: x
    return layer


def pruned():
    return prune.l1_unstructured(nn.Linear(3, 3), "weight", 0.5)


def old_weight_norm():
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.utils.weight_norm(nn.Linear(3, 3))


def quantised():
    dynamic = pytest.importorskip("torch.ao.nn.quantized.dynamic")
    try:
        return dynamic.Linear(3, 3)
    except RuntimeError as error:  # no quantised engine in this build of torch
        pytest.skip(str(error))


def holding(weight):
    """Return a linear layer with this weight, which need not be one that a linear layer can have."""
    layer = nn.Linear(3, 3)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def own_parameter_beside_children():
    module = nn.Sequential(nn.Linear(3, 3))
    module.register_parameter("scale", nn.Parameter(torch.ones(())))
    return module


NORMALISATION = "a normalisation is bounded in its place in the graph only: pass example_input="

REFUSED = {
    "LazyConv2d": (lambda: nn.LazyConv2d(1, 3), "its lazy weight has no shape yet"),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(3), NORMALISATION),
    "BatchNorm1d without weights": (lambda: nn.BatchNorm1d(3, affine=False), NORMALISATION),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(3), NORMALISATION),
    "LayerNorm": (lambda: nn.LayerNorm(3), NORMALISATION),
    "LayerNorm without weights": (lambda: nn.LayerNorm(3, elementwise_affine=False), NORMALISATION),
    "GroupNorm": (lambda: nn.GroupNorm(1, 3), NORMALISATION),
    "RMSNorm": (lambda: nn.RMSNorm(3), NORMALISATION),
    "Embedding": (lambda: nn.Embedding(3, 3), "an embedding is a look-up"),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(3, 3), "an embedding is a look-up"),
    "Bilinear": (lambda: nn.Bilinear(3, 3, 3), "a product of two inputs has no finite Lipschitz constant"),
    "LSTM": (lambda: nn.LSTM(3, 3), "recurrent layers are not supported"),
    "GRUCell": (lambda: nn.GRUCell(3, 3), "recurrent layers are not supported"),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(4, 2), "attention has no finite Lipschitz constant"),
    "PReLU": (nn.PReLU, r"what it computes from its parameters \['weight'\] is not known"),
    "own Parameter": (
        lambda: Lambda(None, gamma=nn.Parameter(torch.ones(3))),
        r"what it computes from its parameters \['gamma'\] is not known",
    ),
    "own Parameter beside children": (own_parameter_beside_children, r"from its parameters \['scale'\] is not known"),
    "own forward": (lambda: OwnForward(3, 3), "it has a forward of its own"),
    "patched forward": (patched, "it has a forward of its own"),
    "pruned": (pruned, r"forward pre-hook \(pruning, .* torch\.nn\.utils\.prune\.remove"),
    "old weight_norm": (old_weight_norm, "use torch.nn.utils.parametrizations"),
    "old spectral_norm": (lambda: nn.utils.spectral_norm(nn.Linear(3, 3)), "use torch.nn.utils.parametrizations"),
    "quantised": (quantised, "its weight is quantised"),
    "quantised look-alike": (lambda: Lambda(None, weight=lambda: torch.ones(3, 3)), "its weight is quantised"),
    "int8": (
        lambda: holding(torch.ones(3, 3, dtype=torch.int8)),
        "Tensor of torch.int8, torch.strided, not a dense fp64, fp32, fp16 or bf16 tensor",
    ),
    "float8": (
        lambda: holding(torch.ones(3, 3).to(torch.float8_e4m3fn)),
        "of torch.float8_e4m3fn, torch.strided, not a dense",
    ),
    "complex": (lambda: nn.Linear(3, 3, dtype=torch.complex64), "of torch.complex64, torch.strided, not a dense"),
    "sparse": (lambda: holding(torch.eye(3).to_sparse()), "Tensor of torch.float32, torch.sparse_coo, not a dense"),
    "flat shard": (
        lambda: holding(torch.ones(9)),
        r"shape \(9,\) instead of \(out_features, in_features\), as FSDP1's shards",
    ),
    "no outputs": (lambda: nn.Linear(3, 0), r"shape \(0, 3\) instead of"),
    "LoRA": (
        lambda: Lambda(None, base_layer=nn.Linear(3, 3), lora_A=nn.Linear(3, 1), lora_B=nn.Linear(1, 3)),
        "merge the adapter first",
    ),
    "LazyLinear": (lambda: nn.LazyLinear(3), "run one forward pass first"),
    "meta device": (lambda: nn.Linear(3, 3, device="meta"), "on the meta device: materialise the model first"),
}


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature", "ignore:.*quantization.*deprecated")
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.filterwarnings("ignore:.*[Cc]omplex modules are a new feature")
@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case):
    build, reason = REFUSED[case]
    model = nn.ModuleDict({"body": nn.Linear(3, 3), "odd": build()})
    kind = type(model["odd"]).__name__
    with pytest.raises(UnsupportedLayerError, match=rf"(?s)- odd \({kind}\): .*{reason}") as error:
        cover(model)
    # The remedy of the message is a remedy; of a block, its other layers stay.
    remedy = "odd.scale" if case == "own Parameter beside children" else "odd"
    assert f"exclude='{remedy}'" in str(error.value)
    assert set(names(model, exclude=remedy)) - {"body"} == ({"odd.0"} if remedy == "odd.scale" else set())
    # A layer that was not selected is not looked at.
    assert names(model, layers="body") == ["body"]


def test_all_refusals_are_told_at_once():
    model = nn.Sequential(nn.Embedding(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3))
    with pytest.raises(
        UnsupportedLayerError, match=r"(?s)- 0 \(Embedding\).*- 2 \(BatchNorm1d\).*exclude=\['0', '2'\]"
    ):
        cover(model)


def test_the_models_own_parameters_are_refused_and_excluded_by_name():
    model = Net()
    model.position, model.token = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    with pytest.raises(UnsupportedLayerError, match=r"(?s)- position, token \(Net\).*exclude=\['position', 'token'\]"):
        cover(model)
    assert names(model, exclude=["position", "token"]) == ALL
    with pytest.raises(UnsupportedLayerError, match="exclude='token'"):
        cover(model, exclude="position")


def test_a_submodules_own_parameter_is_excluded_by_name():
    model = nn.ModuleDict({"block": own_parameter_beside_children()})
    assert names(model, exclude="block.scale") == ["block.0"]


def test_excluding_a_weight_excludes_a_layer_that_has_nothing_else():
    model = nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 3))
    assert names(model, exclude="0.weight") == ["1"]
    with pytest.raises(UnsupportedLayerError, match="normalisation"):
        cover(model, exclude="0.bias")


def test_excluding_the_bias_of_a_parametrised_layer_keeps_its_weight():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 3))
    assert names(model, exclude="*.bias") == ["0", "1"]


def test_a_subclass_with_linears_own_forward_is_a_linear():
    assert names(nn.Sequential(EmptySubclass(3, 3))) == ["0"]


def test_layers_without_weights_are_no_obstacle():
    others = [nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.MaxPool1d(1), nn.Identity(), nn.MSELoss()]
    assert names(nn.Sequential(nn.Linear(3, 3), *others)) == ["0"]


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_pruning_made_permanent_and_lazy_layers_after_a_forward_are_served():
    layer = pruned()
    prune.remove(layer, "weight")
    assert names(nn.Sequential(layer)) == ["0"]
    model = nn.Sequential(nn.LazyLinear(3))
    model(torch.ones(1, 2))
    assert names(model) == ["0"]


def test_a_parametrised_bias_leaves_the_weight_direct():
    layer = parametrizations.weight_norm(nn.Linear(3, 3), "bias", dim=None)
    (op,) = cover(layer).operators
    assert op.direct_parameter is layer.weight


def operators_of_one_weight():
    plain = nn.Linear(5, 3, dtype=torch.float64)
    normed = parametrizations.weight_norm(nn.Linear(5, 3, dtype=torch.float64))
    return [MatrixOperator("plain", plain), ParametrizedMatrixOperator("normed", normed)]


@pytest.mark.parametrize("op", operators_of_one_weight(), ids=lambda op: op.name)
def test_operator_protocol(op):
    weight = op.module.weight
    assert (op.domain_shape, op.codomain_shape) == ((5,), (3,))
    torch.testing.assert_close(op.weight(), weight, rtol=1e-14, atol=0)
    x, y = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    torch.testing.assert_close(op.apply(x), x @ weight.T)
    torch.testing.assert_close(op.adjoint(y), y @ weight)
    # <y, W x> = <W^T y, x>
    torch.testing.assert_close((op.apply(x) * y).sum(), (op.adjoint(y) * x).sum())
    norm = op.norm(y[0], x[0])
    assert norm.shape == ()
    torch.testing.assert_close(norm, y[0] @ weight @ x[0])
    expected = torch.autograd.grad(torch.sum(weight * torch.outer(y[0], x[0])), op.parameters)
    torch.testing.assert_close(torch.autograd.grad(norm, op.parameters), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights_are_used_in_the_vectors_dtype(dtype):
    op = MatrixOperator("", nn.Linear(5, 3, dtype=dtype))
    u, v = torch.ones(3), torch.ones(5)
    assert (op.norm(u, v).dtype, op.apply(v[None]).dtype, op.adjoint(u[None]).dtype) == (torch.float32,) * 3
    assert op.norm(u, v).item() == pytest.approx(op.weight().double().sum().item(), rel=1e-6)
    op.norm(u, v).backward()
    assert op.module.weight.grad.dtype == dtype


def test_direct_parameter():
    plain, normed = operators_of_one_weight()
    assert plain.direct_parameter is plain.module.weight
    assert normed.direct_parameter is None
    assert {id(p) for p in normed.parameters} == {id(p) for n, p in normed.module.named_parameters() if n != "bias"}


def test_an_operator_follows_a_replaced_weight():
    layer = nn.Linear(3, 3)
    op = MatrixOperator("layer", layer)
    layer.weight = nn.Parameter(torch.full((3, 3), 2.0))
    assert op.weight() is layer.weight
    layer.load_state_dict({"weight": torch.zeros(3, 3), "bias": torch.zeros(3)}, assign=True)
    assert op.weight() is layer.weight
    clone = copy.deepcopy(op)
    assert clone.weight() is clone.module.weight
    assert clone.module is not layer


def test_a_weight_that_went_away_is_an_error():
    layer = nn.Linear(3, 3)
    op = MatrixOperator("layer", layer)
    parametrizations.weight_norm(layer)
    with pytest.raises(RuntimeError, match=r"'layer' is no longer a parameter of its own.*select the layers again"):
        op.weight()
    op = ParametrizedMatrixOperator("layer", layer)
    parametrize.remove_parametrizations(layer, "weight")
    with pytest.raises(RuntimeError, match=r"'layer' lost its parametrization.*select the layers again"):
        op.weight()


def test_the_weight_of_a_spectral_norm_is_computed_in_eval_mode():
    layer = parametrizations.spectral_norm(nn.Linear(4, 4))
    op = ParametrizedMatrixOperator("layer", layer)
    before = copy.deepcopy(layer.state_dict())
    op.weight(), op.domain_shape, op.apply(torch.ones(1, 4))
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    assert all(m.training for m in layer.modules())


def test_eval_mode_gives_each_module_its_own_mode_back():
    model = Net()
    model.net.eval()
    modes = [m.training for m in model.modules()]
    with eval_mode(model):
        assert not any(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == modes
    assert len(set(modes)) == 2


def test_without_autocast():
    x = torch.ones(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        with without_autocast():
            assert (x @ x).dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16
    with without_autocast():
        assert not torch.is_autocast_enabled("cpu")
