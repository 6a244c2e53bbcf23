"""A multilayer perceptron with ReLU and cross-entropy, and its gradients, in plain NumPy.

Parameters are ``w1, b1, w2, b2, ...``: weights ``(out, in)`` and biases ``(out,)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]  # of floats
Params = dict[str, Array]


def initial(widths: Sequence[int], rng: np.random.Generator) -> Params:
    """He initialisation: weights of variance 2 / in, biases of 0."""
    params: Params = {}
    for layer, (read, write) in enumerate(pairwise(widths), start=1):
        params[f"w{layer}"] = rng.normal(0, np.sqrt(2 / read), (write, read))
        params[f"b{layer}"] = np.zeros(write)
    return params


def forward(params: Params, x: Array) -> list[Array]:
    """What every layer reads, and the logits last."""
    depth = len(params) // 2
    values = [x]
    for layer in range(1, depth + 1):
        z = values[-1] @ params[f"w{layer}"].T + params[f"b{layer}"]
        values.append(np.maximum(z, 0) if layer < depth else z)
    return values


def log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_p: Array = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return log_p


def gradients(params: Params, x: Array, y: NDArray[np.int64]) -> Params:
    """The gradients of the mean cross-entropy over a batch, by back-propagation."""
    *read, logits = forward(params, x)
    delta = np.exp(log_softmax(logits))  # becomes dloss / d(output of the layer before its ReLU)
    delta[np.arange(len(y)), y] -= 1
    delta /= len(y)
    grads: Params = {}
    for layer in range(len(read), 0, -1):
        h = read[layer - 1]
        grads[f"w{layer}"] = delta.T @ h
        grads[f"b{layer}"] = delta.sum(axis=0)
        if layer > 1:
            delta = (delta @ params[f"w{layer}"]) * (h > 0)
    return grads


def evaluate(params: Params, x: Array, y: NDArray[np.int64], chunk: int = 4096) -> tuple[float, float]:
    """Mean cross-entropy and the fraction of wrong answers."""
    loss, wrong = 0.0, 0
    for first in range(0, len(y), chunk):
        answer = y[first : first + chunk]
        log_p = log_softmax(forward(params, x[first : first + chunk])[-1])
        loss -= float(log_p[np.arange(len(answer)), answer].sum())
        wrong += int((log_p.argmax(axis=1) != answer).sum())
    return loss / len(y), wrong / len(y)
