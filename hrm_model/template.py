"""The chat template: the one place that says how a conversation becomes text, ids and a loss mask.

    {instruction}\\n\\nHuman: {question}\\n\\nAssistant: {answer}\\n\\nHuman: {question}\\n\\nAssistant: {answer}\\n\\n

This is the form the published model was trained on. Every piece is encoded apart, cut at the role borders:

    "{instruction}"  "\\n\\nHuman:"  " {question}"  "\\n\\nAssistant:"  " {answer}"  "\\n\\nHuman:" ...

GPT-2's BPE cuts there anyway, so on ordinary text the ids are those of the whole text; encoded apart, they cannot
depend on what comes later, so a chat's prompt begins with the ids of the turn before and a cache goes on from there.
" answer" carries its space, as a word does in GPT-2's BPE; a prompt therefore ends in "Assistant:" without one.

How an answer ends: a blank line, and then "Human:" where the conversation goes on or <|endoftext|> where it is over. A
blank line alone ends nothing, since answers have paragraphs. The loss looks at all of that, and STOP together with the
stop token <|endoftext|> ends generation in both cases.

Roles come from the messages, never from their text: who writes "Assistant:" has written text. After a blank line,
where it would look like a role's label, it is even given other ids ("\\n\\n" is one token there, two in a label).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from .text_input import checked_text

INSTRUCTION = (
    "Below is a conversation between a helpful AI assistant and a human. "
    "The assistant is knowledgeable, friendly, and provides detailed, helpful responses."
)
BLANK_LINE = "\n\n"
Message = Mapping[str, str]
"""{"role": "system" | "user" | "assistant", "content": text}. A system message may come first, then user and assistant
take turns."""


class Labels(NamedTuple):
    """What stands before a question and before an answer."""

    human: str = "Human:"
    assistant: str = "Assistant:"

    @classmethod
    def of(cls, human: str, assistant: str) -> Labels:
        """Labels without white space at their ends, so that "Human: " is the same label as "Human:".

        Raises:
            ValueError: one is empty, has a line break or is no UTF-8, or both are the same.
        """
        found = cls(human.strip(), assistant.strip())
        for label, what in zip(found, ("questions", "answers"), strict=True):
            checked_text(label, f"the label of {what}")
            if not label or "\n" in label:
                raise ValueError(f"{label!r} is no label for a role; give one line of text such as 'Human:'")
        if found.human == found.assistant:
            raise ValueError(f"both roles have the label {found.human!r}; give two different ones")
        return found


LABELS = Labels()


def stop_strings(labels: Labels = LABELS) -> tuple[str, ...]:
    """Strings that end an answer in generation, beside the token <|endoftext|>."""
    return (BLANK_LINE + labels.human,)


STOP = stop_strings()


def render(messages: Sequence[Message], instruction: str = INSTRUCTION, labels: Labels = LABELS) -> str:
    """The conversation as text: it ends in a blank line after an answer, and in "Assistant:" after a question.

    Args:
        messages: roles and texts; white space around a text is taken off (indentation of its first line is kept).
        instruction: what stands before the first question; "" is nothing. A system message takes its place.

    Raises:
        ValueError: no messages, a role that is unknown or not in turn, an empty question, content that is not text.
    """
    return "".join(text for text, _ in _pieces(messages, instruction, labels))


def encode(
    messages: Sequence[Message], tokenizer, instruction: str = INSTRUCTION, labels: Labels = LABELS
) -> tuple[list[int], list[bool]]:
    """A conversation that ends with an answer, for training: (ids, is_answer), two lists of the same length.

    The ids are those of render() and a final <|endoftext|>. is_answer marks the ids that a loss looks at as targets:
    the answers and what closes each (see above). Shift both: targets are ids[1:] where is_answer[1:], else ignored.

    Raises:
        ValueError: as render(), or the last message is no answer.
    """
    check_messages(messages)
    if messages[-1]["role"] != "assistant":
        raise ValueError("the conversation ends with a question; training needs the answer to it")
    ids, is_answer = [], []
    for text, answer in _pieces(messages, instruction, labels):
        piece = _encode_piece(text, tokenizer, labels)
        ids += piece
        is_answer += [answer] * len(piece)
    return [*ids, tokenizer.eot], [*is_answer, True]


def prompt(
    messages: Sequence[Message], tokenizer, instruction: str = INSTRUCTION, labels: Labels = LABELS
) -> list[int]:
    """Ids of a conversation that ends with a question, ready to be continued: they end in "Assistant:".

    With the answer and another question after it, the longer prompt begins with the same ids.

    Raises:
        ValueError: as render(), or the last message is no question.
    """
    check_messages(messages)
    if messages[-1]["role"] != "user":
        raise ValueError("the conversation ends with an answer; a prompt ends with the question to answer")
    pieces = _pieces(messages, instruction, labels)
    return [i for text, _ in pieces for i in _encode_piece(text, tokenizer, labels)]


def trim(
    messages: Sequence[Message],
    budget_tokens: int,
    tokenizer,
    instruction: str = INSTRUCTION,
    labels: Labels = LABELS,
) -> list[Message]:
    """The newest turns whose prompt takes at most `budget_tokens`: whole turns (question and answer) go, oldest first.

    A system message and the last question always stay.

    Raises:
        ValueError: as prompt(), or instruction and last question alone take more than the budget.
    """
    check_messages(messages)
    first = 1 if messages[0]["role"] == "system" else 0
    head, last = list(messages[:first]), messages[-1]
    used = len(prompt([*head, last], tokenizer, instruction, labels))
    if used > budget_tokens:
        raise ValueError(
            f"the message is too long: {used:,} tokens with its instruction, and the window holds {budget_tokens:,}; "
            f"shorten one of them by {used - budget_tokens:,} tokens"
        )
    oldest = len(messages) - 1
    while oldest - 2 >= first:
        # From the newest on, so that a long history costs no more than what fits.
        used += sum(
            len(_encode_piece(text, tokenizer, labels))
            for message in messages[oldest - 2 : oldest]
            for text in _turn(message, labels)
        )
        if used > budget_tokens:
            break
        oldest -= 2
    return [*head, *messages[oldest:]]


def check_messages(messages: Sequence[Message]) -> None:
    """Raise ValueError unless these are messages whose roles take turns, questions are not empty and texts are text."""
    if not messages:
        raise ValueError("the conversation has no messages; give at least one question")
    first_turn = 0
    for number, message in enumerate(messages):
        where = f"message {number + 1} of {len(messages)}"
        role, content = (message.get(k) if isinstance(message, Mapping) else None for k in ("role", "content"))
        if not isinstance(content, str):
            raise ValueError(f"{where} is {message!r:.60}; it must have a role and, as its content, a text")
        if role == "system" and number == 0:
            first_turn = 1
            continue
        expected = "assistant" if (number - first_turn) % 2 else "user"
        if role != expected:
            remedy = "a system message may only come first" if role == "system" else "user and assistant take turns"
            raise ValueError(f"{where} has the role {role!r:.40}, expected {expected!r}; {remedy}")
        if role == "user" and not content.strip():
            raise ValueError(f"{where} is an empty question; leave that turn out")
    if len(messages) == first_turn:
        raise ValueError("the conversation is a system message alone; give at least one question")


def answer_of(text: str) -> str:
    """The content of an answer that was generated after a prompt: without the space that the template puts there."""
    return _content(text.removeprefix(" "))


def _pieces(messages: Sequence[Message], instruction: str, labels: Labels) -> Iterator[tuple[str, bool]]:
    """(text, whether a loss looks at it) of each piece that is encoded apart."""
    check_messages(messages)
    if messages[0]["role"] == "system":
        instruction, messages = messages[0]["content"], messages[1:]
    if instruction.strip():
        yield instruction.strip(), False
    for number, message in enumerate(messages):
        label, *content = _turn(message, labels)
        if number == 0 and not instruction.strip():
            label = label.removeprefix(BLANK_LINE)
        # The label of a question also says that the answer before it is over.
        yield label, message["role"] == "user" and number > 0
        for text in content:
            yield text, message["role"] == "assistant"
    if messages[-1]["role"] == "assistant":
        # Two pieces, so that the ids are those of the blank line in "\n\nHuman:", whatever follows.
        yield "\n", True
        yield "\n", True
    else:
        yield BLANK_LINE + labels.assistant, False


def _turn(message: Message, labels: Labels) -> list[str]:
    """The pieces of one message: its label and, if there is any, its text."""
    label = labels.human if message["role"] == "user" else labels.assistant
    content = _content(message["content"])
    return [BLANK_LINE + label, *([" " + content] if content else [])]


def _content(text: str) -> str:
    """Without empty lines before and white space after it."""
    return re.sub(r"\A(?:[^\S\n]*\n)+", "", text).rstrip()


def _encode_piece(text: str, tokenizer, labels: Labels) -> list[int]:
    if text in (BLANK_LINE + labels.human, BLANK_LINE + labels.assistant):
        return tokenizer.encode(text)
    like_a_label = rf"(?<={BLANK_LINE})(?={'|'.join(map(re.escape, labels))})"
    return [i for part in re.split(like_a_label, text) for i in tokenizer.encode(part)]
