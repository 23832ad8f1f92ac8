"""The functions of fused.py, each in one to three kernels of our own. Read fused.py first, it says what they compute.

GEGLU reads its input once. Group norm works on channels_last images, where a pixel's channels lie side by side. It sums
each channel over a stretch of pixels, then those sums over each group, and then computes the result: each number is
read twice and written once. All arithmetic is fp32. Sums have a fixed order, so that two runs give the same bits.
"""

import torch
import triton
import triton.language as tl

NUMBERS = 4096  # in a program's tile; half as many of each image where it reads two
CHANNELS, SUMMED_CHANNELS = 128, 64  # across a tile; the second where sums are made
PROGRAMS = 512  # about as many as fill a large GPU
ROWS = 64  # of sums that _reduce adds at once
COLUMNS = 1024  # that a program of _geglu computes


def geglu(p):
    out = p.new_empty(*p.shape[:-1], p.shape[-1] // 2)
    columns = out.shape[-1]
    _geglu[out.numel() // columns, triton.cdiv(columns, COLUMNS)](p, out, out, columns, False, COLUMNS)
    return out


def geglu_backward(dy, p):
    dp, columns = torch.empty_like(p), dy.shape[-1]
    _geglu[dy.numel() // columns, triton.cdiv(columns, COLUMNS)](p, dy.contiguous(), dp, columns, True, COLUMNS)
    return dp


@triton.jit
def _geglu(p, y, out, columns, BACKWARD: tl.constexpr, COLUMNS: tl.constexpr):
    """out = value · gelu(gate). For BACKWARD, y holds the gradient of that, and out gets those of (value, gate)."""
    row, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = c < columns
    value = tl.load(p + 2 * row * columns + c, inside, 0).to(tl.float32)
    gate = tl.load(p + (2 * row + 1) * columns + c, inside, 0).to(tl.float32)
    below = 0.5 * (1 + tl.erf(gate * 0.7071067811865476))  # the share of a standard normal below the gate
    if BACKWARD:
        dy = tl.load(y + row * columns + c, inside, 0).to(tl.float32)
        density = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
        tl.store(out + 2 * row * columns + c, dy * gate * below, inside)
        tl.store(out + (2 * row + 1) * columns + c, dy * value * (below + gate * density), inside)
    else:
        tl.store(out + row * columns + c, value * gate * below, inside)


def add(x, y, bias):
    x, y = (t.contiguous(memory_format=torch.channels_last) for t in (x, y))
    out, (grid, tile) = torch.empty_like(x), _tiles(x, 1)
    _add[grid](x, y, bias, out, *_sizes(x, 1)[:2], *tile)
    return out


@triton.jit
def _add(x, y, bias, out, pixels, channels, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """One tile of x + y + bias."""
    i, c = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS), tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    at = (tl.program_id(2).to(tl.int64) * pixels + i[:, None]) * channels + c[None, :]
    mask = (i[:, None] < pixels) & (c < channels)[None, :]
    total = tl.load(x + at, mask, 0).to(tl.float32) + tl.load(y + at, mask, 0).to(tl.float32)
    tl.store(out + at, total + tl.load(bias + c, c < channels, 0).to(tl.float32)[None, :], mask)


def group_norm(x, shift, weight, bias, groups, eps, silu):
    x = x.contiguous(memory_format=torch.channels_last)
    mean, rstd = _statistics(x, shift, x, x, x, weight, bias, groups, eps, silu, False)
    y, (grid, tile) = torch.empty_like(x), _tiles(x, 1)
    _apply[grid](x, *_shift(shift), x, y, mean, rstd, mean, mean, weight, bias, *_sizes(x, groups), silu, False, *tile)
    return y, mean, rstd


def group_norm_backward(dy, x, shift, mean, rstd, weight, bias, groups, eps, silu):
    x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    first, second = _statistics(x, shift, dy, mean, rstd, weight, bias, groups, eps, silu, True)
    dx, (grid, tile) = torch.empty_like(x), _tiles(x, 2)
    _apply[grid](
        x, *_shift(shift), dy, dx, mean, rstd, first, second, weight, bias, *_sizes(x, groups), silu, True, *tile
    )
    return dx


def _shift(shift):
    """-> shift, and how far the next image's shift is from this one's"""
    return shift, 0 if shift is None or shift.ndim == 1 else shift.stride(0)


def _sizes(x, groups):
    """-> pixels, channels, channels per group"""
    return x.shape[2] * x.shape[3], x.shape[1], x.shape[1] // groups


def _tiles(x, images):
    """-> how many tiles cover x, and the pixels and channels of one, for a kernel that reads so many `images`"""
    pixels, channels, _ = _sizes(x, 1)
    tall = NUMBERS // CHANNELS // images
    return (triton.cdiv(pixels, tall), triton.cdiv(channels, CHANNELS), len(x)), (tall, CHANNELS)


def _statistics(x, shift, dy, mean, rstd, weight, bias, groups, eps, silu, backward):
    """-> mean and 1/σ of each image and group, or the two means that the backward subtracts: (B, groups) fp32 each"""
    pixels, channels, per_group = _sizes(x, groups)
    tall, across = NUMBERS // SUMMED_CHANNELS // (1 + backward), triton.cdiv(channels, SUMMED_CHANNELS)
    stretches = max(1, min(PROGRAMS // (across * len(x)), triton.cdiv(pixels, tall)))
    stretch = triton.cdiv(triton.cdiv(pixels, stretches), tall) * tall
    stretches = triton.cdiv(pixels, stretch)
    sums = x.new_empty(len(x), stretches, 2, channels, dtype=torch.float32)
    numbers = pixels, channels, per_group, stretch, silu, backward, tall, SUMMED_CHANNELS
    _sums[stretches, across, len(x)](x, *_shift(shift), dy, sums, mean, rstd, weight, bias, *numbers)
    first, second = x.new_empty(2, len(x), groups, dtype=torch.float32)
    width = triton.next_power_of_2(per_group)
    _reduce[groups, len(x)](
        sums, first, second, stretches, channels, per_group, pixels * per_group, eps, backward, ROWS, width
    )
    return first, second


@triton.jit
def _load(x, shift, stride, image, at, c, mask, inside):
    """x + shift, and 0 outside of the image"""
    v = tl.load(x + at, mask, 0).to(tl.float32)
    if shift is not None:
        v = tl.where(mask, v + tl.load(shift + image * stride + c, inside, 0).to(tl.float32)[None, :], 0)
    return v


@triton.jit
def _gradient(x, dy, mean, rstd, weight, bias, SILU: tl.constexpr):
    """-> the normalised x, and the gradient that reaches it"""
    normal = (x - mean) * rstd
    if SILU:
        z = normal * weight + bias
        s = tl.sigmoid(z)
        dy = dy * s * (1 + z * (1 - s))
    return normal, dy * weight


@triton.jit(do_not_specialize=["stride", "per_group", "stretch"])
def _sums(
    x,
    shift,
    stride,
    dy,
    sums,
    mean,
    rstd,
    weight,
    bias,
    pixels,
    channels,
    per_group,
    stretch,
    SILU: tl.constexpr,
    BACKWARD: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Σ x and Σ x² of each channel over one stretch of pixels, or for BACKWARD Σ g and Σ g x̂."""
    c, image = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS), tl.program_id(2).to(tl.int64)
    inside = c < channels
    first, second = tl.zeros((PIXELS, CHANNELS), tl.float32), tl.zeros((PIXELS, CHANNELS), tl.float32)
    if BACKWARD:
        group = image * (channels // per_group) + c // per_group
        m, s = tl.load(mean + group, inside, 0)[None, :], tl.load(rstd + group, inside, 0)[None, :]
        w = tl.load(weight + c, inside, 0).to(tl.float32)[None, :]
        b = tl.load(bias + c, inside, 0).to(tl.float32)[None, :]
    for start in range(0, stretch, PIXELS):
        i = tl.program_id(0) * stretch + start + tl.arange(0, PIXELS)
        at = (image * pixels + i[:, None]) * channels + c[None, :]
        mask = (i[:, None] < pixels) & inside[None, :]
        v = _load(x, shift, stride, image, at, c, mask, inside)
        if BACKWARD:
            normal, g = _gradient(v, tl.load(dy + at, mask, 0).to(tl.float32), m, s, w, b, SILU)
            first, second = first + g, second + g * normal
        else:
            first, second = first + v, second + v * v
    at = (image * tl.num_programs(0) + tl.program_id(0)) * 2 * channels + c
    tl.store(sums + at, tl.sum(first, 0), inside)
    tl.store(sums + at + channels, tl.sum(second, 0), inside)


@triton.jit(do_not_specialize=["per_group", "stretches", "count"])
def _reduce(
    sums,
    first,
    second,
    stretches,
    channels,
    per_group,
    count,
    eps,
    BACKWARD: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The mean over a group's `count` numbers and its 1/σ, or for BACKWARD both means."""
    group, image, j = tl.program_id(0), tl.program_id(1), tl.arange(0, WIDTH)
    a, b = tl.zeros((WIDTH,), tl.float32), tl.zeros((WIDTH,), tl.float32)
    for start in range(0, stretches, ROWS):
        i = start + tl.arange(0, ROWS)
        at = (image * stretches + i[:, None]) * 2 * channels + group * per_group + j[None, :]
        mask = (i[:, None] < stretches) & (j[None, :] < per_group)
        a, b = a + tl.sum(tl.load(sums + at, mask, 0), 0), b + tl.sum(tl.load(sums + at + channels, mask, 0), 0)
    a, b = tl.sum(a, 0) / count, tl.sum(b, 0) / count
    if not BACKWARD:
        b = tl.rsqrt(tl.maximum(b - a * a, 0.0) + eps)
    tl.store(first + image * tl.num_programs(0) + group, a)
    tl.store(second + image * tl.num_programs(0) + group, b)


@triton.jit(do_not_specialize=["stride", "per_group"])
def _apply(
    x,
    shift,
    stride,
    dy,
    out,
    mean,
    rstd,
    first,
    second,
    weight,
    bias,
    pixels,
    channels,
    per_group,
    SILU: tl.constexpr,
    BACKWARD: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """One tile of y, or for BACKWARD of x's gradient."""
    i, c = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS), tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    image, inside = tl.program_id(2).to(tl.int64), c < channels
    group = image * (channels // per_group) + c // per_group
    m, s = tl.load(mean + group, inside, 0)[None, :], tl.load(rstd + group, inside, 0)[None, :]
    w, b = tl.load(weight + c, inside, 0).to(tl.float32)[None, :], tl.load(bias + c, inside, 0).to(tl.float32)[None, :]
    at = (image * pixels + i[:, None]) * channels + c[None, :]
    mask = (i[:, None] < pixels) & inside[None, :]
    v = _load(x, shift, stride, image, at, c, mask, inside)
    if BACKWARD:
        normal, g = _gradient(v, tl.load(dy + at, mask, 0).to(tl.float32), m, s, w, b, SILU)
        y = s * (g - tl.load(first + group, inside, 0)[None, :] - normal * tl.load(second + group, inside, 0)[None, :])
    else:
        y = (v - m) * s * w + b
        if SILU:
            y = y * tl.sigmoid(y)
    tl.store(out + at, y, mask)
