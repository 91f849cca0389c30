"""Intervals, tables and figures from synthetic records."""

import copy
import math
import re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from clear_nb.artefacts import save_figure, save_table, to_markdown
from clear_nb.claims import CLAIMS, DROP_CLAIMS, findings
from clear_nb.core import PATHS, ROOT, rng
from clear_nb.figures import figure1, figure5, figure_labels, figure_sweeps
from clear_nb.identity import notebook_code
from clear_nb.paper import paper_table
from clear_nb.presets import load_preset
from clear_nb.records import make_record
from clear_nb.stats import (
    UNKNOWN,
    Estimate,
    bootstrap_average,
    bootstrap_mean,
    by_seed,
    compare,
    condition_outcomes,
    drop_reduction,
    paired_difference,
    scores_frame,
    seed_spread,
    select_records,
)
from clear_nb.tables import (
    ABLATION,
    LABELS,
    SEVERITY_LABELS,
    decision_share,
    table1,
    table2,
    table3,
    table6,
    table8,
    table9,
    table11,
    table15,
    table_labels,
    table_sweep,
    trigger_rates,
    trigger_table,
)

SEVERITIES = ('clean', 'low', 'mid', 'hard')


def bits(p, n, *key):
    return ''.join('01'[int(v)] for v in rng('test', *key).random(n) < p)


def record(
    models=tuple(LABELS), benchmarks=('MMBench', 'MMVP', 'mine'), n=100, seed=0, preset='smoke'
):
    """One record of the evaluation notebook with made-up outcomes."""

    def cell(m, b, i):
        return dict(
            correct=bits(0.9 - 0.1 * i, n, m, b, i, seed),
            item_ids=f'hash-{b}',
            trigger=bits(0.2 * i, n, 't', m, b, i, seed) if 'clear' in m else None,
        )

    scores = {
        m: {b: {s: cell(m, b, i) for i, s in enumerate(SEVERITIES)} for b in benchmarks}
        for m in models
    }
    return make_record('04_mmd_bench', {'scores': scores}, load_preset(preset), seed)


@pytest.fixture(scope='module')
def records():
    return [record()]


@pytest.fixture(scope='module')
def frame(records):
    return scores_frame(records)


@pytest.mark.parametrize('p', [0.1, 0.5, 0.9])
def test_interval_covers(p):
    """A 90 % interval holds the truth in about 90 of 100 repetitions."""
    hits = 0
    for i in range(100):
        est = bootstrap_mean(rng('coverage', str(p), i).random(150) < p, rng('boot', i), level=0.9)
        hits += est.low <= p <= est.high
    assert 80 <= hits <= 98


def test_intervals_repeat():
    """The generator decides, nothing else."""
    x = rng('x').random(50)
    assert bootstrap_mean(x, rng(1)) == bootstrap_mean(x, rng(1)) != bootstrap_mean(x, rng(2))


@pytest.mark.parametrize(
    'x, want',
    [([], UNKNOWN[1:]), ([1], (1, math.nan, math.nan)), ([1, 1], (1, 1, 1)), ([0] * 50, (0, 0, 0))],
)
def test_degenerate(x, want):
    """Empty is unknown, one item has no interval, equal items have an interval of width zero;
    no warning.
    """
    with np.errstate(all='raise'):
        est = bootstrap_mean(x, rng(0))
    assert est.n == len(x) and np.array_equal(est[1:], want, equal_nan=True)


def test_non_finite_outcomes():
    """An item that nobody scored must be left out by the caller, who knows why."""
    with pytest.raises(ValueError, match='finite'):
        bootstrap_mean([1, math.nan], rng(0))


def test_average_weighs_benchmarks_equally():
    """Ten items count as much as a thousand; their noise is in the interval."""
    small, large = np.r_[np.ones(5), np.zeros(5)], np.ones(1000)
    est = bootstrap_average([small, large], rng(0))
    assert est.mean == 0.75 and est.n == 1010 and 0.1 < est.high - est.low < 0.4
    assert (
        bootstrap_average([small, []], rng(0)).n == 0
        and str(bootstrap_average([], rng(0))) == 'unknown'
    )


def test_pairing_helps():
    """Common difficulty cancels."""
    hard = rng('h').random(500)
    a, b = hard + 0.1, hard + 0.01 * rng('n').random(500)
    est = paired_difference(a, b, rng(0))
    assert (
        est.low > 0.08
        and est.high - est.low
        < (bootstrap_mean(a, rng(0)).high - bootstrap_mean(a, rng(0)).low) / 10
    )
    with pytest.raises(ValueError, match='same items'):
        paired_difference([1, 0], [1], rng(0))


