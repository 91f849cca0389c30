"""Opening and writing checkpoints: layouts, shards, bad input, memory, number formats."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_model import byte_tokenizer, outputs, story, tiny_model
from transformers import Qwen2Tokenizer

from clear_nb.core import ROOT, torch_rng
from clear_nb.decode import prefill
from clear_nb.model import (
    ClearConfig,
    ClearModel,
    export_bagel,
    materialise,
    meta_model,
    tensor_headers,
    weight_files,
)
from clear_nb.mot import KVCache
from clear_nb.restore import restore
from clear_nb.trajectory import LatentSegment, TextSegment, VitSegment, pack
from clear_nb.vae import VaeConfig, patchify, unpatchify
from clear_nb.vit import VitConfig

GOLDEN = Path(__file__).parent / 'golden' / 'bagel'


@pytest.fixture
def model():
    return tiny_model(5, tokenizer=byte_tokenizer())


@pytest.fixture
def folder(model, tmp_path):
    return export_bagel(model, tmp_path / 'bagel')


def open32(path, **kw):
    return ClearModel.from_pretrained(path, dtype=torch.float32, **kw)


def rewrite(folder, name, change):
    "Change the tensors of a file."
    state = load_file(folder / name)
    change(state)
    save_file(state, folder / name)


def same(a, b):
    "Every parameter and every output is bitwise equal."
    assert all(
        torch.equal(x, y)
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )
    assert all(torch.equal(x, y) for x, y in zip(outputs(a, [story()]), outputs(b, [story()])))


# ---------------------------------------------------------------- layouts


@pytest.mark.parametrize('size', ['5GB', '60KB'])
def test_round_trip(model, tmp_path, size):
    "Whole and sharded: all names, all bits, all outputs."
    folder = export_bagel(model, tmp_path / 'x', size)
    found, vae = (
        tensor_headers(weight_files(folder, 'ema')),
        tensor_headers(weight_files(folder, 'ae')),
    )
    assert (
        set(found) == {k for k in model.state_dict() if not k.startswith('vae.')}
        and 'decoder.up.1.block.0.conv1.weight' in vae
    )
    assert (folder / 'ema.safetensors').exists() == (size == '5GB') and len(
        set(s.file for s in found.values())
    ) > 3 * (size != '5GB')
    same(open32(folder), model)
    again = export_bagel(open32(folder), tmp_path / 'y', size)
    for f in folder.glob('*.safetensors'):
        assert f.read_bytes() == (again / f.name).read_bytes()


def test_bf16_round_trip(model, tmp_path):
    "In the format of the release, out and in again."
    half = ClearModel.from_pretrained(export_bagel(model, tmp_path / 'x', dtype=torch.bfloat16))
    assert {v.dtype for k, v in half.state_dict().items() if not k.startswith('vae.')} == {
        torch.bfloat16
    }
    assert {v.dtype for k, v in half.vae.state_dict().items()} == {torch.float32}
    same(half, ClearModel.from_pretrained(export_bagel(half, tmp_path / 'y', '60KB')))


@pytest.mark.parametrize('name', ['ema.safetensors', 'model.safetensors', 'weights-1.safetensors'])
def test_names_of_the_weights(folder, model, name):
    "Averaged weights, raw weights, or whatever an index names."
    os.rename(folder / 'ema.safetensors', folder / name)
    names = load_file(folder / name)
    if name.startswith('w'):
        (folder / 'model.safetensors.index.json').write_text(
            json.dumps(dict(weight_map={k: name for k in names}))
        )
    same(open32(folder), model)


def test_averaged_weights_come_first(folder, model):
    "A training checkpoint holds both; the averaged ones are used."
    save_file({'x': torch.ones(1)}, folder / 'model.safetensors')
    same(open32(folder), model)


def test_tables(folder, model):
    "Absent or of another size: computed. Present and rounded: fine. Present and wrong: refused."
    key = 'latent_pos_embed.pos_embed'
    rewrite(folder, 'ema.safetensors', lambda s: s.update({key: s[key].bfloat16()}))
    same(open32(folder), model)
    rewrite(folder, 'ema.safetensors', lambda s: s.update({key: torch.zeros(64, 32)}))
    same(open32(folder), model)
    rewrite(
        folder, 'ema.safetensors', lambda s: [s.pop(k) for k in (key, 'vit_pos_embed.pos_embed')]
    )
    same(open32(folder), model)
    rewrite(folder, 'ema.safetensors', lambda s: s.update({key: -model.state_dict()[key]}))
    with pytest.raises(ValueError, match='latent_pos_embed.pos_embed is 2 off the fixed'):
        open32(folder)


def test_logits_stop_at_the_tokenizer(folder, model, tmp_path):
    "Rows without a token are not scored, as in CLEAR's generate; the rows stay in the file."
    n = len(model.tokenizer)
    assert n < 272 and open32(folder).language_model.lm_head.ids == 272  # clear_config.json says so
    (folder / 'clear_config.json').unlink()
    cut = open32(folder, vae=model.cfg.vae, latent_patch=4, latent_side=4)
    assert cut.cfg.text_ids == n and cut.language_model.lm_head.weight.shape == (272, 32)
    a, b = outputs(model, [story()])[0], outputs(cut, [story()])[0]
    assert b.shape[1] == n and torch.equal(a[:, :n], b)
    assert ClearModel.from_pretrained(cut.save_pretrained(tmp_path / 'own')).cfg.text_ids == n


def test_slow_tokenizer_files(folder, model):
    "vocab.json, merges.txt and tokenizer_config.json instead of tokenizer.json."
    (folder / 'tokenizer.json').unlink()
    tok = open32(folder).tokenizer
    assert isinstance(tok, Qwen2Tokenizer)
    text = '<|im_start|>what, is <answer> a , b?'
    assert tok.encode(text) == model.tokenizer.encode(text) and tok.decode(tok.encode(text)) == text


def test_no_code_from_the_folder(folder, model):
    "auto_map and Python files in a folder are left alone."
    (folder / 'evil.py').write_text('raise SystemExit("ran")')
    for n in ('llm_config', 'tokenizer_config'):
        (folder / f'{n}.json').write_text(
            json.dumps(
                {
                    **json.loads((folder / f'{n}.json').read_text()),
                    'auto_map': {'AutoTokenizer': ['evil.T', None]},
                }
            )
        )
    same(open32(folder), model)
    (folder / 'tokenizer.json').unlink()
    same(open32(folder), model)
    assert not any(
        re.search(r'trust_remote_code\s*=\s*(?!False\b)', p.read_text())
        for p in (ROOT / 'clear_nb').glob('*.py')
    )


# ---------------------------------------------------------------- bad input


def config(folder, name, **values):
    "Change numbers of a JSON file."
    (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **values}))


def truncate(f):
    f.write_bytes(f.read_bytes()[:-1])


def pickled(d):
    "Weights as a pickle that would leave a trace."
    (d / 'ema.safetensors').unlink()
    (d / 'pytorch_model.bin').write_bytes(b'cbuiltins\nexec\n(S\'open("ran", "w")\'\ntR.')


CASES = {
    'truncated': (
        lambda d: truncate(d / 'ema.safetensors'),
        'ema.safetensors is damaged or cut short .*download it again',
    ),
    'truncated vae': (lambda d: truncate(d / 'ae.safetensors'), 'ae.safetensors is damaged'),
    'empty': (lambda d: (d / 'ema.safetensors').write_bytes(b''), 'ema.safetensors is damaged'),
    'noise': (
        lambda d: (d / 'ema.safetensors').write_bytes(bytes(range(256)) * 9),
        'ema.safetensors is damaged',
    ),
    'pickle': (
        pickled,
        'only pytorch_model.bin: pickles can run code and are never opened; convert',
    ),
    'layers': (
        lambda d: config(d, 'llm_config.json', num_hidden_layers=3),
        r'the file has 2 decoder layers, the configuration says 3; missing language_model',
    ),
    'width': (
        lambda d: config(d, 'llm_config.json', intermediate_size=64),
        r'mlp.gate_proj.weight is \(48, 32\), the model wants \(64, 32\)',
    ),
    'vit': (
        lambda d: config(d, 'vit_config.json', num_hidden_layers=3),
        'missing vit_model.vision_model.encoder.layers.1',
    ),
    'rope': (
        lambda d: config(d, 'llm_config.json', rope_scaling=dict(type='yarn')),
        'sets rope_scaling, which this decoder does not have',
    ),
    'field': (
        lambda d: config(d, 'llm_config.json', rope_theta=None),
        'llm_config.json lacks rope_theta; download',
    ),
    'json': (
        lambda d: (d / 'vit_config.json').write_text('{'),
        'vit_config.json is damaged',
    ),
    'tokenizer': (
        lambda d: (d / 'tokenizer.json').unlink() or (d / 'vocab.json').unlink(),
        'tokenizer.json missing; download',
    ),
    'merges': (
        lambda d: (d / 'tokenizer.json').unlink() or (d / 'merges.txt').unlink(),
        'has no tokenizer: download tokenizer.json there, or vocab.json, merges.txt',
    ),
    'tokenizer json': (
        lambda d: (d / 'tokenizer.json').write_text('{}'),
        'tokenizer.json describes no tokenizer',
    ),
    'other tokenizer': (
        lambda d: config(d, 'llm_config.json', vocab_size=100),
        'tokenizer in .* has 265 ids, llm_config.json says 100',
    ),
    'vae': (lambda d: (d / 'ae.safetensors').unlink(), 'ae.safetensors missing; download'),
}


@pytest.mark.parametrize('case', CASES)
def test_bad_folders(folder, case, monkeypatch, tmp_path):
    """One sentence that says what, where and how to mend; no memory is taken for a model that
    cannot be filled.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('clear_nb.model.materialise', lambda *a: pytest.fail('memory was taken'))
    CASES[case][0](folder)
    with pytest.raises((ValueError, FileNotFoundError), match=CASES[case][1]) as e:
        open32(folder)
    assert (
        str(folder) in str(e.value) and '\n' not in str(e.value) and not (tmp_path / 'ran').exists()
    )


