"""hrm depth: a page and a picture that show how long a model thinks about each token of a text.

hrm depth runs/tiny --text "To be, or not to be"          # writes depth.html and depth.png
hrm depth runs/tiny --file README.md --out readme.html --halt-bias 0.2
"""

from __future__ import annotations

import argparse
import json
import math
import os
from pathlib import Path

from .shared import add_model_arguments, check_depth, load

HELP = "colour each token of a text by the steps that the model takes to predict it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hrm depth`."""
    add_model_arguments(parser)
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--text", help="the text itself; <|endoftext|> in it is text like any other")
    text.add_argument("--file", metavar="FILE", help="a UTF-8 file with the text; - is standard input")
    parser.add_argument(
        "--out", metavar="PATH", default="depth.html",
        help="the page, ending in .html (default: depth.html); the picture takes its name with .png",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace the page and the picture if they are there")
    parser.add_argument("--no-png", action="store_true", help="write no picture (a picture needs matplotlib)")
    parser.add_argument("--max-steps", metavar="N", type=int, help="most steps a token (default: the model's own)")
    parser.add_argument(
        "--halt-bias", metavar="X", type=float,
        help="added to q_halt; higher halts earlier, --halt-bias=-inf never (default: the model's own)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Write the page, then the picture; print where they are and what they show, last as a line of JSON.

    Raises:
        ValueError, OSError: one line that names what is wrong and the remedy. If only the picture could not be
            written, the page has been and the message says so.
    """
    page_path = Path(args.out)
    picture_path = page_path.with_suffix(".png")
    paths = [page_path] if args.no_png else [page_path, picture_path]
    _check_paths(paths, args.overwrite)
    check_depth(args)

    # What is above answers at once; torch takes seconds to import.
    from ..depth_page import page
    from ..depth_picture import check_matplotlib, picture

    if not args.no_png:
        check_matplotlib()
    text, name = _text(args)
    model, tokenizer = load(args)
    reading = _read(model, tokenizer.encode(text), args.max_steps, args.halt_bias)
    checkpoint = _checkpoint_name(args.ckpt)
    title = f"Depth, token by token: {name}"
    facts = _facts(checkpoint, model.num_parameters(), reading, model.config)
    shown = {"title": title, "facts": facts}
    drawn = None if args.no_png else picture(reading, tokenizer, **shown)  # before anything is written: it may fail
    _write(page_path, page(reading, tokenizer, **shown).encode("utf-8"), args.overwrite)
    if drawn is not None:
        try:
            _write(picture_path, drawn, args.overwrite)
        except (ValueError, OSError) as error:
            kind = OSError if isinstance(error, OSError) else ValueError
            raise kind(f"{error} (the page is written: {_printable(page_path)})") from error
    _report(reading, checkpoint, paths)
    return 0


def _check_paths(paths: list[Path], overwrite: bool) -> None:
    page_path, parent = paths[0], paths[0].parent
    if page_path.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--out {_printable(page_path)} must end in .html; the picture takes its name with .png")
    if not parent.is_dir():
        raise ValueError(f"--out {_printable(page_path)}: {_printable(parent)} is no directory; make it first")
    for path in paths:
        if path.is_dir():
            raise ValueError(f"{_printable(path)} is a directory; choose another name with --out")
        if os.path.lexists(path) and not overwrite:
            raise ValueError(f"{_printable(path)} already exists; choose another name with --out or pass --overwrite")


def _text(args: argparse.Namespace) -> tuple[str, str]:
    """(text, what to call it)."""
    from ..text_input import checked_text, read_text

    if args.text is not None:
        text, name, option = checked_text(args.text, "--text"), "a text", "--text"
    else:
        option = f"--file {_printable(args.file)}"
        try:
            text = read_text(args.file)
        except OSError as error:
            reason = error.strerror or error
            raise OSError(f"cannot read {option}: {reason}; give a UTF-8 file, or - for standard input") from error
        name = "standard input" if args.file == "-" else _printable(Path(args.file).name)
    if not text:
        raise ValueError(f"{option} is empty; give at least one character")
    return text, name


def _read(model, ids: list[int], max_steps: int | None, halt_bias: float | None):
    """The text in windows of block_size tokens, each read afresh: a model has no place for more."""
    import torch
    from tqdm import tqdm

    from ..prefixes import Reading, Window, prefixes

    size, windows = model.config.block_size, []
    with tqdm(total=len(ids), unit=" tokens", disable=None if len(ids) > size else True, leave=False) as progress:
        for start in range(0, len(ids), size):
            part = ids[start : start + size]
            found = prefixes(model, torch.tensor(part), max_steps=max_steps, halt_bias=halt_bias)
            windows.append(Window(part, found.cpu()))
            progress.update(len(part))
    return Reading(
        windows,
        max_steps=model.config.hrm_max_steps if max_steps is None else max_steps,
        halt_bias=model.config.halt_bias if halt_bias is None else halt_bias,
    )


def _checkpoint_name(path: str) -> str:
    """Its directory or file, with the run's name before a training run's step; not where it lies on this machine."""
    parts = Path(os.path.abspath(path)).parts
    return _printable("/".join(parts[-3:] if "checkpoints" in parts[-2:-1] else parts[-1:]))


def _facts(checkpoint: str, n_parameters: int, reading, config) -> str:
    size = f"{n_parameters / 1e6:.2f} M" if n_parameters >= 1e5 else f"{n_parameters:,}"
    head = f"halting head trained with {config.halting!r}"
    if not config.head_is_trained:
        head = "halting head not trained: its depths say little about the text"
    limit = f"at most {reading.max_steps} step{'s' * (reading.max_steps > 1)}"
    return f"{checkpoint} · {size} parameters · {limit} · halt bias {reading.halt_bias:g} · {head}"


def _write(path: Path, content: bytes, overwrite: bool) -> None:
    """Put `content` at `path`, whole or not at all."""
    from ..atomic import write_file

    try:
        write_file(path, content, overwrite)
    except FileExistsError as error:  # reading may have taken minutes
        raise ValueError(f"{_printable(path)} has come into being meanwhile; choose another name with --out") from error
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"cannot write {_printable(path)}: {reason}; check the disk and its permissions") from error


def _report(reading, checkpoint: str, paths: list[Path]) -> None:
    histogram = {str(n): int(count) for n, count in enumerate(reading.histogram(), 1)}
    depths, surprisal, correlation = reading.depths(), reading.surprisal(), reading.rank_correlation()
    if len(reading.windows) > 1:
        size, n_windows = len(reading.windows[0].ids), len(reading.windows)
        print(f"{reading.n_tokens():,} tokens are over block_size {size}: {n_windows} windows, each read afresh")
    print("\n".join(f"wrote {_printable(path)}" for path in paths))
    print(f"mean steps {depths.mean():.3f} of {reading.max_steps}, {len(depths):,} predictions")
    print("steps: " + "  ".join(f"{n}: {count} ({count / len(depths):.1%})" for n, count in histogram.items() if count))
    bias = reading.halt_bias
    values = {
        "checkpoint": checkpoint,
        "tokens": reading.n_tokens(),
        "windows": len(reading.windows),
        "max_steps": reading.max_steps,
        "halt_bias": bias if math.isfinite(bias) else str(bias),
        "predictions": len(depths),
        "mean_steps": float(depths.mean()),
        "histogram": histogram,
        "nats_per_token": float(surprisal.mean()) if len(surprisal) else None,
        "rank_correlation": correlation,
        "page": _printable(paths[0]),
        "picture": _printable(paths[1]) if len(paths) > 1 else None,
    }
    print(json.dumps(values))


def _printable(path: str | Path) -> str:
    """A path that any terminal takes: bytes that are no UTF-8 as escapes."""
    return str(path).encode("utf-8", "backslashreplace").decode("utf-8")
