"What results promise when they are stored, and what the numbers are allowed to say."
import json
import math
import re
import zipfile
from base64 import b64decode
from dataclasses import replace

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from scipy import stats

import lth_nb.report  # puts all methods on Results
from helpers_core import quick
from lth_nb.analysis import against_control, against_dense, p_holm, t_interval
from lth_nb.mask import Mask
from lth_nb.overlap import overlap
from lth_nb.plots import _COLORS, looks
from lth_nb.results import Results, load_mask, save_mask

KINDS = {'dense': ('dense', None, None), 'imp': ('ticket', None, 0), 'late': ('ticket', None, 1), 'reinit': ('control', 'imp', 0),
         'shuffled': ('control', 'late', 1), 'finetune': ('baseline', None, None)}


def network(arm, level, seed, accuracy, sparsity=None, **more):
    "One row, as the experiment writes it."
    kind, of, rewind = KINDS.get(arm, ('baseline', None, None))
    sparsity = 100*(1 - 0.5**level) if sparsity is None else sparsity
    return dict(arm=arm, kind=kind, of=of, rewind=rewind, level=level, sparsity=sparsity, n_kept=64 >> level, n_total=64, seed=seed, epochs=5,
                cost=5*(level + 1), valid_loss=2 - accuracy, accuracy=accuracy, segment=f's{arm}{level}{seed}', mask=f'{arm}-{level}-{seed}' if level else None) | more


def made(values, **more):
    "Results of {(arm, level): accuracies by seed}."
    return Results(tuple(network(arm, level, seed, a, **more) for (arm, level), accuracies in values.items() for seed, a in enumerate(accuracies) if a is not None))


def example(n_seeds=5, levels=3):
    "A dense network, two tickets, a control of each and a baseline, in percents that differ, with history and an arm that failed."
    rng, names = np.random.default_rng(0), ('imp', 'late', 'reinit', 'shuffled', 'finetune')
    values = {('dense', 0): .9 + rng.normal(0, .01, n_seeds)} | {(a, n): .89 - i*.01 + rng.normal(0, .01, n_seeds) for i, a in enumerate(names) for n in range(1, levels + 1)}
    results = made(values)
    history = tuple({k: r[k] for k in ('arm', 'level', 'seed')} | dict(epoch=e, accuracy=r['accuracy'] - 1/e**3) for r in results.rows for e in range(2, 6))
    return replace(results, history=history, failed=(dict(arm='imp', level=3, seed=9, reason='OSError: disk full'),), info=dict(recipe='digits', pruning='global'))


def with_masks(results, path):
    "The same results in a folder that has their masks."
    (path/'masks').mkdir(parents=True)
    for r in results.rows:
        g = torch.Generator().manual_seed(r['seed'])
        if r['mask']: save_mask(Mask({'0.weight': torch.rand(20, 10, generator=g) > r['sparsity']/100, '2.weight': torch.rand(50, generator=g) > .5}), path/'masks'/f'{r["mask"]}.npz')
    return replace(results, path=path)


# Results as files

def test_results_are_read_back_as_they_were(tmp_path):
    odd = (dict(arm='a', level=0, seed=0, of=None, rewind=None, mask=None, sparsity=0, accuracy=.1 + .2, loss=math.inf),
           dict(arm='é, "b"\n', level=1, seed=2**40, of='a', rewind=0, mask='x', sparsity=12.5, accuracy=1e-300, extra=3))
    history = (dict(arm='a', level=0, seed=0, epoch=1, loss=.1 + .2),)
    results = Results(odd, history, (dict(arm='a', level=1, seed=0, reason='x\ny'),), None, {'recipe': 'r', 'seconds': 1.5})
    assert results.save(tmp_path) is results
    loaded = Results.load(tmp_path)
    assert (loaded.rows, loaded.history, loaded.failed, loaded.info, loaded.path) == (odd, history, results.failed, results.info, tmp_path)
    assert len(results.frame) == 2 and sorted(f.name for f in tmp_path.iterdir()) == ['epochs.jsonl', 'results.csv', 'results.json', 'results.parquet']


def test_the_files_are_strict_json_and_hold_what_is_not_finite(tmp_path):
    results = Results((network('a', 0, 0, math.nan),), (dict(arm='a', level=0, seed=0, epoch=1, loss=math.nan, accuracy=-math.inf),), info={'x': [math.nan]})
    results.save(tmp_path)
    refuse = lambda word: pytest.fail(f'{word} is no JSON')
    for line in [*(tmp_path/'epochs.jsonl').read_text().splitlines(), (tmp_path/'results.json').read_text()]: json.loads(line, parse_constant=refuse)
    loaded = Results.load(tmp_path)
    assert math.isnan(loaded.rows[0]['accuracy']) and math.isnan(loaded.history[0]['loss'])


def test_no_results_are_results(tmp_path):
    Results().save(tmp_path)
    assert Results.load(tmp_path) == Results(path=tmp_path)
    with pytest.raises(ValueError, match='holds no results: there is no results.parquet'): Results.load(tmp_path/'elsewhere')


def test_what_cannot_be_written_leaves_the_old_files(tmp_path):
    example().save(tmp_path)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    with pytest.raises(TypeError): replace(example(), history=(dict(arm='a', level=0, seed=0, epoch=object()),)).save(tmp_path)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before


names = st.text(min_size=1, max_size=8)
shapes = st.lists(st.integers(0, 5), max_size=3)

