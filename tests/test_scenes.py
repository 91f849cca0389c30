"""The procedural world: reproducible, disjoint, balanced, unambiguous, and drawn as described."""

import itertools
import re
import subprocess
import sys
import time
import zlib
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch

from clear_nb import scenes as sc
from clear_nb.core import rng, torch_rng
from clear_nb.degrade import CORRUPTIONS, degrade

FROZEN = 458729310  # checksum over prompts, answers and captions
SETS = {f: 270 for f in sc.FAMILIES}


@pytest.fixture(scope='module')
def sets():
    "One evaluation set per family."
    return {f: sc.benchmark(f, n) for f, n in SETS.items()}


@pytest.fixture(scope='module')
def stream():
    "A stretch of the training stream with its scenes."
    return [
        (
            sc.sample_scene(rng('scenes', 'train', 5, i), split='train'),
            *sc.training_item(5, i, n=12),
        )
        for i in range(400)
    ]


# Reproducible and disjoint


def test_items_depend_on_seed_and_index_only():
    """The same item twice, in another order, equals itself to the pixel; other seeds and splits
    give other items.
    """
    first = [sc.training_item(3, i) for i in range(20)]
    for i in reversed(range(20)):
        image, questions, caption = sc.training_item(3, i)
        assert np.array_equal(image, first[i][0]) and (questions, caption) == first[i][1:]
    other = {
        caption
        for seed, split in ((3, 'val'), (4, 'train'))
        for _, _, caption in (sc.training_item(seed, i, split) for i in range(20))
    }
    assert not other & {c for *_, c in first}


def test_world_is_frozen():
    """What is drawn and asked is pinned by a checksum over words: a change of the world must be
    deliberate.
    """
    words = [(q.prompt, q.answer) for i in range(50) for q in sc.training_item(0, i)[1]]
    words += [sc.training_item(0, i)[2] for i in range(50)]
    words += [
        (i.question.prompt, i.question.answer) for f in sc.FAMILIES for i in sc.benchmark(f, 30)
    ]
    assert zlib.crc32(repr(words).encode()) == FROZEN


def test_a_fresh_process_draws_the_same():
    "Nothing depends on hash randomisation, and importing the module stays light."
    code = (
        'import sys, zlib; from clear_nb import scenes as sc; '
        "print(zlib.crc32(b''.join(sc.training_item(1, i)[0].tobytes() for i in range(5))), "
        "sorted({'torch', 'cv2', 'easy_vqa', 'PIL'} & set(sys.modules)))"
    )
    here = zlib.crc32(b''.join(sc.training_item(1, i)[0].tobytes() for i in range(5)))
    for seed in '1', '2':
        out = subprocess.run(
            [sys.executable, '-c', code],
            capture_output=True,
            text=True,
            check=True,
            env={'PYTHONHASHSEED': seed, 'PYTHONPATH': ':'.join(p for p in sys.path if p)},
        ).stdout
        assert out.split(maxsplit=1) == [str(here), '[]\n']


def test_splits_share_no_arrangement():
    """A scene belongs to one split by its arrangement, also in benchmarks and after the edit of
    a pair.
    """
    for split in sc.SPLITS:
        drawn = [sc.sample_scene(rng('disjoint', split, i), split=split) for i in range(200)]
        drawn += [i.scene for f in sc.FAMILIES for i in sc.benchmark(f, 12, split=split)]
        assert {sc.split_of(s) for s in drawn} == {split}


# Balance


def test_constant_answers_stay_near_chance(sets):
    "For every ability of every family the best fixed answer is at most five points above chance."
    for family, items in sets.items():
        table = sc.constant_baseline(items)
        assert set(table) == set(sc.FAMILIES[family].abilities)
        for ability, (best, guess, n) in table.items():
            assert best <= guess + 0.05, (family, ability, best, guess, n)


def test_answers_are_stratified(sets):
    "Within an ability the answers, in words, occur equally often up to one round."
    for family in set(sets) - {'mmvp'}:
        truths = defaultdict(Counter)
        for i in sets[family]:
            truths[i.question.ability][i.question.truth] += 1
        for ability, counts in truths.items():
            assert set(counts) == set(sc.ABILITIES[ability].answers), (family, ability)
            assert max(counts.values()) - min(counts.values()) <= (4 if family == 'mmbench' else 1)


