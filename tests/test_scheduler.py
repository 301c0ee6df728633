"""Continuous batching: a row gets what it gets alone, whoever shares the batch, and leaves its place free."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from serving import SAMPLINGS, WINDOW, Listener, alone, text_model

from hrm_model.sampling import Sampling
from hrm_model.serve.jobs import Job, QueueFull, Stopping
from hrm_model.serve.scheduler import Scheduler, places_that_fit
from hrm_model.tokenizer import get_tokenizer

CHUNK = 8


@pytest.fixture(scope="module")
def model():
    return text_model()


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Prompts are cut alike with a scheduler and without."""
    monkeypatch.setattr("hrm_model.rows.READ_AT_ONCE", CHUNK)


def same(logprobs: list[float]):
    """Equal to the last bit where products do not depend on the number of rows."""
    return logprobs if torch.backends.mkldnn.is_available() else pytest.approx(logprobs, abs=2e-4)


@pytest.fixture
def scheduler(model):
    with Scheduler(model, get_tokenizer(), places=4, queue=60, chunk=CHUNK) as made:
        yield made


def jobs(n: int) -> list[Job]:
    """Prompts from one token to several chunks, drawn in every way, some at a given depth or one that is kept."""
    texts = "a", "To be, or not", "import os\nimport sys\n\n", "naïve café ☕ " * 5, "x = [1, 2, 3]; " * 6
    made = []
    for i in range(n):
        ids = get_tokenizer().encode(texts[i % 5] + str(i))
        made.append(
            Job(
                ids=ids,
                max_new_tokens=4 + 2 * (i % 4),
                sink=Listener(),
                sampling=SAMPLINGS[i % 4],
                seed=i // 3,
                stop=("e", "\n\n") if i % 6 == 5 else (),
                min_new_tokens=i % 3,
                force_steps=(0, 0, 0, 2)[i % 4 if i % 7 == 3 else 0],
                keep_depth=i % 5 == 4,
                top=i % 3,
            )
        )
    return made


def test_every_row_gets_the_tokens_that_it_gets_alone(model, scheduler):
    asked = jobs(18)
    for job in asked:
        scheduler.submit([job])
    depths = set()
    for job in asked:
        expected, found = alone(model, job), job.sink.wait()
        assert found.failure is None and found.tokens == [event.token for event in expected]
        assert found.steps == [event.steps for event in expected]
        assert found.text == "".join(event.text for event in expected)
        assert found.finish == expected[-1].finish
        assert found.logprobs == same([event.logprob for event in expected])
        depths |= set(found.steps)
    assert len(depths) > 2, "else depth was not put to the test"
    assert scheduler.active == scheduler.waiting == 0 and scheduler.counts.steps.total() == sum(
        len(job.sink.told) for job in asked
    )


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="products depend on the number of rows")
def test_numbers_are_the_same_to_the_last_bit_whoever_shares_the_batch(scheduler):
    together = jobs(9)
    for job in together:
        scheduler.submit([job])
    for job in together:
        job.sink.wait()
    for job, again in zip(together, jobs(9), strict=True):
        scheduler.submit([again])
        assert again.sink.wait().logprobs == job.sink.logprobs
        assert [told.top for told in again.sink.told] == [told.top for told in job.sink.told]


def test_one_seed_draws_differently_for_each_continuation_as_in_a_batch_of_generate(model, scheduler):
    from hrm_model.generate import stream

    ids = get_tokenizer().encode("Once upon")
    asked = [Job(ids, 6, Listener(), seed=5, number=number) for number in range(3)]
    scheduler.submit(asked)
    expected = [[], [], []]
    for event in stream(model, [ids] * 3, 6, seed=5):
        expected[event.row].append(event.token)
    assert [job.sink.wait().tokens for job in asked] == expected
    assert len({tuple(row) for row in expected}) == 3


