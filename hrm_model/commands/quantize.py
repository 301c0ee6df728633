"""hrm quantize: a checkpoint with narrower weights, and a report of what that changed.

hrm quantize runs/tiny --to int8                           # writes runs/tiny-int8, which every command reads
hrm quantize runs/tiny --to int4 --group-size 64 --out models/tiny-int4
hrm quantize runs/tiny --to int8 --dynamic --text notes.txt --overwrite

The halting head, norms and biases stay in float32. int8, int4 and fp8 need the extra "quant" (torchao). The report is
measured on held-out text, by default the validation split of data/stdlib; its last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from copy import deepcopy
from pathlib import Path

from .shared import CKPT_HELP

HELP = "narrower weights (int8, int4, fp8, bf16, fp16), and a report of what that changed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hrm quantize`."""
    parser.add_argument("ckpt", metavar="CKPT", help=CKPT_HELP)
    parser.add_argument("--to", required=True, choices=("int8", "int4", "fp8", "bf16", "fp16"), help="type of weights")
    parser.add_argument("--out", metavar="DIR", help="the folder to write (default: CKPT and -TO)")
    parser.add_argument("--dynamic", action="store_true", help="round activations to 8 bits too, a token at a time")
    parser.add_argument(
        "--group-size", metavar="N", type=int, help="int4: numbers that share a scale: 16 to 256 (default: 32)"
    )
    parser.add_argument(
        "--embedding", choices=("int8", "float32", "bf16", "fp16"),
        help="of the embedding and lm_head: int8 or float32; beside bf16 and fp16 weights as these or float32 "
        "(default: int8, or as the weights)",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is at the folder to write")
    parser.add_argument("--device", default="cpu", help="where both are measured: cpu, cuda, auto (default: cpu)")
    report = parser.add_argument_group("report")
    text = report.add_mutually_exclusive_group()
    text.add_argument("--data", metavar="DIR", nargs="+", help="datasets whose validation split is held out")
    text.add_argument("--text", metavar="FILE", help="held-out text instead, UTF-8; - is standard input")
    report.add_argument("--windows", metavar="N", type=int, default=8, help="windows of text to read (default: 8)")
    report.add_argument("--new-tokens", metavar="N", type=int, default=64, help="to time decoding by (default: 64)")
    report.add_argument("--no-report", action="store_true", help="write the folder alone")


def run(args: argparse.Namespace) -> int:
    """Quantise, write, read again, report; the last line is JSON.

    Raises:
        ValueError, OSError: no such quantisation here, the source cannot be read, the folder is in the way, there is
            no text, or what was written gives other logits.
    """
    from ..quantization import Quantization

    for name in ("windows", "new_tokens"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1; or --no-report")
    how = Quantization(args.to, args.dynamic, args.group_size, args.embedding)

    from ..atomic import check_target
    from ..checkpoint import load_model
    from ..quantization import check_machine, quantize
    from ..training.device import choose_device

    out = Path(args.out) if args.out else _beside(args.ckpt, args.to)
    device = choose_device(args.device)
    check_machine(how, device)
    check_target(out, args.overwrite)  # now, not when the work is done
    model, config = load_model(args.ckpt, device)
    quantised = deepcopy(model)  # not read twice: of a run that goes on, the second would be a later checkpoint
    quantize(quantised, how)
    windows = None if args.no_report else _windows(args, config)
    again = _write(quantised, out, args.overwrite)
    print(f"wrote {out}: {how.describe()}; read again, its logits are the same", flush=True)
    found = {"out": str(out), **how.to_dict(), "parameters": model.num_parameters()}
    found["bytes"] = [4 * model.num_parameters(), (out / "model.safetensors").stat().st_size]
    if windows is not None:
        found |= _measured(args, model, again, windows)
        print("\n".join(_table(found)))
    print(json.dumps(found))
    return 0


def _beside(ckpt: str, to: str) -> Path:
    """The folder to write by default: CKPT, of a file without its suffix, and -TO; "runs/tiny/" and "." are folders."""
    path = Path(ckpt) if Path(ckpt).name not in ("", "..") else Path(ckpt).resolve()
    path = path.with_suffix("") if path.suffix in (".pt", ".safetensors") else path
    return path.with_name(f"{path.name}-{to}")


def _write(quantised, out: Path, overwrite: bool):
    """Write the model beside its place, read it again, and only where its logits are the same put it in place.
    Returns what was read. Raises CheckpointError; then what was at `out` is there."""
    import torch

    from ..atomic import CheckpointError, atomic_directory
    from ..checkpoint import load_model, write_model
    from ..conversion import same
    from ..quantized_report import weight_bytes

    config, device = quantised.config, quantised.device
    ids = torch.randint(
        0, config.vocab_size, (2, min(32, config.block_size)), generator=torch.Generator().manual_seed(0)
    ).to(device)
    with torch.no_grad(), atomic_directory(out, overwrite, weight_bytes(quantised)) as place:
        expected = quantised(ids)
        if not expected.logits.isfinite().all():
            raise CheckpointError(
                "the quantised model's logits are not finite; see with hrm eval whether its source's are"
            )
        write_model(quantised, place)
        again, _ = load_model(place, device)
        found = again(ids)
        if not same(expected, found):
            apart = (expected.logits - found.logits).abs().max().item()
            raise CheckpointError(f"{out}, read again, gives logits that are off by up to {apart:.3g}; not put there")
    return again


def _windows(args: argparse.Namespace, config) -> list[list[int]]:
    """Held-out ids in windows of up to block_size + 1, evenly spread over what there is."""
    if args.text is None:
        import numpy as np

        from ..training.command import DEFAULT_TEXT
        from ..training.prepare import ensure_default_dataset
        from ..training.sampler import validation_windows
        from ..training.shards import open_dataset

        if not args.data:
            ensure_default_dataset(DEFAULT_TEXT)
        datasets = [open_dataset(path) for path in args.data or [DEFAULT_TEXT]]
        inputs, targets = validation_windows(datasets, config.block_size, args.windows, config.vocab_size)
        return np.concatenate((inputs, targets[:, -1:]), 1).tolist()
    from ..text_input import read_text
    from ..tokenizer import get_tokenizer

    ids = get_tokenizer().encode(read_text(args.text))
    if len(ids) < 2:
        raise ValueError(f"--text {args.text} has {len(ids)} tokens; give at least 2, one to predict the other from")
    if max(ids) >= config.vocab_size:
        raise ValueError(
            f"--text {args.text} has token ids up to {max(ids)}, the model's go to {config.vocab_size - 1}; "
            "its vocabulary is not GPT-2's: take --data or --no-report"
        )
    size = config.block_size
    starts = range(0, len(ids) - 1, size)
    n = min(args.windows, len(starts))
    chosen = [starts[i * len(starts) // n] for i in range(n)]
    return [ids[start : start + size + 1] for start in chosen]


def _measured(args: argparse.Namespace, model, quantised, windows: list[list[int]]) -> dict:
    import torch
    from tqdm import tqdm

    from ..quantized_report import compare, speeds, weight_bytes

    with tqdm(total=sum(len(w) - 1 for w in windows), unit=" tokens", disable=not sys.stderr.isatty()) as progress:
        agreement = compare(model, quantised, windows, progress.update).to_dict()
    depth = max(1, round(agreement["mean_steps"][0]))
    size = model.config.block_size
    n_new = max(1, min(args.new_tokens, size // 2))
    prompt = windows[0][: max(1, min(len(windows[0]) - 1, size - n_new))]
    times = speeds((model, quantised), prompt, n_new, depth)
    pairs = {name: [one[name] for one in times] for name in times[0]}
    held = {"weight_bytes": [weight_bytes(model), weight_bytes(quantised)], "depth": depth, "prompt": len(prompt)}
    return agreement | held | pairs | {"new_tokens": n_new, "threads": torch.get_num_threads()}


def _table(found: dict) -> list[str]:
    def mb(pair: list[int]) -> list[str]:
        return [f"{n / 1e6:.2f} MB" for n in pair]

    def row(name: str, pair: list[str], ratio: float | None = None) -> str:
        return f"{name:<34} {pair[0]:>12} {pair[1]:>12}" + ("" if ratio is None else f" {ratio:>8.3f}x")

    def numbers(name: str, key: str, form: str, ratio: bool = True) -> str:
        a, b = found[key]
        return row(name, [format(a, form), format(b, form)], b / a if ratio else None)

    sizes = [
        ("weights in the file", "bytes"),
        ("weights in memory", "weight_bytes"),
        ("copies while decoding", "copy_bytes"),
    ]
    return [
        "",
        row("", ["float32", found["to"]]),
        *(row(name, mb(found[key]), found[key][1] / found[key][0] if found[key][0] else None) for name, key in sizes),
        numbers("perplexity", "perplexity", ".4f"),
        numbers("mean steps", "mean_steps", ".4f", False),
        numbers(f"prefill, tokens/s ({found['prompt']} tokens)", "prefill_tokens_per_s", ".1f"),
        numbers(f"decoding, tokens/s ({found['new_tokens']} tokens)", "decode_tokens_per_s", ".1f"),
        "",
        f"{found['positions']:,} positions of held-out text: same likeliest token {found['top1_agreement']:.2%}, "
        f"mean KL {found['kl_nats']:.6f} nats, same steps {found['step_agreement']:.2%}",
        f"speed at {found['depth']} steps a token, one row, {found['threads']} threads",
    ]
