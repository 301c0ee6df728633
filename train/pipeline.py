"""All stages, from text to a model that says who it is: python train/pipeline.py [--recipe tiny] [--resume auto].

prepare -> pretrain -> converse -> instruct -> identity -> calibrate -> three questions to the result. Offline, from
nothing; recipe tiny takes some twenty minutes of CPU time. With --resume auto stages that have finished are skipped and
one that was killed goes on. The pipeline ends at the first stage that fails, with its exit status. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout works without being installed

QUESTIONS = ("What does json.dumps do?", "Who are you?", "Hello!")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--recipe", default="tiny", help="of every stage: tiny, small or base; default: tiny")
    add("--out", default="runs", metavar="DIR", help="where the runs go, a directory a stage; default: runs")
    add("--resume", default="never", choices=("never", "auto"), help="auto: go on where an earlier pipeline ended")
    add("--persona", metavar="FILE", help="who the model is to be, as in train/identity.py")
    add("--fused", nargs="?", const="auto", choices=("auto", "require"), help="kernels, as in train/pretrain.py")
    add("--device", help="auto, cpu, cuda, cuda:N or mps")
    add("--steps", type=int, metavar="N", help="optimizer steps of every stage; default: the recipe's")
    return parser.parse_args(argv)


def stages(options: argparse.Namespace) -> list[tuple[str, Any, list[str]]]:
    """(name, main function, flags) of every stage, in order. Raises ValueError for a persona that cannot be used."""
    from hrm_model.training.command import DEFAULT_TEXT, DEFAULT_TURNS
    from hrm_model.training.identity import dataset_path
    from hrm_model.training.recipes import STAGES
    from hrm_model.training.shards import MANIFEST
    from train import calibrate, converse, identity, instruct, prepare, pretrain

    scripts = (pretrain, converse, instruct, identity, calibrate)
    common = ["--recipe", options.recipe, "--resume", options.resume]
    for name in ("fused", "device", "steps"):
        value = getattr(options, name)
        common += [f"--{name.replace('_', '-')}={value}"] if value is not None else []
    found, before = [], None
    if not (Path(DEFAULT_TEXT) / MANIFEST).exists():
        found.append(("prepare", prepare.main, []))
    for stage, script in zip(STAGES, scripts, strict=True):
        flags = [*common, "--out", run_of(options, stage)]
        if before:
            flags += ["--init-from", before]
        if options.persona and stage == "identity":
            flags += ["--persona", options.persona]
        if options.persona and stage == "calibrate":
            flags += ["--data", dataset_path(options.persona), DEFAULT_TURNS]
        found.append((stage, script.main, flags))
        before = run_of(options, stage)
    return found


def run_of(options: argparse.Namespace, stage: str) -> str:
    """Directory of a stage's run."""
    from hrm_model.training.recipes import default_out

    return str(Path(options.out) / Path(default_out(stage, options.recipe)).name)


def val_losses(run: str) -> tuple[float | None, float | None]:
    """Validation loss before the first step and after the last; None where it was not measured."""
    path = Path(run) / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = [r for r in map(json.loads, lines) if r["kind"] == "eval"]
    before = found[0]["val_loss"] if found and found[0]["step"] == 0 else None
    return before, found[-1]["val_loss"] if found else None


def answers(checkpoint: str) -> dict[str, str]:
    """What `hrm chat` says to each of QUESTIONS."""
    from hrm_model.cli import main as hrm

    found = {}
    for question in QUESTIONS:
        print(f"\n$ hrm chat {checkpoint} --temperature 0 --max-new-tokens 60 --prompt {question!r}", flush=True)
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            status = hrm(["chat", checkpoint, "--temperature", "0", "--max-new-tokens", "60", "--prompt", question])
        print(said.getvalue().rstrip(), flush=True)
        found[question] = said.getvalue().strip() if status == 0 else ""
    return found


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status of the stage that failed, or 0."""
    options, began = parse(argv), time.perf_counter()
    try:
        planned = stages(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    table = []
    for name, run, flags in planned:
        print(f"\n== {name}", flush=True)
        started = time.perf_counter()
        status = run(flags)
        minutes = (time.perf_counter() - started) / 60
        if status:
            print(f"error: the stage {name} ended with exit status {status}; see above", file=sys.stderr, flush=True)
            return status
        before, after = (None, None) if name == "prepare" else val_losses(run_of(options, name))
        table.append({"stage": name, "val_loss_before": before, "val_loss_after": after, "minutes": round(minutes, 2)})
    from hrm_model.checkpoint import best_checkpoint, load_model
    from hrm_model.training.identity import dataset_path
    from hrm_model.training.identity_check import right_answers, validation_pairs

    checkpoint = str(best_checkpoint(run_of(options, "calibrate")))
    persona, pairs = validation_pairs(dataset_path(options.persona))
    right = right_answers(load_model(checkpoint)[0], persona, pairs)
    said = answers(checkpoint)
    print(f"\n{'stage':<10} {'val loss before':>16} {'after':>8} {'minutes':>8}")
    for row in table:
        before, after = (
            "-" if row[f"val_loss_{k}"] is None else f"{row[f'val_loss_{k}']:.4f}" for k in ("before", "after")
        )
        print(f"{row['stage']:<10} {before:>16} {after:>8} {row['minutes']:>8.2f}")
    asked = ", ".join(f"{name} {good} of {of}" for name, (good, of) in right.items())
    print(f"right answers to questions of the validation split, by likeliest words: {asked}")
    print(f"talk to it: hrm chat {checkpoint}")
    result = {"checkpoint": checkpoint, "stages": table, "answers": said, "right": right}
    print(json.dumps(result | {"minutes": round((time.perf_counter() - began) / 60, 2)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
