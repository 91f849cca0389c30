"""The autoencoder against the official code, and the properties that keep latents clean."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import linear, pad

from clear_nb.core import torch_rng
from clear_nb.flow import interpolate, sample_time
from clear_nb.vae import (
    Vae,
    VaeConfig,
    check_state,
    diffusers_to_flux,
    fit_scale,
    flux_to_diffusers,
    kl_to_normal,
    patchify,
    unpatchify,
)

GOLDEN = Path(__file__).parent / 'golden' / 'bagel'
SMALL = VaeConfig(ch=32, ch_mult=(1, 2))  # the golden shape
TINY = VaeConfig(ch=16, ch_mult=(1, 2), blocks=1, z=8, groups=8, fold=2)


@pytest.fixture(scope='module')
def golden():
    "Weights, training batch and sampling runs of the official code."
    return {
        k: load_file(GOLDEN / f'{k}.safetensors')
        for k in ('model', 'ae', 'train_inputs', 'train_outputs', 'infer_inputs', 'infer_outputs')
    }


@pytest.fixture(scope='module')
def vae():
    "Our module with the golden weights."
    return Vae(SMALL).load_flux(GOLDEN / 'ae.safetensors').eval().requires_grad_(False)


def close(a, b, rtol=1e-4):
    "Relative error of the whole tensor."
    assert a.shape == b.shape and ((a - b).norm() / b.norm()).item() < rtol


# the official numbers


def test_encoder_matches_the_official_code(vae, golden):
    "Moments and sampled latents of the padded batch, with the recorded noise."
    i, o = golden['train_inputs'], golden['train_outputs']
    mean, logvar = vae.moments(i['padded_images'])
    close(torch.cat([mean, logvar], 1), o['vae_encoder_out'])
    close(vae.to_latent(mean, logvar, i['vae_sample_noise']), o['padded_latent'])


def test_decoder_matches_the_official_code(vae, golden):
    "Decoded training batch and decoded sample."
    o = golden['train_outputs'], golden['infer_outputs']
    close(vae.decode(o[0]['padded_latent']), o[0]['vae_decode_of_padded_latent'])
    close(vae.decode(o[1]['image.plain.unpatchified_latent']), o[1]['image.plain.decoded'])


def test_patch_order_matches_the_official_code(golden):
    """Sampled tokens against the official latent; training latents through vae2llm against the
    official embedding.
    """
    i, o, m = golden['train_inputs'], golden['train_outputs'], golden['model']
    out = golden['infer_outputs']
    assert torch.equal(
        unpatchify(out['image.plain.latent'], 3, 5)[None], out['image.plain.unpatchified_latent']
    )
    shapes = json.loads((GOLDEN / 'train_meta.json').read_text(encoding='utf-8'))[
        'patchified_vae_latent_shapes'
    ]
    z0 = torch.cat(
        [patchify(z[:, : 2 * h, : 2 * w]) for z, (h, w) in zip(o['padded_latent'], shapes)]
    )
    x_t = interpolate(z0, i['flow_noise'], sample_time(i['packed_timesteps'], 2.0))
    close(linear(x_t, m['vae2llm.weight'], m['vae2llm.bias']), o['vae2llm_out'])


def test_flux_shape_on_meta():
    "244 tensors, 83,819,683 parameters, and every name and shape of the released checkpoint."
    expected = json.loads((GOLDEN / 'bagel7b_key_shapes.json').read_text(encoding='utf-8'))
    with torch.device('meta'):
        state = diffusers_to_flux(Vae().net.state_dict())
    assert {k: list(v.shape) for k, v in state.items()} == expected['ae'] and len(state) == 244
    assert sum(v.numel() for v in state.values()) == expected['params_ae'] == 83_819_683


# names and files


@pytest.mark.parametrize(
    'cfg',
    [
        SMALL,
        TINY,
        VaeConfig(ch=8, ch_mult=(1, 1, 2, 2, 4), blocks=3, groups=4),
        VaeConfig(ch=8, ch_mult=(1,), groups=8),
    ],
)
def test_name_maps_are_inverse(cfg):
    """diffusers -> FLUX -> diffusers is the identity, names are unique, shapes fit, for several
    depths.
    """
    with torch.device('meta'):
        state = Vae(cfg).net.state_dict()
    flux = diffusers_to_flux(state)
    assert len(flux) == len(state) and not set(flux) & {k for k in state if 'blocks' in k}
    assert {k: v.shape for k, v in flux_to_diffusers(flux).items()} == {
        k: v.shape for k, v in state.items()
    }


def test_loading_names_every_problem(tmp_path, golden):
    "Missing, unexpected and misshaped keys appear in one error, and nothing is loaded."
    state = dict(golden['ae'])
    gone, odd = 'encoder.conv_in.bias', 'decoder.conv_out.weight'
    del state[gone]
    state['stray.weight'] = torch.zeros(1)
    state[odd] = torch.zeros(3, 16, 3, 3)
    save_file(state, tmp_path / 'ae.safetensors')
    vae = Vae(SMALL, torch_rng('test', 'fresh'))
    before = vae.net.encoder.conv_out.weight.clone()
    with pytest.raises(ValueError) as e:
        vae.load_flux(tmp_path / 'ae.safetensors')
    assert all(
        k in str(e.value) for k in (gone, odd, 'stray.weight', '3 problems', '(3, 32, 3, 3)')
    )
    assert torch.equal(vae.net.encoder.conv_out.weight, before)
    with pytest.raises(FileNotFoundError, match='nowhere'):
        vae.load_flux(tmp_path / 'nowhere.safetensors')
    check_state({'a': torch.zeros(1)}, {'a': torch.ones(1)}, 'a good state')


def test_save_and_load(tmp_path, vae, golden):
    "A saved file equals the official one, tensor by tensor."
    vae.save_flux(tmp_path / 'ae.safetensors')
    again = load_file(tmp_path / 'ae.safetensors')
    assert again.keys() == golden['ae'].keys() and all(
        torch.equal(again[k], v) for k, v in golden['ae'].items()
    )


# latents stay clean


def mixed(g):
    "Five images of three sizes, interleaved."
    return [
        torch.rand(3, h, w, generator=g) * 2 - 1
        for h, w in [(16, 24), (32, 32), (16, 24), (8, 40), (32, 32)]
    ]


def test_neighbours_do_not_matter(vae):
    """A latent is the same alone, in a batch, and in a list of mixed sizes; padding would change
    it.
    """
    images = mixed(torch_rng('test', 'mixed'))
    together, alone = vae.encode(images), [vae.encode(x[None])[0] for x in images]
    for a, b in zip(together, alone):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    padded = vae.encode(pad(images[0], (0, 8, 0, 16))[None])[0, :, :8, :12]
    assert (padded - alone[0]).abs().max() > 0.01
    for a, b in zip(vae.decode(together), (vae.decode(z[None])[0] for z in alone)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_sampled_noise_follows_the_order_of_the_images(vae):
    """Draws depend on the generator and the image order, not on how images are grouped; `mean`
    draws nothing.
    """
    images = mixed(torch_rng('test', 'mixed'))
    draws = vae.encode(images, 'sample', torch_rng('test', 'draw'))
    g = torch_rng('test', 'draw')
    for x, z in zip(images, draws):
        torch.testing.assert_close(vae.encode([x], 'sample', g)[0], z, rtol=1e-4, atol=1e-5)
    same = vae.encode(torch.stack([images[1], images[4]]), 'sample', torch_rng('test', 'two'))
    for a, b in zip(same, vae.encode([images[1], images[4]], 'sample', torch_rng('test', 'two'))):
        torch.testing.assert_close(a, b)
    assert torch.equal(vae.encode(images[1][None]), vae.encode(images[1][None]))


def test_sampled_latents_have_the_encoders_spread(vae):
    "Mean and deviation over many draws equal the moments, brought to latent scale."
    x = torch.rand(1, 3, 4, 4, generator=torch_rng('test', 'spread')) * 2 - 1
    mean, logvar = vae.moments(x)
    z = vae.encode(x.expand(2000, -1, -1, -1), 'sample', torch_rng('test', 'spread', 1))
    assert (z.mean(0) - SMALL.scale * (mean[0] - SMALL.shift)).abs().max() < 6 * (
        SMALL.scale * (0.5 * logvar).exp()
    ).max() / 2000**0.5
    torch.testing.assert_close(z.std(0), SMALL.scale * (0.5 * logvar[0]).exp(), rtol=0.1, atol=1e-4)


def test_fresh_weights_come_from_the_generator():
    "Same stream, same weights; another stream, others."
    a, b, c = (Vae(TINY, torch_rng('test', k)).state_dict() for k in (0, 0, 1))
    assert all(torch.equal(a[k], b[k]) for k in a) and any(not torch.equal(a[k], c[k]) for k in a)


def test_fold_keeps_shapes_and_pixels():
    "Folding moves pixels into channels and back; the stride counts it."
    vae = Vae(TINY, torch_rng('test', 'fold'))
    x = torch.rand(2, 3, 16, 24, generator=torch_rng('test', 'fold', 1))
    rec, mean, logvar = vae(x, torch_rng('test', 'fold', 2))
    assert rec.shape == x.shape and mean.shape == logvar.shape == (2, 8, 4, 6) and TINY.down == 4
    rec.sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in vae.parameters())


def test_autocast_bf16(vae):
    "Latents and images leave as float32 and stay close to full precision."
    x = torch.rand(2, 3, 32, 32, generator=torch_rng('test', 'autocast')) * 2 - 1
    z = vae.encode(x)
    with torch.autocast('cpu', torch.bfloat16):
        half, image = vae.encode(x), vae.decode(z)
    assert half.dtype == image.dtype == torch.float32
    close(half, z, 0.03)
    close(image, vae.decode(z), 0.03)


def test_fit_scale_standardises():
    "After `fit_scale` the mean latents have mean 0 and deviation 1."
    vae = Vae(TINY, torch_rng('test', 'scale')).eval()
    x = torch.rand(8, 3, 16, 16, generator=torch_rng('test', 'scale', 1)) * 2 - 1
    scale, shift = fit_scale(vae, x)
    z = scale * (vae.moments(x)[0] - shift)
    assert abs(z.mean().item()) < 1e-4 and abs(z.std().item() - 1) < 1e-4


def test_kl_is_zero_only_at_the_standard_normal():
    "0 at N(0, 1), positive elsewhere."
    assert kl_to_normal(torch.zeros(3), torch.zeros(3)).eq(0).all()
    assert (kl_to_normal(torch.tensor([0.1, 0.0, 0.0]), torch.tensor([0.0, 0.1, -0.1])) > 0).all()


# tokens and errors


@pytest.mark.parametrize('p', [1, 2, 4])
def test_patchify_roundtrip(p):
    "unpatchify inverts patchify, with leading dimensions."
    z = torch.randn(2, 3, 5, 8, 12, generator=torch_rng('test', 'patch', p))
    tokens = patchify(z, p)
    assert tokens.shape == (2, 3, 8 * 12 // p**2, 5 * p * p) and torch.equal(
        unpatchify(tokens, 8 // p, 12 // p, p), z
    )


def test_bad_arguments_raise(vae):
    "One sentence each: sizes, modes, generator, grids, groups."
    x = torch.zeros(1, 3, 16, 16)
    with pytest.raises(ValueError, match='multiples of 2'):
        vae.encode(torch.zeros(1, 3, 15, 16))
    with pytest.raises(ValueError, match='4 dimensions'):
        vae.encode(torch.zeros(3, 16, 16))
    assert vae.encode([]) == [] and vae.decode([]) == []
    with pytest.raises(ValueError, match='mode'):
        vae.encode(x, 'median')
    with pytest.raises(ValueError, match='generator'):
        vae.encode(x, 'sample')
    with pytest.raises(ValueError, match='patches of 2'):
        patchify(torch.zeros(4, 3, 4))
    with pytest.raises(ValueError, match='do not fill'):
        unpatchify(torch.zeros(5, 16), 2, 3)
    with pytest.raises(ValueError, match='groups'):
        VaeConfig(ch=20)
    assert VaeConfig(ch_mult=[1, 2]) == VaeConfig(ch_mult=(1, 2))
