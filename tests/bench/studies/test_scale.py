"""The arithmetic of bench/studies/scale.py against what 2 and 4 processes of the plugin count."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from lightning_lip import LipschitzRegularizer
from lightning_lip.bench.studies.scale import MODELS, Layer, traffic

SHAPES = [(48, 20, "columns"), (24, 48, "rows"), (5, 24, "columns")]
"""(out, in, how tensor parallelism splits it); 5 rows are split unevenly over 2 and 4 ranks of FSDP2."""

SCRIPT = """
import json, os, sys
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from lightning_lip import LipschitzRegularizer

data, tensor, shapes, path = json.loads(sys.argv[1])
torch.manual_seed(0)
net = nn.Sequential(*(nn.Linear(n, m) for m, n, _ in shapes))
mesh = init_device_mesh("cpu", (data, tensor), mesh_dim_names=("data", "tensor"))
if tensor > 1:
    parallel = {"columns": ColwiseParallel, "rows": RowwiseParallel}
    parallelize_module(net, mesh["tensor"], {str(i): parallel[how]() for i, (*_, how) in enumerate(shapes) if i < 2})
if data > 1:
    for layer in net:
        fully_shard(layer, mesh=mesh["data"])
regularizer = LipschitzRegularizer(net, coefficient=1.0)
net(torch.ones(2, 20)).square().sum().backward()
regularizer.add_grad_()
counted = []
all_reduce = distributed.all_reduce
def counting(tensor, *args, group=None, **kwargs):
    counted.append([distributed.get_world_size(group), tensor.numel() * tensor.element_size()])
    return all_reduce(tensor, *args, group=group, **kwargs)
distributed.all_reduce = counting
regularizer.add_grad_()
if distributed.get_rank() == 0:
    kept = sum(v.numel() * v.element_size() for v in regularizer.state_dict()["vectors"].values())
    with open(path, "w") as file:
        json.dump({"counted": counted, "kept": kept}, file)
distributed.barrier()
os._exit(0)  # gloo can abort while the interpreter ends
"""


@pytest.mark.skipif(sys.platform != "linux", reason="processes are started as on Linux")
@pytest.mark.skipif(torch.__version__ < (2, 7), reason="FSDP2 of torch 2.6 does not run on the CPU")
@pytest.mark.parametrize(("data", "tensor"), [(2, 1), (4, 1), (1, 2), (2, 2)])
def test_counted_bytes_are_those_of_the_formula(tmp_path, data, tensor):
    script, found = tmp_path / "count.py", tmp_path / "found.json"
    script.write_text(SCRIPT)
    # The last layer is in no plan of the script: the ranks of tensor parallelism would hold it whole.
    shapes = SHAPES if tensor == 1 else SHAPES[:2]
    arguments = json.dumps([data, tensor, shapes, str(found)])
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={data * tensor}"]
    done = subprocess.run([*start, script, arguments], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(found.read_text())
    said = traffic([Layer(*shape) for shape in shapes], data, tensor)
    assert sum(size for _, size in result["counted"]) == sum(said.summed)
    assert result["kept"] == said.kept - sum(
        4 * (m * n / (p * data * tensor) + p)
        for m, n, how in shapes
        for p in [m if how == "rows" and data == 1 and tensor > 1 else n]
    )
    # One all_reduce a step for each way of sharding; a second where rows and columns are split.
    assert len(result["counted"]) == {(2, 1): 1, (4, 1): 1, (1, 2): 1, (2, 2): 3}[data, tensor]


def test_the_vectors_of_one_process():
    net = nn.Sequential(*(nn.Linear(n, m) for m, n, _ in SHAPES))
    regularizer = LipschitzRegularizer(net, coefficient=1.0)
    regularizer.add_grad_()
    kept = sum(v.numel() * v.element_size() for v in regularizer.state_dict()["vectors"].values())
    # Whole weights keep their vectors on the shorter side; the formula is for sharded ones, which cannot choose.
    assert kept <= traffic([Layer(*shape) for shape in SHAPES], 1).kept


def test_sizes_of_the_models():
    for model, billions in (("Llama-2 7B", 6.607), ("Llama-2 70B", 68.71)):
        n_weights = sum(layer.out * layer.into * layer.copies for layer in MODELS[model])
        assert n_weights / 1e9 == pytest.approx(billions, rel=1e-3)
        assert traffic(MODELS[model], 1024).weights == pytest.approx(4 * n_weights / 1024)


def test_one_gpu_sends_nothing():
    one = traffic(MODELS["Llama-2 7B"], 1)
    assert one.sent == 0
    assert one.summed == (0, 0)
    assert torch.tensor(one.read) == 4 * one.weights
