"""A model of this package under evaluation: in batches with shared contexts, or one row at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from itertools import groupby

import torch

import hrm_kernels as ops

from ..cache import bytes_per_token, room
from ..config import END_OF_TEXT
from ..generate import SHARE_OF_MEMORY, stream
from ..model import HRMForCausalLM, check_halt_bias
from ..prefixes import prefixes
from ..sampling import Sampling
from ..tokenizer import Tokenizer
from .perplexity import Rolled, windows
from .requests import Continuation, Progress, Request, Score, cut_from_left
from .shared_context import RULES, score_trees, trees_of

BATCH_TOKENS = {"cpu": 2048, "cuda": 32768}
"""Tokens of trees that are run together, by device."""
PADDED = 4
"""Times as many places as tokens that attention may be padded to."""
ROWS = {"cpu": 32, "cuda": 256}
"""Prompts that are continued together, by device, where memory allows it."""


class HRMScorer:
    """Scores by an HRMForCausalLM.

    Args:
        model: to be scored. tokenizer: of its texts. name: for reports.
        rule: "row", the published protocol, or "prefix", the causal one: see shared_context.py.
        max_steps, halt_bias: as in HRMForCausalLM.forward; default the model's.
        batch_tokens: tokens of contexts and choices at a time; default by device.
        batched: False computes every row by itself, whole: the protocol to which the batches are held.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self, model: HRMForCausalLM, tokenizer: Tokenizer, name: str = "hrm", *, rule: str = "row",
        max_steps: int | None = None, halt_bias: float | None = None, batch_tokens: int | None = None,
        batched: bool = True,
    ):  # fmt: skip
        if rule not in RULES:
            raise ValueError(f"rule {rule!r} is none of {', '.join(RULES)}")
        if batch_tokens is not None and batch_tokens < 1:
            raise ValueError(f"batch_tokens {batch_tokens} must be at least 1")
        self.model, self.tokenizer, self.name, self.rule = model, tokenizer, name, rule
        self.max_steps = model.config.hrm_max_steps if max_steps is None else max_steps
        if self.max_steps < 1:
            raise ValueError(f"max_steps {max_steps} must be at least 1")
        self.halt_bias = model.config.halt_bias if halt_bias is None else halt_bias
        check_halt_bias(self.halt_bias)
        self.max_length = model.config.block_size
        self.batch_tokens = batch_tokens or BATCH_TOKENS.get(model.device.type, BATCH_TOKENS["cpu"])
        self.batched = batched
        self._packed = ops.PackedWeights()
        # The published protocol gives the ids that only pad the vocabulary their share; the causal one does not.
        self.n_ids = model.config.vocab_size if rule == "row" else min(model.config.vocab_size, END_OF_TEXT + 1)

    @property
    def n_parameters(self) -> int:
        """Parameters, the tied pair counted once."""
        return self.model.num_parameters()

    def encode(self, text: str, is_context: bool = False) -> list[int]:
        """Ids of a text; of an empty context the end-of-text token, after which texts begin."""
        return self.tokenizer.encode(text) or ([END_OF_TEXT] if is_context else [])

    def score(self, requests: Sequence[Request], progress: Progress | None = None) -> list[list[Score]]:
        """A Score for each choice of each request; see requests.Scorer."""
        if not self.batched:
            return [self._one_by_one(request, progress) for request in requests]
        return self.score_at([self.halt_bias], requests, progress)[0]

    def with_bias(self, halt_bias: float) -> HRMScorer:
        """The same with another halt_bias."""
        check_halt_bias(halt_bias)
        other = copy.copy(self)
        other.halt_bias = halt_bias
        return other

    def score_at(
        self, halt_biases: Sequence[float], requests: Sequence[Request], progress: Progress | None = None
    ) -> list[list[list[Score]]]:
        """What `score` gives at each of these biases, in the time that the lowest takes alone and a little more."""
        found: list[list[list[Score | None]]] = [
            [[None] * len(request.choices) for request in requests] for _ in halt_biases
        ]
        jobs = [
            (number, tree, choices)
            for number, request in enumerate(requests)
            for tree, choices in trees_of(request, self.rule, self.max_length, len(halt_biases))
        ]
        open_trees = {number: len(list(same)) for number, same in groupby(jobs, key=lambda job: job[0])}
        for batch in _batches(jobs, self.batch_tokens):
            score_trees(
                self.model, [tree for _, tree, _ in batch],
                rule=self.rule, max_steps=self.max_steps, halt_biases=halt_biases, n_ids=self.n_ids,
                packed=self._packed,
            )  # fmt: skip
            done = 0
            for number, tree, choices in batch:
                for bias, of_bias in enumerate(found):
                    for choice, score in zip(choices, tree.scores(bias), strict=True):
                        of_bias[number][choice] = score
                open_trees[number] -= 1
                done += open_trees[number] == 0
            if progress:
                progress(done)
        return found

    @torch.no_grad()
    def _one_by_one(self, request: Request, progress: Progress | None) -> list[Score]:
        score = self._row if self.rule == "row" else self._prefixes
        found = [score(request.context, choice) for choice in request.choices]
        if progress:
            progress(1)
        return found

    def _row(self, context: Sequence[int], choice: Sequence[int]) -> Score:
        context = cut_from_left(context, choice, self.max_length)
        ids = torch.tensor([[*context, *choice]], device=self.model.device)
        training = self.model.training
        self.model.eval()
        out = self.model(ids, max_steps=self.max_steps, halt_bias=self.halt_bias)
        self.model.train(training)
        predicted = out.logits[0, len(context) - 1 : -1]
        predicted = predicted.to(torch.promote_types(predicted.dtype, torch.float32)).log_softmax(-1)
        targets = ids[0, len(context) :]
        logprobs = predicted.gather(1, targets[:, None])
        greedy = bool((predicted.argmax(-1) == targets).all())
        return Score(logprobs.sum().item(), len(choice), greedy, out.executed_steps.item(), out.steps_taken.item())

    def _prefixes(self, context: Sequence[int], choice: Sequence[int]) -> Score:
        context = cut_from_left(context, choice, self.max_length + 1)
        ids = torch.tensor([*context, *choice])
        logprobs, greedy, steps, halted = [], [], [], []
        for place in range(len(context), len(ids)):
            found = prefixes(self.model, ids[:place], max_steps=self.max_steps, halt_bias=self.halt_bias).cpu()
            logprobs.append(found.next_log_probs[ids[place]].item())
            greedy.append(bool(found.next_log_probs.argmax() == ids[place]))
            steps.append(int(found.executed[-1]))
            halted.append(bool(found.halted[-1]))
        mean = sum(steps) / len(steps)
        return Score(sum(logprobs), len(choice), all(greedy), mean, mean - sum(halted) / len(halted))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stop: Sequence[str],
        progress: Progress | None = None,
    ) -> list[Continuation]:
        """The likeliest tokens; see requests.Scorer. A prompt longer than the window keeps its end, as published."""
        found: list[tuple[list, list, list, list, list]] = [([], [], [], [], []) for _ in prompts]
        groups = [range(len(prompts))] if self.batched else [[number] for number in range(len(prompts))]
        for group in groups:
            if not group:
                continue
            events = stream(
                self.model, [prompts[number] for number in group], max_new_tokens, sampling=Sampling(temperature=0.0),
                stop=stop, stop_tokens=END_OF_TEXT, max_steps=self.max_steps, halt_bias=self.halt_bias,
                use_cache=self.batched, tokenizer=self.tokenizer,
                batch_size=self.rows_at_a_time(prompts, max_new_tokens),
            )  # fmt: skip
            for event in events:
                texts, tokens, logprobs, steps, published = found[group[event.row]]
                texts.append(event.text)
                if event.finish not in ("stop", "stop_token"):
                    tokens.append(event.token)
                logprobs.append(event.logprob)
                steps.append(event.steps)
                published.append(event.steps - event.halted)
                if event.finish and progress:
                    progress(1)
        return [Continuation("".join(texts), *rest) for texts, *rest in found]

    def rows_at_a_time(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> int:
        """How many of these prompts are continued together: ROWS, or what fits into memory."""
        longest = min(self.max_length, max(map(len, prompts)) + max_new_tokens)
        rows, free = ROWS.get(self.model.device.type, ROWS["cpu"]), room(self.model)
        if free is not None:
            token = bytes_per_token(self.model.config, self.max_steps, self.model.compute_dtype)
            rows = min(rows, int(SHARE_OF_MEMORY * free) // (longest * token))
        return max(1, rows)

    def rolling(self, ids: Sequence[int], stride: int | None = None, progress: Progress | None = None) -> Rolled:
        """The loss of every token, by the causal protocol whatever the rule; see perplexity.py."""
        losses, steps = [], []
        for read, n_new in windows([END_OF_TEXT, *ids], self.max_length, stride):
            found = prefixes(
                self.model, torch.tensor(read[:-1]), max_steps=self.max_steps, halt_bias=self.halt_bias
            ).cpu()
            last = -found.next_log_probs[read[-1]][None]
            losses.append(torch.cat((found.nll, last))[-n_new:])
            steps.append(found.executed[-n_new:])
            if progress:
                progress(n_new)
        return Rolled(torch.cat(losses).double().numpy(), torch.cat(steps).numpy())


def _batches(jobs: Sequence[tuple], batch_tokens: int) -> Iterator[list[tuple]]:
    """Jobs in batches of at most as many tokens, the largest trees first: what does not fit into memory is then known
    at once. Attention is padded to a batch's largest tree: a thousand small ones beside it would take a thousand times
    its memory."""

    def size(job: tuple) -> int:
        return len(job[1].context) + sum(map(len, job[1].branches.values()))

    batch, tokens = [], 0
    for job in sorted(jobs, key=size, reverse=True):
        padded = (len(batch) + 1) * size(batch[0]) if batch else 0
        if batch and (tokens + size(job) > batch_tokens or padded > PADDED * batch_tokens):
            yield batch
            batch, tokens = [], 0
        batch.append(job)
        tokens += size(job)
    if batch:
        yield batch
