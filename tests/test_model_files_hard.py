"""Damaged, absurd and foreign checkpoint folders: one sentence each, at once, before memory is
taken.
"""

import json
import time

import pytest
import tiny_hf
import torch
from safetensors.torch import load_file, save_file
from test_model import byte_tokenizer, tiny_model
from transformers import AutoModelForImageTextToText

from clear_nb.adapters import HFAdapter
from clear_nb.model import ClearModel, export_bagel

BOMB = '[' * 100_000


@pytest.fixture(scope='module')
def ours():
    return tiny_model('hard', tokenizer=byte_tokenizer())


@pytest.fixture
def folder(ours, tmp_path):
    return ours.save_pretrained(tmp_path / 'own')


@pytest.fixture
def published(ours, tmp_path):
    return export_bagel(ours, tmp_path / 'bagel')


def numbers(name='config.json', part='', **values):
    "Change numbers of a JSON file, of the whole or of one part; `...` takes a key away."

    def change(folder):
        whole = json.loads((folder / name).read_text(encoding='utf-8'))
        place = whole[part] if part else whole
        for key, value in values.items():
            place[key] = value
            if value is ...:
                del place[key]
        (folder / name).write_text(json.dumps(whole), encoding='utf-8')

    return change


def text(name, content):
    "Replace a file."
    return lambda folder: (folder / name).write_text(content, encoding='utf-8')


def tensors(name, change):
    "Change the tensors of a file."

    def rewrite(folder):
        state = load_file(folder / name)
        change(state)
        save_file(state, folder / name, metadata=dict(format='pt'))

    return rewrite


def poison(value, key='lm_head'):
    "Put a value into one tensor."

    def change(state):
        name = next(k for k in sorted(state) if key in k)
        state[name].view(-1)[-1] = value

    return change


def recast(dtype, key='lm_head'):
    "Give one tensor another number format."

    def change(state):
        name = next(k for k in sorted(state) if key in k)
        state[name] = state[name].to(dtype)

    return change


