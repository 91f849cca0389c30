"""A question about one picture, in three lines of Python and as a command."""

import tomllib
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_generate import talker

import clear_nb
from clear_nb.answer import (
    answer,
    build_prompt,
    check_out,
    check_token_budget,
    newest_folder,
    sampling_of,
    save_images,
    with_think_prompt,
)
from clear_nb.cli import main
from clear_nb.core import PATHS, ROOT, rng
from clear_nb.decode import Noise
from clear_nb.generate import generate
from clear_nb.model import export_bagel

QUESTION = 'what color is it?'


@pytest.fixture(scope='module')
def restorer():
    "A random model that asks for a restoration at least once."
    for k in range(40):
        model = talker('answer', k, marker=12.0)
        model.cfg = replace(model.cfg, vae_rule=(32, 32, 8), vit_rule=(32, 32, 8))
        if answer(noise(), QUESTION, model, steps=3, max_new=4, progress=False).images:
            return model
    raise AssertionError('no seed asks for a restoration')


def noise(w=40, h=30):
    return rng('answer', w, h).integers(0, 256, (h, w, 3), np.uint8)


@pytest.fixture
def photo(tmp_path):
    Image.fromarray(noise()).save(tmp_path / 'photo.png')
    return tmp_path / 'photo.png'


@pytest.fixture
def folder(restorer, tmp_path):
    return restorer.save_pretrained(tmp_path / 'model')


def test_three_lines(folder, photo, capsys, monkeypatch):
    "Folder or open model, path or picture give the same trajectory."
    monkeypatch.setenv('JPY_SESSION_NAME', 'a person looks')
    a = answer(photo, QUESTION, folder, steps=3, max_new=4)
    assert 'denoising' in capsys.readouterr().err
    b = answer(Image.open(photo), f' {QUESTION} ', str(folder), steps=3, max_new=4, progress=False)
    assert str(a) == str(b) and len(a.texts) == len(a.images) + 1 > 1
    assert (
        all(np.array_equal(x, y) for x, y in zip(a.images, b.images))
        and capsys.readouterr().err == ''
    )
    lines = str(a).splitlines()
    assert (
        sum(line.startswith('[restored image') for line in lines) == len(a.images)
        and 'answer' in lines[-1]
    )


def test_seed_and_policy(restorer, photo):
    "Another seed denoises other noise; `never` does not restore."
    a, b = (
        answer(photo, QUESTION, restorer, seed=k, steps=3, max_new=4, progress=False)
        for k in (0, 1)
    )
    assert not np.array_equal(a.images[0], b.images[0])
    assert answer(photo, QUESTION, restorer, policy='never', max_new=4, progress=False).images == []


def test_is_generate(restorer, photo):
    "`answer` gives the texts of `generate`."
    s = sampling_of(restorer, steps=3, max_new=4)
    r = generate(restorer, [build_prompt(restorer, photo, QUESTION)], s, Noise('answer', 5))[0]
    assert (
        answer(photo, QUESTION, restorer, seed=5, steps=3, max_new=4, progress=False).texts
        == r.texts
    )


def test_think_prompt(restorer):
    "The think prompt comes behind a blank; without one the question stays as it is."
    told, bare = (
        SimpleNamespace(cfg=replace(restorer.cfg, think_prompt=words))
        for words in ('think first', '')
    )
    for q in (QUESTION, 'A or B? \n', '\n a \n\n'):
        assert with_think_prompt(told, q) == f'{q} think first' and with_think_prompt(bare, q) == q


def test_published_folder(restorer, photo, tmp_path):
    "A folder in BAGEL's layout opens in bf16 and answers."
    a = answer(
        photo,
        QUESTION,
        export_bagel(restorer, tmp_path / 'bagel'),
        steps=3,
        max_new=4,
        progress=False,
    )
    assert a.texts and all(im.size == (32, 24) for im in a.images)


@pytest.mark.parametrize('question', ['', ' \n', None])
def test_empty_questions(restorer, photo, question):
    with pytest.raises(ValueError, match='question is empty; ask'):
        answer(photo, question, restorer)


def test_long_questions(restorer, photo):
    "Refused when the longest trajectory would not fit, accepted right below."
    base = len(restorer.tokenizer.encode(QUESTION))
    s = sampling_of(restorer, steps=3, max_new=4)
    for n in range(max(base, 130), 400):
        prompt = build_prompt(restorer, photo, 'a' * n)
        try:
            check_token_budget(restorer, prompt, s)
        except ValueError as e:
            message = str(e)
            break
    assert (
        f'the question has {len(prompt[-1].ids)} tokens' in message
        and 'holds 256; shorten the question by 1 tokens' in message
    )
    with pytest.raises(ValueError, match='shorten the question'):
        answer(photo, 'a' * n, restorer, steps=3, max_new=4)


def test_missing_checkpoint(monkeypatch, tmp_path, photo):
    "The newest stage counts, the base does not; the sentence names what is missing."
    monkeypatch.setattr(PATHS, 'runs', tmp_path / 'runs')
    monkeypatch.setattr(PATHS, 'checkpoints', tmp_path / 'shipped')
    (tmp_path / 'shipped' / 'tiny' / 'base').mkdir(parents=True)
    with pytest.raises(
        FileNotFoundError,
        match='no checkpoint of grpo, bridge or sft '
        "for preset 'tiny', seed 0: run `make reproduce`",
    ):
        answer(photo, QUESTION)
    for stage in ('sft', 'bridge', 'grpo'):
        (tmp_path / 'shipped' / 'tiny' / stage).mkdir()
        assert newest_folder().name == stage