def test_language_prior_does_not_help():
    """A text-only model trained on the train split answers the MMStar family at chance and no
    family more than 6 points above.
    """
    for family in sc.FAMILIES:
        n = 900 if family == 'mmstar' else 300
        train, test = sc.benchmark(family, 2 * n, seed=1, split='train'), sc.benchmark(family, n)
        guess = np.mean([sc.chance(i.question) for i in test])
        accuracy = sc.text_only_baseline(train, test)
        assert accuracy < guess + 0.06, (family, accuracy, guess)
        if family == 'mmstar':
            assert abs(accuracy - 0.25) < 0.045


def test_text_only_baseline_finds_a_leak():
    "Control: where the answer does follow from the words, the same baseline finds it."
    leak = [
        sc.Question('cvbench', 'count', f'how many {w} objects', a)
        for w, a in (('red', '1'), ('blue', '2'))
    ] * 50
    assert sc.text_only_baseline(leak, leak) == 1


def test_training_answers_are_spread(stream):
    """No ability of the training stream has an answer that comes more than 2.5 times as often as
    the mean answer.
    """
    for ability, spec in sc.ABILITIES.items():
        truths = Counter(
            q.truth for *_, questions, _ in stream for q in questions if q.ability == ability
        )
        if sum(truths.values()) > 80:
            assert max(truths.values()) <= 2.5 * sum(truths.values()) / len(spec.answers), (
                ability,
                truths,
            )


# Unambiguous answers, recomputed by other code


def _name(scene, words):
    "Objects that fit a phrase such as 'red object' or 'cyan star'."
    colour, noun = words.split()
    return [
        o
        for o in scene.things
        if o.kind == 'object' and o.colour == colour and noun in ('object', o.value)
    ]


def _one(found):
    assert len(found) == 1, found
    return found[0]


def _place(scene, name):
    "Centre of a named object or sign in cells."
    t = _one(_name(scene, name) if ' ' in name else [t for t in scene.things if t.kind == name])
    return t.col + 0.5 * (t.kind == 'word'), t.row


def _relation(scene, first, second, options):
    (x, y), (u, v) = _place(scene, first), _place(scene, second)
    return (
        (('left', 'right')[x > u], abs(x - u))
        if 'left' in options
        else (('above', 'below')[y > v], abs(y - v))
    )


def _answer(scene, q):
    "Second opinion on the answer, from the prompt and the scene; None for wordings not covered."
    text = re.sub(r' A \S+ B \S+ C \S+ D \S+$', '', q.prompt)
    digits = [int(t.value) for t in scene.things if t.kind == 'digit']
    if m := re.match(r'(?:how many|count the|what is the number of) (.*?)(?: are there)?$', text):
        words = m[1].split()
        if len(words) == 1:
            return str(
                sum(
                    t.value + ('es' if t.value == 'cross' else 's') == words[0]
                    for t in scene.things
                )
            )
        return str(
            sum(t.kind == 'object' and words[0] in (t.colour, t.texture) for t in scene.things)
        )
    if m := re.match(r'compared with the (.*) is the (.*?) (\w+) or (\w+)$', text) or re.match(
        r'seen from the (.*) where is the (.*?) (\w+) or (\w+)$', text
    ):
        side, gap = _relation(scene, m[2], m[1], m.groups()[2:])
        assert gap >= 1
        return side
    if 'sum' in text or text.startswith('add'):
        return str(digits[0] + digits[1]) if len(digits) == 2 else 'error'
    if 'larger' in text:
        return str(max(digits)) if len(set(digits)) == 2 else 'error'
    if m := re.match(
        r'(?:what|which) (color|shape|texture) is (?:in|at) row (\d) column (\d)', text
    ):
        o = _one(
            [
                t
                for t in scene.things
                if t.kind == 'object' and (t.row, t.col) == (int(m[2]) - 1, int(m[3]) - 1)
            ]
        )
        return dict(color=o.colour, shape=o.value, texture=o.texture)[m[1]]
    if m := re.match(r'(?:in )?which (row|column) is the (\w+ \w+)', text):
        o = _one(_name(scene, m[2]))
        return str(dict(row=o.row, column=o.col)[m[1]] + 1)
    if m := re.match(r'(?:what|which) (?:shape|is the shape).*the (\w+ object)', text):
        if 'object' in text and ' of the ' in text.replace('shape of the', ''):
            return None
        return _one(_name(scene, m[1])).value
    if m := re.match(r'(?:what texture has|what is the texture of) the (\w+ \w+)', text):
        return _one(_name(scene, m[1])).texture
    if m := re.match(r'(?:what size is|is) the (\w+ \w+) (?:small or large|large or small)$', text):
        return _one(_name(scene, m[1])).size
    if m := re.match(
        r'(?:what color is|what is the color of|which color has) the (\w+)(?: \w+ or \w+)?$', text
    ):
        return _one([t for t in scene.things if t.value == m[1]]).colour
    if 'go' in text.split():
        return (
            'yes' if _one([t for t in scene.things if t.kind == 'light']).value == 'green' else 'no'
        )
    if m := re.search(r'(left|right|upper|lower) (?:digit|word|sign)$', text):
        kind = 'word' if 'word' in text else 'digit'
        order = sorted(
            (t.col if m[1] in ('left', 'right') else t.row, t.value)
            for t in scene.things
            if t.kind == kind
        )
        assert len(order) == 2 and order[0][0] < order[1][0]
        return order[m[1] in ('right', 'lower')][1]
    for kind in 'digit', 'word', 'arrow', 'light':
        if kind in text or dict(digit='number', word='say').get(kind, kind) in text:
            return _one([t for t in scene.things if t.kind == kind]).value
    return None


