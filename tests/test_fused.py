"""The base with fewer kernels computes what diffusers' own modules do, with PyTorch's kernels and with Triton's."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from conftest import PIPELINE, inject_filled, predict, unet_inputs
from diffusers import AutoencoderKL

from data.common.safe import UserError
from data.models import fused
from data.models.fused import Plain

SHAPES = [(2, 64, 6, 5, 8), (1, 320, 16, 16, 32), (2, 96, 40, 33, 32), (1, 1920, 32, 32, 32)]  # B, C, h, w, groups


def test_the_fused_unet_equals_diffusers_own(unet):
    """Output and every LoRA gradient, in fp64, because there only a wrong formula makes a difference."""
    plain = copy.deepcopy(unet)
    fused.fuse(unet, compiled=False)
    results = []
    for model in (plain, unet):
        adapters = inject_filled(model.double())
        out = predict(model, unet_inputs(dtype=torch.float64))
        gradients = torch.autograd.grad(out.square().sum(), adapters.parameters)
        results.append([out, *gradients])
    wanted = {"FusedGEGLU", "FusedResnet", "FusedTransformer", "FusedGroupNorm"}
    assert wanted <= {type(m).__name__ for m in unet.modules()}
    for theirs, ours in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


def test_the_fused_vae_equals_diffusers_own():
    """With wrong statistics every picture of the cache would be another one."""
    vae = AutoencoderKL.from_pretrained(PIPELINE / "vae").double()
    pixels = torch.randn(2, 3, 40, 56, dtype=torch.float64)
    with torch.inference_mode():
        wanted = vae.encode(pixels).latent_dist.parameters
        fused.fuse(vae, compiled=False)
        torch.testing.assert_close(vae.encode(pixels).latent_dist.parameters, wanted, rtol=1e-9, atol=1e-9)
    assert not {type(m).__name__ for m in vae.encoder.modules()} & {"ResnetBlock2D", "SiLU", "Downsample2D"}


def test_nothing_of_diffusers_own_is_left(unet):
    """A module that was passed over would keep its activations, and the memory plan of a T4 would not hold."""
    fused.fuse(unet, compiled=False)
    left = {type(m).__name__ for m in unet.modules()} & {"GEGLU", "ResnetBlock2D", "Transformer2DModel", "SiLU"}
    assert left <= {"SiLU"}  # the time embedding's


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
    bytes_kept, y = kept(lambda p: fused._GEGLU.apply(p, Plain), p)
    assert bytes_kept == 0 and y.requires_grad
    x, weight = torch.randn(2, 32, 16, 16, requires_grad=True), torch.randn(32)
    bytes_kept, y = kept(lambda x: fused._GroupNorm.apply(x, None, weight, weight, 8, 1e-5, True, Plain), x)
    assert bytes_kept <= 2 * 2 * 8 * 4 + weight.nbytes and y.requires_grad  # mean and 1/σ; the weight is there anyway


def test_gradients_equal_finite_differences():
    rand = functools.partial(torch.randn, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p = rand(2, 3, 8).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: fused._GEGLU.apply(p, Plain), p)
    x, weight, bias = rand(2, 6, 3, 2).requires_grad_(), rand(6), rand(6)
    for silu in (True, False):
        for shift in (None, weight, rand(2, 6)):
            norm = lambda x: fused._GroupNorm.apply(x, shift, weight, bias, 3, 1e-5, silu, Plain)
            assert torch.autograd.gradcheck(norm, x)
    y = rand(2, 6, 3, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: fused._Add.apply(x, y, bias, Plain), (x, y))


def test_without_a_gpu_compiled_kernels_are_refused_or_left_out():
    cpu = torch.device("cpu")
    assert not fused.wanted("auto", cpu) and not fused.wanted("off", cpu)
    with pytest.raises(UserError, match="--compile on: there is no GPU"):
        fused.wanted("on", cpu)


def test_an_older_gpu_is_told_and_served_by_pytorch(monkeypatch, capsys):
    """On a T4 Triton's compiler would die in the middle of the first step."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert not fused.wanted("auto", torch.device("cuda"))
    assert capsys.readouterr().out.startswith("Tesla T4 is older than what Triton compiles for: PyTorch")
    with pytest.raises(UserError, match="Tesla T4"):
        fused.wanted("on", torch.device("cuda"))


