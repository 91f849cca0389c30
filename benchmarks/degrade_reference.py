"""Define the 16 corruptions of MMD-Bench in their plainest form.

Filters are full and two-dimensional, drawings are blended over the whole picture, and nothing is
kept between calls.

`clear_nb.degrade` does the same with short cuts. Both draw the same random numbers in the same
order, so their pictures can be compared one by one.
"""

import math

import cv2
import numpy as np

from clear_nb.degrade import CORRUPTIONS, REFERENCE_SIDE, SEVERITY


def degrade(image, name, severity, rng=None, relative=False):
    "Apply one corruption; arguments as in `clear_nb.degrade.degrade`, but not checked."
    i, s = (
        SEVERITY.get(severity, severity),
        max(image.shape[:2]) / REFERENCE_SIDE if relative else 1.0,
    )
    short, long = CORRUPTIONS[name].min_size(i, s)
    if min(image.shape[:2]) < short or max(image.shape[:2]) < long:
        raise ValueError(f'{name} needs a larger image than {image.shape}')
    out = globals()[name](image, i, rng, s)
    if np.array_equal(out, image):
        print(f'{name} left an image unchanged')
    return out


# Tools


def trunc(x):
    return np.clip(x, 0, 255).astype(np.uint8)


def px(length, s, least=1):
    return max(least, round(length * s))


def odd(k, s, least=3):
    return max(least, 2 * round((k * s - 1) / 2) + 1)


def canvas_of(img, s, channels):
    "Make a black drawing area of the image's size divided by `s`."
    h, w = (max(1, round(n / s)) for n in img.shape[:2])
    return np.zeros((h, w, channels), np.uint8)


def fit(canvas, img):
    "Resize a canvas to the image."
    small = (
        canvas
        if canvas.shape[:2] == img.shape[:2]
        else cv2.resize(canvas, img.shape[1::-1], interpolation=cv2.INTER_AREA)
    )
    return small.reshape(*img.shape[:2], -1).astype(np.float32)


def ints(rng, n, *ranges):
    "Draw `n` rows of integers, one per (low, high) range, both ends included."
    return rng.integers(*zip(*ranges), size=(n, len(ranges)), endpoint=True).tolist()


def gaussian(img, k, sigma, gain=1.0):
    "Compute `gain` times the Gaussian mean over `k` x `k` pixels."
    g = cv2.getGaussianKernel(k, sigma)
    return trunc(cv2.filter2D(img.astype(np.float32), -1, g @ g.T * gain))


# Capture


def lens_blur(img, i, rng, s):
    "Add a Gaussian glow to a dimmed picture."
    return cv2.addWeighted(
        img,
        1 - 0.7 * i,
        gaussian(img, odd(min(101, int(3 + 300 * i)) | 1, s), 20 * i * s),
        0.9 * i,
        0,
    )


def lens_flare(img, i, rng, s):
    "Add bright discs with streaks."
    light, n = canvas_of(img, s, 1), 3 + int(30 * i)
    h, w = light.shape[:2]
    shapes = ints(rng, n, (0, w), (0, h), (10, 50), (30, 150))
    for (x, y, r, length), a in zip(shapes, rng.uniform(0, 2 * np.pi, n)):
        cv2.circle(light, (x, y), r, 255, -1)
        cv2.line(light, (x, y), (int(x + length * np.cos(a)), int(y + length * np.sin(a))), 255, 2)
    k = odd(3, s, 1)
    light = cv2.GaussianBlur(fit(light, img), (k, k), 20 * i * s) / 255
    return trunc(img + 0.9 * i * light[..., None] * np.float32([235, 255, 255]))


