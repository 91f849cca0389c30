"""Other people's models and functions: pictures placed once, cut replies, NaN, bugs, settings."""

import base64
import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_hf
import torch
import transformers.models.smolvlm.processing_smolvlm as smolvlm_module
from bench_rows import picture
from PIL import Image
from test_generate import talker
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from clear_nb.adapters import (
    MAX_NEW_TOKENS,
    CallableAdapter,
    ClearAdapter,
    HFAdapter,
    ServerAdapter,
    Stopped,
    fault_line,
    open_adapter,
)
from clear_nb.answer import (
    answer,
    check_request,
    context_words,
    open_model,
    save_images,
    without_tokens,
)
from clear_nb.cli import main
from clear_nb.core import ROOT
from clear_nb.decode import NotFinite
from clear_nb.evaluate import read_replies, run_rows
from clear_nb.model import ClearModel
from clear_nb.rows import BenchmarkRow


def rows(n=4):
    "Make rows with questions and pictures of different size."
    sizes = [(40, 30), (30, 64), (64, 64), (33, 47)]
    return [
        BenchmarkRow('b', str(k), f'what {"now " * (k % 4)}?', 'A', picture(k, *sizes[k % 4]))
        for k in range(n)
    ]


def small_talker(*seed, **factors):
    "Make a random model that reads pictures of 32 pixels."
    model = talker(*seed, **factors)
    model.cfg = replace(model.cfg, vae_rule=(32, 32, 8), vit_rule=(32, 32, 8))
    return model


# ---------------------------------------------------------------- families of processors


@pytest.fixture(scope='module', autouse=True)
def num2words():
    "Stand in for the package that SmolVLM needs for videos alone."
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(smolvlm_module, 'num2words', str)
        yield


KINDS = ('smolvlm', 'blip2', 'instructblip', 'florence2')
PICTURE_TOKENS = dict(blip2=4, instructblip=4, florence2=17)


@pytest.fixture(scope='module')
def family(request, tmp_path_factory):
    "Open a look-alike of a family."
    folder = getattr(tiny_hf, request.param)(tmp_path_factory.mktemp(request.param) / 'm')
    adapter = HFAdapter(folder, batch=3, max_new_tokens=8, device='cpu')
    adapter.kind = request.param
    return adapter


def first_logits(family, colour):
    "Compute the logits of the first new token for a question about a plain picture."
    inputs = family._inputs([(Image.new('RGB', (32, 32), colour), 'what?')])
    more = dict(max_new_tokens=1, output_logits=True, return_dict_in_generate=True)
    return family.model.generate(**inputs, **more).logits[0]


@pytest.mark.parametrize('family', KINDS, indirect=True)
def test_families_answer(family):
    "Padded batches say what single rows say, and replies depend on the picture."
    samples = rows()
    replies = family(samples)
    assert [r.kind for r in replies] == ['answer'] * 4
    assert [r.text for r in replies] == [family([s])[0].text for s in samples]
    first, second = (first_logits(family, colour) for colour in ('red', 'blue'))
    assert (first - second).abs().max() > 1e-4
    assert {json.loads(r.detail)['limit'] for r in replies} == {8}


@pytest.mark.parametrize('family', KINDS, indirect=True)
def test_a_picture_has_one_place(family):
    "The picture's tokens stand once, whether the processor, its template or the text puts them."
    token = family.processor.tokenizer.convert_tokens_to_ids('<image>')
    blank, asked = (
        family._inputs([(Image.new('RGB', (32, 32)), text)])['input_ids'][0].tolist()
        for text in ('?', 'what is it?')
    )
    assert blank.count(token) == asked.count(token) > 0
    assert asked.count(token) == PICTURE_TOKENS.get(family.kind, asked.count(token))


