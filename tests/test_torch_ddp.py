"""Two processes with half of the batch each, and one with all of it.

Run as a program, this file is one of the two processes.
"""

import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gsgd.torch import GSGD

SETTINGS = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}


class Net(nn.Module):
    """A residual CNN; what a batch norm does depends on how the batch is divided, so there is none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(2, 6, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(6, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1))
        self.head = nn.Linear(6, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.head(torch.relu(x + self.block(x)).mean((2, 3)))


def train(model: nn.Module, opt: GSGD, part: slice) -> None:
    random = torch.Generator().manual_seed(1)
    for _ in range(5):
        x = torch.randn(8, 2, 4, 4, generator=random, dtype=torch.float64)
        y = torch.randint(3, (8,), generator=random)
        opt.zero_grad()
        nn.functional.cross_entropy(model(x[part]), y[part]).backward()
        opt.step()


def main(directory: Path, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory / 'meet'}", rank=rank, world_size=2)
    model = Net()
    if rank:  # a start of its own, over which DDP writes that of the other process
        for p in model.parameters():
            nn.init.normal_(p)
    opt = GSGD(model, **SETTINGS)
    parallel = DistributedDataParallel(model)
    train(parallel, opt, slice(4 * rank, 4 * rank + 4))
    result = {"weights": dict(model.named_parameters()), "units": opt.network.num_units, "state": opt.state_dict()}
    torch.save(result, directory / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    alone = Net()
    opt = GSGD(alone, **SETTINGS)
    train(alone, opt, slice(None))
    runs = [
        subprocess.Popen([sys.executable, __file__, str(tmp_path), str(rank)], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        errors = [run.communicate(timeout=100)[1] for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert [run.returncode for run in runs] == [0, 0], errors
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert one["units"] == other["units"] == opt.network.num_units == 10
    for name, p in alone.named_parameters():
        assert torch.equal(one["weights"][name], other["weights"][name])
        torch.testing.assert_close(one["weights"][name], p, rtol=1e-10, atol=1e-12)
        assert not torch.allclose(p, Net().get_parameter(name), rtol=1e-3)
    # its names have the prefix of the wrapper
    opt.load_state_dict(other["state"])
    train(alone, opt, slice(None))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