def test_answers_agree_with_a_second_opinion(sets, stream):
    """Answers recomputed from the words of the prompt agree, and every phrase picks out exactly
    one thing.
    """
    rows = [(i.scene, i.question) for s in sets.values() for i in s] + [
        (s, q) for s, _, questions, _ in stream for q in questions
    ]
    checked = Counter()
    for scene, q in rows:
        if 'beside' in q.ability or q.ability == 'depth':
            continue
        mine = _answer(scene, q)
        assert mine == q.truth, (q, mine, scene.things)
        checked[q.ability] += 1
    assert set(checked) >= set(sc.ABILITIES) - {
        'depth',
        'beside colour',
        'beside shape',
        'beside texture',
    }


def test_neighbours_agree_with_a_second_opinion(sets):
    "The object 'left of the digit' stands in the very next cell."
    step = dict(left=(-1, 0), right=(1, 0), above=(0, -1), below=(0, 1))
    for item in sets['mmvet']:
        if 'beside' not in item.question.ability:
            continue
        m = re.search(r'object (left|right|above|below)(?: of)? the (\w+)$', item.question.prompt)
        anchor = _one([t for t in item.scene.things if t.kind == m[2]])
        dx, dy = step[m[1]]
        col = anchor.col + dx + (m[2] == 'word' and m[1] == 'right')
        o = _one(
            [
                t
                for t in item.scene.things
                if t.kind == 'object' and (t.row, t.col) == (anchor.row + dy, col)
            ]
        )
        assert item.question.answer == (o.colour if 'colour' in item.question.ability else o.value)


def test_front_object_is_seen_in_front(sets):
    """Depth is read from the picture: the overlap shows the front object, and swapping the order
    changes at least six pixels clearly.
    """
    for item in sets['cvbench']:
        if item.question.ability != 'depth':
            continue
        front, rear = sorted((t for t in item.scene.things if t.z), key=lambda t: -t.z)
        assert item.question.answer == front.colour and abs(front.col - rear.col) == 1
        swapped = sc._edit(item.scene, 'depth', None, rear.colour).render()
        assert (np.abs(swapped.astype(int) - item.image).max(-1) > 40).sum() >= 6
        alone = sc.render(
            sc.Scene((front,), item.scene.background, item.scene.tone, item.scene.phase)
        )
        x, y = 16 * front.col + 8 + front.dx, 16 * front.row + 8
        assert np.array_equal(
            alone[y - 1 : y + 2, x - 1 : x + 1], item.image[y - 1 : y + 2, x - 1 : x + 1]
        )


def test_options_hold_the_answer_once(sets):
    """Options differ, hold the truth, stand in the prompt in their order, and letters point at
    them.
    """
    for item in itertools.chain(*sets.values()):
        q = item.question
        if not q.options:
            continue
        assert (
            len(set(q.options)) == len(q.options) == (4 if q.answer in 'ABCD' else 2)
            and q.truth in q.options
        )
        wanted = (
            ' '.join(f'{l} {o}' for l, o in zip('ABCD', q.options))
            if q.answer in 'ABCD'
            else ' or '.join(q.options)
        )
        assert wanted in q.prompt and set(q.options) <= set(sc.ABILITIES[q.ability].answers)


# Families


