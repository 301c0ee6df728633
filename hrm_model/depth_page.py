"""A page that shows where a model thought long: each token in the colour of the steps taken to predict it.

One HTML file without any other: nothing is fetched, so it can be mailed, and opened where there is no network.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math

import numpy as np

from .depth_cells import Cell, Token, cells, colours, next_cell, steps, summary, visible
from .prefixes import Reading
from .tokenizer import Tokenizer


def page(reading: Reading, tokenizer: Tokenizer, *, title: str, facts: str) -> str:
    """The page, a complete HTML document for UTF-8.

    Its text is coloured by the steps taken to predict each token; the token after the text is its last cell. Where the
    pointer or the keyboard goes, a panel shows the token's surprisal and the halting margin after each step. Below
    are the histogram of steps and the mean margin with its 10-90 % band.

    Args:
        reading: what to show. tokenizer: which its ids are of.
        title: heading. facts: one line on the model.
    """
    shown = [cells(window, tokenizer) for window in reading.windows]
    after, ranked = next_cell(reading, tokenizer)
    data = [[_data(token) for token in cell.tokens] for row in shown for cell in row]
    data.append([_data(after) | {"next": [[text, token_id, _short(p)] for text, token_id, p in ranked]}])
    values = {"S": reading.max_steps, "bias": _finite(reading.halt_bias), "cells": data}
    # "<" could end the script element; in JSON it can be spelled otherwise. Non-ASCII is escaped by json itself.
    embedded = json.dumps(values, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    escaped_title = _escape(title)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{escaped_title}</title>
<style>{_STYLE}{colour_rules(reading.max_steps)}</style>
</head>
<body>
<header>
<h1>{escaped_title}</h1>
<p class="facts">{_escape(facts)}</p>
{_tiles(reading)}
{_legend(reading)}
</header>
<main>
<section class="reading" aria-label="the text">
<div id="text" dir="auto">{_text(shown, after, ranked)}</div>
<aside id="panel" aria-live="polite"><p class="hint">Point at a token, tap it, or reach the text with Tab and move with
the arrow keys: its surprisal and the halting margin after each step.</p></aside>
</section>
<section class="figures" id="figures">
{_histogram(reading)}
{_margin_figure(reading)}
</section>
</main>
<script type="application/json" id="data">{embedded}</script>
<script>{_SCRIPT}</script>
</body>
</html>
"""


def _escape(text: str) -> str:
    """For HTML's text and its quoted attributes; what UTF-8 cannot carry (lone surrogates) becomes "?"."""
    return html.escape(text.encode("utf-8", "replace").decode("utf-8"))


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _finite(value: float) -> float | str:
    """JSON has no infinity."""
    return _short(value) if math.isfinite(value) else str(value)


def _data(token: Token) -> dict:
    given = {"id": token.id, "text": token.text}
    if token.depth == 0:
        return given
    nats = None if token.nats is None else _finite(token.nats)
    known = {"depth": token.depth, "halted": token.halted, "nats": nats}
    return given | known | {"margins": [_finite(m) for m in token.margins]}


def _hint(cell: Cell) -> str:
    """What a browser shows without scripts."""
    first, *rest = cell.tokens
    if rest:
        depths = ", ".join("given" if t.depth == 0 else str(t.depth) for t in cell.tokens)
        return f"{len(cell.tokens)} tokens, one character or more: {depths} steps"
    if first.depth == 0:
        return f"{first.text}: given"
    return f"{first.text}: {steps(first.depth)}, {first.nats:.2f} nats"


def _text(shown: list[list[Cell]], after: Token, ranked: list[tuple[str, int, float]]) -> str:
    parts, seen = [], 0
    for number, row in enumerate(shown, 1):
        n_tokens = sum(len(cell.tokens) for cell in row)
        if len(shown) > 1:
            said = f"window {number} of {len(shown)}: tokens {seen + 1:,} to {seen + n_tokens:,}, read afresh"
            parts.append(f'<div class="seam">{said}</div>')
        seen += n_tokens
        for cell in row:
            kind = f"d{cell.depth}" if cell.depth else "given"
            several = " several" if len(cell.tokens) > 1 else ""
            number_shown = cell.depth or ""
            parts.append(
                f'<span class="c {kind}{several}" data-d="{number_shown}" title="{_escape(_hint(cell))}">'
                f"{_characters(cell.text)}</span>"
            )
    likely = ", ".join(f"{text} {p:.1%}" for text, _, p in ranked)
    hint = _escape(f"next: {steps(after.depth)}; likeliest: {likely}")
    parts.append(f'<span class="c next d{after.depth}" data-d="{after.depth}" title="{hint}">next</span>')
    return "".join(parts)


