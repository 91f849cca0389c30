"""Generation in a cache equals one packed pass over what was generated; batches, groups and
policies change nothing else.
"""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from test_model import CONTROL, byte_tokenizer, close, picture, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import clear_nb.decode
import clear_nb.restore
from clear_nb import flow
from clear_nb.core import torch_rng
from clear_nb.decode import (
    FirstIds,
    Noise,
    Phrase,
    TokenSequence,
    decode_text,
    draw_tokens,
    prefill,
)
from clear_nb.flow import RENORMS, Guidance
from clear_nb.generate import GivenLatents, Sampling, generate, stop_and_ban, token_budget
from clear_nb.grpo import forbidden, text_logp
from clear_nb.mot import KVCache
from clear_nb.restore import (
    RETURN_MODES,
    GuidanceCaches,
    GuidedField,
    VelocityField,
    guidance_contexts,
    prefill_guidance,
    reinject,
    restore,
)
from clear_nb.trajectory import (
    MARKER,
    Gap,
    LatentSegment,
    TextSegment,
    VitSegment,
    pack,
    token_count,
)
from clear_nb.vae import patchify, unpatchify

MARK, ANSWER = 264, 262  # whole tokens of the test tokenizer
QUESTIONS = ('what color is it?', 'how many?', 'is there a dog in the picture?')


def talker(*seed, marker=1.0, end=1.0, tokenizer=None):
    "A random model; factors above 1 make it ask for a restoration or end its text more often."
    model = tiny_model(*seed, tokenizer=tokenizer or byte_tokenizer())
    model.language_model.lm_head.weight[MARK] *= marker
    model.language_model.lm_head.weight[model.shape.eos] *= end
    return model


def asked(model, n=2, **size):
    "Prompts of different length."
    return [
        [
            *(c(x) for c, x in zip((LatentSegment, VitSegment), picture('prompt', k, **size))),
            TextSegment(tuple(model.tokenizer.encode(QUESTIONS[k]))),
        ]
        for k in range(n)
    ]


def replay(rollout, mode='bridge', model=None, step=None):
    """The segments of a recorded trajectory; with `step`, the state of that denoising step
    stands where it was denoised.
    """
    out = list(rollout.prompt)
    for i, turn in enumerate(rollout.turns):
        out.append(TextSegment(tuple(turn.ids), loss=True, eos_loss=turn.ended))
        if i < len(rollout.restorations):
            d = rollout.restorations[i]
            if step is not None:
                out.append(LatentSegment(unpatchify(d.states[step], 2, 2, 4), float(d.times[step])))
            out += reinject(model, [d.latent], mode)[0]
    return out


def scored(model, rollouts, temperature=1.0, banned=lambda turn: (), **kw):
    """Log-probability of every action from one packed pass, with the bans that were in force in
    each turn.
    """
    h = model(pack([replay(r, model=model, **kw) for r in rollouts], model.shape))
    logits = model.logits(h, h.packed.ce_at) / temperature
    turns = [k for r in rollouts for k in range(len(r.turns))]
    for i, text in enumerate(h.packed.ce_text.tolist()):
        logits[i, list(banned(turns[text]))] = -torch.inf
    return logits.log_softmax(-1).gather(1, h.packed.labels[:, None]).squeeze(1)


def drawn(rollouts):
    return torch.tensor([l for r in rollouts for t in r.turns for l in t.logp])


def same(a, b, tol=1e-4):
    "Two lists of rollouts with equal choices, and numbers within the tolerance."
    assert [[t.ids for t in r.turns] for r in a] == [[t.ids for t in r.turns] for r in b]
    assert [[t.ended for t in r.turns] for r in a] == [[t.ended for t in r.turns] for r in b]
    close(drawn(a), drawn(b), tol)
    for x, y in zip(
        [d for r in a for d in r.restorations], [d for r in b for d in r.restorations], strict=True
    ):
        close(x.latent, y.latent, tol)


# ---------------------------------------------------------------- packed equals cached


def test_greedy_direct():
    "Policy never: direct trajectories, the marker banned at every step."
    model = talker(1, marker=6.0)
    rolls = generate(model, asked(model), Sampling(max_new=12, policy='never'))
    assert all(
        len(r.turns) == 1 and not r.restorations and MARK not in r.turns[0].ids for r in rolls
    )
    close(scored(model, rolls, banned=lambda turn: [MARK]), drawn(rolls))
    assert (scored(model, rolls) - drawn(rolls)).abs().max() > 0.01  # the ban was in force


def test_greedy_answered():
    "Policy direct: also the end is banned, until `<answer>` was said."
    model, end = talker(6, marker=6.0, end=8.0), 1
    never, rolls = (
        generate(model, asked(model), Sampling(max_new=40, policy=p)) for p in ('never', 'direct')
    )
    assert end == model.shape.eos and any(
        r.turns[0].ended and ANSWER not in r.turns[0].ids for r in never
    )  # the ban matters
    assert all(
        len(r.turns) == 1 and not r.restorations and MARK not in r.turns[0].ids for r in rolls
    ) and {r.turns[0].ended for r in rolls} == {True, False}
    for r in rolls:
        [t] = r.turns
        assert ANSWER in t.ids if t.ended else len(t.ids) == 40
        assert [
            i
            for k in range(len(t.ids))
            for i in stop_and_ban(model, 'direct', True)['banned'][1].banned_ids(t.ids[:k])
        ] == [end] * (t.ids.index(ANSWER) + 1 if ANSWER in t.ids else 40)


