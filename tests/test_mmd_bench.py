"""Benchmarks, scoring and records of the evaluation."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from clear_nb import ask, cli, decode, degrade, identity, scenes, variants
from clear_nb import mmd_bench as mb
from clear_nb.base import load_stage, new_model
from clear_nb.bench import read_results
from clear_nb.core import ROOT, rng
from clear_nb.generate import Rollout
from clear_nb.presets import load_preset
from clear_nb.records import read_records
from clear_nb.reward import rule_says_right
from clear_nb.scoring import score_reply
from clear_nb.stats import scores_frame
from clear_nb.tables import table1, table2, trigger_rates
from clear_nb.train import accelerator

PRESET = load_preset('smoke')


@pytest.fixture(scope='module')
def model():
    return new_model(PRESET, 0, 50)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('benchmarks')


@pytest.fixture(scope='module')
def asked(folder):
    return lambda benchmark, severity, n, **kw: mb.benchmark_rows(
        benchmark, severity, n, folder, **kw
    )


def result(*cell):
    return mb.cell_results([mb.AnsweredRows(*cell)])[0]


def answers(rows):
    return [r.seen.answer for r in rows]


# Building


@pytest.mark.parametrize('benchmark', mb.BENCHMARKS)
def test_same_questions(benchmark, asked):
    """The rows are the test split's questions, clean and corrupted, word for word; another seed
    gives others.
    """
    items = (
        scenes.easy_vqa_benchmark(6, 0)
        if benchmark == 'easyvqa'
        else scenes.benchmark(benchmark, 3 if benchmark == 'mmvp' else 6, 0, 'test')
    )
    for severity in ('clean', 'mid'):
        rows = asked(benchmark, severity, 6)
        assert len(rows) == len(items)
        for r, item in zip(rows, items):
            q = mb.as_question(r.seen)
            assert (q.prompt, q.answer, q.family, q.ability) == (
                item.question.prompt,
                item.question.answer,
                benchmark,
                item.question.ability,
            )
            assert np.array_equal(r.clean.pixels(), item.image) and r.seen.severity == severity
    assert mb.rows_hash(rows) != mb.rows_hash(asked(benchmark, 'mid', 6, seed=1))


def test_workers_change_nothing(asked, tmp_path):
    """One process or two: the same content."""
    assert mb.rows_hash(asked('mmbench', 'hard', 6)) == mb.rows_hash(
        mb.benchmark_rows('mmbench', 'hard', 6, tmp_path, workers=2)
    )


def test_severities_share_questions_and_corruptions(asked):
    """Only the pictures differ between severities, and they differ everywhere but at clean."""
    levels = {s: asked('realworldqa', s, 20) for s in degrade.SEVERITIES}
    assert (
        len({mb.questions_hash(r) for r in levels.values()}) == 1
        and len({mb.rows_hash(r) for r in levels.values()}) == 4
    )
    assert (
        len({tuple(r.seen.corruption for r in rows) for s, rows in levels.items() if s != 'clean'})
        == 1
    )
    changed = {
        s: sum(not np.array_equal(r.seen.pixels(), r.clean.pixels()) for r in rows)
        for s, rows in levels.items()
    }
    assert changed['clean'] == 0 and changed['hard'] >= 19


def test_a_longer_set_begins_with_the_shorter(asked):
    """A picture does not depend on how many come after it."""
    assert mb.rows_hash(asked('mmstar', 'mid', 10)[:4]) == mb.rows_hash(asked('mmstar', 'mid', 4))


def test_rolls_and_pairs(asked):
    """Four rolls share a picture; the pictures of a pair share corruption and random numbers."""
    rolls = asked('mmbench', 'hard', 5)
    assert Counter(r.seen.group for r in rolls) == {str(k): 4 for k in range(5)} and all(
        r.seen.image == rolls[k // 4 * 4].seen.image for k, r in enumerate(rolls)
    )
    assert all(set(answers(rolls[4 * k : 4 * k + 4])) == set('ABCD') for k in range(5))
    pairs = asked('mmvp', 'hard', 40)
    assert [len({r.seen.corruption for r in pairs[2 * k : 2 * k + 2]}) for k in range(20)] == [
        1
    ] * 20
    noisy = [
        r for r in asked('mmvp', 'hard', 4, design='full') if r.seen.corruption == 'gaussian_noise'
    ]
    assert len(noisy) == 4
    for a, b in (noisy[:2], noisy[2:]):
        same = (a.clean.pixels() == b.clean.pixels()).all(-1)
        assert np.array_equal(a.seen.pixels()[same], b.seen.pixels()[same]) and not np.array_equal(
            a.seen.pixels(), b.seen.pixels()
        )


def test_full_design(asked):
    """Every question under every corruption, one corruption after the other; the report
    averages over them.
    """
    rows = asked('mmbench', 'low', 2, design='full')
    assert len(rows) == 2 * 4 * 16 and Counter(r.seen.corruption for r in rows) == dict.fromkeys(
        degrade.CORRUPTIONS, 8
    )
    clean = asked('mmbench', 'clean', 2, design='full')
    said = [
        r.seen.answer if r.seen.group == '0' or r.seen.corruption == 'graffiti' else 'Z'
        for r in rows
    ]
    cell = result(rows, said, [r.seen.corruption == 'graffiti' for r in rows])
    assert (
        len(clean) == 8
        and cell['item_ids'] == result(clean, answers(clean), None)['item_ids']
        and cell['variants'] == 16
    )
    assert (
        cell['corruption'] == ''.join(2 * c for c in 'abcdefghijklmnop')
        and cell['correct'] == '10' * 14 + '11' + '10'
        and cell['refused'] == 4 * 15
    )
    record = dict(
        seed=0,
        metrics=dict(
            scores=dict(toy=dict(mmbench=dict(low=cell, clean=result(clean, answers(clean), None))))
        ),
    )
    low, whole = scores_frame([record]).itertuples()
    assert (
        (low.n, whole.n) == (2, 2)
        and low.correct.tolist() == [100, 100 / 16]
        and low.trigger == 100 / 16
        and whole.mean == 100
    )
    assert mb.per_corruption([record], 'toy', 'low')['graffiti'].tolist() == [100, 100]


@pytest.mark.parametrize(
    'kw, match',
    [
        (dict(benchmark='mmbenchh'), 'mmbench'),
        (dict(severity='high'), 'severity'),
        (dict(design='half'), 'design'),
        (dict(n=0), 'n=0'),
    ],
)
def test_bad_names(kw, match, asked):
    """One sentence says what is wrong."""
    with pytest.raises(ValueError, match=match):
        asked(**{**dict(benchmark='mmvet', severity='hard', n=2), **kw})


def test_files(tmp_path):
    """Made once; the arguments name the folder; damage is refused."""
    one = mb.corrupted_files('easyvqa', 5, tmp_path)
    before = {p.name: p.stat().st_mtime_ns for p in one.iterdir()}
    mb.corrupted_files.cache_clear()
    assert (
        mb.corrupted_files('easyvqa', 5, tmp_path) == one
        and {p.name: p.stat().st_mtime_ns for p in one.iterdir()} == before
    )
    assert (
        len(
            {
                mb.corrupted_files('easyvqa', *a)
                for a in ((5, tmp_path), (5, tmp_path, 1), (5, tmp_path, 0, 'full'), (4, tmp_path))
            }
        )
        == 4
    )
    path, whole = one / 'rows-00000.parquet', (one / 'rows-00000.parquet').read_bytes()
    path.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    mb.corrupted_files.cache_clear()
    with pytest.raises(ValueError, match='rows-00000.parquet'):
        mb.corrupted_files('easyvqa', 5, tmp_path)


def test_changed_code_finds_no_old_pictures(tmp_path, monkeypatch):
    """Code that draws or corrupts gives another folder; code that does neither, and remarks, do
    not.
    """
    before, source = mb.corrupted_files('mmvet', 2, tmp_path), identity.module_source
    for module, more, other in (
        ('core', '\nadded = 1', True),
        ('scenes', '\nadded = 1', True),
        ('degrade', '\n# a remark', False),
        ('generate', '\nadded = 1', False),
    ):
        mb.corrupted_files.cache_clear()

        def change(m):
            return source(m) + more if m == module else source(m)

        with monkeypatch.context() as patch:
            patch.setattr(identity, 'module_source', change)
            assert (mb.corrupted_files('mmvet', 2, tmp_path) != before) == other, module
    mb.corrupted_files.cache_clear()


def test_pairs_belong_together(tmp_path, monkeypatch):
    """A warm cache is never paired with other scenes, nor with pictures of unknown origin."""
    folder = mb.corrupted_files('mmstar', 3, tmp_path)
    assert len(mb.benchmark_rows('mmstar', 'hard', 3, tmp_path)) == 3
    with monkeypatch.context() as patch:
        patch.setattr(mb, 'clean_samples', lambda *a: tuple(mb._source('mmstar', 3, 1)))
        with pytest.raises(ValueError, match='made from another clean picture'):
            mb.benchmark_rows('mmstar', 'hard', 3, tmp_path)
    mb._clean_note(folder).unlink()
    with pytest.raises(ValueError, match='delete the folder, it is made anew'):
        mb.benchmark_rows('mmstar', 'hard', 3, tmp_path)


def test_missing_rows_are_refused(tmp_path, monkeypatch):
    """A benchmark that lost rows is not asked."""
    monkeypatch.setattr(
        variants, '_too_small', lambda p, s, c, v: 'too small' if s.index == '3' else ''
    )
    with pytest.raises(ValueError, match='rows are missing'):
        mb.corrupted_files('mmstar', 7, tmp_path)


# Scoring


def test_reward_and_score_agree():
    """What a model is trained to say is worth the same to both, right or wrong, for every
    question of every benchmark.
    """
    for b in mb.BENCHMARKS:
        samples = mb.clean_samples(b, 24)
        words = {s.answer for s in samples} | set('ABCD')
        for s in samples:
            for said in words | set(s.options.values()) | {'', ' ', f' {s.answer}\n'}:
                assert rule_says_right(mb.as_question(s), said) == (
                    score_reply(s, said, mb.BENCHMARK_PROTOCOLS[b]).value == 1
                ), (s.prompt, s.answer, said)


def test_every_answer_is_recognised(asked):
    """Its own answer is right for every question of every benchmark, and so is the option's
    text; another letter is wrong.
    """
    for b in mb.BENCHMARKS:
        rows = asked(b, 'clean', 24)

        def ask(said):
            return result(rows, [said(r.seen) for r in rows], None)

        assert (
            set(ask(lambda s: s.answer)['correct'])
            == set(ask(lambda s: f' {s.answer}\n')['correct'])
            == {'1'}
        )
        assert ask(lambda s: s.options.get(s.answer, s.answer))['accuracy'] == 100
        if rows[0].seen.options:
            assert ask(lambda s: next(c for c in s.options if c != s.answer))['accuracy'] == 0


def test_circular_and_pairs(asked):
    """One wrong roll costs the question; one wrong picture costs the pair, but only one
    question.
    """
    rolls, pairs = asked('mmbench', 'clean', 3), asked('mmvp', 'clean', 6)
    for rows, want in ((rolls, '110'), (pairs, '111110')):
        said = answers(rows)
        said[-1] = 'unreadable'
        cell = result(rows, said, [False] * (len(rows) - 1) + [True])
        assert (
            cell['correct'] == want
            and cell['questions'] == len(rows)
            and cell['unparsable'] == (rows is rolls)
            and cell['refused'] == 0
        )
        assert (
            len(cell['trigger']) == len(want)
            and cell['triggered'] == 1
            and abs(cell['accuracy'] - 100 * (1 - 1 / len(rows))) < 1e-9
        )
    assert cell['pairs'] == '110' and result(rolls, answers(rolls), None)['pairs'] is None


def test_units_keep_the_order_of_the_questions(asked):
    """Outcome k is question k, however many there are (indexes sort as numbers)."""
    rows = asked('mmbench', 'hard', 12)
    for k in (0, 2, 10, 11):
        said = [r.seen.answer if int(r.seen.group) == k else '' for r in rows]
        assert result(rows, said, None)['correct'] == ''.join('01'[j == k] for j in range(12))
    cell = result(rows, answers(rows), None)
    assert cell['corruption'] == ''.join(
        mb.CORRUPTION_LETTERS[r.seen.corruption] for r in rows[::4]
    )


# Asking


@pytest.mark.parametrize('name', mb.SUBJECTS)
def test_batches(model, name, asked):
    """The size of a batch changes nothing, for every kind of subject."""
    rows = asked('mmbench', 'hard', 4)
    cells = [
        mb.subject_cell(model, rows, mb.SUBJECTS[name], replace(PRESET.eval, batch=b), max_new=6)
        for b in (3, 16)
    ]
    assert cells[0] == cells[1]
    assert (cells[0]['trigger'] is not None) == mb.SUBJECTS[name].restores


@pytest.mark.parametrize('name', ['clear_sft', 'clear_rl', 'dec_rl', 'oracle', 'substitute'])
@pytest.mark.parametrize('precision', ['no', 'bf16'])
def test_batches_with_restorations(model, monkeypatch, name, precision, asked):
    """The same holds when rows restore at different times; an untrained model is made to ask
    for it by its random numbers.
    """
    marker, seen = model.tokenizer.convert_tokens_to_ids('<image_restore>'), []

    def draw(logits, u, temperature, top_p):
        ids = torch.where(u.to(logits.device) > 0.8, marker, logits[:, :marker].argmax(-1))
        return ids, torch.zeros(len(ids))

    monkeypatch.setattr(decode, 'draw_tokens', draw)
    real = mb.cell_results
    monkeypatch.setattr(mb, 'cell_results', lambda cells: seen.append(cells[0][1]) or real(cells))
    monkeypatch.setattr(mb, 'read_subject_answer', lambda texts, kind: ' | '.join(texts))
    rows = asked('realworldqa', 'hard', 8)
    cells = [
        mb.subject_cell(
            model,
            rows,
            mb.SUBJECTS[name],
            replace(PRESET.eval, batch=b),
            max_new=6,
            acc=accelerator(precision),
        )
        for b in (3, 16)
    ]
    assert cells[0] == cells[1] and seen[0] == seen[1] and set(cells[0]['trigger']) == {'0', '1'}


class Script:
    """Stands in for `generate`: remembers what it was given and says what it was told to."""

    def __init__(self, texts):
        self.texts, self.calls = texts, []

    def __call__(self, model, prompts, sampling, noise, restorer=None):
        self.calls.append((prompts, sampling, noise, restorer and restorer.latents))
        made = [self.texts(n.first) for n in noise.noises]
        return [Rollout([], texts=t, restorations=t[:-1]) for t in made]


def test_what_the_generator_gets(model, monkeypatch, asked):
    """Rows in order, the subject's inputs, policy and oracle latents; restorations become
    triggers.
    """
    rows = asked('cvbench', 'hard', 5)
    say = Script(
        lambda k: (
            (['<think>x</think><image_restore>'] if k % 2 else [])
            + [f'<think>x</think><answer>{rows[k].seen.answer}</answer>']
        )
    )
    monkeypatch.setattr(ask, 'generate', say)
    cell = mb.subject_cell(model, rows, mb.SUBJECTS['oracle'], replace(PRESET.eval, batch=2))
    assert (cell['correct'], cell['trigger']) == ('11111', '01010') and [
        n.noises[0].first for _, _, n, _ in say.calls
    ] == [0, 2, 4]
    assert all(
        s.policy == 'always'
        and s.mode == 'bridge'
        and s.temperature == s.sigma == 0
        and s.steps == PRESET.eval.denoise_steps
        for _, s, _, _ in say.calls
    )
    clean = mb.encode(model, torch.from_numpy(rows[2].clean.pixels()).permute(2, 0, 1)[None])
    assert torch.allclose(say.calls[1][3][0], clean[0], atol=1e-5)
    seen = mb.encode(model, torch.from_numpy(rows[2].seen.pixels()).permute(2, 0, 1)[None])
    assert torch.allclose(say.calls[1][0][0][0].latent, seen[0], atol=1e-5)
    mb.subject_cell(model, rows, mb.SUBJECTS['substitute'], replace(PRESET.eval, batch=2))
    assert (
        torch.allclose(say.calls[4][3][0], seen[0], atol=1e-5)
        and say.calls[4][1].policy == 'adaptive'
    )
    mb.subject_cell(model, rows, mb.SUBJECTS['clear_rl'], PRESET.eval)
    assert say.calls[-1][3] is None
    mb.subject_cell(model, rows, mb.SUBJECTS['text_cot'], PRESET.eval)
    assert (
        all(not hasattr(p[0], 'latent') for p in say.calls[-1][0])
        and say.calls[-1][1].policy == 'never'
    )


def test_direct_answers_need_no_tags(model, monkeypatch, asked):
    """The base's raw text is scored; a trace without tags is not."""
    rows = asked('mmvet', 'clean', 4)
    monkeypatch.setattr(ask, 'generate', Script(lambda k: [rows[k].seen.answer]))
    got = {
        n: mb.subject_cell(model, rows, mb.SUBJECTS[n], PRESET.eval) for n in ('base', 'matched')
    }
    assert [got[n]['correct'] for n in got] == ['1111', '0000'] and got['matched'][
        'unparsable'
    ] == 4


