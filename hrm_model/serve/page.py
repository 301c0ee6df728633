"""The page at /: a chat that shows each token in the colour of the steps it took. Nothing else is fetched."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from pathlib import Path
from typing import NamedTuple

from ..depth_page import colour_rules
from .requests import Limits

ASSETS = Path(__file__).parents[1] / "assets"
TOKENS = 100
"""New tokens of an answer, where the person says nothing else and the server allows it."""


class Page(NamedTuple):
    """A document and what must come with it."""

    document: str
    policy: str
    """Content-Security-Policy: this style, this script, requests to this server, and nothing else at all."""


def page(limits: Limits) -> Page:
    """The page of a server with these limits: its model's name, its steps' colours, its longest answers."""
    style, script, document = ((ASSETS / f"serve.{kind}").read_text(encoding="utf-8") for kind in ("css", "js", "html"))
    # colours are classes: a style of its own the policy would not allow a script
    style += colour_rules(limits.max_steps)
    parts = {"STYLE": style, "SCRIPT": script, "MODEL": html.escape(limits.model)}
    parts |= {"STEPS": str(limits.max_steps), "MOST": str(limits.most)}
    parts["TOKENS"] = str(min(TOKENS, limits.most, limits.window // 2))  # a question has to fit too
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return Page(re.sub("@([A-Z]+)@", lambda found: parts[found[1]], document), policy)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
