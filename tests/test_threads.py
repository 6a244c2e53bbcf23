"""Threads: how many are asked for, where the system gives fewer, and in children of a process that has some."""

import os
import subprocess
import sys

import pytest

import gsgd


def run(program: str) -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-P", "-c", program], check=True, timeout=60)


@pytest.mark.parametrize("value", ["", "abc", "0", "-3", "1e3", "\u00b2", "99999999999", " 3 ", "2,4"])
def test_omp_num_threads(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a list the first; nonsense is as good as nothing."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    none = gsgd.threads.default_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert gsgd.threads.default_threads() == {" 3 ": 3, "2,4": 2}.get(value, none)


# 64 threads, each of which reserves some megabytes for its stack, where 60 MB are left
LIMITED = """
import resource, numpy as np, gsgd
params = {"a": np.ones((600, 600)), "b": np.ones((10, 600))}
opt = gsgd.GSGD(params, gsgd.Network.sequential(params), threads=64)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 60_000_000,) * 2)
for _ in range(3):
    opt.step({name: np.zeros_like(value) for name, value in params.items()})
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")
def test_no_more_threads_are_asked_for_than_can_be_made() -> None:
    """The OpenMP runtime would end the process."""
    run(LIMITED)


FORK = """
import os, threading, time, numpy as np, gsgd
params = {"a": np.random.default_rng(0).normal(size=(1500, 1500)), "b": np.ones((10, 1500))}
opt = gsgd.GSGD(params, gsgd.Network.sequential(params), threads=1, scale="initial", lr=1e-9)
grads = {name: np.zeros_like(value) for name, value in params.items()}
opt.step(grads)
stop = False
def run():
    while not stop:
        opt.step(grads)
thread = threading.Thread(target=run)
thread.start()
failed = 0
for _ in range(8):
    child = os.fork()
    if child == 0:
        try:
            opt.step(grads)
        except RuntimeError:
            os._exit(1)
        os._exit(0)
    failed += os.waitpid(child, 0)[1] != 0
stop = True
thread.join()
assert failed == 0, failed
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_steps_whatever_its_parents_threads_were_at() -> None:
    run(FORK)