def test_pictures_restored_before(model, monkeypatch, asked):
    """The model sees the restored picture in both of its inputs, and no other; the base that
    restores nothing sees the degraded one.
    """
    rows, seen = asked('mmvet', 'hard', 12), {}
    monkeypatch.setattr(ask, 'generate', say := Script(lambda k: ['1']))
    for name in ('base_both', 'restored_base', 'self_restored_base'):
        mb.subject_cell(model, rows, mb.SUBJECTS[name], replace(PRESET.eval, batch=32))
        seen[name] = (
            torch.stack([(p[1].image + 1) * 127.5 for p in say.calls[-1][0]])
            .round()
            .to(torch.uint8),
            torch.stack([p[0].latent for p in say.calls[-1][0]]),
        )
    for pixels, latents in seen.values():
        assert torch.allclose(mb.encode(model, pixels), latents, atol=1e-4)
    before, filtered, own = (seen[k][0].permute(0, 2, 3, 1).numpy() for k in seen)
    assert all(np.array_equal(x, r.seen.pixels()) for x, r in zip(before, rows)) and all(
        np.array_equal(x, mb.denoise_classically(r.seen.pixels())) for x, r in zip(filtered, rows)
    )
    assert not any(np.array_equal(x, y) for x, y in zip(before, own))