def test_circular_rolls(sets):
    """MMBench returns the four rotations of each question on one picture: every letter is right
    once, the truth stays.
    """
    groups = defaultdict(list)
    for i in sets['mmbench']:
        groups[i.question.group].append(i)
    assert len(groups) == SETS['mmbench']
    for rolls in groups.values():
        assert (
            sorted(i.question.answer for i in rolls) == list('ABCD')
            and len({i.question.truth for i in rolls}) == 1
        )
        assert all(i.image is rolls[0].image for i in rolls)
        turned = [rolls[0].question.options[k:] + rolls[0].question.options[:k] for k in range(4)]
        assert [i.question.options for i in rolls] == turned


def test_pairs_differ_in_one_detail(sets):
    """The two pictures of an MMVP pair share the prompt, differ in the answer and in one thing
    (two for depth) only.
    """
    groups = defaultdict(list)
    for i in sets['mmvp']:
        groups[i.question.group].append(i)
    for a, b in groups.values():
        assert a.question.prompt == b.question.prompt and {
            a.question.answer,
            b.question.answer,
        } == set(a.question.options)
        changed = [(s, t) for s, t in zip(a.scene.things, b.scene.things) if s != t]
        assert len(changed) == (2 if a.question.ability == 'depth' else 1)
        ys, xs = np.nonzero((a.image != b.image).any(-1))
        assert np.ptp(ys) <= 17 and np.ptp(xs) <= (
            33 if a.question.ability == 'word' else 25 if a.question.ability == 'depth' else 17
        )
        strong = (np.abs(a.image.astype(int) - b.image).max(-1) > 40).sum()
        assert strong >= 3, (a.question, strong)


def test_streets(sets):
    "RealWorldQA scenes lie on the road and hold what they ask for."
    assert {i.scene.background for i in sets['realworldqa']} == {'road'}


def test_language(sets, stream):
    """Prompts are short, lower case but for option letters, free of punctuation; every word is
    in the vocabulary.
    """
    words = set(sc.vocabulary())
    for q in [i.question for s in sets.values() for i in s] + [
        q for *_, qs, _ in stream for q in qs
    ]:
        tokens = q.prompt.split()
        assert set(tokens) <= words and q.answer in words and ' '.join(tokens) == q.prompt
        assert len(tokens) <= (20 if sc.FAMILIES[q.family].style == 'choice' else 14), q.prompt
        assert all(t.islower() or t.isdigit() or t in 'ABCD' for t in tokens)
    assert all(set(c.split()) <= words and len(c.split()) <= 90 for *_, c in stream)


def test_ask_gives_different_questions():
    """`ask` returns questions of its family, no prompt twice, and as many as wanted where the
    scene allows.
    """
    scene = sc.sample_scene(rng('ask'), 'cvbench')
    questions = sc.scene_questions(scene, rng('ask', 1), 'cvbench', 8)
    assert len({q.prompt for q in questions}) == len(questions) >= 6 and {
        q.family for q in questions
    } == {'cvbench'}
    assert len(sc.scene_questions(scene, rng('ask', 1), 'cvbench', 3)) == 3
    assert {q.family for q in sc.training_item(0, 0, families=('mmvet', 'mmvp'))[1]} <= {
        'mmvet',
        'mmvp',
    }
    assert all(len(q) == 8 for q in (sc.training_item(9, i)[1] for i in range(100)))


def test_captions_name_every_thing(stream):
    "The caption lists every thing once, with row and column."
    for scene, _, _, caption in stream:
        assert caption.count('column') == len(scene.things)
        for t in scene.things:
            assert t.value in caption


# Drawing


def _naive(scene, size=64, k=6):
    "Reference renderer: paint the whole picture on sub-pixels, average at the end."
    big = (
        sc._background(scene.background, scene.tone, scene.phase, size, 2)
        .astype(float)
        .repeat(k, 0)
        .repeat(k, 1)
    )
    for t in sorted(scene.things, key=lambda t: t.z):
        paint, cover = dict(object=sc._object, light=sc._light).get(t.kind, sc._sign)(t, 1)
        y, x = k * (16 * t.row + t.dy + 2), k * (16 * t.col + t.dx + 2)
        spot = big[y : y + cover.shape[0], x : x + cover.shape[1]]
        spot[cover] = paint[cover]
    return big[2 * k : -2 * k, 2 * k : -2 * k].reshape(size, k, size, k, 3).mean((1, 3))


