"""bench/soak.py: what it calls growth, and a look at a real process."""

from __future__ import annotations

import os
import threading

import pytest

from bench.soak import judge, look


def life(late: dict[str, float]) -> dict:
    """100 looks at a process that takes more within a step, the last quarter of them with `late` numbers."""
    early = {"mb": 500.0, "files": 7, "threads": 2}
    within = [early, early | {"mb": 600.0}, early | {"mb": 580.0}]
    return {"seen": within * 25 + [early | late] * 25, "last": 50, "status": 75}


@pytest.mark.parametrize(
    ("late", "grew"), [({}, False), ({"mb": 520.0}, False), ({"mb": 530.0}, True), ({"files": 8}, True)]
)
def test_growth_is_more_memory_between_steps_or_one_more_file(late, grew):
    assert judge(life(late))["grew"] == grew


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs /proc")
def test_a_look_sees_files_and_threads_and_nothing_of_who_has_gone(tmp_path):
    before = look(os.getpid())
    stay = threading.Event()
    thread = threading.Thread(target=stay.wait)
    with open(tmp_path / "file", "w"):
        thread.start()
        during = look(os.getpid())
        stay.set()
    thread.join()
    assert during["files"] == before["files"] + 1 and during["threads"] == before["threads"] + 1
    assert before["mb"] > 50 and look(2**22 + 1) is None
