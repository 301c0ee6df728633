"""lm-evaluation-harness: this package's models under its name `hrm`, for its tasks and its arithmetic.

hrm eval CKPT --protocol lm-eval --tasks hellaswag,piqa
hrm-lm-eval --model hrm --model_args pretrained=CKPT --tasks lambada_openai   # its own command line

Importing this file registers the model; the harness has no other way to learn of one. Depth is decided by prefix
(shared_context.py), so that a log-likelihood is one: no token is predicted with a look at what follows. model_args
rule=row is the published way. Requests that share a context share its computation; batches are made of tokens, so
batch_size is of no use.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lm_eval.tasks
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from ..config import END_OF_TEXT
from ..generate import stream
from ..sampling import Sampling
from .hrm_scorer import HRMScorer
from .requests import Request, Scorer

NAMES = {"nq": "nq_open"}
"""Of our tasks, where lm-eval has another name."""
FOLDERS = {name: name for name in ("hellaswag", "piqa", "winogrande", "nq_open", "gsm8k")}
FOLDERS |= {"arc_easy": "arc", "arc_challenge": "arc", "mmlu": "mmlu/default"}
"""Where lm-eval 0.4.13 has tasks; of others all of its 13,986 files are read to find them, which takes a while."""
SPLITS = {"arc_easy": "test", "arc_challenge": "test", "gsm8k": "test"}
"""Of tasks that can be read from one file, the split that it scores; the others' is validation."""

DTYPES = ("float32", "bfloat16")


class ScorerLM(TemplateLM):
    """Any Scorer of this package as one of the harness's models."""

    def __init__(self, scorer: Scorer, prefix_token: int):
        super().__init__()
        self.scorer, self._prefix_token = scorer, prefix_token

    @property
    def eot_token_id(self) -> int:
        return self._prefix_token

    @property
    def max_length(self) -> int:
        return self.scorer.max_length

    @property
    def max_gen_toks(self) -> int:
        return 256

    @property
    def tokenizer_name(self) -> str:
        return self.scorer.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        return self.scorer.encode(string)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs
    ) -> list[tuple[float, bool]]:
        by_context: dict[tuple[int, ...], dict[tuple[int, ...], list[int]]] = {}
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)  # of an empty continuation
        for number, (_, context, choice) in enumerate(requests):
            if choice:
                by_context.setdefault(tuple(context), {}).setdefault(tuple(choice), []).append(number)
        asked = [Request(context, list(choices)) for context, choices in by_context.items()]
        with tqdm(total=len(asked), desc="contexts", disable=disable_tqdm) as progress:
            scored = self.scorer.score(asked, progress.update) if asked else []
        for request, scores in zip(asked, scored, strict=True):
            for choice, score in zip(request.choices, scores, strict=True):
                for number in by_context[request.context][choice]:
                    found[number] = score.logprob, score.greedy
        return found

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        texts = [request.args[0] for request in requests]
        encoded = [self.tok_encode(text) for text in tqdm(texts, disable=disable_tqdm)]
        return [-float(self.scorer.rolling(ids).losses.sum()) if ids else 0.0 for ids in encoded]

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        raise NotImplementedError(f"{type(self).__name__} scores and does not generate")


@register_model("hrm")
class HRMForHarness(ScorerLM):
    """A checkpoint of this package.

    Args:
        pretrained: its path. rule: "prefix" or "row". max_steps, halt_bias, batch_tokens: as in HRMScorer.
        device, dtype: as in `hrm eval`.
    """

    def __init__(
        self, pretrained: str | None = None, *, scorer: HRMScorer | None = None, device: str | None = None,
        dtype: str = "float32", rule: str = "prefix", max_steps: int | None = None, halt_bias: float | None = None,
        batch_tokens: int | None = None, batch_size: Any = None, max_batch_size: Any = None, **unknown: Any,
    ):  # fmt: skip
        if unknown:
            known = "pretrained, rule, max_steps, halt_bias, batch_tokens, device, dtype"
            raise ValueError(f"model_args {', '.join(unknown)} are unknown to hrm; known are {known}")
        if scorer is None:
            if pretrained is None:
                raise ValueError("hrm needs a checkpoint: --model_args pretrained=CKPT")
            from ..checkpoint import load_model
            from ..tokenizer import get_tokenizer
            from ..training.device import choose_device

            if dtype not in DTYPES:
                raise ValueError(f"dtype {dtype!r} is none of {', '.join(DTYPES)}")
            model, config = load_model(pretrained, choose_device(device or "auto"), getattr(torch, dtype))
            tokenizer = get_tokenizer()
            tokenizer.check_vocabulary(config.vocab_size, pretrained)
            scorer = HRMScorer(
                model, tokenizer, Path(pretrained).name, rule=rule, max_steps=max_steps, halt_bias=halt_bias,
                batch_tokens=batch_tokens,
            )  # fmt: skip
        super().__init__(scorer, END_OF_TEXT)

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        found = [""] * len(requests)
        with tqdm(total=len(requests), desc="texts", disable=disable_tqdm) as progress:
            for options, numbers in groups.items():
                texts = self._continue([requests[n].args[0] for n in numbers], json.loads(options), progress.update)
                for number, text in zip(numbers, texts, strict=True):
                    found[number] = text
        return found

    def _continue(self, contexts: Sequence[str], options: Mapping[str, Any], progress) -> list[str]:
        scorer = self.scorer
        until = options.get("until") or []
        limit = int(options.get("max_gen_toks") or options.get("max_new_tokens") or self.max_gen_toks)
        limit = max(1, min(limit, scorer.max_length - 1))
        temperature = float(options.get("temperature") or 0.0) if options.get("do_sample") else 0.0
        room = scorer.max_length - limit
        prompts = [scorer.encode(context, is_context=True)[-room:] for context in contexts]
        texts = [""] * len(prompts)
        events = stream(
            scorer.model, prompts, limit, sampling=Sampling(temperature=temperature),
            stop=[until] if isinstance(until, str) else [text for text in until if text],
            stop_tokens=END_OF_TEXT, max_steps=scorer.max_steps, halt_bias=scorer.halt_bias,
            batch_size=scorer.rows_at_a_time(prompts, limit), tokenizer=scorer.tokenizer,
        )  # fmt: skip
        for event in events:
            texts[event.row] += event.text
            if event.finish:
                progress(1)
        return texts

    def get_model_info(self) -> dict[str, Any]:
        """What the harness notes beside results."""
        scorer = self.scorer
        return {
            "model_num_parameters": scorer.n_parameters,
            "rule": scorer.rule,
            "max_steps": scorer.max_steps,
            "halt_bias": scorer.halt_bias,
        }


