"""READ 4. The training loop: setup composes, the loop narrates.

Per optimizer step: gradient_accumulation_steps micro-batches, each noised, predicted, compared, backpropagated into the
adapters' one flat gradient; then unscale, clip, step. Everything random is a function of (seed, step, slot), a slot being a
micro-batch's place in its step, so stopping and going on is running the same command again.
"""

import os
from dataclasses import asdict
from functools import partial
from types import SimpleNamespace

import torch
from diffusers import UNet2DConditionModel
from diffusers.optimization import get_scheduler

from data import check
from data.cache import Cache
from data.common.safe import Signals, Stopped, UserError
from data.models import fused
from data.models.files import Model, load
from lora.files import export
from lora.inject import fuse_projections, inject
from train import diffusion, graph, plan
from train.batches import batches, chosen, draw, every_shape
from train.health import Health, first_not_finite
from train.metrics import Metrics
from train.state import read_state, restore, save_state

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def train(settings, run):
    """RUN/cache -> RUN/lora.safetensors. `settings` is flags.Train, `run` the run's folder."""
    r = setup(settings, run)
    slots = settings.gradient_accumulation_steps
    images = slots * settings.train_batch_size
    if r.start >= settings.max_train_steps:
        print(f"{run}: finished, {r.start} steps are done; a larger --max_train_steps goes on")

    def save(name):
        export(r.adapters, run / f"{name}.safetensors", r.identity["base"], r.cache.manifest["resolution"])

    health, stop = Health(r.scaler), Signals()
    with Metrics(run / "metrics.jsonl", r.start, settings.max_train_steps, r.device) as metrics:
        for step in range(r.start, settings.max_train_steps):
            lr = settings.learning_rate * r.lr_factor(step)
            r.optimizer.param_groups[0]["lr"] = lr
            loss = torch.zeros((), device=r.device)
            for _ in range(slots):
                loss += r.micro_step(next(r.batches)) / slots

            r.scaler.unscale_(r.optimizer)
            norm = torch.nn.utils.clip_grad_norm_([r.adapters.vector], settings.max_grad_norm)
            loss, norm = torch.stack([loss, norm]).tolist()  # here Python waits for the device
            health.check(partial(describe, r, settings, step), loss, norm)  # describes only what is wrong
            r.scaler.step(r.optimizer)  # not, when the gradient overflowed
            r.scaler.update()
            r.adapters.refresh()  # the layers' copies follow, the gradient is zero again

            done = step + 1
            scale = r.scaler.get_scale()
            metrics.log(done, images, loss=loss, lr=lr, grad_norm=norm, loss_scale=scale, overflows=health.overflows)
            if done % settings.checkpointing_steps == 0 or done == settings.max_train_steps or stop.received:
                save(f"lora-{done:06d}")  # before the state: a run that goes on behind it does not write it again
                save_state(run / "state", done, r.adapters, r.optimizer, r.scaler, r.identity, r.memory_plan)
            if stop.received and done < settings.max_train_steps:
                raise Stopped(stop.received, f"stopped after step {done}, saved; run the same command to go on")
    save("lora")