def test_all_faults_in_one_error(folder):
    "Weights, VAE and a table at once."

    def spoil(s):
        s.pop('llm2vae.bias')
        s.update(
            {
                'surplus': torch.ones(1),
                'vae2llm.bias': torch.ones(7),
                'vit_pos_embed.pos_embed': torch.ones(16, 32),
            }
        )

    rewrite(folder, 'ema.safetensors', spoil)
    rewrite(folder, 'ae.safetensors', lambda s: s.pop('encoder.conv_in.bias'))
    with pytest.raises(ValueError, match='5 faults') as e:
        open32(folder)
    for said in (
        'missing llm2vae.bias',
        'unexpected surplus',
        'vae2llm.bias is (7,)',
        'vit_pos_embed.pos_embed is ',
        'ae.safetensors: missing encoder.conv_in.bias',
    ):
        assert said in str(e.value)


def test_shards(model, tmp_path):
    "A missing shard, a shard twice, an index that leaves the folder."
    folder = export_bagel(model, tmp_path / 'x', '60KB')
    first, index = sorted(folder.glob('ema-*'))[0], folder / 'ema.safetensors.index.json'
    data, text = first.read_bytes(), index.read_text()
    first.unlink()
    with pytest.raises(
        FileNotFoundError, match=f'{first.name}, missing in .*download the missing shards'
    ):
        open32(folder)
    first.write_bytes(data)
    (folder / 'twice.safetensors').write_bytes(data)
    index.write_text(
        text.replace('"weight_map": {', '"weight_map": {"more": "twice.safetensors", ')
    )
    with pytest.raises(ValueError, match='lies both in .* keep one'):
        open32(folder)
    index.write_text(json.dumps(dict(weight_map=dict(a='../secret.safetensors'))))
    with pytest.raises(ValueError, match='no file beside it'):
        open32(folder)
    index.write_text('{}')
    with pytest.raises(ValueError, match='has no weight_map'):
        open32(folder)


