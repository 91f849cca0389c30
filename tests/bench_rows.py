"""Rows, and functions that answer them, for runs in this process and in others."""

import io
import os
import time

import numpy as np
from PIL import Image

from clear_nb.core import rng
from clear_nb.rows import BenchmarkRow


def picture(k=0, w=40, h=30, kind='PNG'):
    "An encoded picture of noise."
    buffer = io.BytesIO()
    Image.fromarray(rng('adapters', k).integers(0, 256, (h, w, 3), np.uint8)).save(buffer, kind)
    return buffer.getvalue()


LEVELS, NAMES = ('clean', 'low', 'mid', 'hard'), ('graffiti', 'scan_lines', 'lens_blur')


def rows(n=6, benchmark='b', severities=LEVELS):
    "Questions with two options, two rows to a group, at every severity."
    return [
        BenchmarkRow(
            benchmark,
            f'{k}',
            f'Is it {k}?',
            'AB'[k % 2],
            picture(k % 3, 12, 9),
            dict(A='no', B='yes'),
            group=f'{k // 2}',
            corruption='' if s == 'clean' else NAMES[k % 3],
            severity=s,
        )
        for s in severities
        for k in range(n)
    ]


def guess(picture, prompt):  # right for odd numbers, and A for those below 4
    k = int(prompt.split('Is it ')[1].split('?')[0])
    return 'A' if k < 4 and k % 2 == 0 else 'B'


def slow(picture, prompt):  # writes down what it is asked, and takes its time
    with open(os.environ['ASKED'], 'a') as f:
        f.write(prompt.split('Is it ')[1][0])
    time.sleep(float(os.environ['PAUSE']))
    return guess(picture, prompt)


def silly(picture, prompt):
    return 'boat'
