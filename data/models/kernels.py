"""The functions of fused.py on a GPU: kernels.cu, compiled for the GPU at hand when first used, and started.

NVRTC compiles and the driver starts, both called through ctypes. NVRTC lies in every CUDA build of PyTorch, so that
nothing else is needed: no C compiler, no header of Python's or CUDA's, no CUDA toolkit. PyTorch's wrapper of the
same, torch.cuda._compile_kernel, is not used because it is private, compiles the whole file once per kernel, imports
setuptools and looks for a toolkit, and fails in a thread that has no CUDA context yet, as the one that runs a
backward may be.
"""

import ctypes
import functools
import math
import sys
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("kernels.cu")
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}  # as kernels.cu calls them
LANES, ROWS = 8, 32  # they stand in kernels.cu as well
THREADS, REDUCERS = LANES * ROWS, 128  # of a block
BLOCKS = 3  # per multiprocessor, that make sums: as many as run at once, because a second round would be half empty
STRETCH = 128  # pixels for a block that makes none


def geglu(p):
    p = p.contiguous()
    y = p.new_empty(*p.shape[:-1], p.shape[-1] // 2)
    _per_pack("geglu", y, p, y)
    return y


def geglu_backward(dy, p):
    dy, p = dy.contiguous(), p.contiguous()
    dp = torch.empty_like(p)
    _per_pack("geglu_backward", dy, dy, p, dp)
    return dp


def add(x, y, bias):
    x, y = _channels_last(x), _channels_last(y)
    out = torch.empty_like(x)
    _per_pack("add", out.permute(0, 2, 3, 1), x, y, bias, out)
    return out


def add_layer_norm(x, y, weight, bias, eps):
    """y may be None. -> sum, its norm, and for the backward mean and 1/σ of every row"""
    x, y = x.contiguous(), None if y is None else y.contiguous()
    total, out = x if y is None else torch.empty_like(x), torch.empty_like(x)
    start, rows, columns, threads = _per_row(x, y, weight, bias)
    mean, rstd = x.new_empty(2, rows, dtype=torch.float32)
    start("add_layer_norm", (rows,), threads, x, y, weight, bias, total, out, mean, rstd, columns, eps)
    return total, out, mean, rstd


def add_layer_norm_backward(dsum, dout, total, weight, bias, mean, rstd):
    dsum, dout = dsum.contiguous(), dout.contiguous()
    dx = torch.empty_like(total)
    start, rows, columns, threads = _per_row(total, dsum, dout, weight)
    start("add_layer_norm_backward", (rows,), threads, dsum, dout, total, weight, mean, rstd, dx, columns)
    return dx


def group_norm(x, shift, weight, bias, groups, eps, silu):
    """-> y, and for the backward mean and 1/σ (B, groups), scale and offset (B, C)"""
    x = _channels_last(x)
    start, size, grid, stretch = _per_stretch(x, shift, weight, bias)
    (mean, rstd), (scale, offset) = (x.new_empty(2, len(x), n, dtype=torch.float32) for n in (groups, x.shape[1]))
    sums, y, shift = _sums(x, grid), torch.empty_like(x), _shift(shift)
    start("group_norm_sums", grid, THREADS, x, *shift, sums, *size, stretch)
    given = sums, *shift, weight, bias, mean, rstd, scale, offset
    start("group_norm_line", (groups, len(x)), REDUCERS, *given, *size, grid[0], eps)
    start("group_norm", _short(size, grid), THREADS, x, scale, offset, y, *size, STRETCH, silu)
    return y, mean, rstd, scale, offset


def group_norm_backward(dy, x, shift, mean, rstd, scale, offset, weight, bias, groups, eps, silu):
    dy, x = _channels_last(dy), _channels_last(x)
    start, size, grid, stretch = _per_stretch(x, dy)
    slope, constant = x.new_empty(2, *x.shape[:2], dtype=torch.float32)
    sums, dx = _sums(x, grid), torch.empty_like(x)
    start("group_norm_backward_sums", grid, THREADS, dy, x, scale, offset, sums, *size, stretch, silu)
    given = sums, *_shift(shift), weight, bias, mean, rstd, slope, constant
    start("group_norm_backward_line", (groups, len(x)), REDUCERS, *given, *size, grid[0])
    given = dy, x, scale, offset, slope, constant, dx
    start("group_norm_backward", _short(size, grid), THREADS, *given, *size, STRETCH, silu)
    return dx


def _shift(shift):
    """shift, and how far one image's is from the next one's"""
    return shift, 0 if shift is None or shift.ndim == 1 else shift.stride(0)


def _sums(x, grid):
    """Two per image, stretch and channel."""
    return x.new_empty(len(x), grid[0], 2, x.shape[1], dtype=torch.float32)


def _short(size, grid):
    """The grid for STRETCH pixels a block."""
    return -(-size[0] // STRETCH), *grid[1:]


def _channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def _per_pack(name, rows, *tensors):
    """Start a kernel in which a thread makes one pack of `rows`."""
    n = _pack(rows.shape[-1], *tensors)
    packs = rows.numel() // n
    _kernels(rows.device, rows.dtype, n)(name, (-(-packs // THREADS),), THREADS, *tensors, packs, rows.shape[-1] // n)


def _per_row(x, *tensors):
    """For kernels in which a block makes a row of x, of up to 1,024 packs. -> their starter, rows, columns, threads"""
    columns = x.shape[-1]
    n = _pack(columns, x, *tensors)
    return _kernels(x.device, x.dtype, n), x.numel() // columns, columns, -(-columns // (32 * n)) * 32


def _per_stretch(x, *tensors):
    """For kernels in which a block takes a stretch of pixels. -> their starter, (pixels, channels), sums' grid, stretch

    For sums the stretches are as long as leave something to do for all of the GPU, so that there are few to add up.
    """
    images, channels, height, width = x.shape
    n, pixels = _pack(channels, x, *tensors), height * width
    across = -(-channels // (LANES * n))
    blocks = BLOCKS * torch.cuda.get_device_properties(x.device).multi_processor_count
    stretches = max(1, min(blocks // (across * images), -(-pixels // ROWS)))
    stretch = -(-pixels // (stretches * ROWS)) * ROWS
    return _kernels(x.device, x.dtype, n), (pixels, channels), (-(-pixels // stretch), across, images), stretch


def _pack(width, *tensors):
    """How many neighbours a thread moves at once, in rows `width` long: 16 bytes of them, or what fits."""
    dtype, tensors = tensors[0].dtype, [t for t in tensors if t is not None]
    assert all(t.dtype == dtype for t in tensors), "kernels.cu is compiled for one type"
    n = math.gcd(width, 16 // dtype.itemsize)
    return n if all(t.data_ptr() % (n * dtype.itemsize) == 0 for t in tensors) else 1


@functools.cache
def _kernels(device, dtype, n):
    """kernels.cu for one GPU, type of numbers and pack. -> start(name, grid, threads, *args), on the current stream

    args are the kernel's parameters: tensors or None for its pointers, int and float. A grid may omit its last sides.
    """
    cuda, context, module = _library("nvcuda.dll", "libcuda.so.1"), ctypes.c_void_p(), ctypes.c_void_p()
    major, minor = torch.cuda.get_device_capability(device)
    binary, _ = compiled(f"sm_{major}{minor}", TYPES[dtype], n)

    def call(function, *args):
        if code := cuda[function](*args):
            text = ctypes.c_char_p()
            cuda.cuGetErrorString(code, ctypes.byref(text))
            raise RuntimeError(f"{function}: {(text.value or b'error %d' % code).decode()}")

    @functools.cache
    def function(name):
        found = ctypes.c_void_p()
        call("cuModuleGetFunction", ctypes.byref(found), module, name.encode())
        return found

    def start(name, grid, threads, *args):
        values = [_KINDS[type(arg)](arg) for arg in args]
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        call("cuCtxSetCurrent", context)  # a thread of autograd's may have none
        stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
        sides = (*grid, 1, 1)[:3]
        call("cuLaunchKernel", function(name), *sides, threads, 1, 1, 0, stream, pointers, None)

    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device.index)
    call("cuCtxSetCurrent", context)
    call("cuModuleLoadData", ctypes.byref(module), binary)
    return start


_KINDS = {  # Python's types as a kernel's parameters
    int: ctypes.c_int,
    bool: ctypes.c_int,
    float: ctypes.c_float,
    type(None): ctypes.c_void_p,
    torch.Tensor: lambda tensor: ctypes.c_void_p(tensor.data_ptr()),
    torch.nn.Parameter: lambda tensor: ctypes.c_void_p(tensor.data_ptr()),
}


def compiled(architecture, number, n, *options):
    """kernels.cu for an architecture ("sm_75"); no GPU is needed. -> machine code, and what the compiler said"""
    major = torch.version.cuda.split(".")[0]
    nvrtc, program = _library(f"nvrtc64_{major}0_0.dll", f"libnvrtc.so.{major}"), ctypes.c_void_p()
    options = [f"--gpu-architecture={architecture}", "--ftz=true", f"-DNUMBER={number}", f"-DN={n}", *options]

    def get(what):
        size = ctypes.c_size_t()
        nvrtc[f"nvrtcGet{what}Size"](program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        nvrtc[f"nvrtcGet{what}"](program, text)
        return text.raw

    nvrtc.nvrtcCreateProgram(ctypes.byref(program), SOURCE.read_bytes(), SOURCE.name.encode(), 0, None, None)
    words = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    failed = nvrtc.nvrtcCompileProgram(program, len(options), words)
    log = get("ProgramLog").decode().rstrip("\0")
    if failed:
        raise RuntimeError(f"{SOURCE.name} does not compile for {architecture}:\n{log}")
    binary = get("CUBIN")
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return binary, log


def _library(windows, linux):
    return ctypes.CDLL(windows if sys.platform == "win32" else linux)
