"""Where the updates go: which layers, what is frozen, one flat vector, and the whole UNet's arithmetic."""

import copy
import functools

import pytest
import torch
from conftest import add_gradients, inject_filled, predict, sdxl_unet, unet_inputs
from torch import nn

from data.common import flags
from data.common.errors import UserError
from data.models.fused import fuse
from lora.adapters import ALIGN
from lora.attention import fuse_projections
from lora.inject import TARGETS, inject, targets
from lora.linear import LoRALinear, lora

BOTH = pytest.mark.parametrize("layers", TARGETS)
ENDS = {layers: [pattern.removeprefix("*.") for pattern in patterns] for layers, patterns in TARGETS.items()}
close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)


def fused(unet):
    """A copy with its projections side by side and no adapters. Its last bits are its own: the sums may be others.

    Frozen, as the adapted one is: for a weight that wants a gradient PyTorch's linear takes another kernel on a CPU.
    """
    unet = copy.deepcopy(unet).requires_grad_(False)
    fuse_projections(unet)
    return unet


def loss(unet):
    return predict(unet, unet_inputs()).square().mean()


@BOTH
def test_adapted_unet_equals_a_plain_one_with_merged_weights(layers, unet):
    """W + (alpha / rank) B A, written by hand into diffusers' own UNet."""
    inputs, plain = unet_inputs(), copy.deepcopy(unet)
    base = predict(unet, inputs)
    adapters = inject_filled(unet, layers=layers)
    adapted = predict(unet, inputs)
    assert (adapted - base).abs().mean() > 0.01 * base.abs().mean()  # else the comparison below would say nothing
    with torch.no_grad():
        for name, (A, B) in adapters.projections().items():
            plain.get_submodule(name).weight += 6 / 4 * (B @ A)
    torch.testing.assert_close(predict(plain, inputs), adapted, rtol=1e-4, atol=1e-5)


def test_first_output_is_the_bases_own(unet):
    """Bit for bit of the fused base, which is diffusers' own but for the last bits."""
    inputs = unet_inputs()
    plain, base = predict(unet, inputs), predict(fused(unet), inputs)
    inject(unet, rank=4, alpha=6.0)
    assert torch.equal(predict(unet, inputs), base)
    close(predict(unet, inputs), plain)


def test_scale_zero_is_the_base_bit_for_bit(unet):
    """Also with inf in B, and back at scale 1 the update is there again."""
    inputs = unet_inputs()
    plain, base = predict(unet, inputs), predict(fused(unet), inputs)
    close(base, plain)
    adapters = inject_filled(unet)
    full = predict(unet, inputs)
    adapters.set_scale(0.0)
    assert torch.equal(predict(unet, inputs), base)
    adapters.set_scale(1.0)
    assert torch.equal(predict(unet, inputs), full)
    with torch.no_grad():
        adapters.vector[-ALIGN * 2 :] = torch.inf
    adapters.refresh()
    assert not predict(unet, inputs).isfinite().all()  # the layers have it
    adapters.set_scale(0.0)
    assert torch.equal(predict(unet, inputs), base)


@BOTH
def test_gradients_reach_only_a_and_b(layers, unet):
    """A frozen weight that takes a gradient costs 10 GiB in SDXL; an A or B without one never learns."""
    adapters = inject_filled(unet, layers=layers)
    loss(unet).backward()
    trained = {id(p) for layer in adapters.layers.values() for p in (layer.A, layer.B)}
    assert {id(p) for p in unet.parameters() if p.requires_grad} == trained
    for name, p in unet.named_parameters():
        if id(p) in trained:
            assert p.grad.any(), name
        else:
            assert p.grad is None, name