def _characters(text: str) -> str:
    """The text itself, so that copying it gives it back; marks for white space come from the style sheet."""
    kinds = {" ": "sp", "\t": "tab", "\n": "nl"}
    parts = []
    for character in text:
        if character in kinds:
            parts.append(f'<i class="{kinds[character]}">{character}</i>')
        elif (name := visible(character)) != character:
            parts.append(f'<b class="name">{_escape(name)}</b>')
        else:
            parts.append(_escape(character))
    return "".join(parts)


def colour_rules(max_steps: int) -> str:
    """Style rules .d1, .d2, ..: ground and text of a token that took so many steps, on a light and on a dark page."""

    def variables(dark: bool) -> str:
        pairs = enumerate(colours(max_steps, dark), 1)
        return "".join(f"--d{n}:{ground};--t{n}:{text};" for n, (ground, text) in pairs)

    rules = "".join(
        f".d{n}{{background:var(--d{n});color:var(--t{n});fill:var(--d{n})}}" for n in range(1, max_steps + 1)
    )
    return f":root{{{variables(False)}}}@media(prefers-color-scheme:dark){{:root{{{variables(True)}}}}}{rules}"


def _tiles(reading: Reading) -> str:
    pairs = "".join(f"<div><dt>{_escape(name)}</dt><dd>{_escape(value)}</dd></div>" for name, value in summary(reading))
    return f'<dl class="tiles">{pairs}</dl>'


def _legend(reading: Reading) -> str:
    used = set(reading.depths().tolist())
    swatches = "".join(
        f'<button type="button" class="d{n}" data-only="{n}" aria-pressed="false"'
        f' aria-label="show only {steps(n)}"{"" if n in used else " disabled"}>{n}</button>'
        for n in range(1, reading.max_steps + 1)
    )
    return (
        '<div class="legend"><span>HRM steps taken to predict the token:</span>'
        f'<span class="swatches">{swatches}</span><span class="c given">given</span>'
        '<label><input type="checkbox" id="numbers"> numbers</label></div>'
    )


def _histogram(reading: Reading) -> str:
    counts = reading.histogram()
    # of very many possible depths, only those in use, so that the bars stay on one screen
    rows = [n for n in range(1, len(counts) + 1) if len(counts) <= 20 or counts[n - 1]]
    most, bars = counts.max(), []
    for y, n in enumerate(rows):
        count = counts[n - 1]
        width, top = 220 * count / most, 18 * y
        said = f"{count:,} ({count / counts.sum():.1%})" if count else "0"
        bars.append(
            f'<text x="26" y="{top + 13}" text-anchor="end">{n}</text>'
            f'<rect class="d{n}" x="34" y="{top + 1}" width="{width:.1f}" height="16" rx="2"/>'
            f'<text x="{40 + width:.1f}" y="{top + 13}">{said}</text>'
        )
    label = "; ".join(f"{steps(n)}: {counts[n - 1]}" for n in rows)
    return (
        "<figure><figcaption>How many tokens took how many steps</figcaption>"
        f'<svg viewBox="0 0 360 {18 * len(rows)}" role="img" aria-label="{label}">{"".join(bars)}</svg></figure>'
    )