def test_frame(records, frame):
    """One row per condition, with the mean of its string in percent."""
    assert len(frame) == len(LABELS) * 3 * 4
    row = frame.query("model == 'clear_rl' and benchmark == 'mine' and severity == 'hard'").iloc[0]
    cell = records[0]['metrics']['scores']['clear_rl']['mine']['hard']
    assert (
        row['mean'] == cell['correct'].count('1')
        and row.trigger == cell['trigger'].count('1')
        and row.low <= row['mean'] <= row.high
    )
    assert frame[frame.model == 'base'].trigger.isna().all()


def test_no_records():
    """Nothing measured gives an empty frame and unknown tables, no error."""
    empty = scores_frame([])
    assert len(table1(empty)) == len(table2(empty)) == 0
    assert figure5(empty).axes[0].texts[0].get_text() == 'unknown'
    plt.close('all')


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(correct='01x'), 'string of 0 and 1'),
        (dict(trigger='01'), '100 answers but 2 triggers'),
    ],
)
def test_bad_cells(records, change, message):
    """The error names the condition."""
    bad = copy.deepcopy(records)
    bad[0]['metrics']['scores']['clear_rl']['MMVP']['hard'].update(change)
    with pytest.raises(ValueError, match=f'clear_rl MMVP hard 0.*{message}'):
        scores_frame(bad)


def test_twice(records):
    """Two records of one seed would be counted twice."""
    with pytest.raises(ValueError, match='scored twice'):
        scores_frame(records * 2)


def test_seeds():
    """Outcomes are averaged per item; seeds on different items are refused."""
    runs = [record(('base',), seed=k) for k in range(3)]
    frame = scores_frame(runs)
    x = condition_outcomes(frame, 'base', 'hard')['MMVP']
    assert (
        x.shape == (100,)
        and set(np.round(x / 100 * 3)) <= {0, 1, 2, 3}
        and seed_spread(frame, 'base', 'hard') > 0
    )
    runs[1]['metrics']['scores']['base']['MMVP']['hard']['item_ids'] = 'other'
    with pytest.raises(ValueError, match='different items'):
        condition_outcomes(scores_frame(runs), 'base', 'hard')


def test_table1(frame):
    """The paper's number stands in the next column; our controls have none; unknown columns are
    marked.
    """
    t = table1(frame, scale='test').set_index('method')
    assert t.index.tolist() == list(LABELS.values()) and list(t)[:2] == [
        'MMBench (ours, test)',
        'MMBench (paper, 7B)',
    ]
    base, matched = t.loc['base model'], t.loc[LABELS['matched']]
    assert (
        base['MMBench (paper, 7B)'],
        base['mine (paper, 7B)'],
        matched['MMBench (paper, 7B)'],
    ) == (67.88, 'not reported', 'not reported')
    ours = [base[f'{b} (ours, test)'].mean for b in ('MMBench', 'MMVP', 'mine')]
    assert (
        base['AVG (ours, test)'].mean == pytest.approx(sum(ours) / 3)
        and base['AVG (ours, test)'].n == 300
    )
    assert str(base['AVG (ours, test)']).endswith('n=300')


def test_table1_mirrors(frame):
    """A benchmark of ours that mirrors one of the paper's shows the paper's number under the
    paper's name.
    """
    t = table1(frame, titles={'mine': 'My set'}, mirrors={'My set': 'CV-Bench'}, scale='x')
    assert (
        t['CV-Bench (paper, 7B)'][0] == paper_table(1).set_index('method').loc['Bagel', 'CV-Bench']
        and t['My set (ours, x)'][0].n == 100
    )


def test_table1_with_a_gap(records):
    """A model that misses a benchmark has no average: it would be one over other sets."""
    part = copy.deepcopy(records)
    del part[0]['metrics']['scores']['base']['mine']
    base = table1(scores_frame(part), scale='x').iloc[0]
    assert str(table2(scores_frame(part), scale='x')['drop (ours, x)'][0]) == 'unknown'
    assert (
        str(base['mine (ours, x)']) == str(base['AVG (ours, x)']) == 'unknown'
        and base['MMVP (ours, x)'].n == 100
    )


