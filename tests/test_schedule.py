"Plans are exact in a run of 3 steps and in one of 300,000, levels are the numbers they are said to be, errors name what fits."
import math
import pickle
import re
from dataclasses import FrozenInstanceError
from fractions import Fraction

import pytest
from hypothesis import assume, example, given, strategies as st

from helpers_core import quick
from lth_nb.mask import n_to_cut
from lth_nb.schedule import Schedule, agp, cos, dsd, geometric, iterative, lin, one_cycle, one_shot

TO_TARGET = {'one_shot': one_shot, 'iterative': iterative, 'iterative(7)': iterative(n_steps=7), 'geometric': geometric, 'geometric(50)': geometric(rate=50),
             'geometric(n_steps=5)': geometric(n_steps=5), 'lin': lin, 'cos': cos, 'agp': agp, 'one_cycle': one_cycle}
ALL = {**TO_TARGET, 'dsd': dsd, 'dsd(6)': dsd(n_steps=6)}
schedules = st.sampled_from(sorted(ALL))
runs = st.one_of(st.tuples(st.integers(0, 3), st.integers(1, 40)), st.tuples(st.integers(0, 299_000), st.integers(1, 300_000)))
percentages = st.one_of(st.integers(0, 99).map(float), st.floats(0, 99.9))


