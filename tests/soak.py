"""`make soak`: trainings with saves, copies, forks, rescalings and refused steps at random, while memory stays flat.

Every event is checked: a resumed optimizer takes the same step, a refused one changes nothing, a fork steps on by
itself. It prints its seed, and a line a minute.
"""

from __future__ import annotations

import argparse
import copy
import io
import os
import pickle
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch_models import Net, assert_same, backward, example, train, weights

import gsgd.torch as gt

GROWTH = 32.0  # MB


def resident() -> float:
    """Memory of this process in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


class Training:
    """A model, its optimizer, and how to make such an optimizer for another model."""

    def __init__(self, dice: random.Random) -> None:
        self.dice, self.steps = dice, 0
        self.model = Net(dice.choice([torch.float32, torch.float64]), seed=dice.randrange(1000))
        method = dice.choice([gt.GSGD, gt.GAdam, gt.GRMSprop])
        options = {"lr": 1e-3, "weight_decay": dice.choice([0.0, 1e-3]), "clip_norm": dice.choice([None, 1.0])}
        self.make = lambda model: method(model, example_inputs=example(), **options)
        self.optimizer = self.make(self.model)

    def take_steps(self) -> None:
        torch.set_num_threads(self.dice.choice([1, 2]))
        count = self.dice.randrange(1, 20)
        train(self.model, self.optimizer, range(self.steps, self.steps + count))
        self.steps += count

    def resume(self) -> None:
        """From a saved state, or as a copy: the next step has the same bits."""
        model = copy.deepcopy(self.model)
        if self.dice.random() < 0.5:
            saved = io.BytesIO()
            torch.save(self.optimizer.state_dict(), saved)
            saved.seek(0)
            optimizer = self.make(model)
            optimizer.load_state_dict(torch.load(saved))
        else:
            model, optimizer = pickle.loads(pickle.dumps((self.model, self.optimizer)))
        for one, its in ((self.model, self.optimizer), (model, optimizer)):
            train(one, its, range(self.steps, self.steps + 1))
        assert_same(self.model, model)
        self.model, self.optimizer = model, optimizer
        self.steps += 1

    def refuse(self) -> None:
        """A gradient that is not finite leaves everything as it was."""
        before = weights(self.model)
        backward(self.model, self.steps)
        with_gradient = [p for p in self.model.parameters() if p.grad is not None and p.grad.numel()]
        self.dice.choice(with_gradient).grad.view(-1)[0] = self.dice.choice([np.nan, np.inf])
        with pytest.raises(FloatingPointError):
            self.optimizer.step()
        assert_same(before, self.model)

    def fork(self) -> None:
        """A child steps on by itself."""
        before = weights(self.model)
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)  # torch's own threads are not the child's
            ended = 1
            try:
                train(self.model, self.optimizer, range(3))
                ended = 0
            finally:
                os._exit(ended)
        assert os.waitpid(child, 0)[1] == 0
        assert_same(before, self.model)

    def rescale(self) -> None:
        """Outputs are kept; the coordinates go on."""
        net, x = self.optimizer.network, example(self.steps, next(self.model.parameters()).dtype)
        self.model.eval()
        outputs = self.model(x)
        gt.rescale(self.model, net, 2.0 ** np.array([self.dice.choice([-1, 0, 1]) for _ in net.units]))
        torch.testing.assert_close(self.model(x), outputs, rtol=1e-3, atol=1e-4)
        self.model.train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    arguments = parser.parse_args()
    print(f"make soak MINUTES={arguments.minutes:g} SEED={arguments.seed}", flush=True)
    dice = random.Random(arguments.seed)
    begin, counts, level, said = time.monotonic(), dict.fromkeys(("trainings", "events"), 0), 0.0, 0.0
    while (now := (time.monotonic() - begin) / 60) < arguments.minutes:
        training = Training(dice)
        counts["trainings"] += 1
        for _ in range(10):
            training.take_steps()
            dice.choice([training.resume, training.refuse, training.fork, training.rescale])()
            counts["events"] += 1
        if now < arguments.minutes / 5:  # until caches are full
            level = max(level, resident())
        assert resident() < level + GROWTH, f"memory grew from {level:.0f} to {resident():.0f} MB"
        if now - said >= 1:
            said = now
            print(f"{now:.0f} min: {counts}, {resident():.0f} MB", flush=True)
    print(f"passed: {counts}, memory {level:.0f} MB after a fifth, {resident():.0f} MB at the end")


if __name__ == "__main__":
    main()
