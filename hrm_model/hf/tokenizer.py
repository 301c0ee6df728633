"""The tokenizer as a tokenizer.json of Hugging Face's tokenizers, with the ids of hrm_model/tokenizer.py.

tiktoken merges the pair whose joined bytes have the lowest rank. Hugging Face lists merges in order instead. Both are
the same if the list has, for each token of rank r, the pair that merging its bytes with ranks below r alone ends with.

As in Tokenizer.encode, "<|endoftext|>" within a text is text like any other (split_special_tokens), so that no user can
end a document by writing it.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ..template import BLANK_LINE, INSTRUCTION, LABELS
from ..tokenizer import END_OF_TEXT, N_RANKS, RANKS_FILE, read_ranks


def byte_characters() -> dict[int, str]:
    """The printable character that stands for each byte in GPT-2's vocabulary (Radford et al. 2019, its encoder.py):
    itself where it is printable Latin-1 and no space, else the next character from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merges that give these ranks, in their order."""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            parts = [token[i : i + 1] for i in range(len(token))]
            while len(parts) > 2:
                joined = [ranks.get(a + b, rank) for a, b in pairwise(parts)]
                best = min(range(len(joined)), key=joined.__getitem__)
                if joined[best] >= rank:
                    raise ValueError(f"token {token!r} of rank {rank} cannot be made of tokens before it")
                parts[best : best + 2] = [parts[best] + parts[best + 1]]
            merges.append((parts[0], parts[1]))
    return merges


@cache
def _backend() -> str:
    """tokenizer.json."""
    ranks, characters = read_ranks(RANKS_FILE), byte_characters()
    written = {token: "".join(characters[byte] for byte in token) for token in ranks}
    vocabulary = {written[token]: rank for token, rank in ranks.items()}
    merges = [(written[a], written[b]) for a, b in merges_of(ranks)]
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=True)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False, special=True)])
    assert made.token_to_id(END_OF_TEXT) == N_RANKS
    return made.to_str()


def chat_template() -> str:
    """hrm_model/template.py's form in Jinja, with its checks. A system message takes the instruction's place."""
    return _TEMPLATE.replace("INSTRUCTION", INSTRUCTION).replace("HUMAN", LABELS.human).replace(
        "ASSISTANT", LABELS.assistant
    ).replace("BLANK_LINE", BLANK_LINE.replace("\n", "\\n"))  # fmt: skip


def make_tokenizer(block_size: int | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer, to be used or saved (save_pretrained): ids of Tokenizer.encode, padding on the left, as
    generation wants it, with <|endoftext|>.

    Args:
        block_size: longest text of the model, in tokens; longer ones are warned of.
    """
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend()),
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        padding_side="left",
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        chat_template=chat_template(),
        model_input_names=["input_ids", "attention_mask"],
        **({} if block_size is None else {"model_max_length": block_size}),
    )


# Every tag is trimmed, so that nothing but what is printed comes out. Empty lines
# before a text and white space after it go, the indentation of its first line stays, as template._content has it.
_TEMPLATE = r"""
{%- macro content(text) -%}
  {%- set ns = namespace(lines=[], begun=false) -%}
  {%- for line in text.split('\n') -%}
    {%- if ns.begun or line.strip() or loop.last -%}
      {%- set ns.begun = true -%}
      {%- set ns.lines = ns.lines + [line] -%}
    {%- endif -%}
  {%- endfor -%}
  {%- set body = ns.lines | join('\n') -%}
  {{- ' ' + body.rstrip() if body.strip() else '' -}}
{%- endmacro -%}
{%- if not messages -%}
  {{- raise_exception('the conversation has no messages; give at least one question') -}}
{%- endif -%}
{%- set instruction = 'INSTRUCTION' -%}
{%- set turns = messages -%}
{%- if messages[0]['role'] == 'system' -%}
  {%- set instruction = messages[0]['content'] -%}
  {%- set turns = messages[1:] -%}
{%- endif -%}
{%- if not turns -%}
  {{- raise_exception('the conversation is a system message alone; give at least one question') -}}
{%- endif -%}
{{- instruction.strip() -}}
{%- for message in turns -%}
  {%- set expected = 'user' if loop.index0 % 2 == 0 else 'assistant' -%}
  {%- if message['role'] != expected -%}
    {%- set remedy = '; user and assistant take turns after at most one system message' -%}
    {{- raise_exception('message has the role ' + message['role'] + ', expected ' + expected + remedy) -}}
  {%- endif -%}
  {%- if expected == 'user' and not message['content'].strip() -%}
    {{- raise_exception('a question is empty; leave that turn out') -}}
  {%- endif -%}
  {{- '' if loop.first and not instruction.strip() else 'BLANK_LINE' -}}
  {{- 'HUMAN' if expected == 'user' else 'ASSISTANT' -}}
  {{- content(message['content']) -}}
{%- endfor -%}
{%- if turns[-1]['role'] == 'user' -%}
  {{- 'BLANK_LINEASSISTANT' if add_generation_prompt else '' -}}
{%- else -%}
  {{- 'BLANK_LINE' -}}
{%- endif -%}
"""