def scale_kernel(kernel, s):
    "Scale a kernel by `s`; each entry is shared among its neighbours."
    offset = (np.arange(len(kernel)) - len(kernel) // 2) * s
    reach = math.ceil(abs(offset).max() + max(1, s)) - 1
    share = np.maximum(0, 1 - abs(offset[:, None] - np.arange(-reach, reach + 1)) / max(1, s))
    return share.T @ kernel @ share


def motion_blur(img, i, rng, s):
    "Average along a stroke of random direction."
    d = max(5, int(30 * i))
    turn = cv2.getRotationMatrix2D((d / 2, d / 2), rng.uniform(0, 360), 1)
    kernel = cv2.warpAffine(np.eye(d, dtype=np.float32), turn, (d, d))
    if s != 1:
        kernel = scale_kernel(kernel, s)
    return cv2.filter2D(img, -1, kernel / kernel.sum())


def dirty_lens(img, i, rng, s):
    "Lay blurred ellipses, dots and smudges over the picture."
    dirt = canvas_of(img, s, 1)
    h, w = dirt.shape[:2]
    at = (0, w), (0, h)
    for x, y, a, b, turn in ints(
        rng, int(10 * i) * (i > 0.1), *at, (150, 300), (100, 200), (0, 180)
    ):
        cv2.ellipse(dirt, (x, y), (a, b), turn, 0, 360, 50, -1)
    for x, y, r, grey in ints(rng, int(300 * i), *at, (4, 20), (50, 100)):
        cv2.circle(dirt, (x, y), r, grey, -1)
    for x, y, r, core in ints(rng, int(5 * i) * (i > 0.5), *at, (20, 50), (10, 30)):
        cv2.circle(dirt, (x, y), r, 80, -1)
        cv2.circle(dirt, (x, y), core, 120, -1)
    dirt = trunc(cv2.GaussianBlur(fit(dirt, img), (0, 0), 30 * s))
    return cv2.addWeighted(img, 1 - 0.7 * i, cv2.cvtColor(dirt, cv2.COLOR_GRAY2RGB), 0.8 * i, 0)


def hsv_saturation(img, i, rng, s):
    "Make colours paler."
    hsv = cv2.cvtColor(img, cv2.COLOR_RGB2HSV)
    hsv[..., 1] = hsv[..., 1] * np.float32(1 - i)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


# Transmission


def jpeg(img, quality):
    "Encode as JPEG and decode."
    data = cv2.imencode(
        '.jpg', cv2.cvtColor(img, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality]
    )[1]
    return cv2.cvtColor(cv2.imdecode(data, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def jpeg_compression(img, i, rng, s):
    "Send the picture through JPEG; a small image is enlarged in relative mode."
    quality, larger = min(100, max(5, int(100 - 95 * i))), min(2, 1 / s)
    if larger <= 1:
        return jpeg(img, quality)
    coded = jpeg(
        cv2.resize(img, None, fx=larger, fy=larger, interpolation=cv2.INTER_CUBIC), quality
    )
    return cv2.resize(coded, img.shape[1::-1], interpolation=cv2.INTER_AREA)


def block_exchange(img, i, rng, s):
    "Exchange random cells, one pair after the other."
    b, out = px(min(32, int(5 + 30 * i)), s, 2 if s != 1 else 1), img.copy()
    row, col = (0, len(img) // b - 1), (0, img.shape[1] // b - 1)
    for r, c, r2, c2 in ints(rng, int(35 * i), row, col, row, col):
        one, two = (
            out[r * b : r * b + b, c * b : c * b + b],
            out[r2 * b : r2 * b + b, c2 * b : c2 * b + b],
        )
        one[:], two[:] = two.copy(), one.copy()
    return out


def mean_shift(img, i, rng, s):
    "Paint flat patches with hard borders."
    radius = int(40 * i)
    return cv2.pyrMeanShiftFiltering(img, radius if s == 1 else max(1.0, radius * s), radius)


def scan_lines(img, i, rng, s):
    "Darken bands of rows at equal distances."
    period, width = max(3, int(20 / (i + 0.1))), max(5, int(7 * i))
    band = (np.arange(max(1, round(len(img) / s))) % period < width).astype(float)
    if len(band) != len(img):
        band = cv2.resize(band[:, None], (1, len(img)), interpolation=cv2.INTER_AREA)
    return trunc(img * (1 - 0.99 * np.sqrt(band.reshape(-1, 1, 1))))


# Environment


def dark_illumination(img, i, rng, s):
    return trunc(img * (1 - i**2))


def atmospheric_turbulence(img, i, rng, s):
    "Displace rows along a sine."
    h, w = img.shape[:2]
    x, y = np.arange(w), np.arange(h)[:, None]
    shift = 40 * i * s * np.sin(y / (30 * s) + 5 * i)
    at_x, at_y = np.clip(x + shift, 0, w - 1), np.clip(y + 0.7 * shift, 0, h - 1)
    return cv2.remap(
        img, at_x.astype(np.float32), np.repeat(at_y, w, 1).astype(np.float32), cv2.INTER_LINEAR
    )


def gaussian_noise(img, i, rng, s):
    return trunc(img + rng.normal(0, 75 * i, img.shape))


def color_diffusion(img, i, rng, s):
    "Mix with a dark, wide blur; above 0.9 with grey discs."
    diffused = gaussian(img, odd(3 + 2 * int(20 * i), s), 50 * i * s, i**2)
    h, w = img.shape[:2]
    for x, y, r, grey in (
        ints(rng, int(100 * i), (0, w - 1), (0, h - 1), (5, 19), (0, 254)) if i > 0.9 else []
    ):
        cv2.circle(diffused, (x, y), px(r, s), (grey,) * 3, -1)
    return cv2.addWeighted(img, max(0.1, 1 - 0.9 * i), diffused, min(0.9, 0.9 * i), 0)


# Postprocessing


def sharpness_change(img, i, rng, s):
    "Mix in 30 % of an extremely sharpened picture."
    d = px(1, s)
    kernel = np.zeros((2 * d + 1, 2 * d + 1), np.float32)
    kernel[d, d], kernel[[0, d, d, 2 * d], [d, 0, 2 * d, d]] = 5, -1
    return cv2.addWeighted(img, 0.7, cv2.filter2D(img, -1, kernel * (80 * i)), 0.3, 0)


def word(canvas, i, rng):
    "Write a red word, if it fits."
    words = 'X', 'FAKE', 'COPY', 'VOID', 'COPYRIGHT', str(rng.integers(1, 101))
    text, font = words[rng.integers(6)], (cv2.FONT_HERSHEY_SIMPLEX, max(0.5, 5 * i))
    (w, h), (tw, th) = canvas.shape[1::-1], cv2.getTextSize(text, *font, 4)[0]
    if h - 10 <= th + 10:
        return
    [at] = ints(rng, 1, (0, max(1, w - tw - 10)), (th + 10, h - 10))
    cv2.putText(canvas, text, at, *font, (255, 0, 0, 255), 4)


def graffiti(img, i, rng, s):
    "Spray lines and a word, blended by their coverage."
    canvas = canvas_of(img, s, 4)
    h, w = canvas.shape[:2]
    end = (0, w - 1), (0, h - 1)
    for b, g, r, x, y, x2, y2, t in ints(
        rng, int(10 * i), *[(0, 255)] * 3, *end, *end, (1, max(1, int(5 * i)))
    ):
        cv2.line(canvas, (x, y), (x2, y2), (r, g, b, 255), t)
    if i > 0.55:
        word(canvas, i, rng)
    canvas = fit(canvas, img)
    opacity = np.sqrt(canvas[..., 3:] / 255)
    return trunc(img * (1 - opacity) + canvas[..., :3] / np.maximum(opacity, 0.01) + 0.5)


def watermark_damage(img, i, rng, s):
    "Fill rectangles from their borders; above 0.5 their outline is darkened."
    mask = canvas_of(img, s, 1)
    h, w = mask.shape[:2]
    for x, y, dx, dy in ints(rng, int(1 + 15 * i), (0, w - 50), (0, h - 50), (50, 200), (20, 80)):
        cv2.rectangle(mask, (x, y), (x + dx, y + dy), 255, -1)
    mask = np.where(fit(mask, img) < 128, 0, 255).astype(np.uint8)
    out = cv2.addWeighted(img, 1 - i, cv2.inpaint(img, mask, px(3, s), cv2.INPAINT_TELEA), i, 0)
    outline = cv2.Canny(mask, 50, 150) > 0
    if i > 0.5:
        out[outline] = trunc(out[outline] * (1 - 0.2 * min(1.0, s)))
    return out
