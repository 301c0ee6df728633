"""hrm serve: answer requests over HTTP as OpenAI's API does, and show a chat at /.

    hrm serve runs/tiny                                   # http://127.0.0.1:8000
    curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' -d '{"prompt": "def main("}'

Many requests are answered together: they join and leave between two tokens. Ctrl-C or SIGTERM lets those that are there
finish, refuses new ones, and ends with status 0. docs/serve.md lists endpoints, fields and limits.
"""

from __future__ import annotations

import argparse
import importlib.util
import ipaddress
import logging
import math
import os
import socket
import sys
from pathlib import Path

from .shared import add_model_arguments, check_depth, load, named_as_typed

HELP = "answer requests over HTTP, and show a chat in a browser"
KEY_VARIABLE = "HRM_API_KEY"
NEEDED = "fastapi", "uvicorn"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hrm serve`."""
    add_model_arguments(parser)
    where = parser.add_argument_group("where")
    where.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine alone)"
    )
    where.add_argument("--port", metavar="N", type=int, default=8000, help="0 takes any that is free (default: 8000)")
    where.add_argument("--name", help="of the model, as requests call it (default: the checkpoint's)")
    where.add_argument(
        "--api-key", metavar="KEY", help=f"that requests must send (default: the environment's {KEY_VARIABLE}; none)"
    )
    where.add_argument(
        "--allow-host",
        metavar="NAME",
        action="append",
        default=[],
        help="a name under which the server may be asked, e.g. behind a proxy; may be given several times",
    )
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--places", metavar="N", type=int, help="answers at a time (default: up to 16, as memory allows)"
    )
    limits.add_argument(
        "--queue",
        metavar="N",
        type=int,
        default=64,
        help="answers that may wait for a place; more get 429 (default: 64)",
    )
    limits.add_argument(
        "--max-tokens", metavar="N", type=int, help="new tokens of an answer (default: what the window holds)"
    )
    limits.add_argument(
        "--max-body", metavar="BYTES", type=int, default=1_000_000, help="of a request (default: 1000000)"
    )
    limits.add_argument(
        "--timeout",
        metavar="S",
        type=float,
        default=300.0,
        help="seconds of a request, waiting included (default: 300)",
    )
    limits.add_argument(
        "--grace", metavar="S", type=float, default=30.0, help="seconds to finish answers at the end (default: 30)"
    )
    depth = parser.add_argument_group("depth")
    depth.add_argument("--max-steps", metavar="N", type=int, help="most steps of a token (default: the model's own)")
    depth.add_argument("--halt-bias", metavar="X", type=float, help="added to q_halt (default: the model's own)")


def run(args: argparse.Namespace) -> int:
    """Serve until a signal; returns 0, or 1 where the thread that computes has failed.

    Raises:
        ValueError, OSError: what is wrong with the options, the address or the checkpoint, and the remedy.
    """
    key = _check(args)
    hosts = _hosts(args)

    from ..serve.run import listen

    # before the model, which takes its time: a port that is taken is said at once, and who connects meanwhile waits
    with listen(args.host, args.port) as bound:
        return _serve(args, bound, key, hosts)


def _serve(args: argparse.Namespace, bound: socket.socket, key: str | None, hosts: tuple[str, ...] | None) -> int:
    model, tokenizer = load(args)

    from ..serve.app import make_app
    from ..serve.guard import Guard, Rules
    from ..serve.requests import Limits
    from ..serve.run import Service, to_standard_error
    from ..serve.scheduler import Scheduler, places_that_fit

    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    # a line for each request that is no HTTP would let anybody fill a disk
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    config = model.config
    if args.max_tokens is not None and args.max_tokens >= config.block_size:
        raise ValueError(f"--max-tokens {args.max_tokens} must be below the model's window of {config.block_size}")
    places = args.places or places_that_fit(model, 16, args.max_steps)
    limits = Limits(
        model=args.name or Path(args.ckpt).resolve().name,
        window=config.block_size,
        max_steps=args.max_steps or config.hrm_max_steps,
        vocab_size=config.vocab_size,
        max_tokens=args.max_tokens,
    )
    with named_as_typed(args):
        scheduler = Scheduler(
            model,
            tokenizer,
            places=places,
            queue=args.queue,
            max_steps=args.max_steps,
            halt_bias=args.halt_bias,
        )
        with scheduler:
            app = Guard(make_app(scheduler, limits, args.timeout), Rules(hosts, key, args.max_body))

            def ready() -> None:
                host, port = bound.getsockname()[:2]
                address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
                to_standard_error(f"{limits.model}: {places} places, window {limits.window} tokens, on {model.device}")
                if hosts is None:
                    to_standard_error(
                        f"warning: {args.host} can be reached from other machines"
                        + ("" if key else "; anyone there may use this model: set --api-key, or take --host 127.0.0.1")
                    )
                print(f"listening on {address}", flush=True)

            service = Service(app, scheduler.stop, args.grace, to_standard_error)
            scheduler.on_failure = service.end  # whoever watches the process can start another; this one is of no use
            service.run(bound, ready=ready)
    to_standard_error(f"ended after {sum(scheduler.counts.finished.values())} answers")
    return 1 if scheduler.failed else 0


def _check(args: argparse.Namespace) -> str | None:
    """What can be said before torch is imported; returns the API key."""
    from ..text_input import checked_text

    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f'hrm serve needs {", ".join(missing)}, which are not installed; pip install "hrm-kernels[serve]"'
        )
    for name, least, most in (
        ("port", 0, 65535), ("places", 1, 4096), ("queue", 0, 100_000), ("max_tokens", 1, math.inf),
        ("max_body", 1024, 1_000_000_000), ("timeout", 0.1, 86_400), ("grace", 0, 86_400),
    ):  # fmt: skip
        value = getattr(args, name)
        if value is not None and not least <= value <= most:
            upper = "" if math.isinf(most) else f" and at most {most:,}"
            raise ValueError(f"--{name.replace('_', '-')} {value} must be at least {least:,}{upper}")
    if args.name is not None and not checked_text(args.name, "--name").strip():
        raise ValueError("--name is empty; leave it out for the checkpoint's")
    check_depth(args)
    key = os.environ.get(KEY_VARIABLE) if args.api_key is None else args.api_key
    if key is not None and (not key.isascii() or not key.isprintable() or not key.strip()):
        raise ValueError(
            "the API key must be printable ASCII, at least one character; make one with `openssl rand -hex 16`"
        )
    return key


def _hosts(args: argparse.Namespace) -> tuple[str, ...] | None:
    """Names under which the server may be asked; None, any, where it is not for this machine alone."""
    from ..serve.guard import LOOPBACK

    try:
        loopback = ipaddress.ip_address(args.host).is_loopback
    except ValueError:
        loopback = args.host.lower() == "localhost"
    named = tuple(name.lower() for name in args.allow_host)
    if loopback:
        return tuple(dict.fromkeys((*LOOPBACK, args.host.lower(), *named)))
    return (args.host.lower(), *named) if named else None
