"""hrm chat: talk to a model.

    hrm chat runs/tiny                                  # /help lists what can be typed
    hrm chat runs/tiny --prompt "What is a prime?"      # one answer
    hrm chat runs/tiny --prompts-file questions.txt     # one question a line, each a conversation of its own

Ctrl-C stops an answer; at an empty line twice, or Ctrl-D, it leaves. Flags may be written with underscores too.
"""

from __future__ import annotations

import argparse
import secrets
from contextlib import closing
from typing import TYPE_CHECKING

from .shared import (
    add_depth_arguments,
    add_model_arguments,
    add_sampling_arguments,
    check_depth,
    load,
    named_as_typed,
    sampling_of,
)

if TYPE_CHECKING:
    from ..chat import ChatSession, ChatSettings
    from ..terminal import Keyboard, Screen

HELP = "talk to a model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hrm chat`."""
    add_model_arguments(parser)
    what = parser.add_argument_group("what is asked (default: what you type)")
    one = what.add_mutually_exclusive_group()
    one.add_argument("--prompt", metavar="TEXT", help="answer this and leave")
    one.add_argument("--prompts-file", metavar="FILE", help="answer each line of a UTF-8 file, apart from the others")
    form = parser.add_argument_group("form of a prompt")
    form.add_argument(
        "--instruction", metavar="TEXT", help="what stands before the first question (default: as trained)"
    )
    form.add_argument("--human-prefix", metavar="TEXT", default="Human:", help="before a question (default: Human:)")
    form.add_argument("--assistant-prefix", metavar="TEXT", default="Assistant:", help="(default: Assistant:)")
    history = form.add_mutually_exclusive_group()
    history.add_argument(
        "--max-history", metavar="N", type=int, help="earlier turns in a prompt (default: all that fit)"
    )
    history.add_argument("--no-history", action="store_true", help="every question stands alone")
    length = parser.add_argument_group("length")
    length.add_argument(
        "--max-new-tokens", "--max-tokens", metavar="N", type=int, default=200, help="of an answer (default: 200)"
    )
    length.add_argument("--min-new-tokens", "--min-tokens", metavar="N", type=int, default=0, help="(default: 0)")
    draws = parser.add_argument_group("sampling")
    add_sampling_arguments(draws, temperature=0.7, top_k=50, top_p=0.95)
    draws.add_argument("--seed", metavar="N", type=int, help="the same seed and questions give the same answers")
    add_depth_arguments(parser.add_argument_group("depth"))
    parser.add_argument("--mode", metavar="NAME", help="of a model of characters: fast, normal, deep, extreme, or NxT")
    parser.add_argument("--debug", action="store_true", help="show prompt, seed and every token")


def run(args: argparse.Namespace) -> int:
    """Hold the conversation.

    Raises:
        ValueError, OSError: what is wrong with the options, the prompts or the checkpoint, and the remedy.
    """
    questions = _questions(args)
    check_depth(args)
    settings = _settings(args)
    model, tokenizer = load(args)
    check_depth(args, model.config)

    from ..chat import ChatSession
    from ..terminal import Keyboard, Screen

    with named_as_typed(args):
        if model.config.n_chars is None:
            session = ChatSession(model, tokenizer, settings)
        else:
            from ..continual.chat import ContinualSession
            from ..continual.store import model_directory_of

            session = ContinualSession(model, tokenizer, settings, model_directory_of(args.ckpt).history())
    if args.mode is not None:
        if model.config.n_chars is None:
            raise ValueError("--mode is for models of characters; this one takes --force-steps N")
        session.think(args.mode)
    session.show_steps, session.debug = args.show_steps, args.debug
    screen = Screen()
    if questions is None:
        return converse(session, Keyboard(f"{settings.labels.human} ", screen), screen, args.ckpt)
    return answer_all(session, questions, screen)


def converse(session: ChatSession, keyboard: Keyboard, screen: Screen, name: str) -> int:
    """Read and answer until the person leaves; returns the exit status: 1 where nobody saw an error as it came."""
    from ..terminal import Interrupted

    if screen.interactive:
        screen.notice(_banner(session, name))
    if session.show_steps:
        _painter(session, screen).legend()
    leaving = failed = False
    while not session.over:
        try:
            typed = keyboard.read()
            leaving = False
            if not typed.text.strip():
                continue
            if typed.text.startswith("/") and not typed.block:
                if told := session.command(typed.text):
                    screen.line(told)
                if session.show_steps and typed.text.split()[0].lower() == "/show":
                    _painter(session, screen).legend()
            else:
                finished = answer(session, typed.text, screen, more="/tokens N", label=screen.interactive)
                if not finished and not keyboard.terminal:
                    return 130
        except EOFError:
            if screen.interactive:
                screen.line("")
            break
        except Interrupted as interrupted:
            if interrupted.empty and leaving:
                break
            leaving = interrupted.empty
            if leaving:
                screen.notice("(Ctrl-C once more leaves, so does /exit)")
        except KeyboardInterrupt:
            if not keyboard.terminal:
                raise
            screen.line("")
            screen.notice("(stopped)")
        except (ValueError, OSError) as error:
            if isinstance(error, BrokenPipeError):
                raise
            screen.error(error)
            failed = not keyboard.terminal
    return int(failed)


