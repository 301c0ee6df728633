"""Does depth pay on real text, and does a trained head know where? By every exit of validation text, causal protocol.

    python bench/halting_text.py                               # trains the tiny recipe, then measures
    python bench/halting_text.py --train long small            # longer runs, half an hour each on two cores
    python bench/halting_text.py --runs runs/mine --data data/corpus
    python bench/halting_text.py --save --plot docs/halting-text.png
    python bench/halting_text.py --from bench/results/halting_text.jsonl --plot picture.png     # draws it again

Of each model: the loss at every fixed depth; the depths of the head that was trained with it; heads that were fitted
to it at other prices, and the joint head with other biases; the untrained rule that stops when z_H changes little.
Rivals are the model's own fixed depths at equal compute and the same depths shuffled. Compute is counted twice: mean
steps, and block applications of generation token by token, in which a position is in the end run to the largest depth
that any later prefix asks for. Intervals are 95 % bootstrap intervals over windows. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from bench.common import environment, positive, print_table, save
from bench.halting_text_plot import draw
from hrm_model import load_model
from hrm_model.depth_statistics import Costs
from hrm_model.halting import Price
from hrm_model.training.device import autocast, choose_device, choose_dtype
from hrm_model.training.fitting import with_head
from hrm_model.training.head_fit import collect, fit
from hrm_model.training.sampler import Sampler, validation_windows
from hrm_model.training.shards import open_dataset
from hrm_model.training.validation import Reading, read_windows
from train import pretrain

DATA = "data/stdlib"
# Options of train/pretrain.py. small's own 4,000 steps of 4,096 tokens would take two cores half a day.
TRAININGS = {
    "tiny": "--recipe tiny",
    "deep": "--recipe tiny --gradient-steps 3",
    "random": "--recipe tiny --depth random",
    "long": "--recipe tiny --steps 3000 --eval-every 500 --save-every 500",
    "small": "--recipe small --steps 400 --batch-size 2 --accumulation 1 --warmup 40 --dropout 0 --eval-every 100"
    " --lr 4e-4 --min-lr 4e-5",
    "base": "--recipe base --fused --steps 4000 --warmup 400",
}
COMMON = "--halting policy --resume auto --sample-tokens 0"
PRICES = (0.0003, 0.001, 0.003, 0.01, 0.03)
BIASES = (-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0)
THRESHOLDS = (0.5, 0.3, 0.2, 0.1, 0.05)
FIT_WINDOWS = 128
DRAWS = 500


def train(name: str) -> str:
    """Train what TRAININGS says, unless it is there already; returns the run's directory."""
    out = f"runs/halting-{name}"
    print(f"python train/pretrain.py {TRAININGS[name]} {COMMON} --out {out}", flush=True)
    status = pretrain.main([*TRAININGS[name].split(), *COMMON.split(), "--out", out])
    if status:
        raise SystemExit(status)
    return out


def figures(reading: Reading, executed: np.ndarray, costs: Costs, draws: int = 0) -> dict[str, Any]:
    """What depths [N, T] give, and what their rivals do."""
    depths = reading.statistics(executed)
    found = {
        "loss": reading.loss(executed),
        "mean_steps": depths.mean,
        "dispersion": depths.dispersion,
        "histogram": depths.histogram,
        "applications": float(costs.applications(executed).mean()),
        "gain_correlation": reading.gain_correlation(executed),
    }
    for name, rival in reading.rivals(executed, costs, draws).items():
        found |= {name: rival.loss, f"minus_{name}_interval": rival.interval}
    return found