def test_greedy_restored():
    "Policy always: text, restoration through the bridge, text."
    model = talker(1, marker=6.0)
    rolls = generate(
        model, asked(model), Sampling(max_new=12, policy='always', max_restores=1, steps=4)
    )
    assert all(
        len(r.turns) == 2 and len(r.restorations) == 1 and r.turns[0].ids[-1] == MARK for r in rolls
    )
    close(scored(model, rolls, banned=lambda turn: [ANSWER] if turn == 0 else []), drawn(rolls))


@pytest.mark.parametrize('tags', [('</think>',), ('</think>', '</think', '><', 'ans', '<im')])
@pytest.mark.parametrize('policy, follows', [('direct', '<answer>'), ('always', MARKER)])
def test_behind_the_thought(tags, policy, follows):
    """However the tags are cut into tokens, what the policy asks for stands directly behind the
    first thought, and the ids spell it.
    """
    model = talker(8, tokenizer=byte_tokenizer(tags))
    model.language_model.lm_head.weight[260 : 260 + len(tags)] *= (
        12.0  # </think> and its parts are said often
    )
    rolls = generate(
        model,
        asked(model),
        Sampling(
            max_new=40,
            temperature=1.0,
            policy=policy,
            max_restores=int(policy == 'always'),
            steps=3,
        ),
        Noise('fork'),
        group=8,
    )
    behind = [r.texts[0].partition('</think>')[2].lstrip() for r in rolls]  # blanks may come before
    assert sum(b.startswith(follows) for b in behind) > 2 and all(
        b.startswith(follows) or follows.startswith(b) for b in behind
    )  # cut at the limit
    assert all(
        bool(r.restorations) == (policy == 'always' and b.startswith(follows))
        for r, b in zip(rolls, behind)
    )
    free = generate(
        model, asked(model), Sampling(max_new=40, temperature=1.0), Noise('fork'), group=8
    )
    assert not any(t.partition('</think>')[2].startswith(follows) for r in free for t in r.texts)
    close(
        text_logp(
            model,
            model(pack([replay(r, model=model) for r in rolls], model.shape)),
            1.0,
            forbidden(model, rolls),
        ),
        drawn(rolls),
        5e-4,
    )


def test_no_ban_in_force():
    """Tags spelled in bytes: the marker is fifteen tokens, never begins, and recorded numbers
    equal plain ones.
    """
    model = talker(2, tokenizer=byte_tokenizer(tags=()))
    rolls = generate(model, asked(model), Sampling(max_new=12, policy='never'))
    close(scored(model, rolls), drawn(rolls))


@pytest.mark.parametrize('mode', RETURN_MODES)
def test_sampled_with_two_restorations(mode):
    """Sampled text, up to two restorations, every way to return the picture; texts end by
    marker, end token and limit.
    """
    model = talker(7, marker=8.0, end=5.0)
    s = Sampling(max_new=5, temperature=0.9, steps=3, mode=mode, record=True)
    rolls = generate(model, asked(model, 3), s, Noise('two'), group=6)
    assert {len(r.restorations) for r in rolls} == {0, 1, 2} and {
        t.ended for r in rolls for t in r.turns
    } == {True, False}
    close(scored(model, rolls, 0.9, mode=mode), drawn(rolls), 5e-4)
    assert any(
        not t.ended and t.ids[-1] != MARK for r in rolls for t in r.turns
    )  # cut at the limit
    actions = [len(t.logp) - len(t.ids) - t.ended for r in rolls for t in r.turns]
    assert not any(
        actions
    )  # one action per sampled id, and the end token only where it was sampled (hazard 5)
    if mode == 'bridge':
        close(
            scored(model, rolls, 0.9, step=1), drawn(rolls), 5e-4
        )  # x_t is there and nobody sees it (hazard 3)


@pytest.mark.parametrize('sigma', [0.0, 0.3])
def test_transition_means(sigma):
    """At every time of the grid, last step included, the packed velocity gives the sampler's
    mean (hazards 7, 8).
    """
    model = talker(4, marker=8.0)
    s = Sampling(max_new=6, temperature=1.0, steps=6, sigma=sigma, max_restores=2, record=True)
    rolls = generate(model, asked(model), s, Noise('means'), group=4)
    assert sum(len(r.restorations) == 2 for r in rolls) > 1
    for row, r in enumerate(rolls):
        for k in range(5):
            h = model(pack([replay(r, step=k)], model.shape))
            for n, (v, d) in enumerate(zip(model.velocity(h).split(4), r.restorations)):
                mean, std = flow.transition(d.states[k], v, d.times[k], d.times[k + 1], sigma)
                noise = (
                    std * Noise('means').steps([row], n, 5, d.latent.shape, 4)[0, k]
                    if sigma
                    else 0.0
                )
                close(mean + noise, d.states[k + 1])


def test_end_of_denoising():
    "The recorded path starts at the noise and ends at the latent that is read."
    model = talker(4)
    cache = KVCache(model.mot.cfg, 2, 60)
    prefill(model, cache, asked(model))
    z = Noise('z').normal([0, 1], 0, (4, 8, 8))
    for noise, d, e in zip(
        z, restore(model, cache, z, 4, record=True), restore(model, cache, z, 4)
    ):
        assert torch.equal(unpatchify(d.states[0], 2, 2, 4), noise) and torch.equal(
            unpatchify(d.states[-1], 2, 2, 4), d.latent
        )
        assert (
            torch.equal(d.latent, e.latent)
            and e.states is None
            and d.times.tolist() == flow.time_grid(4, 3.0).tolist()
        )
    with pytest.raises(ValueError, match='needs step_noise'):
        restore(model, cache, z, 4, sigma=0.1)


