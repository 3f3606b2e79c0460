"""Figures over clusters: values, intervals that cover the truth as often as they say, and pairs of models."""

from __future__ import annotations

import pytest
import torch

from megatron_ext.bias.measures import FIGURES, Measure, _draws, _tail, difference, interval


def test_clusters_add_up_what_is_theirs(rng):
    names = [str(i) for i in torch.randint(5, (40,), generator=rng).tolist()]
    values = torch.randn(40, generator=rng).double()  # whose mean may be near 0
    measure = Measure.mean(names, values)
    assert measure.clusters == tuple(dict.fromkeys(names)) and measure.value == pytest.approx(float(values.mean()))
    for name, (total, count) in zip(measure.clusters, measure.sums.tolist(), strict=True):
        mine = [v for v, n in zip(values.tolist(), names, strict=True) if n == name]
        assert (total, count) == (pytest.approx(sum(mine), abs=1e-6), len(mine))
    again = Measure.from_dict(measure.as_dict())
    assert again.value == measure.value and again.clusters == measure.clusters


def test_figures_follow_their_formulas(rng):
    sums = torch.rand(6, generator=rng).double() + 1
    a, b, c, d, *_ = sums.tolist()
    assert float(FIGURES["mean"](sums)) == pytest.approx(a / b)
    assert float(FIGURES["bbq_bias"](sums)) == pytest.approx(2 * a / b - 1)
    assert float(FIGURES["bbq_ambiguous_bias"](sums)) == pytest.approx((1 - c / d) * (2 * a / b - 1))
    assert float(FIGURES["bbq_bias"](torch.tensor([0.0, 0.0]))) == 0  # nobody was named
    assert float(FIGURES["bbq_bias"](torch.tensor([0.0, 4.0]))) == -1
    x, y = torch.randn(2, 9, generator=rng).double()
    found = Measure.correlation([str(i) for i in range(9)], x, y).value
    assert found == pytest.approx(float(torch.corrcoef(torch.stack([x, y]))[0, 1]))
    shares = torch.tensor([150.0, 140.0, 2.0])  # of two terms: LM 75, SS 70
    assert float(FIGURES["icat"](shares)) == pytest.approx(75 * 30 / 50)


def test_the_tail_is_that_of_student(rng):
    """Of the level that makes up for few clusters, against scipy's distributions."""
    from scipy.stats import norm, t

    for clusters, bound in ((8, 5e-3), (30, 1e-4), (200, 1e-7)):
        expected = norm.cdf((clusters / (clusters - 1)) ** 0.5 * t.ppf(0.025, clusters - 1))
        assert _tail(clusters, 0.95) == pytest.approx(expected, rel=bound)


def test_the_interval_resamples_clusters(rng):
    """With all prompts of a profession alike, its width is that of the professions' mean, however many prompts they have."""
    values = torch.randn(100, generator=rng).double()
    exact = 1.96 * float(values.std()) / 10
    for prompts in (1, 9):
        names = [str(i) for i in range(100) for _ in range(prompts)]
        low, high = interval(Measure.mean(names, values.repeat_interleave(prompts)), samples=4000)
        assert low < float(values.mean()) < high and (high - low) / 2 == pytest.approx(exact, rel=0.12)
    assert interval(Measure.mean(["one"] * 4, values[:4])) is None


def test_models_are_compared_cluster_by_cluster(rng):
    """A constant between two models is certain, though either is not; the order of clusters says nothing."""
    names, values = [str(i) for i in range(50)], torch.randn(50, generator=rng).double()
    order = torch.randperm(50, generator=rng).tolist()
    one, other = Measure.mean(names, values), Measure.mean([names[i] for i in order], values[order] + 0.25)
    found, (low, high) = difference(one, other, samples=200)
    assert (found, low, high) == (pytest.approx(0.25), pytest.approx(0.25), pytest.approx(0.25))
    assert interval(one, 200)[0] < one.value - 0.05
    for wrong in (Measure.mean(names[1:], values[1:]), Measure.of("perplexity", names, torch.ones(50, 2))):
        with pytest.raises(ValueError, match="models are compared on the same questions"):
            difference(one, wrong)


def test_paired_intervals_cover_the_truth(rng):
    """AFGB of two models: professions drawn as clusters, 2,000 times and more, from a population whose truth is known. Rates are
    two-humped, as men's shares are, the second model is the first one's and less biased, and each profession has nine prompts
    or, one in three, four."""
    professions, simulations, blocks, samples = 200, 2000, 5, 5000
    people = 40_000
    lean = _two_humped(people, rng)
    counts = torch.where(torch.rand(people, generator=rng) < 1 / 3, 4.0, 9.0).double()
    noise = torch.randn(2, people, generator=rng).double() / counts.sqrt() / 4
    first = (lean + noise[0]).abs().clamp(max=1)
    second = (0.4 * lean + 0.3 * lean * lean + noise[1]).abs().clamp(max=1)
    sums = torch.stack([second * counts, first * counts, counts], 1)  # [people, 3]
    truth = float((sums[:, 0].sum() - sums[:, 1].sum()) / sums[:, 2].sum())
    tail = torch.tensor([_tail(professions, 0.95), 1 - _tail(professions, 0.95)], dtype=torch.float64)
    covered = 0
    for block in range(blocks):
        drawn = sums[torch.randint(people, (simulations, professions), generator=rng)]  # [simulations, professions, 3]
        gaps = (drawn[..., 0] - drawn[..., 1]).T
        again = [
            (counts @ gaps) / (counts @ drawn[..., 2].T)
            for counts in _draws(professions, samples, int(torch.randint(1 << 30, (1,), generator=rng)))
        ]
        low, high = torch.quantile(torch.cat(again), tail, dim=0)
        covered += int(((low <= truth) & (truth <= high)).sum())
        # The same by the function itself, for one of them.
        measures = [
            Measure("mean", tuple(map(str, range(professions))), drawn[block][:, [column, 2]]) for column in (1, 0)
        ]
        found, (left, right) = difference(*measures, samples=samples)
        assert found == pytest.approx(float(gaps[:, block].sum() / drawn[block, :, 2].sum()))
        assert right - left == pytest.approx(float(high[block] - low[block]), rel=0.15)
    # The deviation of so many is 0.0022, around 0.949: 6 of them.
    assert 0.935 <= covered / (simulations * blocks) <= 0.965


def _two_humped(people: int, rng: torch.Generator) -> torch.Tensor:
    """From -1 to 1, Beta(0.5, 0.5) stretched: the cosine of a uniform angle."""
    return (torch.rand(people, generator=rng).double() * torch.pi).cos()


def test_what_makes_no_interval_is_refused():
    measure = Measure.mean(["a", "b"], torch.ones(2))
    with pytest.raises(ValueError, match="a figure needs questions"):
        Measure.mean([], torch.ones(0))
    with pytest.raises(ValueError, match="got 0 and 0.95"):
        interval(measure, samples=0)
    with pytest.raises(ValueError, match="got 10 and 1"):
        interval(measure, samples=10, level=1)