def setup(settings, run):
    """Everything that the loop uses, ready for its next step, as attributes of one object.

    Of these a step needs batches, micro_step, adapters, scaler, optimizer and lr_factor; the others are for messages and saves.
    """
    cache = Cache(run / "cache")
    base = Model(**cache.manifest["model"])
    device = check.device()
    dtype = DTYPES[settings.mixed_precision]
    if settings.deterministic:
        only_deterministic_kernels()
    check.precision(settings.mixed_precision, device)
    check.optimizer(settings)
    check.schedule(settings)
    identity = dict(asdict(settings), base=base.public_name(), revision=base.revision, cache=cache.manifest["content"])
    state = read_state(run / "state", identity)
    scheduler = base.part("scheduler").config("scheduler_config.json")
    signal, predicts = diffusion.noise_schedule(scheduler), scheduler.get("prediction_type", "epsilon")
    unet = load_unet(base, cache, dtype, device)
    adapters = inject(unet, settings.rank, settings.lora_alpha or settings.rank, settings.seed)
    optimizer = make_optimizer(adapters, settings)
    # fp16 ends at 6e-8: gradients are computed of a scaled loss, and the scale found by trying
    scaler = torch.amp.GradScaler(device.type, enabled=settings.mixed_precision == "fp16")
    start, memory_plan = restore(state, adapters, optimizer, scaler)
    check.saves(settings, run, adapters.vector.numel(), start)

    forward = partial(loss_of, settings, unet, signal.to(device), predicts, dtype)

    def micro_step(**batch):
        """Forward and backward: the gradient's share of the step is added to the adapters' gradient. -> the loss"""
        loss = forward(**batch)
        share = scaler.scale(loss / settings.gradient_accumulation_steps)
        adapters.add_gradients(torch.autograd.grad(share, adapters.parameters))
        return loss.detach()

    eager = graph.Eager(micro_step, device)
    samples = every_shape(cache, settings, signal)
    # what a new optimizer allocates in its first step; one that was restored has it
    optimizer_bytes = 0 if start else adapters.vector.numel() * (2 if settings.use_8bit_adam else 8)
    memory_plan = plan.make(settings, unet, partial(eager, samples[0]), device, optimizer_bytes, memory_plan)
    plan.recompute(unet, memory_plan["recomputed"])
    adapters.refresh()  # measuring added a gradient
    if device.type == "cuda" and not settings.no_cuda_graph:
        step = graph.Graphed(micro_step, device, [adapters.vector.grad], samples)
    else:
        step = eager
    return SimpleNamespace(
        cache=cache,
        device=device,
        unet=unet,
        adapters=adapters,
        signal=signal,
        optimizer=optimizer,
        lr_factor=learning_rate_schedule(optimizer, settings),
        scaler=scaler,
        identity=identity,
        start=start,
        memory_plan=memory_plan,
        forward=graph.Eager(forward, device),
        batches=batches(cache, settings, signal, start),
        micro_step=step,
    )


def loss_of(settings, unet, signal, predicts, dtype, *, x0, eps, t, text, pooled, time_ids):
    """The loss of one micro-batch, fp32: noised, predicted, compared."""
    xt = diffusion.add_noise(x0, eps, t, signal)
    condition = dict(text_embeds=pooled.to(dtype), time_ids=time_ids)
    prediction = unet(xt.to(dtype), t, text.to(dtype), added_cond_kwargs=condition).sample
    wanted = diffusion.target(x0, eps, t, signal, predicts)
    return diffusion.loss(prediction, wanted, diffusion.loss_weight(t, signal, predicts, settings.snr_gamma))


@torch.no_grad()
def describe(r, settings, step):
    """What a step trained on and where its numbers went wrong: every slot is drawn and its forward run again. The run ends here."""
    r.micro_step = None  # what is recorded holds the memory that the forwards need
    torch.cuda.empty_cache()
    told, culprit = [], None
    for slot in range(settings.gradient_accumulation_steps):
        batch = draw(r.cache, settings, r.signal, step, slot)
        told.append((r.cache.names(chosen(r.cache, settings, step, slot)), batch["t"].tolist()))
        culprit = culprit or first_not_finite(r.unet, partial(r.forward, batch))
    names, times = (sum(parts, []) for parts in zip(*told))
    where = f"the first output that is not finite is {culprit}'s" if culprit else "every module's output is finite"
    return f"step {step + 1}, {', '.join(names)}, timesteps {times}; {where}"


def load_unet(base, cache, dtype, device):
    """The base model's UNet, frozen. Raises UserError when it is not SDXL's kind or does not fit the cached text."""

    def prepare(unet):
        fuse_projections(unet)
        fused.fuse(unet, device)

    unet = load(UNet2DConditionModel, base.part("unet"), dtype, device, prepare)
    width, has = unet.config.cross_attention_dim, cache.manifest["text_shape"][1]
    if unet.config.addition_embed_type != "text_time" or width != has:
        raise UserError(
            f"{base.name}: its UNet wants text of width {width}, the cache has {has}; an SDXL model is needed"
        )
    return unet


def learning_rate_schedule(optimizer, settings):
    """step -> factor on the learning rate, of the step alone, so that resuming needs no schedule's state."""
    warmup, steps = settings.lr_warmup_steps, settings.max_train_steps
    return get_scheduler(
        settings.lr_scheduler, optimizer, num_warmup_steps=warmup, num_training_steps=steps
    ).lr_lambdas[0]


def only_deterministic_kernels():
    """From here on PyTorch takes kernels that add in a fixed order, and raises where there is none."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when cuBLAS is first used
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it would write every new tensor once more


def make_optimizer(adapters, settings):
    """AdamW over the one flat vector, its state in 8 bits with --use_8bit_adam."""
    kind = partial(torch.optim.AdamW, fused=adapters.vector.is_cuda)  # one kernel, without copies of the vector
    if settings.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit as kind
    return kind([adapters.vector], lr=settings.learning_rate, weight_decay=settings.adam_weight_decay)