@pytest.mark.parametrize('family', KINDS, indirect=True)
def test_a_placeholder_in_a_question_is_text(family):
    "A question about a placeholder is answered; it never counts as a picture."
    texts = ('<image>', 'is <image> a tag? <image>', '<image>\nwhat is it?', '<row_1_col_1> ?')
    asked = [replace(s, question=q) for s, q in zip(rows(), texts)]
    token = family.processor.tokenizer.convert_tokens_to_ids('<image>')
    replies = family(asked)
    assert [r.kind for r in replies] == ['answer'] * 4, [r.detail for r in replies]
    size = Image.new('RGB', (32, 32))
    seen = []
    for text in ('?', *texts):
        plain = without_tokens(text, family.placeholders)
        seen.append(family._inputs([(size, plain)])['input_ids'][0].tolist().count(token))
    assert len({*seen}) == 1


def test_the_missing_package_is_named(tmp_path, monkeypatch):
    "A processor that needs a package says which one."
    folder = tiny_hf.smolvlm(tmp_path / 'm')
    monkeypatch.setattr(smolvlm_module, 'num2words', None)
    with pytest.raises(ValueError, match='num2words') as e:
        HFAdapter(folder, device='cpu')
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('family', ['florence2'], indirect=True)
def test_an_encoder_is_padded_behind(family):
    "Places in an encoder are counted from the left."
    assert family.two_parts and family.processor.tokenizer.padding_side == 'right'
    small = Image.new('RGB', (32, 32))
    ids = family._inputs([(small, 'a'), (small, 'a longer one')])['input_ids']
    assert ids[0, 0] == ids[1, 0] and ids[0, -1] == family.processor.tokenizer.pad_token_id


# ---------------------------------------------------------------- cut replies


def test_default_limits_are_one():
    "Both kinds of foreign models get the same room, and it is a setting."
    remote = ServerAdapter('m', 'http://localhost:9/v1')
    assert remote.options['max_tokens'] == MAX_NEW_TOKENS >= 512


@pytest.fixture(scope='module')
def llava(tmp_path_factory):
    return tiny_hf.llava(tmp_path_factory.mktemp('hf') / 'm')


def test_ends_of_replies(llava):
    "A reply that the model ends is `stop`, one that reaches the limit is `length`."
    adapter = HFAdapter(llava, max_new_tokens=8, device='cpu')
    assert [json.loads(r.detail)['finish'] for r in adapter(rows())] == ['length'] * 4
    inputs = adapter._inputs([(Image.new('RGB', (32, 32)), 'what?')])
    first = adapter._new_ids(inputs)[0, 2].item()
    adapter.model.generation_config.eos_token_id = [first]
    [reply] = adapter([replace(rows(1)[0], question='what?', image=picture(0, 32, 32))])
    ended = adapter._new_ids(inputs)[0].tolist()
    assert adapter._finish(ended) == 'stop' and len(ended) < 8
    assert json.loads(reply.detail)['finish'] in ('stop', 'length')
    assert adapter._finish([5] * 8) == 'length' and adapter._finish([5] * 7) == 'stop'


@pytest.mark.parametrize('family', ['florence2'], indirect=True)
def test_a_forced_end_is_a_cut(family):
    "Florence-2 is made to write the end token at the limit."
    end = family.model.generation_config.eos_token_id
    assert family._finish([7] * 7 + [end]) == 'length'
    assert family._finish([7] * 6 + [end, 0]) == 'stop'
    assert {json.loads(r.detail)['finish'] for r in family(rows())} <= {'stop', 'length'}


def test_ends_of_our_replies():
    "The limit cuts a text of ours; a text that ends by itself or asks to restore is whole."
    short, ready = small_talker('ends', 0, marker=0.0), small_talker('ends', 0, end=50.0)
    cut = ClearAdapter(short, max_new=3, steps=3, policy='never')(rows(2))
    whole = ClearAdapter(ready, max_new=40, steps=3, policy='never')(rows(2))
    for replies, ends in ((cut, {'length'}), (whole, {'stop'})):
        details = [json.loads(r.detail) for r in replies]
        assert {d['finish'] for d in details} == ends
    assert json.loads(cut[0].detail)['limit'] == 3


# ---------------------------------------------------------------- NaN


