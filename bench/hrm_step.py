"""Does a sample cost what it thinks? Time of a batch against the HRM steps its rows really run.

    python bench/hrm_step.py                 # the small model on this device; three minutes on two CPU cores
    python bench/hrm_step.py --save          # also appends to bench/results/hrm_step.jsonl

Batches whose rows stop at different steps are timed, forward and as a training iteration, and fitted by

    seconds = a + b * (executed row-steps)

If rows that are done cost nothing, the fit is close (residuals within 15 %) and a agrees with what it should be: a
batch forced to one step, less that step. The published behaviour, which computes every row until the slowest is done,
runs the same batches in the same turns. Numbers are checked before anything is timed. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from bench.common import environment, interleaved, save
from bench.published import PublishedHRM
from hrm_model import HRMConfig, HRMForCausalLM
from hrm_model.training.device import choose_device

RESIDUAL_LIMIT = 0.15
"""Of the measured time: largest residual of the fit, and what a may differ by from a one-step batch less its step."""


def depth_mixes(n_rows: int, max_steps: int) -> dict[str, list[int]]:
    """Name -> depth of each row; sums from n_rows to n_rows * max_steps, with few and with many distinct depths."""
    spread = [1 + (i * max_steps) // n_rows for i in range(n_rows)]
    half = max(1, max_steps // 2)
    return {
        "all 1": [1] * n_rows,
        "one deep": [1] * (n_rows - 1) + [max_steps],
        "quarter deep": [max_steps] * (n_rows // 4) + [1] * (n_rows - n_rows // 4),
        "half at S/2": [half] * (n_rows // 2) + [1] * (n_rows - n_rows // 2),
        "all S/2": [half] * n_rows,
        "spread 1..S": spread,
        "half deep": [max_steps] * (n_rows // 2) + [1] * (n_rows - n_rows // 2),
        "one shallow": [max_steps] * (n_rows - 1) + [1],
        "all S": [max_steps] * n_rows,
    }


def check(model: HRMForCausalLM, ids: torch.Tensor, mixes: dict[str, list[int]]) -> float:
    """Largest relative difference between a row of a mixed batch and the same row alone; raises above 1e-4."""
    worst = 0.0
    with torch.no_grad():
        mixed = model(ids, force_steps=mixes["spread 1..S"])
        for row, depth in enumerate(mixes["spread 1..S"]):
            alone = model(ids[row : row + 1], force_steps=depth).logits[0]
            worst = max(worst, ((mixed.logits[row] - alone).norm() / alone.norm()).item())
    if worst > 1e-4:
        raise SystemExit(f"error: a row's logits depend on its batch ({worst:.1e} relative): nothing was timed")
    return worst


def published_depths(model: HRMForCausalLM, ids: torch.Tensor, steps: int) -> PublishedHRM:
    """The published loop on a model whose head stops every row after exactly `steps` steps (or never, at S)."""
    shallow = HRMForCausalLM(HRMConfig(**{**vars(model.config), "hrm_max_steps": steps}))
    shallow.load_state_dict(model.state_dict())
    with torch.no_grad():
        shallow.hrm_core.q_head.weight.zero_()
        shallow.hrm_core.q_head.bias.copy_(torch.tensor([-5.0, 5.0]))
    return PublishedHRM(shallow.to(ids.device).train(model.training))


def fit(row_steps: list[int], seconds: list[float]) -> tuple[float, float, float]:
    """(a, b, largest |residual| / measured) of the least-squares line seconds = a + b * row_steps."""
    design = np.stack([np.ones(len(row_steps)), row_steps], axis=1)
    # relative residuals are what is judged, so the short batches must weigh as much as the long ones
    weights = 1 / np.asarray(seconds)
    (a, b), *_ = np.linalg.lstsq(design * weights[:, None], np.ones(len(seconds)), rcond=None)
    return float(a), float(b), float(np.abs((design @ [a, b]) * weights - 1).max())


def measure(model: HRMForCausalLM, ids: torch.Tensor, repeats: int, training: bool) -> dict:
    """Time every mix, ours and published in turns; fit; print a table; return the figures."""
    mixes = depth_mixes(len(ids), model.config.hrm_max_steps)
    model.train(training)

    def run(module, **options):
        if not training:
            with torch.no_grad():
                return module(ids, **options)
        module(ids, ids, **options).loss.backward()
        model.zero_grad(set_to_none=True)

    work = {name: (lambda depths=depths: run(model, force_steps=depths)) for name, depths in mixes.items()}
    for name, steps in (("all S/2", max(mixes["all S/2"])), ("all S", max(mixes["all S"]))):
        baseline = published_depths(model, ids, steps)
        work[f"published {name}"] = lambda baseline=baseline: run(baseline)
    times = {name: statistics.median(t) for name, t in interleaved(work, repeats, ids.device).items()}

    row_steps = [sum(depths) for depths in mixes.values()]
    a, b, residual = fit(row_steps, [times[name] for name in mixes])
    expected_a = times["all 1"] - b * len(ids)
    disagreement = abs(a - expected_a) / times["all 1"]
    kind = "training iteration" if training else "forward"
    print(f"\n{kind}: {len(ids)} rows x {ids.shape[1]} tokens, median of {repeats}")
    print(f"{'depths':<14}{'row-steps':>10}{'ms':>10}{'fit':>10}{'published':>12}{'ratio':>8}")
    for name, n in zip(mixes, row_steps, strict=True):
        # every row runs until the slowest has finished: a batch with one deep row costs what all deep rows cost
        slowest = {max(mixes["all S/2"]): "all S/2", max(mixes["all S"]): "all S"}.get(max(mixes[name]))
        theirs = times[f"published {slowest}"] if slowest else None
        tail = f"{theirs * 1e3:>12.1f}{theirs / times[name]:>7.2f}x" if theirs else ""
        print(f"{name:<14}{n:>10}{times[name] * 1e3:>10.1f}{(a + b * n) * 1e3:>10.1f}{tail}")
    print(
        f"fit: {a * 1e3:.1f} ms + {b * 1e3:.2f} ms x row-steps; largest residual {residual:.1%}\n"
        f"a from a one-step batch less its step: {expected_a * 1e3:.1f} ms, {disagreement:.1%} of that batch away "
        f"(limits {RESIDUAL_LIMIT:.0%})"
    )
    return {
        "a_ms": a * 1e3,
        "b_ms_per_row_step": b * 1e3,
        "largest_residual": residual,
        "a_expected_ms": expected_a * 1e3,
        "a_disagreement": disagreement,
        "ms": {name: t * 1e3 for name, t in times.items()},
        "row_steps": dict(zip(mixes, row_steps, strict=True)),
    }


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; with --strict returns 1 where a limit is not kept (a busy machine may be why)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="small", help="tiny, small or base")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128, help="tokens per row")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--strict", action="store_true", help="exit with 1 where a limit is not kept")
    parser.add_argument("--save", action="store_true", help="append to bench/results/hrm_step.jsonl")
    options = parser.parse_args(argv)
    device = choose_device(options.device)
    torch.manual_seed(0)
    model = HRMForCausalLM(HRMConfig.preset(options.preset)).to(device).eval()
    ids = torch.randint(0, 50257, (options.batch_size, options.tokens), device=device)
    worst = check(model, ids, depth_mixes(len(ids), model.config.hrm_max_steps))
    print(f"numbers checked: rows of a mixed batch equal the rows alone within {worst:.1e}")

    record = {"benchmark": "hrm_step", "environment": environment(device), "options": vars(options)}
    record["forward"] = measure(model, ids, options.repeats, training=False)
    record["training"] = measure(model, ids, options.repeats, training=True)
    kinds = ("forward", "training")
    record["within_limits"] = all(
        record[kind]["largest_residual"] <= RESIDUAL_LIMIT and record[kind]["a_disagreement"] <= RESIDUAL_LIMIT
        for kind in kinds
    )
    print("limits kept" if record["within_limits"] else "LIMITS NOT KEPT")
    if options.save:
        print(f"appended to {save('hrm_step.jsonl', record)}")
    print(json.dumps(record))
    return int(options.strict and not record["within_limits"])


if __name__ == "__main__":
    sys.exit(main())
