"""What does the controller add to a language model that cannot add? Sums of two two-digit numbers, on two CPU cores.

    python bench/hybrid.py                                   # everything; needs the extras hybrid, lora
    python bench/hybrid.py --save --plot docs/hybrid.png
    python bench/hybrid.py --language-model DIR              # an earlier run's, instead of a new one
    python bench/hybrid.py --from bench/results/hybrid.jsonl --plot picture.png    # draws it again

A small Llama is trained on the standard library's text and frozen (bench/hybrid_lm.py). Then each is trained by
train/hybrid.py's loop on the same examples in as many steps, and answers 200 prompts, greedily. No prompt, nor the one
with its operands exchanged, was trained on.

    LM only             as it is
    hybrid              the controller over it
    hybrid, z_H of another prompt    the same weights; what was thought is about the prompt before it
    LM + LoRA           adapters on all layers with as many weights as the controller has, no controller
    HRM only            the project's model over the tokens themselves, with about as many weights, no language model

Accuracy against segments shows whether thinking longer than in training helps or harms. Exit status: 0 if the hybrid
answers at least 95 % and no more than 10 % with another prompt's z_H, the language model alone at most 5 %, and the
frozen weights are the same as before; 1 otherwise; 2 for wrong usage. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench.common import environment, positive, print_table, save
from bench.hybrid_lm import make_language_model, text_loss
from bench.hybrid_plot import draw
from hrm_model.hybrid.tasks.held_out import prompt_key
from hrm_model.hybrid.training.loop import HybridTraining
from hrm_model.hybrid.training.options import HybridRun

TASK = "toy_addition:2"
N_TEST = 200
SEGMENTS = tuple(range(1, 9))
COMMON = dict(
    tasks=TASK, batch_size=128, warmup=30, controller_warmup=100, eval_n=N_TEST, max_new_tokens=5, log_every=100,
    log_samples_every=0, device="cpu",
)  # fmt: skip
_SHAPE = dict(h_layers=1, l_layers=1, n_heads=4, inner_T=2, segments=2, lr=1e-3, min_lr=1e-4)
SYSTEMS = {
    "LM + LoRA": dict(system="lm", lora_layers=0),
    "HRM only": dict(system="hrm", d_h=192, **_SHAPE),
    "hybrid": dict(system="hybrid", d_h=384, injector="cab", memory_tokens=4, no_logit_bias=True, **_SHAPE),
}  # the longest first; d_h 384 is as wide as what is pooled, twice the language model's width


def lora_rank(lm: Path, weights: int) -> int:
    """The rank whose adapters on every linear map of every layer have about so many weights."""
    c = json.loads((lm / "config.json").read_text())
    width, hidden = c["hidden_size"], c["intermediate_size"]
    kv = width * c["num_key_value_heads"] // c["num_attention_heads"]
    a_rank = c["num_hidden_layers"] * (2 * (2 * width) + 2 * (width + kv) + 3 * (width + hidden))
    return max(1, round(weights / a_rank))


def train(name: str, lm: str, out: str, steps: int, seed: int, rank: int, lora_lr: float) -> dict[str, Any]:
    """Train one of SYSTEMS and measure it."""
    torch.set_num_threads(1)
    begin = time.perf_counter()
    options = dict(SYSTEMS[name])
    if name == "LM + LoRA":
        options |= dict(lora_rank=rank, lora_alpha=float(rank), lr=lora_lr, min_lr=lora_lr / 10)
    run = HybridRun(
        model_name=lm, out=f"{out}/{name}", steps=steps, seed=seed, eval_every=steps, save_every=steps,
        **COMMON, **options,
    )  # fmt: skip
    training = HybridTraining(run)
    found: dict[str, Any] = {"name": name, "trained": training.model.num_parameters(), "segments": run.segments}
    hybrid = name == "hybrid"
    if hybrid:
        digest = training.model.language.digest()
        alone = HybridTraining(HybridRun(model_name=lm, out=f"{out}/alone", **COMMON, **options))
        alone.model.shut_gates()
        found["language model alone"] = accuracy(alone, 1)
        found["without training"] = accuracy(training, run.segments)
    status = training()
    if status:
        raise RuntimeError(f"{name} ended with status {status}")
    found["accuracy"] = accuracy(training, run.segments)
    found["seconds"] = time.perf_counter() - begin
    if hybrid:
        found["shuffled"] = accuracy(training, run.segments, shuffle=True)
        found["by_segments"] = {str(n): accuracy(training, n) for n in SEGMENTS}
        found["frozen"] = training.model.language.digest() == digest
        found["gate"] = training.model.injector.gate().item()
        texts, _ = training.evaluation.answer(training.mixture.test[:5], run.segments)
        found["answers"] = [e.prompt + text for e, text in zip(training.mixture.test, texts, strict=False)]
    if name != "HRM only":
        found["text_loss"] = text_loss(training.model.language.model, Path(lm))
    held = {prompt_key(e.prompt) for e in training.mixture.test}
    seen = {prompt_key(e.prompt) for e in training.mixture.training(range(20_000))}
    found["test_prompts_trained_on"], found["training_prompts"] = len(held & seen), len(seen)
    return found


def accuracy(training: HybridTraining, segments: int, **options) -> float:
    """Share of the held-out prompts that are answered rightly, greedily."""
    scores, _ = training.evaluation.scores(segments, **options)
    return sum(scores) / len(scores)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything, in one record."""
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        lm = options.language_model or Path(scratch) / "language-model"
        about = None
        if not options.language_model:
            torch.set_num_threads(options.workers)
            about = make_language_model(lm, options.lm_steps, options.seed)
            print(f"language model: {about['parameters']:,} weights, {about['loss']:.3f} nats a token of held-out text "
                  f"(unigram {about['unigram']:.3f}), {about['seconds']:.0f} s", flush=True)  # fmt: skip
        shape = SYSTEMS["hybrid"]
        own = HybridTraining(
            HybridRun(model_name=str(lm), out=f"{scratch}/size", **COMMON, **shape)
        ).model.num_parameters()
        rank = lora_rank(lm, own)
        with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
            jobs = [
                pool.submit(train, name, str(lm), scratch, options.steps, options.seed, rank, options.lora_lr)
                for name in options.systems
            ]
            found = {job.result()["name"]: job.result() for job in jobs}
    return {
        "environment": environment(torch.device("cpu")), "task": TASK, "n": N_TEST, "steps": options.steps,
        "batch": COMMON["batch_size"], "seed": options.seed, "lora_rank": rank, "lora_lr": options.lora_lr,
        "language_model": about, "systems": found,
        "seconds": time.perf_counter() - begin,
    }  # fmt: skip


def rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The table's lines."""
    found, lines = record["systems"], []
    if hybrid := found.get("hybrid"):
        lines += [
            {"name": "LM only", "trained": 0, "accuracy": hybrid["language model alone"]},
            {"name": "hybrid, before training", "trained": 0, "accuracy": hybrid["without training"]},
            hybrid,
            {"name": "hybrid, z_H of another prompt", "trained": hybrid["trained"], "accuracy": hybrid["shuffled"]},
        ]
    return lines + [found[name] for name in ("LM + LoRA", "HRM only") if name in found]


def report(record: dict[str, Any]) -> dict[str, bool]:
    """Print what was found; returns the conclusions."""
    columns = {
        f"{record['task']}, n = {record['n']}, greedy": lambda r: r["name"],
        "accuracy": lambda r: f"{r['accuracy']:.3f}",
        "trained weights": lambda r: f"{r['trained']:,}",
        "text loss after": lambda r: f"{r['text_loss']:.3f}" if "text_loss" in r else "",
        "seconds": lambda r: f"{r['seconds']:.0f}" if "seconds" in r else "",
    }
    print()
    print_table(columns, rows(record))
    hybrid = record["systems"].get("hybrid")
    if hybrid is None:
        return {}
    by_segments = "  ".join(f"{n}: {x:.3f}" for n, x in hybrid["by_segments"].items())
    print(f"accuracy by segments (trained with {hybrid['segments']}): {by_segments}")
    print("answers: " + "  ".join(hybrid["answers"]))
    conclusions = {
        "the language model alone answers at most 5 %": hybrid["language model alone"] <= 0.05,
        "the hybrid answers at least 95 %": hybrid["accuracy"] >= 0.95,
        "with another prompt's z_H at most 10 %": hybrid["shuffled"] <= 0.10,
        "the language model's weights are as before": hybrid["frozen"],
        "no test prompt or its commutation was trained on": all(
            s["test_prompts_trained_on"] == 0 for s in record["systems"].values()
        ),
    }
    for sentence, holds in conclusions.items():
        print(f"{'holds' if holds else 'DOES NOT HOLD':<14}{sentence}")
    return conclusions


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--steps", type=positive, default=1000, metavar="N", help="optimizer steps of each system; default: 1000")
    add("--lm-steps", type=positive, default=400, metavar="N", help="of the language model; default: 400")
    add("--language-model", type=Path, metavar="DIR", help="a language model that an earlier run kept")
    add(
        "--systems",
        nargs="+",
        default=list(SYSTEMS),
        choices=list(SYSTEMS),
        metavar="NAME",
        help=f"of {', '.join(SYSTEMS)}",
    )
    add("--lora-lr", type=float, default=3e-4, metavar="X", help="learning rate of the adapters; default: 0.0003")
    add("--seed", type=int, default=0, metavar="N", help="default: 0")
    add("--workers", type=positive, default=2, metavar="N", help="processes of one thread each; default: 2")
    add("--save", action="store_true", help="append the record to bench/results/hybrid.jsonl")
    add("--plot", type=Path, metavar="FILE", help="draw accuracies, and accuracy against segments (needs matplotlib)")
    add(
        "--from",
        dest="source",
        type=Path,
        metavar="FILE",
        help="the last record with the hybrid of earlier runs instead of a new one",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = parse(argv)
    if options.source:
        lines = options.source.read_text(encoding="utf-8").splitlines()
        record = [r for r in map(json.loads, lines) if "hybrid" in r["systems"]][-1]
    else:
        try:
            record = measure(options)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        if options.save:
            save("hybrid.jsonl", record)
    conclusions = report(record)
    if options.plot:
        draw(record, rows(record), options.plot)
        print(f"wrote {options.plot}")
    print(json.dumps({"conclusions": conclusions, "holds": all(conclusions.values()), "seconds": record["seconds"]}))
    return 0 if all(conclusions.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