HEAD = 'language_model.lm_head.weight'
OWN = {
    # weights
    'nan': (tensors('model.safetensors', poison(float('nan'))), f'NaN or infinity.*{HEAD}'),
    'infinity': (tensors('model.safetensors', poison(-torch.inf)), f'NaN or infinity.*{HEAD}'),
    'nan in the vae': (
        tensors('ae.safetensors', poison(float('nan'), 'conv_in')),
        'ae.safetensors: 1 of .* NaN or infinity',
    ),
    'int64': (tensors('model.safetensors', recast(torch.int64)), f'{HEAD} holds I64'),
    'bool': (tensors('model.safetensors', recast(torch.bool)), f'{HEAD} holds BOOL'),
    'uint8 vae': (
        tensors('ae.safetensors', recast(torch.uint8, 'conv_in')),
        r'ae.safetensors: \S+ holds U8',
    ),
    'float8': (
        tensors('model.safetensors', recast(torch.float8_e4m3fn)),
        f'{HEAD} holds F8_E4M3',
    ),
    'too large for the format': (
        tensors('model.safetensors', lambda s: s.update({HEAD: s[HEAD].double() * 1e300})),
        'NaN or infinity',
    ),
    'weights are a folder': (
        lambda d: (d / 'model.safetensors').unlink() or (d / 'model.safetensors').mkdir(),
        'has no model.safetensors',
    ),
    # config.json
    'null': (text('config.json', 'null'), 'config.json has another form'),
    'list': (text('config.json', '[]'), 'config.json has another form'),
    'deep': (text('config.json', BOMB), 'config.json is damaged'),
    'long number': (text('config.json', '{"bos": ' + '9' * 5000 + '}'), 'config.json is damaged'),
    'no text': (lambda d: (d / 'config.json').write_bytes(b'\xff\xfe\x00'), 'is damaged'),
    'a folder': (
        lambda d: (d / 'config.json').unlink() or (d / 'config.json').mkdir(),
        'config.json',
    ),
    'null part': (numbers(vit=None), 'config.json: VitConfig is made from names'),
    'text as part': (numbers(llm='qwen'), 'config.json: ClearConfig.llm must be dict'),
    'null number': (numbers(latent_side=None), 'latent_side must be int, got None'),
    'text as number': (numbers(part='vit', hidden='16'), "VitConfig.hidden must be int, got '16'"),
    'negative': (numbers(part='vae', z=-4), 'VaeConfig.z must be at least 1 and at most'),
    'zero groups': (numbers(part='vae', groups=0), 'VaeConfig.groups must be at least 1'),
    'fraction': (numbers(part='llm', vocab_size=265.5), r'llm.vocab_size must be int, got 265.5'),
    'nan number': (numbers(table_base=float('nan')), 'table_base must be float, got nan'),
    'million layers': (numbers(part='llm', num_hidden_layers=10**6), 'num_hidden_layers must be'),
    'million vit layers': (numbers(part='vit', layers=10**6), 'VitConfig.layers must be'),
    'million blocks': (numbers(part='vae', blocks=10**6), 'VaeConfig.blocks must be'),
    'wide': (numbers(part='llm', hidden_size=2**24), 'does not fit the configuration'),
    'huge vocabulary': (numbers(part='llm', vocab_size=2**24), 'does not fit the configuration'),
    'huge table': (numbers(latent_side=2**40), 'latent_side must be at least 1 and at most 1024'),
    'large tables': (numbers(part='vit', side=1024), 'position_embedding'),
    'odd heads': (numbers(part='llm', num_attention_heads=7), 'must be a multiple of 4'),
    'no heads': (numbers(part='llm', num_key_value_heads=0), 'num_key_value_heads must be'),
    'lost number': (numbers(part='llm', num_key_value_heads=...), 'lacks num_key_value_heads'),
    'misspelt': (numbers(part='llm', hiden_size=32), "'hiden_size', did you mean 'hidden_size'"),
    'activation': (numbers(connector_act='gelux'), "no activation 'gelux', did you mean 'gelu'"),
    'vit activation': (numbers(part='vit', act='jump'), "vit.act: there is no activation 'jump'"),
    'llm activation': (numbers(part='llm', hidden_act=None), 'llm.hidden_act must be str'),
    'act is a list': (numbers(connector_act=['gelu']), 'connector_act must be str'),
    'end token': (numbers(eos=10**6), 'go up to 1000000, the vocabulary has'),
    'negative token': (numbers(bos=-1), 'bos must be at least 0'),
    'two numbers': (numbers(vae_rule=[64, 64]), 'vae_rule has three numbers'),
    'rule of texts': (numbers(vit_rule=['a', 'b', 'c']), 'vit_rule must be int'),
    'prompt': (numbers(think_prompt=None), 'think_prompt must be str'),
    # tokenizer.json
    'empty tokenizer': (text('tokenizer.json', '{}'), 'tokenizer.json describes no tokenizer'),
    'list tokenizer': (text('tokenizer.json', '[]'), 'tokenizer.json has another form'),
    'deep tokenizer': (text('tokenizer.json', BOMB), 'tokenizer.json is damaged'),
    'null model': (text('tokenizer.json', '{"model": null}'), 'describes no tokenizer'),
    'other model': (numbers('tokenizer.json', model={'type': 'own'}), 'describes no tokenizer'),
    'no words': (
        numbers('tokenizer.json', part='model', vocab={}, merges=[]),
        'tokenizer.json describes',
    ),
    'ids without rows': (
        numbers('tokenizer.json', part='model', vocab={'a': 10**6}),
        'describes|has 1000001 ids',
    ),
}


def refused(open_folder, sentence, seconds=2.0):
    "Check that a folder is refused with one sentence, within some CPU seconds."
    start = time.process_time()
    with pytest.raises((ValueError, OSError), match=sentence) as e:
        open_folder()
    assert time.process_time() - start < 3 * seconds
    assert '\n' not in str(e.value) and len(str(e.value)) < 20_000


@pytest.mark.parametrize('case', OWN)
def test_own_folders(folder, case):
    "Every damaged folder of ours is refused by name."
    change, sentence = OWN[case]
    change(folder)
    refused(lambda: ClearModel.from_pretrained(folder), sentence)


LLM, VIT = 'llm_config.json', 'vit_config.json'
PUBLISHED = {
    'nan': (tensors('ema.safetensors', poison(float('nan'))), 'ema.safetensors: 1 of .* NaN'),
    'int': (tensors('ema.safetensors', recast(torch.int32)), 'lm_head.weight holds I32'),
    'layers': (numbers(LLM, num_hidden_layers=10**6), f'{LLM}.num_hidden_layers must be'),
    'text': (numbers(LLM, rope_theta='1e6'), f"{LLM}.rope_theta must be float, got '1e6'"),
    'negative': (numbers(LLM, rope_theta=-1.0), f'{LLM}.rope_theta must be more than 0'),
    'activation': (numbers(LLM, hidden_act='siluu'), "no activation 'siluu', did you mean 'silu'"),
    'vit text': (numbers(VIT, patch_size='8'), f"{VIT}: patch_size must be int, got '8'"),
    'vit zero': (numbers(VIT, patch_size=0), f'{VIT}: patch_size must be at least 1'),
    'vit layers': (numbers(VIT, num_hidden_layers=10**6), 'num_hidden_layers must be'),
    'vit list': (text(VIT, '[1]'), f'{VIT} has another form'),
    'own numbers': (text('clear_config.json', '{"latent_side": "x"}'), 'latent_side must be int'),
    'own list': (text('clear_config.json', '[]'), 'clear_config.json has another form'),
    'tokenizer': (text('tokenizer.json', '{"model": 3}'), 'tokenizer.json describes no tokenizer'),
}


