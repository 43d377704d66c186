"""When a replica is said to hang, and when not."""

from __future__ import annotations

from holdfast.cluster.hang import ENOUGH_STEPS, FLOOR_SECONDS, LOOK_SECONDS, REMEMBERED, SLACK, HangWatch


def watched(gaps: list[float], most: float = 60.0, *, by_step: bool = False) -> tuple[HangWatch, float]:
    """A watch over a busy rank that has moved after each of these gaps; the time by now."""
    watch, now, moves = HangWatch(most, by_step=by_step), 100.0, 0
    watch.look((moves,), now, busy=True)
    for gap in gaps:
        moves, moved_at = moves + 1, now + gap
        while now + LOOK_SECONDS < moved_at:
            now += LOOK_SECONDS
            assert not watch.look((moves - 1,), now, busy=True)
        now = moved_at
        assert not watch.look((moves,), now, busy=True)
    return watch, now


def hangs_after(watch: HangWatch, now: float, moves: int) -> float:
    """Seconds until a rank that no longer moves is found out."""
    begun = now
    while not watch.look((moves,), now, busy=True):
        now += LOOK_SECONDS
        assert now - begun < 1000
    return now - begun


def test_a_rank_that_stops_is_found_out_soon():
    gaps = [0.1] * (ENOUGH_STEPS + 5)
    watch, now = watched(gaps)
    assert FLOOR_SECONDS < hangs_after(watch, now, len(gaps)) < 2.0


def test_slow_steps_get_more_time():
    gaps = [1.0] * (ENOUGH_STEPS + 5)
    watch, now = watched(gaps)
    assert SLACK * 1.0 < hangs_after(watch, now, len(gaps)) < SLACK * 1.3


def test_what_was_slow_once_does_not_hide_a_hang_for_ever():
    """Steps of half a second allow 4 s; some seconds after the last of them a hang is found out as soon as ever."""
    slow, fast = [0.5] * 5, [0.1] * REMEMBERED
    watch, now = watched([*slow, *fast[1:]])
    assert SLACK * 0.5 < hangs_after(watch, now, REMEMBERED + 4) < SLACK * 0.7
    watch, now = watched([*slow, *fast])
    assert FLOOR_SECONDS < hangs_after(watch, now, REMEMBERED + 5) < 2.0


def test_no_step_gets_more_than_the_limit():
    gaps = [1.0] * (ENOUGH_STEPS + 5)
    watch, now = watched(gaps, most=3.0)
    assert 3.0 < hangs_after(watch, now, len(gaps)) < 3.3


def test_where_only_steps_are_seen_the_first_get_all_the_time_there_is():
    watch, now = watched([0.1] * 3, by_step=True)
    assert 60.0 < hangs_after(watch, now, 3) < 60.3
    watch, now = watched([0.1] * (ENOUGH_STEPS + 1), by_step=True)
    assert 10.0 < hangs_after(watch, now, ENOUGH_STEPS + 1) < 10.3


def test_a_rank_that_has_just_come_back_is_watched_at_once():
    watch, now = watched([])
    assert FLOOR_SECONDS < hangs_after(watch, now, 0) < 2.0


def test_idleness_is_no_hang():
    watch, now = watched([0.1] * (ENOUGH_STEPS + 5))
    for _ in range(1000):
        now += LOOK_SECONDS
        assert not watch.look((ENOUGH_STEPS + 5,), now, busy=False)
    now += LOOK_SECONDS
    assert not watch.look((ENOUGH_STEPS + 5,), now, busy=True)


def test_a_watch_that_stood_still_itself_accuses_nobody():
    watch, now = watched([0.1] * (ENOUGH_STEPS + 5))
    assert not watch.look((ENOUGH_STEPS + 5,), now + 100.0, busy=True)
    assert not watch.look((ENOUGH_STEPS + 5,), now + 100.0 + LOOK_SECONDS, busy=True)


def test_one_rank_that_moves_is_enough():
    """The others wait for it."""
    watch, now = watched([0.1] * (ENOUGH_STEPS + 5))
    for move in range(100):
        now += LOOK_SECONDS
        assert not watch.look((ENOUGH_STEPS + 5, move), now, busy=True)