def _margin_figure(reading: Reading) -> str:
    caption = "Halting margin after each step: mean over the predictions, and where the middle 80 % lie"
    band = reading.margin_band()
    if band is None:
        return f"<figure><figcaption>{caption}</figcaption><p>The halt bias is infinite, so there is none.</p></figure>"
    left, right, top, bottom = 52, 350, 12, 188
    low, high = min(0.0, band.min()), max(0.0, band.max())
    spread = (high - low) or 1.0

    def x(step: int) -> float:
        return left + (right - left) * (step - 0.5) / reading.max_steps

    def y(value: float) -> float:
        return bottom - (bottom - top) * (value - low) / spread

    def line(values: np.ndarray) -> str:
        return " ".join(f"{x(n):.1f},{y(v):.1f}" for n, v in enumerate(values, 1))

    mean, lower, upper = band
    edge = line(upper) + " " + " ".join(reversed(line(lower).split()))
    every = math.ceil(reading.max_steps / 16)
    ticks = "".join(
        f'<text x="{x(n):.1f}" y="{bottom + 16}" text-anchor="middle">{n}</text>'
        for n in range(1, reading.max_steps + 1, every)
    )
    levels = [v for v in (low, high) if v and abs(y(v) - y(0)) > 12]
    levels = "".join(f'<text x="{left - 6}" y="{y(v) + 4:.1f}" text-anchor="end">{v:+.2g}</text>' for v in levels)
    dots = "".join(f'<circle cx="{x(n):.1f}" cy="{y(v):.1f}" r="2.5"/>' for n, v in enumerate(mean, 1))
    label = ", ".join(f"step {n}: {v:.3g}" for n, v in enumerate(mean, 1))
    return f"""<figure><figcaption>{caption}</figcaption>
<svg class="margins" viewBox="0 0 360 222" role="img" aria-label="mean margin: {label}">
<polygon class="band" points="{edge}"/><line class="zero" x1="{left}" x2="{right}" y1="{y(0):.1f}" y2="{y(0):.1f}"/>
<text x="{left - 6}" y="{y(0) + 4:.1f}" text-anchor="end">0</text>{levels}
<polyline class="mean" points="{line(mean)}"/><g class="dots">{dots}</g>{ticks}
<text x="{(left + right) / 2}" y="{bottom + 32}" text-anchor="middle">step</text></svg>
<p>Above zero the head says halt. Steps after a stop count too: what it would say had the model gone on.</p></figure>"""


_STYLE = """
:root{--page:#fdfdfb;--ink:#1b1d21;--soft:#5c626b;--line:#d5d8dd;--card:#f3f4f2;--accent:#0b6e99}
@media(prefers-color-scheme:dark){:root{--page:#121417;--ink:#e6e7e9;--soft:#a0a6af;--line:#3a3f47;--card:#1c2025;
--accent:#6cc4ee}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1.2rem 1rem 3rem;max-width:75rem;background:var(--page);color:var(--ink);
font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.4rem;margin:0;overflow-wrap:anywhere}
.facts{margin:.2rem 0 .8rem;color:var(--soft);overflow-wrap:anywhere}
.tiles{display:flex;flex-wrap:wrap;gap:.5rem;margin:0 0 .8rem}
.tiles div{background:var(--card);border-radius:.4rem;padding:.35rem .8rem}
dt{font-size:.75rem;color:var(--soft)}dd{margin:0;font-weight:600}
.legend{display:flex;flex-wrap:wrap;align-items:center;gap:.3rem .7rem;font-size:.85rem;margin-bottom:.8rem}
.swatches{display:flex;flex-wrap:wrap;row-gap:2px}
.swatches button{min-width:1.9rem;height:1.9rem;border:0;padding:0 .3rem;font:inherit;cursor:pointer}
.swatches button:disabled{cursor:default}
.swatches button[aria-pressed=true]{outline:3px solid var(--ink);outline-offset:-2px;z-index:1}
.reading{display:grid;grid-template-columns:minmax(0,1fr) 19rem;gap:1.2rem;align-items:start}
#text{white-space:pre-wrap;overflow-wrap:anywhere;
font:.95rem/1.95 ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",monospace}
.c{padding:.16em 0;border-radius:.2em;cursor:default;box-decoration-break:clone;-webkit-box-decoration-break:clone;
box-shadow:inset 1px 0 var(--page);outline-offset:1px}
.given{color:var(--soft);background:repeating-linear-gradient(135deg,var(--line) 0 2px,transparent 2px 6px)}
.legend .c,.next{padding:.16em .5em}
.next{unicode-bidi:isolate;margin-inline-start:.5em;font-style:italic;outline:1px dashed var(--soft)}
.several{text-decoration:underline dotted;text-underline-offset:.25em}
.c:focus{outline:3px solid var(--accent)}.c.picked{outline:2px solid var(--accent)}
.dim .c:not(.lit){opacity:.18}
i{font-style:normal;position:relative}
.sp::before,.tab::before{position:absolute;inset:0;text-align:center;line-height:1.2;opacity:.4;pointer-events:none}
.sp::before{content:"\\00b7"}.tab::before{content:"\\2192"}
.nl::before{content:"\\21b5";opacity:.45}
.name{font:.75em sans-serif;opacity:.8}
.numbers .c[data-d]::before{content:attr(data-d);font:.6em sans-serif;vertical-align:super;opacity:.85;padding:0 .15em}
.seam{white-space:normal;border-top:2px dashed var(--soft);color:var(--soft);font:.75rem/1.6 system-ui,sans-serif;
margin:.6rem 0 .2rem}
.seam:first-child{border-top:0;margin-top:0}
#panel{position:sticky;top:.6rem;background:var(--card);border:1px solid var(--line);border-radius:.5rem;
padding:.6rem .8rem;font-size:.9rem;min-height:17rem;max-height:calc(100vh - 1.2rem);overflow:auto}
#panel p{margin:.15rem 0}.hint,figure p{color:var(--soft);font-size:.85rem}
#panel .token{font:600 1rem ui-monospace,Menlo,Consolas,monospace;overflow-wrap:anywhere;white-space:pre-wrap}
#panel .badge{display:inline-block;padding:0 .5em;border-radius:.25em;font-weight:600}
#panel section+section{border-top:1px solid var(--line);margin-top:.5rem;padding-top:.4rem}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,22rem),1fr));gap:1.2rem;
align-items:start;margin-top:1.4rem}
figure{margin:0;background:var(--card);border-radius:.5rem;padding:.7rem .9rem}
figcaption{font-weight:600;font-size:.9rem;margin-bottom:.5rem}
svg{width:100%;height:auto;display:block;max-width:27rem;margin:auto}
svg text{font:12px system-ui,sans-serif;fill:var(--ink)}
.band{fill:var(--accent);opacity:.22}.mean{fill:none;stroke:var(--accent);stroke-width:2}.dots{fill:var(--accent)}
.zero{stroke:var(--soft);stroke-dasharray:4 3}
.unrun{fill:none;stroke:var(--soft);stroke-width:1.5;stroke-dasharray:2 3}
.stop{fill:var(--page);stroke:var(--accent);stroke-width:2.5}
@media(max-width:52rem){.reading{display:block}html{scroll-padding-bottom:42vh}
#panel{top:auto;bottom:0;min-height:0;max-height:40vh;margin:.6rem -1rem 0;border-radius:.6rem .6rem 0 0;
border-bottom:0;box-shadow:0 -4px 14px #0003}#panel section{display:flex;gap:.8rem}
#panel section>div{flex:1 1 50%;min-width:0}}
@media print{#panel{display:none}.reading{display:block}
.c,rect{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""

_SCRIPT = """
"use strict";
const {S, bias, cells} = JSON.parse(document.getElementById("data").textContent);
const text = document.getElementById("text"), panel = document.getElementById("panel");
const spans = [...text.querySelectorAll(".c")];
const stepped = n => n + (n === 1 ? " step" : " steps");