@quick
@given(st.dictionaries(names, shapes, max_size=4), st.integers(0, 2**32), st.data())
def test_any_mask_is_read_back(tmp_path_factory, shapes, seed, data):
    g = torch.Generator().manual_seed(seed)
    mask = Mask({n: torch.rand(s, generator=g) > .5 for n, s in shapes.items()}, data.draw(st.sets(st.sampled_from(sorted(shapes)))) if shapes else ())
    file = tmp_path_factory.mktemp('mask')/'m.npz'
    save_mask(mask, file)
    assert load_mask(file) == mask and list(load_mask(file)) == list(mask)


def test_a_mask_file_is_the_same_bytes_whenever_it_is_written(tmp_path):
    mask = Mask({'a': torch.arange(9) > 4, 'b': torch.ones(3, dtype=torch.bool)}, ['b'])
    save_mask(mask, tmp_path/'1.npz')
    assert all(i.date_time == (1980, 1, 1, 0, 0, 0) for i in zipfile.ZipFile(tmp_path/'1.npz').infolist())
    save_mask(load_mask(tmp_path/'1.npz'), tmp_path/'2.npz')
    assert (tmp_path/'1.npz').read_bytes() == (tmp_path/'2.npz').read_bytes()
    assert np.load(tmp_path/'1.npz', allow_pickle=False)['bits'].tolist() == [0b00000111, 0b10000000, 0b11100000]


def test_a_damaged_mask_file_is_refused_or_harmless(tmp_path):
    mask, file = Mask({'a': torch.arange(40).view(5, 8) % 3 == 0}), tmp_path/'m.npz'
    save_mask(mask, file)
    whole = file.read_bytes()
    damaged = [whole[:n] for n in range(len(whole))] + [whole[:i] + bytes([whole[i] ^ 1 << b]) + whole[i + 1:] for i in range(len(whole)) for b in (0, 5)]
    refused = 0
    for data in damaged:
        file.write_bytes(data)
        try: assert load_mask(file) == mask
        except ValueError as e: refused += 'is not the file of a mask' in str(e)
    assert refused > len(whole)  # every truncation, and whatever touches the content


def test_a_mask_file_with_too_few_bits_is_refused(tmp_path):
    save_mask(Mask({'a': torch.ones(40, dtype=torch.bool)}), tmp_path/'m.npz')
    with np.load(tmp_path/'m.npz') as f: header, bits = f['header'], f['bits']
    np.savez(tmp_path/'m.npz', header=header, bits=bits[:-1])
    with pytest.raises(ValueError, match='asks for 5 bytes and it has 4'): load_mask(tmp_path/'m.npz')


def test_a_mask_file_executes_nothing(tmp_path):
    np.savez(tmp_path/'m.npz', header=np.array([{}], dtype=object), bits=np.zeros(1, np.uint8))
    with pytest.raises(ValueError, match='allow_pickle'): load_mask(tmp_path/'m.npz')


def test_parts_and_sums(tmp_path):
    results = example()
    assert {r['arm'] for r in results.only('imp').rows} == {'imp'} and {h['arm'] for h in results.only('imp').history} == {'imp'}
    assert results.only('imp').failed == results.failed and results.only('dense').failed == ()
    assert [(r['arm'], r['level'], r['seed']) for r in results.only('imp', 2, range(2)).rows] == [('imp', 2, 0), ('imp', 2, 1)]
    a, b = results.only(seeds=[0, 1, 2]), results.only(seeds=[2, 3, 4])
    joined = a + b
    assert {(r['arm'], r['level'], r['seed']) for r in joined.rows} == {(r['arm'], r['level'], r['seed']) for r in results.rows} and len(joined.rows) == len(results.rows)
    assert len(joined.history) == len(results.history) and joined.info == results.info
    with pytest.raises(ValueError, match='differs in accuracy'): results + replace(results, rows=(results.rows[0] | dict(accuracy=0.),))
    with pytest.raises(ValueError, match='differs in sparsity'): results + replace(results, rows=(network('imp', 1, 99, .9, sparsity=87.5),))
    with pytest.raises(ValueError, match='different recipe'): results + replace(results, info=dict(recipe='other', pruning='global'))


def test_a_seed_is_not_put_together_from_different_code_or_data():
    results = example()
    a, b = (replace(results, info=results.info | dict(base=base, seeds=list(range(5)))) for base in 'xy')
    with pytest.raises(ValueError, match='different code .* they share seed 0'): a.only(['dense', 'imp']) + b.only('reinit')
    with pytest.warns(UserWarning, match='different versions'): a.only(['dense', 'imp']) + replace(b, info=b.info | dict(versions=dict(torch='9'))).only('reinit')
    with pytest.warns(UserWarning, match='different code'): assert len((a.only(seeds=[0, 1]) + b.only(seeds=[2, 3, 4])).rows) == len(results.rows)
    with pytest.warns(UserWarning, match='different code'): a.only(seeds=[0, 1]) + b.only(['dense', 'imp'], seeds=[2, 3]) + b.only('reinit', seeds=[2, 3])
    assert len((a.only('dense') + results.only('imp')).rows) == 20 # written when results did not name it