def test_table2(frame):
    """Drop is paired: its mean is the difference of the means, its interval uses the items."""
    t = table2(frame, scale='test').set_index('method')
    row = t.loc['base model']
    assert row['drop (ours, test)'].mean == pytest.approx(
        row['clean (ours, test)'].mean - row['hard (ours, test)'].mean
    )
    assert (
        row['drop (paper, 7B)'] == 7.29
        and t.loc[LABELS['matched'], 'drop (paper, 7B)'] == 'not reported'
    )


def test_table2_checks_the_items(records):
    """Clean and hard on different questions cannot be subtracted."""
    bad = copy.deepcopy(records)
    bad[0]['metrics']['scores']['base']['MMVP']['hard']['item_ids'] = 'other'
    with pytest.raises(ValueError, match='base MMVP.*different items'):
        table2(scores_frame(bad))


def test_table2_without_clean():
    """R-Bench-Dis has no clean version: it stays out of Table 2, as in the paper."""
    r = record(('base',))
    for s in ('clean', 'low', 'mid'):
        del r['metrics']['scores']['base']['mine'][s]
    assert table2(scores_frame([r]), scale='x')['clean (ours, x)'][0].n == 200


def test_figure5(frame):
    """Rates in the order of severity, first ours with intervals, last the paper's."""
    assert trigger_rates(frame).columns.tolist() == list(SEVERITIES)
    sft, rl, paper = figure5(frame, scale='x', titles={'mine': 'My set'}).axes
    assert [len(ax.containers) for ax in (sft, rl, paper)] == [3, 3, 6] and {
        t.get_text() for t in paper.get_xticklabels()
    } == set(SEVERITIES)
    line, _, (bars,) = rl.containers[2].lines
    assert line.get_ydata() == pytest.approx(
        frame[(frame.model == 'clear_rl') & (frame.benchmark == 'mine')].trigger.tolist()
    )
    assert all(
        low < y < high
        for y, ((_, low), (_, high)) in zip(line.get_ydata()[1:], bars.get_segments()[1:])
    )
    assert [t.get_text() for t in rl.get_legend().get_texts()] == ['MMBench', 'MMVP', 'My set']
    plt.close('all')


def test_saved_tables(tmp_path, frame, records):
    """Numbers in CSV, text in Markdown and LaTeX, one row in the index however often it is
    written.
    """
    df = pd.DataFrame(
        {
            'method': ['a & b', 'c'],
            'score': [Estimate(9, 50.0, 40.0, 60.0), UNKNOWN],
            'paper': [None, 60.15],
        }
    )
    for _ in range(2):
        files = save_table(df, 'table9', 'A caption.', records, root=tmp_path)
    back = pd.read_csv(files['csv'])
    assert (
        back.columns.tolist()
        == ['method', 'score', 'score ci_low', 'score ci_high', 'score n', 'paper']
        and back.score[1] == 'unknown'
    )
    assert (
        '| c | unknown | 60.15 |' in files['md'].read_text()
        and r'a \& b' in files['tex'].read_text()
    )
    index = (tmp_path / 'README.md').read_text()
    save_table(df, 'table7', 'From code.', records, root=tmp_path, measured=False)
    assert '| From code. | 07_tables | none | none |' in (tmp_path / 'README.md').read_text()
    assert (
        index.count('table9') == 2
        and 'smoke/04_mmd_bench, seed 0' in index
        and records[0]['commit'][:12] in index
    )


def test_saved_files_repeat(tmp_path, frame, records):
    """The same content gives the same bytes."""

    def write(folder):
        return [
            p.read_bytes()
            for p in [
                *save_figure(figure5(frame), 'f', 'c', records, root=folder).values(),
                *save_table(table2(frame), 't', 'c', records, root=folder).values(),
            ]
        ]

    assert write(tmp_path / 'a') == write(tmp_path / 'b')
    plt.close('all')


def test_sources_are_required(tmp_path):
    """No artefact without a record; no mixing of presets."""
    with pytest.raises(ValueError, match='exactly one preset'):
        save_table(pd.DataFrame(), 't', 'c', [])
    with pytest.raises(ValueError, match='exactly one preset'):
        save_table(pd.DataFrame(), 't', 'c', [record(('base',)), record(('base',), preset='tiny')])


def test_markdown_escapes():
    """A bar inside a cell does not start a new one."""
    assert to_markdown(pd.DataFrame({'a|b': ['c|d']})) == '| a\\|b |\n| --- |\n| c\\|d |\n'


