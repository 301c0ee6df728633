"""HRMForCausalLM: ids -> embedding -> input blocks -> HRM core -> output blocks -> logits or loss."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hrm_kernels as ops

from .blocks import Block, Embedding, Linear, ReasoningBlock, RMSNorm
from .config import HRMConfig, is_int
from .core import GRADIENTS, HRMCore, Pasts
from .initial import truncated_init
from .output_head import CharacterHead

if TYPE_CHECKING:
    from .generate import Generated, Generation

IGNORE = -1
PUBLISHED_STEP_PENALTY = 0.01


@dataclass
class HRMOutput:
    """Result of a forward pass. B rows, T positions, V vocabulary."""

    logits: Tensor | None
    """[B, T, V]; None with targets unless return_logits."""
    loss: Tensor | None
    """Scalar float32: mean cross-entropy in nats over real targets; None without targets."""
    steps_taken: Tensor
    """[B] int64, as published: executed - 1 if the row halted by decision, else executed."""
    executed_steps: Tensor
    """[B] int64, HRM steps that were run for the row."""
    q_logits: Tensor
    """[B, 2] float32, [halt, continue] after the row's last step."""
    row_steps: Tensor
    """[2] int64: row-steps that were computed without and with gradient (a training pass looks at some twice)."""


class LanguageModel:
    """The parts of the model and what is computed with them, for a module to inherit: HRMForCausalLM here, and the
    one with Hugging Face's interface in hf/modeling.py. State-dict keys are the published ones."""

    def make_parts(self, config: HRMConfig) -> None:
        """Make the modules; their weights are whatever torch starts with."""
        self.wte = Embedding(config.vocab_size, config.n_embd)
        if not config.use_rotary:
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.input_blocks = nn.ModuleList(Block(config) for _ in range(config.n_input_layers))
        self.hrm_core = HRMCore(config)
        self.output_blocks = nn.ModuleList(Block(config) for _ in range(config.n_output_layers))
        self.ln_f = RMSNorm(config)
        if config.n_chars is None:
            self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        else:
            self.lm_head = CharacterHead(config)
        if config.tie_embeddings:
            self.lm_head.weight = self.wte.weight

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """N(0, 0.02) for weights and H_init, L_init; projections that end a branch N(0, 0.02 / sqrt(2 layers));
        biases 0; norms 1; gates of grown layers 0. config.init "truncated": see initial.py."""
        for name, p in self.named_parameters():
            self.reset_parameter(name, p)

    def reset_parameter(self, name: str, p: nn.Parameter) -> None:
        """The same for the parameter of this name. (Of torch's functions, which Hugging Face's loader looks into.)"""
        if self.config.init == "truncated":
            truncated_init(name, p, self.config.embed_scale)
        elif name.endswith(("bias", "gate_a")):
            nn.init.zeros_(p)
        elif p.dim() == 1 and "_init" not in name:
            nn.init.ones_(p)
        else:
            c = self.config
            layers = c.n_input_layers + c.n_output_layers + c.hrm_H_layers + c.hrm_L_layers
            branch_end = name.endswith(("c_proj.weight", "down.weight"))
            nn.init.normal_(p, 0.0, 0.02 / math.sqrt(2 * max(layers, 1)) if branch_end else 0.02)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The type of activations outside autocast: the norms', as other weights may be stored narrower."""
        return self.ln_f.weight.dtype

    @ops.shared_casts()
    def forward(
        self,
        ids_BT: Tensor,
        targets: Tensor | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        *,
        max_steps: int | None = None,
        force_steps: int | Sequence[int] | Tensor | None = None,
        halt_bias: float | None = None,
        gradient: str = "replay",
        gradient_steps: int = 1,
        gradient_window: int | None = None,
        pooled: Tensor | Sequence[int] | None = None,
        return_logits: bool = False,
        reduction: str = "mean",
        z_loss: float = 0.0,
        loss_rows: Tensor | None = None,
        logits_at: Tensor | None = None,
    ) -> HRMOutput:
        """One pass over a batch of right-padded rows; a row's result depends on nothing but that row.

        Args:
            ids_BT: [B, T] int64 token ids, B >= 1, 1 <= T <= block_size.
            targets: [B, T] int64, already shifted; -1 and positions >= lengths are ignored.
            lengths: [B] real tokens of each row, 1..T; default all T. A list or CPU tensor spares a synchronisation.
            max_steps: this call's hrm_max_steps.
            force_steps: exact steps for every row (int) or each row ([B]); in a list, 0 lets the head decide.
            halt_bias: added to q_halt; default config.halt_bias in eval mode, 0 in training mode.
            gradient: "replay" (each row's last step) or "published" (only rows that run all steps; a mean loss then
                carries the published 0.01 * mean(steps_taken), a constant).
            gradient_steps: with "replay", how many of each row's last steps have a gradient; memory grows with it.
            gradient_window: with "replay" of one step, how many of its last level applications have a gradient, at
                least 2 (one of each level); default all.
            pooled: [B] integers, 1..length: the leading tokens whose mean decides a row's depth, and gives q_logits;
                default its length. Training on a prefix's decision takes less than the whole row.
            return_logits: give logits beside the loss.
            reduction: "mean" over real targets or their "sum", which parts of a batch can be added up from.
            z_loss: weight of the squared log-partition in the loss, nats (PaLM, 2022, section 5).
            loss_rows: [K] int64, where the real targets are in the flattened batch, if the caller knows: nothing else
                is then decoded to the vocabulary. Of a conversation of which a quarter are answers, that is a quarter.
            logits_at: [B, K] int64 positions: logits are [B, K, V], of these alone; default all.

        Raises:
            ValueError: an argument out of range; the message names the value, the limit and the remedy.
        """
        self._check_tokens(ids_BT, targets)
        given, lengths = lengths, self._checked_counts("lengths", ids_BT, lengths)
        pooled = self._checked_pooled(ids_BT, pooled, given)
        max_steps = self.config.hrm_max_steps if max_steps is None else max_steps
        forced = checked_depths(force_steps, max_steps, ids_BT.shape[0])
        if gradient not in GRADIENTS:
            raise ValueError(f"gradient {gradient!r} is none of {', '.join(GRADIENTS)}")
        if gradient_steps != 1 and (gradient != "replay" or not is_int(gradient_steps) or gradient_steps < 1):
            raise ValueError(
                f"gradient_steps {gradient_steps!r} must be an integer of at least 1, and 1 unless replayed"
            )
        if gradient_window is not None:
            self._check_window(gradient_window, gradient, gradient_steps)
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction {reduction!r} is none of mean, sum")
        if halt_bias is None:
            halt_bias = 0.0 if self.training else self.config.halt_bias
        check_halt_bias(halt_bias)

        rotary = self.rotary(ids_BT.shape[1])
        x_BTC = self.embed(ids_BT)
        for block in self.input_blocks:
            x_BTC = block.apply_to(x_BTC, rotary, lengths)
        core = self.hrm_core(
            x_BTC, rotary, lengths, forced, max_steps, halt_bias, gradient, gradient_steps, pooled, gradient_window
        )
        h_BTC = self.decode(core.z_H, rotary, lengths)
        if torch.is_grad_enabled():
            h_BTC = _with_gradients(h_BTC, self._maybe_unused(gradient))

        loss = None
        steps_taken = core.executed_steps - core.halted.long()
        if targets is not None:
            loss = self.loss(h_BTC, targets, lengths, reduction, z_loss, loss_rows)
            if gradient == "published" and self.training and reduction == "mean":
                loss = loss + PUBLISHED_STEP_PENALTY * steps_taken.float().mean()
        logits = None
        if targets is None or return_logits:
            if logits_at is not None:
                h_BTC = h_BTC.take_along_dim(logits_at[..., None], 1)
            logits = self.lm_head(h_BTC)
        return HRMOutput(logits, loss, steps_taken, core.executed_steps, core.q_logits, core.row_steps)

    def recompute_activations(self, on: bool = True) -> None:
        """Keep only each block's input for the backward pass and compute the block again there: a fraction of the
        memory, for one more forward pass of the blocks that have a gradient. Gradients stay the same."""
        for module in self.modules():
            if isinstance(module, (Block, ReasoningBlock)):
                module.recompute = on

    def rotary(self, n_positions: int) -> Tensor | None:
        """The rotary table of positions 0..n-1, float32 [n, D/2, 2]; None with learned positions."""
        if not self.config.use_rotary:
            return None
        return ops.rope_table(torch.arange(n_positions, device=self.device), self.config.head_dim)

    def embed(self, ids_BT: Tensor, positions: Tensor | None = None) -> Tensor:
        """[B, T] ids -> [B, T, C]: token (and learned position) embedding, dropout in training. positions: [T] int64,
        default 0..T-1."""
        x_BTC = self.wte(ids_BT).to(self.compute_dtype) * self.config.embed_scale
        if not self.config.use_rotary:
            x_BTC = x_BTC + (self.wpe.weight[: ids_BT.shape[1]] if positions is None else self.wpe(positions))
        return F.dropout(x_BTC, self.config.dropout, self.training)

    def decode(self, z_H: Tensor, rotary: Tensor | None, lengths: Tensor | None, pasts: Pasts | None = None) -> Tensor:
        """Core state [B, T, C] -> output blocks -> final norm: the lm_head's input [B, T, C]."""
        for block in self.output_blocks:
            z_H = block.apply_to(z_H, rotary, lengths, None if pasts is None else next(pasts))
        return self.ln_f(z_H)

    def loss(
        self,
        h_BTC: Tensor,
        targets: Tensor,
        lengths: Tensor | None,
        reduction: str = "mean",
        z_loss: float = 0.0,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Cross-entropy of hidden states [B, T, C] against targets [B, T], -1 and padding ignored; `rows` as loss_rows
        in forward()."""
        if lengths is not None:
            padding = torch.arange(targets.shape[1], device=targets.device) >= lengths[:, None]
            targets = targets.masked_fill(padding, IGNORE)
        h_MC, targets = h_BTC.reshape(-1, h_BTC.shape[-1]), targets.reshape(-1)
        if rows is not None:
            h_MC, targets = h_MC.index_select(0, rows), targets.index_select(0, rows)
        if self.config.n_chars is not None:
            return self.lm_head.loss(h_MC, targets, IGNORE, reduction, z_loss)
        return ops.linear_cross_entropy(h_MC, self.lm_head.weight, targets, IGNORE, reduction, z_loss)

    def _maybe_unused(self, gradient: str) -> Iterable[nn.Parameter]:
        """Parameters that the loss may not reach: they get an exact zero, never None, so that data-parallel training
        needs no search for unused parameters."""
        if gradient == "published":
            return self.parameters()
        core = self.hrm_core
        return core.H_init, core.L_init, *core.q_head.parameters()

    @staticmethod
    def _check_window(window, gradient: str, gradient_steps: int) -> None:
        if not is_int(window) or window < 2:
            raise ValueError(f"gradient_window {window!r} must be an integer of at least 2, one of each level")
        if gradient != "replay" or gradient_steps != 1:
            raise ValueError(
                f"gradient_window {window} cuts the one step that is replayed; it needs gradient 'replay' and "
                f"gradient_steps 1, got {gradient!r} and {gradient_steps}"
            )

    def _check_tokens(self, ids_BT: Tensor, targets: Tensor | None) -> None:
        c = self.config
        if ids_BT.dim() != 2 or ids_BT.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"ids must be [B, T] int64; got {tuple(ids_BT.shape)} {ids_BT.dtype}")
        n_rows, n_tokens = ids_BT.shape
        if n_rows == 0 or n_tokens == 0:
            raise ValueError(f"the batch is empty: ids have shape {n_rows} x {n_tokens}; give at least one token")
        if n_tokens > c.block_size:
            raise ValueError(f"sequence of {n_tokens} tokens is over block_size {c.block_size}; cut or window it")
        if ids_BT.device.type == "cpu":  # on a GPU the look would cost a synchronisation; the data loader has looked
            low, high = ids_BT.min().item(), ids_BT.max().item()
            if low < 0 or high >= c.vocab_size:
                bad = low if low < 0 else high
                raise ValueError(f"token id {bad} is outside 0..{c.vocab_size - 1} (vocab_size {c.vocab_size})")
        if targets is not None:
            if targets.shape != ids_BT.shape:
                raise ValueError(f"targets have shape {tuple(targets.shape)}, ids {tuple(ids_BT.shape)}")
            if targets.dtype != torch.int64:
                raise ValueError(f"targets must be int64; got {targets.dtype}")
            if targets.device.type == "cpu" and (targets.min() < IGNORE or targets.max() >= c.vocab_size):
                bad = targets.min().item() if targets.min() < IGNORE else targets.max().item()
                raise ValueError(f"target {bad} is outside 0..{c.vocab_size - 1}; use {IGNORE} for 'no target'")

    @staticmethod
    def _checked_counts(name: str, ids_BT: Tensor, counts) -> Tensor | None:
        """`counts`, one of 1..T for each row, as int64 on the ids' device."""
        if counts is None:
            return None
        n_rows, n_tokens = ids_BT.shape
        counts = torch.as_tensor(counts)
        if counts.shape != (n_rows,) or counts.is_floating_point() or counts.dtype == torch.bool:
            raise ValueError(f"{name} must be {n_rows} integers, one per row; got {counts.tolist()}")
        # on a GPU this waits for what is queued, so that what is told as a list or on the CPU is faster
        if counts.min() < 1 or counts.max() > n_tokens:
            raise ValueError(f"{name} {counts.tolist()} must lie in 1..{n_tokens}, the padded length")
        return ops.to_device(counts.to(torch.int64), ids_BT.device)

    def _checked_pooled(self, ids_BT: Tensor, pooled, lengths) -> Tensor | None:
        found = self._checked_counts("pooled", ids_BT, pooled)
        if found is None or lengths is None:
            return found
        told, limit = torch.as_tensor(pooled), torch.as_tensor(lengths)
        if told.device == limit.device and (told > limit).any():
            raise ValueError(f"pooled {told.tolist()} must not go beyond lengths {limit.tolist()}")
        return found


class HRMForCausalLM(LanguageModel, nn.Module):
    """The language model.

    Args:
        config: shape and rules; its defaults are the published 82.77 M parameters.
    """

    def __init__(self, config: HRMConfig):
        super().__init__()
        self.config = config
        self.make_parts(config)
        self.reset_parameters()

    def num_parameters(self) -> int:
        """Parameters, the tied pair counted once."""
        return sum(p.numel() for p in self.parameters())

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.wte.weight.device

    def with_cycles(self, H_cycles: int, L_cycles: int) -> HRMForCausalLM:
        """The same weights (shared, nothing is copied) run with N = H_cycles x T = L_cycles a step: chosen per call.

        Raises:
            ValueError: one is below 1.
        """
        config = replace(self.config, hrm_H_cycles=H_cycles, hrm_L_cycles=L_cycles)
        with torch.device("meta"):
            other = HRMForCausalLM(config)
        other.load_state_dict(self.state_dict(keep_vars=True), assign=True)
        if hasattr(self, "quantization"):
            other.quantization = self.quantization
        return other.train(self.training)

    def generate(self, ids_BT: Tensor, max_new_tokens: int, *args, **options) -> Tensor | Generated | Generation:
        """Continue each row; see hrm_model.generate.generate for the options and results."""
        from .generate import generate

        return generate(self, ids_BT, max_new_tokens, *args, **options)


def check_halt_bias(halt_bias: float) -> None:
    """Raises ValueError where it is no number."""
    if not isinstance(halt_bias, (int, float)):
        raise ValueError(f"halt_bias {halt_bias!r} is no number; give one, such as 0.0")
    if math.isnan(halt_bias):
        raise ValueError("halt_bias is nan; give a number (inf halts every row after one step, -inf none)")


def checked_depths(force_steps, max_steps: int, n_rows: int) -> list[int]:
    """Of each row the steps that it is forced to, 0 where the head decides. Raises ValueError."""
    if not isinstance(max_steps, int) or isinstance(max_steps, bool) or max_steps < 1:
        raise ValueError(f"max_steps {max_steps!r} must be an integer of at least 1")
    if force_steps is None:
        return [0] * n_rows
    if isinstance(force_steps, Tensor):
        force_steps = force_steps.tolist()
    one_for_all = not isinstance(force_steps, Iterable)
    least = 1 if one_for_all else 0
    try:
        depths = [operator.index(n) for n in ([force_steps] * n_rows if one_for_all else force_steps)]
    except TypeError as error:
        raise ValueError(f"force_steps {force_steps!r} must be an integer, or one for each row") from error
    if len(depths) != n_rows:
        raise ValueError(f"force_steps has {len(depths)} entries for {n_rows} rows; give one each, or one number")
    wrong = [n for n in depths if not least <= n <= max_steps]
    if wrong:
        raise ValueError(f"force_steps {wrong[0]} is outside {least}..{max_steps}; to go deeper pass max_steps too")
    return depths


class _GradientsFor(torch.autograd.Function):
    """Identity on x whose backward also hands an exact zero gradient to each parameter."""

    @staticmethod
    def forward(ctx, x, *parameters):
        ctx.save_for_backward(*parameters)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad, *(torch.zeros_like(p) for p in ctx.saved_tensors)


def _with_gradients(x: Tensor, parameters: Iterable[nn.Parameter]) -> Tensor:
    wanting = [p for p in parameters if p.requires_grad]
    return _GradientsFor.apply(x, *wanting) if wanting else x