# Records


@pytest.fixture(scope='module')
def records(tmp_path_factory, model, folder):
    root = tmp_path_factory.mktemp('records')
    mb.evaluate_all(
        replace(PRESET, grpo=replace(PRESET.grpo, max_new_tokens=4)),
        0,
        lambda *a: model,
        'base,clear_rl,oracle',
        progress=False,
        root=root,
        folder=folder,
    )
    return read_records('smoke', root=root)


def test_report_accepts_the_records(records):
    """One record per subject; together they make Table 1, Table 2 and the trigger rates."""
    assert [r['variant'] for r in records] == ['base', 'clear_rl', 'oracle'] and all(
        r['notebook'] == '04_mmd_bench' for r in records
    )
    frame = scores_frame(records)
    assert (
        len(frame) == 7 * 4 + 7 * 4 + 7 * 2 and frame.n.eq(2 - (frame.benchmark == 'mmvp')).all()
    )  # the two pictures of an MMVP pair are one
    names = {f: v.title for f, v in scenes.FAMILIES.items()}
    one, two = table1(frame, titles=names), table2(frame)
    assert (
        one.method.tolist()
        == two.method.tolist()
        == ['base model', 'CLEAR-RL', 'CLEAR, clean latent at the bridge']
    )
    assert one.shape == (3, 1 + 2 * 8) and one['MM-Vet (paper, 7B)'][0] == 45.09
    assert trigger_rates(frame).shape == (7, 4)