SETS = {'MMBench': 'MMBench', 'MMVP': 'MMVP', 'mine': 'My set'}


def ours(table):
    """Cells that claim to be measured here, as text."""
    return table[
        [c for c in table if 'ours' in c or (c == 'difference' and 'verdict' in table)]
    ].map(lambda v: 'unknown' if v is None or v != v else str(v))


def without(records, model):
    """The same records as if one subject had never been evaluated."""
    part = copy.deepcopy(records)
    for r in part:
        r['metrics']['scores'].pop(model)
    return part


def ablation(kind, values, p, seed=0):
    """A record of one changed number; hard accuracy is about p."""
    scores = {
        'clear_rl': {
            b: {
                s: dict(
                    correct=bits(p, 100, kind, str(values), b, s),
                    item_ids=b,
                    seconds=5.0,
                    questions=100,
                )
                for s in SEVERITIES
            }
            for b in SETS
        }
    }
    return make_record(
        '06_ablations',
        dict(kind=kind, values=values, scores=scores),
        load_preset('smoke'),
        seed,
        '+'.join(f'{k}={v}' for k, v in values.items()),
    )


def test_no_cell_without_a_record(monkeypatch, tmp_path):
    """The table notebook on a project without records: no number in any of our columns, and
    nothing written.
    """
    for name in ('runs', 'results', 'figures'):
        monkeypatch.setattr(PATHS, name, tmp_path / name)
    names = {}
    exec(compile(notebook_code(ROOT / 'nbs' / '07_tables.ipynb'), '07_tables', 'exec'), names)
    tables = {k: v[0] for k, v in names['tables'].items()}
    assert {f'table{k}' for k in range(1, 16)} - {'table5'} | {'labels'} <= tables.keys() and not (
        tmp_path / 'figures'
    ).exists()
    found = {
        k: set(ours(t).to_numpy().ravel())
        - {'unknown', 'not asked', 'is the reference', 'by construction'}
        for k, t in tables.items()
    }
    assert not any(found.values()), found
    assert sum(ours(t).size for t in tables.values()) > 200


@pytest.mark.parametrize('gone', ABLATION)
def test_numbers_go_with_their_records(records, gone):
    """Without the records of one subject its row is unknown and the others stay as they were."""
    before, after = (
        ours(table3(scores_frame(r), scale='x')) for r in (records, without(records, gone))
    )
    row = list(ABLATION).index(gone)
    assert (after.loc[row] == 'unknown').all() and not (before == 'unknown').any().any()
    assert before.drop(index=row).equals(after.drop(index=row))
    claims = findings(scores_frame(without(records, gone)))
    named = [gone in (*c.a, *c.b) for c in CLAIMS] + [
        gone in (base, 'clear_rl') for base, *_ in DROP_CLAIMS
    ]
    assert (ours(claims).difference.eq('unknown') == named).all() and any(named)
    assert (
        claims.verdict.eq('unknown').tolist() == named
        and (claims['seeds in favour'].eq('0 of 0') == named).all()
    )


@pytest.mark.parametrize(
    'make',
    [
        lambda r, f: table9(f, SETS),
        lambda r, f: table11(r, SETS),
        lambda r, f: trigger_table(f, SETS),
        lambda r, f: table15(r, models=['clear_rl']),
        lambda r, f: table_sweep('lambda', [], r, list(SETS)),
    ],
    ids=['table9', 'table11', 'triggers', 'table15', 'table12'],
)
def test_one_model_tables(records, make):
    """Tables about CLEAR-RL hold nothing without its records."""
    timed = copy.deepcopy(records)
    for b in timed[0]['metrics']['scores']['clear_rl'].values():
        for cell in b.values():
            cell['seconds'] = 2.5
    assert (ours(make(timed, scores_frame(timed))) != 'unknown').any().any()
    part = without(timed, 'clear_rl')
    assert (ours(make(part, scores_frame(part))) == 'unknown').all().all()


