import pytest
import torch

from lightning_lip.bench.contenders.models import MODELS, TransformerBlock, gpt2_blocks, resnet18


def test_resnet18_and_gpt2_have_the_size_of_the_published_ones():
    # ResNet-18 with 10 classes and the 3 x 3 stem, and a block of GPT-2 small.
    assert sum(p.numel() for p in resnet18().parameters()) == 11_173_962
    assert sum(p.numel() for p in gpt2_blocks(1).parameters()) == 7_087_872


def test_a_causal_block_sees_no_later_token():
    torch.manual_seed(0)
    block = TransformerBlock(8, 2, causal=True)
    tokens = torch.randn(1, 5, 8)
    changed = tokens.clone()
    changed[:, 3:] += 1
    assert torch.equal(block(tokens)[:, :3], block(changed)[:, :3])
    assert not torch.allclose(block(tokens)[:, 3:], block(changed)[:, 3:])


@pytest.mark.parametrize(("name", "n_layers"), [("paper", 4), ("mnist", 3), ("resnet18", 21), ("vit", 12), ("gpt2", 8)])
def test_each_model_trains_and_has_its_layers(name, n_layers):
    model = MODELS[name]
    network = model.network()
    inputs, targets = model.batch(network)
    outputs = network(inputs[:2])
    assert len(model.layers(network)) == n_layers
    assert targets.shape == ((model.batch_size,) if model.n_classes else (model.batch_size, *outputs.shape[1:]))
    assert outputs.requires_grad
    again = model.network()
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))
