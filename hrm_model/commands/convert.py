"""hrm convert: a checkpoint of any kind as another, in any dtype, verified by logits before it is put in place.

hrm convert runs/mine models/mine                          # a run's newest checkpoint, also one saved in shards
hrm convert runs/mine models/mine --weights ema            # the average of the weights, of a run with --ema
hrm convert published.pt models/cosmicfish --dtype bfloat16
hrm convert models/mine hub/mine --to hf --with-code       # for transformers: with tokenizer, card and source
hrm convert hub/mine mine.pt --to pt                       # the published form

What is written beside its place is loaded again, every way in which it may be loaded, and its logits are compared with
the source's; only then it gets its name. A lower dtype gives other logits: it is told by how much.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .shared import CKPT_HELP

HELP = "any checkpoint to a folder, a Hugging Face folder or a .pt, in any dtype, verified by logits"
FORMS = ("safetensors", "hf", "pt")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hrm convert`."""
    parser.add_argument("ckpt", metavar="CKPT", help=CKPT_HELP)
    parser.add_argument("out", metavar="OUT", help="the folder (with --to pt: the file) to write")
    parser.add_argument(
        "--to", choices=FORMS, default="safetensors",
        help="a folder of ours, one for transformers (with tokenizer, card), or a published .pt (default: safetensors)",
    )  # fmt: skip
    parser.add_argument(
        "--weights", choices=("model", "ema"), default="model", help="of a training run (default: model)"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the file (default: float32)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is at OUT")
    parser.add_argument(
        "--with-code", action="store_true", help="with --to hf: carry the source, for trust_remote_code without us"
    )
    parser.add_argument("--push", metavar="REPO", help="with --to hf: upload the folder to this repository of the hub")
    parser.add_argument("--private", action="store_true", help="with --push: a repository that is made is private")


def run(args: argparse.Namespace) -> int:
    """Convert; the last line is JSON.

    Raises:
        ValueError, OSError: the source cannot be read, OUT is in the way, or what was written gives other logits.
    """
    import torch

    from .. import conversion
    from ..checkpoint import load_model

    for flag in ("with_code", "push"):
        if getattr(args, flag) and args.to != "hf":
            raise ValueError(f"--{flag.replace('_', '-')} is for --to hf, not --to {args.to}; add --to hf")
    if args.private and not args.push:
        raise ValueError("--private is for --push; say with it what to upload to")
    if args.to == "hf":
        conversion.check_installed()
    model, _ = load_model(_source(Path(args.ckpt), args.weights))
    found = conversion.convert(model, args.out, args.to, getattr(torch, args.dtype), args.overwrite, args.with_code)
    report = {"out": args.out, "form": args.to, "parameters": model.num_parameters(), "dtype": args.dtype, **found}
    print(
        f"wrote {args.out}: {report['parameters']:,} parameters in {args.dtype}, {report['bytes']:,} bytes; read "
        f"again, its logits are those of the rounded weights, off the source's by at most {report['logits_off']:.3g}; "
        f"{report['same_top']:.2%} of the likeliest tokens are the same"
    )
    if args.push:
        from ..hf.export import push_folder

        report["pushed"] = push_folder(args.out, args.push, args.private)
        print(f"pushed to {report['pushed']}")
    print(json.dumps(report))
    return 0


def _source(path: Path, weights: str) -> Path:
    """What to load: the path, or of a run or checkpoint its averaged weights."""
    if weights == "model":
        return path
    from ..checkpoint import AVERAGE, latest_checkpoint

    if (path / "checkpoints").is_dir():
        path = latest_checkpoint(path) or path
    if not list(path.glob("ema*.safetensors")):
        raise ValueError(f"{path} has no averaged weights: its run was without --ema; use --weights model")
    return path / AVERAGE
