"""Intervals, tables and figures from synthetic records."""
import copy
import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from clear_nb.core import load_preset, make_record, rng
from clear_nb.paper import paper_table
from clear_nb.report import (LABELS, UNKNOWN, Estimate, bootstrap_average, bootstrap_mean, figure5, outcomes, paired_difference, save_figure,
                             save_table, scores_frame, seed_spread, table1, table2, to_markdown, trigger_rates)

SEVERITIES = ('clean', 'low', 'mid', 'hard')


def bits(p, n, *key): return ''.join('01'[int(v)] for v in rng('test', *key).random(n) < p)


def record(models=tuple(LABELS), benchmarks=('MMBench', 'MMVP', 'mine'), n=100, seed=0, preset='smoke'):
    """One record of the evaluation notebook with made-up outcomes."""
    def cell(m, b, i): return dict(correct=bits(.9-.1*i, n, m, b, i, seed), item_ids=f'hash-{b}', trigger=bits(.2*i, n, 't', m, b, i, seed) if 'clear' in m else None)
    scores = {m: {b: {s: cell(m, b, i) for i, s in enumerate(SEVERITIES)} for b in benchmarks} for m in models}
    return make_record('04_mmd_bench', {'scores': scores}, load_preset(preset), seed)


@pytest.fixture(scope='module')
def records(): return [record()]


@pytest.fixture(scope='module')
def frame(records): return scores_frame(records)


@pytest.mark.parametrize('p', [.1, .5, .9])
def test_interval_covers(p):
    """A 90 % interval holds the truth in about 90 of 100 repetitions."""
    hits = 0
    for i in range(100):
        est = bootstrap_mean(rng('coverage', str(p), i).random(150) < p, rng('boot', i), level=.9)
        hits += est.low <= p <= est.high
    assert 80 <= hits <= 98


def test_intervals_repeat():
    """The generator decides, nothing else."""
    x = rng('x').random(50)
    assert bootstrap_mean(x, rng(1)) == bootstrap_mean(x, rng(1)) != bootstrap_mean(x, rng(2))


@pytest.mark.parametrize('x, want', [([], UNKNOWN[1:]), ([1], (1, math.nan, math.nan)), ([1, 1], (1, 1, 1)), ([0]*50, (0, 0, 0))])
def test_degenerate(x, want):
    """Empty is unknown, one item has no interval, equal items have an interval of width zero; no warning."""
    with np.errstate(all='raise'): est = bootstrap_mean(x, rng(0))
    assert est.n == len(x) and np.array_equal(est[1:], want, equal_nan=True)


def test_non_finite_outcomes():
    """An item that nobody scored must be left out by the caller, who knows why."""
    with pytest.raises(ValueError, match='finite'): bootstrap_mean([1, math.nan], rng(0))


def test_average_weighs_benchmarks_equally():
    """Ten items count as much as a thousand; their noise is in the interval."""
    small, large = np.r_[np.ones(5), np.zeros(5)], np.ones(1000)
    est = bootstrap_average([small, large], rng(0))
    assert est.mean == .75 and est.n == 1010 and .1 < est.high-est.low < .4
    assert bootstrap_average([small, []], rng(0)).n == 0 and str(bootstrap_average([], rng(0))) == 'unknown'


def test_pairing_helps():
    """Common difficulty cancels."""
    hard = rng('h').random(500)
    a, b = hard+.1, hard+.01*rng('n').random(500)
    est = paired_difference(a, b, rng(0))
    assert est.low > .08 and est.high-est.low < (bootstrap_mean(a, rng(0)).high-bootstrap_mean(a, rng(0)).low)/10
    with pytest.raises(ValueError, match='same items'): paired_difference([1, 0], [1], rng(0))


def test_frame(records, frame):
    """One row per condition, with the mean of its string in percent."""
    assert len(frame) == len(LABELS)*3*4
    row = frame.query("model == 'clear_rl' and benchmark == 'mine' and severity == 'hard'").iloc[0]
    cell = records[0]['metrics']['scores']['clear_rl']['mine']['hard']
    assert row['mean'] == cell['correct'].count('1') and row.trigger == cell['trigger'].count('1') and row.low <= row['mean'] <= row.high
    assert frame[frame.model == 'base'].trigger.isna().all()


def test_no_records():
    """Nothing measured gives an empty frame and unknown tables, no error."""
    empty = scores_frame([])
    assert len(table1(empty)) == len(table2(empty)) == 0
    assert figure5(empty).axes[0].texts[0].get_text() == 'unknown'
    plt.close('all')


@pytest.mark.parametrize('change, message', [(dict(correct='01x'), 'string of 0 and 1'), (dict(trigger='01'), '100 answers but 2 triggers')])
def test_bad_cells(records, change, message):
    """The error names the condition."""
    bad = copy.deepcopy(records)
    bad[0]['metrics']['scores']['clear_rl']['MMVP']['hard'].update(change)
    with pytest.raises(ValueError, match=f'clear_rl MMVP hard 0.*{message}'): scores_frame(bad)


def test_twice(records):
    """Two records of one seed would be counted twice."""
    with pytest.raises(ValueError, match='scored twice'): scores_frame(records*2)


def test_seeds():
    """Outcomes are averaged per item; seeds on different items are refused."""
    runs = [record(('base',), seed=k) for k in range(3)]
    frame = scores_frame(runs)
    x = outcomes(frame, 'base', 'hard')['MMVP']
    assert x.shape == (100,) and set(np.round(x/100*3)) <= {0, 1, 2, 3} and seed_spread(frame, 'base', 'hard') > 0
    runs[1]['metrics']['scores']['base']['MMVP']['hard']['item_ids'] = 'other'
    with pytest.raises(ValueError, match='different items'): outcomes(scores_frame(runs), 'base', 'hard')