def test_records_are_read_back(records, asked):
    """Outcomes per corruption hold every hard question once, an MMVP pair as one."""
    found = mb.per_corruption(records, 'base')
    assert list(found) == list(degrade.CORRUPTIONS) and sum(map(len, found.values())) == 13
    scores = mb.recorded(records, 'base')
    rows = asked('mmvet', 'hard', 2)
    assert {c for c, v in found.items() if len(v)} >= {r.seen.corruption for r in rows} and scores[
        'mmvet', 'hard'
    ].shape == (2,)


def test_seeds_are_averaged():
    """Two seeds of the same questions give one value per question."""

    def record(bits, **more):
        return dict(
            metrics=dict(
                scores=dict(
                    base=dict(
                        mmvet=dict(hard=dict(correct=bits, trigger=None, corruption='ab', **more))
                    )
                )
            )
        )

    assert mb.recorded([record('10'), record('11')], 'base')['mmvet', 'hard'].tolist() == [100, 50]
    found = mb.per_corruption([record('10'), record('11')], 'base')
    assert (
        found['lens_blur'].tolist() == [100]
        and found['lens_flare'].tolist() == [50]
        and not len(found['graffiti'])
    )
    twins = [record(bits, pairs='01') for bits in ('1011', '0011')]
    for t in twins:
        t['metrics']['scores']['base']['mmvet']['hard']['corruption'] = 'aabb'
    found = mb.per_corruption(twins, 'base')
    assert found['lens_blur'].tolist() == [25] and found['lens_flare'].tolist() == [100]


