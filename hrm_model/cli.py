"""The command `hrm`, also `python -m hrm_model`: finds the command that is asked for and ends it as a shell expects.

Exit status: what the command says (0 is success), 1 an error (of a chat on a pipe, any line's), 2 a wrong command line,
130 stopped by Ctrl-C, 141 the reader of a pipe went away.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib
import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

COMMANDS = (
    "chat", "generate", "serve", "info", "depth", "eval", "convert", "quantize", "ask", "analyze", "demo", "recover",
)  # fmt: skip
"""Modules of hrm_model.commands, each with HELP, add_arguments(parser) and run(args) -> exit status. A module is
imported when its command is asked for, so that `hrm --help` answers at once."""

GET_A_CHECKPOINT = (
    "train one with `python train/pretrain.py` (three minutes, writes runs/tiny), then `hrm chat runs/tiny`; "
    "or give a published folder or .pt file"
)
EPILOG = f"No checkpoint yet? {GET_A_CHECKPOINT[0].upper()}{GET_A_CHECKPOINT[1:]}."
_NEGATIVE = re.compile(r"-(\.?\d|inf)")
STOPPED = 130
BROKEN_PIPE = 141


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line with a remedy."""

    def error(self, message: str):
        """End with status 2."""
        if message.startswith("the following arguments are required:") and "CKPT" in message:
            message = f"no checkpoint is given; {GET_A_CHECKPOINT}"
        self.exit(2, f"error: {message.rstrip('?')}{'?' if message.endswith('?') else ';'} see {self.prog} --help\n")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a sampled character that the terminal lacks must not end a command
    try:
        status = _run(argv)
        sys.stdout.flush()  # here, so that a reader that went away is met here
        return status
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return STOPPED
    except BrokenPipeError:
        # Python flushes standard output once more at its end, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except Exception as error:
        if not _is_users(error):
            raise
        from .terminal import describe

        print(f"error: {describe(error)}", file=sys.stderr)
        return 1


def _run(argv: list[str]) -> int:
    parser = Parser(prog="hrm", description="Hierarchical-reasoning language models.", epilog=EPILOG)
    parser.add_argument("--version", action="store_true", help="print the version and leave")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    module = None
    for name in COMMANDS:
        of_name = commands.add_parser(name, help=help_of(name), formatter_class=argparse.RawDescriptionHelpFormatter)
        if argv[:1] == [name]:
            module = importlib.import_module(f".commands.{name}", __package__)
            of_name.description = module.__doc__
            module.add_arguments(of_name)
            parser = of_name
    if module is None and argv and not argv[0].startswith("-"):
        parser.error(f"unknown command {argv[0]!r}{_near(argv[0], COMMANDS)}")
    argv = with_dashes(argv)
    args, unknown = parser.parse_known_args(argv if module is None else argv[1:])
    if unknown:
        known = [flag for action in parser._actions for flag in action.option_strings]
        parser.error(f"unknown argument {unknown[0]!r}{_near(unknown[0], known)}")
    if module is None and args.version:
        from hrm_kernels.version import __version__

        print(f"hrm {__version__}")
        return 0
    if module is None:
        parser.print_help()
        return 0
    _check_checkpoint(getattr(args, "ckpt", None))
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        return module.run(args)


def _near(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def help_of(name: str) -> str:
    """The HELP line of a command, read from its source: importing it might import torch."""
    source = (Path(__file__).parent / "commands" / f"{name}.py").read_text(encoding="utf-8")
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.Assign) and [ast.unparse(t) for t in statement.targets] == ["HELP"]:
            return ast.literal_eval(statement.value)
    raise AssertionError(f"{name}.py has no HELP")


def with_dashes(argv: list[str]) -> list[str]:
    """Flags with their underscores as dashes: the published scripts write --max_tokens, and so may a user. A negative
    number, or a range that begins with one, is put to its flag with "=": argparse would take it for a flag."""
    given, verbatim = [], False
    for argument in argv:
        verbatim = verbatim or argument == "--"
        negative = _NEGATIVE.match(argument) and not verbatim
        if negative and given and given[-1].startswith("--") and "=" not in given[-1]:
            given[-1] += f"={argument}"
            continue
        if argument.startswith("--") and not verbatim:
            flag, equals, value = argument.partition("=")
            argument = flag.replace("_", "-") + equals + value
        given.append(argument)
    return given


def _check_checkpoint(path: str | None) -> None:
    if path is None or os.path.lexists(path):
        return
    from .atomic import interrupted_replacement

    if not interrupted_replacement(path):  # loading knows more about that
        raise FileNotFoundError(f"there is no checkpoint {path}; {GET_A_CHECKPOINT}")


def _is_users(error: Exception) -> bool:
    """Whether the message is for the user; any other exception is a fault of ours and keeps its traceback."""
    if isinstance(error, (ValueError, OSError, MemoryError)):
        return True
    names = ("BackendError", "hrm_kernels"), ("OutOfMemoryError", "torch")
    modules = ((name, sys.modules.get(module)) for name, module in names)
    return any(module and isinstance(error, getattr(module, name)) for name, module in modules)


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    print(f"warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
