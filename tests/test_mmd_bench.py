"""Benchmarks, scoring and records of the evaluation."""
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from clear_nb import degrade, generate, mmd_bench as mb, scenes
from clear_nb.base import new_model
from clear_nb.core import load_preset, read_records, rng
from clear_nb.report import scores_frame, table1, table2, trigger_rates
from clear_nb.reward import choices, match_option
from clear_nb.train import accelerator

GOLDEN = Path(__file__).parent/'golden'/'scoring'
PRESET = load_preset('smoke')


@pytest.fixture(scope='module')
def model(): return new_model(PRESET, 0, 50)


def without_time(cell): return {k: v for k, v in cell.items() if k != 'seconds'}


# Building

@pytest.mark.parametrize('benchmark', mb.BENCHMARKS)
def test_build_repeats(benchmark):
    """The same arguments give the same rows, with any number of threads; another seed gives others."""
    one = mb.build(benchmark, 'hard', 6)
    assert mb.version(one) == mb.version(mb.build(benchmark, 'hard', 6, workers=3))
    assert mb.version(one) != mb.version(mb.build(benchmark, 'hard', 6, seed=1))


def test_severities_share_questions_and_corruptions():
    """Only the pictures differ between severities, and they differ everywhere but at clean."""
    levels = {s: mb.build('realworldqa', s, 20) for s in mb.LEVELS}
    assert len({mb.item_ids(r) for r in levels.values()}) == 1 and len({mb.version(r) for r in levels.values()}) == 4
    assert len({tuple(r.corruption for r in rows) for rows in levels.values()}) == 1
    changed = {s: sum(not np.array_equal(r.image, r.clean) for r in rows) for s, rows in levels.items()}
    assert changed['clean'] == 0 and changed['hard'] >= 19


def test_a_longer_set_begins_with_the_shorter():
    """A picture does not depend on how many come after it."""
    assert mb.version(mb.build('mmstar', 'mid', 10)[:4]) == mb.version(mb.build('mmstar', 'mid', 4))


def test_corruptions_follow_the_weights():
    """Categories get a quarter each, corruptions their share of it; different benchmarks draw differently."""
    names = Counter(mb.drawn('mmvet', u) for u in range(8000))
    total = sum(degrade.BENCH_WEIGHTS.values())
    assert all(abs(names[c]/8000-w/total) < .012 for c, w in degrade.BENCH_WEIGHTS.items())
    assert [mb.drawn('mmvet', u) for u in range(20)] != [mb.drawn('mmstar', u) for u in range(20)]


def test_rolls_and_pairs():
    """Four rolls share a picture; the pictures of a pair share corruption and random numbers."""
    rolls = mb.build('mmbench', 'hard', 5)
    assert Counter(r.unit for r in rolls) == {k: 4 for k in range(5)} and all(r.image is rolls[4*r.unit].image for r in rolls)
    assert all({r.question.answer for r in rolls if r.unit == u} == set('ABCD') for u in range(5))
    pairs = mb.build('mmvp', 'hard', 40)
    assert [len({r.corruption for r in pairs if r.unit == u}) for u in range(20)] == [1]*20
    noisy = [(a, b) for a, b in zip(pairs[::2], pairs[1::2]) if a.corruption == 'gaussian_noise']
    for a, b in noisy:
        same = (a.clean == b.clean).all(-1)
        assert np.array_equal(a.image[same], b.image[same]) and not np.array_equal(a.image, b.image)
    assert noisy


def test_full_design():
    """Every unit under every corruption, with units of its own."""
    rows = mb.build('mmbench', 'low', 2, design='full')
    assert len(rows) == 2*4*16 and len({r.unit for r in rows}) == 32 and Counter(r.corruption for r in rows) == dict.fromkeys(degrade.CORRUPTIONS, 8)
    assert len(mb.build('mmbench', 'clean', 2, design='full')) == 8
    cell = mb.result(rows, [r.question.answer for r in rows], None)
    assert Counter(cell['corruption']) == dict.fromkeys('abcdefghijklmnop', 2)


@pytest.mark.parametrize('kw, match', [(dict(benchmark='mmbenchh'), 'mmbench'), (dict(severity='high'), 'severity'), (dict(design='half'), 'design')])
def test_bad_names(kw, match):
    """One sentence says what is wrong."""
    with pytest.raises(ValueError, match=match): mb.build(**{**dict(benchmark='mmvet', severity='hard', n=2), **kw})


