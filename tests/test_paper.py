"""The paper's numbers and the audit of their arithmetic."""

import hashlib
import math

import pytest

from clear_nb import paper
from clear_nb.core import PATHS
from clear_nb.paper import arithmetic, audit, paper_number, paper_table, paper_tables


@pytest.mark.parametrize('n', range(1, 16))
def test_all_tables(n):
    """Tables 1 to 15 are there and not empty."""
    assert len(paper_table(n)) > 1


def test_names():
    """Number, full name and short name mean the same table."""
    assert paper_table(7).equals(paper_table('table07_corruptions')) and paper_table(7).equals(
        paper_table('corruptions')
    )


@pytest.mark.parametrize('name', [0, 16, 'nothing', ''])
def test_unknown_table(name):
    """The error says what exists."""
    with pytest.raises(ValueError, match='no table'):
        paper_table(name)


def test_callers_cannot_change_the_paper():
    """A table is a copy."""
    mine = paper_table(2)
    mine['clean'] = 0
    assert paper_number(2, 'clean', method='Bagel') == 66.86


def test_numbers():
    """Addressed by column and row; a cell the paper left empty is NaN."""
    assert paper_number(3, 'hard', configuration='+ SFT + Dec-reenc + GRPO') == 63.72
    assert paper_number(8, 'value', property='total_samples') == 24886
    assert math.isnan(paper_number(11, 'mid', benchmark='R-Bench-Dis'))


@pytest.mark.parametrize(
    'column, row, message',
    [
        ('AGV', dict(method='Bagel'), "no column 'AGV': did you mean 'AVG'"),
        ('AVG', dict(methd='Bagel'), "did you mean 'method'"),
        ('AVG', dict(method='Bagle'), '0 rows'),
        ('AVG', dict(group='clear'), '3 rows'),
        ('AVG', {}, '9 rows'),
        ('group', dict(method='Bagel'), 'not a number'),
    ],
)
def test_bad_address(column, row, message):
    """Anything but exactly one number is refused."""
    with pytest.raises(ValueError, match=message):
        paper_number(1, column, **row)


WRONG = [  # quantity, printed, recomputed
    ('Bagel on R-Bench-Dis: share of 495', 61.64, 100 * 305 / 495),
    ('MMBench: questions', 2974, 1292),
    ('CV-Bench: questions', 2638, 1438),
    ('RealWorldQA: questions', 764, 765),
    ('corruptions per image behind a score', 16, 1),
    ('Bagel: average of 7 sets', 60.15, 59.8649),
    ('high: total with R-Bench-Dis', 215, 225),
    ('thousand questions of both halves', 48, 49.366),
    ('MM-Vet, low: trigger rate as a share of 218', 4.7, 1000 / 218),
    ('MM-Vet, mid: trigger rate as a share of 218', 11.6, 2500 / 218),
    ('MMVP, low: trigger rate as a share of 300', 8.4, 25 / 3),
    ('MMVP, mid: trigger rate as a share of 300', 16.8, 50 / 3),
    ('gain on hard: CLEAR-RL over Bagel, seven sets', 5.1, 5.4015),
    ('gain on hard: text-only CoT over Bagel, seven sets', -0.1, 0.1627),
]
CUT = [
    ('GPT-4.1-mini: average of 7 sets', 68.51, 68.5152),
    ('Text-only CoT: average of 7 sets', 60.02, 60.0276),
    ('CLEAR-RL: average of 7 sets', 65.26, 65.2665),
    ('Clean: average of 6 sets', 70.27, 70.2793),
    ('CLEAR-SFT: hard', 63.04, 63.0455),
    ('CLEAR-RL: clean', 70.27, 70.2793),
    ('CLEAR-RL: hard', 64.96, 64.9658),
    ('overall: mean of CLEAR-RL', 64.97, 64.9806),
    ('thousand questions of the SFT half', 24, 24.886),
]


@pytest.mark.parametrize('rounding, expected', [('no', WRONG), ('if digits were cut', CUT)])
def test_audit_finds_what_does_not_add_up(rounding, expected):
    """These rows and no others; each has a consequence."""
    t = audit().query('rounding == @rounding')
    assert t.quantity.tolist() == [q for q, *_ in expected]
    assert t.printed.tolist() == [
        v for _, v, _ in expected
    ] and t.recomputed.tolist() == pytest.approx([v for *_, v in expected], abs=6e-5)
    assert t.difference.tolist() == pytest.approx((t.printed - t.recomputed).tolist(), abs=2e-4)
    assert (t.consequence.str.len() > 20).all() and 'not explained' not in t.consequence.values


