"""An exploration shows what happened, and the panel works, without and with a browser.

The browser test needs Chromium and `pip install -e '.[browser]'`; without them it is skipped."""

import io
import json
import math
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import warnings
from dataclasses import replace
from datetime import datetime, timezone

import numpy as np
import pytest
import torch
from PIL import Image
from test_generate import talker
from test_model import close

import clear_nb.mot
import clear_nb.panel
from clear_nb.answer import answer
from clear_nb.attention import (
    answer_tokens,
    attention_of_last_text,
    attention_shares,
    image_spans,
    token_texts,
)
from clear_nb.base import new_model
from clear_nb.core import PATHS, ROOT, rng
from clear_nb.degrade import CORRUPTIONS
from clear_nb.explore import (
    PHOTO,
    clean_estimates,
    damage,
    drawn_scene,
    explore,
    figure_attention,
    figure_pictures,
    figure_restorations,
    fit_picture,
    psnr,
)
from clear_nb.flow import clean_estimate
from clear_nb.grpo import rollout_segments, state_at
from clear_nb.model import ClearModel
from clear_nb.panel import Panel, make_panel, token_choices
from clear_nb.presets import load_preset
from clear_nb.trajectory import pack
from clear_nb.vae import unpatchify

QUESTION = 'what color is it?'


def noise(w=40, h=30):
    return rng('explore', w, h).integers(0, 256, (h, w, 3), np.uint8)


@pytest.fixture(scope='module')
def restorer():
    """A random model that asks for a restoration at least once and says something afterwards."""
    for k in range(60):
        model = talker('explore', k, marker=12.0)
        model.cfg = replace(model.cfg, vae_rule=(32, 32, 8), vit_rule=(32, 32, 8))
        e = explore(model, noise(), QUESTION, steps=3, max_new=4)
        if e.restorations and e.attention:
            return model
    raise AssertionError('no seed asks for a restoration')


@pytest.fixture(scope='module')
def shipped():
    return ClearModel.from_pretrained(PATHS.checkpoints / 'tiny' / 'grpo').eval()


# ---------------------------------------------------------------- exploring


@pytest.mark.parametrize('mode', ['bridge', 'reencode'])
def test_same_as_answer(restorer, mode):
    """Without a corruption `explore` and `answer` give the same texts and restored pictures."""
    quick = dict(steps=3, max_new=4, mode=mode, seed=2)
    a, e = (
        answer(noise(), QUESTION, restorer, progress=False, **quick),
        explore(restorer, noise(), QUESTION, **quick),
    )
    assert (
        a.texts == e.rollout.texts
        and len(a.images) == len(e.restorations) > 0
        and (e.right_answer, e.correct) == ('', None)
    )
    assert all(
        np.array_equal(x, f.restored) for x, f in zip(a.images, e.restorations)
    ) and np.array_equal(e.clean, e.seen)


