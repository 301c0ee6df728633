"""HybridModel: a frozen language model, a controller that thinks about the prompt, and what carries its result over.

h = language model(ids)                        before its final norm
x = pool(norm(h)) over the prompt              controller.py
z_H = segments(x)
logits = head(norm(inject(h, z_H))) + bias(z_H)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..exits import Exits
from .config import HybridConfig
from .controller import Controller
from .injectors import VocabularyBias, make_injector
from .language_model import LanguageModel
from .lora import add_adapters
from .losses import token_losses
from .pooling import mean_and_last
from .tasks.collate import AnswerBatch
from .whitening import whiten

POOLING_POWER = 2 / 3
"""How far pooled prompts are whitened. Two-digit sums, one segment, 256 channels, 600 steps of 128: 38, 65, 85 % of new
ones were right at 1/4, 1/2, 3/4; at 1 a network as deep learned them sooner still, but never the last 3 to 5 %."""


@dataclass
class Learned:
    """What `learn` saw. S segments; 1 without a controller."""

    loss: float
    """Nats: the sum over targets of their mean loss over segments, times the scale."""
    segment_losses: list[float]
    """[S] nats, sums over targets times the scale."""
    z_norm: float
    """Mean norm of z_H after the last segment; 0 without a controller."""
    exits: Exits | None
    """What the halting head learns from."""


@dataclass
class Thought:
    """A controller's result for B prompts."""

    z_H: Tensor
    """[B, 1, d_h]."""
    segments: Tensor
    """[B] int64, how many each row ran."""


