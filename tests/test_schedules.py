"""Schedules against their formulas, at every step."""

import pytest

from lightning_prune.schedules import CubicSchedule, LinearSchedule, OneShot, Schedule, check_schedule


@pytest.mark.parametrize(("start", "end", "every"), [(0, 10, 1), (3, 20, 4), (5, 6, 9), (0, 100, 7)])
@pytest.mark.parametrize(("kind", "power"), [(LinearSchedule, 1), (CubicSchedule, 3)])
def test_fraction_follows_the_formula(kind, power, start, end, every):
    schedule = kind(start, end, every)
    previous = 0.0
    for step in range(end + 20):
        t = min(max((step - start) / (end - start), 0.0), 1.0)
        assert schedule.fraction(step) == pytest.approx(1 - (1 - t) ** power, abs=1e-12)
        assert schedule.fraction(step) >= previous
        previous = schedule.fraction(step)
    assert schedule.fraction(start) == 0.0
    assert schedule.fraction(end) == 1.0  # exactly, not nearly
    assert schedule.fraction(10**9) == 1.0


@pytest.mark.parametrize("kind", [LinearSchedule, CubicSchedule])
@pytest.mark.parametrize(
    ("start", "end", "every", "expected"),
    [
        (0, 10, 5, [0, 5, 10]),
        (2, 11, 4, [2, 6, 10, 11]),
        (3, 5, 100, [3, 5]),
        (0, 3, 1, [0, 1, 2, 3]),
    ],
)
def test_updates_happen_from_start_to_end(kind, start, end, every, expected):
    assert [s for s in range(40) if kind(start, end, every).updates_at(s)] == expected


@pytest.mark.parametrize("step", [0, 7])
def test_one_shot(step):
    schedule = OneShot(step)
    assert (schedule.start, schedule.end) == (step, step)
    assert [s for s in range(20) if schedule.updates_at(s)] == [step]
    assert [schedule.fraction(s) for s in range(20)] == [float(s >= step) for s in range(20)]


@pytest.mark.parametrize("kind", [LinearSchedule, CubicSchedule])
@pytest.mark.parametrize(
    "arguments",
    [(-1, 5, 1), (5, 5, 1), (6, 5, 1), (0, 5, 0), (0, 5, -2), (0, 5.5, 1), (0, 5.0, 1), (0, 5, 1.5), ("0", 5, 1)],
)
def test_impossible_schedules_are_refused(kind, arguments):
    with pytest.raises(ValueError, match="needs 0 <= start < end and every >= 1, all of them whole") as caught:
        kind(*arguments)
    assert kind.__name__ in str(caught.value)


@pytest.mark.parametrize("step", [-1, 1.5, "1", True])
def test_one_shot_refuses_what_is_no_step(step):
    with pytest.raises(ValueError, match=f"step={step!r} must be a whole number of at least 0"):
        OneShot(step)


def test_check_schedule():
    assert check_schedule(None) == OneShot(0)
    cubic = CubicSchedule(0, 10, 2)
    assert check_schedule(cubic) is cubic
    assert isinstance(cubic, Schedule)

    class Own:
        start, end = 0, 4

        def updates_at(self, step):
            return step == 4

        def fraction(self, step):
            return float(step >= 4)

    own = Own()
    assert check_schedule(own) is own


@pytest.mark.parametrize("bad", ["cubic", 3, LinearSchedule, object()])
def test_something_else_is_refused(bad):
    with pytest.raises(TypeError, match="must be None"):
        check_schedule(bad)