def test_a_lonely_file(tmp_path):
    "A file instead of a folder, and a folder with a pickle only."
    (tmp_path / 'pytorch_model.bin').write_bytes(b'x')
    with pytest.raises(ValueError, match='is a file; pass the folder'):
        ClearModel.from_pretrained(tmp_path / 'pytorch_model.bin')
    with pytest.raises(ValueError, match='never opened'):
        ClearModel.from_pretrained(tmp_path)


def test_own_format_is_checked_too(model, tmp_path):
    "Our folders say the same."
    folder = model.save_pretrained(tmp_path / 'm')
    truncate(folder / 'model.safetensors')
    with pytest.raises(ValueError, match='model.safetensors is damaged'):
        ClearModel.from_pretrained(folder)
    (folder / 'model.safetensors').unlink()
    with pytest.raises(FileNotFoundError, match='has no model.safetensors; download'):
        ClearModel.from_pretrained(folder)
    (folder / 'model.bin').write_bytes(b'x')
    with pytest.raises(ValueError, match='never opened'):
        ClearModel.from_pretrained(folder)


def test_export_needs_a_tokenizer(tmp_path):
    with pytest.raises(ValueError, match='has no tokenizer'):
        export_bagel(tiny_model(5), tmp_path / 'x')
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- bf16


