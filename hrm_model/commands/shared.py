"""What several commands have in common: where a model runs, how it draws, how deep it thinks."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager

CKPT_HELP = "a saved model, a training run, or a published folder or .pt"


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """CKPT, --device, --dtype, --fused."""
    parser.add_argument("ckpt", metavar="CKPT", help=CKPT_HELP)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and cache (default: float32)"
    )
    parser.add_argument(
        "--fused",
        nargs="?",
        const="auto",
        default="off",
        choices=("auto", "require", "off"),
        help="kernels of hrm_kernels: auto where a GPU and a kernel are, require makes their absence an error",
    )


def add_sampling_arguments(
    parser: argparse.ArgumentParser, temperature: float, top_k: int | None, top_p: float
) -> None:
    """--temperature, --top-k, --top-p, --min-p, --repetition-penalty with these defaults."""
    parser.add_argument(
        "--temperature",
        metavar="X",
        type=float,
        default=temperature,
        help=f"0 takes the likeliest token; higher is more varied (default: {temperature})",
    )
    shown = "all" if top_k is None else top_k
    parser.add_argument(
        "--top-k", metavar="N", type=int, default=top_k, help=f"draw from the N likeliest; 0 for all (default: {shown})"
    )
    parser.add_argument(
        "--top-p",
        metavar="X",
        type=float,
        default=top_p,
        help=f"draw from the likeliest tokens that reach probability X together (default: {top_p})",
    )
    parser.add_argument(
        "--min-p", metavar="X", type=float, default=0.0, help="drop tokens less likely than X times the likeliest"
    )
    parser.add_argument(
        "--repetition-penalty",
        metavar="X",
        type=float,
        default=1.0,
        help="lower what was said already (default: 1, off)",
    )


def add_depth_arguments(parser: argparse.ArgumentParser) -> None:
    """--max-steps, --force-steps, --halt-bias, --depth-update, --show-steps."""
    parser.add_argument("--max-steps", metavar="N", type=int, help="most steps of a token (default: the model's own)")
    parser.add_argument(
        "--force-steps", "--force-hrm-steps", metavar="N", type=int, help="exactly N steps for every token"
    )
    parser.add_argument(
        "--halt-bias", metavar="X", type=float, help="added to q_halt; higher halts earlier (default: the model's own)"
    )
    parser.add_argument(
        "--depth-update",
        choices=("token", "turn"),
        default="token",
        help="the model decides its steps anew at every token, or once for an answer (default: token)",
    )
    parser.add_argument(
        "--show-steps", "--show-hrm-steps", action="store_true", help="colour each token by the steps that it took"
    )


@contextmanager
def named_as_typed(args: argparse.Namespace) -> Iterator[None]:
    """Errors within name options as the command line does: --top-k for top_k, and 0 instead of None for all."""
    from ..terminal import as_typed

    try:
        yield
    except ValueError as error:
        # Of the names that are also words, those that messages use as names alone.
        names = [name for name in vars(args) if "_" in name or name in ("temperature", "seed")]
        flags = {name: f"--{name.replace('_', '-')}" for name in names}
        raise as_typed(error, flags | {"None for all": "0 for all", "leave it out to keep": "0 keeps"}) from error


def sampling_of(args: argparse.Namespace):
    """The Sampling that the arguments ask for.

    Raises:
        ValueError: a value out of range.
    """
    from ..sampling import Sampling

    with named_as_typed(args):
        return Sampling(
            temperature=args.temperature,
            top_k=args.top_k or None,
            top_p=args.top_p,
            min_p=args.min_p,
            repetition_penalty=args.repetition_penalty,
        )


def check_depth(args: argparse.Namespace, config=None) -> None:
    """Raise ValueError for depth options out of range; with a model's config, also for more steps than it takes."""
    for name in ("max_steps", "force_steps"):
        value = getattr(args, name, None)  # not every command forces steps
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be at least 1; leave it out for the model's own")
    if args.halt_bias is not None and math.isnan(args.halt_bias):
        raise ValueError("--halt-bias nan is no number; inf halts after one step, -inf never")
    if config is None or args.force_steps is None:
        return
    limit = args.max_steps or config.hrm_max_steps
    if args.force_steps > limit:
        raise ValueError(
            f"--force-steps {args.force_steps} is more than the {limit} that this model takes at most; "
            f"choose 1 to {limit}, or raise --max-steps too"
        )


def load(args: argparse.Namespace):
    """The model and tokenizer that the arguments ask for, and the kernels switched as they say.

    Raises:
        ValueError: no such device, kernels that are required and missing, a checkpoint that cannot be read, or a
            vocabulary that is not GPT-2's.
    """
    import torch

    from ..checkpoint import load_model
    from ..quantization import quantization_of
    from ..tokenizer import get_tokenizer
    from ..training.device import choose_device, choose_kernels

    device = choose_device(args.device)
    kernels = choose_kernels(args.fused, device)
    if args.fused != "off":
        print(kernels, file=sys.stderr)
    model, config = load_model(args.ckpt, device, getattr(torch, args.dtype))
    if args.fused != "off" and (how := quantization_of(model)) is not None:
        if args.fused == "require":
            raise ValueError(
                f"--fused=require: {args.ckpt} is quantised to {how.to}, and no kernel multiplies by such weights; "
                "use --fused for what there is, or its float32 source"
            )
        print(
            f"quantised to {how.to}: products with weights and the loop over steps are the reference", file=sys.stderr
        )
    if config.n_chars is not None:
        from ..continual.store import model_directory_of

        return model, model_directory_of(args.ckpt).tokenizer()
    tokenizer = get_tokenizer()
    tokenizer.check_vocabulary(config.vocab_size, args.ckpt)
    return model, tokenizer


def tell_unknown(tokenizer, what: str) -> None:
    """Say on stderr how many characters a model of characters has met in `what` that it does not have."""
    if n := sum(getattr(tokenizer, "unknown", {}).values()):
        print(f"{n} characters of {what} are unknown to this model; it reads them as U+FFFD", file=sys.stderr)
