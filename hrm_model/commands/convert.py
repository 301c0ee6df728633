"""hrm convert: a checkpoint of any kind as one folder with config.json and model.safetensors.

hrm convert runs/mine models/mine                          # a run's newest checkpoint, also one saved in shards
hrm convert runs/mine models/mine --weights ema            # the average of the weights, of a run with --ema
hrm convert published.pt models/cosmicfish --dtype bfloat16

The folder is written beside its place, loaded again and compared by logits with the source before it says done.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .shared import CKPT_HELP

HELP = "any checkpoint to one folder with safetensors, in any dtype, verified by logits"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hrm convert`."""
    parser.add_argument("ckpt", metavar="CKPT", help=CKPT_HELP)
    parser.add_argument("out", metavar="OUT", help="the folder to write")
    parser.add_argument(
        "--weights", choices=("model", "ema"), default="model", help="of a training run (default: model)"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the file (default: float32)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is at OUT")


def run(args: argparse.Namespace) -> int:
    """Convert; the last line is JSON.

    Raises:
        ValueError, OSError: the source cannot be read, OUT is in the way, or what was written gives other logits.
    """
    import torch

    from ..checkpoint import load_model, save_model

    model, config = load_model(_source(Path(args.ckpt), args.weights))
    dtype = getattr(torch, args.dtype)
    with torch.no_grad():
        rounded = {name: t.to(dtype).float() for name, t in model.state_dict().items()}
    save_model(model, args.out, dtype, args.overwrite)
    again, _ = load_model(args.out)
    ids = torch.randint(
        0, config.vocab_size, (2, min(32, config.block_size)), generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        source = model(ids)
        model.load_state_dict(rounded)
        expected, found = model(ids), again(ids)
    if not torch.equal(expected.logits, found.logits):
        apart = (expected.logits - found.logits).abs().max().item()
        raise ValueError(f"{args.out} gives logits that are off by up to {apart:.3g}; do not use it, write it again")
    report = {
        "out": args.out,
        "parameters": model.num_parameters(),
        "dtype": args.dtype,
        "bytes": sum(file.stat().st_size for file in Path(args.out).iterdir()),
        "logits_off": (source.logits - found.logits).abs().max().item(),
        "same_steps": bool(torch.equal(source.executed_steps, found.executed_steps)),
    }
    print(
        f"wrote {args.out}: {report['parameters']:,} parameters in {args.dtype}, {report['bytes']:,} bytes; read "
        f"again, its logits are those of the rounded weights, off the source's by at most {report['logits_off']:.3g}"
    )
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