def poisoned(key, value=float('nan')):
    "Make a model with one bad weight."
    model = small_talker('nan', 0, marker=6.0)
    state = dict(model.named_parameters())
    name = next(k for k in sorted(state) if key in k)
    state[name].data.view(-1)[0] = value
    return model


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_nan_in_a_text_stops(value):
    "A model that computes NaN says so, and no row becomes a wrong answer."
    adapter = ClearAdapter(poisoned('norm.weight', value), max_new=5, steps=3)
    with pytest.raises(Stopped, match='NaN or infinity while it writes a text'):
        adapter(rows())
    with pytest.raises(NotFinite):
        answer(Image.new('RGB', (32, 32)), 'what?', adapter.model, max_new=5, progress=False)


def test_nan_in_a_picture_stops():
    "The same while a picture is restored."
    adapter = ClearAdapter(poisoned('llm2vae'), max_new=5, steps=3, policy='always')
    with pytest.raises(Stopped, match='while it restores a picture'):
        adapter(rows(1))


def test_nan_in_a_foreign_model_stops(llava):
    "transformers itself would draw token 0 for ever."
    adapter = HFAdapter(llava, max_new_tokens=4, device='cpu')
    adapter.model.lm_head.weight.data[3, 0] = float('nan')
    with pytest.raises(Stopped, match='NaN or infinity'):
        adapter(rows(1))


def test_a_stopped_run_keeps_its_replies(tmp_path):
    "What was answered before the NaN lies on the disk; another model goes on elsewhere."
    adapter = ClearAdapter(small_talker('nan', 1), batch=1, max_new=3, steps=3, policy='never')
    good, said = adapter._rollouts, []

    def fails_later(items):
        said.extend(items)
        if len(said) > 2:
            raise NotFinite('writes a text')
        return good(items)

    adapter._rollouts = fails_later
    with pytest.raises(Stopped):
        run_rows(adapter, rows(), tmp_path / 'run', batch=4, progress=False)
    assert list(read_replies(tmp_path / 'run').kind) == ['answer'] * 2


# ---------------------------------------------------------------- functions of the user


def module(folder, name, source):
    "Write a module and name it."
    (folder / f'{name}.py').write_text(source, encoding='utf-8')
    return name


@pytest.fixture
def code(tmp_path, monkeypatch):
    "A folder for modules of the user, as the current one."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', list(sys.path))
    kept = {*sys.modules}
    yield tmp_path
    for name in {*sys.modules} - kept:
        if name.startswith('user_'):
            del sys.modules[name]


BUG = 'def helper(x):\n    return x["no key"]\n\n\ndef f(picture, prompt):\n    return helper({})\n'


def test_a_bug_stops_the_run(code, capsys):
    "The first rows are asked, then one sentence names file, line and exception; a mended one goes on."
    data = scene_file(code)
    name = module(code, 'user_bug', BUG)
    command = ['bench', '--model', f'python:{name}:f', '--data', str(data), '--out']
    assert main([*command, str(code / 'run')]) == 2
    said = capsys.readouterr().err
    assert "KeyError: 'no key' (user_bug.py, line 2: return x" in said and 'Traceback' not in said
    assert 'first 3 rows' in said and len(said.strip().splitlines()) == 1
    assert len(read_replies(code / 'run')) == 3


def scene_file(folder, n=12):
    "Write a benchmark as a table of tabs."
    lines = ['index\timage\tquestion\tA\tB\tanswer']
    for row in rows(n):
        image = base64.b64encode(row.image).decode()
        lines.append(f'{row.index}\t{image}\t{row.question}\ta\tb\tA')
    (folder / 'MMStar.tsv').write_text('\n'.join(lines) + '\n', encoding='utf-8')
    return folder / 'MMStar.tsv'


def test_one_bad_row_is_an_outage():
    "A function that works elsewhere is asked to the end; the outage says where it failed."

    def f(picture, prompt):
        return 'A' if 'now' in prompt else 1 / 0

    replies = CallableAdapter(f)([rows(4)[1], *rows(4) * 3])
    assert sum(r.kind == 'outage' for r in replies) == 3
    failed = next(r for r in replies if r.kind == 'outage')
    assert 'ZeroDivisionError: division by zero (test_adapters_hard.py, line' in failed.detail