def test_sprites_equal_the_naive_picture():
    """Cached sprites draw what painting every sub-pixel draws; only pixels where two antialiased
    edges meet may differ.
    """
    for i in range(40):
        scene = sc.sample_scene(rng('naive', i))
        gap = np.abs(_naive(scene) - scene.render())
        assert np.median(gap) <= 1 and (gap > 3).mean() < 0.01, i


def _sign_crops(kind, values):
    "Crops of a sign on every board, shift and several backgrounds, with their values."
    out = []
    for v, board, dx, dy, k in itertools.product(
        values, sc.BOARDS, (-1, 0, 1), (-1, 0, 1), range(2)
    ):
        scene = sc.Scene(
            (sc.SceneObject(kind, v, 1, 1, board, dx=dx, dy=dy),),
            sc.BACKGROUNDS[(k * 2 + dx) % 5],
            k,
            k,
        )
        out.append(
            (scene.render()[16:32, 16 : 48 if kind == 'word' else 32].astype(float).mean(-1), v)
        )
    return out


@pytest.mark.parametrize(
    'kind,values', [('digit', sc.DIGITS), ('word', sc.SIGN_WORDS), ('arrow', sc.ARROWS)]
)
def test_signs_are_distinct(kind, values):
    """A nearest-template reader (white board, no shift; shifted and contrast-free comparison)
    reads every clean sign.
    """

    def normal(a):
        return (a - a.mean()) / a.std()

    templates = {
        v: sc.Scene((sc.SceneObject(kind, v, 1, 1, 'white'),)).render().astype(float).mean(-1)
        for v in values
    }
    wide = 48 if kind == 'word' else 32

    def read(crop):
        core = normal(crop[2:-2, 3:-3])
        scores = {
            (v, dx, dy): abs((core * normal(t[18 - dy : 30 - dy, 19 - dx : wide - 3 - dx])).mean())
            for v, t in templates.items()
            for dx in (-1, 0, 1)
            for dy in (-1, 0, 1)
        }
        return max(scores, key=scores.get)[0]

    crops = _sign_crops(kind, values)
    assert np.mean([read(c) == v for c, v in crops]) >= 0.99


def test_details_are_visible():
    "Every two values of a detail differ by at least 4 clear pixels, also on the smallest object."

    def pixels(t):
        return sc.Scene((t,)).render().astype(int)

    for size, shape in itertools.product(sc.SIZES, sc.SHAPES):
        drawn = [
            pixels(sc.SceneObject('object', shape, 1, 1, 'blue', size, x)) for x in sc.TEXTURES
        ]
        assert all(
            (np.abs(a - b).max(-1) > 40).sum() >= 4 for a, b in itertools.combinations(drawn, 2)
        ), (size, shape)
    for size, texture in itertools.product(sc.SIZES, sc.TEXTURES):
        drawn = [pixels(sc.SceneObject('object', s, 1, 1, 'red', size, texture)) for s in sc.SHAPES]
        assert all(
            (np.abs(a - b).max(-1) > 40).sum() >= 4 for a, b in itertools.combinations(drawn, 2)
        ), (size, texture)