def test_cache(tmp_path):
    """Rows survive the file; a changed file is refused; the arguments name the file."""
    rows = mb.cached('easyvqa', 'mid', 5, folder=tmp_path)
    assert mb.version(rows) == mb.version(mb.build('easyvqa', 'mid', 5)) == mb.version(mb.cached('easyvqa', 'mid', 5, folder=tmp_path))
    mb.cached('easyvqa', 'mid', 5, seed=1, folder=tmp_path)
    first, second = sorted(tmp_path.iterdir(), key=lambda p: p.stat().st_mtime)
    with np.load(first) as f: parts = dict(f)
    parts['image'][0, 0, 0, 0] ^= 1
    np.savez_compressed(first, **parts)
    with pytest.raises(ValueError, match='delete it'): mb.cached('easyvqa', 'mid', 5, folder=tmp_path)


# Scoring

def test_golden_option_matching():
    """Every stored case of the release's letter matching."""
    cases = [json.loads(line) for line in (GOLDEN/'option_matching.jsonl').read_text().splitlines()]
    wrong = [c for c in cases if match_option(c['prediction'], c['choices']) != c['expected']]
    assert len(cases) == 220 and wrong == []


def rows_of(case):
    """Golden rows as (unit, is it right?), in the order of the index; groups without a base row are dropped."""
    rows = sorted(case['rows'], key=lambda r: r['index'])
    def ok(r): return match_option(r['prediction'] or 'nan', {c: r[c] for c in 'ABCD' if r[c] is not None}) == r['answer']
    base = {r['index'] for r in rows}
    return [(r['index'] % 1_000_000, ok(r)) for r in rows if r['index'] % 1_000_000 in base]


def test_golden_protocols():
    """Circular groups and plain questions of the release's protocol (exact matching)."""
    cases = json.loads((GOLDEN/'protocol_cases.json').read_text())
    units, ok = zip(*rows_of(cases['circular']))
    assert dict(zip(map(str, dict.fromkeys(units)), map(int, mb.all_right(units, ok)))) == cases['circular']['hits']
    plain = {str(r['index']): r for r in cases['vanilla_with_split']['rows']}
    # question 9 has the answer Z, which the release gives to whatever it cannot read
    for key, value in rows_of(cases['vanilla_with_split']): assert key == 9 or cases['vanilla_with_split']['hits'][str(key)] == value, plain[str(key)]


def test_every_answer_is_recognised():
    """Its own answer is right for every question of every benchmark, and so is the option's text; another letter is wrong."""
    for b in mb.BENCHMARKS:
        for item in mb.source(b, 24):
            q = item.question
            assert mb.right(q, q.answer) and mb.right(q, f' {q.answer}\n')
            if choices(q):
                assert not any(mb.right(q, c) for c in set('ABCD')-{q.answer})
                assert sum(q.truth in o for o in q.options) > 1 or mb.right(q, q.truth)


def test_circular_and_pairs():
    """One wrong roll costs the question; one wrong picture costs the pair, but only one question."""
    rolls, pairs = mb.build('mmbench', 'clean', 3), mb.build('mmvp', 'clean', 6)
    for rows, want in ((rolls, '110'), (pairs, '111110')):
        said = [r.question.answer for r in rows]
        said[-1] = 'unreadable'
        cell = mb.result(rows, said, [False]*(len(rows)-1)+[True])
        assert cell['correct'] == want and cell['questions'] == len(rows) and cell['unparsable'] == (rows is rolls)
        assert len(cell['trigger']) == len(want) and cell['triggered'] == 1 and abs(cell['accuracy']-100*(1-1/len(rows))) < 1e-9
    assert cell['pairs'] == '110' and mb.result(rolls, [r.question.answer for r in rolls], None)['pairs'] is None


# Asking

@pytest.mark.parametrize('name', mb.SUBJECTS)
def test_batches(model, name):
    """The size of a batch changes nothing, for every kind of subject."""
    rows = mb.build('mmbench', 'hard', 2)+mb.build('mmbench', 'hard', 4)[8:]
    cells = [mb.evaluate(model, rows, mb.SUBJECTS[name], replace(PRESET.eval, batch=b), max_new=6, progress=False) for b in (3, 16)]
    assert without_time(cells[0]) == without_time(cells[1])
    assert (cells[0]['trigger'] is not None) == mb.SUBJECTS[name].restores