def test_whole_units_cut_differ_between_seeds_and_belong_together():
    "Filters fit 50 % more or less closely, and where masks lie depends on the folder."
    a, b = (replace(made({('dense', 0): [.9]*4, ('imp', 1): [.9]*4}).only(seeds=seeds), info=dict(arms=['dense', 'imp'], seeds=seeds, levels=[50.])) for seeds in ([0, 1], [1, 2, 3]))
    b = replace(b, rows=tuple(r | dict(sparsity=r['sparsity'] and 48., mask=r['mask'] and f'../{r["mask"]}') if r['seed'] > 1 else r | dict(mask=r['mask'] and f'../{r["mask"]}') for r in b.rows))
    joined = a + b
    assert len(joined.rows) == 8 and joined.compare('imp', 'dense', sparsity=49).sparsity[0] == 49
    with pytest.raises(ValueError, match='differs in sparsity'): a + replace(b, info=b.info | dict(levels=[60.]))


def test_results_are_found_from_another_folder(tmp_path, monkeypatch):
    with_masks(example(2), tmp_path/'run').save(tmp_path/'run')
    monkeypatch.chdir(tmp_path)
    loaded = Results.load('run')
    monkeypatch.chdir('/')
    assert loaded.mask('imp', 1, 0)


def test_a_nan_that_is_in_both_is_no_difference():
    a = made({('dense', 0): [math.nan, .9]})
    assert len((a + made({('dense', 0): [float('nan'), .9]})).rows) == 2


def test_what_failed_once_and_is_done_elsewhere_has_not_failed():
    a = Results(failed=(dict(arm='dense', level=0, seed=0, reason='killed'), dict(arm='dense', level=0, seed=1, reason='killed')))
    assert [f['seed'] for f in (a + made({('dense', 0): [.9]})).failed] == [1]


def test_joined_results_find_their_masks_and_so_do_saved_ones(tmp_path):
    a, b = (with_masks(example().only(seeds=s), tmp_path/n) for n, s in (('a', [0, 1]), ('b', [2, 3])))
    joined = a + b
    assert joined.mask('imp', 2, 0) == a.mask('imp', 2, 0) and joined.mask('imp', 2, 3) == b.mask('imp', 2, 3)
    joined.save(tmp_path/'c')
    assert Results.load(tmp_path/'c').mask('imp', 2, 0) == a.mask('imp', 2, 0)
    b.save(tmp_path/'b')
    assert Results.load(tmp_path/'b').rows == b.rows


# Intervals and comparisons

