"""Sampling: each filter against a slow oracle, distributions by chi-square, seeds, bad values."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.decoding import sampling
from engine.decoding.ranking import Candidates
from engine.decoding.sampling import Sampler
from engine.decoding.seen import SeenTokens
from engine.errors import InvalidRequestError, SlipstreamError
from engine.requests import SamplingParams


@pytest.fixture(scope="module", params=["native", "numpy"], autouse=True)
def way(request: pytest.FixtureRequest) -> Iterator[None]:
    """Everything here holds for both ways of choosing."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "numpy":
            patch.setattr(sampling, "native_choice", lambda *_: None)
        yield


def reference(logits: torch.Tensor, history: list[int], params: SamplingParams) -> list[float]:
    """The documented order, on Python floats with full sorts."""
    scores = logits.double().tolist()
    for token in set(history):
        penalty = params.repetition_penalty
        scores[token] = scores[token] * penalty if scores[token] < 0 else scores[token] / penalty
    top = max(scores)
    weights = [math.exp((score - top) / params.temperature) for score in scores]
    order = sorted(range(len(weights)), key=lambda token: -weights[token])
    if params.top_k:
        order = order[: params.top_k]
    total = sum(weights[token] for token in order)
    kept, mass = [], 0.0
    for token in order:
        if mass >= params.top_p:
            break
        kept.append(token)
        mass += weights[token] / total
    kept = [token for token in kept if weights[token] >= params.min_p * weights[kept[0]]]
    total = sum(weights[token] for token in kept)
    return [weights[token] / total if token in kept else 0.0 for token in range(len(weights))]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    size=st.sampled_from([5, 40, 700, 5000]),
    temperature=st.floats(0.1, 3),
    top_k=st.sampled_from([0, 1, 3, 50, 10_000]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.05, 0.9]),
    penalty=st.sampled_from([1.0, 1.3, 0.7]),
)
def test_probabilities_equal_the_slow_reference(seed, size, temperature, top_k, top_p, min_p, penalty):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(size, generator=generator, dtype=torch.float64) * 3
    history = torch.randint(size, (7,), generator=generator).tolist()
    params = SamplingParams(temperature, top_k, top_p, min_p, penalty)
    got = Sampler(params).probabilities(logits, history)
    expected = torch.tensor(reference(logits, history, params), dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_top_p_beyond_the_first_candidates():
    """A flat distribution needs more candidates than the first partial sort gives."""
    logits = torch.linspace(0.0, 0.01, 20_000)
    kept = int((Sampler(SamplingParams(1.0, top_p=0.9)).probabilities(logits, []) > 0).sum())
    assert 17_900 < kept < 18_050


def test_settings_at_their_defaults_leave_the_softmax():
    logits = torch.randn(100)
    got = Sampler(SamplingParams(temperature=1.0)).probabilities(logits, [1, 2])
    torch.testing.assert_close(got, logits.softmax(0))


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(1.0),
        SamplingParams(0.7, top_k=5),
        SamplingParams(1.5, top_p=0.8),
        SamplingParams(1.0, min_p=0.2),
    ],
)
def test_samples_follow_the_distribution(params: SamplingParams):
    """Chi-square at the 1e-4 level (seeded, so it either always passes or always fails)."""
    draws, size = 4000, 8
    logits = torch.randn(size, generator=torch.Generator().manual_seed(3)) * 1.5
    sampler = Sampler(SamplingParams(params.temperature, params.top_k, params.top_p, params.min_p, seed=1))
    expected = sampler.probabilities(logits, [])
    counts = torch.zeros(size)
    for position in range(draws):
        counts[sampler.choose(logits, range(position))] += 1
    assert counts[expected == 0].sum() == 0
    possible = expected > 0
    chi_square = ((counts - draws * expected)[possible] ** 2 / (draws * expected[possible])).sum()
    assert chi_square < 30.0  # 99.99 % quantile for 7 degrees of freedom: 29.9


def test_a_seed_repeats_and_another_does_not():
    logits = torch.randn(300)

    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingParams(1.0, seed=seed))
        return [sampler.choose(logits, range(position)) for position in range(30)]

    assert draw(5) == draw(5)
    assert draw(5) != draw(6)
    assert draw(None) != draw(None)
    assert draw(-1) == draw(-1)


