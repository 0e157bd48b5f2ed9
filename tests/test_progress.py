"""The word by which a GPU reports how many tokens it has chosen."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from hf_fastpath import progress
from hf_fastpath.ops.choose_tokens import CALL_SHIFT, DONE_SHIFT
from hf_fastpath.progress import Progress

CPU = torch.device("cpu")


def begun() -> tuple[Progress, int]:
    """One at the beginning of a call, and what the call's reports begin with."""
    one, done = Progress(CPU), torch.tensor(0)
    one.begin(done)
    return one, int(done)


def test_a_report_of_as_many_tokens_or_more_is_waited_for() -> None:
    one, call = begun()
    one.report.fill_(call + 3)
    assert one.finished_by(2) == one.finished_by(3) == 0

    def later() -> None:
        time.sleep(0.02)
        one.report.fill_(call + (4 << DONE_SHIFT) + 5)

    thread = threading.Thread(target=later)
    thread.start()
    assert one.finished_by(4) == 4
    thread.join()


def test_what_an_earlier_call_reports_is_not_taken_for_the_next_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    one, first = begun()
    done = torch.tensor(0)
    one.begin(done)
    assert int(done) >> CALL_SHIFT != first >> CALL_SHIFT
    one.report.fill_(first + (1 << DONE_SHIFT) + 9)
    monkeypatch.setattr(progress, "_PATIENCE_S", 0.01)
    with pytest.raises(RuntimeError, match=r"token 1 was never chosen: the last that the GPU reported is 9"):
        one.finished_by(1)


def test_a_word_is_nobody_elses_while_it_is_in_use() -> None:
    some = [Progress(CPU) for _ in range(3)]
    assert len({one.report.data_ptr() for one in some}) == 3
    place = some.pop().report.data_ptr()
    assert Progress(CPU).report.data_ptr() == place  # and then it is used again


def test_the_number_of_a_call_has_its_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_calls", iter([(1 << 15) - 1, 1 << 15]))
    for number in ((1 << 15) - 1, 0):
        one, call = begun()
        assert call == number << CALL_SHIFT
        one.report.fill_(call + (2 << DONE_SHIFT) + 2)
        assert one.finished_by(1) == 2