def test_what_is_shown_is_what_the_model_read(restorer):
    """The degraded picture is the ViT's input, pixel by pixel; each seed degrades differently."""
    e, f = (
        explore(
            restorer,
            noise(200, 150),
            QUESTION,
            'gaussian_noise',
            'mid',
            seed,
            policy='never',
            max_new=4,
        )
        for seed in (0, 1)
    )
    assert np.array_equal(
        ((e.rollout.prompt[1].image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy(), e.seen
    ) and e.seen.shape == (24, 32, 3)
    assert (e.seen != f.seen).any() and np.array_equal(e.clean, f.clean) and e.restorations == []


@pytest.mark.parametrize('name', CORRUPTIONS)
def test_every_corruption(shipped, name):
    """Each corruption changes a drawn scene and the photo at every severity."""
    for image in (drawn_scene(0).clean, PHOTO):
        picture = fit_picture(shipped, image)
        for severity in ('low', 'mid', 'hard'):
            assert psnr(damage(picture, name, severity), picture) < math.inf


def test_clean_estimate_is_the_velocity(restorer):
    """Clean estimates from neighbouring states equal x - t v with the velocity of a packed pass."""
    r = explore(restorer, noise(), QUESTION, steps=4, max_new=4, shift=2.0).rollout
    d = r.restorations[0]
    z = torch.stack([state_at(d, k) for k in range(4)])
    want = clean_estimates(z, d.times)
    for k in range(3):
        h = restorer(pack([rollout_segments(r, [k] * len(r.restorations))], restorer.shape))
        n, (rows, cols) = len(d.states[0]), (s // restorer.shape.latent_patch for s in z.shape[-2:])
        v = unpatchify(restorer.velocity(h)[:n], rows, cols, restorer.shape.latent_patch)
        close(clean_estimate(z[k], v, d.times[k]), want[k], 1e-4)
    assert torch.equal(want[3], z[3])


def test_right_and_wrong(shipped):
    """The verdict is that of the benchmark's rule; letters are explained by their option."""
    item = drawn_scene(1)
    q = next(q for q in item.questions if q.answer in 'ABCD')
    e = explore(shipped, item.clean, q, policy='never')
    assert (
        e.correct == (e.answer.upper() == q.answer) and e.right_answer == f'{q.answer} ({q.truth})'
    )
    assert explore(shipped, item.clean, q.prompt, policy='never').correct is None


def test_fresh_weights_are_shown_too():
    """A model that has learnt nothing: no restoration, no answer block, figures all the same."""
    e = explore(
        new_model(load_preset('smoke'), 0, 50).eval(),
        drawn_scene(0).clean,
        drawn_scene(0).questions[0],
        'motion_blur',
    )
    assert (
        e.attention.answer == []
        and e.attention.target == 'input latent'
        and 'no answer block' in str(e)
    )
    assert len(figure_pictures(e).axes) == 2 and figure_attention(e).subfigs[0].axes
    e.attention.tokens[:2] = [r'$\frac$', '\x1b[2J\n']  # what a model may say
    figure_attention(e, [0, 1]).savefig(io.BytesIO(), format='svg')
    assert '“' + r'\$\frac\$\x1b[2J' in figure_attention(e, [0, 1]).get_suptitle()
    with pytest.raises(ValueError, match='nothing was restored'):
        figure_restorations(e)


@pytest.mark.parametrize(
    'arguments, sentence',
    [
        (dict(question=' '), 'question is empty'),
        (dict(question='why? ' * 400), 'shorten the question'),
        (dict(image=noise(90, 3)), '90 x 3 pixels; choose one'),
        (dict(image='nowhere.png'), 'no image file at nowhere.png'),
        (dict(corruption='fog'), 'unknown corruption'),
        (dict(severity='worse', corruption='graffiti'), 'severity must be'),
        (dict(policy='perhaps'), "unknown 'perhaps'"),
        (dict(steps=1), 'steps must be at least 2'),
    ],
)
def test_refusals(shipped, arguments, sentence):
    """One sentence on what is wrong, before anything is generated."""
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(sentence)):
        explore(shipped, **{'image': noise(), 'question': QUESTION, **arguments})


# ---------------------------------------------------------------- attention


def naive(q, k, seen):
    """softmax(QK^T / sqrt d) of one query of one head, number by number."""
    s = [
        sum(float(a) * float(b) for a, b in zip(q, row)) / math.sqrt(len(q))
        for row, ok in zip(k, seen)
        if ok
    ]
    e = iter([math.exp(x - max(s)) for x in s])
    out = [next(e) if ok else 0.0 for ok in seen]
    return [x / sum(out) for x in out]


@pytest.mark.parametrize('mode', ['bridge', 'reencode', 'both'])
def test_attention_is_that_of_the_model(restorer, mode, monkeypatch):
    """The weights follow the formula on queries, keys and masks caught inside a forward pass.

    Rows sum to 1 over what is visible.
    """
    r = explore(restorer, noise(), QUESTION, steps=3, max_new=6, mode=mode).rollout
    look, caught, inner = attention_of_last_text(restorer, r), [], clear_nb.mot.attend
    monkeypatch.setattr(
        clear_nb.mot,
        'attend',
        lambda q, k, v, mask: caught.append((q[0], k[0], mask[0])) or inner(q, k, v, mask),
    )
    with torch.no_grad():
        restorer(pack([rollout_segments(r)], restorer.shape))
    layers, heads, n, L = look.weights.shape
    assert (layers, heads, n, L) == (
        len(caught),
        caught[0][0].shape[0],
        len(r.turns[-1].ids),
        caught[0][0].shape[1],
    )
    for layer, (q, k, mask) in enumerate(caught):
        for token, head in ((0, 0), (n - 1, heads - 1)):
            at = L - n - 2 + token  # the place before the token
            want = naive(q[head, at], k[head * len(k) // heads], mask[at])
            assert np.abs(look.weights[layer, head, token].numpy() - want).max() < 1e-5
        seen = torch.stack([mask[L - n - 2 + t] for t in range(n)])
        close(look.weights[layer].masked_fill(~seen, 0.0).sum(-1), torch.ones(heads, n), 1e-5)


@pytest.mark.parametrize(
    'mode, names, target',
    [
        ('bridge', ['input latent', 'input patches', 'restored latent'], 'restored latent'),
        ('reencode', ['input latent', 'input patches', 'restored patches'], 'restored patches'),
        (
            'both',
            ['input latent', 'input patches', 'restored latent', 'restored patches'],
            'restored latent',
        ),
    ],
)
def test_spans_are_the_cells(restorer, mode, names, target):
    """Each span covers exactly the cells of its picture in the packed row, in every mode."""
    e = explore(restorer, noise(), QUESTION, steps=3, max_new=6, mode=mode, max_restores=1)
    p = pack([rollout_segments(e.rollout)], restorer.shape)
    assert list(e.attention.spans) == names and e.attention.target == target
    for kind, places in (('latent', p.vae_at), ('patches', p.vit_at)):
        want = [
            k
            for name, (at, rows, cols) in e.attention.spans.items()
            if name.endswith(kind)
            for k in range(at, at + rows * cols)
        ]
        assert places.tolist() == want
    assert all(abs(float(s) - 100) < 1e-3 for s in sum(attention_shares(e.attention).values()))


def test_second_restoration_has_its_own_span(restorer):
    """Two restored pictures are told apart, and the last one is looked at."""
    r = explore(restorer, noise(), QUESTION, steps=3, max_new=4, max_restores=1).rollout
    twice = replace(r, turns=[r.turns[0], *r.turns], restorations=r.restorations * 2)
    assert list(image_spans(rollout_segments(twice), restorer.shape))[2:] == [
        'restored latent',
        'restored latent 2',
    ]
    assert attention_of_last_text(restorer, twice).target == 'restored latent 2'


def test_answer_tokens_of_the_shipped_tokenizer(shipped):
    """Every answer of the drawn world is found between its tags, however it is tokenized."""
    for text in ('red', 'A', 'taxi', 'two words', '7'):
        cut = token_texts(
            shipped.tokenizer,
            shipped.tokenizer.encode(
                f'<think> i see it</think><answer> {text}</answer>', add_special_tokens=False
            ),
        )
        assert ''.join(cut[k] for k in answer_tokens(cut)).strip() == text


# ---------------------------------------------------------------- the panel, without a browser


@pytest.fixture
def lab(restorer):
    made = Panel(restorer)
    made.connect()
    made.preview()
    made.controls.steps.value, made.controls.question.value = 2, QUESTION
    return made


def file(name, content):
    return {
        'name': name,
        'type': '',
        'size': len(content),
        'content': content,
        'last_modified': datetime.now(timezone.utc),
    }


def png(a, **more):
    out = io.BytesIO()
    Image.fromarray(a).save(out, more.pop('format', 'png'), **more)
    return out.getvalue()


def status(lab):
    return re.sub('<.*?>', '', lab.screen.status.value)


def test_controls_are_arguments(lab, monkeypatch):
    """Every control reaches `explore`; only questions of the scene bring their answers."""
    got = []
    monkeypatch.setattr(
        clear_nb.panel,
        'explore',
        lambda *a, **k: got.append((a, k)) or explore(*a, max_new=4, **k),
    )
    c = lab.controls
    c.number.value, c.corruption.value, c.severity.value, c.seed.value = 5, 'graffiti', 'mid', 3
    c.steps.value, c.mode.value, c.policy.value = 4, 'reencode', 'never'
    lab.ask()
    c.asks.index = 2
    lab.ask()
    (_, image, question, *rest), named = got[0]
    assert np.array_equal(image, drawn_scene(5).clean) and (question, rest) == (
        QUESTION,
        ['graffiti', 'mid', 3],
    )
    assert (
        named == dict(steps=5, mode='reencode', policy='never')
        and got[1][0][2] == drawn_scene(5).questions[2]
    )
    assert (
        lab.exploration.correct is not None
        and 'graffiti, mid; 4 denoising steps, reencode, never' in lab.screen.trajectory.value
        and status(lab).endswith(' s')
    )


@pytest.mark.parametrize(
    'upload, sentence',
    [
        ([], 'choose an image file.'),
        ([file('notes.txt', b'hello')], 'notes.txt is not an image in a known format'),
        ([file('half.png', png(noise())[:200])], 'cannot decode half.png'),
        ([file('dot.png', png(noise(2, 2)))], '2 x 2 pixels; choose one of at least 8'),
    ],
)
def test_bad_upload(lab, upload, sentence):
    """One sentence, no picture, the earlier result stays and the button works."""
    lab.ask()
    before = lab.screen.trajectory.value
    lab.controls.source.value, lab.controls.file.value = 'upload', upload
    for act in (lab.preview, lab.ask):
        act()
        assert (
            sentence in status(lab)
            and status(lab).count('.') <= 4
            and 'ce-error' in lab.screen.status.value
        )
    assert (lab.screen.input.value, lab.screen.trajectory.value, lab.controls.ask.disabled) == (
        '',
        before,
        False,
    ) and before


def test_good_upload(lab):
    """An upload is shown, of an animation the first frame with a note; a typed question stays."""
    frames = [Image.fromarray(noise()), Image.fromarray(noise()[::-1].copy())]
    out = io.BytesIO()
    frames[0].save(out, 'gif', save_all=True, append_images=frames[1:])
    lab.controls.source.value, lab.controls.file.value = 'upload', [file('a.gif', out.getvalue())]
    assert (
        'several frames; only the first is used' in status(lab)
        and lab.screen.input.value.count('<figure>') == 2
    )
    lab.controls.corruption.value, lab.controls.file.value = None, [file('a.png', png(noise()))]
    lab.ask()
    assert (
        np.array_equal(lab.exploration.seen, fit_picture(lab.model, noise()))
        and lab.exploration.question == QUESTION
        and 'unchanged' in lab.screen.input.value
    )


def test_empty_question_and_fault(lab, monkeypatch):
    """A fault of the program is told as such, and not swallowed; the button works afterwards."""
    lab.controls.question.value = '  '
    lab.ask()
    assert 'question is empty' in status(lab)
    monkeypatch.setattr(clear_nb.panel, 'explore', lambda *a, **k: [][0])
    lab.controls.question.value = QUESTION
    with pytest.raises(IndexError):
        lab.ask()
    assert 'fault of the program' in status(lab) and not lab.controls.ask.disabled


def test_slider_and_menu(lab):
    """The slider walks through every state, and the menu redraws the attention.

    The menu also redraws for the next exploration.
    """
    lab.controls.policy.value, lab.controls.corruption.value = 'always', None
    lab.ask()
    frames = []
    for k in range(len(lab.frames)):
        lab.screen.step.value = k
        frames.append(lab.screen.state.value)
    assert (
        len(set(frames)) == len(frames) == 3 * len(lab.exploration.restorations)
        and 't = 0.00' in lab.screen.when.value
    )
    labels, drawn = [l for l, _ in lab.screen.tokens.options], lab.screen.attention.value
    lab.screen.tokens.index = len(labels) - 1
    assert lab.screen.attention.value != drawn
    drawn = lab.screen.attention.value
    lab.controls.seed.value = 1
    lab.ask()
    assert (
        lab.screen.attention.value != drawn
        and lab.screen.tokens.index == 0
        and lab.screen.tokens.options == tuple(token_choices(lab.exploration.attention))
    )


def test_panel_is_made_without_a_front_end(shipped):
    """`make_panel` returns one widget; nothing is printed or warned."""
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert len(make_panel(shipped).children) == 2


# ---------------------------------------------------------------- in a browser

CHROMIUM = next(
    filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None
)
FLAGS = (
    '--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking '
    '--disable-component-update --disable-sync --disable-dev-shm-usage'
).split()
# seconds to wait for anything on a busy machine; alone, the whole test takes about 35
PATIENCE = 240


@pytest.fixture
def browser(tmp_path):
    """A page of headless Chromium with a profile of its own."""
    sync = pytest.importorskip(
        'playwright.sync_api', reason="needs playwright: pip install -e '.[browser]'"
    )
    if not CHROMIUM:
        pytest.skip('needs Chromium, for example apt-get install chromium')
    with sync.sync_playwright() as p:
        context = p.chromium.launch_persistent_context(
            tmp_path / 'profile',
            executable_path=CHROMIUM,
            args=FLAGS,
            viewport=dict(width=1400, height=1750),
        )
        context.set_default_timeout(1000 * PATIENCE)
        yield context.pages[0]
        context.close()


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def answers(url):
    try:
        return urllib.request.urlopen(url, timeout=2).status == 200
    except OSError:
        return False


@pytest.fixture
def notebook(tmp_path):
    """Start a JupyterLab with a copy of 09_explore and yield its address; it ends with the test."""
    home, port, token = tmp_path / 'home', free_port(), secrets.token_hex(16)
    shutil.copytree(
        ROOT / 'nbs',
        home,
        ignore=lambda folder, names: [n for n in names if n != '09_explore.ipynb'],
    )
    quiet = (
        tmp_path
        / 'settings'
        / '@jupyterlab'
        / 'apputils-extension'
        / 'notification.jupyterlab-settings'
    )
    quiet.parent.mkdir(parents=True)
    quiet.write_text(json.dumps(dict(fetchNews='false', checkForUpdates=False)), encoding='utf-8')
    own = {f'JUPYTER_{k}_DIR': str(tmp_path / k.lower()) for k in ('CONFIG', 'DATA', 'RUNTIME')} | {
        f'JUPYTERLAB_{k}_DIR': str(tmp_path / k.lower()) for k in ('SETTINGS', 'WORKSPACES')
    }
    env = dict(
        os.environ,
        PYTHONPATH=str(ROOT),
        OMP_NUM_THREADS='1',
        IPYTHONDIR=str(tmp_path / 'ipython'),
        **own,
    )
    env.pop('MPLBACKEND', None)  # a notebook chooses its own
    command = [
        sys.executable,
        '-m',
        'jupyter',
        'lab',
        '--no-browser',
        '--allow-root',
        '--ip=127.0.0.1',
        f'--port={port}',
        '--ServerApp.port_retries=0',
        f'--IdentityProvider.token={token}',
        f'--ServerApp.root_dir={home}',
    ]
    with (tmp_path / 'lab.log').open('w', encoding='utf-8') as log:
        server = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    try:
        end = time.monotonic() + PATIENCE
        while not answers(f'http://127.0.0.1:{port}/api/status?token={token}'):
            assert server.poll() is None and time.monotonic() < end, (
                tmp_path / 'lab.log'
            ).read_text(encoding='utf-8')[-2000:]
            time.sleep(0.3)
        yield f'http://127.0.0.1:{port}/lab/tree/09_explore.ipynb?token={token}'
    finally:
        server.terminate()
        server.wait(30)


@pytest.mark.slow
def test_in_a_browser(notebook, browser, tmp_path):
    """Run all cells: the widgets follow the controls, and the button brings an answer.

    Its steps and its attention are shown with it.
    """
    page, shot = browser, os.environ.get('SCREENSHOTS', tmp_path)  # a folder, to look at afterwards
    page.goto(notebook)
    page.locator(
        '#jp-main-statusbar', has_text=re.compile(r'Python.*Idle')
    ).wait_for()  # before a kernel is there, Run All Cells would ask for one
    page.get_by_role('menuitem', name='Run', exact=True).click()
    page.get_by_text('Run All Cells', exact=True).click()
    button = page.locator('.jupyter-button', has_text='Ask')
    button.scroll_into_view_if_needed()
    seen, text = page.get_by_alt_text('what the model sees'), page.locator('.ce-text')
    hard = seen.get_attribute('src')
    assert hard.startswith('data:image/png') and page.locator('.ce-said').count() == 0
    page.screenshot(path=f'{shot}/explore-before.png')
    button.click()
    page.locator('.ce-said').wait_for()
    first, about = text.all_inner_texts(), page.locator('.ce .ce-about')
    assert 'lens blur, hard' in about.inner_text() and first[-1].startswith('<think>')
    page.screenshot(path=f'{shot}/explore-hard.png')
    page.locator('.widget-toggle-button', has_text='low').click()
    page.wait_for_function(
        """before => {
            const img = document.querySelector('img[alt^="what the model sees"]');
            return img && img.src != before;
        }""",
        arg=hard,
    )  # the picture follows at once
    page.locator('.widget-toggle-button', has_text='always').click()
    button.click()
    page.locator(
        '.ce .ce-about', has_text='lens blur, low; 7 denoising steps, bridge, always'
    ).wait_for()
    assert text.all_inner_texts() != first and page.get_by_alt_text('restored').count() >= 1
    steps = page.locator('.ce-about', has_text='step 7 of 7')
    steps.wait_for()
    page.locator('.noUi-handle').last.press('ArrowLeft')  # the slider under the steps
    page.locator('.ce-about', has_text='step 6 of 7').wait_for()
    page.wait_for_function(
        """() => [...document.querySelectorAll('.widget-image')]
            .filter(i => i.naturalWidth > 100).length == 3"""
    )  # state, guess, attention
    page.screenshot(path=f'{shot}/explore-low.png')
    page.get_by_role('textbox', name='question').fill(' ')
    button.click()
    page.locator('.ce-error', has_text='the question is empty').wait_for()
    assert page.locator('.ce-said').count() == 1  # what was there stays
