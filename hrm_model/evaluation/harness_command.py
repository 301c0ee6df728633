"""hrm-lm-eval: lm-evaluation-harness's own command line, which knows the model `hrm` here."""

from __future__ import annotations

import sys

EXTRA = "pip install 'hrm-kernels[eval]'"


def check_installed() -> None:
    """Raise ValueError, with the way to install it, where the harness is missing."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ValueError(f"lm-evaluation-harness is not installed: {EXTRA}") from error


def main() -> int | None:
    """Run it; the arguments are the harness's."""
    try:
        check_installed()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    from lm_eval.__main__ import cli_evaluate

    from . import harness  # noqa: F401  (registers the model)

    return cli_evaluate()


if __name__ == "__main__":
    sys.exit(main())