@quick
@given(st.lists(st.floats(-100, 100), min_size=2, max_size=8).filter(lambda v: np.ptp(v) > 1e-3), st.sampled_from([80, 90, 95, 99]))
def test_intervals_are_scipys(values, confidence):
    expected = stats.ttest_1samp(values, 0).confidence_interval(confidence/100)
    np.testing.assert_allclose(t_interval(values, confidence), (np.mean(values), expected.low, expected.high), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(t_interval([values, values], confidence)[1], [expected.low]*2, rtol=1e-9, atol=1e-9)


def test_differences_are_taken_within_seeds():
    "Seeds that differ by ten points, and a difference of one point in each, more or less."
    a, b = [.81, .90, .715], [.80, .89, .70]
    row = made({('imp', 1): a, ('dense', 0): b[::-1]}).compare('imp', 'dense').iloc[0]
    paired = made({('imp', 1): a, ('dense', 0): b}).compare('imp', 'dense').iloc[0]
    expected = stats.ttest_rel(a, b)
    np.testing.assert_allclose([paired.difference, paired.p, paired.low], [100*np.mean(np.subtract(a, b)), expected.pvalue, 100*expected.confidence_interval().low])
    assert row.low < -20 and paired.low > 0


def test_pairs_of_one_call_share_the_confidence():
    results = example()
    one, three = results.compare('imp', 'dense'), results.compare(('imp', 'dense'), ('late', 'dense'), ('imp', 'reinit'))
    d = results.by_seed()['imp', 3] - results.by_seed()['dense', 0]
    np.testing.assert_allclose([one.low[0], three.low[0]], [t_interval(d, 95)[1], t_interval(d, 100 - 5/3)[1]])
    assert three.low[0] < one.low[0] and three.p[0] == one.p[0] and (three.p_holm >= three.p).all() and three.p_holm.min() == pytest.approx(3*three.p.min())


def test_missing_pairs_are_left_out_and_said():
    results = made({('imp', 1): [.9, .91, math.nan, .93, .90], ('dense', 0): [.9, None, .9, .9, math.inf]})
    row = results.compare('imp', 'dense').iloc[0]
    assert row.n_seeds == 2 and row.note == 'no pair in seed 1; imp has no finite number in seed 2; dense has no finite number in seed 4' and row.difference == pytest.approx(1.5)
    assert list(results.table()[['n_seeds', 'missing']].itertuples(index=False, name=None)) == [(4, 1), (3, 2)]


def test_one_seed_has_a_mean_and_nothing_else():
    results = made({('imp', 1): [.91], ('dense', 0): [.90]})
    row = results.compare('imp', 'dense').iloc[0]
    assert row.difference == pytest.approx(1) and np.isnan([row.low, row.high, row.p, row.p_holm]).all() and 'one seed has no interval' in row.note
    assert np.isnan(results.table().low).all() and set(results.verdict().frame.verdict) == {'not enough seeds'}
    none = made({('imp', 1): [.91, None], ('dense', 0): [None, .90]})
    assert none.compare('imp', 'dense').n_seeds[0] == 0 and none.verdict().frame.verdict[0] == 'not enough seeds'


def test_equal_differences_are_said_and_raise_no_warning(recwarn):
    same, more = (made({('imp', 1): np.array([.9, .91, .92]) + d, ('dense', 0): [.9, .91, .92]}) for d in (0, .01))
    assert same.compare('imp', 'dense').p[0] == 1 and np.isnan(more.compare('imp', 'dense').p[0])
    rounded = made({('imp', 1): np.float32([340/360, 341/360, 352/360]).astype(float), ('dense', 0): np.float32([339/360, 340/360, 351/360]).astype(float)})
    assert rounded.compare('imp', 'dense').note[0] == 'the same difference in every seed'
    assert 'the same difference in every seed' in same.compare('imp', 'dense').note[0] and 'the same difference' in more.verdict().lines[0][1]
    assert not recwarn.list


def test_what_diverged_is_not_left_out_of_a_verdict():
    "A ticket that is better in every seed in which it did not diverge."
    dense = [.90, .91, .89, .90, .91]
    whole, lost = (made({('dense', 0): dense, ('imp', 1): imp, ('reinit', 1): [.89, .90, .88, .89, .90]}) for imp in ([.92, .94, .91, .92, .93], [.92, .94, .91, math.nan, .93]))
    assert list(whole.verdict().frame.verdict) == ['winning', 'better']
    found = lost.verdict()
    assert list(found.frame.verdict) == ['undecided', 'no difference shown'] and found.frame[['low', 'high']].isna().all(axis=None) and (found.frame.n_seeds == 4).all() and found.frame.difference.min() > 1
    assert 'bounds – and –' in found.lines[0][1] and 'More seeds' not in found.lines[0][1] and 'More seeds' in made({('dense', 0): dense, ('imp', 1): dense[::-1]}).verdict(.1).lines[0][1] and 'With `dense`: imp has no finite number in seed 3.' in found.lines[0][1]
    missing = made({('dense', 0): dense, ('imp', 1): [.92, .94, .91, None, .93]}) # not run: that says nothing of the ticket
    assert missing.verdict().frame.verdict[0] == 'winning'


@pytest.mark.parametrize('unit', [1, 1e-3, 1e-6])
def test_small_numbers_are_compared_like_large_ones(unit):
    "Differences of a hundred thousandth in a metric that is itself of that size are no rounding."
    imp, dense = unit*np.array([.90, .91, .89, .92]), unit*np.array([.95, .94, .96, .93])
    found, row = with_metric('mse', dense, imp), stats.ttest_rel(imp, dense)
    [compared] = found.compare('imp', 'dense', metric='mse').to_dict('records')
    np.testing.assert_allclose([compared[k] for k in ('difference', 'low', 'high', 'p')], [np.mean(imp - dense), *row.confidence_interval(), row.pvalue], rtol=1e-6)
    assert not compared['note'] and found.verdict(.1*unit, 'mse').frame.verdict[0] == 'winning'
    assert not re.search(r'0\.00\b', found.verdict(.1*unit, 'mse').lines[0][1])


def test_what_rounding_leaves_of_nothing_is_nothing():
    a, b = np.float32([61/100, 62/100, 60/100]).astype(float), np.float32([60/100, 61/100, 62/100]).astype(float)
    row = made({('imp', 1): a, ('dense', 0): b}).compare('imp', 'dense').iloc[0]
    assert abs(row.difference) < 1e-12 and row.low == -row.high


@pytest.mark.parametrize('none', [None, math.nan])
def test_an_outlier_without_a_pair_hides_nothing(none):
    dense, imp = [.30, .31, .29, 1e6], [.50, .52, .51, none]
    rows = [network(arm, level, seed, .5, valid_loss=v) for arm, level, values in (('dense', 0, dense), ('imp', 1, imp)) for seed, v in enumerate(values) if v is not None]
    rows = [r | dict(valid_loss=v) for r, v in zip(rows, [*dense, *(v for v in imp if v is not None)])]
    found = Results(tuple(rows)).compare('imp', 'dense', metric='valid_loss')
    assert found.difference[0] == pytest.approx(.21) and found.low[0] > 0


def test_a_comparison_without_a_number_counts_among_the_corrections():
    np.testing.assert_allclose(p_holm([.01, math.nan]), [.02, math.nan])
    np.testing.assert_allclose(p_holm([.01, .04, .03]), [.03, .06, .06])


def test_levels_and_sparsities_are_found():
    results = example()
    assert list(results.compare(('imp', 'dense'), ('imp', 'reinit'), level=2)[['level', 'other_level']].itertuples(index=False, name=None)) == [(2, 0), (2, 2)]
    assert list(results.compare('imp', 'dense', sparsity=50)[['level', 'other_level']].iloc[0]) == [1, 0]
    mixed = Results(results.rows + made({('oneshot', 1): [.9, .91, .9]}, sparsity=60.).rows)
    assert mixed.compare('imp', 'oneshot').note[0].endswith('sparsity 87.50 against 60.00')


@pytest.mark.parametrize('call, says', [
    (lambda r: r.compare('imp'), "pairs=('imp',) are no comparisons"),
    (lambda r: r.compare(), 'pairs=() are no comparisons'),
    (lambda r: r.compare('imp', 'sense'), "arm='sense' is not in these results, which have ['dense', 'imp'"),
    (lambda r: r.compare('imp', 'dense', level=7), "level=7 of 'imp' is not in these results, which have [1, 2, 3]"),
    (lambda r: r.compare('imp', 'dense', sparsity=90), "sparsity=90 of 'imp' is not in these results, which have [50.0, 75.0, 87.5]"),
    (lambda r: r.compare('imp', 'dense', metric='top5'), "metric='top5' is not in these results"),
    (lambda r: r.compare('imp', 'dense', confidence=.95), 'confidence=0.95 is not a percentage'),
    (lambda r: r.table(confidence=100), 'confidence=100 is not a percentage'),
    (lambda r: r.verdict(margin=-1), 'margin=-1 is no loss'),
    (lambda r: r.verdict(margin=math.nan), 'margin=nan is no loss'),
    (lambda r: r.verdict(min_seeds=1), 'min_seeds=1 is no number of seeds'),
    (lambda r: r.verdict(min_seeds=True), 'min_seeds=True is no number of seeds'),
    (lambda r: r.verdict(margin=True), 'margin=True is no loss'),
    (lambda r: r.verdict(margin='1'), "margin='1' is no loss"),
    (lambda r: r.table(confidence='95'), "confidence='95' is not a percentage"),
    (lambda r: r.only('imp').verdict(), "no arm of kind 'dense'"),
    (lambda r: r.only(seeds=[77]), 'seeds=[77] not in these results'),
    (lambda r: r.plot_epochs('top5'), "metric='top5' is not in the history"),
    (lambda r: r.plot_sparsity(arms='sense'), "arm='sense' is not in these results"),
    (lambda r: r.mask('dense', 0, 0), 'has no mask'),
])
def test_wrong_arguments_are_named(call, says):
    with pytest.raises(ValueError) as error: call(example())
    assert says in str(error.value)


# Verdicts

N, MARGIN = 2000, 1.
TOO_MANY = stats.binom.ppf(.999, N, .05)  # counts above come once in a thousand from a rate of 5 %
TOO_FEW = stats.binom.ppf(.001, N, .05)   # and counts below: then the bounds would be wider than they say

def simulated(truth, n_seeds):
    "How many of N experiments get each verdict, where differences have standard deviation 1."
    words, _, _ = against_dense(np.random.default_rng(n_seeds).normal(truth, 1, (N, n_seeds)), MARGIN)
    return {word: (words == word).sum() for word in ('winning', 'worse', 'undecided')}


@pytest.mark.parametrize('n_seeds', [3, 5, 10, 30])
def test_a_ticket_that_loses_the_margin_wins_in_5_percent(n_seeds):
    counts = simulated(-MARGIN, n_seeds)
    assert TOO_FEW <= counts['winning'] <= TOO_MANY and TOO_FEW <= counts['worse'] <= TOO_MANY


def test_a_ticket_as_good_as_dense_is_found_with_ten_seeds():
    counts = simulated(0, 10)
    assert counts['worse'] <= TOO_MANY and counts['winning'] >= .85*N


def test_a_ticket_that_loses_twice_the_margin_never_wins():
    counts = simulated(-2*MARGIN, 10)
    assert counts['winning'] == 0 and counts['worse'] >= .80*N


@pytest.mark.parametrize('n_comparisons', [1, 2, 6])
def test_controls_as_good_as_the_ticket_are_beaten_in_5_percent_of_all_calls(n_comparisons):
    d = np.random.default_rng(0).normal(0, 1, (N, n_comparisons, 10))
    any_claim = (against_control(d, n_comparisons)[0] != 'no difference shown').any(1).sum()
    assert TOO_FEW*.8 <= any_claim <= TOO_MANY  # Bonferroni is a little strict


def test_the_method_says_what_the_functions_say():
    "Whole experiments, with the differences in place."
    rng, found = np.random.default_rng(1), []
    for _ in range(25):
        d, c = rng.normal(-.5, 1, 6), rng.normal(1, 1, 6)
        frame = made({('dense', 0): [.9]*6, ('imp', 1): .9 + d/100, ('reinit', 1): .9 + (d - c)/100}).verdict(MARGIN).frame
        assert list(frame.verdict) == [against_dense(d, MARGIN)[0], against_control(c, 1)[0]]
        np.testing.assert_allclose(frame.low, [t_interval(d, 90)[1], t_interval(c, 95)[1]])
        found += list(frame.verdict)
    assert {'winning', 'undecided', 'better', 'no difference shown'} <= set(found)


def test_every_level_of_every_ticket_is_judged_against_dense_and_its_own_controls():
    frame = example().verdict().frame
    assert list(frame[['arm', 'level', 'other']].itertuples(index=False, name=None)) == [
        (arm, level, other) for arm, control in (('imp', 'reinit'), ('late', 'shuffled')) for level in (1, 2, 3) for other in ('dense', control)]
    seen = example().by_seed()
    np.testing.assert_allclose(frame.difference[3], (seen['imp', 2] - seen['reinit', 2]).mean())
    assert not set(frame[frame.arm == 'late'].verdict) & {'winning'} and not set(frame[frame.arm == 'imp'].verdict) & {'matching'}
    one = example().verdict(level=2).frame
    assert set(one.level) == {2} and (one.low[one.kind == 'control'].values > frame.low[(frame.kind == 'control') & (frame.level == 2)].values).all()


def test_dense_at_the_tickets_level_is_never_a_ticket():
    results = example()
    shared = tuple(r | dict(arm='imp', kind='ticket', mask=None) for r in results.rows if r['arm'] == 'dense')
    assert set(Results(shared + results.rows).verdict().frame.level) == {1, 2, 3}


def test_rewound_to_later_is_matching():
    values = {('dense', 0): [.9, .91, .9], ('imp', 1): [.9, .91, .901], ('late', 1): [.9, .91, .901]}
    assert list(made(values).verdict().frame.verdict) == ['winning', 'matching']


def test_less_is_better_for_a_loss():
    good = made({('dense', 0): [.9, .91, .9], ('imp', 1): [.9, .91, .901], ('reinit', 1): [.8, .812, .79]})
    frame = good.verdict(.05, metric='valid_loss').frame
    assert list(frame.verdict) == ['winning', 'better'] and frame.difference[1] < 0 and (frame.low < frame.high).all()
    bad = made({('dense', 0): [.9, .91, .9], ('imp', 1): [.8, .812, .79]})
    assert bad.verdict(.05, metric='valid_loss').frame.verdict[0] == 'worse'


def test_the_words_say_what_is_missing():
    winning = {('dense', 0): [.9, .91, .9, .9], ('imp', 1): [.9, .91, .901, None]}
    text = made(winning).verdict().lines[0][1]
    assert 'No control was run here' in text and 'With `dense`: no pair in seed 3.' in text
    text = made(winning | {('reinit', 1): [.9, .91, .90, .9]}).verdict().lines[0][1]
    assert '`reinit` may do as well or better' in text and 'No difference from `reinit` shown' in text
    text = made(winning | {('reinit', 1): [.8, .811, .802, .8]}).verdict().lines[0][1]
    assert 'Better than `reinit`' in text and 'nothing shows' not in text and 'as well or better' not in text
    text = made({('dense', 0): [.9, .95, .85], ('imp', 1): [.9, .9, .9]}).verdict().lines[0][1]
    assert text.startswith('undecided') and 'nothing shows' not in text
    assert 'ticket to judge' in example().only(['dense', 'finetune']).verdict()._repr_markdown_()


# Pictures

SETTINGS = dict(matplotlib.rcParams)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "Results with masks, and their page."
    results = with_masks(example(), tmp_path_factory.mktemp('run'))
    return results, results.report(results.path/'report.html', margin=2)


def test_pictures_use_the_axes_they_are_given_and_leave_the_settings_alone(run):
    results, _ = run
    for draw in (results.plot_arms, results.plot_sparsity, results.plot_epochs, results.plot_layers, results.plot_overlap):
        ax = matplotlib.figure.Figure().subplots()
        assert draw(ax=ax) is ax and ax.has_data() and ax.get_xlabel()
        fresh = draw()
        assert fresh.figure.get_facecolor() == (1, 1, 1, 1)  # black text on it can be read in a dark notebook
        plt.close(fresh.figure)
    assert dict(matplotlib.rcParams) == SETTINGS and not plt.get_fignums()


def test_a_page_explains_the_columns_it_shows():
    compared = example().compare('imp', 'dense')
    assert 'p_holm: corrected' in lth_nb.report.table_html(compared, 'all') and 'p_holm' not in lth_nb.report.table_html(compared[['arm', 'difference']], 'some')


@pytest.mark.parametrize('plot', ['plot_arms', 'plot_sparsity', 'plot_epochs', 'plot_layers'])
def test_an_arm_looks_as_it_is_told(run, plot):
    results, _ = run
    def colours(**styles):
        ax = getattr(results, plot)(ax=matplotlib.figure.Figure().subplots(), **styles)
        filled = [c for artist in (*ax.collections, *ax.patches) for c in artist.get_edgecolor() if len(artist.get_edgecolor())] if plot == 'plot_layers' else []
        bands = [artist.get_facecolor()[0] for artist in ax.collections] if plot in ('plot_sparsity', 'plot_epochs') else filled
        return [matplotlib.colors.to_hex(c) for c in (*(line.get_color() for line in ax.lines), *bands)]
    before, after = colours(), colours(styles={'imp': dict(c='#123456'), 'not among them': dict(color='red')})
    assert after == ['#123456' if c == looks(results)['imp']['color'].lower() else c for c in before] != before
    with pytest.raises(ValueError, match="keywords for 'imp', as dict"): colours(styles=dict(imp='red'))
    assert looks(results, dict(reinit=dict(lw=3)))['reinit'] == looks(results)['reinit'] | dict(linewidth=3)


def test_every_seed_is_a_dot_and_the_mean_is_where_it_should_be():
    results = example()
    ax = results.plot_arms(ax=matplotlib.figure.Figure().subplots())
    dots = ax.lines[0]
    np.testing.assert_allclose(dots.get_xdata(), results.by_seed()['dense', 0])
    assert max(dots.get_ydata()) < min(ax.lines[1].get_ydata())  # the axis grows downward
    assert [t.get_text() for t in ax.get_yticklabels()] == list(KINDS)
    some = results.plot_arms(arms=['shuffled', 'imp'], ax=matplotlib.figure.Figure().subplots())
    assert [t.get_text() for t in some.get_yticklabels()] == ['shuffled', 'imp'] and some.lines[0].get_color() == looks(results)['shuffled']['color']


def test_the_training_loss_is_said_to_be_a_mean_over_the_last_epoch():
    results = made({('dense', 0): [.9, .91], ('imp', 1): [.8, .82]}, train_loss=.5)
    for said in (results.table('train_loss'), results.compare('imp', 'dense', metric='train_loss')): assert 'over the last epoch' in said.attrs['note']
    assert 'after the last step' in example().compare('imp', 'dense').attrs['note']


def test_high_sparsities_have_room():
    results = made({('dense', 0): [.9, .91]} | {('imp', n): [.9, .91] for n in range(1, 11)})
    ax = results.plot_sparsity(ax=matplotlib.figure.Figure().subplots())
    place = lambda sparsity: ax.transAxes.inverted().transform(ax.transData.transform((100 - sparsity, 90)))[0]
    assert place(50) < place(75) < place(99) and place(99) - place(98) == pytest.approx(place(50) - place(0), rel=1e-6)
    assert [float(t.get_text()) for t in ax.get_xticklabels()] == [50, 80, 90, 95, 98, 99, 99.5, 99.8, 99.9]


@pytest.mark.filterwarnings('error')
def test_one_level_and_one_seed_can_be_drawn():
    results = made({('dense', 0): [.9], ('imp', 1): [.8]})
    for draw in (results.plot_sparsity, results.plot_arms): assert draw(ax=matplotlib.figure.Figure().subplots()).has_data()


def test_arms_are_told_apart():
    many = Results(tuple(network(f'arm {i}', 1, 0, .9) for i in range(20)))
    styles = [(s['color'], s['marker']) for s in looks(many).values()]
    assert len(set(styles)) == 20

    def luminance(color):
        c = np.array(matplotlib.colors.to_rgb(color))
        return np.where(c <= .04045, c/12.92, ((c + .055)/1.055)**2.4) @ [.2126, .7152, .0722]
    contrast = lambda a, b: (max(luminance(a), luminance(b)) + .05)/(min(luminance(a), luminance(b)) + .05)
    dark = re.search(r'dark\)\{:root\{--ink:#\w+;--paper:(#\w+)', lth_nb.report._STYLE)[1]
    assert all(contrast(c, paper) >= 3 for c in (*_COLORS, 'grey') for paper in ('white', dark))


# Masks

def test_chance_is_what_shuffled_masks_have_in_common():
    g = torch.Generator().manual_seed(0)
    mask = Mask({'0.weight': torch.rand(40, 50, generator=g) > .8, '2.weight': torch.rand(300, generator=g) > .4})
    found = [overlap(mask, mask.shuffled(seed)) for seed in range(20)]
    assert np.mean([f[0] for f in found]) == pytest.approx(found[0][1], abs=.5) and overlap(mask, mask)[0] == 100
    other = mask.shuffled(0)
    assert overlap(mask, other) == overlap(other, mask)


def test_followers_are_no_overlap():
    a = Mask({'w': torch.tensor([True, False]), 'b': torch.tensor([True, True])}, ['b'])
    b = Mask({'w': torch.tensor([False, True]), 'b': torch.tensor([True, True])}, ['b'])
    assert overlap(a, b)[0] == 0


def test_layers_and_pairs_of_a_run(tmp_path):
    results = with_masks(example(n_seeds=3), tmp_path)
    layers, pairs = results.layers(), results.overlaps(['imp', 'late'])
    assert list(dict.fromkeys(layers.arm)) == ['imp', 'late', 'finetune'] and len(layers) == 3*3*2 and set(layers.level) == {3}
    mask = results.mask('imp', 3, 0)
    assert layers.sparsity[0] == pytest.approx(100*(1 - mask['0.weight'].float().mean().item()))
    assert len(pairs) == 3 + 2*3 and set(pairs[(pairs.arm != pairs.other)].overlap) == {100}  # the example's masks depend on the seed alone
    assert (pairs.arm == pairs.other).eq(pairs.seed != pairs.other_seed).all()


# The page

HOSTILE = '<img src=x onerror=alert(1)>&"\'`</script>'

def test_nothing_in_a_name_becomes_markup(tmp_path):
    rename = lambda r: {k: HOSTILE if v == 'imp' else v for k, v in r.items()}
    results = example()
    results = Results(tuple(map(rename, results.rows)), tuple(map(rename, results.history)), (dict(arm=HOSTILE, level=HOSTILE, seed=HOSTILE, reason=HOSTILE),),
                      info={HOSTILE: HOSTILE, 'deep': {HOSTILE: [HOSTILE]}})
    page = results.report(tmp_path/'r.html', title=HOSTILE).read_text()
    assert '<img src=x' not in page and 'script>' not in page and page.count('<img ') == page.count('<img src="data:image/svg+xml;base64,') == 3
    assert page.count('&lt;img src=x') > 10


def test_the_page_is_the_same_bytes_and_needs_nothing_else(run, tmp_path):
    results, file = run
    first, second = file.read_bytes(), results.report(tmp_path/'2.html', margin=2).read_bytes()
    assert first == second and not re.search(rb'(src|href)="(?!data:)|url\(|@import|<script', first) and first.count(b'<img ') == 5
    pictures = [b64decode(svg).decode() for svg in re.findall(rb'svg\+xml;base64,([^"]+)', first)]
    assert all('#000000' not in svg and 'currentColor' in svg for svg in pictures)  # black on a dark page is nothing


def test_the_page_has_verdicts_tables_failures_and_settings(run):
    results, file = run
    page = file.read_text()
    for text in ('margin of 2', 'OSError: disk full', 'digits', '<code>reinit</code>', 'The uncertainty covers the seeds', 'Means of the last levels: dense'):
        assert text in page, text
    assert page.count('<tr>') == 2 + len(results.table()) + len(results.verdict().frame)


@pytest.mark.parametrize('results, says', [
    (Results(failed=(dict(arm='imp', level=None, seed=0, reason='no data'),)), 'no data'),
    (example().only('imp'), 'No verdicts: these results have no arm of kind'),
    (example().only('dense'), 'There is no ticket to judge'),
    (made({('dense', 0): [math.nan]*3, ('imp', 1): [math.nan]*3}), 'not enough seeds: 0'),
])
def test_a_page_says_what_it_cannot_show(tmp_path, results, says):
    assert says in results.report(tmp_path/'r.html').read_text()


# ------------------------------------------------------------------ what must not be guessed

def with_metric(name, dense, ticket):
    "Results with a metric of any name, by seed."
    rows = [network(arm, level, seed, 0.5) | {name: v} for arm, level, values in (('dense', 0, dense), ('imp', 1, ticket)) for seed, v in enumerate(values)]
    return Results(tuple(rows))


@pytest.mark.parametrize('name', ['acc', 'Accuracy', 'foreground_acc', 'top_5_accuracy', 'F1', 'IoU'])
def test_shares_by_any_usual_name_are_points(name): assert with_metric(name, [.95, .94, .96], [.10, .12, .11]).verdict(metric=name).frame.verdict[0] == 'worse'


@pytest.mark.parametrize('name', ['msle', 'exp_rmspe', 'wer', 'nll', 'brier_score', 'Loss'])
def test_errors_by_any_usual_name_are_worse_when_they_grow(name): assert with_metric(name, [.1, .12, .11], [3., 3.1, 2.9]).verdict(.1, name).frame.verdict[0] == 'worse'


def test_a_metric_that_says_nothing_of_itself_is_asked_about():
    results = with_metric('psnr', [30., 31., 29.], [10., 11., 9.5])
    with pytest.raises(ValueError, match='higher_is_better'): results.verdict(1, 'psnr')
    assert [results.verdict(1, 'psnr', higher_is_better=b).frame.verdict[0] for b in (True, False)] == ['worse', 'winning']
    with pytest.raises(ValueError, match='roc_auc_score is no share'): with_metric('roc_auc_score', [.95, .94], [.5, .51]).verdict(metric='roc_auc_score')


def test_the_same_difference_in_every_seed_proves_nothing():
    results = made({('dense', 0): [.9, .91, .92], ('imp', 1): [.88, .89, .90], ('reinit', 1): [.87, .88, .89]})
    frame, pair = results.verdict(1).frame, results.compare('imp', 'reinit')
    assert list(frame.verdict) == ['undecided', 'no difference shown'] and np.isnan([frame.low[0], pair.low[0], pair.p[0]]).all()
    assert 'undecided' in results.verdict(1).lines[0][1] and 'bounds – and –' in results.verdict(1).lines[0][1] and '– to –' in results.verdict(1).lines[0][1]


def test_an_arm_that_does_not_rewind_wins_nothing():
    results = made({('dense', 0): [.9, .91, .92], ('imp', 1): [.901, .912, .92]})
    own = replace(results, rows=tuple(r | dict(rewind=None) for r in results.rows))
    assert own.verdict().frame.verdict[0] == 'not worse' and 'not worse than dense' in own.verdict().lines[0][1]


def test_an_arm_that_is_never_pruned_goes_along_with_the_level_of_the_other():
    long = [network('long', level, s, .9 + level/100, sparsity=0.) for level in (1, 2, 3) for s in range(3)]
    results = Results(made({('imp', level): [.9, .91, .92] for level in (1, 2, 3)}).rows + tuple(long))
    assert list(results.compare('imp', 'long', level=2).other_level) == [2] and list(results.compare('long', 'imp', sparsity=50).level) == [1]


# ------------------------------------------------------------------ in a script

def test_tables_and_verdicts_print_whole():
    results = example()
    table, said = str(results.table()), str(results.verdict())
    assert 'mean over seeds' in table and '...' not in table and len(table.splitlines()) == 2 + len(results.table())
    assert 'undecided' in said and 'The uncertainty covers the seeds' in said and '`' not in said


def test_arms_may_be_given_themselves():
    from types import SimpleNamespace
    imp, dense = SimpleNamespace(name='imp'), SimpleNamespace(name='dense')
    assert str(example().compare(imp, dense)) == str(example().compare('imp', 'dense')) == str(example().compare((imp, 'dense')))


def test_what_is_missing_is_said():
    with pytest.raises(ValueError, match='nothing has finished, and results.failed says why'): Results().table()
    with pytest.raises(ValueError, match="which have valid_loss, accuracy; give one of them as metric="): example().table('f1')
    with pytest.warns(UserWarning, match='0.01 points of percent; for a share of 0.01 give 1'): example().verdict(margin=.01)


def test_a_metric_is_judged_the_way_it_is_said_to_go(tmp_path):
    results = with_metric('psnr', [30., 31., 29.], [33., 34., 33.])
    for higher, word in ((True, 'winning'), (False, 'worse')):
        assert f'>{word}<' in results.report(tmp_path/'page.html', 1., 'psnr', higher_is_better=higher).read_text()
    assert 'higher_is_better=' in results.report(tmp_path/'page.html', 1., 'psnr').read_text()


def test_a_report_lies_with_its_results(tmp_path):
    results = example().save(tmp_path)
    assert Results.load(tmp_path).report() == tmp_path/'report.html' and (tmp_path/'report.html').exists() and results.path is None


def test_masks_are_found_from_a_folder_that_is_a_link(tmp_path):
    results = with_masks(example(), tmp_path/'run')
    (real := tmp_path/'far/away/kept').mkdir(parents=True)
    (tmp_path/'link').symlink_to(real)
    results.save(tmp_path/'link')
    row = next(r for r in results.rows if r['mask'])
    for folder in (tmp_path/'link', real): assert Results.load(folder).mask(row['arm'], row['level'], row['seed']) == results.mask(row['arm'], row['level'], row['seed'])
