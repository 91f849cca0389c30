"""The benchmark of stage 3 runs, its slow loops make the trajectories of the batch, and its
memory child counts the cache.
"""

import json
import sys

import pytest
import torch

from clear_nb.core import ROOT
from clear_nb.generate import generate

sys.path.insert(0, str(ROOT / 'benchmarks'))
import grpo as bench  # noqa: E402

SMALL = '--shapes tiny --prompts 2 --group 6 --tokens 5 --steps 3 --train 2 --repeats 1 --train-repeats 1 --memory-tokens 3'.split()


@pytest.fixture
def threads():
    """The script sets the number of threads."""
    n = torch.get_num_threads()
    yield
    torch.set_num_threads(n)


@pytest.fixture(scope='module')
def often():
    """A model that asks for a restoration, or ends, at every fifth token."""
    return bench.world('tiny', chance=0.2)


def test_main(threads, tmp_path):
    """Every comparison at the smallest settings, and the record of it; memory is measured in
    child processes.
    """
    out = bench.main([*SMALL, '--groups', '1', '2', '--out', str(tmp_path / 'grpo.json')])['tiny']
    r, m = out['rollouts'], out['memory']
    assert r['trajectories'] == 12 and all(r[k]['median'] > 0 for k in ('rebuilt', 'copied'))
    assert all(m['median'] > 0 and 1 < m['tokens'] < 1.5 for m in out['training'].values()) and set(
        out['training']
    ) == {'mixed', 'restoring'}
    assert (
        m['groups'] == [1, 2]
        and all(p['update'] > 0 and p['rollouts'] >= p['start'] for p in m['peaks'])
        and m['update']['r2'] == pytest.approx(1)
    )
    assert json.loads((tmp_path / 'grpo.json').read_text())['tiny'] == json.loads(json.dumps(out))


@pytest.mark.parametrize('make', [bench.Rebuilt, bench.Copied])
def test_one_by_one_makes_the_batch(often, make):
    """With a cache made anew for every token, and with one copied for every token: tokens,
    log-probabilities and denoising states of the batch, for direct and restoring rows.
    """
    model, z = often
    s = bench.sampling(bench.arguments(SMALL))
    rolls = generate(model, bench.questions(model, z, 2), s, bench.SEED, 6)
    assert {bool(r.restorations) for r in rolls} == {False, True} and len(
        {bench.spoken(r) for r in rolls}
    ) > 2
    for i, r in enumerate(rolls):
        mine = bench.alone(make, model, r.prompt, s, i)
        assert bench.same(r, mine)
        for a, b in zip(r.turns, mine.turns):
            assert a.ended == b.ended and a.logp == pytest.approx(b.logp, abs=1e-4)
        for a, b in zip(r.restorations, mine.restorations):
            assert torch.allclose(a.states, b.states, atol=1e-4)


def test_difference_is_noticed(often):
    """A trajectory of another row is not the same."""
    model, z = often
    s = bench.sampling(bench.arguments(SMALL))
    rolls = generate(model, bench.questions(model, z, 1), s, bench.SEED, 6)
    assert not bench.same(rolls[0], rolls[1]) or not bench.same(rolls[0], rolls[2])


def test_few_stand_for_many():
    """The trajectories that are timed: of median length, direct and restoring apart, with how
    many they stand for.
    """

    class Roll:
        def __init__(self, n, restored):
            self.turns, self.restorations = [type('T', (), dict(logp=[0.0] * n))], [0] * restored

    rolls = [Roll(n, k) for n, k in ((3, 0), (9, 0), (5, 0), (20, 1), (7, 1), (8, 1))]
    assert (
        bench.typical(rolls, 1) == [(3, [2]), (3, [5])] and bench.typical(rolls[:3], 2)[0][0] == 3
    )


def test_forced_tokens(often):
    """The memory child needs equal lengths: every member says the full length, restores once,
    and never ends by itself.
    """
    model, z = bench.world('tiny', chance=0.0)
    s = bench.sampling(bench.arguments(SMALL))
    model.language_model.lm_head.forced = (
        [None] * (s.max_new - 1) + [bench.ASK] + [None] * (s.max_new + 1)
    )
    rolls = generate(model, bench.questions(model, z, 1), s, bench.SEED, 3)
    assert all(
        [len(t.ids) for t in r.turns] == [s.max_new] * 2
        and len(r.restorations) == 1
        and not r.turns[-1].ended
        for r in rolls
    )


def test_flow_term_adds_work(often):
    """With λ = 0 no noised latent is packed and the generator's output layer gets no gradient;
    with λ > 0 it does.
    """
    model, z = often
    s = bench.sampling(bench.arguments(SMALL))
    rolls = generate(model, bench.questions(model, z, 1), s, bench.SEED, 6)
    bench.freeze(model, 'vae.', 'vit_model.', 'connector.')
    for weight in (0.0, 0.3):
        bench.update(model, rolls, lambda_flow=weight)()()
        assert (model.llm2vae.weight.grad is not None) == (weight > 0)
        model.zero_grad()
