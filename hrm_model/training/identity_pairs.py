"""Questions about a model and its answers, composed of phrases and a persona, each pair once.

    a form "[Who|What] are you"  ->  phrasings "Who are you", "What are you"
    a phrasing, as it may be typed ->  "who are you??", "Waht are you?"

Every phrasing belongs to one of FAMILIES families, and a conversation has phrasings of one family alone. So families
can validate that no training conversation shares a phrasing with, in whatever casing or with whatever typos.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from ..keyed import PHRASE_STREAM, keyed_words, scaled
from .identity_phrases import CATEGORIES, Topic
from .persona import Persona

FAMILIES = 20
PROPORTIONS = {"greetings": 0.30, "identity": 0.25, "help": 0.25, "small_talk": 0.20}
"""Share of each category's pairs, as published."""
_ATTEMPTS = 200
_VARIANTS = 25
"""Ways of typing a phrasing that are surely found."""
_QUESTION = re.compile(
    r"(?:who|what|which|where|when|why|how|is|are|am|was|were|do|does|did|can|could|would|will|should|may|shall|have|has|"
    r"had|by whom|in what)\b",
    re.IGNORECASE,
)
_OPENERS = ("Please ", "So, ", "OK, ", "And ", "Well, ", "Now, ", "Then ", "Just ")
_LONG_FORMS = (
    ("I'm", "I am"), ("I'd", "I would"), ("I'll", "I will"), ("don't", "do not"), ("can't", "cannot"),
    ("You're", "You are"), ("you're", "you are"), ("!", "."),
)  # fmt: skip


class Pair(NamedTuple):
    """A question and its answer."""

    category: str
    topic: str
    family: int
    question: str
    answer: str


def identity_pairs(persona: Persona, n: int, seed: int, proportions: Mapping[str, float] = PROPORTIONS) -> list[Pair]:
    """n different pairs, category after category, a function of the arguments alone.

    Raises:
        ValueError: n below 1, or more than there are different pairs of some category; proportions that are none.
    """
    if n < 1:
        raise ValueError(f"--pairs {n} is below 1; 2800 were published")
    pairs: list[Pair] = []
    for number, (category, count) in enumerate(shares(proportions, n).items()):
        topics, seen = CATEGORIES[category], set()
        names = [name for name, topic in topics.items() for _ in range(topic.weight)]
        most = int(
            len(names)
            * _VARIANTS
            * min(
                len(_phrasings(t.questions)) * min(len(_phrasings(a)) for a in (t.answers, t.unknown) if a) / t.weight
                for t in topics.values()
            )
        )
        if count > most:
            raise ValueError(
                f"--pairs {n} asks for {count} pairs of the category {category}, of which {most} different ones can be "
                "made; ask for fewer, or give that category a smaller share with --proportions"
            )
        for i in range(count):
            name = names[i % len(names)]
            for attempt in range(_ATTEMPTS):
                draw = _Draws(seed, ((number << 32) + i) * _ATTEMPTS + attempt)
                pair = _compose(category, name, topics[name], persona, draw, seed)
                key = " ".join(pair.question.split()), pair.answer
                if key not in seen:
                    seen.add(key)
                    pairs.append(pair)
                    break
            else:
                raise AssertionError(f"no new pair about {name!r} in {_ATTEMPTS} attempts: _VARIANTS is too large")
    return pairs


def conversations(pairs: Sequence[Pair], seed: int, fits) -> list[tuple[int, list[Pair]]]:
    """(family, turns) of each conversation: every pair once, three in ten greetings followed by one or two others.

    Args:
        fits: whether these turns may be one conversation.
    """
    found = []
    for family in range(FAMILIES):
        here = [pair for pair in pairs if pair.family == family]
        openers = [p for p in here if CATEGORIES[p.category][p.topic].opens]
        closers = [p for p in here if CATEGORIES[p.category][p.topic].closes]
        middle = [p for p in here if p not in openers and p not in closers]
        middle = _shuffled(middle, seed, 1_000 + family)
        wanted = keyed_words(seed, (family + 1) << 48, max(1, len(openers)), PHRASE_STREAM)[:, 0].tolist()
        for pair, word in zip(openers, wanted, strict=False):
            turns, chance = [pair], scaled(word, 10)
            if chance < 3 and middle and fits([pair, middle[-1]]):
                turns.append(middle.pop())
                if chance == 0 and closers and fits([*turns, closers[-1]]):
                    turns.append(closers.pop())
            found.append((family, turns))
        found += [(family, [pair]) for pair in [*middle, *closers]]
    return found


def is_right(pair: Pair, answer: str, persona: Persona) -> bool:
    """Whether an answer, however worded, says what one about this topic has to: a name, a greeting, what it can do."""
    topic = CATEGORIES[pair.category][pair.topic]
    says = topic.says
    if topic.needs and not getattr(persona, topic.needs):
        says = ("{name}", "{kind}", "know")
    wanted = [_filled(text, persona, None).lower() for text in says]
    return any(text in answer.lower() for text in wanted)


def parse_proportions(text: str) -> dict[str, float]:
    """{"greetings": 0.3, ..} of "greetings=0.3,identity=0.25"; what is not named has none. Raises ValueError."""
    found = {}
    for part in text.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        try:
            found[name] = float(value)
        except ValueError:
            raise ValueError(
                f"--proportions {text!r} has {part.strip()!r}, expected NAME=SHARE, such as greetings=0.3,identity=0.7"
            ) from None
    shares(found, 1)
    return found