def test_default_model(monkeypatch, tmp_path, photo, restorer):
    "Without a model, the newest stage is opened."
    monkeypatch.setattr(PATHS, 'runs', tmp_path / 'runs')
    monkeypatch.setattr(PATHS, 'checkpoints', tmp_path / 'shipped')
    restorer.save_pretrained(tmp_path / 'shipped' / 'tiny' / 'bridge')
    quick = dict(steps=3, max_new=4, progress=False, device='cpu')
    assert str(answer(photo, QUESTION, **quick)) == str(answer(photo, QUESTION, restorer, **quick))


# ---------------------------------------------------------------- command line


def command(folder, photo, *more):
    return [
        'answer',
        '--model',
        str(folder),
        '--image',
        str(photo),
        '--question',
        QUESTION,
        '--steps',
        '3',
        '--device',
        'cpu',
        *more,
    ]


def test_command(folder, photo, tmp_path, capsys, monkeypatch):
    "Trajectory on standard output, bar on standard error, image in the file."
    monkeypatch.setenv('JPY_SESSION_NAME', 'a person looks')
    assert main(command(folder, photo, '--out', str(tmp_path / 'r.png'), '--seed', '3')) == 0
    printed = capsys.readouterr()
    assert (
        '[restored image 1: 32 x 24 pixels]' in printed.out
        and f'written: {tmp_path / "r.png"}' in printed.out
        and 'denoising' in printed.err
    )
    assert Image.open(tmp_path / 'r.png').size == (32, 24)


@pytest.mark.parametrize(
    'more, sentence',
    [
        (['--image', 'nowhere.jpg'], 'no image file at nowhere.jpg'),
        (['--question', ' '], 'question is empty'),
        (['--question', 'a' * 300], 'shorten the question'),
        (['--model', 'nowhere'], 'no checkpoint at nowhere'),
        (['--steps', '1'], 'steps must be at least 2, got 1'),
        (['--out', 'x.doc'], "unknown kind of image '.doc'"),
        (['--out', 'no/where.png'], 'no folder no; make it first'),
        (['--device', 'foo'], "there is no device 'foo'; write cpu"),
        (['--device', 'cuda:77'], "no device 'cuda:77'"),
    ],
)
def test_refusals(folder, photo, more, sentence, capsys):
    "One sentence on standard error, status 2, nothing on standard output."
    assert main(command(folder, photo, *more)) == 2
    printed = capsys.readouterr()
    assert (
        sentence in printed.err
        and printed.err.count('\n') == 1
        and printed.err.startswith('clear-nb: ')
        and printed.out == ''
    )


@pytest.mark.parametrize('suffix', sorted(Image.registered_extensions()))
def test_kinds_that_can_only_be_read(suffix, tmp_path):
    "A kind of image that passes the check can be written; other kinds are refused early."
    try:
        path = check_out(tmp_path / f'r{suffix}')
    except ValueError as e:
        assert suffix not in (
            '.png',
            '.jpg',
            '.jpeg',
            '.webp',
            '.bmp',
            '.tif',
            '.gif',
        ) and 'use .png or .jpg' in str(e)
    else:
        assert (
            suffix not in ('.psd', '.fli', '.cur', '.h5')
            and save_images([Image.fromarray(noise())], path)[0].stat().st_size
        )


def test_animation_is_said(folder, tmp_path, capsys):
    frames = [Image.fromarray(noise()), Image.fromarray(noise(40, 30)[::-1].copy())]
    frames[0].save(tmp_path / 'a.gif', save_all=True, append_images=frames[1:])
    assert main(command(folder, tmp_path / 'a.gif', '--policy', 'never')) == 0
    assert 'has several frames; only the first is used' in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason='needs a machine without a GPU')
def test_no_gpu(folder, photo, capsys):
    assert main(command(folder, photo, '--device', 'cuda')) == 2
    assert capsys.readouterr().err == "clear-nb: there is no device 'cuda' here; choose cpu.\n"


def test_prefix(folder, photo, capsys):
    "A folder may have `clear:` before it, as `bench` writes it."
    printed = [
        (main(command(name, photo, '--policy', 'never')), capsys.readouterr().out)
        for name in (folder, f'clear:{folder}')
    ]
    assert printed[0] == printed[1] and printed[0][0] == 0


def test_version(capsys):
    with pytest.raises(SystemExit) as e:
        main(['--version'])
    assert e.value.code == 0 and capsys.readouterr().out == f'clear-nb {clear_nb.__version__}\n'


def test_interrupted(folder, photo, capsys, monkeypatch):
    "Ctrl-C: one sentence, status 130."

    def stop(*a, **kw):
        raise KeyboardInterrupt

    monkeypatch.setattr('clear_nb.generate.generate', stop)
    assert main(command(folder, photo)) == 130
    assert capsys.readouterr().err == 'clear-nb: stopped.\n'


def test_entry_point(capsys):
    "pyproject.toml names a function that exists, and it explains itself."
    module, _, name = tomllib.loads((ROOT / 'pyproject.toml').read_text(encoding='utf-8'))[
        'project'
    ]['scripts']['clear-nb'].partition(':')
    entry = getattr(import_module(module), name)
    with pytest.raises(SystemExit) as e:
        entry(['answer', '--help'])
    printed = capsys.readouterr().out
    assert (
        e.value.code == 0
        and all(
            f'--{o}' in printed
            for o in ('model', 'image', 'question', 'out', 'seed', 'steps', 'policy')
        )
        and '2 an error that you can mend' in ' '.join(printed.split())
    )