def test_resume(tmp_path, model, monkeypatch, capsys):
    """A subject is skipped only for the same checkpoint, numbers and code; a missing checkpoint
    is said.
    """
    path, preset = (
        model.save_pretrained(tmp_path / 'ck'),
        replace(PRESET, eval=replace(PRESET.eval, n=1, severities=('hard',))),
    )
    monkeypatch.setattr(mb, 'find_stage', lambda *a: path)
    monkeypatch.setattr(mb, 'BENCHMARKS', ('mmvet',))

    def go(p=preset, seed=0):
        return len(
            mb.evaluate_all(
                p,
                seed,
                lambda *a: model,
                'base',
                progress=False,
                root=tmp_path / 'results',
                folder=tmp_path,
            )
        )

    assert [go(), go(), go(seed=1), go()] == [
        1,
        0,
        1,
        0,
    ] and 'up to date' in capsys.readouterr().out
    assert go(replace(preset, eval=replace(preset.eval, n=2))) == 1
    for d in (1, -1):  # change the checkpoint, then bring it back
        with torch.no_grad():
            model.llm2vae.bias += d
        model.save_pretrained(path)
        assert go() == 1
    source = identity.module_source

    def changed(m):
        return source(m) + '\nadded = 1' if m == 'mot' else source(m)

    monkeypatch.setattr(identity, 'module_source', changed)
    assert go() == 1 and 'asked anew, other code in mot' in capsys.readouterr().out
    monkeypatch.undo()
    assert (
        mb.evaluate_all(replace(preset, name='nowhere'), 99, None, 'base', root=tmp_path) == []
        and 'unknown' in capsys.readouterr().out
    )