def evaluate(
    scorer: HRMScorer, tasks: Sequence[str], places: Mapping[str, Path], limit: int | None = None
) -> list[dict[str, Any]]:
    """lm-eval's own figures of tasks, by our names or its own.

    Args:
        places: files to read instead of the hub, by task, in the hub's layout; without examples in the prompt then.
        limit: examples of each task.

    Returns:
        {"task", "metric", "value", "stderr", "examples"} of every metric.

    Raises:
        ValueError: a task that it does not know, or data that cannot be read.
    """
    from lm_eval import simple_evaluate

    manager = _manager([NAMES.get(task, task) for task in tasks])
    names = {task: NAMES.get(task, task) for task in tasks}
    unknown = [name for name in names.values() if name not in manager.all_tasks]
    if unknown:
        raise ValueError(f"lm-eval has no task {unknown[0]!r}; `lm_eval ls tasks` lists them")
    try:
        with TemporaryDirectory() as folder:
            asked = [
                _local(task, name, places[task], manager, Path(folder)) if task in places else name
                for task, name in names.items()
            ]
            found = simple_evaluate(
                HRMForHarness(scorer=scorer), tasks=asked, limit=limit, task_manager=manager, bootstrap_iters=1000,
                num_fewshot=0 if places else None, log_samples=False,
            )  # fmt: skip
    except (OSError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"lm-eval could not run {', '.join(tasks)} ({reason}); where the hub cannot be reached give files in its "
            "layout, --data TASK=FILE"
        ) from error
    rows = []
    for task, values in found["results"].items():
        examples = found.get("n-samples", {}).get(task, {}).get("effective")
        for key, value in values.items():
            metric, comma, chosen = key.partition(",")
            if comma and not metric.endswith("_stderr"):
                stderr = values.get(f"{metric}_stderr,{chosen}")
                stderr = stderr if isinstance(stderr, float) else None
                shown = metric if chosen == "none" else f"{metric} ({chosen})"
                rows.append({"task": task, "metric": shown, "value": value, "stderr": stderr, "examples": examples})
    return rows


def _manager(names: Sequence[str]) -> TaskManager:
    """lm-eval's list of tasks, as far as these names need it."""
    root = Path(lm_eval.tasks.__file__).parent
    folders = [root / FOLDERS[name] for name in names if name in FOLDERS]
    if len(folders) == len(names) and all(folder.is_dir() for folder in folders):
        few = TaskManager(include_defaults=False, include_path=list(dict.fromkeys(folders)))
        if all(name in few.all_tasks for name in names):
            return few
    return TaskManager()


def _local(task: str, name: str, place: Path, manager: TaskManager, folder: Path) -> str:
    """The path of a file, in `folder`, that is the task with other data."""
    if task == "mmlu":
        raise ValueError("lm-eval's mmlu is 57 tasks, no file; leave it out of --data, or take --protocol published")
    split = SPLITS.get(task, "validation")
    config = {
        "include": str(manager.task_index[name].yaml_path),
        "task": name,
        "dataset_path": "parquet" if place.suffix == ".parquet" else "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(place.resolve())}},
        # of a file there is one split: without the others nothing is asked of them
        "training_split": None,
        "validation_split": split if split == "validation" else None,
        "test_split": split if split == "test" else None,
        "fewshot_split": split,
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(config))  # which is YAML too
    return str(path)