def test_cells_are_recomputed(records, frame):
    """Tables 3, 9, 15 and the trigger table against the strings of the record."""
    cells = records[0]['metrics']['scores']['clear_rl']

    def share(text, *rest):
        return 100 * np.mean([all(x == '1' for x in pair) for pair in zip(text, *rest)])

    def mean(s, *fields):
        return np.mean([share(*(c[s][f] for f in fields)) for c in cells.values()])

    assert table3(frame, scale='x')['hard (ours, x)'][4].mean == pytest.approx(
        mean('hard', 'correct')
    )
    assert [e.mean for e in table9(frame, SETS, scale='x')['AVG (ours, x)']] == pytest.approx(
        [mean(s, 'correct') for s in SEVERITY_LABELS]
    )
    assert decision_share(records, 'clear_rl', 1, 1).mean == pytest.approx(
        mean('hard', 'correct', 'trigger')
    )
    rates = trigger_table(frame, SETS, scale='x').set_index('benchmark')
    assert (
        rates['mid (ours, x)']['average of 3'].mean == pytest.approx(mean('mid', 'trigger'))
        and rates['low < mid < hard']['average of 3'] == 'shown'
    )
    assert (
        rates['clean below 10 %'].eq('yes').all()
        and rates['hard (paper, 7B)']['average of 3'] == 36.4
    )


def test_sweeps(records):
    """A changed number finds its row; the main run fills its own value only where no ablation
    holds it; another kind stays out.
    """
    extra = [
        ablation('lambda', dict(lambda_flow=0.1), 0.7),
        ablation('reward', dict(w_acc=1.0, w_fmt=0.0, w_dec=0.0, w_cost=0.0), 0.4),
        ablation('steps', dict(denoise_steps=30), 0.6),
    ]
    t = table_sweep('lambda', extra, records, list(SETS), scale='x').set_index('lambda')
    assert ours(t)['hard (ours, x)'].ne('unknown').to_dict() == {
        '0': False,
        '0.1': True,
        '0.3': True,
        '0.5': False,
        '1': False,
    }
    want = np.mean(
        [
            100 * c['hard']['correct'].count('1') / 100
            for c in extra[0]['metrics']['scores']['clear_rl'].values()
        ]
    )
    assert (
        t['hard (ours, x)']['0.1'].mean == pytest.approx(want)
        and t['hard (paper, 7B)']['0.1'] == 64.31
    )
    t = table_sweep('reward', extra, [], list(SETS), scale='x')
    assert ours(t)['clean (ours, x)'].ne('unknown').tolist() == [True, False, False, False, False]
    t = table_sweep('steps', extra, records, list(SETS), scale='x').set_index('steps')
    assert t['seconds per 100 hard questions (ours, x)']['30'] == 5 and list(t.index) == [
        '2',
        '10',
        '20',
        '30',
        '50',
    ]


def test_sweep_with_a_gap():
    """A run that lacks a benchmark has no average."""
    part = ablation('lambda', dict(lambda_flow=0.1), 0.7)
    del part['metrics']['scores']['clear_rl']['mine']
    assert (
        str(table_sweep('lambda', [part], [], list(SETS), scale='x')['hard (ours, x)'][1])
        == 'unknown'
    )


def labelled(n, shares, seed=0):
    """Records of one budget, as `ablations` names subjects and values."""
    named = dict(clear='clear_bridge', always='always', matched='matched')

    def cells(m, p):
        return {
            b: {
                s: dict(correct=bits(p, 100, 'labels', n, m, b, s, seed), item_ids=b)
                for s in ('clean', 'hard')
            }
            for b in SETS
        }

    return [
        make_record(
            '06_ablations',
            dict(kind='labels', values=dict(labels=n, model=m), scores={named[m]: cells(m, p)}),
            load_preset('smoke'),
            seed,
            f'labels={n}+model={m}',
        )
        for m, p in shares.items()
    ]


def test_label_curve():
    """One row per budget; means are those of the record's strings; a budget or subject without
    a record is unknown; other kinds stay out.
    """
    few, many = (
        labelled(100, dict(clear=0.7, always=0.7, matched=0.3)),
        labelled(900, dict(clear=0.5, matched=0.9)),
    )
    t = table_labels(
        [*many, *few, ablation('steps', dict(denoise_steps=30), 0.6)], [100, 300], list(SETS), 'x'
    ).set_index('labelled questions')
    assert list(t.index) == [100, 300, 900] and t['generation pays'].tolist() == [
        'shown',
        'unknown',
        'contradicted',
    ]
    want = np.mean(
        [
            c['hard']['correct'].count('1')
            for c in few[0]['metrics']['scores']['clear_bridge'].values()
        ]
    )
    assert t['CLEAR, stages 1 and 2, hard (ours, x)'][100].mean == pytest.approx(want)
    assert (
        (ours(t).loc[300] == 'unknown').all()
        and str(t['the same, always restores, hard (ours, x)'][900]) == 'unknown'
        and t['training seeds'].tolist() == ['0', 'none', '0']
    )
    for r in few:  # a further set changes neither the columns nor the gain between them
        for cells in r['metrics']['scores'].values():
            cells['other'] = {
                s: dict(
                    correct='01'[r['metrics']['values']['model'] == 'matched'] * 100,
                    item_ids='other',
                )
                for s in ('clean', 'hard')
            }
    assert (
        table_labels(few, [], list(SETS), 'x').iloc[0].map(str).tolist()
        == t.reset_index().iloc[0].map(str).tolist()
    )


