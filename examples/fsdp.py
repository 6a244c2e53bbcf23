"""Train a character model whose weights are cut between processes, save it, and go on from the checkpoint.

    torchrun --nproc-per-node 2 examples/fsdp.py

On GPUs, replace "gloo" by "nccl" and "cpu" by "cuda".
"""

from __future__ import annotations

import tempfile
from pydoc_data.topics import topics

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import gsgd.torch

LENGTH, WIDTH = 32, 64


class Model(nn.Module):
    """A perceptron over the last `LENGTH` characters."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(128, 16)
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(16 * LENGTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU()
        )
        self.head = nn.Linear(WIDTH, 128)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.net(self.embed(tokens)))


def batch(text: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Every process draws its own part of a step's batch."""
    random = torch.Generator().manual_seed(step * dist.get_world_size() + dist.get_rank())
    start = torch.randint(len(text) - LENGTH - 1, (64,), generator=random)
    windows = text[start[:, None] + torch.arange(LENGTH + 1)]
    return windows[:, :-1], windows[:, -1]


def make() -> tuple[nn.Module, gsgd.torch.GAdam]:
    """The usual order: no weights, trace, shard, materialise, and then the optimizer."""
    with torch.device("meta"):
        model = Model()
    network = gsgd.torch.trace(model, torch.zeros(2, LENGTH, dtype=torch.long))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in (model.embed, model.net, model.head, model):
        fully_shard(part, mesh=mesh)
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model, gsgd.torch.GAdam(model, lr=3e-3, network=network)


def train(model: nn.Module, optimizer: gsgd.torch.GAdam, text: Tensor, steps: range) -> float:
    loss = torch.zeros(())
    for step in steps:
        tokens, following = batch(text, step)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tokens), following)
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def main() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    text = torch.frombuffer(bytearray("".join(topics.values()).encode("ascii", "replace")), dtype=torch.uint8).long()
    model, optimizer = make()
    first = train(model, optimizer, text, range(1))
    train(model, optimizer, text, range(1, 50))

    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder)
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"weights": weights, "state": state}, checkpoint_id=folder[0])
    expected = train(model, optimizer, text, range(50, 100))

    model, optimizer = make()
    weights, state = get_state_dict(model, optimizer)
    saved = {"weights": weights, "state": state}
    dcp.load(saved, checkpoint_id=folder[0])
    set_state_dict(model, optimizer, model_state_dict=saved["weights"], optim_state_dict=saved["state"])
    last = train(model, optimizer, text, range(50, 100))
    if dist.get_rank() == 0:
        print(f"loss {first:.3f}, after 100 steps {last:.3f}, without the interruption {expected:.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
