"""The base with fewer kernels: diffusers' own modules compute the same, and so does kernels.cu on a GPU."""

import copy
import ctypes
import functools
import importlib.metadata
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import PIPELINE, inject_filled, predict, unet_inputs
from diffusers import AutoencoderKL

from data.models import fused, kernels
from data.models.fused import Plain

CPU = torch.device("cpu")
SHAPES = [
    (2, 64, 6, 5, 8),
    (1, 320, 16, 16, 32),
    (2, 96, 40, 33, 32),
    (1, 1920, 32, 32, 32),
    (3, 30, 7, 9, 5),
]  # B, C, h, w, groups


def test_the_fused_unet_equals_diffusers_own(unet):
    """Output and every LoRA gradient, in fp64, because there only a wrong formula makes a difference."""
    plain = copy.deepcopy(unet)
    fused.fuse(unet, CPU)
    results = []
    for model in (plain, unet):
        adapters = inject_filled(model.double())
        out = predict(model, unet_inputs(dtype=torch.float64))
        gradients = torch.autograd.grad(out.square().sum(), adapters.parameters)
        results.append([out, *gradients])
    assert (
        len(
            {type(m).__name__ for m in unet.modules()}
            & {"FusedGEGLU", "FusedResnet", "FusedTransformer", "FusedBlock", "FusedGroupNorm"}
        )
        == 5
    )
    for theirs, ours in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


def test_the_fused_vae_equals_diffusers_own():
    """With wrong statistics every picture of the cache would be another one."""
    vae = AutoencoderKL.from_pretrained(PIPELINE / "vae").double()
    pixels = torch.randn(2, 3, 40, 56, dtype=torch.float64)
    with torch.inference_mode():
        wanted = vae.encode(pixels).latent_dist.parameters
        fused.fuse(vae, CPU)
        torch.testing.assert_close(vae.encode(pixels).latent_dist.parameters, wanted, rtol=1e-9, atol=1e-9)
    assert not {type(m).__name__ for m in vae.encoder.modules()} & {"ResnetBlock2D", "SiLU", "Downsample2D"}


def test_nothing_of_diffusers_own_is_left(unet):
    """A module that was passed over would keep its activations, and the memory plan of a T4 would not hold."""
    fused.fuse(unet, CPU)
    left = {type(m).__name__ for m in unet.modules()} & {
        "GEGLU",
        "ResnetBlock2D",
        "Transformer2DModel",
        "BasicTransformerBlock",
        "SiLU",
    }
    assert left <= {"SiLU"}  # of the time embedding


def kept(function, *inputs):
    """-> the bytes that autograd keeps for the backward besides the inputs, and the output"""
    saved, known = {}, {t.untyped_storage().data_ptr() for t in inputs if torch.is_tensor(t)}

    def pack(t):
        if t.untyped_storage().data_ptr() not in known:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = function(*inputs)
    return sum(saved.values()), y


def test_each_keeps_its_input_alone():
    p = torch.randn(4, 10, 64, requires_grad=True)
    bytes_kept, y = kept(lambda p: fused._GEGLU.apply(p), p)
    assert bytes_kept == 0 and y.requires_grad
    x, weight = torch.randn(2, 32, 16, 16, requires_grad=True), torch.randn(32)
    bytes_kept, y = kept(lambda x: fused._GroupNorm.apply(x, None, weight, weight, 8, 1e-5, True), x)
    assert bytes_kept <= 2 * 2 * 8 * 4 + weight.nbytes and y.requires_grad  # mean and 1/σ; the weight is there anyway


def test_gradients_equal_finite_differences():
    rand = functools.partial(torch.randn, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p = rand(2, 3, 8).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: fused._GEGLU.apply(p), p)
    x, weight, bias = rand(2, 6, 3, 2).requires_grad_(), rand(6), rand(6)
    for silu in (True, False):
        for shift in (None, weight, rand(2, 6)):
            assert torch.autograd.gradcheck(lambda x: fused._GroupNorm.apply(x, shift, weight, bias, 3, 1e-5, silu), x)
    x, y = rand(2, 5, 6).requires_grad_(), rand(2, 5, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: fused._AddLayerNorm.apply(x, None, weight, bias, 1e-5), x)
    assert torch.autograd.gradcheck(lambda x, y: fused._AddLayerNorm.apply(x, y, weight, bias, 1e-5), (x, y))
    x, y = rand(2, 6, 3, 2).requires_grad_(), rand(2, 6, 3, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: fused._Add.apply(x, y, bias), (x, y))


@pytest.fixture(scope="module")
def nvrtc():
    """The compiler, where it is installed: it comes with CUDA builds of PyTorch, and with requirements-dev.txt."""
    try:
        files = importlib.metadata.files("nvidia-cuda-nvrtc")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("nvidia-cuda-nvrtc is not installed (requirements-dev.txt): nothing to compile kernels.cu with")
    for file in sorted(files):  # the first holds what the other looks for by its bare name
        if re.fullmatch(r"libnvrtc(-builtins)?\.so[.0-9]*", file.name):
            ctypes.CDLL(str(file.locate()), ctypes.RTLD_GLOBAL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.version, "cuda", torch.version.cuda or "13.0")
        yield


NEWER = [pytest.param(name, marks=pytest.mark.slow) for name in ("sm_80", "sm_86", "sm_89", "sm_90")]