@pytest.mark.parametrize('name', ['clear_sft', 'clear_rl', 'oracle'])
@pytest.mark.parametrize('precision', ['no', 'bf16'])
def test_batches_with_restorations(model, monkeypatch, name, precision):
    """The same holds when rows restore at different times; an untrained model is made to ask for it by its random numbers."""
    marker, seen = model.tokenizer.convert_tokens_to_ids('<image_restore>'), []
    def draw(logits, u, temperature, top_p):
        ids = torch.where(u.to(logits.device) > .8, marker, logits[:, :marker].argmax(-1))
        return ids, torch.zeros(len(ids))
    monkeypatch.setattr(generate, 'draw', draw)
    real = mb.result
    monkeypatch.setattr(mb, 'result', lambda rows, said, restored: seen.append(said) or real(rows, said, restored))
    monkeypatch.setattr(mb, 'read', lambda texts, kind: ' | '.join(texts))
    rows = mb.build('realworldqa', 'hard', 8)
    cells = [mb.evaluate(model, rows, mb.SUBJECTS[name], replace(PRESET.eval, batch=b), max_new=6, acc=accelerator(precision), progress=False) for b in (3, 16)]
    assert without_time(cells[0]) == without_time(cells[1]) and seen[0] == seen[1] and set(cells[0]['trigger']) == {'0', '1'}


class Script:
    """Stands in for `generate`: remembers what it was given and says what it was told to."""
    def __init__(self, texts): self.texts, self.calls = texts, []

    def __call__(self, model, prompts, sampling, noise, oracle=None):
        self.calls.append((prompts, sampling, noise, oracle))
        texts = [self.texts(noise.first+k) for k in range(len(prompts))]
        return [type('R', (), dict(texts=t, restorations=t[:-1]))() for t in texts]


def test_what_the_generator_gets(model, monkeypatch):
    """Rows in order, the subject's inputs, policy and oracle latents; restorations become triggers."""
    rows = mb.build('cvbench', 'hard', 5)
    say = Script(lambda k: (['<think>x</think><image_restore>'] if k % 2 else [])+[f'<think>x</think><answer>{rows[k].question.answer}</answer>'])
    monkeypatch.setattr(mb, 'generate', say)
    cell = mb.evaluate(model, rows, mb.SUBJECTS['oracle'], replace(PRESET.eval, batch=2), progress=False)
    assert (cell['correct'], cell['trigger']) == ('11111', '01010') and [n.first for _, _, n, _ in say.calls] == [0, 2, 4]
    assert all(s.policy == 'always' and s.mode == 'bridge' and s.temperature == s.sigma == 0 and s.steps == PRESET.eval.denoise_steps for _, s, _, _ in say.calls)
    clean = mb.encode(model, torch.from_numpy(rows[2].clean).permute(2, 0, 1)[None])
    assert torch.allclose(say.calls[1][3][0], clean[0], atol=1e-5)
    seen = mb.encode(model, torch.from_numpy(rows[2].image).permute(2, 0, 1)[None])
    assert torch.allclose(say.calls[1][0][0][0].latent, seen[0], atol=1e-5)
    mb.evaluate(model, rows, mb.SUBJECTS['text_cot'], PRESET.eval, progress=False)
    assert all(not hasattr(p[0], 'latent') for p in say.calls[-1][0]) and say.calls[-1][1].policy == 'never'


def test_direct_answers_need_no_tags(model, monkeypatch):
    """The base's raw text is scored; a trace without tags is not."""
    rows = mb.build('mmvet', 'clean', 4)
    monkeypatch.setattr(mb, 'generate', Script(lambda k: [rows[k].question.answer]))
    got = {n: mb.evaluate(model, rows, mb.SUBJECTS[n], PRESET.eval, progress=False) for n in ('base', 'matched')}
    assert [got[n]['correct'] for n in got] == ['1111', '0000'] and got['matched']['unparsable'] == 4


# Records

