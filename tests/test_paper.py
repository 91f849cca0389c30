"""The paper's numbers and the audit of their arithmetic."""
import math

import pytest
from clear_nb.core import PATHS
from clear_nb.paper import audit, paper_number, paper_table, paper_tables


@pytest.mark.parametrize('n', range(1, 16))
def test_all_tables(n):
    """Tables 1 to 15 are there and not empty."""
    assert len(paper_table(n)) > 1


def test_names():
    """Number, full name and short name mean the same table."""
    assert paper_table(7).equals(paper_table('table07_corruptions')) and paper_table(7).equals(paper_table('corruptions'))


@pytest.mark.parametrize('name', [0, 16, 'nothing', ''])
def test_unknown_table(name):
    """The error says what exists."""
    with pytest.raises(ValueError, match='no table'): paper_table(name)


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


@pytest.mark.parametrize('column, row, message', [
    ('AGV', dict(method='Bagel'), "no column 'AGV': did you mean 'AVG'"), ('AVG', dict(methd='Bagel'), "did you mean 'method'"),
    ('AVG', dict(method='Bagle'), '0 rows'), ('AVG', dict(group='clear'), '3 rows'), ('AVG', {}, '9 rows'), ('group', dict(method='Bagel'), 'not a number')])
def test_bad_address(column, row, message):
    """Anything but exactly one number is refused."""
    with pytest.raises(ValueError, match=message): paper_number(1, column, **row)


def test_audit_finds_what_does_not_add_up():
    """Three of the checks fail; each has a consequence."""
    t = audit()
    wrong = t[~t.adds_up].set_index('quantity')
    assert wrong.index.tolist() == ['Bagel: AVG of seven sets', 'overall: mean of CLEAR-RL', 'high: Total with R-Bench-Dis']
    assert wrong.loc['Bagel: AVG of seven sets', 'recomputed'] == pytest.approx(59.863)
    assert (wrong.consequence != 'not explained').all() and (t[t.adds_up].consequence == '').all()
    assert set(t.table) == {'1', '1, 2', '2', '9', '10', '11', 'figure 5'}


def test_counts_of_the_data():
    """Table 8's two pathways make its total; Table 7 has 16 corruptions in four categories."""
    value = lambda name: paper_number(8, 'value', property=name)
    assert value('direct_answer_samples')+value('generate_then_answer_samples') == value('total_samples')
    assert len(paper_table(7)) == value('corruption_types') == 16 and paper_table(7).category.nunique() == 4


def test_shipped_as_package_data():
    """The CSV files lie inside the package, where an installation finds them."""
    assert len(paper_tables()) == 18 and all(PATHS.package in p.parents for p in paper_tables().values())
