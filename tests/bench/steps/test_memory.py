import torch
from support.contenders import CPU

from lightning_lip.bench.steps.memory import Memory, memory_of


def test_memory_counts_what_is_held_and_the_peak():
    def work():
        kept = torch.zeros(1000)
        (torch.zeros(500), torch.zeros(250))
        return kept

    assert memory_of(work, CPU) == Memory(peak=4000 + 3000, held=4000)
    assert memory_of(lambda: None, CPU) == Memory(0, 0)
