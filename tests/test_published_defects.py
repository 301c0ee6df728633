"""Faults of the published training and data preparation, each beside ours: what they do fails here, what we do holds.

Others are where their subject is: the optimizer's parameters in test_training_parts.py, fine-tuning, chat's prefix and
calibration's resume in test_stages.py, word filters in test_chat_filters.py, pickles in test_published.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conversation_datasets import ABOUT
from small_models import thinker
from torch.nn.parallel import DistributedDataParallel

from bench.published import PublishedHRM
from hrm_model import get_tokenizer
from hrm_model.training.sampler import Sampler
from hrm_model.training.shards import DatasetWriter, open_dataset
from train.prepare import main as prepare

# -- several processes -------------------------------------------------------------------------------------------------


@pytest.fixture
def group_of_one():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def two_steps(wrapped: torch.nn.Module, ids: torch.Tensor) -> None:
    for _ in range(2):
        wrapped(ids, ids.roll(-1, 1)).loss.backward()


def test_data_parallel_training_goes_on_where_all_rows_halt_early(group_of_one):
    """The published loop then leaves the core without gradient, and DistributedDataParallel refuses the next step."""
    model = thinker(dtype=torch.float32, hrm_exploration_prob=0.0).train()
    torch.nn.init.zeros_(model.hrm_core.q_head.weight)
    with torch.no_grad():
        model.hrm_core.q_head.bias.copy_(torch.tensor([1.0, 0.0]))
    ids = torch.randint(0, 61, (3, 8), generator=torch.Generator().manual_seed(0))
    with pytest.raises(RuntimeError, match="Expected to have finished reduction in the prior iteration"):
        two_steps(DistributedDataParallel(PublishedHRM(model)), ids)
    model.zero_grad()
    two_steps(DistributedDataParallel(model), ids)
    assert all(p.grad is not None for p in model.parameters())


SHARDED = """
import os, sys, datetime
sys.path[:0] = {paths!r}
import torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from small_models import thinker
from hrm_model.ranks import Ranks
from hrm_model.training.distributed import spread

dist.init_process_group("gloo", timeout=datetime.timedelta(seconds={timeout}))
model = thinker(dtype=torch.float32).train()
ids, depth = torch.randint(0, 61, (2, 8), generator=torch.Generator().manual_seed(0)), (1, 4)[rank]
if {ours}:
    spread(model, "fsdp", Ranks(rank, 2))(ids, ids, force_steps=depth).loss.backward()
else:
    core = model.hrm_core
    for part in (core.L_level, core.H_level, model):
        fully_shard(part)
    def published(x, rotary, lengths, *options):
        z_H, z_L = core.initial_state(x)
        for step in range(depth):  # until the last of this process's rows has halted
            z_H, z_L = core.step(x, z_H, z_L, rotary, lengths)
        q = torch.zeros(len(x), 2)
        return type("Core", (), dict(
            z_H=z_H, q_logits=q, executed_steps=torch.full((len(x),), depth), halted=q[:, 0] > 0, row_steps=q[0]))
    core.forward = published
    model(ids, ids).loss.backward()
dist.barrier()
os._exit(0)
"""


@pytest.mark.parametrize(("ours", "timeout"), [(True, 60), (False, 3)])
def test_sharded_training_takes_rows_that_halt_at_other_steps_on_other_processes(forks, ours, timeout):
    """Gathered at each use, parameters are asked for by one process more often than by the other: both wait until the
    timeout. Ours gathers them once a step."""
    tests = Path(__file__).parent
    script = SHARDED.format(paths=[str(tests), str(tests.parent)], ours=ours, timeout=timeout)
    codes, printed = forks.run(2, [], inject=script)
    assert (codes == [0, 0]) == ours, printed


# -- data --------------------------------------------------------------------------------------------------------------

CODE = "def outer(n):\n    if n:\n        return [\n            n,\n        ]\n\treturn None\n".replace("\t", "    ")
EOT_EVERY, VAL_TOKENS = 2048, 50_000_000
"""Of the published preparation."""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """(texts, their dataset): code, and one document that is longer than two of the published pieces."""
    root = tmp_path_factory.mktemp("prepared")
    texts = [CODE.replace("outer", f"function_{i}") for i in range(40)] + ["A long one. " * 1500]
    (root / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    arguments = ["--source", str(root / "in.jsonl"), "--out", str(root / "out"), "--workers", "1"]
    assert prepare([*arguments, "--val-fraction", "0.05"]) == 0
    return texts, open_dataset(root / "out")


def documents(dataset) -> list[str]:
    tokenizer, found = get_tokenizer(), []
    for name in ("train", "val"):
        ids = dataset.split(name).read(0, len(dataset.split(name)))
        pieces = np.split(ids, np.flatnonzero(ids == tokenizer.eot) + 1)[:-1]
        found += [tokenizer.decode(piece[:-1].tolist()) for piece in pieces]
    return found


def test_validation_is_a_share_of_the_tokens_and_training_has_the_rest(prepared):
    """The published number of tokens leaves nothing of a small corpus to train on."""
    train, val = (len(prepared[1].split(name)) for name in ("train", "val"))
    assert abs(val - 0.05 * (train + val)) <= 40, "within a document of code"
    published_val = min(VAL_TOKENS, train + val)
    assert train + val - published_val == 0 < train


def test_white_space_and_so_indentation_is_kept(prepared):
    """What the published preparation makes of code does not compile."""
    texts, dataset = prepared
    found = documents(dataset)
    assert sorted(found) == sorted(texts)
    code = next(text for text in found if text.startswith("def"))
    compile(code, "ours", "exec")
    with pytest.raises(SyntaxError):
        compile(" ".join(code.split()), "published", "exec")


def test_an_end_of_text_comes_after_documents_alone(prepared):
    """The published preparation puts one into a document every 2,048 tokens."""
    texts, dataset = prepared
    tokenizer = get_tokenizer()
    ends = sum(int((s.read(0, len(s)) == tokenizer.eot).sum()) for s in map(dataset.split, ("train", "val")))
    published = sum(-(-len(tokenizer.encode(text)) // EOT_EVERY) for text in texts)
    assert ends == len(texts) < published


def test_corpora_are_sampled_by_their_size(tmp_path):
    """The published sampler draws a small corpus as often as a large one."""
    sizes, datasets = (900, 8100), []
    for mark, size in enumerate(sizes):
        with DatasetWriter(tmp_path / str(mark)) as writer:
            writer.append("train", np.full(size, mark), documents=1)
            datasets.append(writer.commit(ABOUT))
    drawn = Sampler(datasets, 8, seed=0).batch(0, 4000)[0][:, 0].mean()
    error = 4 * (0.9 * 0.1 / 4000) ** 0.5
    assert abs(drawn - sizes[1] / sum(sizes)) < error
    published = np.random.default_rng(0).integers(0, len(sizes), 4000).mean()
    assert abs(published - sizes[1] / sum(sizes)) > error