def test_the_likeliest_are_told_with_the_models_own_probabilities(scheduler):
    job = Job(get_tokenizer().encode("abc"), 4, Listener(), sampling=Sampling(temperature=0), top=3)
    scheduler.submit([job])
    for told in job.sink.wait().told:
        values = [logprob for _, logprob in told.top]
        assert len(values) == 3 and values == sorted(values, reverse=True)
        assert told.top[0][0] == told.event.token and values[0] == pytest.approx(told.event.logprob, abs=1e-5)


def test_others_go_on_while_a_long_prompt_is_read(model):
    order = []
    short, long = Listener(lambda told: order.append("short")), Listener(lambda told: order.append("long"))
    with Scheduler(model, get_tokenizer(), places=2, queue=4, chunk=CHUNK) as scheduler:
        gate = threading.Event()
        held = Listener(lambda told: gate.wait(60))
        scheduler.submit([Job([1], 1, held)])  # holds the thread, so that both come at once
        scheduler.submit([Job([2], 40, short, stop_tokens=()), Job([3] * 80, 1, long)])
        gate.set()
        short.wait(), long.wait()
    before = order.index("long")
    assert before >= 80 // CHUNK - 1, "a token between every two chunks"


def test_a_cancelled_job_gives_its_place_to_the_next(model):
    with Scheduler(model, get_tokenizer(), places=1, queue=4, chunk=CHUNK) as scheduler:
        first = Listener(lambda told: scheduler.cancel([endless]))
        endless = Job([1], 90, first, stop_tokens=())
        after = Job([2], 3, Listener(), stop_tokens=())
        waiting = Job([3], 3, Listener(), stop_tokens=())
        scheduler.cancel([waiting])
        scheduler.submit([endless, waiting, after])
        assert after.sink.wait().finish == "length"
        assert len(first.told) == 1 and first.failure is None and not waiting.sink.told
        assert scheduler.counts.finished == {"cancelled": 2, "length": 1}
        assert after.sink.tokens == [event.token for event in alone(model, after)], "nothing is left of the one before"


def test_a_full_queue_takes_all_of_a_request_or_nothing(model):
    gate = threading.Event()
    with Scheduler(model, get_tokenizer(), places=1, queue=2, chunk=CHUNK) as scheduler:
        running = Job([1], 2, Listener(lambda told: gate.wait(60)), stop_tokens=())
        scheduler.submit([running])
        with pytest.raises(QueueFull, match="of at most 2 wait") as refused:
            scheduler.submit([Job([2], 2, Listener()) for _ in range(3)])
        assert 1 <= refused.value.retry_after <= 60 and scheduler.counts.refused == 3
        two = [Job([2], 2, Listener(), stop_tokens=()) for _ in range(2)]
        scheduler.submit(two)
        with pytest.raises(QueueFull):
            scheduler.submit([Job([2], 2, Listener())])
        gate.set()
        assert [job.sink.wait().finish for job in (running, *two)] == ["length"] * 3


def test_a_late_job_fails_while_it_waits_and_while_it_runs(model):
    with Scheduler(model, get_tokenizer(), places=1, queue=4, chunk=CHUNK) as scheduler:
        late = Job([1], 90, Listener(lambda told: setattr(late, "deadline", time.monotonic())), stop_tokens=())
        waiting = Job([2], 3, Listener(), deadline=time.monotonic())
        scheduler.submit([late, waiting])
        assert late.sink.wait().failure.kind == waiting.sink.wait().failure.kind == "timeout"
        assert len(late.sink.told) == 1 and not waiting.sink.told


def test_a_row_that_is_not_finite_fails_alone_and_leaves_nothing_behind():
    model = text_model(tie_embeddings=False)
    with torch.no_grad():
        model.wte.weight[7] = float("nan")
    with Scheduler(model, get_tokenizer(), places=2, queue=9, chunk=CHUNK) as scheduler:
        asked = [Job([number] * 5, 6, Listener(), sampling=Sampling(temperature=0)) for number in (7, 8, 7, 9, 7, 10)]
        for job in asked:
            scheduler.submit([job])
        for job in asked:
            job.sink.wait()
            if job.ids[0] == 7:
                assert job.sink.failure.kind == "internal" and "not finite" in job.sink.failure.message
            else:
                expected = [event.token for event in alone(model, job)]
                assert job.sink.tokens == expected[: len(job.sink.tokens)] and job.sink.told


