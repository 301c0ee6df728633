"""Does a trained halting head stop when a task is done? Tasks of known depth, every objective, against fixed depths.

    python bench/halting_tasks.py                         # three tasks, three seeds
    python bench/halting_tasks.py --tasks delayed --seeds 7 8 9
    python bench/halting_tasks.py --save --plot docs/halting-tasks.png
    python bench/halting_tasks.py --from bench/results/halting_tasks.jsonl --plot picture.png     # draws it again

For each task and seed two models are trained. One at random depths, whose head is then fitted by each objective in turn
to the same exits (staged): objectives differ in nothing else. The other with the default of train/pretrain.py, head and
model together (joint). Rivals are the model's own fixed depths, mixed to the same mean steps, and the same steps dealt
out to other rows at random; both have the compute of the learned depths. Untrained rules: the published head, and
stopping when z_H changes little, its threshold set so that the mean steps are those of the policy.

Intervals are 95 % bootstrap intervals over rows that nothing was trained on. Exit status: 0; 1 where a conclusion that
the documentation draws does not hold; 2 for wrong usage. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor

from bench.common import environment, positive, print_table, save
from bench.halting_tasks_cases import TASKS, Rows, S, make_model
from bench.halting_tasks_markdown import tables
from bench.halting_tasks_plot import draw
from hrm_model.depth_statistics import DepthStatistics, bootstrap, rank_correlation, shuffled, within
from hrm_model.exits import exits
from hrm_model.halting import OBJECTIVES, Exploration, Price, executed_by, executed_steps, halt_margin
from hrm_model.training.head import HeadTraining
from hrm_model.training.head_fit import Decisions, Fit, fit
from hrm_model.training.optim import clip_gradients, parameter_groups

BATCH = 64
LEARNING_RATE = 3e-3
HEAD_LEARNING_RATE = 0.1
EXPLORE = 1 / 4
"""Twice the usual: with one decision a row, 16 explorers are all that a step of the head has."""
PRICE = {"permutations": 0.03, "pointers": 0.03, "delayed": 0.1}
"""Nats a step, a tenth or so of what an answer costs that is not thought about."""
PRICES = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)
BIASES = (-4.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 4.0)
PUBLISHED_BIAS = 0.35
FIT_ROWS, TEST_ROWS = 3072, 4096
DRAWS = 300
"""Of a bootstrap."""

# -- training ----------------------------------------------------------------------------------------------------------


def train(task: str, seed: int, steps: int, halting: str):
    """A model trained on `task`: at random depths throughout (halting "none"), or jointly with its head."""
    model = make_model(seed, halting)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.01), betas=(0.9, 0.95))
    exploration = Exploration(seed, S, EXPLORE, steps // 3 if halting in OBJECTIVES else steps)
    head = HeadTraining(model, halting, Price(PRICE[task]), "row") if halting in OBJECTIVES else None
    model.train()
    for step in range(steps):
        schedule = min(1, (step + 1) / 100) * (0.05 + 0.475 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = schedule * (HEAD_LEARNING_RATE if group["name"] == "head" else LEARNING_RATE)
        samples = np.arange(step * BATCH, (step + 1) * BATCH)
        rows = TASKS[task](generator, BATCH)
        optimizer.zero_grad(set_to_none=True)
        if head and (explorers := torch.from_numpy(exploration.explorers(samples))).any():
            some = rows[explorers]
            head.add(some.ids, some.rewards, some.lengths)
        out = model(rows.ids, rows.targets, lengths=rows.lengths, force_steps=exploration.depths(samples, step))
        out.loss.backward()
        clip_gradients(model, 1.0)
        if head:
            head.finish(1.0)
        optimizer.step()
    return model.eval()


# -- measuring ---------------------------------------------------------------------------------------------------------


class Measured:
    """Every exit of rows that the model was not trained on. N rows."""

    @torch.no_grad()
    def __init__(self, model, rows: Rows):
        found = [
            exits(model, part.ids, part.rewards, part.lengths, decisions="row", keep_means=True)
            for part in (rows[i] for i in torch.arange(len(rows.ids)).split(512))
        ]
        self.losses, self.means, self.q, self.change = (
            torch.cat([getattr(f, name) for f in found])[:, 0] for name in ("losses", "means", "q", "change")
        )
        self.right, self.needed = _right(model, rows), rows.needed.numpy()

    def decisions(self) -> Decisions:
        """For a fit."""
        return Decisions(self.means, self.losses)

    def figures(self, executed: Tensor, price: float, draws: int = DRAWS) -> dict[str, Any]:
        """What these steps [N] give and cost, and what their rivals give."""
        steps = executed.numpy()
        depths = DepthStatistics.of(steps, S)
        figures = {
            "mean_steps": depths.mean,
            "dispersion": depths.dispersion,
            "histogram": depths.histogram,
            "rank_correlation": rank_correlation(steps, self.needed),
            "cost": float(self._own(self.losses.numpy(), steps).mean() + price * depths.mean),
        }
        of = {"loss": (self.losses.numpy(), np.minimum), "accuracy": (self.right.astype(np.float64), np.maximum)}
        for name, (values, best) in of.items():
            by_depth, own = values.mean(0), self._own(values, steps)
            figures[name] = float(own.mean())
            rivals = {"fixed": within(by_depth, depths.mean, best), "shuffled": shuffled(by_depth, depths.histogram)}
            for rival, value in rivals.items():
                figures[f"{name}_{rival}"] = value
                if draws:

                    def ahead(i: np.ndarray, rival=rival, values=values, own=own, best=best) -> float:
                        return _ahead(values[i], own[i], steps[i], rival, best)

                    figures[f"{name}_minus_{rival}_interval"] = bootstrap(ahead, len(steps), draws)
        return figures

    @staticmethod
    def _own(values: np.ndarray, steps: np.ndarray) -> np.ndarray:
        return np.take_along_axis(values, steps[:, None] - 1, 1)[:, 0]

    def by_depth(self) -> dict[str, Any]:
        """Loss and accuracy of fixed depths; accuracy by operations too."""
        table = [self.right[self.needed == k].mean(0).tolist() for k in sorted(set(self.needed.tolist()))]
        return {
            "loss": self.losses.mean(0).tolist(),
            "accuracy": self.right.mean(0).tolist(),
            "accuracy_by_operations": table,
        }


def _ahead(values: np.ndarray, own: np.ndarray, steps: np.ndarray, rival: str, best: Callable) -> float:
    by_depth = values.mean(0)
    other = within(by_depth, steps.mean(), best) if rival == "fixed" else by_depth[steps - 1].mean()
    return float(own.mean() - other)


@torch.no_grad()
def _right(model, rows: Rows) -> np.ndarray:
    """[N, S] whether the answer after the last operation is right, at each depth."""
    found = []
    for part in (rows[i] for i in torch.arange(len(rows.ids)).split(512)):
        x, rotary, last = model.embed(part.ids), model.rotary(part.ids.shape[1]), part.lengths[:, None] - 1
        answer = part.targets.gather(1, last)[:, 0]
        columns = []
        for z_H in model.hrm_core.unroll(x, rotary, part.lengths, S):
            h = model.decode(z_H, rotary, part.lengths)[torch.arange(len(x)), last[:, 0]]
            columns.append(model.lm_head(h).argmax(-1) == answer)
        found.append(torch.stack(columns, 1))
    return torch.cat(found).numpy()


def with_head(measured: Measured, found: Fit, bias: float = 0.0) -> Tensor:
    """[N] steps that a fitted head decides."""
    q = torch.nn.functional.linear(measured.means, found.weight, found.bias)
    return executed_steps(halt_margin(q, bias))


def run(task: str, seed: int, steps: int) -> dict[str, Any]:
    """One task, one seed: both models, every objective and rule."""
    torch.set_num_threads(1)
    begin = time.perf_counter()
    generator = torch.Generator().manual_seed(seed + 10_000)
    fit_rows, test_rows = TASKS[task](generator, FIT_ROWS), TASKS[task](generator, TEST_ROWS)
    staged = train(task, seed, steps, "none")
    learn, test = Measured(staged, fit_rows), Measured(staged, test_rows)
    price = PRICE[task]
    fits = {name: fit(learn.decisions(), name, Price(price)) for name in OBJECTIVES}
    rules = {name: test.figures(with_head(test, found), price) for name, found in fits.items()}
    wanted = rules["policy"]["mean_steps"]
    threshold = min(
        np.quantile(learn.change.numpy(), np.linspace(0, 1, 201)),
        key=lambda t: abs(float(executed_by(f"settled:{t}", learn.q[..., 0], learn.change).double().mean()) - wanted),
    )
    rules["settled"] = test.figures(executed_by(f"settled:{threshold}", test.q[..., 0], test.change), price)
    rules["published"] = test.figures(executed_steps(halt_margin(test.q, PUBLISHED_BIAS)), price)
    by_price = {}
    for dear in PRICES:
        found = fit(learn.decisions(), "policy", Price(dear))
        by_price[str(dear)] = test.figures(with_head(test, found), price, draws=0)
    by_bias = {str(bias): test.figures(with_head(test, fits["policy"], bias), price, draws=0) for bias in BIASES}
    together = Measured(train(task, seed, steps, "policy"), test_rows)
    return {
        "task": task,
        "seed": seed,
        "steps": steps,
        "price": price,
        "by_depth": test.by_depth(),
        "staged": rules,
        "joint": {"by_depth": together.by_depth(), **together.figures(executed_steps(halt_margin(together.q)), price)},
        "by_price": by_price,
        "by_bias": by_bias,
        "seconds": time.perf_counter() - begin,
    }


# -- what it says ------------------------------------------------------------------------------------------------------


def beats_rivals(figures: dict[str, Any]) -> bool:
    """Whether the loss is below fixed and shuffled depths at equal steps, intervals included, with depths that follow
    the operations: D below 0.5 and a rank correlation of at least 0.5."""
    below = all(figures[f"loss_minus_{rival}_interval"][1] < 0 for rival in ("fixed", "shuffled"))
    d, correlation = figures["dispersion"], figures["rank_correlation"]
    return below and d is not None and d < 0.5 and correlation is not None and correlation >= 0.5


def conclusions(records: list[dict[str, Any]]) -> dict[str, bool]:
    """What docs/halting.md says of these figures, for every seed of every task at hand."""
    found = {}
    for task in dict.fromkeys(r["task"] for r in records):
        of_task = [r for r in records if r["task"] == task]
        found[f"{task}: policy, staged, beats fixed and shuffled depths"] = all(
            beats_rivals(r["staged"]["policy"]) for r in of_task
        )
        found[f"{task}: policy, joint, beats fixed and shuffled depths"] = all(
            beats_rivals(r["joint"]) for r in of_task
        )
        found[f"{task}: a higher price means fewer steps"] = all(_falls(r["by_price"]) for r in of_task)
        found[f"{task}: a higher bias means fewer steps"] = all(_falls(r["by_bias"]) for r in of_task)
    return found


def _falls(sweep: dict[str, dict[str, Any]]) -> bool:
    steps = [figures["mean_steps"] for _, figures in sorted(sweep.items(), key=lambda item: float(item[0]))]
    return all(b <= a + 0.05 for a, b in pairwise(steps)) and steps[-1] < steps[0]


def report(records: list[dict[str, Any]]) -> dict[str, bool]:
    """Print a table for each task and seed, and the conclusions; returns these."""
    columns = {
        "": lambda r: r["name"],
        "accuracy": lambda r: f"{r['accuracy']:.3f}",
        "fixed": lambda r: f"{r['accuracy_fixed']:.3f}",
        "shuffled": lambda r: f"{r['accuracy_shuffled']:.3f}",
        "loss": lambda r: f"{r['loss']:.4f}",
        "fixed ": lambda r: f"{r['loss_fixed']:.4f}",
        "shuffled ": lambda r: f"{r['loss_shuffled']:.4f}",
        "steps": lambda r: f"{r['mean_steps']:.2f}",
        "D": lambda r: "constant" if r["dispersion"] is None else f"{r['dispersion']:.2f}",
        "corr": lambda r: "constant" if r["rank_correlation"] is None else f"{r['rank_correlation']:.2f}",
        "l + lambda s": lambda r: f"{r['cost']:.4f}",
    }
    for record in records:
        print(f"\n{record['task']}, seed {record['seed']}: {record['seconds']:.0f} s")
        by_depth = record["by_depth"]
        for name in ("accuracy", "loss"):
            print(f"  {name:<9}at 1..{S} steps: " + " ".join(f"{x:.3f}" for x in by_depth[name]))
        named = {**record["staged"], "policy, joint": record["joint"]}
        print_table(columns, [{"name": "  " + name, **figures} for name, figures in named.items()])
    found = conclusions(records)
    print()
    for sentence, holds in found.items():
        print(f"{'holds' if holds else 'DOES NOT HOLD':<14}{sentence}")
    return found


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS), metavar="TASK", help=f"of {', '.join(TASKS)}")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    add("--steps", type=positive, default=1400, metavar="N", help="optimizer steps of a model; default: 1400")
    add("--workers", type=positive, default=2, metavar="N", help="processes of one thread each; default: 2")
    add("--save", action="store_true", help="append the records to bench/results/halting_tasks.jsonl")
    add("--plot", type=Path, metavar="FILE", help="draw loss against steps (needs matplotlib)")
    add("--markdown", action="store_true", help="print the tables of docs/halting.md, too")
    add("--from", dest="source", type=Path, metavar="FILE", help="records of an earlier run instead of a new one")
    return parser.parse_args(argv)


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A record for each task and seed, saved as it comes."""
    jobs = [(task, seed, options.steps) for seed in options.seeds for task in options.tasks]
    records, where = [], environment(torch.device("cpu"))
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        for found in pool.map(run, *zip(*jobs, strict=True)):
            records.append({"environment": where, **found})
            print(
                f"{len(records)} of {len(jobs)}: {found['task']}, seed {found['seed']}, {found['seconds']:.0f} s",
                flush=True,
            )
            if options.save:
                save("halting_tasks.jsonl", records[-1])
    return records


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = parse(argv)
    if options.source:
        records = [json.loads(line) for line in options.source.read_text(encoding="utf-8").splitlines()]
    else:
        records = measure(options)
    found = report(records)
    if options.markdown:
        for task, table in tables(records).items():
            print(f"\n**{task}**\n\n{table}")
    if options.plot:
        draw(records, options.plot)
        print(f"wrote {options.plot}")
    print(json.dumps({"conclusions": found, "holds": all(found.values())}))
    return 0 if all(found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