@pytest.fixture(scope='module')
def halves(tmp_path_factory):
    "The golden weights opened in bf16 and in fp32."
    from test_model_golden import read

    c, folder = read('config'), tmp_path_factory.mktemp('golden')
    v, a, s = c['vit_config'], c['vae_config'], c['special_tokens']
    cfg = ClearConfig(
        {
            k: x
            for k, x in c['llm_config'].items()
            if k
            in (
                'vocab_size',
                'hidden_size',
                'intermediate_size',
                'num_hidden_layers',
                'num_attention_heads',
                'num_key_value_heads',
                'max_position_embeddings',
                'rms_norm_eps',
                'rope_theta',
            )
        },
        VitConfig(
            v['hidden_size'],
            v['num_hidden_layers'],
            v['num_attention_heads'],
            v['intermediate_size'],
            v['patch_size'],
            v['image_size'] // v['patch_size'],
        ),
        VaeConfig(
            ch=a['ch'], ch_mult=tuple(a['ch_mult']), blocks=a['num_res_blocks'], z=a['z_channels']
        ),
        latent_side=8,
        bos=s['bos_token_id'],
        eos=s['eos_token_id'],
        soi=s['start_of_image'],
        eoi=s['end_of_image'],
    )
    model = materialise(meta_model(cfg))
    model.load_state_dict(
        {k: x for k, x in load_file(GOLDEN / 'model.safetensors').items()}, strict=False
    )
    from clear_nb.vae import flux_to_diffusers

    model.vae.net.load_state_dict(flux_to_diffusers(load_file(GOLDEN / 'ae.safetensors')))
    model.save_pretrained(folder / 'm')
    return ClearModel.from_pretrained(
        folder / 'm', dtype=torch.bfloat16
    ), ClearModel.from_pretrained(folder / 'm')


def official_context(model, x, out):
    "The golden inference context: text, VAE image, ViT image, text."
    from test_model_golden import find_ids

    mean, logvar = model.vae.moments(x['vae_image'][None])
    z = model.vae.to_latent(mean, logvar, x['vae_sample_noise'])[0]
    texts = [
        find_ids(model, out['after_text0.value.0']),
        find_ids(model, out['after_text1.value.0'][28:]),
    ]
    return [
        TextSegment(texts[0]),
        LatentSegment(z),
        VitSegment(x['vit_image']),
        TextSegment(texts[1]),
    ]