def test_times_are_exponential_and_independent_of_one_another():
    """Over tokens, positions and seeds that differ by one."""
    from scipy.stats import kstest, pearsonr

    tokens = np.arange(2000)
    times = {
        (seed, position): Sampler(SamplingParams(1.0, seed=seed)).times(tokens, position)
        for seed in (0, 1, 2)
        for position in (0, 1, 2, 64)
    }
    one = Sampler(SamplingParams(1.0, seed=1))
    assert [one._time(token, 64) for token in (0, 1, 7, 1999)] == pytest.approx(times[1, 64][[0, 1, 7, 1999]])
    for seen in times.values():
        assert kstest(seen, "expon").pvalue > 1e-3
        assert abs(pearsonr(seen[1:], seen[:-1]).statistic) < 0.1
    seen = list(times.values())
    for number, one in enumerate(seen):
        assert all(abs(pearsonr(one, other).statistic) < 0.1 for other in seen[:number])


def test_the_many_unlikely_tokens_have_their_share():
    """A vocabulary whose tail, which draws together, weighs as much as its head; and its tokens one as the other."""
    from scipy.stats import chisquare

    logits = torch.full((40_000,), -14.0)
    logits[:3] = torch.tensor([0.0, -0.5, -1.5])
    weights = logits.double().exp()
    assert 0.01 < weights[3:].sum() / weights.sum() < 0.03
    logits[3:] += 3.5
    weights = logits.double().exp()
    expected = torch.stack((*weights[:3], weights[3:20_000].sum(), weights[20_000:].sum()))
    sampler, counts, draws = Sampler(SamplingParams(1.0, seed=2)), torch.zeros(5), 4000
    for position in range(draws):
        token = sampler.choose(logits, range(position))
        counts[token if token < 3 else 3 + (token >= 20_000)] += 1
    assert chisquare(counts, draws * expected / expected.sum()).pvalue > 1e-3


def test_a_draft_from_the_models_own_distribution_is_what_the_model_takes():
    """So that drafts agree as often as the distributions do, at any temperature."""
    logits = torch.randn(300, generator=torch.Generator().manual_seed(1)) * 2
    weights = (logits - logits.max()).exp().numpy()
    candidates = Candidates(np.arange(300), weights, float(weights.sum()), float(logits.max()))
    for temperature in (0.7, 1.0, 1.3):
        sampler, same, taken = Sampler(SamplingParams(temperature, seed=4)), 0, set()
        for position in range(300):
            ((draft, chance),) = sampler.ranking(range(position), ())(candidates, 1.0)
            token = sampler.choose(logits, range(position))
            same += draft == token
            taken.add(token)
            assert 0 < chance <= 1
        assert same > 260 and len(taken) > 5  # but for tokens that are too unlikely to be drafted


def test_where_nearly_all_tokens_are_likely_only_the_likeliest_are_looked_at():
    weights = np.full(8192, 0.9, np.float32)
    heavy = np.arange(256) * 30 + 3
    weights[heavy] = 1
    sampler = Sampler(SamplingParams(2.0, seed=1))
    candidates = Candidates(np.arange(8192), weights, 7e3, 5.0)
    drafted = {sampler.ranking(range(position), ())(candidates, 1.0)[0][0] for position in range(60)}
    assert drafted <= set(heavy.tolist()) and len(drafted) > 40


def test_ranks_fall_and_end_with_the_least_chance():
    def candidates() -> Candidates:
        return Candidates(np.array([7, 9, 4, 2]), np.array([0.3, 1.0, 0.5, 0.01], np.float32), 2.0, 5.0)

    greedy = Sampler(SamplingParams()).ranking([1, 2, 3, 4, 5], [])
    assert greedy(candidates(), 1.0) == ((9, 0.5),)
    assert greedy(candidates(), 0.2) == ((9, 0.5), (4, 0.25))
    sampled = Sampler(SamplingParams(1.0, seed=3)).ranking(range(5), [])(candidates(), 0.0)
    assert [token for token, _ in sampled] != [] and 2 not in [token for token, _ in sampled]
    chances = [chance for _, chance in sampled]
    assert chances == sorted(chances, reverse=True) and sum(chances) == pytest.approx(1)


def test_a_reported_seed_repeats_the_run():
    logits = torch.randn(300)
    unseeded = Sampler(SamplingParams(1.0))
    tokens = [unseeded.choose(logits, range(position)) for position in range(20)]
    again = Sampler(SamplingParams(1.0, seed=unseeded.seed))
    assert [again.choose(logits, range(position)) for position in range(20)] == tokens


def test_greedy_takes_the_lowest_id_of_a_tie():
    logits = torch.zeros(1000)
    logits[[700, 300, 999]] = 2.0
    sampler = Sampler(SamplingParams())
    assert sampler.choose(logits, []) == 300
    assert sampler.probabilities(logits, []).nonzero().flatten().tolist() == [300]