def test_label_figure():
    """Points lie at the budgets; without records every panel says unknown."""
    t = table_labels(
        labelled(100, dict(clear=0.7, always=0.7, matched=0.3)), [100, 300], list(SETS), 'x'
    )
    fig = figure_labels(t, 'x')
    assert [len(ax.containers) for ax in fig.axes] == [3, 3, 2] and fig.axes[0].containers[0].lines[
        0
    ].get_xdata().tolist() == [100]
    wide = labelled(100, dict(clear=0.9, always=0.2, matched=0.3))
    for r in wide:  # far apart at clean and hard
        for cells in r['metrics']['scores'].values():
            for c in cells.values():
                c['clean']['correct'] = '1' * 100
    for ax in figure_labels(table_labels(wide, [100], list(SETS), 'x'), 'x').axes:
        low, high = ax.get_ylim()
        assert all(low < y < high for c in ax.containers for y in c.lines[0].get_ydata())
    empty = figure_labels(table_labels([], [100], list(SETS), 'x'), 'x')
    assert [ax.texts[0].get_text() for ax in empty.axes] == ['unknown'] * 3
    plt.close('all')


def test_sensitivity_figure(records):
    """The curve holds the cells of Tables 12 and 14, nothing where there is no record."""
    timed = ablation('steps', dict(denoise_steps=30), 0.6)
    timed['metrics']['denoise_seconds'] = 0.004

    def make(extra, main):
        return {k: table_sweep(k, extra, main, list(SETS), scale='x') for k in ('lambda', 'steps')}

    weight, steps = make([timed], records).values()
    fig = figure_sweeps(weight, steps, 'x')
    assert steps.set_index('steps')['milliseconds of prefill and denoising (ours, x)'][
        '30'
    ] == 4 and fig.axes[2].containers[0].lines[0].get_ydata().tolist() == [4]
    assert fig.axes[0].containers[0].lines[0].get_ydata() == pytest.approx(
        [weight.set_index('lambda')['hard (ours, x)']['0.3'].mean]
    )
    assert [ax.texts[0].get_text() for ax in figure_sweeps(*make([], []).values(), 'x').axes] == [
        'unknown'
    ] * 3
    plt.close('all')


def test_figures_without_records(monkeypatch, tmp_path):
    """The figure notebook on a project without records writes nothing."""
    for name in ('runs', 'results', 'figures'):
        monkeypatch.setattr(PATHS, name, tmp_path / name)
    exec(compile(notebook_code(ROOT / 'nbs' / '08_figures.ipynb'), '08_figures', 'exec'), {})
    assert not list(tmp_path.iterdir())
    plt.close('all')


def test_drop_reduction():
    """Half the drop saved; nothing to save is unknown."""

    def made(base, clear):
        def cell(k):
            return dict(correct='1' * k + '0' * (100 - k), item_ids='x')

        return scores_frame(
            [
                make_record(
                    '04_mmd_bench',
                    dict(
                        scores={
                            m: {'x': dict(clean=cell(a), hard=cell(b))}
                            for m, (a, b) in dict(base=base, clear_rl=clear).items()
                        }
                    ),
                    load_preset('smoke'),
                    0,
                )
            ]
        )

    est = drop_reduction(made((80, 60), (80, 70)))
    assert est.mean == pytest.approx(50) and est.low < 50 < est.high
    assert str(drop_reduction(made((60, 60), (80, 70)))) == 'unknown'


