"""The depth controller: it drafts where that pays, stops where it does not, and says why."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from statistics import median

import pytest

from engine.decoding.calibration import Drift
from engine.decoding.controller import DepthController, RoundRecord
from engine.decoding.controller_file import load_controller, save_controller
from engine.decoding.costs import RoundCosts

PLAIN = 0.010


def simulate(
    controller: DepthController,
    rounds: int,
    chance: float,
    draft: float,
    row: float,
    limit: int = 7,
    seed: int = 1,
) -> tuple[float, float]:
    """Tokens and seconds of ``rounds`` rounds on a made-up machine.

    Args:
        chance: that a draft is right; its confidence says so truthfully, with some noise.
        draft, row: a draft step and a further row, as shares of a plain step.
    """
    luck, tokens, seconds = random.Random(seed), 0, 0.0
    for _ in range(rounds):
        confidences: list[float] = []
        plan = controller.plan(limit)
        kept = 0
        while plan is not None:
            confidences.append(min(0.99, max(0.01, luck.gauss(chance, 0.1))))
            if not plan.keep(confidences):
                break
            kept += 1
            if not plan.more(confidences):
                break
        accepted = 0
        while accepted < kept and luck.random() < confidences[accepted]:
            accepted += 1
        drafting = PLAIN * draft * len(confidences)
        verifying = PLAIN * (1 + row * kept)
        outcomes = [(each, place < accepted) for place, each in enumerate(confidences[:kept])][: accepted + 1]
        times = drafting, verifying
        if confidences:
            controller.observe(RoundRecord(len(confidences), kept, accepted + 1, *times, tuple(outcomes)))
        else:
            controller.observe_plain(verifying)
        tokens += accepted + 1
        seconds += drafting + verifying
    return tokens, seconds


def speedup(controller: DepthController, **machine: float) -> float:
    tokens, seconds = simulate(controller, 3000, **machine)  # type: ignore[arg-type]
    return tokens / seconds * PLAIN


@pytest.mark.parametrize(
    ("chance", "draft", "row", "at_least"),
    [
        (0.9, 0.1, 0.02, 2.8),  # good drafts, cheap rows
        (0.6, 0.12, 0.02, 1.4),
        (0.5, 0.2, 0.25, 0.97),  # hardly worth it
        (0.41, 0.27, 0.2, 0.985),  # not worth it, and no better at any later try
        (0.1, 0.3, 0.3, 0.97),  # never worth it: off, but for a probe now and then
        (0.0, 0.1, 0.1, 0.97),
    ],
)
def test_never_much_slower_than_plain_and_faster_where_it_pays(
    chance: float, draft: float, row: float, at_least: float
) -> None:
    assert speedup(DepthController(), chance=chance, draft=draft, row=row) >= at_least


def rounds_off(pace: Callable[[int], float], seed: int, rounds: int = 3000) -> float:
    """The share of rounds in which drafting is off, where it gains a tenth, on a machine of changing pace."""
    controller, luck, off = DepthController(), random.Random(seed), 0
    for number in range(rounds):
        hiccup = 3 if luck.random() < 0.03 else 1
        seconds = PLAIN * pace(number) * luck.uniform(0.95, 1.05) * hiccup
        plan, confidences = controller.plan(1), [luck.choice([0.3, 0.6])]
        if plan is None:
            controller.observe_plain(seconds)
        else:
            was_right, kept = luck.random() < confidences[0], int(plan.keep(confidences))
            times = 0.15 * seconds, (1 + 0.15 * kept) * seconds
            outcomes = ((confidences[0], was_right),)
            controller.observe(RoundRecord(1, kept, 1 + (kept and was_right), *times, outcomes))
        off += controller.is_off
    return off / rounds


@pytest.mark.parametrize("period", [40, 150])
def test_other_programs_and_hiccups_do_not_switch_it_off(period: int) -> None:
    """The machine is slower for a while, in which few plain steps are made: that is no reason."""
    shares = [rounds_off(lambda number: 1.0 + 0.5 * (number // period % 2), seed) for seed in range(4)]
    assert max(shares) < 0.2


def test_what_is_slow_for_everything_is_the_machine() -> None:
    costs = RoundCosts(3)
    for pace in (1.0, 2.0, 1.0, 0.5):
        for _ in range(20):
            costs.note_plain(pace)
            costs.note_round(1, 0.2 * pace, 1, False, 1.1 * pace)
        assert costs.pace == pytest.approx(pace, rel=0.05)
        assert costs.measured_plain == pytest.approx(pace) and costs.plain() == pytest.approx(1, rel=0.05)
        assert costs.verify(1) == pytest.approx(1.1, rel=0.05)
    # What was not seen since is taken to have changed alike, and is kept as it is now.
    assert costs.export()["draft"][-1] == pytest.approx(0.1)


def test_hiccups_count_only_as_far_as_plain_steps_have_none() -> None:
    costs = RoundCosts(3)
    for number in range(500):
        costs.note_plain(5.0 if number % 10 == 0 else 1.0)
    # One step in ten counts twice: so do rounds that are held up as often.
    rounds = [costs.without_hiccups(5.0 if number % 10 == 0 else 1.0, 1.0) for number in range(500)]
    assert sum(rounds) / 500 == pytest.approx(1.0, rel=0.05)
    rounds = [costs.without_hiccups(5.0 if number % 5 == 0 else 1.0, 1.0) for number in range(500)]
    assert sum(rounds) / 500 == pytest.approx(1.2 / 1.1, rel=0.05)


def test_bad_drafts_switch_it_off_with_a_sentence() -> None:
    controller = DepthController()
    simulate(controller, 600, chance=0.05, draft=0.4, row=0.3)
    assert controller.is_off
    assert controller.reason is not None
    assert controller.reason.startswith("The accelerated stream is off for now")
    assert controller.reason.endswith(".")
    state = controller.state()
    assert state.is_off
    assert state.plain_tokens_per_second == pytest.approx(1 / PLAIN)


def test_it_comes_back_when_drafts_become_good() -> None:
    controller = DepthController()
    simulate(controller, 400, chance=0.05, draft=0.2, row=0.2)
    assert controller.is_off
    tokens, seconds = simulate(controller, 4000, chance=0.9, draft=0.1, row=0.05)
    assert not controller.is_off
    assert tokens / seconds * PLAIN > 1.5


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_the_limit_is_kept(limit: int) -> None:
    controller = DepthController(fixed=5)
    if limit == 0:
        assert controller.plan(0) is None
        return
    plan = controller.plan(limit)
    assert plan is not None
    made = [0.9]
    while plan.more(made):
        made.append(0.9)
    assert len(made) == limit


def test_more_drafts_from_elsewhere_than_its_own_are_counted() -> None:
    controller = DepthController(max_drafts=3)
    simulate(controller, 30, chance=0.8, draft=0.2, row=0.05)
    for _ in range(2):
        controller.observe(RoundRecord(1, 11, 12, 0.1 * PLAIN, 1.3 * PLAIN, ((0.9, True),)))
    assert controller.export()["times"]["verify 11"] == [1.3 * PLAIN] * 2


def test_what_was_learnt_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "speculation" / "kept.json"
    first = DepthController()
    simulate(first, 300, chance=0.6, draft=0.1, row=0.05)
    save_controller(path, first)
    second = load_controller(path)
    kept, known = second.export(), first.export()
    medians = {kind: [median(times)] for kind, times in known.pop("times").items()}
    assert kept.pop("times") == medians and kept == known
    assert second.state() == first.state()


@pytest.mark.parametrize("kind", ["plain", "draft", "verify 1", "verify 2", "dropped 0"])
@pytest.mark.parametrize("factor", [0.1, 10])
def test_times_of_a_busier_day_do_not_decide_for_good(kind: str, factor: float) -> None:
    machine = {"chance": 0.6, "draft": 0.1, "row": 0.05}
    first, second = DepthController(), DepthController()
    simulate(first, 300, **machine)
    state = first.export()
    state["times"][kind] = [factor * seconds for seconds in state["times"].get(kind, [PLAIN])]
    assert second.restore(state)
    assert speedup(second, **machine) > 0.95 * speedup(first, **machine)


def test_what_was_only_seen_in_a_busy_moment_is_not_shunned_for_good() -> None:
    """Long drafts and dropped ones: the opening schedule measures none of them."""
    machine = {"chance": 0.9, "draft": 0.05, "row": 0.02}
    first, second = DepthController(), DepthController()
    simulate(first, 300, **machine)
    state = first.export()
    for kind in [f"verify {drafts}" for drafts in range(4, 8)] + [f"dropped {drafts}" for drafts in range(7)]:
        state["times"][kind] = [5 * PLAIN]
    assert second.restore(state)
    assert speedup(second, **machine) > 0.97 * speedup(first, **machine)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"version": 1}', '{"version": 99}', "\x00\xff"])
def test_a_damaged_file_is_as_none(tmp_path: Path, content: str) -> None:
    path = tmp_path / "kept.json"
    path.write_text(content, encoding="latin-1")
    assert load_controller(path).export() == DepthController().export()
    assert load_controller(tmp_path / "none.json").export() == DepthController().export()


def test_a_full_disk_costs_nothing_but_the_memory(tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    save_controller(in_the_way / "kept.json", DepthController())  # a folder that cannot be made


def test_plain_steps_of_a_busy_moment_do_not_make_drafts_look_good() -> None:
    controller = DepthController()
    for _ in range(9):
        controller.observe_plain(6.7e-3)  # as long as three of the others
        controller.observe(RoundRecord(1, 1, 1, 0.3e-3, 2.2e-3, ((0.5, False),)))
    assert controller.rate == pytest.approx(1 / 2.2e-3)
    # what people are shown stays what was measured
    assert controller.state().plain_seconds == pytest.approx(6.7e-3)


def test_a_pass_from_when_the_text_was_short_says_nothing_of_a_plain_step_now() -> None:
    controller = DepthController()
    for _ in range(9):
        controller.observe(RoundRecord(3, 3, 2, 1.2e-3, 2.5e-3, ((0.5, True), (0.5, False))))
    for _ in range(200):
        controller.observe_plain(3.5e-3)
    assert controller.rate == pytest.approx(1 / 3.5e-3)


def test_a_text_that_is_harder_than_the_others_is_drafted_less() -> None:
    """Confidences lie in this text; what all answers have taught stays as it is for the next one."""
    controller = DepthController()
    simulate(controller, 300, chance=0.7, draft=0.1, row=0.1)
    drift, fresh, confidences = Drift(), Drift(), [0.7]

    def chance(confidences: list[float], drift: Drift) -> float:
        plan = controller.plan(7, drift)
        assert plan is not None
        return plan.chance(confidences)

    before = chance(confidences, drift)
    for _ in range(12):
        controller.observe(RoundRecord(1, 1, 1, PLAIN * 0.1, PLAIN * 1.1, ((0.7, False),)))
    assert drift.factor < 0.5 and chance(confidences, drift) < 0.5 * before
    assert chance(confidences, fresh) > 0.8 * before
    for _ in range(12):
        controller.observe(RoundRecord(1, 1, 2, PLAIN * 0.1, PLAIN * 1.1, ((0.7, True),)))
    assert chance(confidences, fresh) > before
    assert chance([0.99] * 3, fresh) < 1


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_machine_that_has_changed_is_soon_known(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a core is moved, or something else begins or ends."""
    controller, plain = DepthController(), PLAIN
    simulate(controller, 300, chance=0.6, draft=0.1, row=0.05)
    monkeypatch.setitem(globals(), "PLAIN", plain * factor)
    simulate(controller, 100, chance=0.6, draft=0.1, row=0.05)
    assert controller.state().plain_seconds == pytest.approx(plain * factor)
