"""Where the updates go: which layers, what is frozen, one flat vector, and the whole UNet's arithmetic."""

import copy

import pytest
import torch
from conftest import inject_filled, predict, sdxl_unet, unet_inputs
from torch import nn

from data.safe import UserError
from lora.inject import ALIGN, TARGETS, inject, merge, targets
from lora.linear import LoRALinear


def test_adapted_unet_equals_the_merged_one(unet):
    """W + (alpha / rank) B A written into a plain UNet by hand, then by merge()."""
    inputs = unet_inputs()
    plain = {name: w.clone() for name, w in unet.state_dict().items()}
    base = predict(unet, inputs)
    adapters = inject_filled(unet)
    adapted = predict(unet, inputs)
    assert (adapted - base).abs().mean() > 0.01 * base.abs().mean()  # else the comparison below would say nothing
    for name, layer in adapters.layers.items():
        plain[f"{name}.weight"] += 6 / 4 * (layer.B @ layer.A).detach()
    merge(unet, adapters)
    merged = unet.state_dict()
    assert plain.keys() == merged.keys() and not any(isinstance(m, LoRALinear) for m in unet.modules())
    for name, weight in plain.items():
        torch.testing.assert_close(merged[name], weight, rtol=1e-5, atol=1e-6, msg=name)
    torch.testing.assert_close(predict(unet, inputs), adapted, rtol=1e-4, atol=1e-5)
    assert not adapters.layers  # spent: nothing can add the update twice


def test_first_output_is_the_bases_own(unet):
    inputs = unet_inputs()
    base = predict(unet, inputs)
    inject(unet, rank=4, alpha=6.0)
    assert torch.equal(predict(unet, inputs), base)


def test_scale_zero_is_the_base_bit_for_bit(unet):
    """Also with inf in B, and back at scale 1 the update is there again."""
    inputs = unet_inputs()
    base = predict(unet, inputs)
    adapters = inject_filled(unet)
    full = predict(unet, inputs)
    adapters.set_scale(0.0)
    assert torch.equal(predict(unet, inputs), base)
    adapters.set_scale(1.0)
    assert torch.equal(predict(unet, inputs), full)
    with torch.no_grad():
        adapters.vector[-ALIGN * 2 :] = torch.inf
    adapters.set_scale(0.0)
    assert torch.equal(predict(unet, inputs), base)


def test_gradients_reach_only_a_and_b(unet):
    """A frozen weight that takes a gradient costs 10 GiB in SDXL; an A or B without one never learns."""
    adapters = inject_filled(unet)
    predict(unet, unet_inputs()).square().mean().backward()
    trained = {id(p) for layer in adapters.layers.values() for p in (layer.A, layer.B)}
    assert {id(p) for p in unet.parameters() if p.requires_grad} == trained
    for name, p in unet.named_parameters():
        if id(p) in trained:
            assert p.grad.any(), name
        else:
            assert p.grad is None, name