def test_oblong_pictures():
    "Rows and columns of a latent keep their roles."
    model = talker(5, marker=8.0)
    rolls = generate(
        model, asked(model, h=1, w=3), Sampling(max_new=6, max_restores=1, steps=3, mode='both')
    )
    assert all(r.restorations[0].latent.shape == (4, 4, 12) for r in rolls)
    close(scored(model, rolls, mode='both'), drawn(rolls))


def test_low_precision_runs():
    "Under bf16 autocast the cache is bf16 and scoring stays close."
    model = talker(3, marker=4.0)
    with torch.autocast('cpu', torch.bfloat16):
        assert model.cache_dtype == torch.bfloat16
        rolls = generate(
            model,
            asked(model),
            Sampling(max_new=8, temperature=1.0, steps=3),
            Noise('bf16'),
            group=2,
        )
        assert (scored(model, rolls) - drawn(rolls)).abs().max() < 0.3


# ---------------------------------------------------------------- batches


@pytest.mark.parametrize('sigma', [0.0, 0.3])
def test_batch_is_its_rows(sigma):
    """Prompts of different length together and alone, groups together and member by member
    (hazard 10).
    """
    model = talker(7, marker=8.0, end=5.0)
    s, ask = Sampling(max_new=8, temperature=1.0, steps=3, sigma=sigma), asked(model, 3)
    rolls = generate(model, ask, s, Noise('b'), group=4)
    assert len({len(r.restorations) for r in rolls}) > 1
    same(
        rolls,
        [
            r
            for i, p in enumerate(ask)
            for r in generate(model, [p], s, Noise('b', first=4 * i), group=4)
        ],
    )
    same(rolls, [generate(model, [ask[i // 4]], s, Noise('b', first=i))[0] for i in range(12)])
    same(rolls, generate(model, [p for p in ask for _ in range(4)], s, Noise('b')))


def test_greedy_batch_of_two():
    "A batch of two equals two batches of one."
    model = talker(1, marker=6.0)
    s, ask = Sampling(max_new=10, policy='always', max_restores=1, steps=3), asked(model)
    same(
        generate(model, ask, s),
        [generate(model, [p], s, Noise(0, first=i))[0] for i, p in enumerate(ask)],
    )


def test_finished_rows_are_left_behind(monkeypatch):
    """Rows that end at different steps: the batch shrinks while it speaks, and texts, numbers
    and the whole cache are those of every row alone.
    """
    model, sizes, plain = talker(6, marker=4.0, end=6.0), [], clear_nb.decode.select_rows
    ask, u = asked(model, 3) * 4, torch.rand(12, 21, generator=torch_rng('u'))

    def held(prompts):
        cache = KVCache(model.mot.cfg, len(prompts), 80)
        prefill(model, cache, prompts)
        return cache

    def counted(cache, rows):
        sizes.append(len(rows))
        return plain(cache, rows)

    monkeypatch.setattr(clear_nb.decode, 'select_rows', counted)
    cache = held(ask)
    turns = decode_text(model, cache, u, 1.0, stop=[TokenSequence((MARK,))])
    assert (
        len(sizes) > 1 and all(2 * b <= a for a, b in zip([12, *sizes], sizes)) and sum(sizes) < 12
    )
    assert len({len(t.ids) for t in turns}) > 4 and {t.ended for t in turns} == {True, False}
    for r, t in enumerate(turns):
        alone = held(ask[r : r + 1])
        [want] = decode_text(model, alone, u[r : r + 1], 1.0, stop=[TokenSequence((MARK,))])
        n = int(alone.lens[0])
        assert (t.ids, t.ended) == (want.ids, want.ended) and t.logp == pytest.approx(
            want.logp, abs=1e-5
        )
        assert (int(cache.lens[r]), int(cache.rope[r]), cache.splits) == (
            n,
            int(alone.rope[0]),
            alone.splits,
        )
        for a, b in zip(
            [*cache.k, *cache.v, *vars(cache.layout).values()],
            [*alone.k, *alone.v, *vars(alone.layout).values()],
        ):
            a, b = (a[r, :, :n], b[0, :, :n]) if a.ndim == 4 else (a[r, :n], b[0, :n])
            assert torch.allclose(a, b, atol=1e-5)


def test_shorter_row_does_not_see_free_slots():
    "The first token of a short row attends to itself alone, whatever its neighbours need."
    model = talker(1)
    long, short = KVCache(model.mot.cfg, 2, 40), KVCache(model.mot.cfg, 1, 40)
    texts = [[TextSegment((9, 8))], [TextSegment(tuple(range(10, 30)))]]
    prefill(model, long, texts)
    prefill(model, short, texts[:1])
    assert all(
        (a[0, :, :4] - b[0, :, :4]).abs().max() < 1e-5
        for a, b in zip(long.k + long.v, short.k + short.v)
    )


# ---------------------------------------------------------------- the context left behind

TRAINED = dict(
    bridge=lambda z, image: [LatentSegment(z), Gap()],
    reencode=lambda z, image: [Gap(), VitSegment(image)],
    both=lambda z, image: [LatentSegment(z), VitSegment(image)],
)


@pytest.mark.parametrize('mode', RETURN_MODES)
def test_positions_equal_training(mode):
    """Rotary positions and token counts of the cache are those of a training row with the
    noised copy in it (hazard 26).
    """
    model = talker(1)
    (z, image), texts = picture('seen'), [TextSegment((30, 31, 32)), TextSegment((40,))]
    cache = KVCache(model.mot.cfg, 1, 80)
    start, back = asked(model, 1)[0], RETURN_MODES[mode](z, image)
    for piece in (start, texts[:1], back, texts[1:]):
        prefill(model, cache, [piece])
    p = pack(
        [[*start, texts[0], LatentSegment(z, 0.5, z), *TRAINED[mode](z, image), texts[1]]],
        model.shape,
    )
    seen = p.layout.mode[0] != 2
    assert int(cache.lens[0]) == int(seen.sum()) and torch.equal(
        cache.layout.rope[0, : int(seen.sum())], p.layout.rope[0, seen]
    )
    assert cache.rope.tolist() == p.rope_end.tolist()
    h = model(p)
    again = model(pack([[TextSegment((50,), loss=True)]], model.shape, rope0=cache.rope), cache)
    whole = model(
        pack([[*start, texts[0], *back, texts[1], TextSegment((50,), loss=True)]], model.shape)
    )
    close(model.logits(again, again.packed.ce_at), model.logits(whole, whole.packed.ce_at))
    assert h.x.isfinite().all()


@pytest.mark.parametrize('how', ['limit', 'stop', 'end'])
def test_decode_leaves_the_text(how):
    "However a text ends, the cache holds bos, the recorded ids and eos."
    model = talker(6, end=9.0 if how == 'end' else 1.0)
    ask, u = asked(model), torch.rand(2, 21, generator=torch_rng('u', how))

    def fresh():
        return KVCache(model.mot.cfg, 2, 80)

    cache, free = fresh(), fresh()
    prefill(model, cache, ask)
    prefill(model, free, ask)
    first = decode_text(model, free, u, 1.0)[0].ids
    turns = decode_text(
        model, cache, u, 1.0, stop=[TokenSequence(first[2:5])] if how == 'stop' else ()
    )
    if how == 'stop':
        assert turns[0].ids == first[:5] and len(turns[0].logp) == 5 and not turns[0].ended
    if how == 'limit':
        assert [len(t.ids) for t in turns] == [20, 20]
    if how == 'end':
        assert any(t.ended and len(t.logp) == len(t.ids) + 1 for t in turns)
    whole = fresh()
    prefill(model, whole, [[*p, TextSegment(tuple(t.ids))] for p, t in zip(ask, turns)])
    assert (
        cache.lens.tolist() == whole.lens.tolist()
        and cache.rope.tolist() == whole.rope.tolist()
        and cache.splits == whole.splits
    )
    a, b = (prefill(model, c, [[TextSegment((50,), loss=True)]] * 2) for c in (cache, whole))
    close(model.logits(a, a.packed.ce_at), model.logits(b, b.packed.ce_at))


def test_end_token_after_the_last_place(monkeypatch):
    """A text of full length may still end by itself: the end token is then an action, any other
    token is not.
    """
    model, said = talker(6), iter([(30, 30), (30, 30), (1, 30)])
    monkeypatch.setattr(
        clear_nb.decode,
        'draw_tokens',
        lambda logits, *_: (torch.tensor(next(said)), -torch.ones(2)),
    )
    a, b = decode_alone(model, torch.zeros(2, 3))
    assert (
        a.ids == b.ids == [30, 30]
        and (a.ended, len(a.logp)) == (True, 3)
        and (b.ended, len(b.logp)) == (False, 2)
    )


def decode_alone(model, u):
    cache = KVCache(model.mot.cfg, 2, 60)
    prefill(model, cache, asked(model))
    return decode_text(model, cache, u)


def test_bans():
    """A banned sequence is avoided wherever it begins, also across its own repetition, and
    nothing else changes before it.
    """
    model, u = talker(6), torch.zeros(2, 16)
    free = decode_alone(model, u)[0].ids
    for seq in (free[:1], free[3:5], free[5:9]):
        cache = KVCache(model.mot.cfg, 2, 60)
        prefill(model, cache, asked(model))
        ids = decode_text(model, cache, u, banned=[TokenSequence(tuple(seq))])[0].ids
        at = next(i for i in range(len(free)) if free[i : i + len(seq)] == list(seq)) + len(seq) - 1
        assert ids[:at] == free[:at] and ids[at] != free[at]
        assert not any(ids[i : i + len(seq)] == list(seq) for i in range(len(ids)))


def fused_tokenizer():
    "Like Qwen's: the tags are ordinary text, and `><` and `re` are tokens of their own."
    signs = sorted(pre_tokenizers.ByteLevel.alphabet())
    tok = Tokenizer(
        models.BPE(
            {c: i for i, c in enumerate(CONTROL + signs + ['><', 're'])}, [('>', '<'), ('r', 'e')]
        )
    )
    tok.pre_tokenizer, tok.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    tok.add_special_tokens(CONTROL)
    return PreTrainedTokenizerFast(tokenizer_object=tok, clean_up_tokenization_spaces=False)


def saying(monkeypatch, *texts):
    "Rows that draw the ids of these texts in turn, where the policy allows."
    queue = [list(t) for t in texts]

    def next_ids(logits, *_):
        ids = torch.tensor(
            [q.pop(0) if q and logits[i, q[0]] > -torch.inf else 1 for i, q in enumerate(queue)]
        )
        return ids, -torch.ones(len(ids))

    monkeypatch.setattr(clear_nb.decode, 'draw_tokens', next_ids)


def test_fused_marker(monkeypatch):
    """The marker is found when its first sign hangs on the token before it, and `never` forbids
    every token that would end it.
    """
    tok = fused_tokenizer()
    text = tok.encode('<think>a</think><image_restore>')
    assert (
        tok.convert_tokens_to_ids('><') in text
        and tok.convert_tokens_to_ids('re') in text
        and text[-1] == tok.convert_tokens_to_ids('>')
    )
    model, ask = talker(1, tokenizer=tok), asked(talker(1))[:1]
    saying(monkeypatch, text)
    [r] = generate(model, ask, Sampling(max_new=30, max_restores=1, steps=2))
    assert r.turns[0].ids == text and len(r.restorations) == 1 and len(r.turns) == 2
    for ending in ('>', '><'):
        saying(monkeypatch, [*text[:-1], tok.convert_tokens_to_ids(ending)])
        [r] = generate(model, ask, Sampling(max_new=30, steps=2, policy='never'))
        assert r.turns[0].ids == text[:-1] and r.turns[0].ended and not r.restorations


def test_phrases_against_search():
    """Random tokens: a phrase is said exactly when the joined text first holds it behind the
    last id, and `last` lists exactly the ids that do that.
    """
    tok = fused_tokenizer()
    pieces = {i: p for p, i in tok.get_vocab().items()}
    phrase, some, g = (
        Phrase(tok, '>re>'),
        sorted(i for i, p in pieces.items() if p in ('>', '<', '><', 're', 'e', 'r')),
        torch_rng('phrases'),
    )
    said = 0
    for _ in range(300):
        ids = [some[k] for k in torch.randint(len(some), (8,), generator=g)]
        for n in range(len(ids)):
            before, after = (''.join(pieces[i] for i in ids[:k]) for k in (n, n + 1))
            new = any(
                after.startswith('>re>', k) and k + 4 > len(before) for k in range(len(after))
            )
            assert phrase.ends(ids[: n + 1]) == new == (ids[n] in phrase.banned_ids(ids[:n]))
            said += new
    assert said > 10


def test_draw_needs_mass():
    "Not even u = 1 draws a token without mass, and a ban is a log-probability of its own."
    logits = torch.tensor([[2.0, 1.0, -torch.inf, 0.0]]).expand(3, 4)
    ids, logp = draw_tokens(logits, torch.tensor([0.0, 0.99, 1.0]), 1.0)
    assert ids.tolist() == [0, 3, 3] and logp.isfinite().all()
    ids, logp = draw_tokens(logits, torch.tensor([0.0, 0.5, 1.0]), 1.0, 0.5)
    assert ids.tolist() == [0, 0, 0] and logp.abs().max() < 1e-6


# ---------------------------------------------------------------- policies, the oracle, room, errors


def test_policies():
    "Never restores, always restores, and the oracle's latent is what the second text reads."
    model = talker(1, marker=6.0)
    s, ask = Sampling(max_new=10, max_restores=1, steps=3), asked(model)

    def run(policy, **kw):
        return generate(model, ask, replace(s, policy=policy), **kw)

    assert not any(r.restorations for r in run('never')) and all(
        r.restorations for r in run('always')
    )
    clean = [torch.full((4, 8, 8), float(k)) for k in range(2)]
    told = run('always', restorer=GivenLatents(clean))
    assert all(d.latent is z for r, z in zip(told, clean) for d in r.restorations)
    close(scored(model, told, banned=lambda turn: [ANSWER] if turn == 0 else []), drawn(told))
    assert [r.turns[0].ids for r in told] == [r.turns[0].ids for r in run('always')] and drawn(
        told
    ).tolist() != drawn(run('always')).tolist()


def test_without_a_latent():
    "ViT input alone: there is nothing to restore, and the marker is banned."
    model = talker(1, marker=6.0)
    rolls = generate(model, [p[1:] for p in asked(model)], Sampling(max_new=8, policy='always'))
    assert all(len(r.turns) == 1 and MARK not in r.turns[0].ids for r in rolls)


@pytest.mark.parametrize('mode', RETURN_MODES)
def test_room_is_enough(mode, monkeypatch):
    """Rows that write the marker as the last possible token of every text get through, and the
    reserve is no larger than one latent block.
    """
    model, calls = talker(1), itertools.count()

    def word(logits, *_):
        return (
            torch.full((len(logits),), MARK if next(calls) % 3 == 2 else 30),
            torch.zeros(len(logits)),
        )

    monkeypatch.setattr(clear_nb.decode, 'draw_tokens', word)
    ask, s = asked(model), Sampling(max_new=3, steps=2, mode=mode)
    rolls = generate(model, ask, s)
    assert all(
        len(r.restorations) == 2 and [t.ids for t in r.turns] == [[30, 30, MARK]] * 3 for r in rolls
    )
    assert (
        max(token_count(replay(r, mode, model), model.shape) for r in rolls)
        == max(token_budget(model, p, (4, 8, 8), s) for p in ask) - 6
    )


def test_too_long_for_the_cache():
    "Prefill, decoding and denoising name the missing room."
    model = talker(1)
    ask = asked(model)
    n = max(token_count(p, model.shape) for p in ask)
    with pytest.raises(
        ValueError,
        match=f'context of {n} tokens exceeds the {n - 1} slots of the cache; reserve more',
    ):
        prefill(model, KVCache(model.mot.cfg, 2, n - 1), ask)
    cache = KVCache(model.mot.cfg, 2, n + 4)
    prefill(model, cache, ask)
    with pytest.raises(ValueError, match='exceeds the'):
        restore(model, cache, torch.zeros(2, 4, 8, 8), 3)
    with pytest.raises(ValueError, match='exceeds the'):
        decode_text(model, cache, torch.zeros(2, 9))


def test_refusals():
    "What cannot be generated is said in one sentence."
    model = talker(1)
    ask = asked(model)
    with pytest.raises(ValueError, match='list of prompts is empty'):
        generate(model, [])
    with pytest.raises(ValueError, match='no tokenizer'):
        generate(tiny_model(1), ask)
    with pytest.raises(
        ValueError, match='unknown .sometimes.; use adaptive, never, direct, always'
    ):
        Sampling(policy='sometimes')
    with pytest.raises(ValueError, match='unknown .pixels.; use bridge, reencode, both'):
        Sampling(mode='pixels')
    with pytest.raises(ValueError, match="unknown way 'pixels'"):
        reinject(model, [torch.zeros(4, 8, 8)], 'pixels')
    with pytest.raises(ValueError, match='1 oracle latents for 2 prompts'):
        generate(model, ask, restorer=GivenLatents([torch.zeros(4, 8, 8)]))
    with pytest.raises(ValueError, match='pass latent_shape or split'):
        generate(model, [ask[0], ask[1][1:]])
    with pytest.raises(ValueError, match='does not fit a 4×4 table'):
        generate(model, asked(model, 1, h=5))


# ---------------------------------------------------------------- guidance and mixed sizes

EDIT = Guidance(
    4.0, 2.0, (0.5, 0.9), 'text_channel', 0.1
)  # off, on and off again on a grid of six points


def uneven(model):
    "Prompts that differ in the length of the text and in the size of the picture."
    sizes = dict(h=2, w=2), dict(h=1, w=3), dict(h=3, w=1)
    return [
        [
            *(c(x) for c, x in zip((LatentSegment, VitSegment), picture('prompt', k, **sizes[k]))),
            TextSegment(tuple(model.tokenizer.encode(QUESTIONS[k]))),
        ]
        for k in range(3)
    ]


def held(model, prompts, slots=80):
    "A cache that holds the prompts."
    cache = KVCache(model.mot.cfg, len(prompts), slots)
    prefill(model, cache, prompts)
    return cache


def naive_velocity(model, segments, x, t, shape):
    "One picture over one context, packed as a training row, without a cache."
    h, w = shape[-2] // 4, shape[-1] // 4
    return model.velocity(
        model(pack([[*segments, LatentSegment(unpatchify(x, h, w, 4), t)]], model.shape))
    )


def naive_guide(v, v_text, v_image, g):
    "The formulas of the release, one number after the other."

    def scale(u, v):
        return min(max(float(v.norm() / (u.norm() + 1e-8)), g.renorm_min), 1.0)

    def each(u):
        return torch.stack([row * scale(row, ref) for row, ref in zip(u, v)])

    u = v_text + g.text * (v - v_text)
    if g.renorm == 'text_channel':
        u = each(u)
    w = v_image + g.image * (u - v_image) if g.image > 1 else u
    return dict(
        text_channel=lambda: w, channel=lambda: each(w), **{'global': lambda: w * scale(w, v)}
    )[g.renorm]()


def naive_restore(model, segments, noise, g, steps, shift=3.0):
    "One row, one branch after the other, no cache: the states of denoising."
    grid, contexts = flow.time_grid(steps, shift), [segments, *guidance_contexts(segments)]
    path = [patchify(noise, 4)]
    for t, t_next in zip(grid[:-1], grid[1:]):
        v = [naive_velocity(model, c, path[-1], float(t), noise.shape) for c in contexts]
        on = g.text > 1 and g.interval[0] < t <= g.interval[1]
        path.append(path[-1] - (naive_guide(*v, g) if on else v[0]) * (t - t_next))
    return torch.stack(path)


@pytest.mark.parametrize(
    'g',
    [
        *(replace(EDIT, renorm=r) for r in RENORMS),
        replace(EDIT, image=1.0),
        replace(EDIT, text=1.0),
        Guidance(),
    ],
    ids=str,
)
def test_guided_restoration(g):
    """One pass over joined caches with pictures of different size equals row by row, branch by
    branch, without a cache.
    """
    model = talker(4)
    ask = [
        [TextSegment((60, 61)), *p, TextSegment((70 + k,), loss=True)]
        for k, p in enumerate(uneven(model))
    ]
    cache = held(model, ask)
    z = [torch.randn(s[1].latent.shape, generator=torch_rng('g', k)) for k, s in enumerate(ask)]
    done = restore(model, cache, z, 6, record=True, guide=prefill_guidance(model, cache, ask, g))
    for noise, segments, d in zip(z, ask, done):
        want = naive_restore(model, segments, noise, g, 6)
        assert (
            (d.states - want).norm() / want.norm()
        ).item() < 1e-5 and d.latent.shape == noise.shape
    assert cache.lens.tolist() == [token_count(s, model.shape) for s in ask]


def test_guidance_matters():
    "Scale, interval, floor and each branch change the picture; a text scale of 1 does not."
    model = talker(4)
    ask = asked(model)
    cache, z = held(model, ask), Noise('z').normal([0, 1], 0, (4, 8, 8))

    def run(g):
        return torch.stack(
            [
                d.latent
                for d in restore(model, cache, z, 6, guide=prefill_guidance(model, cache, ask, g))
            ]
        )

    free, base = run(None), run(EDIT)
    assert torch.equal(run(replace(EDIT, text=1.0)), free) and torch.equal(
        run(replace(EDIT, interval=(1.0, 2.0))), free
    )
    others = [
        free,
        *(
            run(replace(EDIT, **k))
            for k in (
                dict(text=2.0),
                dict(image=1.0),
                dict(interval=(0.0, 1.0)),
                dict(renorm='global'),
                dict(renorm_min=0.9),
            )
        ),
    ]
    assert all((o - base).norm() / base.norm() > 1e-3 for o in others)


def test_branches_only_while_guided(monkeypatch):
    """Further rows are computed in guided steps alone, and the image branch only for an image
    scale above 1.
    """
    model, rows = talker(4), []
    ask, call = asked(model), VelocityField.__call__
    cache, z = held(model, ask), Noise('z').normal([0, 1], 0, (4, 8, 8))
    monkeypatch.setattr(
        VelocityField,
        '__call__',
        lambda self, x, t: rows.append(self.p.layout.sample.shape[0]) or call(self, x, t),
    )
    for g in (EDIT, replace(EDIT, image=1.0), None):
        restore(model, cache, z, 6, guide=prefill_guidance(model, cache, ask, g))
    on = EDIT.at(flow.time_grid(6, 3.0))
    assert on == [False, False, True, True, False]
    assert rows == [6 if k else 2 for k in on] + [4 if k else 2 for k in on] + [2] * 5


def test_mixed_sizes_are_rows():
    """Pictures of different size in one batch equal each alone, with and without noise, also
    when a list is not needed.
    """
    model = talker(4)
    ask = uneven(model)
    z = [torch.randn(p[0].latent.shape, generator=torch_rng('m', k)) for k, p in enumerate(ask)]
    w = [
        torch.randn(4, z_.numel() // 64, 64, generator=torch_rng('w', k)) for k, z_ in enumerate(z)
    ]
    for sigma in (0.0, 0.3):
        done = restore(
            model, held(model, ask), z, 5, sigma=sigma, step_noise=w if sigma else None, record=True
        )
        for p, z_, w_, d in zip(ask, z, w, done):
            one = restore(
                model,
                held(model, [p]),
                z_[None],
                5,
                sigma=sigma,
                step_noise=w_[None] if sigma else None,
                record=True,
            )[0]
            close(d.states, one.states, 2e-5)
            close(d.latent, one.latent, 2e-5)


@pytest.mark.parametrize('mode', RETURN_MODES)
def test_guided_generation_is_its_rows(mode):
    """Texts of different length and pictures of different size, two guided restorations:
    together and alone.
    """
    model = talker(7, marker=8.0, end=5.0)
    s = Sampling(
        max_new=6,
        temperature=1.0,
        steps=4,
        mode=mode,
        guidance=Guidance(3.0, 1.5, (0.0, 1.0)),
        record=True,
    )
    ask = uneven(model)
    rolls = generate(model, ask, s, Noise('two'), group=3)
    assert {len(r.restorations) for r in rolls} == {0, 1, 2} and all(
        d.latent.shape == r.prompt[0].latent.shape for r in rolls for d in r.restorations
    )
    same(rolls, [generate(model, [ask[i // 3]], s, Noise('two', first=i))[0] for i in range(9)])
    close(scored(model, rolls, mode=mode), drawn(rolls), 5e-4)


@pytest.mark.parametrize('mode', RETURN_MODES)
def test_contexts_of_a_second_restoration(mode):
    """The first restoration lacks the question, the second only what was written after the
    first; the naive path agrees.
    """
    model = talker(7, marker=8.0)
    g = Guidance(3.0, 1.5, (0.0, 1.0))
    r = next(
        r
        for r in generate(
            model,
            asked(model),
            Sampling(max_new=6, temperature=1.0, steps=4, mode=mode, guidance=g, record=True),
            Noise('c'),
            group=8,
        )
        if len(r.restorations) == 2
    )
    whole = replay(r, mode, model)
    ends = [i + 1 for i, x in enumerate(whole) if isinstance(x, TextSegment) and x.loss]
    for n, (d, end) in enumerate(zip(r.restorations, ends)):
        cut, texts = guidance_contexts(whole[:end])
        assert len(cut) == (2, 6)[n] and texts == [r.prompt[2]]
        want = naive_restore(model, whole[:end], unpatchify(d.states[0], 2, 2, 4), g, 4)
        assert ((d.states - want).norm() / want.norm()).item() < 2e-5


def test_empty_branch():
    "A picture from a text alone: the other context is empty."
    model = talker(4)
    ask, z = (
        [[TextSegment((60, 61))], [TextSegment((62,))]],
        Noise('z').normal([0, 1], 0, (4, 8, 8)),
    )
    cache = held(model, ask, 12)
    more = prefill_guidance(model, cache, ask, Guidance())
    assert more.no_text.lens.tolist() == [0, 0] == more.no_text.rope.tolist()
    assert more.no_image is None
    for noise, segments, d in zip(z, ask, restore(model, cache, z, 5, record=True, guide=more)):
        want = naive_restore(model, segments, noise, Guidance(), 5)
        assert ((d.states - want).norm() / want.norm()).item() < 1e-5
    rolls = generate(
        talker(1, marker=6.0),
        ask,
        Sampling(max_new=4, policy='always', steps=3, guidance=Guidance()),
        latent_shape=(4, 8, 4),
    )
    assert all(d.latent.shape == (4, 8, 4) for r in rolls for d in r.restorations)


def test_guidance_refusals():
    "Noise and guidance exclude each other, and a missing context is named."
    model = talker(4)
    cache, z = held(model, asked(model)), torch.zeros(2, 4, 8, 8)
    with pytest.raises(ValueError, match='exclude each other'):
        restore(
            model,
            cache,
            z,
            3,
            sigma=0.1,
            step_noise=torch.zeros(2, 2, 4, 64),
            guide=GuidanceCaches(Guidance(), cache),
        )
    with pytest.raises(ValueError, match='exclude each other'):
        Sampling(sigma=0.1, guidance=Guidance())
    with pytest.raises(ValueError, match="contexts .'no_text', 'no_image'."):
        GuidanceCaches(EDIT)
    with pytest.raises(ValueError, match='use global, channel, text_channel'):
        Guidance(renorm='none')
    Sampling(sigma=0.1, guidance=Guidance(text=1.0))  # off


# ---------------------------------------------------------------- no waiting for the device


def to_meta(o):
    "The same object with tensors that hold no numbers: reading one back raises."
    if isinstance(o, torch.Tensor):
        return o.to('meta')
    if isinstance(o, (list, tuple)):
        return type(o)(map(to_meta, o))
    if not hasattr(o, '__dict__') or isinstance(o, torch.nn.Module):
        return o
    new = copy.copy(o)
    vars(new).update({k: to_meta(v) for k, v in vars(o).items()})
    return new


@pytest.mark.parametrize('g, sigma', [(EDIT, 0.0), (None, 0.0), (None, 0.3)])
def test_denoising_reads_nothing_back(g, sigma):
    "A device's numbers are not needed on the host within the loop."
    model = talker(4)
    ask, grid = uneven(model), flow.time_grid(6, 3.0)
    cache, z = held(model, ask), [torch.zeros(p[0].latent.shape) for p in ask]
    guide = prefill_guidance(model, cache, ask, g)
    velocity = VelocityField(model, cache, z)
    if guide:
        velocity = GuidedField(model, cache, z, guide, grid)
        assert velocity.plain and velocity.joined  # built while the numbers are there
    model.to('meta')
    velocity = to_meta(velocity)
    x, w = (
        torch.cat([patchify(z_, 4) for z_ in z]).to('meta'),
        torch.zeros(5, 10, 64, device='meta'),
    )
    assert len(list(clear_nb.restore._denoise(x, velocity, grid, sigma, w, False))) == 1 + 5
    with pytest.raises((RuntimeError, NotImplementedError)):
        float(x.sum())


# ---------------------------------------------------------------- decoding


def naive_decode(model, segments, u, temperature, top_p=1.0, vocab=None):
    "A token from a whole packed pass over everything before it, without a cache."
    ids, logp = [], []
    for k in range(len(u)):
        h = model(pack([[*segments, TextSegment(tuple(ids))]], model.shape))
        logits = model.logits(h, h.packed.text_at[-2:-1])[:, :vocab]
        token, l = (float(t) for t in draw_tokens(logits, u[k : k + 1], temperature, top_p))
        if token == model.shape.eos or k < len(u) - 1:
            ids.append(int(token))
            logp.append(l)
        if token == model.shape.eos:
            break
    return ids, logp


@pytest.mark.parametrize(
    'temperature, top_p, vocab',
    [(0.0, 1.0, None), (1.0, 1.0, None), (0.8, 0.7, None), (1.0, 0.9, 100)],
)
def test_cache_against_whole_passes(temperature, top_p, vocab):
    """Tokens and their log-probabilities from the cache, three rows of different length, equal
    those of whole passes.
    """
    model = talker(6)
    ask, u = uneven(model), torch.rand(3, 13, generator=torch_rng('u'))
    cut = [FirstIds(vocab, model.language_model.lm_head.ids, 1)] if vocab else []
    turns = decode_text(model, held(model, ask), u, temperature, top_p, banned=cut)
    for p, n, t in zip(ask, u, turns):
        ids, logp = naive_decode(model, p, n, temperature, top_p, vocab)
        assert t.ids + [1] * t.ended == ids
        close(torch.tensor(t.logp), torch.tensor(logp), 2e-5)


def test_vocabulary_cut():
    "No id from the cut on is drawn, the mass of the others sums to 1, and the end token must stay."
    model = talker(1)
    s = Sampling(max_new=12, temperature=2.0, policy='never', vocab=60)
    rolls = generate(model, asked(model), s, Noise('cut'), group=4)
    assert max(i for r in rolls for t in r.turns for i in t.ids) < 60
    assert (
        max(
            i
            for r in generate(model, asked(model), replace(s, vocab=None), Noise('cut'), group=4)
            for t in r.turns
            for i in t.ids
        )
        >= 60
    )
    close(scored(model, rolls, 2.0, banned=lambda turn: range(60, 272)), drawn(rolls))
    with pytest.raises(ValueError, match='vocab=1 must keep the end token 1'):
        generate(model, asked(model), replace(s, vocab=1))
    with pytest.raises(ValueError, match='be at most 272'):
        generate(model, asked(model), replace(s, vocab=273))