@torch.no_grad()
def test_bf16_follows_the_official_code(halves):
    """Keys, logits and the restored latent in bf16 are as close to the official fp32 run as the
    official bf16 run is; its greedy tokens are ours up to that distance.
    """
    half, full = halves
    meta, x, out = (
        json.loads((GOLDEN / 'infer_meta.json').read_text()),
        load_file(GOLDEN / 'infer_inputs.safetensors'),
        load_file(GOLDEN / 'infer_outputs.safetensors'),
    )
    bound = {
        k: v['max_abs_diff']
        for k, v in json.loads((GOLDEN / 'bf16_vs_fp32.json').read_text()).items()
        if k != 'greedy_tokens'
    }
    segments = official_context(full, x, out)
    caches = []
    for _ in range(2):
        caches.append(KVCache(half.mot.cfg, 1, 128, dtype=half.cache_dtype))
        for s in segments:
            prefill(half, caches[-1], [[s]])
    gap = {
        'after_text1.key.1': caches[0].k[1][0, :, :33].transpose(0, 1).float()
        - out['after_text1.key.1']
    }
    p = pack([[TextSegment(tuple(meta['greedy_tokens'][1:]))]], half.shape, rope0=caches[0].rope)
    logits = half.logits(half(p, caches[0]), p.text_at[:8])
    gap['greedy_logits'] = logits - out['greedy_logits']
    h, w = (n // 2 for n in meta['image_shape_hw'])
    z = restore(
        half,
        caches[1],
        unpatchify(x['packed_init_noises'], h // 2, w // 2, 2)[None],
        steps=4,
        shift=3.0,
    )[0].latent
    gap['image.plain.latent'] = patchify(z, 2) - out['image.plain.latent']
    gap = {k: float(v.abs().max()) for k, v in gap.items()}
    assert all(0 < gap[k] <= bound[k] for k in bound)
    chosen = logits.gather(1, torch.tensor(meta['greedy_argmax_per_step'])[:, None])[:, 0]
    assert (logits.amax(1) - chosen).max() <= bound[
        'greedy_logits'
    ]  # the smallest margin of this run is 0.016


def test_norms_and_rope_compute_in_fp32(halves):
    """Weights in bf16, arithmetic in fp32: one rounding at the end, and angular speeds never
    rounded.
    """
    half, full = halves
    assert all(
        torch.equal(a, b) and a.dtype == torch.float32
        for a, b in zip(half.buffers(), full.buffers(), strict=True)
    )
    x = torch.randn(50, 64, generator=torch_rng('norm')).bfloat16() * 30
    norm, w = half.mot.layers[0].input_layernorm, half.mot.layers[0].input_layernorm.weight
    y = x.float()
    exact = (y * torch.rsqrt((y * y).mean(-1, keepdim=True) + norm.eps)).bfloat16() * w
    assert w.dtype == torch.bfloat16 and torch.equal(norm(x), exact)


# ---------------------------------------------------------------- a larger look-alike

CHILD = """
import sys, threading, torch
from clear_nb.model import ClearModel
def anon():  # a memory map does not count
    lines = open('/proc/self/status')
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith('RssAnon'))
def watch():
    while not done.wait(.0005): peak[0] = max(peak[0], anon())
for folder in sys.argv[1:]:
    start, peak, done = anon(), [0], threading.Event()
    thread = threading.Thread(target=watch); thread.start()
    model = ClearModel.from_pretrained(folder, dtype=torch.bfloat16)
    done.set(); thread.join()
    print(peak[0] - start, anon() - start, sum(p.numel()*p.element_size() for p in model.state_dict().values()))
    del model
"""


def watched(*folders):
    """Peak of anonymous memory while each folder is opened in a fresh process, memory
    afterwards, size of the model; all in bytes.
    """
    env = dict(
        os.environ, PYTHONPATH=str(ROOT), MALLOC_MMAP_THRESHOLD_='1000000'
    )  # freed tensors go back to the system, so none is reused unseen
    done = subprocess.run(
        [sys.executable, '-c', CHILD, *map(str, folders)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=env,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [tuple(map(int, line.split())) for line in done.stdout.splitlines()]


def lookalike(tokenizer):
    "About 300 million random parameters in bf16 under the official names."
    llm = dict(
        vocab_size=65536,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
    )
    cfg = ClearConfig(
        llm,
        VitConfig(192, 2, 4, 384, side=16),
        VaeConfig(ch=32, ch_mult=(1, 2), blocks=1),
        latent_side=16,
        bos=0,
        eos=1,
        soi=2,
        eoi=3,
    )
    model, g = materialise(meta_model(cfg, tokenizer, torch.bfloat16)), torch_rng('lookalike')
    pool = torch.randn(2**22, generator=g).mul_(0.02)
    for i, (k, v) in enumerate(model.state_dict().items()):
        if not k.endswith('pos_embed'):
            v.copy_(
                pool.roll(7919 * i).repeat(-(-v.numel() // len(pool)))[: v.numel()].view(v.shape)
                + ('norm' in k)
            )
    return model.eval().requires_grad_(False)


@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='needs Linux to measure memory')
def test_lookalike(tmp_path, capsys):
    """300 M parameters, whole and in shards: equal logits and velocities, and little memory
    beside the model.
    """
    model = lookalike(byte_tokenizer())
    n, largest = (
        sum(p.numel() for p in model.parameters()),
        max(p.numel() * p.element_size() for p in model.parameters()),
    )
    g = torch_rng('lookalike input')
    p = pack(
        [
            [
                LatentSegment(torch.randn(16, 8, 8, generator=g)),
                VitSegment(torch.randn(3, 56, 56, generator=g)),
                TextSegment((20, 21, 22), loss=True),
                LatentSegment(torch.randn(16, 8, 8, generator=g), 0.5),
            ]
        ],
        model.shape,
    )
    with torch.no_grad():
        h = model(p)
        want = model.logits(h, p.ce_at), model.velocity(h)
        folders = [
            export_bagel(model, tmp_path / name, size)
            for name, size in dict(whole='5GB', shards='200MB').items()
        ]
        for folder in folders:
            back = ClearModel.from_pretrained(folder)
            h = back(p)
            assert (
                torch.equal(back.logits(h, p.ce_at), want[0])
                and torch.equal(back.velocity(h), want[1])
                and want[0].std() > 0
            )
    del model, back, h
    for folder, (peak, kept, own) in zip(folders, watched(*folders)):
        files, (peak_mb, own_mb, largest_mb) = (
            len(weight_files(folder, 'ema')),
            (round(x / 2**20) for x in (peak, own, largest)),
        )
        with capsys.disabled():
            print(
                f'\n{folder.name}: {n / 1e6:.0f} M parameters in {files} files, '
                f'model {own_mb} MiB, largest tensor {largest_mb} MiB, peak {peak_mb} MiB'
            )
        assert 2.5e8 < n < 3.5e8 and files == (1 if folder.name == 'whole' else 3)
        assert kept > 0.95 * own and peak - own <= 1.2 * largest


@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='needs Linux to measure memory')
def test_memory_of_a_small_lookalike(tmp_path):
    """The same measurement with one large tensor, opened in another number format than it is
    stored in.
    """
    model = tiny_model(5, tokenizer=byte_tokenizer())
    llm = {**model.cfg.llm, 'vocab_size': 400_000}
    big = materialise(
        meta_model(
            ClearConfig(
                **{**{k: getattr(model.cfg, k) for k in model.cfg.__dataclass_fields__}, 'llm': llm}
            ),
            model.tokenizer,
        )
    )
    for k, v in big.state_dict().items():
        v.zero_() if not k.endswith('pos_embed') else v
    [(peak, kept, own)] = watched(export_bagel(big, tmp_path / 'x'))
    assert kept > 0.9 * own and peak - own <= 1.2 * 400_000 * 32 * 4