@pytest.mark.parametrize(
    'body, shown',
    [
        ('raise SystemExit(3)', 'SystemExit: 3'),
        ('return 5', 'returned int, not a text'),
        ('return None', 'returned NoneType, not a text'),
        ('return b"A"', 'returned bytes, not a text'),
        ('return undefined', "NameError: name 'undefined' is not defined"),
        ('raise ValueError("\\ud83d half")', 'ValueError: ? half'),
        ('return f(picture, prompt)', 'RecursionError'),
        ('return open("nowhere.txt").read()', 'FileNotFoundError: [Errno 2]'),
        ('raise KeyError("one\\n two")', "KeyError: 'one"),
        ('raise RuntimeError("one\\n two")', 'RuntimeError: one two ('),
        ('import no_such_package_7', "No module named 'no_such_package_7'"),
    ],
)
def test_bugs_are_named(code, body, shown):
    "Whatever a function does wrong on its first rows stops the run with its name."
    name = module(code, f'user_{abs(hash(body))}', f'def f(picture, prompt):\n    {body}\n')
    with pytest.raises(Stopped) as e:
        open_adapter(f'python:{name}:f')(rows() * 4)
    assert shown in str(e.value) and len(e.value.replies) == 3 and '\n' not in str(e.value)


@pytest.mark.parametrize('kind', [TimeoutError, ConnectionResetError, OSError])
def test_a_silent_server_is_no_bug(kind):
    "A function that asks a server has outages; the run goes on, and the next one asks again."

    def f(picture, prompt):
        raise kind('no reply')

    replies = CallableAdapter(f)(rows() * 3)
    assert [r.detail for r in replies] == [f'{kind.__name__}: no reply'] * 12


def test_half_a_character_in_a_reply_is_replaced():
    "A lone surrogate can be written to no file."
    assert CallableAdapter(lambda picture, prompt: 'B \ud83d')(rows(1))[0].text == 'B ?'


@pytest.mark.parametrize(
    'source, shown',
    [
        ('import no_such_package_8', "No module named 'no_such_package_8' ({}.py, line 1"),
        ('from os import no_such_name', 'cannot import name'),
        ('def f(:\n    pass', 'SyntaxError: invalid syntax ({}.py, line 1'),
        ('x = 1 / 0', 'ZeroDivisionError: division by zero ({}.py, line 1: x = 1 / 0)'),
        ('import sys\nsys.exit(0)', 'SystemExit: 0 ({}.py, line 2'),
        ('\tx = 1', 'IndentationError'),
        ('raise KeyboardInterrupt', None),
    ],
)
def test_failed_imports_are_named(code, source, shown):
    "A module that fails while it is imported is not called missing."
    name = module(code, f'user_import_{abs(hash(source))}', source + '\n')
    if shown is None:  # a person who presses Ctrl-C is no bug
        with pytest.raises(KeyboardInterrupt):
            open_adapter(f'python:{name}:f')
        return
    with pytest.raises(ValueError, match='cannot be imported') as e:
        open_adapter(f'python:{name}:f')
    assert shown.format(name) in str(e.value) and '\n' not in str(e.value)


@pytest.mark.parametrize('spec', ['user_nowhere:f', 'json.nowhere:f', ':f', 'json:nothing', 'json'])
def test_missing_functions(code, spec):
    "A module or a name that is not there."
    with pytest.raises(ValueError, match='cannot find the function'):
        open_adapter(f'python:{spec}')


def test_the_last_line_of_a_traceback():
    "A line of the user's own file is preferred to one inside a library."
    try:
        json.loads('{')
    except ValueError as e:
        assert '(test_adapters_hard.py, line' in fault_line(e, __file__)
        assert '(decoder.py, line' in fault_line(e)


# ---------------------------------------------------------------- settings of adapters


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return small_talker('settings', 0).save_pretrained(tmp_path_factory.mktemp('own') / 'm')


