"""The image pipeline against BAGEL's transforms, and against files found in the wild."""

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from clear_nb.core import rng
from clear_nb.images import (
    MAX_PIXELS,
    VAE_RULE,
    VIT_RULE,
    VIT_TRAIN_RULE,
    ResizeRule,
    image_tensor,
    open_image,
    resize,
    to_uint8,
)

GOLDEN = Path(__file__).parent / 'golden' / 'bagel'
RULES = dict(
    vae_1024_512_16=VAE_RULE,
    vit_980_224_14=VIT_RULE,
    vit_518_224_14=VIT_TRAIN_RULE,
    vlm_980_378_14_px2007040=ResizeRule(980, 378, 14, 2_007_040),
)


def photo(w=48, h=32):
    "A smooth seeded RGB picture."
    a = rng('test', 'photo').integers(0, 256, (4, 6, 3), np.uint8)
    return Image.fromarray(a).resize((w, h), Image.Resampling.BICUBIC)


def png_header(w, h):
    "A PNG that claims w x h pixels and holds a handful."

    def chunk(kind, data):
        return (
            struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
        )

    return (
        b'\x89PNG\r\n\x1a\n'
        + chunk(b'IHDR', struct.pack('>IIBBBBB', w, h, 8, 2, 0, 0, 0))
        + chunk(b'IDAT', zlib.compress(bytes(64)))
        + chunk(b'IEND', b'')
    )


@pytest.mark.parametrize('name', RULES)
def test_sizes_match_the_official_code(name):
    "Every golden size, for all four published rules."
    cases = json.loads((GOLDEN / 'helper_cases.json').read_text(encoding='utf-8'))['resize_sizes'][
        name
    ]
    assert len(cases) == 10
    for c in cases:
        assert RULES[name].size(c['w'], c['h'], c['img_num']) == tuple(c['out_hw'][::-1]), c


def test_sizes_are_multiples_of_the_stride_and_bounded():
    "Property over random sizes: stride divides, the long side is capped, the area cap holds."
    for w, h in rng('test', 'sizes').integers(1, 6000, (500, 2)).tolist():
        for r in RULES.values():
            a, b = r.size(w, h)
            assert (
                a % r.stride == 0 == b % r.stride
                and max(a, b) <= -(-r.max_side // r.stride) * r.stride
                and a * b <= r.max_pixels
            )


def test_transforms_match_the_official_code():
    "Resize and tensor conversion are bit-equal to the golden transforms."
    out = load_file(GOLDEN / 'transform_outputs.safetensors')
    img = open_image(GOLDEN / 'transform_input.png')
    for name, rule in dict(
        vae_64_32_16=ResizeRule(64, 32, 16), vit_56_28_14=ResizeRule(56, 28, 14)
    ).items():
        torch.testing.assert_close(image_tensor(resize(img, rule)), out[name], rtol=0, atol=0)


def test_uint8_matches_the_official_code():
    "Truncation of the golden decoded image."
    out = load_file(GOLDEN / 'infer_outputs.safetensors')
    np.testing.assert_array_equal(
        to_uint8(out['image.plain.decoded'][0]), out['image.plain.uint8_hwc'].numpy()
    )


def test_to_uint8_refuses_nan():
    "A NaN must not become a black pixel."
    with pytest.raises(ValueError, match='NaN'):
        to_uint8(torch.full((3, 2, 2), torch.nan))


def test_nothing_is_resampled_when_the_size_fits():
    "A 64 px scene passes the whole pipeline unchanged."
    img = photo(64, 64)
    assert resize(img, ResizeRule(64, 64, 16)) is img
    batch = image_tensor(np.stack([np.asarray(img)] * 3))
    assert (
        torch.equal(batch[1], image_tensor(img))
        and batch.dtype == torch.float32
        and batch.is_contiguous()
    )


@pytest.mark.parametrize('orientation', range(1, 9))
def test_exif_rotation(tmp_path, orientation):
    "All eight EXIF orientations open upright."
    upright = photo(48, 32)
    undo = {
        2: 0,
        3: 3,
        4: 1,
        5: 5,
        6: 2,
        7: 6,
        8: 4,
    }  # transposition that stores the picture so that the flag undoes it
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = upright if orientation == 1 else upright.transpose(undo[orientation])
    stored.save(tmp_path / 'a.png', exif=exif)
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / 'a.png')), np.asarray(upright))