def shares(proportions: Mapping[str, float], n: int) -> dict[str, int]:
    """How many of n pairs each category has, by largest remainder. Raises ValueError for proportions that are none."""
    unknown = [name for name in proportions if name not in CATEGORIES]
    if unknown:
        raise ValueError(f"--proportions names {', '.join(unknown)}; there are {', '.join(CATEGORIES)}")
    for name, value in proportions.items():
        if not 0 <= value < float("inf"):
            raise ValueError(f"--proportions {name}={value} is not a finite number of at least 0")
    total = sum(proportions.values())
    if not total:
        raise ValueError("--proportions are all 0; give at least one category a share")
    exact = {name: n * proportions.get(name, 0.0) / total for name in CATEGORIES}
    counts = {name: int(value + 1e-9) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: counts[name] - exact[name])
    for name in by_remainder[: n - sum(counts.values())]:
        counts[name] += 1
    return counts


class _Draws:
    """Choices that are a function of (seed, number): 16 words, taken one after the other."""

    def __init__(self, seed: int, number: int):
        self._words = iter(keyed_words(seed, 4 * number, 4, PHRASE_STREAM).reshape(-1).tolist())

    def below(self, n: int) -> int:
        return scaled(next(self._words), n)

    def of(self, values: Sequence):
        return values[self.below(len(values))]


def _compose(category: str, name: str, topic: Topic, persona: Persona, draw: _Draws, seed: int) -> Pair:
    phrases = _phrasings(topic.questions)
    number = draw.below(len(phrases))
    place = _places(len(phrases), seed, name)[number]
    question = _typed(_filled(phrases[number], persona, None), persona.name, category == "greetings", draw)
    known = not topic.needs or getattr(persona, topic.needs)
    answers = _phrasings(topic.answers if known else topic.unknown)
    return Pair(category, name, int(place) % FAMILIES, question, _filled(draw.of(answers), persona, draw))


@cache
def _phrasings(forms: tuple[str, ...]) -> list[str]:
    """Every way to choose among the alternatives of the forms, each once."""
    found = {}
    for form in forms:
        parts = [part.split("|") for part in re.split(r"[\[\]]", form)]
        for chosen in itertools.product(*parts):
            found.setdefault(" ".join("".join(chosen).split()))
    return list(found)


@cache
def _places(n: int, seed: int, name: str) -> np.ndarray:
    """A permutation of 0..n-1; a phrasing's family is its place's remainder."""
    offset = int.from_bytes(name.encode()[:5].ljust(5), "big") << 20
    return np.argsort(np.argsort(keyed_words(seed, (1 << 62) + offset, n, PHRASE_STREAM)[:, 0], kind="stable"))


def _shuffled(items: list, seed: int, number: int) -> list:
    words = keyed_words(seed, (1 << 61) + (number << 24), max(1, len(items)), PHRASE_STREAM)[:, 0]
    return [items[i] for i in np.argsort(words[: len(items)], kind="stable").tolist()]


def _filled(form: str, persona: Persona, draw: _Draws | None) -> str:
    """The form with the persona's words in its places."""
    if persona.tone == "formal":
        for short, long in _LONG_FORMS:
            form = form.replace(short, long)
    values = {name: getattr(persona, name).strip() for name in ("name", "kind", "maker", "description", "cutoff")}
    if values["description"] and values["description"][-1] not in ".!?":
        values["description"] += "."
    values["Maker"] = values["maker"][:1].upper() + values["maker"][1:]
    abilities, limits = ([text.strip().rstrip(".") for text in part] for part in (persona.abilities, persona.limits))
    values |= {"abilities": _listed(abilities, "and"), "limits": _listed(limits, "or")}
    if "{ability}" in form or "{limit}" in form:
        values |= {"ability": draw.of(abilities), "limit": draw.of(limits)}
    return form.format_map(values)


def _listed(texts: list[str], word: str) -> str:
    """One or all but too many: an answer stays short."""
    texts = texts[:3]
    if len(texts) < 3:
        return f" {word} ".join(texts)
    return f"{texts[0]}, {texts[1]}, {word} {texts[2]}"


def _typed(text: str, name: str, greeting: bool, draw: _Draws) -> str:
    """A phrasing as somebody may type it: casing, punctuation, openers, typos."""
    asks = bool(_QUESTION.match(text)) or "how are you" in text.lower()
    end = ("?" if asks else "!" if greeting else ".", "", "??" if asks else "!!", "...")
    if not greeting and draw.below(16) == 0:
        text = draw.of(_OPENERS) + (text if text.startswith(("I ", "I'", name)) else text[0].lower() + text[1:])
    if draw.below(20) == 0:
        text = _with_typo(text, name, draw)
    if "'" in text and draw.below(4) == 0:
        text = text.replace("'", "")
    text += end[(0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 3)[draw.below(12)]]
    casing = draw.below(40)
    return text.lower() if casing < 8 else text.upper() if casing == 8 else text


def _with_typo(text: str, name: str, draw: _Draws) -> str:
    words = text.split(" ")
    long = [i for i, word in enumerate(words) if len(word) > 3 and word.isalpha() and word != name]
    if not long:
        return text
    i = draw.of(long)
    word = words[i]
    at = 1 + draw.below(len(word) - 2)
    kind = draw.below(3)
    left_out, doubled = word[:at] + word[at + 1 :], word[:at] + word[at] + word[at:]
    words[i] = (left_out, doubled, word[:at] + word[at + 1] + word[at] + word[at + 2 :])[kind]
    return " ".join(words)