@pytest.mark.parametrize('case', PUBLISHED)
def test_published_folders(published, case):
    "The same for the layout of BAGEL and CLEAR."
    change, sentence = PUBLISHED[case]
    change(published)
    refused(lambda: ClearModel.from_pretrained(published, dtype=torch.float32), sentence)


def test_a_whole_folder_opens(folder, published, ours):
    "The checks change nothing in a whole folder; a stored format that is narrower is converted."
    for place in (folder, published):
        opened = ClearModel.from_pretrained(place, dtype=torch.float32)
        for a, b in zip(ours.state_dict().values(), opened.state_dict().values(), strict=True):
            assert torch.equal(a, b)
    half = ours.save_pretrained(folder.parent / 'half', torch.float16)
    assert ClearModel.from_pretrained(half).cache_dtype == torch.float32


# ---------------------------------------------------------------- Hugging Face folders


@pytest.fixture(scope='module')
def llava(tmp_path_factory):
    return tiny_hf.llava(tmp_path_factory.mktemp('hf') / 'm')


PREPARE, PROCESSOR = 'preprocessor_config.json', 'processor_config.json'
FOREIGN = {
    'null': (text('config.json', 'null'), 'cannot open'),
    'list': (text('config.json', '[]'), 'cannot open'),
    'deep': (text('config.json', BOMB), 'cannot open'),
    'null part': (numbers(text_config=3), 'cannot open'),
    'million layers': (
        numbers(part='text_config', num_hidden_layers=10**6),
        'num_hidden_layers is 1000000, and no model has more than 1000',
    ),
    'activation': (numbers(part='text_config', hidden_act='jump'), 'cannot open'),
    'no heads': (numbers(part='text_config', num_attention_heads=0), 'cannot open'),
    'text as number': (numbers(part='text_config', hidden_size='x'), 'cannot open'),
    'tokenizer list': (text('tokenizer.json', '[]'), 'cannot open'),
    'tokenizer shape': (text('tokenizer.json', '{"model": 3}'), 'cannot open'),
    'tokenizer cut': (text('tokenizer.json', '{"model": {'), 'cannot open'),
    'nan': (tensors('model.safetensors', poison(float('nan'), 'q_proj')), 'NaN or infinity'),
    'infinity': (tensors('model.safetensors', poison(torch.inf, 'q_proj')), 'NaN or infinity'),
}
OF_PICTURES = {'list': '[]', 'null': 'null', 'cut': '{', 'deep': BOMB, 'text': '{"size": "wide"}'}


def copied(source, target):
    "Copy a folder of files."
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


@pytest.mark.parametrize('case', FOREIGN)
def test_foreign_folders(llava, tmp_path, case):
    "A folder for transformers is refused with one sentence, whatever transformers raises."
    place = copied(llava, tmp_path / 'm')
    change, sentence = FOREIGN[case]
    change(place)
    refused(lambda: HFAdapter(place, device='cpu'), sentence)


@pytest.mark.parametrize('case', OF_PICTURES)
def test_foreign_processors(llava, tmp_path, case):
    "The file that says how pictures are prepared is of another shape."
    place = copied(llava, tmp_path / 'm')
    name = PREPARE if (place / PREPARE).exists() else PROCESSOR
    (place / name).write_text(OF_PICTURES[case], encoding='utf-8')
    refused(lambda: HFAdapter(place, device='cpu'), 'cannot open|has no processor|cannot be used')


def test_half_open_weights_are_checked(llava, monkeypatch):
    "The numbers are looked at after they are loaded, in the format that was asked for."
    load = AutoModelForImageTextToText.from_pretrained

    def poisoned(*args, **more):
        model, loading = load(*args, **more)
        model.lm_head.weight.data[0, 0] = float('nan')
        return model, loading

    monkeypatch.setattr(AutoModelForImageTextToText, 'from_pretrained', poisoned)
    refused(lambda: HFAdapter(llava, device='cpu', dtype='bfloat16'), 'hold NaN or infinity')
