"""Does the growing character model form words, keep what it knew, and stay itself when it grows?

    python bench/continual.py words            # one text of 150 kB, tiny recipe: scores beside a Markov chain's
    python bench/continual.py forgetting       # three texts in a row: nothing, replay, elastic penalty, both
    python bench/continual.py forgetting --steps 50 --seeds 1    # faster, and less to see

The texts are at hand with every interpreter: the language manual (pydoc's topics), the source of argparse, and accented
letters with their Unicode names, whose characters make the vocabulary grow beyond its rows. Last line: JSON, which
--save appends to bench/results/continual.jsonl.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import tempfile
import time
import unicodedata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout works without being installed

import torch

from bench.common import environment, positive, print_table, save
from hrm_model import load_model
from hrm_model.commands.analyze import analysed
from hrm_model.continual import forgetting
from hrm_model.continual.growth import grow
from hrm_model.continual.store import ModelDirectory
from train.continual import main as learn

WORDS_CHARS = 150_000
WAYS = {
    "none": ["--replay", "0"],
    "replay": ["--replay", "0.25"],
    "elastic": ["--replay", "0", "--elastic", "{elastic}"],
    "both": ["--replay", "0.25", "--elastic", "{elastic}"],
}
SMALL = dict(vocab_size=64, n_chars=1, tie_embeddings=False, init="truncated", use_gqa=False, n_input_layers=0)
SMALL |= dict(n_output_layers=0, hrm_H_layers=1, hrm_L_layers=1, n_embd=64, n_head=4, mlp_hidden=160, embed_scale=8.0)
SMALL |= dict(hrm_max_steps=1, halt_bias=0.0)
"""For the matrix: four lessons of each kind, three texts each."""


def texts() -> dict[str, str]:
    """The three texts by name."""
    import pydoc_data.topics

    manual = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    letters = [chr(c) for c in range(0xC0, 0x250)]
    names = "".join(f"{c} {unicodedata.name(c).lower()}\n" for c in letters)
    return {"manual": manual[:WORDS_CHARS], "source": inspect.getsource(argparse), "letters": names}


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", choices=("words", "forgetting"))
    parser.add_argument("--steps", type=positive, help="of each text (words: the recipe's; forgetting: 300)")
    parser.add_argument("--seeds", type=positive, default=1, help="runs of each way (default: 1)")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="(default: all)")
    parser.add_argument("--elastic", default="3", help="strength of the elastic penalty (default: 3)")
    parser.add_argument(
        "--length", type=positive, default=2000, help="characters of each of four samples (default: 2000)"
    )
    parser.add_argument("--out", help="keep the models here (default: a directory that goes)")
    parser.add_argument("--picture", help="draw the matrices, PNG")
    parser.add_argument("--save", action="store_true", help="append the result to bench/results/continual.jsonl")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.out or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in texts().items():
            (folder / f"{name}.txt").write_text(content, encoding="utf-8")
        began = time.perf_counter()
        found = words(folder, args) if args.question == "words" else forgotten(folder, args)
        found = {"question": args.question, **found, "seconds": round(time.perf_counter() - began)}
    record = found | environment(torch.device("cpu"))
    if args.save:
        save("continual.jsonl", record)
    print(json.dumps(record, ensure_ascii=False))
    return 0


def lesson(folder: Path, model: str, text: str, *flags: str) -> float:
    """Learn a text; the seconds it took."""
    began = time.perf_counter()
    paths = ["--text", str(folder / f"{text}.txt"), "--models", str(folder / "models"), "--model", model]
    status = learn([*paths, "--recipe", "tiny", "--on-interrupt", "pause", *flags])
    if status:
        raise SystemExit(status)
    return time.perf_counter() - began


def words(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Scores of a model of one text, and what growing does to its logits."""
    directory = ModelDirectory(folder / "models" / "words")
    there, cpu = directory.has_checkpoint(), time.process_time()
    seconds = lesson(folder, "words", "manual", *(["--steps", str(args.steps)] if args.steps else []))
    cpu = time.process_time() - cpu
    model, config = load_model(directory.path)
    tokenizer, history = directory.tokenizer(), directory.history()
    content = (folder / "manual.txt").read_text(encoding="utf-8")
    found: dict[str, Any] = {
        "parameters": model.num_parameters(), "characters": len(content), "steps": history.texts[-1].steps,
        "training_seconds": None if there else round(seconds), "training_cpu_seconds": None if there else round(cpu),
        "val_loss": history.texts[-1].val_loss, "scores": {},
    }  # fmt: skip
    for temperature in (1.0, 0.8):
        options = argparse.Namespace(length=args.length, samples=4, temperature=temperature, order=3, seed=0)
        here = analysed(model, tokenizer, content, options)
        found["scores"][f"model at {temperature}"] = here["scores"]["model"]
        found["scores"] |= {"markov 3": here["scores"]["markov"], "people": here["scores"]["people"]}
        print(f"--- at temperature {temperature}: {here['samples']['model'][0][:400]!r}")
    rows = [{"who": who, **scores} for who, scores in found["scores"].items()]
    names = list(rows[0])[1:]
    print_table({"": lambda r: r["who"], **{n: (lambda r, n=n: f"{r[n]:.1f}") for n in names}}, rows)
    found["growth"] = identical(model, tokenizer.encode(content[-config.block_size * 4 :]))
    print("largest difference of old logits after growth:", found["growth"])
    return found