function el(name, className, content) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (content !== undefined) made.textContent = content;
  return made;
}

function svg(name, attributes, parent, content) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (content !== undefined) made.textContent = content;
  parent.append(made);
  return made;
}

// The margin after each step: drawn through as far as the model ran, dotted where it had stopped.
function marginLine(token) {
  const {margins, depth, halted} = token;
  const picture = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const low = Math.min(0, ...margins), high = Math.max(0, ...margins), spread = high - low || 1;
  const x = step => 40 + 220 * (S === 1 ? 0.5 : (step - 1) / (S - 1)), y = m => 82 - 72 * (m - low) / spread;
  const points = (from, to) => margins.slice(from - 1, to).map((m, i) => x(from + i) + "," + y(m)).join(" ");
  picture.setAttribute("viewBox", "0 0 270 104");
  picture.setAttribute("role", "img");
  picture.setAttribute("aria-label", "halting margin after each step: " + margins.join(", "));
  svg("line", {class: "zero", x1: 34, x2: 266, y1: y(0), y2: y(0)}, picture);
  svg("text", {x: 30, y: y(0) + 4, "text-anchor": "end"}, picture, "0");
  for (const m of [low, high])
    if (Math.abs(y(m) - y(0)) > 12)
      svg("text", {x: 30, y: y(m) + 4, "text-anchor": "end"}, picture, Number(m.toPrecision(2)));
  if (depth < S) svg("polyline", {class: "unrun", points: points(depth, S)}, picture);
  svg("polyline", {class: "mean", points: points(1, depth)}, picture);
  margins.slice(0, depth - 1).forEach((m, i) => svg("circle", {class: "dots", cx: x(i + 1), cy: y(m), r: 2}, picture));
  svg("circle", {class: "stop", cx: x(depth), cy: y(margins[depth - 1]), r: 4.5}, picture);
  for (const step of new Set([1, depth, S]))
    if (step === depth || Math.abs(x(step) - x(depth)) > 40)
      svg("text", {x: x(step), y: 100, "text-anchor": "middle"}, picture,
          step !== depth ? step : halted ? "halt " + step : "limit " + step);
  return picture;
}

