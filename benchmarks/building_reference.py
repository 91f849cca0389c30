"""How pictures were built before: mean shift with 32-bit sums of the whole image, and PNG files with
OpenCV's own choice of filter. `building.py` measures today's forms against these, and the tests
compare the pixels.
"""

from collections.abc import Callable
from functools import lru_cache

import cv2
import numpy as np

from clear_nb.rows import encode_picture as encode_now


def encode_picture(image, quality=None):
    "Encode a picture as PNG with the filter that OpenCV chooses, or as JPEG as today."
    if quality is not None:
        return encode_now(image, quality)
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    return cv2.imencode('.png', bgr, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()


def _window_bounds(
    n: int,  # rows or columns of the image
    reach: float,  # spatial radius in pixels
) -> tuple:  # two (n,) int arrays: first row of each window, one past its last
    "Compute the window around each row, cut at the border; halves round to even as in OpenCV."
    k, reach = np.arange(n, dtype=np.float32), np.float32(max(1, reach))
    first = np.maximum(np.rint(k - reach), 0).astype(int)
    last = np.minimum(np.rint(k + reach), n - 1).astype(int)
    return first, last + 1


def _band_slots(
    top: np.ndarray,  # (h,) first row of each window
    end: np.ndarray,  # (h,) one past its last row
) -> np.ndarray:  # (h, d) image row in each slot of the band; h where none is needed
    "List which image rows the band around each row holds."
    d, top = (end - top).max(), top[:, None]
    rows = top + (np.arange(d) - top) % d
    return np.where(rows < end[:, None], rows, len(end))


def _mean_shift_inputs(img: np.ndarray, reach: float) -> tuple:  # planes, slots, spans
    "Lay an image out for `_mean_shift_step`, whose arguments say what the three arrays hold."
    h, w = img.shape[:2]
    slots = _band_slots(*_window_bounds(h, reach))
    planes = np.full((5, h + 1, w), 9999, np.int32)
    planes[:2, :h], planes[2:, :h] = np.indices((h, w)), img.transpose(2, 0, 1)
    return planes, slots, np.stack(_window_bounds(w, reach), 1) * slots.shape[1]


def _fill_band(
    band,  # (5, w * d + 64) int32, changed in place
    held,  # (d,) image row in each slot of the band, changed in place
    planes,  # (5, h+1, w) as in `_mean_shift_step`
    wanted,  # (d,) image row that each slot shall hold
):
    "Copy image rows into the slots that do not hold them yet; for numba."
    depth = len(wanted)
    for k in range(depth):
        if held[k] == wanted[k]:
            continue
        held[k] = wanted[k]
        for plane in range(5):
            for column in range(planes.shape[2]):
                band[plane, column * depth + k] = planes[plane, held[k], column]


def _sum_window(
    band,  # (5, ...) int32 from `_fill_band`
    span,  # (2,) where the window begins and ends in the band
    point,  # (5,) int32, the point that moves
    r2,  # int32, squared colour radius
) -> tuple:  # six int32: number, rows, columns, reds, greens, blues
    "Sum the pixels of a window whose colour is near the point's; for numba."
    start, n = span[0], np.int32(span[1] - span[0])
    end = start + (n + 63) // 64 * 64
    red, green, blue = point[2], point[3], point[4]
    ys, xs = band[0, start:end], band[1, start:end]
    reds, greens, blues = band[2, start:end], band[3, start:end], band[4, start:end]
    count = sum_y = sum_x = sum_r = sum_g = sum_b = np.int32(0)
    for k in range(end - start):
        dr, dg, db = np.int32(reds[k] - red), np.int32(greens[k] - green), np.int32(blues[k] - blue)
        is_near = np.int32(dr * dr + dg * dg + db * db) <= r2 and np.int32(k) < n
        mask = np.int32(-np.int32(is_near))  # all bits set, or none
        count = np.int32(count - mask)
        sum_y, sum_x = np.int32(sum_y + (mask & ys[k])), np.int32(sum_x + (mask & xs[k]))
        sum_r, sum_g = np.int32(sum_r + (mask & reds[k])), np.int32(sum_g + (mask & greens[k]))
        sum_b = np.int32(sum_b + (mask & blues[k]))
    return count, sum_y, sum_x, sum_r, sum_g, sum_b


def _same_colour(
    one,  # (5,) int32, a row of `state`
    other,  # (5,) int32
) -> bool:
    "Compare the colours of two points; for numba."
    return one[2] == other[2] and one[3] == other[3] and one[4] == other[4]


def _mean_shift_step(
    planes,  # (5, h+1, w) int32: row, column and colour of each pixel; then the impossible row
    state,  # (n, 5) int32: row, column and colour of each moving point
    order,  # indices into state of the points to move, sorted by row
    slots,  # (h, d) from `_band_slots`
    spans,  # (w, 2) where the window around a column begins and ends in the band
    r2,  # int32, squared colour radius
) -> tuple:  # new (n, 5) state, (n,) bool: which points go on
    "Move the points of `order` by one step; for numba."
    width, depth = planes.shape[2], slots.shape[1]
    band, held = np.zeros((5, width * depth + 64), np.int32), np.full(depth, -1)
    out, goes_on = state.copy(), np.zeros(len(state), np.bool_)
    row, last_here = -1, np.full(width, -1)  # last point of this row in each column
    for p in order:
        y, x, red, green, blue = state[p, 0], state[p, 1], state[p, 2], state[p, 3], state[p, 4]
        if y != row:
            row, last_here[:] = y, -1
            _fill_band(band, held, planes, slots[y])
        twin, last_here[x] = last_here[x], p
        if twin >= 0 and _same_colour(state[twin], state[p]):
            out[p], goes_on[p] = out[twin], goes_on[twin]
            continue
        sums = _sum_window(band, spans[x], state[p], r2)
        if sums[0] == 0:
            continue
        for k in range(5):
            out[p, k] = np.rint(sums[k + 1] * (1 / sums[0]))
        moved = abs(out[p, 0] - y) + abs(out[p, 1] - x)
        recoloured = (out[p, 2] - red) ** 2 + (out[p, 3] - green) ** 2 + (out[p, 4] - blue) ** 2
        goes_on[p] = moved > 0 and moved + recoloured > 1
    return out, goes_on


@lru_cache(1)
def _compiled_step() -> Callable:
    """Compile `_mean_shift_step` and the functions it calls.

    The machine code is kept beside the module or in the user's cache folder. Where neither can be
    written, every process compiles anew.
    """
    import numba
    from numba.extending import register_jitable

    for function in (_fill_band, _sum_window, _same_colour):
        register_jitable(function)
    try:
        return numba.njit(cache=True, nogil=True)(_mean_shift_step)
    except RuntimeError:  # numba found no folder to write in
        return numba.njit(nogil=True)(_mean_shift_step)


def _shift_pixels(
    img: np.ndarray,  # (h, w, 3) uint8
    mask: np.ndarray,  # (h, w) bool, the pixels to move
    reach: float,  # spatial radius in pixels
    r2: int,  # squared colour radius
) -> np.ndarray:  # (n, 3) uint8, one row per pixel of mask
    "Move pixels by up to five steps and return the colours where they stop."
    planes, slots, spans = _mean_shift_inputs(img, reach)
    state = np.hstack([np.argwhere(mask), img[mask]]).astype(np.int32)
    order = np.arange(len(state))
    for _ in range(5):
        state, goes_on = _compiled_step()(planes, state, order, slots, spans, np.int32(r2))
        order = np.flatnonzero(goes_on)
        order = order[np.argsort(state[order, 0], kind='stable')]
    return state[:, 2:].astype(np.uint8)


def _near_edges(coarse: np.ndarray, shape: tuple, r2: int) -> np.ndarray:  # (h, w) bool
    "Mark the pixels of a full image of this shape that lie at an edge of the coarse result."
    (h, w), mask = coarse.shape[:2], np.zeros(shape[:2], np.uint8)
    if min(h, w) < 3:
        return mask.astype(bool)
    colours, edge = coarse.astype(int), False
    for y, x in np.ndindex(3, 3):
        gap = colours[y : y + h - 2, x : x + w - 2] - colours[1:-1, 1:-1]
        edge |= (gap**2).sum(-1) >= max(r2, 16)
    mask[3 : 2 * h - 2 : 2, 1 : 2 * w - 4 : 2] = edge
    return cv2.dilate(mask, None).astype(bool)


def mean_shift(img: np.ndarray, i: float, rng, s: float) -> np.ndarray:
    "Paint flat patches with hard borders, equal to OpenCV's to the byte."
    radius = int(40 * i)
    reach = radius if s == 1 else max(1.0, radius * s)
    if reach < 5:
        return cv2.pyrMeanShiftFiltering(img, reach, radius)
    half = cv2.pyrDown(img)
    everywhere = np.ones(half.shape[:2], bool)
    coarse = _shift_pixels(half, everywhere, reach / 2, radius**2).reshape(half.shape)
    out = cv2.pyrUp(coarse, dstsize=img.shape[1::-1])
    mask = _near_edges(coarse, img.shape, radius**2)
    out[mask] = _shift_pixels(img, mask, reach, radius**2)
    return out