LACKS = [("triton", "is not installed"), ("gcc", "a C compiler"), ("Python.h", "Python's headers")]


@pytest.mark.parametrize("lack, message", LACKS)
def test_what_triton_needs_is_asked_for_before_the_first_step(lack, message, monkeypatch, tmp_path):
    """A slim container has a GPU and no gcc: the first kernel would end in one of Triton's tracebacks."""
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: lack != "triton")
    monkeypatch.setattr("shutil.which", lambda name: None if lack == "gcc" else name)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / ("no" if lack == "Python.h" else "")))
    monkeypatch.delenv("CC", raising=False)
    assert message in fused.works(torch.device("cuda"))
    lack = None
    assert fused.works(torch.device("cuda")) is None


def off(ours, theirs):
    return ((ours.double().cpu() - theirs.cpu()).norm() / theirs.norm().cpu()).item()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_tritons_geglu_equals_fp64(dtype, limit):
    """In any width, also in those that no block of columns divides."""
    from data.models import triton_kernels

    for shape in ((2, 5, 48), (1, 7, 2560), (1, 1024, 10240)):
        p = torch.randn(shape, device="cuda").to(dtype)
        dy = torch.randn(*shape[:-1], shape[-1] // 2, device="cuda").to(dtype)
        assert off(triton_kernels.geglu(p), Plain.geglu(p.double())) < limit
        assert off(triton_kernels.geglu_backward(dy, p), Plain.geglu_backward(dy.double(), p.double())) < limit


@pytest.mark.gpu
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shift", ["none", "one", "each"])
def test_tritons_group_norm_equals_fp64(shift, shape, dtype, limit, silu):
    """Against PyTorch's own autograd, with a mean several deviations from zero, where sums of squares cancel."""
    from data.models import triton_kernels

    *size, groups = shape
    x = (torch.randn(size, device="cuda") * 2 + 6).to(dtype)
    weight, bias, dy = (torch.randn(s, device="cuda").to(dtype) for s in (size[1], size[1], size))
    shift = dict(none=None, one=weight * 3, each=torch.randn(size[:2], device="cuda").to(dtype) * 3)[shift]
    y, mean, rstd = triton_kernels.group_norm(x, shift, weight, bias, groups, 1e-5, silu)
    dx = triton_kernels.group_norm_backward(dy, x, shift, mean, rstd, weight, bias, groups, 1e-5, silu)
    exact = x.double().requires_grad_()
    shifted = exact if shift is None else exact + shift.double()[..., None, None]
    wanted = F.group_norm(shifted, groups, weight.double(), bias.double(), 1e-5)
    wanted = F.silu(wanted) if silu else wanted
    (gradient,) = torch.autograd.grad(wanted, exact, dy.double())
    assert off(y, wanted.detach()) < limit and off(dx, gradient) < limit
    assert y.is_contiguous(memory_format=torch.channels_last)
    again = triton_kernels.group_norm_backward(dy, x, shift, mean, rstd, weight, bias, groups, 1e-5, silu)
    assert torch.equal(dx, again)  # no order of additions is left to chance


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("shape", SHAPES)
def test_tritons_addition_equals_fp64(shape, dtype, limit):
    from data.models import triton_kernels

    x, y, bias = (torch.randn(s, device="cuda").to(dtype) for s in (shape[:4], shape[:4], shape[1]))
    assert off(triton_kernels.add(x, y, bias), Plain.add(x.double(), y.double(), bias.double())) < limit