@pytest.mark.parametrize('mode', ['RGBA', 'LA', 'P', 'L', 'PA'])
def test_transparency_is_white(tmp_path, mode):
    "Transparent pixels become white whatever the mode."
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[:2, :, 3] = 255  # upper half black, lower half transparent black
    img = Image.fromarray(rgba)
    if mode == 'P':
        img.quantize(4).save(tmp_path / 'a.png')
    elif mode == 'L':
        Image.fromarray(rgba[..., 3] // 2).save(tmp_path / 'a.png', transparency=0)
    elif mode == 'LA':
        img.convert('LA').save(tmp_path / 'a.png')
    else:
        img.save(tmp_path / 'a.png')
    opened = np.asarray(
        open_image(
            Image.open(tmp_path / 'a.png').convert('PA') if mode == 'PA' else tmp_path / 'a.png'
        )
    )
    assert opened.shape == (4, 4, 3) and (opened[2:] == 255).all() and (opened[:2] < 200).all()


def test_half_transparency_blends():
    "Alpha 128 over white, within one level."
    rgba = np.zeros((1, 1, 4), np.uint8)
    rgba[..., 3] = 128
    assert abs(int(np.asarray(open_image(rgba))[0, 0, 0]) - 127) <= 1


@pytest.mark.parametrize(
    'mode', ['1', 'L', 'RGB', 'RGBA', 'LA', 'CMYK', 'YCbCr', 'HSV', 'P', 'RGBX']
)
def test_every_mode_becomes_rgb(mode):
    "PIL images of any mode end as RGB."
    opened = open_image(photo(5, 4).convert('L' if mode == 'LA' else 'RGB').convert(mode))
    assert opened.mode == 'RGB' and opened.size == (5, 4)


def test_float_greys_are_refused():
    "A float grey has no agreed range."
    with pytest.raises(ValueError, match='8 or 16 bits'):
        open_image(Image.new('F', (5, 4)))


def test_cmyk_jpeg(tmp_path):
    "Four inks keep their colours roughly."
    Image.new('RGB', (16, 16), (200, 30, 60)).convert('CMYK').save(tmp_path / 'a.jpg', quality=95)
    assert np.abs(np.asarray(open_image(tmp_path / 'a.jpg')).mean((0, 1)) - (200, 30, 60)).max() < 6


@pytest.mark.parametrize('suffix', ['png', 'tiff', 'pgm'])
def test_16_bit_greys(tmp_path, suffix):
    "A 16-bit ramp keeps its range instead of saturating."
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / f'a.{suffix}')
    opened = np.asarray(open_image(tmp_path / f'a.{suffix}'))[..., 0].astype(int)
    assert opened.min() == 0 and opened.max() == 255 and np.abs(opened - ramp / 257).max() <= 0.51


@pytest.mark.parametrize('suffix', ['gif', 'png', 'webp', 'tiff'])
def test_first_frame_of_an_animation(tmp_path, suffix):
    "Animated and multi-page files give their first frame, wherever the caller's image stands."
    frames = [Image.new('RGB', (8, 8), c) for c in ((255, 0, 0), (0, 0, 255))]
    frames[0].save(tmp_path / f'a.{suffix}', save_all=True, append_images=frames[1:])
    img = Image.open(tmp_path / f'a.{suffix}')
    img.seek(1)
    for src in (tmp_path / f'a.{suffix}', img):
        with pytest.warns(
            UserWarning, match=rf'a.{suffix} has several frames; only the first is used'
        ):
            opened = open_image(src)
        r, g, b = np.asarray(opened).reshape(-1, 3)[0].astype(int)
        assert r > 200 and b < 60
    assert img.tell() == 1


def test_the_callers_image_is_untouched():
    "Opening a PIL image or an array leaves the source as it was."
    rgba = photo().convert('RGBA')
    before = rgba.tobytes()
    open_image(rgba)
    assert rgba.mode == 'RGBA' and rgba.tobytes() == before
    a = np.asarray(photo()).copy()
    b = a.copy()
    open_image(a)
    assert np.array_equal(a, b)


def test_missing_and_wrong_sources(tmp_path):
    "Missing file, folder, empty file, text file, wrong type: one sentence that names the source."
    with pytest.raises(FileNotFoundError, match='nowhere.png'):
        open_image(tmp_path / 'nowhere.png')
    with pytest.raises(FileNotFoundError, match='check the path'):
        open_image(str(tmp_path))
    for name, data in dict(empty=b'', text=b'hello there, this is text').items():
        (tmp_path / f'{name}.jpg').write_bytes(data)
        with pytest.raises(ValueError, match=name):
            open_image(tmp_path / f'{name}.jpg')
    with pytest.raises(ValueError, match='NoneType'):
        open_image(None)


@pytest.mark.parametrize(
    'shape,dtype',
    [
        ((4, 4, 3), np.float32),
        ((4, 4, 2), np.uint8),
        ((0, 4, 3), np.uint8),
        ((2, 4, 4, 3), np.uint8),
        ((4,), np.uint8),
        ((4, 4, 3), np.int64),
        ((4, 4, 3), np.uint16),
    ],
)
def test_wrong_arrays_are_refused(shape, dtype):
    "Arrays whose meaning would have to be guessed are errors."
    with pytest.raises(ValueError, match='open_image'):
        open_image(np.zeros(shape, dtype))


@pytest.mark.parametrize('side', [10_001, 15_000, 20_000, 2_000_000, 2**31 - 1])
@pytest.mark.filterwarnings('ignore')
def test_absurd_sizes_are_refused_before_decoding(tmp_path, side):
    "A header that claims gigapixels raises at once."
    assert side**2 > MAX_PIXELS
    (tmp_path / 'bomb.png').write_bytes(png_header(side, side))
    with pytest.raises(ValueError, match=r'bomb.png.* pixels.*shrink it first'):
        open_image(tmp_path / 'bomb.png')