@pytest.mark.parametrize('size', [32, 64, 128, 224, 256])
def test_any_size(size):
    "A scene keeps its content at every size."
    scene = sc.sample_scene(rng('size'))
    image = scene.render(size)
    assert image.shape == (size, size, 3) and image.dtype == np.uint8
    k = max(size // 64, 1)
    if size % 64 == 0 and scene.background != 'noise':
        assert np.abs(image.reshape(64, k, 64, k, 3).mean((1, 3)) - scene.render()).mean() < 2.5


def test_speed():
    "Drawing is fast enough to feed training from one core (thousands a second when idle)."
    scenes = [sc.sample_scene(rng('speed', i)) for i in range(300)]
    for s in scenes:
        s.render()

    def lap():
        start = time.perf_counter()
        for s in scenes:
            s.render()
        return len(scenes) / (time.perf_counter() - start)

    assert max(lap() for _ in range(5)) > 1500


def _crops(split, n, corrupt=None):
    "Cell crops of all things in `n` scenes, with the things."
    crops, things = [], []
    for i in range(n):
        scene = sc.sample_scene(rng('crops', i), split=split)
        image = corrupt(scene.render(), rng('corrupt', i)) if corrupt else scene.render()
        for t in scene.things:
            crops.append(image[16 * t.row : 16 * t.row + 16, 16 * t.col : 16 * t.col + 16])
            things.append(t)
    return torch.tensor(np.stack(crops)).flatten(1) / 127.5 - 1, things


def _labels(things, kind, field, values):
    "Rows and classes of the things whose detail is in full view."
    rows = [i for i, t in enumerate(things) if t.kind == kind and t.z != 1]
    return rows, torch.tensor([values.index(getattr(things[i], field)) for i in rows])


def _reader(crops, classes, n):
    "One hidden layer from the pixels of a cell to a detail, trained for a few seconds."
    net = torch.nn.Sequential(torch.nn.Linear(768, 128), torch.nn.GELU(), torch.nn.Linear(128, n))
    g = torch_rng('reader')
    for p in net.parameters():
        torch.nn.init.uniform_(p, -(p.shape[-1] ** -0.5), p.shape[-1] ** -0.5, generator=g)
    opt = torch.optim.AdamW(net.parameters(), 2e-3)
    for _ in range(800):
        rows = torch.randint(len(crops), (128,), generator=g)
        opt.zero_grad()
        torch.nn.functional.cross_entropy(net(crops[rows]), classes[rows]).backward()
        opt.step()
    return net


@pytest.mark.slow
def test_corruptions_cost_answers():
    """A small reader of clean cells learns every detail; each hard corruption but mean_shift
    takes at least 8 points from one of four.
    """
    details = dict(
        shape=('object', 'value', sc.SHAPES),
        texture=('object', 'texture', sc.TEXTURES),
        colour=('object', 'colour', tuple(sc.COLOURS)),
        light=('light', 'value', sc.LIGHTS),
    )
    crops, things = _crops('train', 2000)
    readers = {}
    for name, spec in details.items():
        rows, classes = _labels(things, *spec)
        readers[name] = _reader(crops[rows], classes, len(spec[2]))

    def read(corrupt=None):
        crops, things = _crops('test', 200, corrupt)
        labels = {name: _labels(things, *spec) for name, spec in details.items()}
        return {
            name: (readers[name](crops[rows]).argmax(1) == classes).float().mean().item()
            for name, (rows, classes) in labels.items()
        }

    clean = read()
    assert min(clean.values()) > 0.96, clean
    for name in set(CORRUPTIONS) - {'mean_shift'}:
        hard = read(lambda image, g: degrade(image, name, 'hard', g, relative=True))
        assert max(clean[d] - hard[d] for d in details) > 0.08, (name, hard)


# easy-VQA and errors


def test_easy_vqa_is_read_completely():
    "Both splits have the sizes their author states, and all words are known."
    words = set(sc.vocabulary())
    for split, n in (('train', 38575), ('test', 9673)):
        rows = sc.easy_vqa(split)
        assert len(rows) == n and {w for _, q, a in rows for w in (*q.split(), a)} <= words
        assert rows[0][0].shape == (64, 64, 3) and rows[0][0].dtype == np.uint8
    assert {a for *_, a in rows} == {a for v in sc.EASY_ANSWERS.values() for a in v}


def test_easy_vqa_benchmark_is_balanced():
    "Every answer equally often; the same seed gives the same rows; too many rows are refused."
    a, b, c = (sc.easy_vqa_benchmark(130, seed) for seed in (0, 0, 1))
    assert set(Counter(i.question.answer for i in a).values()) == {10} and [
        i.question for i in a
    ] == [i.question for i in b]
    assert [i.question.prompt for i in a] != [i.question.prompt for i in c]
    assert all(best <= guess + 0.05 for best, guess, _ in sc.constant_baseline(a).values())
    with pytest.raises(ValueError, match='n <= '):
        sc.easy_vqa_benchmark(5000)


def test_errors_say_what_to_do(monkeypatch):
    "Bad names and a missing package are refused with one sentence."
    with pytest.raises(ValueError, match='mmbench'):
        sc.benchmark('mme', 3)
    with pytest.raises(ValueError, match='mmbench'):
        sc.sample_scene(rng(0), 'mme')
    with pytest.raises(ValueError, match='train'):
        sc.training_item(0, 0, split='dev')
    with pytest.raises(ValueError, match='multiple of 4'):
        sc.render(sc.Scene(()), 63)
    with pytest.raises(ValueError, match="'test'"):
        sc.easy_vqa('val')
    with pytest.raises(ValueError, match='questions'):
        sc.text_only_baseline([], [])
    sc._easy_images.cache_clear()
    monkeypatch.setitem(sys.modules, 'easy_vqa', None)
    with pytest.raises(ModuleNotFoundError, match='pip install easy-vqa'):
        sc.easy_vqa('test')
