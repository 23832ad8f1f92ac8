"""The functions of fused.py on a GPU: kernels.cu, compiled for the GPU at hand when first used, and started.

NVRTC compiles, which lies in every CUDA build of PyTorch, and the driver starts, both called through ctypes. So no C compiler
is asked for, no header of Python's or CUDA's and no toolkit, and every GPU that PyTorch runs on will do. PyTorch has a wrapper
of the same, torch.cuda._compile_kernel, which is not used because it is private, compiles the whole file once per kernel,
imports setuptools, and fails in a thread that has no CUDA context yet, as a backward's may be.
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
BLOCKS = 512  # about as many as fill a large GPU
STRETCH = 128  # pixels that a block without sums takes


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
    """-> y, and for the backward slope and offset (B, C): x · slope + offset is x normalised"""
    x = _channels_last(x)
    start, size, grid, stretch = _per_stretch(x, shift, weight, bias)
    (slope, offset), y = x.new_empty(2, *x.shape[:2], dtype=torch.float32), torch.empty_like(x)
    sums = x.new_empty(len(x), grid[0], 2, x.shape[1], dtype=torch.float32)
    shift = shift, 0 if shift is None or shift.ndim == 1 else shift.stride(0)
    start("group_norm_sums", grid, THREADS, x, *shift, sums, *size, stretch)
    start("group_norm_line", (groups, len(x)), REDUCERS, sums, *shift, slope, offset, *size, grid[0], eps)
    grid = -(-size[0] // STRETCH), *grid[1:]
    start("group_norm", grid, THREADS, x, slope, offset, weight, bias, y, *size, STRETCH, silu)
    return y, slope, offset


def group_norm_backward(dy, x, shift, slope, offset, weight, bias, groups, eps, silu):
    dy, x = _channels_last(dy), _channels_last(x)
    start, size, grid, stretch = _per_stretch(x, dy, weight, bias)
    (constant, along), dx = x.new_empty(2, *x.shape[:2], dtype=torch.float32), torch.empty_like(x)
    sums = x.new_empty(len(x), grid[0], 2, x.shape[1], dtype=torch.float32)
    given = dy, x, slope, offset, weight, bias
    start("group_norm_backward_sums", grid, THREADS, *given, sums, *size, stretch, silu)
    start("group_norm_backward_line", (groups, len(x)), REDUCERS, sums, constant, along, *size, grid[0])
    grid = -(-size[0] // STRETCH), *grid[1:]
    start("group_norm_backward", grid, THREADS, *given, constant, along, dx, *size, STRETCH, silu)
    return dx


def _channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def _per_pack(name, rows, *tensors):
    """Start a kernel in which a thread makes one pack of `rows`."""
    n = _pack(rows.shape[-1], *tensors)
    packs = rows.numel() // n
    _kernels(rows.device, rows.dtype, n)(name, (-(-packs // THREADS),), THREADS, *tensors, packs, rows.shape[-1] // n)


def _per_row(x, *tensors):
    """For kernels that give a block one row of x, of up to 1,024 packs. -> what starts them, rows, columns, threads of a block"""
    columns = x.shape[-1]
    n = _pack(columns, x, *tensors)
    return _kernels(x.device, x.dtype, n), x.numel() // columns, columns, -(-columns // (32 * n)) * 32


def _per_stretch(x, *tensors):
    """For kernels that give each block a stretch of pixels. -> what starts them, (pixels, channels), and for sums grid, stretch

    Sums take long stretches, so that there are few of them, but enough for every part of the GPU.
    """
    images, channels, height, width = x.shape
    n, pixels = _pack(channels, x, *tensors), height * width
    across = -(-channels // (LANES * n))
    stretches = max(1, min(BLOCKS // (across * images), -(-pixels // ROWS)))
    stretch = -(-pixels // (stretches * ROWS)) * ROWS
    return _kernels(x.device, x.dtype, n), (pixels, channels), (-(-pixels // stretch), across, images), stretch


def _pack(width, *tensors):
    """How many neighbours a thread moves at once, in rows `width` long: 16 bytes of them, or what fits."""
    size = tensors[0].itemsize
    n = math.gcd(width, 16 // size)
    return n if all(t is None or t.data_ptr() % (n * size) == 0 for t in tensors) else 1


@functools.cache
def _kernels(device, dtype, n):
    """kernels.cu for one GPU, type of numbers and pack. -> start(name, grid, threads, *args), on the current stream

    args as the kernel's parameters: tensors or None for its pointers, int and float. The grid may leave its last sides out.
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
    """kernels.cu for an architecture ("sm_75"), without a GPU. -> machine code, and what the compiler said. bytes, str"""
    major = torch.version.cuda.split(".")[0]
    nvrtc, program = _library(f"nvrtc64_{major}0_0.dll", f"libnvrtc.so.{major}"), ctypes.c_void_p()
    options = [f"--gpu-architecture={architecture}", f"-DNUMBER={number}", f"-DN={n}", *options]

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