def test_drop_over_seeds():
    """A seed without CLEAR changes nothing; one in which the base model loses nothing is left
    out and named; both go the way of the other claims.
    """

    def cell(k):
        return dict(correct='1' * k + '0' * (200 - k), item_ids='x')

    def row(*runs):  # runs: per seed, model to (clean, hard)
        scores = [
            {m: {'x': dict(clean=cell(a), hard=cell(b))} for m, (a, b) in run.items()}
            for run in runs
        ]
        return findings(
            scores_frame(
                [
                    make_record('04_mmd_bench', dict(scores=s), load_preset('smoke'), k)
                    for k, s in enumerate(scores)
                ]
            ),
            claims=(),
        ).iloc[0]

    common = [dict(base=(180, 100), clear_rl=(180, hard)) for hard in (102, 110, 175)]
    want = row(*common)
    assert (want['seeds in favour'], want.verdict) == (
        '3 of 3',
        'shown for these seeds',
    ) and 'left out' not in want.compared
    assert row(*common, dict(base=(180, 90))).equals(want)
    flat = row(*common, dict(base=(100, 100), clear_rl=(180, 170)))
    assert (
        flat.compared
        == f'{want.compared}; 1 of 4 seeds left out: {LABELS["base"]} loses nothing there'
    )
    assert all(flat[k] == want[k] for k in ('seeds in favour', '95 % over seeds', 'verdict'))
    none = row(dict(base=(180, 90)))
    assert (none['seeds in favour'], none.verdict) == (
        '0 of 0',
        'unknown',
    ) and 'left out' not in none.compared


def paired_record(correct, pairs, **cell):
    """One condition of an MMVP-like set, its pictures in neighbouring pairs."""
    cell = dict(correct=correct, pairs=pairs, item_ids='x', **cell)
    return make_record(
        '04_mmd_bench', dict(scores={'clear_rl': {'mmvp': {'hard': cell}}}), load_preset('smoke'), 0
    )


def test_a_pair_is_one_question():
    """Two pictures of a pair are drawn together: the mean stays, n halves, and outcomes that
    always agree get a wider interval.
    """
    pairs = bits(0.5, 200, 'pairs')
    both = ''.join(2 * b for b in pairs)
    [one] = scores_frame([paired_record(both, pairs, trigger=both)]).itertuples()
    [two] = scores_frame([paired_record(both, None, trigger=both)]).itertuples()
    assert (one.n, two.n) == (200, 400) and one.mean == two.mean and one.trigger == two.trigger
    assert (one.high - one.low) / (two.high - two.low) == pytest.approx(2**0.5, rel=0.1)
    assert decision_share([paired_record(both, pairs, trigger=both)], 'clear_rl', 1, 1).n == 200
    with pytest.raises(
        ValueError, match='clear_rl mmvp hard 0: the pictures of a pair are no neighbours'
    ):
        scores_frame([paired_record('0110', '11', trigger='0000')])


def test_six_of_seven(records, frame):
    """Tables 2 and 3, the findings and the last row of the triggers average over the named sets
    alone.
    """
    want = frame[
        (frame.model == 'base') & (frame.severity == 'hard') & (frame.benchmark != 'mine')
    ]['mean'].mean()
    pair = ['MMBench', 'MMVP']
    for t in (
        table2(frame, benchmarks=pair, scale='x'),
        table3(frame, benchmarks=pair, scale='x'),
        table2(scores_frame(select_records(records, pair)), scale='x'),
    ):
        assert (
            t['hard (ours, x)'][0].mean == pytest.approx(want) and t['hard (ours, x)'][0].n == 200
        )
    few = findings(frame, benchmarks=pair)
    assert (
        few.difference[0].n == 200
        and few.difference[0] == findings(scores_frame(select_records(records, pair))).difference[0]
    )
    last = trigger_table(frame, SETS, averaged=pair, scale='x').iloc[-1]
    rates = (
        frame[(frame.model == 'clear_rl') & (frame.severity == 'hard')]
        .set_index('benchmark')
        .trigger
    )
    assert last.benchmark == 'average of 2' and last['hard (ours, x)'].mean == pytest.approx(
        rates[pair].mean()
    )