BAD_SETTINGS = [
    ('clear', 'temperature', -1, 'temperature must be at least 0, got -1'),
    ('clear', 'temperature', float('inf'), 'temperature must be float, got inf'),
    ('clear', 'top_p', -1, 'top_p must be at least 0 and at most 1, got -1'),
    ('clear', 'max_new', 0, 'max_new must be at least 1, got 0'),
    ('clear', 'max_new', 'many', "max_new must be int, got 'many'"),
    ('clear', 'steps', 1, 'steps must be at least 2, got 1'),
    ('clear', 'shift', 0, 'shift must be more than 0'),
    ('clear', 'max_restores', -1, 'max_restores must be at least 0'),
    ('clear', 'policy', 'perhaps', "unknown 'perhaps'"),
    ('clear', 'batch', 0, 'batch must be at least 1, got 0'),
    ('clear', 'seed', 'one', "seed must be int, got 'one'"),
    ('clear', 'system', 5, 'system must be str, got 5'),
    ('clear', 'precision', 'fp8', 'precision must be one of bf16, no'),
    ('clear', 'dtype', 'int8', 'dtype must be one of float32, bfloat16, float16'),
    ('clear', 'device', 'gpu', "there is no device 'gpu'"),
    ('clear', 'heat', 1, "there is no setting 'heat'"),
    ('hf', 'max_new_tokens', 0, 'max_new_tokens must be at least 1, got 0'),
    ('hf', 'max_new_tokens', 1.5, 'max_new_tokens must be int, got 1.5'),
    ('hf', 'dtype', 'float64x', 'dtype must be one of'),
    ('hf', 'device', 'cuda:x', "there is no device 'cuda:x'"),
    ('hf', 'batch', True, 'batch must be int, got True'),
    ('hf', 'heat', 1, "unexpected keyword argument 'heat'"),
    ('server', 'workers', 0, 'workers must be at least 1'),
    ('server', 'timeout', -1, 'timeout must be more than 0'),
    ('server', 'rpm', 0, 'rpm must be more than 0'),
    ('server', 'tries', '3x', "tries must be int, got '3x'"),
    ('server', 'dtype', 'float32', "a server has no setting 'dtype'"),
    ('python', 'batch', -3, 'batch must be at least 1, got -3'),
    ('python', 'device', 'cpu', "unexpected keyword argument 'device'"),
]


@pytest.mark.parametrize('kind, name, value, sentence', BAD_SETTINGS)
def test_settings_out_of_range(folder, llava, kind, name, value, sentence):
    "A setting is refused with its name, its value and its range."
    specs = dict(
        clear=f'clear:{folder}',
        hf=f'hf:{llava}',
        server='server:m@http://localhost:9/v1',
        python='python:math:pow',
    )
    with pytest.raises(ValueError) as e:
        open_adapter(specs[kind], **{name: value})
    assert sentence in str(e.value) and '\n' not in str(e.value)


def test_dtype_and_device(folder, llava):
    "Weights are opened in the format that was asked for; results name it."
    plain = ClearAdapter(folder, device='cpu', max_new=4, steps=3, precision='no')
    narrow = ClearAdapter(folder, device='cpu', max_new=4, steps=3, dtype='bfloat16')
    assert narrow.model.cache_dtype == torch.bfloat16 and narrow.settings['dtype'] == 'bfloat16'
    assert 'dtype' not in plain.settings  # runs of earlier versions go on
    assert narrow.settings['precision'] == 'no'
    assert [r.kind for r in narrow(rows(2))] == ['answer'] * 2
    foreign = HFAdapter(llava, device='cpu', dtype='bfloat16', max_new_tokens=4)
    assert foreign.settings['dtype'] == 'bfloat16' and foreign(rows(1))[0].kind == 'answer'
    assert open_model(folder, 'cpu', torch.float16).cache_dtype == torch.float16