def test_every_a_b_and_gradient_is_a_view_into_the_vector(unet):
    """Were one a copy, the optimizer would step the vector and the model would not move."""
    adapters = inject(unet, rank=3, alpha=3.0)

    def check():
        at = 0
        for layer in adapters.layers.values():
            for part in (layer.A, layer.B):
                for view, whole in ((part.data, adapters.vector.data), (part.grad, adapters.vector.grad)):
                    assert view.data_ptr() == whole.data_ptr() + 4 * at and view.is_contiguous()
                at += -(-part.numel() // 256) * 256
        assert at == adapters.vector.numel()

    check()
    for _ in range(2):
        predict(unet, unet_inputs()).square().mean().backward()
        check()
        assert adapters.vector.grad.any()
        adapters.zero_grad()
        check()
        assert not adapters.vector.grad.any()


def test_two_backwards_accumulate(unet):
    """Gradient accumulation relies on it: a view replaced rather than added to would lose the first micro-step."""
    adapters = inject_filled(unet)
    for _ in range(2):
        once = adapters.vector.grad.clone()
        predict(unet, unet_inputs()).square().mean().backward()
    torch.testing.assert_close(adapters.vector.grad, 2 * once)
    assert once.any()


def test_stepping_the_vector_moves_the_layers_and_the_padding_stays_zero(unet):
    adapters = inject_filled(unet, rank=3)
    before = {name: layer.A.detach().clone() for name, layer in adapters.layers.items()}
    predict(unet, unet_inputs()).square().mean().backward()
    torch.optim.AdamW([adapters.vector], lr=1e-2).step()
    assert all(not torch.equal(before[name], layer.A) for name, layer in adapters.layers.items())
    mask = torch.ones(adapters.vector.numel(), dtype=torch.bool)
    for layer in adapters.layers.values():
        for part in (layer.A, layer.B):
            at = (part.data_ptr() - adapters.vector.data_ptr()) // 4
            mask[at : at + part.numel()] = False
    assert mask.any() and not adapters.vector[mask].any()


def test_full_sdxl_has_560_targets():
    """The numbers that README and design promise; one attention left out would train, and be missing in every tool."""
    unet = sdxl_unet()
    assert sum(p.numel() for p in unet.parameters()) == 2_567_463_684
    assert len(targets(unet)) == 560
    rank = 2
    adapters = inject(unet, rank, alpha=1.0)
    assert len(adapters.layers) == 560
    assert adapters.parameters_count() == 1_451_520 * rank
    assert adapters.vector.numel() >= adapters.parameters_count() and adapters.vector.numel() % 256 == 0
    assert sum(isinstance(m, LoRALinear) for m in unet.modules()) == 560


def test_injecting_twice_is_refused_and_changes_nothing(unet):
    adapters = inject_filled(unet)
    inputs = unet_inputs()
    before = predict(unet, inputs)
    with pytest.raises(UserError, match=r"attentions.*has an adapter already"):
        inject(unet, rank=4, alpha=4.0)
    assert torch.equal(predict(unet, inputs), before)
    assert all(isinstance(layer.base, nn.Linear) for layer in adapters.layers.values())


@pytest.mark.parametrize("missing", TARGETS)
def test_a_target_that_matches_nothing_is_named(missing):
    """Silently training three projections of four is the classic fault of matching by name."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.to_q, self.to_k, self.to_v = (nn.Linear(4, 4) for _ in range(3))
            self.to_out = nn.ModuleList([nn.Linear(4, 4)])

    model = nn.Sequential(Attention())
    if missing == "to_out.0":
        model[0].to_out = nn.ModuleList()
    else:
        delattr(model[0], missing)
    with pytest.raises(UserError, match=missing.replace(".", r"\.")):
        inject(model, rank=2, alpha=2.0)
    assert all(p.requires_grad for p in model.parameters())  # refused before anything was frozen


def test_the_seed_decides_a(unet, _toy_unet):
    vectors = [inject(copy.deepcopy(_toy_unet), 4, 4.0, seed).vector for seed in (1, 1, 2)]
    assert torch.equal(vectors[0], vectors[1]) and not torch.equal(vectors[0], vectors[2])


def test_peft_trains_the_same(unet, _toy_unet):
    """peft's LoRA with the same A and B, plain AdamW on its many tensors: 20 steps with the same losses, to 1e-5."""
    from peft import LoraConfig, inject_adapter_in_model

    adapters = inject(unet, rank=4, alpha=6.0)
    theirs = inject_adapter_in_model(
        LoraConfig(r=4, lora_alpha=6, target_modules=list(TARGETS)), copy.deepcopy(_toy_unet).requires_grad_(False)
    )
    with torch.no_grad():
        for name, layer in adapters.layers.items():
            other = theirs.get_submodule(name)
            other.lora_A["default"].weight.copy_(layer.A)
            other.lora_B["default"].weight.copy_(layer.B)
    parameters = [p for p in theirs.parameters() if p.requires_grad]
    assert sum(p.numel() for p in parameters) == adapters.parameters_count()
    inputs = unet_inputs()
    wanted = torch.randn(inputs[0][0].shape, generator=torch.Generator().manual_seed(9))

    def losses(model, optimizer, zero_grad):
        for _ in range(20):
            loss = (predict(model, inputs) - wanted).square().mean()
            loss.backward()
            optimizer.step()
            zero_grad()
            yield loss.item()

    ours = torch.optim.AdamW([adapters.vector], lr=1e-3)
    peft = torch.optim.AdamW(parameters, lr=1e-3)
    a, b = list(losses(unet, ours, adapters.zero_grad)), list(losses(theirs, peft, peft.zero_grad))
    assert a == pytest.approx(b, rel=1e-5)
    assert a[-1] < 0.95 * a[0]  # it learned, so the agreement is about training


def test_a_rank_above_every_layers_width_is_refused(unet):
    """Before memory is asked for it."""
    with pytest.raises(UserError, match="rank 99999 is more than"):
        inject(unet, rank=99999, alpha=1.0)
    assert not any(isinstance(m, LoRALinear) for m in unet.modules())