@given(schedules, percentages, runs)
@example('agp', 50., (0, 3))
@example('iterative', 50., (0, 3))
@example('agp', 50., (0, 300_000))
@example('iterative(7)', 50., (1, 299_999))
@quick
def test_plans_are_exact(name, sparsity, run):
    schedule, (start, length) = ALL[name], run
    n = schedule.n_prunings(sparsity)
    if n is not None and n > length:
        with pytest.raises(ValueError, match=f'{n} prunings.*only {length} steps'): schedule.plan(sparsity, start, start + length)
        return
    plan = schedule.plan(sparsity, start, start + length)
    steps, levels = [s for s, _ in plan], [v for _, v in plan]
    assert len(plan) == (min(100, length) if n is None else n)
    assert steps[0] == start and all(isinstance(s, int) for s in steps) and steps[-1] < start + length
    assert all(a < b for a, b in zip(steps, steps[1:]))
    gaps = [b - a for a, b in zip(steps, [*steps[1:], start + length])]
    assert max(gaps) - min(gaps) <= 1  # even, as far as whole numbers can be
    assert steps == [start + i*length//len(plan) for i in range(len(plan))]
    assert all(0 <= v <= sparsity for v in levels)
    if name in TO_TARGET:
        assert levels[-1] == sparsity
        assert all(a <= b for a, b in zip(levels, levels[1:]))
    else: assert levels[-1] == 0 and levels[len(levels)//2 - 1] == sparsity
    assert tuple(levels) == schedule.levels(sparsity, len(plan))


@given(st.sampled_from(sorted(n for n in ALL if ALL[n].in_rounds)), percentages, st.integers(0, 9), st.integers(1, 60), st.integers(1, 200))
@quick
def test_rounds_are_whole_epochs_or_the_error_names_what_fits(name, sparsity, first, n_epochs, per_epoch):
    schedule = ALL[name]
    assume(schedule.n_prunings(sparsity) <= n_epochs*per_epoch)

    def plan(until): return schedule.plan(sparsity, first*per_epoch, until*per_epoch, per_epoch, whole_epochs=True)
    n = schedule.n_prunings(sparsity)
    if n_epochs % n == 0:
        assert all(step % per_epoch == 0 for step, _ in plan(first + n_epochs))
        return
    with pytest.raises(ValueError, match='epochs') as e: plan(first + n_epochs)
    named = [int(x) for x in re.findall(r'\d+', re.search(r'a fit of (.*) epochs would do', str(e.value))[1])]
    assert named and all(len(plan(k)) == n for k in named)  # what the message names does fit
    assert len(named) == len(set(named)) and any(k > first + n_epochs for k in named)


def test_a_start_inside_an_epoch_is_named_as_the_trouble():
    "No number of epochs makes rounds whole that begin inside one."
    with pytest.raises(ValueError, match='start_epoch=0.5') as e: iterative.plan(50, 5, 95, 10, whole_epochs=True)
    assert 'would do' not in str(e.value)


@pytest.mark.parametrize('start, end', [(5, 5), (6, 5), (-1, 5)])
def test_a_start_outside_the_fit_is_refused(start, end):
    with pytest.raises(ValueError, match=f'step {start} .* {end}'): iterative.plan(50, start, end)


# ---- levels, against fractions: a count must not depend on how a float was rounded on the way ----

hundredths = st.integers(1, 9999).map(lambda i: i/100)


@given(hundredths, st.integers(1, 40), st.integers(1, 3000))
@example(63/.7, 10, 50)  # 63 % of 50 is 31.5: 32 are cut
@quick
def test_rounds_of_equal_size_cut_the_nearest_count(sparsity, n, n_total):
    for i, level in enumerate(iterative(n_steps=n).levels(sparsity), 1):
        exact = Fraction(str(sparsity))*i/n
        assert n_to_cut(n_total, level) == math.floor(exact*n_total/100 + Fraction(1, 2))
        if (exact*n_total/100).denominator == 1: assert n_to_cut(n_total, level, down=True) == exact*n_total/100


@given(st.integers(1, 99), st.integers(1, 3000), hundredths)
@example(20, 100, 99.)
@example(50, 100, 75.)  # reached exactly
@quick
def test_geometric_rounds_cut_the_same_share_of_what_is_left(rate, n_total, sparsity):
    levels = geometric(rate=rate).levels(sparsity)
    keep = 1 - Fraction(rate, 100)
    assert keep**len(levels) <= 1 - Fraction(str(sparsity))/100 < keep**(len(levels) - 1)  # as many as needed, and no more
    for i, level in enumerate(levels[:-1], 1):
        exact = 100*(1 - keep**i)
        assert math.isclose(level, exact, rel_tol=1e-12)
        if (exact*n_total/100).denominator == 1: assert n_to_cut(n_total, level, down=True) == exact*n_total/100
    assert levels[-1] == sparsity


@given(st.floats(1, 99), st.integers(1, 30))
@quick
def test_geometric_with_a_number_of_rounds_has_equal_rates(sparsity, n):
    left = [1., *(1 - v/100 for v in geometric(n_steps=n).levels(sparsity))]
    rates = [1 - b/a for a, b in zip(left, left[1:])]
    assert len(rates) == n and max(rates) - min(rates) < 1e-6


def test_levels_where_units_must_fit_are_not_a_hair_too_small():
    "20 % of ten rows are two rows, in the first round of a geometric schedule too; 63 of 100 in the seventh of ten."
    assert n_to_cut(10, geometric.levels(80)[0], down=True) == 2
    assert n_to_cut(100, iterative(n_steps=10).levels(90)[6], down=True) == 63
    assert n_to_cut(10, dsd(n_steps=4).levels(80)[0], down=True) == 4


@pytest.mark.parametrize('name', ALL)
def test_schedules_are_values(name):
    "They pickle, hash, compare and cannot be changed; using one leaves no trace in it."
    schedule = ALL[name]
    before = pickle.dumps(schedule)
    first = schedule.plan(60., 10, 400)
    schedule.plan(90., 0, 3000)
    assert schedule.plan(60., 10, 400) == first and pickle.dumps(schedule) == before
    again = pickle.loads(before)
    assert again == schedule and hash(again) == hash(schedule) and again.plan(60., 10, 400) == first
    assert pickle.loads(pickle.dumps(first)) == first
    with pytest.raises(FrozenInstanceError): schedule.n_steps = 9


@pytest.mark.parametrize('bad', [0, -1, 1.5, '3', True, None])
def test_a_number_of_prunings_is_a_whole_number(bad):
    for schedule in (iterative, lin, dsd):
        with pytest.raises(ValueError, match='n_steps='): schedule(n_steps=bad)
    if bad is not None:
        with pytest.raises(ValueError, match='n_steps='): geometric(n_steps=bad)


@pytest.mark.parametrize('bad', [0, 100, -5, 120, math.nan, 'x'])
def test_a_rate_is_a_percentage(bad):
    with pytest.raises(ValueError, match='rate='): geometric(rate=bad)


def test_a_schedule_of_your_own_is_a_curve():
    late = Schedule(lambda p: p**3, n_steps=4, in_rounds=True)
    assert late.levels(64.) == (1., 8., 27., 64.) and late(n_steps=2).levels(64.) == (8., 64.)
