"""Who starts the steps of the batched-halting loop. Which rows go on is decided on the device; what is left is to start
the next step, or not.

    host    Python starts each step and reads how many rows go on one step late, from pinned memory: the device never
            waits for the host, and at worst one step is started in which every kernel returns at once.
    graph   one CUDA graph of all steps, replayed. No host in the loop; steps after the last row is done still start,
            and every kernel in them returns at once.
    while   a CUDA graph whose WHILE node a kernel sets (while_graph.py): as many steps as the slowest row takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

DRIVERS = ("host", "graph", "while")


@dataclass
class Steps:
    """A loop to be driven."""

    step: Callable[[], None]
    """Starts one step of the rows that go on; nothing if none do."""
    n_active: Tensor
    """[1] int32 on the device, rows that go on."""
    most: int
    """Steps after which none does."""
    decide: bool
    """Whether a row may be done earlier."""


class Graph(Protocol):
    """Steps that were captured."""

    def run(self) -> None:
        """Start them on the current stream."""


def host(steps: Steps) -> None:
    """Start steps until no row goes on."""
    if not steps.n_active.is_cuda:
        for _ in range(steps.most):
            if steps.n_active.item() == 0:
                return
            steps.step()
    elif not steps.decide:
        for _ in range(steps.most):
            steps.step()
    else:
        _one_late(steps)


def _one_late(steps: Steps) -> None:
    left = torch.empty(steps.most, dtype=torch.int32, device="cpu", pin_memory=True)
    copied = []
    for i in range(steps.most):
        steps.step()
        left[i : i + 1].copy_(steps.n_active, non_blocking=True)
        copied.append(torch.cuda.current_stream(steps.n_active.device).record_event())
        if i:
            copied[i - 1].synchronize()  # step i is queued behind it, so the device has work meanwhile
            if left[i - 1] == 0:
                break


def capture(driver: str, steps: Steps) -> Graph:
    """Capture `steps` for "graph" or "while". What they compute is not touched."""
    # Kernels are compiled and loaded when they first run, which a capture does not allow: run one step of no rows.
    steps.n_active.zero_()
    steps.step()
    if driver == "while":
        from .while_graph import WhileGraph

        return WhileGraph(steps.step, steps.n_active)
    return _AllSteps(steps)


class _AllSteps:
    def __init__(self, steps: Steps):
        self._graph, device = torch.cuda.CUDAGraph(), steps.n_active.device
        # A stream of its own: torch's for captures is on whichever device was current when it was first wanted.
        # thread_local: what other threads do meanwhile is not our capture's business.
        with torch.cuda.graph(self._graph, stream=torch.cuda.Stream(device), capture_error_mode="thread_local"):
            for _ in range(steps.most):
                steps.step()

    def run(self) -> None:
        self._graph.replay()
