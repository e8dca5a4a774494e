# SPDX-License-Identifier: Apache-2.0
"""The specification: what every kernel computes, in plain torch. Tests and benchmarks compare against this file.

Nothing here is fast, and nothing here shares code or constants with the kernels. Arithmetic is in the dtype of the
arguments, so pass float64 for a reference value.
"""

import torch
from torch import Tensor

NF4_CODES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""QLoRA (arXiv 2305.14314), appendix E: quantiles of N(0, 1), normalised to [-1, 1], with an exact zero."""

NESTED_BLOCK_SIZE = 256


# ---- the adapted linear layer ---------------------------------------------------------------------------------------


def adapted_linear(
    x: Tensor,
    weight: Tensor,
    A: Tensor | None = None,
    B: Tensor | None = None,
    *,
    lam: Tensor | None = None,
    out_scale: Tensor | None = None,
    bias: Tensor | None = None,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """``y = out_scale * (x W^T + s * ((drop(x) A^T) * lam) B^T) + bias``.

    Shapes: x [..., in], weight [out, in], A [r, in], B [out, r], lam [r], out_scale [out], bias [out]; y [..., out].
    Gradients are autograd's. LoRA: Hu et al. 2021, arXiv 2106.09685, section 4.1.
    """
    z = x @ weight.T
    if A is not None and B is not None:
        h = dropout(x, dropout_p, seed) @ A.T
        u = h if lam is None else h * lam
        z = z + scaling * (u @ B.T)
    y = z if out_scale is None else out_scale * z
    return y if bias is None else y + bias


def multi_lora_linear(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    adapter_index: Tensor,
    *,
    scaling: Tensor | float = 1.0,
    ranks: Tensor | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """``y = x W^T + s_a (drop(x) A_a^T) B_a^T + bias``, a the adapter of the row; without the middle term where a = -1.

    Shapes: x [..., in], weight [out, in], A [adapters, r, in], B [adapters, out, r], bias [out]; y [..., out].
    adapter_index: of x's leading shape, or [x.shape[0]]; scaling: a number or [adapters]; ranks: [adapters], past which
    rows of A and columns of B do not count. S-LoRA: Sheng et al. 2023, arXiv 2311.03285.
    """
    y = x @ weight.T
    index = adapter_index.reshape(adapter_index.shape + (1,) * (x.dim() - 1 - adapter_index.dim()))
    index = index.expand(x.shape[:-1])
    dropped = dropout(x, dropout_p, seed)
    for a in range(A.shape[0]):
        r = A.shape[1] if ranks is None else int(ranks[a])
        s = scaling[a] if isinstance(scaling, Tensor) else scaling
        delta = s * ((dropped @ A[a, :r].T) @ B[a, :, :r].T)
        y = y + torch.where((index == a)[..., None], delta, torch.zeros_like(delta))
    return y if bias is None else y + bias


# ---- dropout --------------------------------------------------------------------------------------------------------


def dropout(x: Tensor, p: float, seed: int) -> Tensor:
    """``x / (1 - p)`` where kept, else 0; p is rounded to a multiple of 1/32768. A row is one last axis of x."""
    threshold = min(int(p * 32768 + 0.5), 32767)
    if threshold == 0:
        return x
    rows, columns = x.reshape(-1, x.shape[-1]).shape
    keep = dropout_mask(rows, columns, threshold, seed).reshape(x.shape)
    return x * keep.to(x.dtype) * (32768 / (32768 - threshold))


def dropout_mask(rows: int, columns: int, threshold: int, seed: int) -> Tensor:
    """Bool [rows, columns]: one Philox4x32-7 call per (row, 8 columns), eight 15-bit lanes, low half-word first."""
    row = torch.arange(rows, dtype=torch.int64)[:, None]
    chunk = torch.arange((columns + 7) // 8, dtype=torch.int64)[None, :]
    words = philox4x32(row & 0xFFFFFFFF, chunk, row >> 32, torch.zeros_like(row), seed, rounds=7)
    lanes = torch.stack([lane for word in words for lane in (word & 0x7FFF, (word >> 16) & 0x7FFF)], dim=-1)
    return (lanes >= threshold).flatten(1)[:, :columns]


def philox4x32(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, seed: int, rounds: int) -> tuple[Tensor, ...]:
    """The counter-based generator of Salmon et al. 2011 (SC'11) on int64 tensors that hold 32-bit words."""
    low = 0xFFFFFFFF
    c0, c1, c2, c3 = torch.broadcast_tensors(c0, c1, c2, c3)
    k0, k1 = seed & low, (seed >> 32) & low
    for _ in range(rounds):
        (high0, low0), (high1, low1) = _multiply_32(c0, 0xD2511F53), _multiply_32(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0, c1, c2, c3


def _multiply_32(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low words of a 32 x 32 bit product. The full product does not fit int64, so b goes in two halves."""
    upper, lower = a * (b >> 16), a * (b & 0xFFFF)  # 48 bits each
    middle = (lower >> 16) + (upper & 0xFFFF)
    high = (upper >> 16) + (middle >> 16)
    return high, ((middle & 0xFFFF) << 16) | (lower & 0xFFFF)


# ---- NF4 ------------------------------------------------------------------------------------------------------------


def quantize_nf4(w: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """``(packed, absmax)`` of w, any shape: uint8 [ceil(n / 2)], even element in the high nibble; float32 [blocks]."""
    flat = w.detach().reshape(-1).float()
    n = flat.numel()
    blocks = (n + block_size - 1) // block_size
    padded = torch.zeros(blocks * block_size)
    padded[:n] = flat
    rows = padded.reshape(blocks, block_size)
    absmax = rows.abs().amax(dim=1) if blocks else torch.zeros(0)
    divisor = absmax.clamp(min=1e-38)[:, None]
    scaled = rows * (1.0 / divisor)
    if n % block_size:  # in the shorter last block bitsandbytes divides, and stores the divisor
        scaled[-1] = rows[-1] / divisor[-1]
        absmax[-1] = divisor[-1, 0]
    codes = torch.tensor(NF4_CODES)
    thresholds = (codes[1:] + codes[:-1]) / 2
    # right=False: a value equal to a threshold goes to the lower code
    code = torch.bucketize(scaled.reshape(-1)[:n].contiguous(), thresholds, right=False).to(torch.uint8)
    if n % 2:
        code = torch.cat([code, torch.tensor([7], dtype=torch.uint8)])
    return (code[0::2] << 4) | code[1::2], absmax


def dequantize_nf4(
    packed: Tensor, absmax: Tensor, block_size: int, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """fp32 ``code * absmax``, rounded once to dtype."""
    n = 1
    for size in shape:
        n *= size
    flat = packed.reshape(-1)
    code = torch.stack([flat >> 4, flat & 15], dim=1).reshape(-1)[:n].long()
    scale = absmax.repeat_interleave(block_size)[:n]
    return (torch.tensor(NF4_CODES)[code] * scale).to(dtype).reshape(shape)


def dynamic_codes() -> Tensor:
    """The signed 8-bit dynamic code of bitsandbytes, float32 [256], sorted (Dettmers 2016, arXiv 1511.04561)."""
    codes = [0.0, 1.0]
    for i in range(7):
        boundaries = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        means = (boundaries[:-1] + boundaries[1:]) / 2.0
        codes += ((10 ** (i - 6)) * means).tolist() + (-(10 ** (i - 6)) * means).tolist()
    return torch.tensor(sorted(codes))


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantization (QLoRA, section 3): codes uint8 [n], nested_absmax float32 [ceil(n / 256)], offset []."""
    offset = absmax.double().mean().float() if absmax.numel() else torch.tensor(0.0)
    codes, nested = [], []
    midpoints = (dynamic_codes()[1:] + dynamic_codes()[:-1]) / 2
    for block in (absmax - offset).split(NESTED_BLOCK_SIZE) if absmax.numel() else ():
        largest = block.abs().max()
        inverse = 1.0 / largest if largest > 0 else torch.tensor(0.0)
        codes.append(torch.bucketize(block * inverse, midpoints, right=False).to(torch.uint8))
        nested.append(largest)
    if not codes:
        return torch.zeros(0, dtype=torch.uint8), torch.zeros(0), offset
    return torch.cat(codes), torch.stack(nested), offset


def dequantize_absmax(codes: Tensor, nested_absmax: Tensor, offset: Tensor) -> Tensor:
    """``dynamic_codes[code] * nested_absmax + offset``, two fp32 roundings."""
    scale = nested_absmax.repeat_interleave(NESTED_BLOCK_SIZE)[: codes.numel()]
    return dynamic_codes()[codes.long()] * scale + offset


# ---- truncation ------------------------------------------------------------------------------------------------------


def truncated_svd(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """``(nearest, S)``: the matrix of at most that rank nearest to delta [out, in], and all singular values of delta.

    ``||delta - nearest||_F^2`` is the sum of the squares of ``S[rank:]``, the least any matrix of that rank has
    (Eckart and Young 1936).
    """
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank], S


# ---- AdaLoRA's rank allocation (Zhang et al. 2023, arXiv 2303.10512) -------------------------------------------------


def update_importance(
    parameter: Tensor, grad: Tensor | None, sensitivity: Tensor, uncertainty: Tensor, beta1: float, beta2: float
) -> tuple[Tensor, Tensor]:
    """The new ``(sensitivity, uncertainty)`` of a parameter, all of one shape: equations 8 to 10.

    ``i = |p g|``, ``sensitivity = b1 sensitivity + (1 - b1) i``, ``uncertainty = b2 uncertainty + (1 - b2) |i -
    sensitivity|`` with the new sensitivity. No gradient counts as zero.
    """
    importance = torch.zeros_like(parameter) if grad is None else (parameter * grad).abs()
    sensitivity = beta1 * sensitivity + (1 - beta1) * importance
    uncertainty = beta2 * uncertainty + (1 - beta2) * (importance - sensitivity).abs()
    return sensitivity, uncertainty


def triplet_scores(A: Tensor, E: Tensor, B: Tensor) -> Tensor:
    """Scores [r] of the triplets of a layer from those of its elements, ``sensitivity * uncertainty``, equation 7.

    A: [r, in], E: [r, 1], B: [out, r]. The mean over A's row and that over B's column are added to E's own.
    """
    return E.reshape(-1) + A.mean(dim=1) + B.mean(dim=0)


def rank_mask(scores: Tensor, budget: int, exact: bool = False) -> Tensor:
    """Bool [triplets]: which to keep. The threshold is the ``triplets - budget`` smallest score, NaN the largest.

    exact False: those above it, as HF PEFT masks by ``<= threshold``; True: exactly budget, of a tie the first.
    """
    values = scores.tolist()
    rank = [(v != v, 0.0 if v != v else v) for v in values]
    ascending = sorted(range(len(values)), key=lambda i: (rank[i], -i))
    pruned = ascending[: max(len(values) - budget, 0)]
    if pruned and not exact:
        pruned = [i for i in ascending if rank[i] <= rank[pruned[-1]]]
    keep = torch.ones(len(values), dtype=torch.bool)
    keep[pruned] = False
    return keep


def orthogonality(A: list[Tensor], B: list[Tensor], squared: bool = False) -> Tensor:
    """How far the factors are from orthonormal: rows of A [r, in], columns of B [out, r], over all layers.

    False: mean over all factors of ``||A A^T - I||_F`` and ``||B^T B - I||_F``, as in HF PEFT and the published
    code; True: the sum of their squares, equation 4.
    """
    grams = [a @ a.T for a in A] + [b.T @ b for b in B]
    norms = torch.stack([torch.linalg.norm(g - torch.eye(g.shape[0], dtype=g.dtype)) for g in grams])
    return norms.square().sum() if squared else norms.mean()
