"""Compare forward and backward of masked attention on a CPU: the fused kernel and the formula.

.venv/bin/python benchmarks/attention.py
"""

import statistics
import time

import torch
import torch.nn.functional as F

from clear_nb.core import torch_rng
from clear_nb.mot import attend_plain


def seconds(f, q, k, v):
    "Processor seconds of one forward and backward pass"
    start = time.process_time()
    f(q, k, v).sum().backward()
    return time.process_time() - start


def main(R=32, H=6, L=160, d=32, repeats=7):
    torch.set_num_threads(1)
    g = torch_rng('benchmark')
    mask = (torch.rand(R, L, L, generator=g) > 0.5) | torch.eye(L, dtype=torch.bool)
    for dtype in (torch.bfloat16, torch.float32):
        q, k, v = (
            torch.randn(R, H, L, d, generator=g).to(dtype).requires_grad_() for _ in range(3)
        )

        def fused(q, k, v):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])

        def plain(q, k, v):
            return attend_plain(q, k, v, mask)

        assert torch.allclose(
            fused(q, k, v).float(),
            plain(q, k, v).float(),
            atol=3e-2 if dtype == torch.bfloat16 else 1e-5,
        )
        ratios = [seconds(fused, q, k, v) / seconds(plain, q, k, v) for _ in range(repeats + 1)][1:]
        print(
            f'{str(dtype):15} fused / plain: median {statistics.median(ratios):.2f}, '
            f'{min(ratios):.2f} to {max(ratios):.2f}, R={R} H={H} L={L} d={d}'
        )


if __name__ == '__main__':
    main()