def places(adapters):
    """Where each of adapters.parameters has its numbers in the vector: [slice]."""
    found, at = [], 0
    for part in adapters.parameters:
        found.append(slice(at, at + part.numel()))
        at += -(-part.numel() // 256) * 256
    assert at == adapters.vector.numel()
    return found


def test_layers_and_gradients_follow_the_vector_place_by_place(unet):
    """An A or B that refresh misses never moves; a gradient at its neighbour's place trains the wrong layer.

    And nothing moves in memory: a captured CUDA graph reads and writes at the addresses that it saw.
    """
    adapters = inject(unet, rank=3, alpha=3.0)
    assert [id(p) for p in adapters.parameters] == [id(p) for l in adapters.layers.values() for p in (l.A, l.B)]
    everything = [adapters.vector, adapters.vector.grad, *adapters.parameters]
    addresses = [tensor.data_ptr() for tensor in everything]
    for round in (1, 2):
        with torch.no_grad():
            adapters.vector.copy_(round * torch.arange(adapters.vector.numel()))
        adapters.vector.grad.zero_()
        adapters.refresh()
        for part, place in zip(adapters.parameters, places(adapters)):
            assert torch.equal(part.flatten(), adapters.vector[place]) and part.is_contiguous()
        gradients = [torch.full_like(part, float(i)) for i, part in enumerate(adapters.parameters, 1)]
        adapters.add_gradients(gradients)
        wanted = torch.zeros_like(adapters.vector)
        for gradient, place in zip(gradients, places(adapters)):
            wanted[place] = gradient.flatten()
        assert torch.equal(adapters.vector.grad, wanted)
        assert [tensor.data_ptr() for tensor in everything] == addresses
    for master, place in zip(
        adapters.masters, places(adapters)
    ):  # what is read and written by name is the vector itself
        assert master.data_ptr() == adapters.vector[place].data_ptr() and torch.equal(
            master.flatten(), adapters.vector[place]
        )


def test_projections_are_their_rows_of_the_layers(unet):
    """q's A is not k's. Written to by name, each changes its own rows and no other's."""
    adapters = inject_filled(unet, rank=3)
    numbers = {name: (A.clone(), B.clone()) for name, (A, B) in adapters.projections().items()}
    cross = next(name for name in adapters.layers if name.endswith("attn2.to_kv")).removesuffix(".to_kv")
    own = cross.replace("attn2", "attn1")
    for layer, parts in ((f"{own}.to_qkv", "qkv"), (f"{cross}.to_kv", "kv"), (f"{cross}.to_q", "q")):
        layer = adapters.layers[layer]
        for i, part in enumerate(parts):
            A, B = numbers[f"{own if 'qkv' in parts else cross}.to_{part}"]
            assert torch.equal(layer.A[3 * i : 3 * i + 3], A) and torch.equal(layer.B[i], B)
    for A, B in adapters.projections().values():
        assert A.dtype == B.dtype == torch.float32
    changed = f"{own}.to_k"
    for part in adapters.projections()[changed]:
        part.zero_()
    for name, pair in adapters.projections().items():
        for part, before in zip(pair, numbers[name]):
            assert not part.any() if name == changed else torch.equal(part, before)


def test_two_backwards_accumulate(unet):
    """Gradient accumulation relies on it: replaced rather than added to, the first micro-step would be lost."""
    adapters = inject_filled(unet)
    for _ in range(2):
        once = adapters.vector.grad.clone()
        add_gradients(adapters, loss(unet))
    torch.testing.assert_close(adapters.vector.grad, 2 * once)
    assert once.any()


def test_the_gradient_is_the_one_that_autograd_gives_the_layers(unet):
    """Every place of the vector but the padding, in the layers' order. backward() itself leaves the vector alone."""
    adapters = inject_filled(unet, rank=3)
    loss(unet).backward()
    assert not adapters.vector.grad.any()
    add_gradients(adapters, loss(unet))
    for part, place in zip(adapters.parameters, places(adapters)):
        assert part.grad.any()
        torch.testing.assert_close(adapters.vector.grad[place].view_as(part), part.grad)


def test_stepping_the_vector_moves_the_layers_and_the_padding_stays_zero(unet):
    adapters = inject_filled(unet, rank=3)
    before = [part.detach().clone() for part in adapters.parameters]
    add_gradients(adapters, loss(unet))
    torch.optim.AdamW([adapters.vector], lr=1e-2).step()
    adapters.refresh()
    assert all(not torch.equal(old, part) for old, part in zip(before, adapters.parameters))
    mask = torch.ones(adapters.vector.numel(), dtype=torch.bool)
    for place in places(adapters):
        mask[place] = False
    assert mask.any() and not adapters.vector[mask].any()


def rounded(adapters):
    """Whether an fp16 base's layers compute with the vector as it is, rounded."""
    return all(
        part.dtype == torch.float16 and torch.equal(part.flatten(), adapters.vector[place].half())
        for part, place in zip(adapters.parameters, places(adapters))
    )


def test_an_fp16_base_computes_with_the_fp32_vector_rounded(unet):
    """After a real step: the vector and its gradient hold what fp16 cannot, the layers follow as near as they can."""
    adapters = inject_filled(unet.half(), rank=3)
    assert rounded(adapters) and adapters.vector.dtype == adapters.vector.grad.dtype == torch.float32
    before = adapters.vector.detach().clone()
    add_gradients(adapters, predict(unet, unet_inputs(dtype=torch.float16)).float().square().mean())
    torch.optim.AdamW([adapters.vector], lr=1e-3).step()
    adapters.refresh()
    assert rounded(adapters) and not torch.equal(adapters.vector.half(), before.half())
    assert not torch.equal(adapters.vector, adapters.vector.half().float())


def test_steps_and_gradients_below_fp16s_resolution_add_up(unet):
    """Of steps of 1e-5 at 1.0 fp16 holds not one in fifty: stepped in fp16, nothing would ever be learned."""
    adapters = inject(unet.half(), rank=3, alpha=3.0)

    def add(value):
        adapters.add_gradients([torch.full_like(part, value) for part in adapters.parameters])

    add(2048.0), add(1.0)  # fp16's next number is 2050
    assert all((adapters.vector.grad[place] == 2049).all() for place in places(adapters))

    optimizer = torch.optim.AdamW([adapters.vector], lr=1e-5, weight_decay=0.0)
    for master in adapters.masters:
        master.fill_(1.0)
    adapters.refresh()
    for step in range(1, 101):
        adapters.vector.grad.zero_()
        add(-0.5)
        optimizer.step()
        adapters.refresh()
        assert rounded(adapters)
        if step == 10:
            assert all((part == 1).all() for part in adapters.parameters)  # not to be seen yet
    for part, master in zip(adapters.parameters, adapters.masters):
        torch.testing.assert_close(master - 1, torch.full_like(master, 1e-3), rtol=0.01, atol=0)
        assert (part > 1).all()


@pytest.mark.parametrize("train_module", [False, True], ids=["diffusers' modules", "the modules that train uses"])
def test_gradients_are_those_of_the_plain_formula_through_the_whole_unet(train_module, unet):
    """Every layer of attn-mlp in its place: GEGLU, norms and images around it keep what they need for the backward.

    The judge is diffusers' own UNet with lora() in the place of every layer, differentiated by autograd.
    """

    class Plain(nn.Module):
        def __init__(self, base, A, B):
            super().__init__()
            self.base, self.A, self.B = base, nn.Parameter(A.clone()), nn.Parameter(B.clone())

        def forward(self, x):
            return lora(x.flatten(0, -2), self.base, self.A, self.B, 6 / 4).view(*x.shape[:-1], -1)

    plain = copy.deepcopy(unet).requires_grad_(False)
    if train_module:
        fuse_projections(unet)
        fuse(unet, torch.device("cpu"))
    adapters = inject_filled(unet, layers="attn-mlp")
    for name, (A, B) in adapters.projections().items():
        plain.set_submodule(name, Plain(plain.get_submodule(name), A, B))
    add_gradients(adapters, loss(unet))
    loss(plain).backward()
    for master, place in zip(adapters.masters, places(adapters)):
        master.copy_(adapters.vector.grad[place].view_as(master))
    for name, found in adapters.projections().items():  # the gradients by name
        layer = plain.get_submodule(name)
        for mine, wanted in zip(found, (layer.A.grad, layer.B.grad)):
            torch.testing.assert_close(mine, wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item(), msg=name)


def test_full_sdxl_has_560_targets():
    """The numbers that README and design promise; one attention left out would train, and be missing in every tool."""
    unet = sdxl_unet()
    assert sum(p.numel() for p in unet.parameters()) == 2_567_463_684
    wanted = targets(unet)
    assert len(wanted) == len({name for name, _, _ in wanted}) == 560
    fuse_projections(unet)
    assert sorted(targets(unet)) == sorted(wanted)  # fused or not
    rank = 2
    adapters = inject(unet, rank, alpha=1.0)
    found = adapters.projections()
    assert sorted((name, A.shape[1], len(B)) for name, (A, B) in found.items()) == sorted(wanted)
    assert all(len(A) == B.shape[1] == rank for A, B in found.values())
    assert len(adapters.layers) == 70 * (2 + 3)  # to_qkv and to_out; to_q, to_kv and to_out
    trained = sum(p.numel() for p in adapters.parameters)
    assert trained == 1_451_520 * rank <= adapters.vector.numel() and adapters.vector.numel() % 256 == 0
    assert sum(isinstance(m, LoRALinear) for m in unet.modules()) == 350


def test_attn_mlp_of_full_sdxl_has_722_targets():
    """kohya's set: proj_in and proj_out of 11 transformers, both products of 70 feed-forwards next to attn's 560."""
    unet = sdxl_unet()
    attention, wanted = targets(unet), targets(unet, "attn-mlp")
    others = [name for name, _, _ in wanted if name not in {name for name, _, _ in attention}]
    assert [target for target in wanted if target[0] not in others] == attention
    counts = {last: sum(name.endswith(f".{last}") for name in others) for last in ENDS["attn-mlp"][4:]}
    assert counts == {"proj_in": 11, "proj_out": 11, "ff.net.0.proj": 70, "ff.net.2": 70} and len(wanted) == 722
    names = [name for name, _, _ in wanted]
    fuse_projections(unet)
    fuse(unet, torch.device("cpu"))
    assert sorted(targets(unet, "attn-mlp")) == sorted(wanted)
    adapters = inject(unet, 2, alpha=1.0, layers="attn-mlp")
    found = adapters.projections()
    assert sorted((name, A.shape[1], len(B)) for name, (A, B) in found.items()) == sorted(wanted)
    assert [name for name in found if name in others] == [name for name in names if name in others]
    assert sum(p.numel() for p in adapters.parameters) == 2_659_840 * 2 <= adapters.vector.numel()


def test_the_adapters_of_attn_stand_in_the_vector_as_in_the_first_version(unet):
    """A state holds the vector alone: in another order it would go on with q's numbers in k."""
    adapters = inject(unet, rank=3, alpha=3.0)
    order = [name for name, _ in unet.named_modules() if name.endswith((".to_qkv", ".to_q", ".to_kv", ".to_out.0"))]
    assert list(adapters.layers) == order
    generator = torch.Generator().manual_seed(0)
    for A in adapters.masters[::2]:  # A's first values, drawn layer after layer
        assert torch.equal(A, torch.randn(A.shape, generator=generator) / 3)


def test_a_projection_that_is_no_plain_linear_layer_is_refused(unet):
    """The gradients written by hand demand new memory of the base's backward, which only a matrix product promises."""
    name = next(name for name, module in unet.named_modules() if name.endswith(".to_k"))
    unet.set_submodule(name, nn.Identity())
    with pytest.raises(UserError, match=f"{name} is of type Identity: only a linear layer can be adapted"):
        inject(unet, rank=4, alpha=4.0)


@pytest.mark.parametrize("first, second", [("attn", "attn-mlp"), ("attn-mlp", "attn")])
def test_a_lora_that_is_taken_out_leaves_nothing(unet, first, second):
    """The UNet computes the base bit for bit, and the next LoRA as if there had been none before."""
    untouched, x = fused(unet), unet_inputs()
    base = predict(untouched, x)
    adapters = inject_filled(unet, rank=3, layers=first)
    assert not torch.equal(predict(unet, x), base)
    adapters.take_out(unet)
    assert torch.equal(predict(unet, x), base) and not [m for m in unet.modules() if isinstance(m, LoRALinear)]
    inject_filled(unet, rank=5, layers=second), inject_filled(untouched, rank=5, layers=second)
    assert torch.equal(predict(unet, x), predict(untouched, x))
    assert unet.state_dict().keys() == untouched.state_dict().keys()


def test_injecting_twice_is_refused_and_changes_nothing(unet):
    adapters = inject_filled(unet)
    inputs = unet_inputs()
    before = predict(unet, inputs)
    with pytest.raises(UserError, match=r"attentions.*has an adapter already"):
        inject(unet, rank=4, alpha=4.0)
    assert torch.equal(predict(unet, inputs), before)
    assert all(isinstance(layer.base, nn.Linear) for layer in adapters.layers.values())


@pytest.mark.parametrize("missing", ENDS["attn"])
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


def test_a_set_may_be_of_some_blocks_or_one_kind_of_attention(unet, monkeypatch):
    """Patterns say it, before and after projections were put side by side, and no other layer is taken with them."""
    names = {name for name, _, _ in targets(unet)}
    sets = {"block": ("mid_block.*.to_[qkv]", "*to_out.0"), "cross": ("*.attn2.to_[qkv]",), "part": ("*.to_[qv]",)}
    monkeypatch.setattr("lora.inject.TARGETS", sets)
    block = {name for name in names if name.startswith("mid_block.") or name.endswith("to_out.0")}
    cross = {name for name in names if ".attn2." in name and not name.endswith("to_out.0")}
    assert {name for name, _, _ in targets(unet, "block")} == block
    assert {name for name, _, _ in targets(unet, "cross")} == cross
    fuse_projections(unet)
    assert {name for name, _, _ in targets(unet, "block")} == block
    with pytest.raises(UserError, match=r"attn1.to_qkv is one layer: adapt .*to_q, .*to_k, .*to_v together"):
        targets(unet, "part")
    assert inject(unet, 4, 4.0, layers="cross").projections().keys() == cross


def test_the_flag_offers_these_sets():
    assert tuple(TARGETS) == flags.LAYERS


def test_the_seed_decides_a(unet, _toy_unet):
    vectors = [inject(copy.deepcopy(_toy_unet), 4, 4.0, seed).vector for seed in (1, 1, 2)]
    assert torch.equal(vectors[0], vectors[1]) and not torch.equal(vectors[0], vectors[2])


@pytest.mark.parametrize("layers, steps", [("attn", 10), pytest.param("attn-mlp", 20, marks=pytest.mark.slow)])
def test_peft_trains_the_same(layers, steps, unet, _toy_unet):
    """peft's LoRA with the same A and B, plain AdamW on its many tensors: the same losses at each step, to 1e-5."""
    from peft import LoraConfig, inject_adapter_in_model

    adapters = inject(unet, rank=4, alpha=6.0, layers=layers)
    theirs = inject_adapter_in_model(
        LoraConfig(r=4, lora_alpha=6, target_modules=ENDS[layers]),
        copy.deepcopy(_toy_unet).requires_grad_(False),
    )
    with torch.no_grad():
        for name, (A, B) in adapters.projections().items():
            other = theirs.get_submodule(name)
            other.lora_A["default"].weight.copy_(A)
            other.lora_B["default"].weight.copy_(B)
    parameters = [p for p in theirs.parameters() if p.requires_grad]
    assert sum(p.numel() for p in parameters) == sum(p.numel() for p in adapters.parameters)
    inputs = unet_inputs()
    wanted = torch.randn(inputs[0][0].shape, generator=torch.Generator().manual_seed(9))

    def losses(model, optimizer, backward, after):
        for _ in range(steps):
            loss = (predict(model, inputs) - wanted).square().mean()
            optimizer.zero_grad(set_to_none=False)
            backward(loss)
            optimizer.step()
            after()
            yield loss.item()

    ours = torch.optim.AdamW([adapters.vector], lr=1e-3)
    peft = torch.optim.AdamW(parameters, lr=1e-3)
    a = list(losses(unet, ours, functools.partial(add_gradients, adapters), adapters.refresh))
    b = list(losses(theirs, peft, torch.Tensor.backward, lambda: None))
    assert a == pytest.approx(b, rel=1e-5)
    assert a[-1] < 0.95 * a[0]  # it learned, so the agreement is about training


def test_a_rank_above_every_layers_width_is_refused(unet):
    """Before memory is asked for it."""
    with pytest.raises(UserError, match="rank 99999 is more than"):
        inject(unet, rank=99999, alpha=1.0)
    assert not any(isinstance(m, LoRALinear) for m in unet.modules())