class HybridModel(nn.Module):
    """What is trained, around a language model that is not. Parameters and state_dict are those of the controller, the
    injector and, with lora_rank, of the adapters: the language model is no part of them.

    Args:
        language: the frozen model; with lora_rank it gets adapters. config: shapes; its `language_model` is filled in,
            or compared with where it is there already.

    Raises:
        ValueError: the configuration is of a controller for another language model.
    """

    def __init__(self, language: LanguageModel, config: HybridConfig):
        super().__init__()
        found = language.description()
        if config.language_model is not None and dict(config.language_model) != found:
            differing = [
                f"{key}: {config.language_model.get(key)!r}, here {found[key]!r}"
                for key in found
                if config.language_model.get(key) != found[key]
            ]
            raise ValueError(
                "the controller was made for another language model:\n  " + "\n  ".join(differing) + "\nload that one"
            )
        self.language = language  # no module, so it is not registered
        self.config = replace(config, language_model=found)
        if config.injector != "none":
            self.controller = Controller(config, language.width)
            self.injector = make_injector(config, language.width)
            if config.logit_bias_head:
                self.vocabulary_bias = VocabularyBias(config, language.vocab_size)
            self._reset_bridges()
        else:
            self.controller = None
        self.adapters = nn.ParameterDict()
        if config.lora_rank:
            self.adapters.update({name.replace(".", "/"): p for name, p in add_adapters(language, config).items()})
        nn.Module.to(self, language.device)
        self.train(self.training)

    @torch.no_grad()
    def _reset_bridges(self) -> None:
        """Matrices N(0, 1 / inputs), a tenth of that for those that end in the language model's space."""
        for part in (self.injector, getattr(self, "vocabulary_bias", None)):
            for name, p in part.named_parameters() if part is not None else ():
                if p.dim() == 2:
                    p.normal_(0.0, p.shape[1] ** -0.5 * (0.1 if name.startswith(("project", "out")) else 1.0))
                elif name.endswith("bias"):
                    p.zero_()

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.language.device

    @property
    def tunes_language(self) -> bool:
        """Whether the language model has adapters."""
        return len(self.adapters) > 0

    def num_parameters(self) -> int:
        """Of what is trained."""
        return sum(p.numel() for p in self.parameters())

    def shut_gates(self) -> None:
        """Make every gate's value 0: the logits are then the language model's own, to the bit."""
        self.injector.gate.set_value(0.0)
        if self.config.logit_bias_head:
            self.vocabulary_bias.gate.set_value(0.0)

    # -- the parts of a pass --------------------------------------------------------------------------------------

    def pool(self, h_BTD: Tensor, prompt_BT: Tensor) -> Tensor:
        """[B, T, D] before the final norm -> the controller's input x [B, 1, d_h]."""
        return self.controller.pooling(self.language.norm(h_BTD), prompt_BT)

    @torch.no_grad()
    def fit(self, batches: Iterable[AnswerBatch]) -> None:
        """Before training: set the pooling's matrix by these prompts, and the injector by the states that their answers
        are predicted from."""
        pooled, states = [], []
        for batch in batches:
            h = self.language.encode(batch.ids, batch.mask)
            pooled.append(torch.cat(mean_and_last(self.language.norm(h), batch.prompt), 1))
            states.append(_at(h, batch.positions)[batch.targets >= 0])
        whiten(self.controller.pooling.mix, torch.cat(pooled), power=POOLING_POWER)
        self.injector.fit(torch.cat(states))

    def think(self, x: Tensor, segments: int | None = None, decide: bool | None = None) -> Thought:
        """As Controller.think; segments defaults to the configuration's."""
        found = self.controller.think(x, segments or self.config.segments, decide)
        return Thought(found.z_H, found.executed_steps)

    def injected_logits(self, h_BTD: Tensor, z_H: Tensor, memory: Tensor | None = None) -> Tensor:
        """[B, T, V] of states [B, T, D] that z_H [B, 1, d_h] is injected into. memory: of the injector, if at hand."""
        memory = self.injector.memory(z_H) if memory is None else memory
        logits = self.language.logits(self.injector(h_BTD, memory))
        if self.config.logit_bias_head:
            logits = logits + self.vocabulary_bias(z_H).to(logits.dtype)
        return logits

    @torch.no_grad()
    def forward(
        self,
        ids_BT: Tensor,
        mask_BT: Tensor,
        prompt_BT: Tensor,
        segments: int | None = None,
        decide: bool | None = None,
    ) -> Tensor:
        """Logits [B, T, V] at every position, without gradient.

        Args:
            ids_BT: [B, T] int64, padded on the right. mask_BT: [B, T] int64, 0 on padding. prompt_BT: [B, T] bool, true
                on each row's prompt, which alone the controller sees.
            segments: default the configuration's. decide: as in Controller.think.
        """
        h = self.language.encode(ids_BT, mask_BT)
        if self.controller is None:
            return self.language.logits(h)
        return self.injected_logits(h, self.think(self.pool(h, prompt_BT), segments, decide).z_H)

    # -- training -------------------------------------------------------------------------------------------------

    def learn(self, batch: AnswerBatch, scale: float, controller: bool = True) -> Learned:
        """Forward and backward of one micro-batch, segment by segment: each one's graph is gone before the next begins.

        The gradient is that of scale * sum over targets of the mean loss over segments. Adapters get theirs in one pass
        through the language model, after the last segment.

        Args:
            controller: whether the controller gets a gradient, or what carries its result over alone.
        """
        with torch.set_grad_enabled(self.tunes_language):
            h = self.language.encode(batch.ids, batch.mask)
        leaf = h.detach().requires_grad_(self.tunes_language)
        if self.controller is None:
            losses = self._answer_losses(self.language.logits(_at(leaf, batch.positions)), batch.targets)
            (losses.sum() * scale).backward()
            found = Learned(0.0, [float(losses.detach().sum()) * scale], 0.0, None)
        else:
            found = self._learn_segments(leaf, batch, scale, controller)
        if self.tunes_language:
            h.backward(leaf.grad)
        found.loss = sum(found.segment_losses) / len(found.segment_losses)
        return found

    def _learn_segments(self, leaf: Tensor, batch: AnswerBatch, scale: float, controller: bool) -> Learned:
        n = self.config.segments
        by_row, states = [], []
        z_H = z_L = None
        for _ in range(n):
            with torch.set_grad_enabled(controller):
                x = self.pool(leaf, batch.prompt)  # anew, as the backward pass of a segment frees its graph
                if z_H is None:
                    z_H, z_L = self.controller.hrm_core.initial_state(x)
                z_H, z_L = self.controller.segment(x, z_H, z_L)
            losses = self._answer_losses(self.injected_logits(_at(leaf, batch.positions), z_H), batch.targets)
            (losses.sum() * (scale / n)).backward()
            z_H, z_L = z_H.detach(), z_L.detach()
            by_row.append(losses.detach().sum(1))
            states.append(z_H[:, 0].float())
        sums, counts = torch.stack(by_row, 1), (batch.targets >= 0).sum(1)
        exits = None
        if self.config.use_act:
            losses = (sums / counts.clamp(min=1)[:, None])[:, None]
            exits = Exits(losses, None, (counts > 0).float()[:, None], None, torch.stack(states, 1)[:, None])
        return Learned(0.0, (sums.sum(0) * scale).tolist(), float(states[-1].norm(dim=-1).mean()), exits)

    @torch.no_grad()
    def row_losses(self, batch: AnswerBatch, segments: int) -> tuple[Tensor, Tensor]:
        """(mean loss of each row's answer after segment 1, 2, .. [B, S]; q of the head [B, S, 2]), without gradient."""
        h = self.language.encode(batch.ids, batch.mask)
        counts = (batch.targets >= 0).sum(1).clamp(min=1)
        if self.controller is None:
            losses = self._answer_losses(self.language.logits(_at(h, batch.positions)), batch.targets)
            return (losses.sum(1) / counts)[:, None], torch.zeros(len(h), 1, 2, device=h.device)
        losses, q = [], []
        for z_H in self.controller.segments(self.pool(h, batch.prompt), segments):
            found = self._answer_losses(self.injected_logits(_at(h, batch.positions), z_H), batch.targets)
            losses.append(found.sum(1) / counts)
            q.append(self.controller.hrm_core.q_values(z_H, 0.0, None)[0])
        return torch.stack(losses, 1), torch.stack(q, 1)

    def answers(self, collator, prompts: Sequence[str], max_new_tokens: int, sampling, segments: int, **options):
        """(answer, segments run) of each prompt; see generate.answer_texts."""
        from .generate import answer_texts

        return answer_texts(self, collator, prompts, max_new_tokens, sampling=sampling, segments=segments, **options)

    def _answer_losses(self, logits_BAV: Tensor, targets_BA: Tensor) -> Tensor:
        """[B, A] nats, 0 where there is no target."""
        losses = token_losses(logits_BAV.flatten(0, 1), targets_BA.clamp(min=0).flatten(), self.config.loss)
        return losses.view_as(targets_BA).masked_fill(targets_BA < 0, 0.0)


def _at(h_BTD: Tensor, positions_BA: Tensor) -> Tensor:
    """[B, A, D] states at these positions."""
    return h_BTD.gather(1, positions_BA[..., None].expand(-1, -1, h_BTD.shape[-1]))
