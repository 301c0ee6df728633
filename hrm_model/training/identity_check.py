"""How often a model says who it is: validation questions of an identity set, asked without sampling."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import torch

from .. import template
from ..generate import generate
from ..model import HRMForCausalLM
from ..tokenizer import get_tokenizer
from .identity_pairs import Pair, identity_pairs, is_right
from .persona import Persona
from .shards import open_dataset


def validation_pairs(path: str | Path) -> tuple[Persona, list[Pair]]:
    """The persona of an identity set, and the pairs whose phrasings no training conversation has.

    Raises:
        ValueError: no identity set, or one that this version would make otherwise.
    """
    dataset = open_dataset(path)
    about = dataset.manifest["source"].get("parts", [{}])[0]
    if "persona" not in about:
        raise ValueError(f"{path} is no identity set; make one with train/identity.py --data-only")
    persona = Persona(**about["persona"])
    tokenizer, rows = get_tokenizer(), dataset.conversations("val")
    texts = [tokenizer.decode(rows.row(i)[0].tolist()) for i in range(len(rows))]
    pairs = identity_pairs(persona, about["pairs"], about["seed"], about["proportions"])
    families = {p.family for p in pairs if any(f"Human: {p.question}\n\nAssistant: {p.answer}\n" in t for t in texts)}
    found = [pair for pair in pairs if pair.family in families]
    if len(families) >= len({pair.family for pair in pairs}) or not found:
        raise ValueError(f"{path} was made by another version; make it again with --data-only --overwrite")
    return persona, found


def ask(model: HRMForCausalLM, question: str, max_new_tokens: int = 64) -> str:
    """The model's likeliest answer to a question that stands alone."""
    tokenizer = get_tokenizer()
    ids = template.prompt([{"role": "user", "content": question}], tokenizer)
    prompt = torch.tensor([ids], device=model.device)
    out = generate(model, prompt, max_new_tokens, temperature=0, stop=template.STOP)[0].tolist()[len(ids) :]
    text = tokenizer.decode(i for i in out if i != tokenizer.eot)
    return template.answer_of(text.partition(template.STOP[0])[0])


def right_answers(
    model: HRMForCausalLM, persona: Persona, pairs: list[Pair], each: int = 10
) -> dict[str, tuple[int, int]]:
    """(right, asked) of each category: `each` of its questions, evenly spaced, answered and checked."""
    by_category = defaultdict(list)
    for pair in pairs:
        by_category[pair.category].append(pair)
    found = {}
    for category, here in by_category.items():
        chosen = [here[i * len(here) // each] for i in range(each)] if len(here) > each else here
        right = sum(is_right(pair, ask(model, pair.question), persona) for pair in chosen)
        found[category] = right, len(chosen)
    return found