def test_greedy_heeds_the_repetition_penalty():
    logits = torch.tensor([1.0, 3.0, 2.9, -1.0])
    assert Sampler(SamplingParams(repetition_penalty=1.2)).choose(logits, [1]) == 2
    assert logits.tolist() == pytest.approx([1.0, 3.0, 2.9, -1.0])  # the caller's logits are left alone


def test_tiny_temperature_is_greedy():
    logits = torch.randn(100)
    assert Sampler(SamplingParams(1e-30, seed=0)).choose(logits, []) == int(logits.argmax())


def test_sample_never_takes_an_impossible_token():
    sampler = Sampler(SamplingParams(1.0, seed=0))
    weights = np.array([0.0, 0.5, 0.0, 0.5, 0.0])
    shares = [*np.linspace(0, 1, 200), 0.5 - 1e-17, 1 - 1e-17]
    assert {sampler.sample(weights, share) for share in shares} == {1, 3}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_are_a_sentence(temperature: float):
    with pytest.raises(SlipstreamError, match="not numbers"):
        Sampler(SamplingParams(temperature)).choose(torch.full((10,), float("nan")), [])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1), ("temperature", float("nan")), ("temperature", float("inf")),
        ("temperature", "hot"), ("temperature", True), ("temperature", None),
        ("top_k", -1), ("top_k", 2.5), ("top_p", 0.0), ("top_p", 1.01),
        ("top_p", float("nan")), ("min_p", -0.01), ("min_p", 1.5), ("repetition_penalty", 0.0),
        ("repetition_penalty", -2.0), ("repetition_penalty", float("inf")), ("seed", 1.5), ("seed", True),
    ],
)  # fmt: skip
def test_invalid_settings_are_one_sentence(name: str, value: object):
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**{name: value})
    message = str(caught.value)
    assert name in message and message.endswith(".") and "\n" not in message


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    penalty=st.sampled_from([1.1, 1.5, 0.8]),
    temperature=st.sampled_from([0.0, 0.7]),
    drafted=st.lists(st.integers(0, 59), max_size=3),
)
def test_drafts_are_penalized_as_the_models_choice_will_be(seed, penalty, temperature, drafted):
    """Also behind drafts, which are forgotten again."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(60, generator=generator) * 4
    history = torch.randint(60, (20,), generator=generator).tolist()
    order = torch.randperm(60, generator=generator)

    def rank(logits: torch.Tensor, penalty: float) -> tuple[tuple[int, float], ...]:
        weights = (logits[order] - logits.max()).exp().numpy()
        candidates = Candidates(order.numpy(), weights, float(weights.sum()), float(logits.max()))
        sampler = Sampler(SamplingParams(temperature, repetition_penalty=penalty, seed=seed))
        sampler.ranking(history, [5, 7])(replace(candidates, weights=weights.copy()), 0.0)
        return sampler.ranking(history, drafted)(candidates, 0.0)

    penalized = logits.clone()
    for token in {*history, *drafted}:
        penalized[token] = logits[token] * penalty if logits[token] < 0 else logits[token] / penalty
    expected, got = rank(penalized, 1.0), rank(logits, penalty)
    assert [token for token, _ in got] == [token for token, _ in expected]
    assert [chance for _, chance in got] == pytest.approx([chance for _, chance in expected], rel=1e-3)


@pytest.mark.parametrize("penalty", [0.01, 100.0])
def test_drafts_of_extreme_penalties_stay_numbers(penalty):
    candidates = Candidates(np.array([3, 1, 2]), np.array([1.0, 0.5, 0.0], np.float32), 1.5, 20.0)
    ranked = Sampler(SamplingParams(repetition_penalty=penalty)).ranking([1, 2], [])(candidates, 0.0)
    assert ranked[0][0] == (1 if penalty < 1 else 3) and 0 < ranked[0][1] <= 1.01


def test_what_a_growing_text_holds():
    seen, text = SeenTokens(), [5, 3, 5]
    seen.follow(text, 10)
    assert seen.tokens.tolist() == [5, 3] and seen.mask.nonzero()[0].tolist() == [3, 5]
    text += [12, 3, *range(20, 400)]
    seen.follow(text, 10)
    assert seen.tokens.tolist() == [5, 3, 12, *range(20, 400)] and len(seen.mask) == 400
    text[:] = [7]
    seen.follow(text, 10)
    assert seen.tokens.tolist() == [7]
    seen.follow([8, 9], 10)
    assert seen.tokens.tolist() == [8, 9] and seen.mask.sum() == 2