def test_devices_are_refused_first(folder, llava, monkeypatch):
    "Nothing is loaded for a device or a number format that does not exist."

    def fail(*args, **more):
        raise AssertionError('weights were loaded')

    monkeypatch.setattr(ClearModel, 'from_pretrained', fail)
    for loader in (AutoConfig, AutoProcessor, AutoModelForImageTextToText):
        monkeypatch.setattr(loader, 'from_pretrained', fail)
    for wrong in (dict(device='foo'), dict(device='cuda:99'), dict(dtype='fp4')):
        for kind, place in (('clear', folder), ('hf', llava)):
            with pytest.raises(ValueError, match='there is no device|dtype must be one of'):
                open_adapter(f'{kind}:{place}', **wrong)


# ---------------------------------------------------------------- questions with control tokens


def test_control_tokens_in_a_question(folder):
    "A question cannot end its own text or begin a picture."
    model = open_model(folder, 'cpu')
    cfg = model.cfg
    control = {cfg.bos, cfg.eos, cfg.soi, cfg.eoi}
    texts = model.tokenizer.convert_ids_to_tokens(sorted(control))
    _, words = context_words(model, f'what is {" and ".join(texts)}?')
    assert not control & {*words.ids}
    plain = context_words(model, 'what is it?')[1].ids
    assert model.tokenizer.decode(plain).startswith('what is it?')


# ---------------------------------------------------------------- answer on the command line


def command(folder, photo, *more):
    "Write the command that asks a small model."
    quick = ['--steps', '3', '--device', 'cpu']
    asked = ['--image', str(photo), '--question', 'what?', '--model', str(folder)]
    return ['answer', *asked, *quick, *more]


@pytest.fixture
def photo(tmp_path):
    Image.new('RGB', (32, 32), (200, 10, 10)).save(tmp_path / 'photo.png')
    return tmp_path / 'photo.png'


def test_a_full_disk_keeps_the_old_picture(tmp_path, monkeypatch):
    "The restored picture is complete or not there; what stood there stays."
    out = tmp_path / 'restored.png'
    out.write_bytes(b'the old picture')

    def half(self, place):
        Path(place).write_bytes(b'half')
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(Image.Image, 'save', half)
    with pytest.raises(OSError, match='the disk is full'):
        save_images([Image.new('RGB', (8, 8))], out)
    assert out.read_bytes() == b'the old picture' and [*tmp_path.iterdir()] == [out]


@pytest.mark.parametrize(
    'more, sentence',
    [
        (['--out', '.png'], 'unknown kind of image'),
        (['--out', 'folder.png'], 'it is a folder'),
        (['--model', 'nowhere'], 'no checkpoint at nowhere'),
        (['--image', 'nowhere.png'], 'no image file at nowhere.png'),
        (['--image', '.'], 'no image file at .'),
        (['--device', 'tpu'], "there is no device 'tpu'"),
        (['--question', ' '], 'question is empty'),
        (['--steps', '0'], 'steps must be at least 2, got 0'),
    ],
)
def test_refusals_of_answer(folder, photo, tmp_path, monkeypatch, capsys, more, sentence):
    "One sentence, status 2, nothing on standard output."
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'folder.png').mkdir()
    assert main(command(folder, photo, *more)) == 2
    out, err = capsys.readouterr()
    assert sentence in err and not out and len(err.splitlines()) == 1


def test_answer_in_another_format(folder, photo, capsys):
    "--dtype is passed on; an unknown one is refused by the parser."
    assert main(command(folder, photo, '--dtype', 'bfloat16', '--policy', 'never')) == 0
    with pytest.raises(SystemExit) as e:
        main(command(folder, photo, '--dtype', 'int8'))
    assert e.value.code == 2 and 'bfloat16' in capsys.readouterr().err


def test_requests_are_checked_without_pytorch(folder, photo):
    "A whole request passes; the modules themselves import nothing heavy."
    assert check_request(photo, folder, 'cuda:3', 'float16') is None
    code = (
        'import sys, clear_nb.answer, clear_nb.adapters\n'
        'found = {"torch", "transformers", "openai", "pandas", "diffusers"} & {*sys.modules}\n'
        'assert not found, found'
    )
    environment = os.environ | dict(PYTHONPATH=str(ROOT))
    assert subprocess.run([sys.executable, '-c', code], env=environment).returncode == 0