@torch.no_grad()
def identical(model, ids: list[int]) -> dict[str, float]:
    """Largest difference of old characters' logits on trained weights, before and after each growth. 0 is bitwise."""
    n = model.config.n_chars
    rows = torch.tensor(ids).view(4, -1)
    before = model(rows).logits[..., :n]
    larger = {
        "characters within the rows": grow(model, model.config.vocab_size),
        "characters beyond them": grow(model, n + 200),
        "layers, gates at 0": grow(model, L=2, H=1),
        "both": grow(model, n + 200, 2, 1),
    }
    return {what: float((m(rows).logits[..., :n] - before).abs().max()) for what, m in larger.items()}


def forgotten(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The matrix of losses for each way and seed."""
    shape = folder / "shape.json"
    shape.write_text(json.dumps(SMALL), encoding="utf-8")
    matrices, runs = {}, []
    for seed in range(args.seeds):
        for way in args.ways:
            flags = [flag.format(elastic=args.elastic) for flag in WAYS[way]]
            flags += ["--config", str(shape), "--steps", str(args.steps or 300), "--seed", str(seed)]
            flags += ["--sample-tokens", "0", "--eval-epochs", "1", "--save-epochs", "1", "--growth-chars", "0"]
            seconds = [lesson(folder, f"{way}-{seed}", text, *flags) for text in texts()]
            history = ModelDirectory(folder / "models" / f"{way}-{seed}").history()
            names, rows = [t.name for t in history.texts], history.losses
            matrices[f"{way}, seed {seed}"] = names, rows
            runs.append({"way": way, "seed": seed, **forgetting.summary(names, rows), "seconds": round(sum(seconds))})
    for title, (names, rows) in matrices.items():
        print(f"{title}\n{forgetting.table(names, rows)}")
    columns = {"": lambda r: r["way"], "seed": lambda r: str(r["seed"])}
    columns |= {"forgotten of earlier": lambda r: f"{r['mean_forgetting_of_earlier']:.4f}"}
    columns |= {"mean loss at the end": lambda r: f"{r['mean_loss']:.4f}", "seconds": lambda r: str(r["seconds"])}
    print_table(columns, runs)
    if args.picture:
        forgetting.draw({t: m for t, m in matrices.items() if t.endswith("seed 0")}, Path(args.picture))
    return {"steps": args.steps or 300, "elastic": float(args.elastic), "runs": runs}


if __name__ == "__main__":
    sys.exit(main())
