"""Trainers of other libraries go on bit for bit from their own checkpoints: `make test-wild` installs them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_models import Net, assert_same, example, loss_of, train

from gsgd.torch import GSGD, GAdam

STEPS, SAVED = 6, 3
Optimizer = GSGD | GAdam


def begin(kind: type[Optimizer], seed: int) -> tuple[nn.Module, Optimizer]:
    model = Net(seed=seed)
    settings: Any = {"momentum": 0.9} if kind is GSGD else {}
    return model, kind(model, lr=0.01, example_inputs=example(), **settings)


def uninterrupted(kind: type[Optimizer]) -> tuple[nn.Module, Optimizer]:
    model, opt = begin(kind, seed=0)
    train(model, opt, range(STEPS))
    return model, opt


@pytest.mark.parametrize("kind", [GSGD, GAdam])
def test_lightning(kind: type[Optimizer], tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.net, self.opt = begin(kind, seed)

        def configure_optimizers(self) -> Optimizer:
            return self.opt

        def training_step(self, _: Tensor) -> Tensor:
            return loss_of(self.net, self.global_step)  # the same batches for both

    def fit(module: Any, steps: int, checkpoint: Path | None = None) -> Any:
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        trainer = lightning.Trainer(accelerator="cpu", max_steps=steps, default_root_dir=tmp_path, **quiet)
        trainer.fit(module, torch.utils.data.DataLoader(range(STEPS)), ckpt_path=checkpoint)
        return trainer

    saved, resumed = tmp_path / "saved.ckpt", Module(seed=1)
    fit(Module(seed=0), SAVED).save_checkpoint(saved)
    fit(resumed, STEPS, saved)
    model, opt = uninterrupted(kind)
    assert_same(resumed.net, model)
    assert resumed.opt.stats == opt.stats


@pytest.mark.parametrize("kind", [GSGD, GAdam])
def test_accelerate(kind: type[Optimizer], tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")

    def fit(accelerator: Any, model: nn.Module, opt: Any, steps: range) -> None:
        for step in steps:
            opt.zero_grad()
            accelerator.backward(loss_of(model, step))
            opt.step()

    accelerator = accelerate.Accelerator(cpu=True)
    fit(accelerator, *accelerator.prepare(*begin(kind, seed=0)), range(SAVED))
    accelerator.save_state(tmp_path)
    accelerator, (resumed, its) = accelerate.Accelerator(cpu=True), begin(kind, seed=1)
    prepared = accelerator.prepare(resumed, its)
    accelerator.load_state(tmp_path)
    fit(accelerator, *prepared, range(SAVED, STEPS))
    model, opt = uninterrupted(kind)
    assert_same(resumed, model)
    assert its.stats == opt.stats
