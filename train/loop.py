"""READ 4. The training loop: setup composes, the loop narrates.

Per optimizer step: gradient_accumulation_steps micro-batches, each noised, predicted, compared, backpropagated into the
adapters' one flat gradient; then unscale, clip, step. Everything random is a function of (seed, step, slot), so stopping
and going on is running the same command again.
"""

from dataclasses import asdict
from functools import partial

import torch
from diffusers import UNet2DConditionModel
from diffusers.optimization import get_scheduler
from torch.utils.checkpoint import checkpoint

from data import sampler
from data.cache import Cache
from data.models import Model, load
from data.safe import Signals, Stopped, UserError
from lora.files import export
from lora.inject import inject
from train import diffusion
from train.health import Health
from train.metrics import Metrics
from train.state import load_state, save_state

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def train(settings, run):
    """RUN/cache -> RUN/lora.safetensors. `settings` is flags.Train, `run` the run's folder."""
    cache = Cache(run / "cache")
    base = Model(**cache.manifest["model"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = DTYPES[settings.mixed_precision]

    unet = load_unet(base, cache, dtype, device)
    adapters = inject(unet, settings.rank, settings.lora_alpha or settings.rank, settings.seed)
    if settings.gradient_checkpointing:  # keep a block's input only and compute the rest again in backward
        unet.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False, preserve_rng_state=False))
    scheduler = base.part("scheduler").config("scheduler_config.json")
    signal, predicts = diffusion.noise_schedule(scheduler).to(device), scheduler["prediction_type"]
    optimizer = make_optimizer(adapters, settings)
    lr_factor = learning_rate_schedule(optimizer, settings)
    autocast = partial(torch.autocast, device.type, dtype, enabled=settings.mixed_precision != "no")
    # fp16 ends at 6e-8: gradients are computed of a scaled loss, and the scale found by trying
    scaler = torch.amp.GradScaler(device.type, enabled=settings.mixed_precision == "fp16")
    health, slots = Health(scaler), settings.gradient_accumulation_steps

    identity = dict(asdict(settings), base=base.public_name(), cache=cache.manifest["content"])
    start = load_state(run / "state", adapters, optimizer, scaler, identity)
    if start >= settings.max_train_steps:
        print(f"{run}: finished, {start} steps are done; a larger --max_train_steps goes on")

    def micro_step(x0, eps, t, text, pooled, time_ids):
        """Forward and backward of one micro-batch, added to the adapters' gradient. -> its share of the step's loss"""
        xt = diffusion.add_noise(x0, eps, t, signal)
        condition = dict(text_embeds=pooled.to(dtype), time_ids=time_ids)
        with autocast():
            prediction = unet(xt, t, text.to(dtype), added_cond_kwargs=condition).sample
        wanted = diffusion.target(x0, eps, t, signal, predicts)
        loss = diffusion.loss(prediction, wanted, diffusion.loss_weight(t, signal, predicts, settings.snr_gamma)) / slots
        scaler.scale(loss).backward()
        return loss.detach()

    def save(path):
        export(adapters, path, identity["base"], cache.manifest["resolution"])

    stop = Signals()
    with Metrics(run / "metrics.jsonl", start, settings.max_train_steps, device) as metrics:
        for step in range(start, settings.max_train_steps):
            lr = settings.learning_rate * lr_factor(step)
            optimizer.param_groups[0]["lr"] = lr
            loss = torch.zeros((), device=device)
            for slot in range(slots):
                batch = draw(cache, settings, signal, step, slot)
                loss += micro_step(**{name: part.to(device) for name, part in batch.items()})

            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_([adapters.vector], settings.max_grad_norm)
            loss, norm = torch.stack([loss, norm]).tolist()  # here Python waits for the device
            health.check(partial(describe, cache, settings, signal, step), loss, norm)
            scaler.step(optimizer)  # not, when the gradient overflowed
            scaler.update()
            adapters.zero_grad()

            done, images = step + 1, slots * settings.train_batch_size
            metrics.log(done, images, loss=loss, lr=lr, grad_norm=norm, loss_scale=scaler.get_scale(), overflows=health.overflows)
            if done % settings.checkpointing_steps == 0 or done == settings.max_train_steps or stop.received:
                save_state(run / "state", done, adapters, optimizer, scaler, identity)
                save(run / f"lora-{done:06d}.safetensors")
            if stop.received and done < settings.max_train_steps:
                raise Stopped(stop.received, f"stopped after step {done}, saved; run the same command to go on")
    save(run / "lora.safetensors")