def test_only_the_same_questions_are_compared(records):
    """Models asked different questions are refused, and a seed that one of them lacks stays out
    of both.
    """
    other = record(('clear_rl',), seed=0)
    for cells in other['metrics']['scores']['clear_rl'].values():
        cells['hard']['item_ids'] = 'other'
    mixed = scores_frame([*without(records, 'clear_rl'), other])
    with pytest.raises(ValueError, match='different items'):
        compare(mixed, 'correct', ('clear_rl', 'hard'), ('base', 'hard'))
    more = scores_frame([*records, record(('clear_rl',), seed=1)])
    assert compare(more, 'correct', ('clear_rl', 'hard'), ('base', 'hard')) == compare(
        scores_frame(records), 'correct', ('clear_rl', 'hard'), ('base', 'hard')
    )
    assert (
        len(by_seed(more, 'correct', ('clear_rl', 'hard'), ('base', 'hard'))) == 1
        and len(by_seed(more, 'correct', ('clear_rl', 'hard'), ('clear_rl', 'clean'))) == 2
    )


def test_seeds_that_disagree():
    """Five runs of 400 questions each: a gain that one lucky run makes is shown for these
    seeds; one that all make is shown.
    """

    def claim(gains):
        def cell(share, *key):
            return dict(correct=bits(share, 400, *key), trigger='0' * 400, item_ids='x')

        runs = [
            {
                m: {
                    'x': {
                        s: cell(0.5 + (gain if (m, s) == ('clear_rl', 'hard') else 0), m, s, k)
                        for s in SEVERITIES
                    }
                }
                for m in ('base', 'clear_rl')
            }
            for k, gain in enumerate(gains)
        ]
        return (
            findings(
                scores_frame(
                    [
                        make_record('04_mmd_bench', dict(scores=r), load_preset('smoke'), k)
                        for k, r in enumerate(runs)
                    ]
                )
            )
            .set_index('claim')
            .loc['CLEAR beats the base model']
        )

    assert (
        claim([0.1] * 5).verdict == 'shown'
        and claim([0, 0, 0, 0, 0.5]).verdict == 'shown for these seeds'
        and claim([0] * 5).verdict == 'open'
    )


def test_unreadable_answers(records):
    """The share of answers that say nothing stands in Table 2; where nobody counted it is
    unknown.
    """
    counted = copy.deepcopy(records)
    for k, cells in enumerate(counted[0]['metrics']['scores']['always'].values()):
        cells['hard'] |= dict(unparsable=10 * k, questions=100)
    column = table2(scores_frame(counted), scale='x').set_index('method')[
        'hard answers that cannot be read, % (ours, x)'
    ]
    assert column[LABELS['always']] == 10 and np.isnan(column[LABELS['base']])


def test_latex(tmp_path, records):
    """Every sign of LaTeX's own is escaped, everything else is ASCII, braces are balanced; long
    cells are broken.
    """
    df = pd.DataFrame(
        {
            '95 % [x]': [
                Estimate(9, -5.0, -6.0, -4.0),
                'a sentence of more than forty-five signs, {braces} & #1',
            ],
            'under_score': ['≥ 3 × λ', '$5 − 3'],
        }
    )
    tex = save_table(df, 'table9', '50 % of a_b, always.', records, root=tmp_path)[
        'tex'
    ].read_text()
    body = re.sub(r'\\[%&#_${}]', '', tex)
    assert (
        tex.isascii()
        and body.count('{') == body.count('}')
        and not re.search(r'%(?!\n| needs)', body)
    )
    assert 'p{7cm}l' in tex and r'\begin{tabular}' in tex and '$-$5.0 {[}$-$6.0, $-$4.0]' in tex


def test_what_was_asked(records):
    """Counts come from records; a range when they differ; Table 8 averages seeds."""
    assert (
        table6(records, dict(mine=('My set', 'f', 'e')), scale='x')['outcomes (ours, x)'][0] == 100
    )
    sft = [
        make_record('01_sft', dict(pathways=dict(direct=n, restore=10)), load_preset('smoke'), n)
        for n in (1, 2)
    ]
    assert table8(sft, scale='x')['ours, x'].tolist()[:3] == [11.5, 1.5, 10]


def test_figure1(frame):
    """Intervals lie along the bars; a model without records says so."""
    left, right = figure1(frame, models=['base', 'nobody'], scale='x').axes
    assert (
        left.patches[0].get_width() == pytest.approx(table2(frame)['drop (ours, tiny)'][0].mean)
        and left.texts[1].get_text() == ' unknown'
    )
    (across,) = left.containers[1].lines[2]
    low, high = across.get_segments()[0]
    assert (
        low[1] == high[1] == 0
        and low[0] < left.patches[0].get_width() < high[0]
        and len(right.patches) == 9
        and not right.collections
    )
    plt.close('all')