def test_audit_is_the_rest_of_the_arithmetic():
    """227 checks; what rounding explains is left out; sentences quote the recomputed numbers."""
    everything, t = arithmetic(), audit().set_index('quantity')
    assert (
        len(everything) == 227
        and len(t) == (everything.rounding != 'yes').sum()
        and everything.quantity.notna().all()
    )
    for quantity, said in [
        ('Bagel: average of 7 sets', '59.86'),
        ('overall: mean of CLEAR-RL', '64.98'),
        ('CLEAR-RL: average of 7 sets', '65.27'),
        ('MMBench: questions', '1,292'),
    ]:
        assert said in t.consequence[quantity] and float(said.replace(',', '')) == round(
            t.recomputed[quantity], 2
        )
    assert (
        '49,366' in t.consequence['thousand questions of both halves']
        and paper_number(8, 'value', property='grpo_set') + 24886 == 49366
    )


@pytest.mark.parametrize(
    'table, column, row, change',
    [
        (1, 'MMVP', 4, 0.2),
        (1, 'AVG', 2, 0.02),
        (2, 'drop', 1, 0.02),
        (2, 'clean', 0, 0.02),
        (3, 'hard', 0, 0.02),
        (3, 'hard', 2, 0.2),
        (4, 'hard_avg', 1, 0.02),
        (6, 'samples', 2, 1),
        (9, 'MMStar', 3, 0.3),
        (9, 'AVG', 1, 0.02),
        (10, 'Bagel', 7, 0.05),
        (10, 'delta', 4, 0.02),
        (11, 'mid', 2, 1),
        (12, 'clean', 2, 0.02),
        (13, 'w_fmt', 1, 0.01),
        (13, 'hard', 2, 0.02),
        (14, 'hard', 2, 0.02),
        ('clean_vs_degraded', 'drop_percent', 4, 0.3),
        ('trigger_rate_percent', 'high', 1, 0.2),
        ('text_numbers', 'value', 0, 0.2),
        ('text_numbers', 'value', 3, 0.01),
        ('text_numbers', 'value', 5, 0.2),
        ('text_claims', 'value', 9, 2),
    ],
)
def test_a_changed_number_is_noticed(table, column, row, change, monkeypatch):
    """A number that is off by little more than its rounding changes a verdict."""
    before, name, read = (
        arithmetic().rounding.tolist(),
        next(n for n in paper_tables() if paper_table(n).equals(paper_table(table))),
        paper._read,
    )

    def changed(n):
        frame = read(n).copy()
        if n == name:
            frame[column] = (
                frame[column].astype(float).where(frame.index != row, frame[column] + change)
            )
        return frame

    monkeypatch.setattr(paper, '_read', changed)
    assert arithmetic().rounding.tolist() != before


def test_files_are_the_papers():
    """The tables are as transcribed: whoever corrects one looks at the audit again."""
    files = [p.read_bytes() for p in paper_tables().values()]
    assert hashlib.sha256(b''.join(files)).hexdigest()[:16] == 'bd79b50ee4f2bcd2'


def test_intervals():
    """Rounding of a mean, a difference, a sum and a count at their limits, on both sides."""

    def rounding(printed, recomputed, **kw):
        return paper._check('', '', printed, recomputed, **kw)['rounding']

    for sign in (1, -1):
        assert (
            rounding(10, 10 + sign * 0.0099, plus=1)
            == 'yes'
            != rounding(10, 10 + sign * 0.0101, plus=1)
        )
        assert (
            rounding(10, 10 + sign * 0.0149, plus=1, minus=1)
            == 'yes'
            != rounding(10, 10 + sign * 0.0151, plus=1, minus=1)
        )
        assert (
            rounding(10, 10 + sign * 3.49, unit=1, plus=6)
            == 'yes'
            != rounding(10, 10 + sign * 3.51, unit=1, plus=6)
        )
        assert rounding(10, 10 + sign, unit=0) == 'no' and rounding(10, 10, unit=0) == 'yes'
    assert [rounding(10, 10 + d) for d in (0.009, 0.011, -0.004, -0.006)] == [
        'if digits were cut',
        'no',
        'yes',
        'no',
    ]


@pytest.mark.parametrize(
    'score, n, k',
    [
        (71.33, 300, 214),
        (52.66, 300, 158),
        (72.52, 1292, 937),
        (0, 300, 0),
        (100, 300, 300),
        (61.64, 495, None),
        (66.6, 300, None),
    ],
)
def test_counts(score, n, k):
    """Right answers behind a share, rounded or cut; none where no count fits."""
    assert paper._counts(score, n).tolist() == ([] if k is None else [k])
    assert paper._exact(score, n) == (score if k is None else 100 * k / n)


def test_counts_of_the_data():
    """Table 8's two pathways make its total; Table 7 has 16 corruptions in four categories."""

    def value(name):
        return paper_number(8, 'value', property=name)

    assert value('direct_answer_samples') + value('generate_then_answer_samples') == value(
        'total_samples'
    )
    assert (
        len(paper_table(7)) == value('corruption_types') == 16
        and paper_table(7).category.nunique() == 4
    )


def test_shipped_as_package_data():
    """The CSV files lie inside the package, where an installation finds them."""
    assert len(paper_tables()) == 19 and all(
        PATHS.package in p.parents for p in paper_tables().values()
    )