@pytest.mark.parametrize('suffix', ['png', 'gif', 'tiff', 'bmp', 'jpg'])
@pytest.mark.filterwarnings('ignore')
def test_twenty_thousand_pixels_are_not_decoded(tmp_path, suffix, monkeypatch):
    """A small file whose header says 20,000 x 20,000, in formats that can say it, is refused
    before a pixel is decoded.
    """
    f = tmp_path / f'a.{suffix}'
    photo(16, 16).save(f)
    data = bytearray(f.read_bytes())
    if suffix == 'png':
        data = bytearray(png_header(20_000, 20_000))
    elif suffix == 'gif':
        data[6:10] = struct.pack('<HH', 20_000, 20_000)
    elif suffix == 'bmp':
        data[18:26] = struct.pack('<ii', 20_000, 20_000)
    elif suffix == 'tiff':
        data = tiff_header(20_000)
    else:
        at = data.index(b'\xff\xc0')
        data[at + 5 : at + 9] = struct.pack('>HH', 20_000, 20_000)
    f.write_bytes(data)
    monkeypatch.setattr(Image.Image, 'copy', lambda self: pytest.fail('decoded'))
    with pytest.raises(ValueError, match=rf'a.{suffix}.*100,000,000.*shrink it first'):
        open_image(f)


def tiff_header(side):
    "A grey TIFF that claims side x side pixels in one strip."
    tags = [
        (256, 4, side),
        (257, 4, side),
        (258, 3, 8),
        (259, 3, 1),
        (262, 3, 1),
        (273, 4, 8),
        (277, 3, 1),
        (278, 4, side),
        (279, 4, side * side),
    ]
    return (
        b'II*\0'
        + struct.pack('<I', 8)
        + struct.pack('<H', len(tags))
        + b''.join(struct.pack('<HHII', t, k, 1, v) for t, k, v in tags)
        + bytes(4)
    )


def test_one_pixel(tmp_path):
    "A single pixel fills the smallest picture with its colour."
    Image.new('RGB', (1, 1), (10, 200, 30)).save(tmp_path / 'a.png')
    img = open_image(tmp_path / 'a.png')
    for rule, size in (
        (VAE_RULE, (512, 512)),
        (VIT_TRAIN_RULE, (224, 224)),
        (ResizeRule(64, 64, 16), (64, 64)),
    ):
        out = resize(img, rule)
        assert out.size == size and np.unique(np.asarray(out).reshape(-1, 3), axis=0).tolist() == [
            [10, 200, 30]
        ]


@pytest.mark.parametrize('w, h', [(1, 20_000), (20_000, 1), (3, 5000)])
def test_strips(w, h):
    "A strip keeps its long side within the cap and its short side at one stride at least."
    for rule in RULES.values():
        a, b = resize(Image.new('RGB', (w, h)), rule).size
        assert (
            max(a, b) <= -(-rule.max_side // rule.stride) * rule.stride
            and min(a, b) >= rule.stride
            and (a < b) == (w < h)
        )


def test_16_bit_colour(tmp_path):
    "A 16-bit RGB PNG keeps its range."
    import cv2

    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    cv2.imwrite(str(tmp_path / 'a.png'), np.stack([ramp, ramp // 2, 0 * ramp], -1))  # BGR
    opened = np.asarray(open_image(tmp_path / 'a.png')).astype(int)
    assert (
        np.abs(opened[..., 2] - ramp / 257).max() <= 1
        and np.abs(opened[..., 1] - ramp / 514).max() <= 1
        and not opened[..., 0].any()
    )


def test_a_still_picture_warns_of_nothing(recwarn, tmp_path):
    photo().save(tmp_path / 'a.gif')
    open_image(tmp_path / 'a.gif')
    assert not recwarn.list


@pytest.mark.parametrize(
    'suffix', ['png', 'jpg', 'gif', 'bmp', 'webp', 'tiff', 'ppm', 'tga', 'ico']
)
@pytest.mark.filterwarnings('ignore')
def test_damaged_files_raise_value_errors_only(tmp_path, suffix):
    "Random damage either still decodes to RGB or raises ValueError; nothing else escapes."
    f = io.BytesIO()
    photo().save(f, Image.registered_extensions()[f'.{suffix}'])
    good, g, path = f.getvalue(), rng('test', 'damage', suffix), tmp_path / f'x.{suffix}'
    for i in range(120):
        data = bytearray(good[: int(g.integers(1, len(good)))] if i % 2 else good)
        for at in g.integers(0, len(data), int(g.integers(1, 8))):
            data[at] = int(g.integers(256))
        path.write_bytes(data)
        try:
            assert open_image(path).mode == 'RGB'
        except ValueError as e:
            assert f'x.{suffix}' in str(e)


def test_fit_size_refuses_empty_images():
    "Sides below one pixel are an error."
    with pytest.raises(ValueError, match='0 x 5'):
        ResizeRule(64, 32, 16).size(0, 5)