def answer_all(session: ChatSession, questions: list[str], screen: Screen) -> int:
    """Answer each question in a conversation of its own; returns the exit status, 130 if Ctrl-C stopped it."""
    several = len(questions) > 1
    if session.show_steps:
        _painter(session, screen).legend()
    for number, question in enumerate(questions, 1):
        session.clear()
        if several:
            shown = question if len(question) <= 60 else question[:57] + "..."
            screen.line(f"--- {number} of {len(questions)}: {shown!r}", "1")
        try:
            if not answer(session, question, screen, more="--max-new-tokens N", label=False):
                return 130
        except ValueError as error:
            if not several:
                raise
            raise ValueError(f"question {number}: {error}") from error
    return 0


def answer(session: ChatSession, question: str, screen: Screen, more: str, label: bool) -> bool:
    """Print the answer as it comes; returns whether it was left to end by itself.

    Args:
        more: what allows longer answers. label: print the assistant's label before the answer.

    Raises:
        ValueError: the question cannot be asked.
    """
    from ..terminal import BOLD, stop_on_interrupt

    left_out, seed, turns = session.left_out, session.turn_seed, session.turns
    events = session.ask(question)
    if session.left_out > left_out:
        screen.notice(f"(the window is full: the oldest {_turns(session.left_out)} no longer in it)")
    if session.debug:
        _show_prompt(session, seed, screen)
    if label:
        screen.write(f"{session.settings.labels.assistant} ", BOLD)
    painter = _painter(session, screen) if session.show_steps else None
    seen, gap = [], None
    with stop_on_interrupt() as stop, closing(events):
        try:
            for event in events:
                seen.append(event)
                # White space waits for what follows it: that before and after an answer is not part of it.
                text = event.text.lstrip() if gap is None else gap + event.text
                if shown := text.rstrip():
                    gap = text[len(shown) :]
                    if painter:
                        painter.write(shown, event.steps)
                    else:
                        screen.write(shown)
                elif gap is not None:
                    gap = text
                if stop.requested:
                    break
        except KeyboardInterrupt:  # the second: it does not wait for the token
            pass
        finally:
            screen.line("")
    for line in _remarks(seen, stop.requested, session.turns > turns, more):
        screen.notice(line)
    if session.unknown:
        screen.notice(f"({session.unknown} characters of that are unknown to this model; it read them as U+FFFD)")
    if session.debug:
        _show_tokens(session, seen, screen)
    return not stop.requested


def _remarks(events: list, stopped: bool, kept: bool, more: str) -> list[str]:
    remarks = []
    if any(event.recomputed for event in events):
        remarks.append("(the window was full: its oldest tokens were dropped and the rest computed again)")
    if not stopped and not "".join(event.text for event in events).strip():
        remarks.append("(white space alone: a model that was only pretrained may not answer; try `hrm generate`)")
    if stopped:
        remarks.append(f"(stopped; {'what there is stays' if kept else 'this question is not'} in the conversation)")
    elif events and events[-1].finish == "length":
        remarks.append(f"(cut after {len(events)} tokens; {more} allows more)")
    return remarks


def _painter(session: ChatSession, screen: Screen):
    from ..terminal import StepPainter

    return StepPainter(screen, session.settings.limit(session.model.config))


def _show_prompt(session: ChatSession, seed: int, screen: Screen) -> None:
    text = session.tokenizer.decode(session.prompt_ids)
    screen.notice(f"[prompt: {len(session.prompt_ids)} tokens, {session.reused} of them in the cache; seed {seed}]")
    screen.notice(text)


def _show_tokens(session: ChatSession, events: list, screen: Screen) -> None:
    for event in events:
        token = session.tokenizer.decode([event.token])
        end = f"  {event.finish}" if event.finish else ""
        steps = f"{event.steps} step{'s' * (event.steps != 1)}"
        screen.notice(f"[{event.token:>5} {token!r:<16} log p {event.logprob:7.3f}  {steps}{end}]")


def _turns(n: int) -> str:
    return "turn is" if n == 1 else f"{n} turns are"


def _banner(session: ChatSession, name: str) -> str:
    model, config = session.model, session.model.config
    head = "" if config.head_is_trained else "its halting head was never trained, "
    return (
        f"{name}: {model.num_parameters() / 1e6:.2f} M parameters on {model.device}, "
        f"window {config.block_size} tokens, {head}1 to {session.settings.limit(config)} steps a token\n"
        f"/help lists the commands, /exit leaves"
    )


def _questions(args: argparse.Namespace) -> list[str] | None:
    """What is asked without anyone typing; None if someone does."""
    from ..text_input import checked_text, read_lines

    if args.prompts_file is not None:
        return read_lines(args.prompts_file)
    if args.prompt is None:
        return None
    if not args.prompt.strip():
        raise ValueError("--prompt is empty; give a question, or leave it out to type")
    return [checked_text(args.prompt, "--prompt")]


def _settings(args: argparse.Namespace) -> ChatSettings:
    from ..chat import ChatSettings
    from ..template import INSTRUCTION, Labels

    labels, sampling = Labels.of(args.human_prefix, args.assistant_prefix), sampling_of(args)
    with named_as_typed(args):
        return ChatSettings(
            sampling=sampling,
            max_new_tokens=args.max_new_tokens,
            min_new_tokens=args.min_new_tokens,
            # Another conversation each time, unless asked otherwise; /stats shows the number.
            seed=secrets.randbelow(10**6) if args.seed is None else args.seed,
            force_steps=args.force_steps,
            max_steps=args.max_steps,
            halt_bias=args.halt_bias,
            depth_update=args.depth_update,
            instruction=INSTRUCTION if args.instruction is None else args.instruction,
            labels=labels,
            max_history=0 if args.no_history else args.max_history,
        )