def measure(path: str, data: list[str], windows: int, device: torch.device) -> dict[str, Any]:
    """One model, on `device`."""
    model, config = load_model(path, device)
    if not config.head_is_trained:
        raise SystemExit(f"error: the head of {path} is not trained; train/halting.py fits one")
    datasets, size = [open_dataset(d) for d in data], config.block_size
    inputs, targets = validation_windows(datasets, size, windows, config.vocab_size)
    sampler = Sampler(datasets, size, seed=1, vocab_size=config.vocab_size)

    def read(one) -> Reading:
        return read_windows(one, inputs, targets, 8, region)

    region = partial(autocast, device, choose_dtype("auto", device))
    costs, reading = Costs.of(config), read(model)
    gains = [
        reading.interval(
            lambda i, s=s: float((reading.losses[i, :, 0] - reading.losses[i, :, s]).astype(np.float64).mean()), DRAWS
        )
        for s in range(reading.max_steps)
    ]
    batches = (tuple(map(torch.from_numpy, sampler.batch(first, 8)[:2])) for first in range(0, FIT_WINDOWS, 8))
    decisions = collect(model, batches, "prefix", 64, region)
    by_price = {}
    for price in PRICES:
        found = fit(decisions, "policy", Price(price))
        fitted = read(with_head(model, found.weight, found.bias, "policy"))
        by_price[str(price)] = figures(fitted, fitted.executed(), costs, DRAWS)
    return {
        "run": Path(path).name,
        "parameters": model.num_parameters(),
        "tokens": int(targets.size),
        "by_depth": reading.by_depth().tolist(),
        "gain_intervals": gains,
        "blocks": {"per_step": costs.per_step, "outer": list(costs.outer)},
        "joint": figures(reading, reading.executed(), costs, DRAWS),
        "by_price": by_price,
        "by_bias": {str(b): figures(reading, reading.executed(b), costs) for b in BIASES},
        "settled": {str(t): figures(reading, reading.executed(rule=f"settled:{t}"), costs) for t in THRESHOLDS},
    }


def pays(figures: dict[str, Any]) -> bool:
    """Whether the loss is below every rival's, intervals included."""
    return all(
        figures[f"minus_{name}_interval"][1] < 0
        for name in ("fixed_at_equal_steps", "fixed_at_equal_blocks", "shuffled")
    )


def report(record: dict[str, Any]) -> None:
    """Print one model's figures."""
    print(f"\n{record['run']}: {record['parameters']:,} parameters, {record['tokens']:,} tokens of validation text")
    for s, (loss, (low, high)) in enumerate(zip(record["by_depth"], record["gain_intervals"], strict=True), 1):
        print(f"  fixed at {s}: {loss:.4f}" + (f"   gains {low:+.4f} to {high:+.4f} over 1 step" if s > 1 else ""))

    def interval(name: str):
        def show(r: dict[str, Any]) -> str:
            found = r.get(f"minus_{name}_interval")
            return "" if found is None else f"{found[0]:+.4f}..{found[1]:+.4f}"

        return show

    columns = {
        "": lambda r: r["name"],
        "loss": lambda r: f"{r['loss']:.4f}",
        "steps": lambda r: f"{r['mean_steps']:.2f}",
        "blocks": lambda r: f"{r['applications']:.2f}",
        "D": lambda r: "constant" if r["dispersion"] is None else f"{r['dispersion']:.2f}",
        "corr": lambda r: "constant" if r["gain_correlation"] is None else f"{r['gain_correlation']:.2f}",
        "- fixed, equal steps": interval("fixed_at_equal_steps"),
        "- fixed, equal blocks": interval("fixed_at_equal_blocks"),
        "- shuffled": interval("shuffled"),
    }
    rows = [{"name": "  joint", **record["joint"]}]
    for sweep, name in (("by_price", "fitted, price"), ("by_bias", "joint, bias"), ("settled", "settled below")):
        rows += [{"name": f"  {name} {value}", **found} for value, found in record[sweep].items()]
    print_table(columns, rows)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--train", nargs="+", choices=list(TRAININGS), metavar="NAME", help=f"of {', '.join(TRAININGS)}; default: tiny")
    add("--runs", nargs="+", default=[], metavar="DIR", help="models that are there already, instead")
    add("--data", nargs="+", default=[DATA], metavar="DIR", help=f"prepared datasets; default: {DATA}")
    add("--windows", type=positive, default=64, metavar="N", help="of validation text; default: 64")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps; default: auto")
    add("--save", action="store_true", help="append the records to bench/results/halting_text.jsonl")
    add("--plot", type=Path, metavar="FILE", help="draw loss against compute (needs matplotlib)")
    add("--from", dest="source", type=Path, metavar="FILE", help="records of an earlier run instead of a new one")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = parse(argv)
    device = choose_device(options.device)
    if options.source:
        records = [json.loads(line) for line in options.source.read_text(encoding="utf-8").splitlines()]
    else:
        runs = options.runs or [train(name) for name in options.train or ["tiny"]]
        records = []
        for run in runs:
            found = measure(run, options.data, options.windows, device)
            record = {"environment": environment(device), **found}
            records.append(record)
            if options.save:
                save("halting_text.jsonl", record)
    for record in records:
        report(record)
    if options.plot:
        draw(records, options.plot)
        print(f"wrote {options.plot}")
    found = {r["run"]: {"joint": pays(r["joint"]), **{p: pays(f) for p, f in r["by_price"].items()}} for r in records}
    print(json.dumps({"learned_depth_pays": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