def test_overrides_do_not_replace_the_record(tmp_path, model, folder):
    """A run with another n keeps its own file."""
    few = load_preset('smoke', **{'eval.n': 1, 'eval.severities': ['hard']})
    mb.evaluate_all(few, 0, lambda *a: model, 'base', progress=False, root=tmp_path, folder=folder)
    assert [p.name for p in tmp_path.iterdir()] == [
        '04_mmd_bench-base+eval.n=1+eval.severities=.hard.-seed0.json'
    ]


def test_replies_are_kept(tmp_path, model, folder, monkeypatch):
    """A subject that is stopped goes on where it was; its replies hold the trajectories."""
    few = load_preset('smoke', **{'eval.n': 4, 'eval.batch': 2, 'eval.severities': ['hard']})
    monkeypatch.setattr(mb, 'BENCHMARKS', ('mmvet', 'mmstar'))
    asked, real = [], mb.SubjectAdapter.__call__

    def count(self, rows):
        if len(asked) == 6:
            raise KeyboardInterrupt
        asked.extend(r.key for r in rows)
        return real(self, rows)

    monkeypatch.setattr(mb.SubjectAdapter, '__call__', count)

    def go():
        return mb.evaluate_all(
            few, 0, lambda *a: model, 'base', progress=False, root=tmp_path, folder=folder
        )

    with pytest.raises(KeyboardInterrupt):
        go()
    monkeypatch.setattr(
        mb.SubjectAdapter, '__call__', lambda self, rows: asked.extend(rows) or real(self, rows)
    )
    assert len(go()) == 1 and len(asked) == 8
    assert len(list(folder.glob('replies/base+eval.n=4*/mmstar-hard/parts/*'))) == 1