def test_table1(frame):
    """The paper's number stands in the next column; our controls have none; unknown columns are marked."""
    t = table1(frame, scale='test').set_index('method')
    assert t.index.tolist() == list(LABELS.values()) and list(t)[:2] == ['MMBench (ours, test)', 'MMBench (paper, 7B)']
    base, matched = t.loc['base model'], t.loc[LABELS['matched']]
    assert (base['MMBench (paper, 7B)'], base['mine (paper, 7B)'], matched['MMBench (paper, 7B)']) == (67.88, 'not reported', 'not reported')
    ours = [base[f'{b} (ours, test)'].mean for b in ('MMBench', 'MMVP', 'mine')]
    assert base['AVG (ours, test)'].mean == pytest.approx(sum(ours)/3) and base['AVG (ours, test)'].n == 300
    assert str(base['AVG (ours, test)']).endswith('n=300')


def test_table1_mirrors(frame):
    """A benchmark of ours that mirrors one of the paper's shows the paper's number under the paper's name."""
    t = table1(frame, titles={'mine': 'My set'}, mirrors={'My set': 'CV-Bench'}, scale='x')
    assert t['CV-Bench (paper, 7B)'][0] == paper_table(1).set_index('method').loc['Bagel', 'CV-Bench'] and t['My set (ours, x)'][0].n == 100


def test_table1_with_a_gap(records):
    """A model that misses a benchmark has no average: it would be one over other sets."""
    part = copy.deepcopy(records)
    del part[0]['metrics']['scores']['base']['mine']
    base = table1(scores_frame(part), scale='x').iloc[0]
    assert str(table2(scores_frame(part), scale='x')['drop (ours, x)'][0]) == 'unknown'
    assert str(base['mine (ours, x)']) == str(base['AVG (ours, x)']) == 'unknown' and base['MMVP (ours, x)'].n == 100


def test_table2(frame):
    """Drop is paired: its mean is the difference of the means, its interval uses the items."""
    t = table2(frame, scale='test').set_index('method')
    row = t.loc['base model']
    assert row['drop (ours, test)'].mean == pytest.approx(row['clean (ours, test)'].mean-row['hard (ours, test)'].mean)
    assert row['drop (paper, 7B)'] == 7.29 and t.loc[LABELS['matched'], 'drop (paper, 7B)'] == 'not reported'


def test_table2_checks_the_items(records):
    """Clean and hard on different questions cannot be subtracted."""
    bad = copy.deepcopy(records)
    bad[0]['metrics']['scores']['base']['MMVP']['hard']['item_ids'] = 'other'
    with pytest.raises(ValueError, match='base MMVP.*different items'): table2(scores_frame(bad))


def test_table2_without_clean():
    """R-Bench-Dis has no clean version: it stays out of Table 2, as in the paper."""
    r = record(('base',))
    for s in ('clean', 'low', 'mid'): del r['metrics']['scores']['base']['mine'][s]
    assert table2(scores_frame([r]), scale='x')['clean (ours, x)'][0].n == 200


def test_figure5(frame):
    """Rates in the order of severity, first ours with intervals, last the paper's."""
    assert trigger_rates(frame).columns.tolist() == list(SEVERITIES)
    sft, rl, paper = figure5(frame, scale='x', titles={'mine': 'My set'}).axes
    assert len(sft.containers) == len(rl.containers) == 3*4 and len(paper.lines) == 6 and not paper.containers
    assert [t.get_text() for t in rl.get_legend().get_texts()] == ['MMBench', 'MMVP', 'My set']
    plt.close('all')


def test_saved_tables(tmp_path, frame, records):
    """Numbers in CSV, text in Markdown and LaTeX, one row in the index however often it is written."""
    df = pd.DataFrame({'method': ['a & b', 'c'], 'score': [Estimate(9, 50., 40., 60.), UNKNOWN], 'paper': [None, 60.15]})
    for _ in range(2): files = save_table(df, 'table9', 'A caption.', records, root=tmp_path)
    back = pd.read_csv(files['csv'])
    assert back.columns.tolist() == ['method', 'score', 'score low', 'score high', 'score n', 'paper'] and back.score[1] == 'unknown'
    assert '| c | unknown | 60.15 |' in files['md'].read_text() and r'a \& b' in files['tex'].read_text()
    index = (tmp_path/'README.md').read_text()
    assert index.count('table9') == 2 and 'smoke/04_mmd_bench-seed0.json' in index and records[0]['commit'][:12] in index


def test_saved_files_repeat(tmp_path, frame, records):
    """The same content gives the same bytes."""
    def write(folder): return [p.read_bytes() for p in [*save_figure(figure5(frame), 'f', 'c', records, root=folder).values(), *save_table(table2(frame), 't', 'c', records, root=folder).values()]]
    assert write(tmp_path/'a') == write(tmp_path/'b')
    plt.close('all')


def test_sources_are_required(tmp_path):
    """No artefact without a record; no mixing of presets."""
    with pytest.raises(ValueError, match='exactly one preset'): save_table(pd.DataFrame(), 't', 'c', [])
    with pytest.raises(ValueError, match='exactly one preset'): save_table(pd.DataFrame(), 't', 'c', [record(('base',)), record(('base',), preset='tiny')])


def test_markdown_escapes():
    """A bar inside a cell does not start a new one."""
    assert to_markdown(pd.DataFrame({'a|b': ['c|d']})) == '| a\\|b |\n| --- |\n| c\\|d |\n'