@pytest.fixture(scope='module')
def records(tmp_path_factory, model):
    root = tmp_path_factory.mktemp('records')
    mb.evaluate_all(replace(PRESET, grpo=replace(PRESET.grpo, max_new_tokens=4)), 0, lambda *a: model, 'base,clear_rl,oracle', progress=False, root=root)
    return read_records('smoke', root=root)


def test_report_accepts_the_records(records):
    """One record per subject; together they make Table 1, Table 2 and the trigger rates."""
    assert [r['variant'] for r in records] == ['base', 'clear_rl', 'oracle'] and all(r['notebook'] == '04_mmd_bench' for r in records)
    frame = scores_frame(records)
    assert len(frame) == 7*4+7*4+7*2 and frame.n.eq(2).all()
    names = {f: v.title for f, v in scenes.FAMILIES.items()}
    one, two = table1(frame, titles=names), table2(frame)
    assert one.method.tolist() == two.method.tolist() == ['base model', 'CLEAR-RL', 'CLEAR, clean latent at the bridge']
    assert one.shape == (3, 1 + 2*8) and one['MM-Vet (paper, 7B)'][0] == 45.09
    assert trigger_rates(frame).shape == (7, 4)


def test_records_are_read_back(records):
    """Outcomes per corruption hold every hard question once."""
    found = mb.per_corruption(records, 'base')
    assert list(found) == list(degrade.CORRUPTIONS) and sum(map(len, found.values())) == 14
    scores = mb.recorded(records, 'base')
    rows = mb.build('mmvet', 'hard', 2)
    assert {c for c, v in found.items() if len(v)} >= {r.corruption for r in rows} and scores['mmvet', 'hard'].shape == (2,)


def test_seeds_are_averaged():
    """Two seeds of the same questions give one value per question."""
    def record(bits): return dict(metrics=dict(scores=dict(base=dict(mmvet=dict(hard=dict(correct=bits, trigger=None, corruption='ab'))))))
    assert mb.recorded([record('10'), record('11')], 'base')['mmvet', 'hard'].tolist() == [100, 50]
    found = mb.per_corruption([record('10'), record('11')], 'base')
    assert found['lens_blur'].tolist() == [100] and found['lens_flare'].tolist() == [50] and not len(found['graffiti'])


def test_resume(tmp_path, model, monkeypatch, capsys):
    """A subject is skipped only for the same checkpoint, numbers and code; a missing checkpoint is said."""
    path, preset = model.save_pretrained(tmp_path/'ck'), replace(PRESET, eval=replace(PRESET.eval, n=1, severities=('hard',)))
    monkeypatch.setattr(mb, 'find_stage', lambda *a: path)
    monkeypatch.setattr(mb, 'BENCHMARKS', ('mmvet',))
    def go(p=preset, seed=0): return len(mb.evaluate_all(p, seed, lambda *a: model, 'base', progress=False, root=tmp_path/'results'))
    assert [go(), go(), go(seed=1), go()] == [1, 0, 1, 0] and 'up to date' in capsys.readouterr().out
    assert go(replace(preset, eval=replace(preset.eval, n=2))) == 1
    for d in (1, -1): # change the checkpoint, then bring it back
        with torch.no_grad(): model.llm2vae.bias += d
        model.save_pretrained(path)
        assert go() == 1
    monkeypatch.setattr(mb, 'CODE', mb.CODE[:-1])
    assert go() == 1
    monkeypatch.undo()
    assert mb.evaluate_all(replace(preset, name='nowhere'), 99, None, 'base', root=tmp_path) == [] and 'unknown' in capsys.readouterr().out


def test_overrides_do_not_replace_the_record(tmp_path, model):
    """A run with another n keeps its own file."""
    few = load_preset('smoke', **{'eval.n': 1, 'eval.severities': ['hard']})
    mb.evaluate_all(few, 0, lambda *a: model, 'base', progress=False, root=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ['04_mmd_bench-base+eval.n=1+eval.severities=.hard.-seed0.json']


def test_guessing():
    """Random letters: a quarter of the rolls, almost no question."""
    rows = mb.build('mmbench', 'clean', 60)
    said = ['ABCD'[k] for k in rng('guess').integers(4, size=len(rows))]
    cell = mb.result(rows, said, None)
    assert 15 < cell['accuracy'] < 35 and cell['correct'].count('1') <= 3 and cell['unparsable'] == 0