@pytest.mark.parametrize("architecture", ["sm_75", *NEWER])
@pytest.mark.parametrize("number, n", [("fp16", 8), ("fp16", 1), ("bf16", 8), ("bf16", 1), ("fp32", 4), ("fp32", 1)])
def test_the_kernels_compile_for_every_gpu_and_fit_a_t4(nvrtc, architecture, number, n):
    """There is machine code, its numbers stay in registers, and a T4's multiprocessor takes two blocks at once."""
    binary, log = kernels.compiled(architecture, number, n, "--ptxas-options=-v")
    assert binary[:4] == b"\x7fELF" and "error" not in log and "warning" not in log
    names = re.findall(r"__global__ void (\w+)", kernels.SOURCE.read_text())
    told = log.split("Compiling entry function '")[1:]
    assert sorted(part.split("'")[0] for part in told) == sorted(names)
    for part in told:
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in part
        registers = int(re.search(r"Used (\d+) registers", part)[1])
        shared = int((re.search(r"(\d+) bytes smem", part) or [0, 0])[1])
        assert 2 * kernels.THREADS * registers <= 65536 and 2 * shared <= 65536 and shared <= 49152, part


def test_sizes_that_stand_in_both_files_are_the_same():
    """With other rows than the launcher counts with, pixels would be left out."""
    source = kernels.SOURCE.read_text()
    for name in ("LANES", "ROWS"):
        assert f"#define {name} {getattr(kernels, name)}\n" in source


def off(ours, theirs):
    return ((ours.double().cpu() - theirs.cpu()).norm() / theirs.norm().cpu()).item()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_the_gpus_geglu_equals_fp64(dtype, limit):
    """Any width, also those that no block of columns divides."""
    for shape in ((2, 5, 48), (1, 7, 2560), (1, 1024, 10240)):
        p = torch.randn(shape, device="cuda").to(dtype)
        dy = torch.randn(*shape[:-1], shape[-1] // 2, device="cuda").to(dtype)
        assert off(kernels.geglu(p), Plain.geglu(p.double())) < limit
        assert off(kernels.geglu_backward(dy, p), Plain.geglu_backward(dy.double(), p.double())) < limit


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 5, 48), (3, 77, 30), (1, 1024, 1280), (1, 4096, 640)])
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("one", [True, False])
def test_the_gpus_layer_norm_of_a_sum_equals_fp64(shape, dtype, limit, one):
    """With a mean several deviations from zero, of x alone and of a sum, whose own gradient is added to the norm's."""
    x, dtotal, dout = ((torch.randn(shape, device="cuda") * 2 + c).to(dtype) for c in (6, 0, 0))
    y = None if one else torch.randn(shape, device="cuda").to(dtype)
    weight, bias = (torch.randn(shape[-1], device="cuda").to(dtype) for _ in range(2))
    total, out, *statistics = kernels.add_layer_norm(x, y, weight, bias, 1e-5)
    dx = kernels.add_layer_norm_backward(dtotal, dout, total, weight, bias, *statistics)
    exact = (x.double() + (0 if one else y.double())).requires_grad_()
    wanted = F.layer_norm(exact, shape[-1:], weight.double(), bias.double(), 1e-5)
    (gradient,) = torch.autograd.grad([exact * 1, wanted], exact, [dtotal.double(), dout.double()])
    assert off(total, exact.detach()) < limit and off(out, wanted.detach()) < limit and off(dx, gradient) < limit


@pytest.mark.gpu
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shift", ["none", "one", "each"])
def test_the_gpus_group_norm_equals_fp64(shift, shape, dtype, limit, silu):
    """With a mean several deviations from zero, where sums of squares cancel, against autograd of PyTorch's own."""
    *size, groups = shape
    x = (torch.randn(size, device="cuda") * 2 + 6).to(dtype)
    weight, bias, dy = (torch.randn(s, device="cuda").to(dtype) for s in (size[1], size[1], size))
    shift = dict(none=None, one=weight * 3, each=torch.randn(size[:2], device="cuda").to(dtype) * 3)[shift]
    y, *statistics = kernels.group_norm(x, shift, weight, bias, groups, 1e-5, silu)
    dx = kernels.group_norm_backward(dy, x, shift, *statistics, weight, bias, groups, 1e-5, silu)
    exact = x.double().requires_grad_()
    shifted = exact if shift is None else exact + shift.double()[..., None, None]
    wanted = F.group_norm(shifted, groups, weight.double(), bias.double(), 1e-5)
    wanted = F.silu(wanted) if silu else wanted
    (gradient,) = torch.autograd.grad(wanted, exact, dy.double())
    assert off(y, wanted.detach()) < limit and off(dx, gradient) < limit
    assert y.is_contiguous(memory_format=torch.channels_last)
    again = kernels.group_norm_backward(dy, x, shift, *statistics, weight, bias, groups, 1e-5, silu)
    assert torch.equal(dx, again)  # no order of additions is left to chance


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_gpus_addition_equals_fp64(shape, dtype, limit):
    x, y, bias = (torch.randn(s, device="cuda").to(dtype) for s in (shape[:4], shape[:4], shape[1]))
    assert off(kernels.add(x, y, bias), Plain.add(x.double(), y.double(), bias.double())) < limit