function describe(token) {
  const part = el("section"), words = el("div"), figure = el("div");
  part.append(words, figure);
  words.append(el("p", "token", token.next ? "next token" : token.text));
  if (token.depth === undefined) {
    words.append(el("p", "", "id " + token.id), el("p", "hint", "Given: the first token of what was read."));
    return part;
  }
  const line = el("p");
  line.append(el("span", "badge d" + token.depth, stepped(token.depth)));
  line.append(token.halted ? " then halt" : S === 1 ? " of 1" : " up to the limit");
  words.append(line);
  if (token.next) {
    for (const [likely, id, p] of token.next)
      words.append(el("p", "", (100 * p).toFixed(1) + " %  " + likely + "  (id " + id + ")"));
  } else {
    words.append(el("p", "", "surprisal " + Number(token.nats).toFixed(2) + " nats"), el("p", "", "id " + token.id));
  }
  if (typeof bias === "number") figure.append(el("p", "hint", "halting margin after each step"), marginLine(token));
  else figure.append(el("p", "hint", "The halt bias is " + bias + ": no margin to draw."));
  return part;
}

let picked = -1;
function show(i) {
  panel.replaceChildren(...cells[i].map(describe));
}
function pick(i) {
  if (i < 0 || i >= spans.length) return;
  if (picked >= 0) {
    spans[picked].classList.remove("picked");
    spans[picked].setAttribute("aria-selected", "false");
    spans[picked].tabIndex = -1;
  }
  picked = i;
  spans[i].classList.add("picked");
  spans[i].setAttribute("aria-selected", "true");
  spans[i].tabIndex = 0;
  show(i);
}

// The nearest token on the line above or below.
function vertical(i, direction) {
  const here = spans[i].getClientRects()[0], middle = (here.left + here.right) / 2;
  let best = -1, line = null, distance = Infinity;
  for (let j = i + direction; j >= 0 && j < spans.length; j += direction) {
    const box = spans[j].getClientRects()[0];
    if (!box || Math.abs(box.top - here.top) < 4) continue;
    if (line === null) line = box.top;
    if (Math.abs(box.top - line) >= 4) break;
    const away = Math.abs((box.left + box.right) / 2 - middle);
    if (away < distance) { distance = away; best = j; }
  }
  return best;
}

text.setAttribute("role", "listbox");
text.setAttribute("aria-label", "tokens");
text.setAttribute("aria-orientation", "horizontal");
spans.forEach((span, i) => {
  span.setAttribute("role", "option");
  span.setAttribute("aria-selected", "false");
  span.setAttribute("aria-label", span.title);
  span.removeAttribute("title");  // the panel says more
  span.tabIndex = i === 0 ? 0 : -1;
  span.addEventListener("focus", () => pick(i));
  span.addEventListener("click", () => {
    span.focus({preventScroll: true});
    pick(i);
    span.scrollIntoView({block: "nearest"});  // on a phone the panel may have grown over it
  });
  span.addEventListener("pointerenter", event => { if (event.pointerType === "mouse") show(i); });
});
text.addEventListener("pointerleave", event => { if (event.pointerType === "mouse" && picked >= 0) show(picked); });
text.addEventListener("keydown", event => {
  const i = spans.indexOf(event.target);
  if (i < 0 || event.ctrlKey || event.altKey || event.metaKey) return;
  const rightToLeft = getComputedStyle(text).direction === "rtl" ? -1 : 1;
  const moves = {
    ArrowRight: () => i + rightToLeft, ArrowLeft: () => i - rightToLeft,
    ArrowDown: () => vertical(i, 1), ArrowUp: () => vertical(i, -1), Home: () => 0, End: () => spans.length - 1,
  };
  if (!(event.key in moves)) return;
  event.preventDefault();
  const to = moves[event.key]();
  if (to >= 0 && to < spans.length) spans[to].focus();
});

document.getElementById("numbers").addEventListener("change", event => {
  text.classList.toggle("numbers", event.target.checked);
});
const only = [...document.querySelectorAll("[data-only]")];
for (const button of only) button.addEventListener("click", () => {
  const on = button.getAttribute("aria-pressed") === "false";
  for (const other of only) other.setAttribute("aria-pressed", String(on && other === button));
  text.classList.toggle("dim", on);
  cells.forEach((cell, i) =>
    spans[i].classList.toggle("lit", cell.some(token => token.depth === Number(button.dataset.only))));
});
"""