def draw(cache, settings, signal, step, slot):
    """The micro-batch of one slot, on the CPU: examples, a draw from their posteriors, noise, timesteps, dropped captions.

    -> x0, eps (B, 4, h, w) fp32, t (B,), text (B, 77, 2048), pooled (B, 1280), time_ids (B, 6)
    """
    B = settings.train_batch_size
    of = partial(sampler.generator, settings.seed, step=step, slot=slot)
    examples = chosen(cache, settings, step, slot)
    mirrored = torch.rand(B, generator=of("flip")) < 0.5
    empty = torch.rand(B, generator=of("dropout")) < settings.proportion_empty_prompts
    batch = {name: torch.from_numpy(array) for name, array in cache.batch(examples, mirrored.numpy(), empty.numpy()).items()}
    mean, std = batch.pop("mean").float(), batch.pop("std").float()
    batch["x0"] = diffusion.sample_posterior(
        mean, std, torch.randn(mean.shape, generator=of("posterior")), cache.manifest["scaling_factor"]
    )
    noise = of("noise")
    eps = torch.randn(mean.shape, generator=noise)
    batch["eps"] = eps + settings.noise_offset * torch.randn(*eps.shape[:2], 1, 1, generator=noise)
    batch["t"] = torch.randint(len(signal), (B,), generator=of("timestep"))
    return batch


def chosen(cache, settings, step, slot):
    """The examples of one slot's micro-batch, all of one size."""
    slots, lengths = settings.gradient_accumulation_steps, [len(members) for members in cache.members]
    size, positions = sampler.rows(settings.seed, step, slot, slots, settings.train_batch_size, lengths)
    return cache.members[size][positions].tolist()


def describe(cache, settings, signal, step):
    """What a step trained on, for messages: everything is drawn again from (seed, step, slot)."""
    slots = range(settings.gradient_accumulation_steps)
    examples = [example for slot in slots for example in chosen(cache, settings, step, slot)]
    times = [t for slot in slots for t in draw(cache, settings, signal, step, slot)["t"].tolist()]
    return f"step {step + 1}, {', '.join(cache.names(examples))}, timesteps {times}"


def load_unet(base, cache, dtype, device):
    """The base model's UNet. Raises UserError when it is not SDXL's kind or does not fit the cached text."""
    unet = load(UNet2DConditionModel, base.part("unet"), dtype, device)
    width, has = unet.config.cross_attention_dim, cache.manifest["text_shape"][1]
    if unet.config.addition_embed_type != "text_time" or width != has:
        raise UserError(f"{base.name}: its UNet wants text of width {width}, the cache has {has}; an SDXL model is needed")
    return unet


def learning_rate_schedule(optimizer, settings):
    """step -> factor on the learning rate, of the step alone, so that resuming needs no schedule's state."""
    warmup, steps = settings.lr_warmup_steps, settings.max_train_steps
    return get_scheduler(settings.lr_scheduler, optimizer, num_warmup_steps=warmup, num_training_steps=steps).lr_lambdas[0]


def make_optimizer(adapters, settings):
    """AdamW over the one flat vector, its state in 8 bits with --use_8bit_adam."""
    kind = torch.optim.AdamW
    if settings.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit as kind
    return kind([adapters.vector], lr=settings.learning_rate, weight_decay=settings.adam_weight_decay)