def test_a_pass_that_fails_costs_its_rows_and_no_others(model):
    with Scheduler(model, get_tokenizer(), places=2, queue=9, chunk=CHUNK) as scheduler:

        def fail(*_):
            hook.remove()
            raise RuntimeError("out of luck")

        hook = model.ln_f.register_forward_hook(fail)
        broken, good = (Job([5, 6], 4, Listener(), stop_tokens=()) for _ in range(2))
        scheduler.submit([broken])
        assert broken.sink.wait().failure.kind == "internal" and "luck" not in broken.sink.failure.message
        scheduler.submit([good])
        assert good.sink.wait().tokens == [event.token for event in alone(model, good)]


def test_stopping_tells_those_who_wait(model):
    gate = threading.Event()
    scheduler = Scheduler(model, get_tokenizer(), places=1, queue=4, chunk=CHUNK)
    scheduler.start()
    running, waiting = Job([1], 90, Listener(lambda told: gate.wait(60)), stop_tokens=()), Job([2], 3, Listener())
    scheduler.submit([running, waiting])
    stopping = threading.Thread(target=scheduler.stop)
    stopping.start()
    with pytest.raises(Stopping):  # while the running one is still told of its token
        for _ in range(4):
            scheduler.submit([Job([2], 3, Listener())])
            stopping.join(0.5)
    assert stopping.is_alive()
    gate.set()
    stopping.join()
    assert not scheduler.alive
    assert running.sink.wait().failure.kind == waiting.sink.wait().failure.kind == "stopping"
    with pytest.raises(Stopping):
        scheduler.submit([Job([2], 3, Listener())])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ids": []}, "the prompt is empty"),
        ({"ids": [50257]}, "outside 0..50256"),
        ({"ids": [-1]}, "outside 0..50256"),
        ({"ids": [1] * WINDOW}, f"window of {WINDOW}"),
        ({"max_new_tokens": 0}, "max_tokens 0 must be"),
        ({"max_new_tokens": WINDOW}, f"window of {WINDOW}"),
        ({"min_new_tokens": 9}, "min_tokens 9 must be in 0..4"),
        ({"stop": ("",)}, "empty string"),
        ({"force_steps": 6}, "outside 0..5"),
        ({"sampling": Sampling(top_k=50258)}, "top_k 50258 is above 50257"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_taken(scheduler, changes, words):
    fine, bad = Job([1], 4, Listener()), Job(**{"ids": [1], "max_new_tokens": 4, "sink": Listener()} | changes)
    with pytest.raises(ValueError, match=words):
        scheduler.submit([fine, bad])
    assert scheduler.active == scheduler.waiting == 0 and not fine.sink.told


def test_options_out_of_range_are_named(model):
    for options, words in ({"places": 0}, "places 0"), ({"queue": -1}, "queue -1"), ({"chunk": 0}, "chunk 0"):
        with pytest.raises(ValueError, match=words):
            Scheduler(model, get_tokenizer(), **options)


def test_places_are_as_many_as_fit(model, monkeypatch):
    from hrm_model.cache import bytes_per_token

    monkeypatch.setattr("hrm_model.serve.scheduler.room", lambda model: 4 * WINDOW * bytes_per_token(model.config))
    assert places_that_fit(model, 16) == 3 and places_that_fit(model, 2) == 2
    assert places_that_fit(model, 16, max_steps=1) > 3
    monkeypatch.setattr("hrm_model.serve.scheduler.room", lambda model: None)
    assert places_that_fit(model, 16) == 16
