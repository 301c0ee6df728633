"""Teach a model who it is: the fourth stage, on synthetic conversations made from a persona.

    python train/identity.py                      # the default persona; goes on from runs/tiny-instruct
    python train/identity.py --persona mine.json --pairs 1000 --proportions greetings=1,identity=2,help=1
    python train/identity.py --persona mine.json --data-only            # write the set and leave
    python train/identity.py --resume auto        # the same command after a kill

Without --data the set is made: 2,800 pairs, 30 % greetings, 25 % identity, 25 % help, 20 % small talk, in
data/identity, or data/identity-NAME of another persona. A persona is a JSON or YAML file; its keys are the fields of
hrm_model/training/persona.py.

Flags that are not given have the recipe's values. Exit status as of train/pretrain.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout works without being installed

from train.common import run_command, stage_parser, usable


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    if not usable():
        return 1
    from hrm_model.training.identity import PAIRS, dataset_path, make_identity
    from hrm_model.training.identity_pairs import parse_proportions

    parser = stage_parser("identity", __doc__)
    add = parser.add_argument_group("the identity set").add_argument
    add("--persona", metavar="FILE", help="who the model is, .json or .yaml; default: this project's")
    add("--pairs", type=int, metavar="N", help=f"questions with their answers; default: {PAIRS}")
    add("--proportions", metavar="NAME=X,...", help="shares of greetings, identity, help, small_talk")
    add("--data-only", action="store_true", help="write the set to --out (or where it is looked for) and leave")
    given = vars(parser.parse_args(argv))
    persona, n, shares, data_only = (given.pop(name) for name in ("persona", "pairs", "proportions", "data_only"))
    try:
        if given.get("data") and (persona or n or shares or data_only):
            raise ValueError(
                "--data names a set that is there; leave out --persona, --pairs, --proportions, --data-only"
            )
        options = {"n": n} if n is not None else {}
        options |= {"proportions": parse_proportions(shares)} if shares else {}
        out = (given.get("out") if data_only else None) or dataset_path(persona)
        if data_only:
            print(json.dumps(make_identity(out, persona, overwrite=given.get("overwrite", False), **options)))
            return 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not (persona or options):
        return run_command(given, "identity")
    return run_command(given, "identity", lambda: [make_identity(out, persona, **options)["out"]])


if __name__ == "__main__":
    sys.exit(main())