@pytest.mark.parametrize('benchmark', ['mmbench', 'realworldqa'])
def test_bench_gives_the_recorded_numbers(benchmark, tmp_path, capsys):
    """`clear-nb bench` gives the outcomes of `04_mmd_bench` for the same model and rows, to the
    bit.
    """
    grpo, n = ROOT / 'checkpoints' / 'tiny' / 'grpo', 32 if benchmark == 'mmbench' else 128
    files = mb.corrupted_files(benchmark, n, tmp_path)  # the first batch of the record
    ask_grpo = ['bench', '--model', f'clear:{grpo}', '--severity', 'hard', '--set', 'device=cpu']
    assert cli.main([*ask_grpo, '--data', str(files), '--out', str(tmp_path / 'run')]) == 0
    frame, _ = read_results(tmp_path / 'run')
    rows = mb.benchmark_rows(benchmark, 'hard', n, tmp_path)
    frame = frame.set_index('index').loc[[r.seen.index for r in rows]]
    restored = ['"restored": 0' not in d for d in frame.detail]
    cell = result(rows, frame.reply.tolist(), restored)
    tiny, acc = load_preset('tiny'), accelerator()
    grpo = load_stage(tiny, 0, 'grpo').eval()
    how = tiny.eval, tiny.grpo.max_new_tokens, acc
    assert cell == mb.subject_cell(grpo, rows, mb.SUBJECTS['clear_rl'], *how)
    if not torch.cpu.get_capabilities().get('amx_bf16'):
        pytest.skip('the records were made on a CPU with AMX')
    [record] = [r for r in read_records('tiny', '04_mmd_bench', 'clear_rl') if r['seed'] == 0]
    kept = record['metrics']['scores']['clear_rl'][benchmark]['hard']
    assert cell['correct'] == kept['correct'][: len(cell['correct'])]
    assert cell['trigger'] == kept['trigger'][: len(cell['trigger'])]


def test_guessing(asked):
    """Random letters: a quarter of the rolls, almost no question."""
    rows = asked('mmbench', 'clean', 60)
    said = ['ABCD'[k] for k in rng('guess').integers(4, size=len(rows))]
    cell = result(rows, said, None)
    assert (
        15 < cell['accuracy'] < 35 and cell['correct'].count('1') <= 3 and cell['unparsable'] == 0
    )
