"""The newest token of each row through the model, started without waiting for the device: how a GPU decodes.

    read     embedding, input blocks                        one CUDA graph
    steps    the loop over HRM steps, on the cache          whatever starts steps there: hrm_kernels/drivers.py
    write    output blocks, final norm, lm_head             one CUDA graph

How deep a row goes is known to the device alone until the caller reads it, together with the tokens that it has drawn
meanwhile: one wait a token. Rows run no further than their earlier tokens have: one that would is left for
incremental.py to finish, and so is one whose earlier tokens were not decoded at its depth yet.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

import hrm_kernels as ops
from hrm_kernels import NewestTokens, Past

from .cache import HRMCache
from .model import LanguageModel


class Started(NamedTuple):
    """What is on its way, on the device. R rows of the cache; what rows without a new token hold is unspecified."""

    logits: Tensor
    """[R, V], right for rows whose depth was reached and decoded by their earlier tokens."""
    executed: Tensor
    """[R] int64, steps run."""
    halted: Tensor
    """[R] bool, whether by the head's decision."""


class NewestDecoder:
    """Decodes over one cache. Holds graphs, and so addresses of the model's parameters.

    Args:
        driver: who starts the steps, of hrm_kernels/drivers.py; "host" takes no graphs at all.
    """

    def __init__(self, model: LanguageModel, cache: HRMCache, driver: str):
        self.model, self.driver = model, driver
        # the cache keeps its decoders: a reference back would keep both until the garbage collector comes by
        self._cache = weakref.ref(cache)
        self._weights = model.hrm_core.weights()
        self._parameters = [(p, p.data_ptr()) for p in model.parameters()]
        n, c, device = cache.rows, model.config.n_embd, cache.device
        self._row = torch.arange(n, device=device)
        self._ids, self._position, self._plane = (torch.zeros(n, dtype=torch.int64, device=device) for _ in range(3))
        self._rotary = None if cache.rotary is None else cache.rotary[:1].repeat(n, 1, 1)[:, None]
        self._x, self._z_H = (torch.zeros((n, 1, c), dtype=cache.x.dtype, device=device) for _ in range(2))
        self._past = ops.StepPast(cache.kv_core, cache.z_H, cache.z_L, cache.sums, self._position)
        self._graphs: dict[str, torch.cuda.CUDAGraph] = {}
        self._logits: Tensor | None = None

    @property
    def cache(self) -> HRMCache:
        """The cache it decodes over."""
        return self._cache()

    def fits(self) -> bool:
        """Whether the model's parameters are where they were: graphs hold addresses."""
        return all(p.data_ptr() == address for p, address in self._parameters)

    @classmethod
    def of(cls, model: LanguageModel, cache: HRMCache) -> NewestDecoder | None:
        """A decoder, where kernels run the loop over steps and attend to the cache; else None.

        None under autocast too: its copies of weights do not outlive a call, and a graph would go on reading them. A
        model that only decodes is better converted to the narrower type as a whole.
        """
        if torch.is_autocast_enabled(cache.device.type):
            return None
        core = model.hrm_core
        why_not = core.why_not_plain()
        driver = core.kernels.driver(None if why_not else core.weights(), cache.x, why_not)
        if driver is None or not ops.runs_kernel("cached_attention", cache.x):
            return None
        if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
            driver = "host"  # a graph would not call them
        return cls(model, cache, driver)

    def start(
        self, new: Mapping[int, int], limits: Mapping[int, int], may_halt: Mapping[int, bool], halt_bias: float
    ) -> Started:
        """Queue one token for each row of `new` (row -> id), at the place where the row ends.

        Args:
            limits: row -> steps to run at most, no more than all of its earlier tokens have run.
            may_halt: row -> whether the head's decision counts.
        """
        cache, core, n = self.cache, self.model.hrm_core, self.cache.rows
        told = [[new.get(row, 0) for row in range(n)], [cache.length(row) if row in new else -1 for row in range(n)]]
        told = ops.to_device(torch.tensor(told, dtype=torch.int64, device="cpu"), cache.device)
        self._ids.copy_(told[0])
        self._position.copy_(told[1])
        self._replay("read", self._read)
        found = core.kernels.run(
            self._weights, self._x, core.H_init, core.L_init, self._rotary, None,
            [limits.get(row, 0) for row in range(n)], [may_halt.get(row, False) for row in range(n)], halt_bias,
            driver=self.driver, past=self._past,
        )  # fmt: skip
        self._z_H.copy_(found.z_H)
        torch.clamp((found.executed - 1) * n, min=0, out=self._plane)
        self._plane += self._row
        self._replay("write", self._write)
        return Started(self._logits, found.executed, found.halted)

    def _read(self) -> None:
        cache, position = self.cache, self._position.clamp(min=0)
        x, rotary = self.model.embed(self._ids[None], position), None
        if cache.rotary is not None:
            self._rotary.copy_(cache.rotary[position][:, None])
            rotary = self._rotary[:, 0][None]
        tokens = NewestTokens(self._row, self._position, cache.positions)
        for block, kv in zip(self.model.input_blocks, cache.kv_input, strict=True):
            x = block.apply_to(x, rotary, None, Past(kv, tokens))
        self._x.copy_(x[0][:, None])
        # rows without a new token put back what is at their first place
        place = self._row * cache.positions + position
        flat = cache.x.view(-1, x.shape[-1])
        flat.index_copy_(0, place, torch.where((self._position >= 0)[:, None], x[0], flat[place]))

    def _write(self) -> None:
        rotary = None if self._rotary is None else self._rotary[:, 0][None]
        tokens = NewestTokens(self._plane, self._position, self.cache.positions)
        pasts = (Past(kv, tokens) for kv in self.cache.kv_output)
        h = self.model.decode(self._z_H.transpose(0, 1), rotary, None, pasts)
        logits = self.model.lm_head(h[0])
        if self._logits is None:
            self._logits = torch.empty_like(logits)
        self._logits.copy_(logits)

    def _replay(self, name: str, work: Callable[[], None]) -> None:
        """Do `work`: from the second time on by a graph, where graphs are taken."""
        if name in self._graphs:
            self._graphs[name].replay()
            return
        work()  # kernels are compiled and loaded when they first run, which a capture does not allow
        if self.driver == "host":
            return
        graph = torch.cuda.CUDAGraph()
        # thread_local: what other threads do meanwhile is not our capture's business
        stream = torch.cuda.Stream(self.cache.device)
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            work()
        self._graphs[name] = graph
