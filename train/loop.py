"""READ 4. Training: the loop, backward and forward right below it, and then what they are made of.

One optimizer step trains on gradient_accumulation_steps micro-batches. Each is noised, predicted, compared and
backpropagated into the adapters' one flat gradient; then the gradient is unscaled and clipped, and the optimizer steps.
Everything random is a function of (seed, step, slot), where a slot is a micro-batch's place in its step. That is why
going on after a stop is running the same command again.

A rank in run.ranks is one of several processes, each with a GPU, that share the slots of every step; there is mostly
one, which has them all. LoRA's rank r is settings.rank.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from data import check
from data.cache import Cache, cache_folder
from data.common.errors import NumbersError, Stopped
from data.common.flags import Train
from data.common.safe import Signals
from data.models.files import Model, torch_dtype
from data.models.identity import check_unchanged
from lora import files
from lora.adapters import Adapters
from lora.inject import inject
from train import announce, diffusion, graph, parallel, plan, precision
from train.base import load_unet, prepare_device
from train.batches import Batches
from train.health import Health, give_up
from train.optimizer import bytes_of_a_weight, check_flags, learning_rate, make_optimizer
from train.parallel import Alone
from train.same_run import begin, identity_of, remember
from train.samples import Samples
from train.state import need_room, read_state, restore
from train.validate import PICTURES, Validation
from train.writer import origin_of, writer_for


def train(settings, folder):
    """RUN/cache -> RUN/lora.safetensors. `settings` is flags.Train, `folder` the run's folder."""
    run = setup(settings, folder)
    slots = settings.gradient_accumulation_steps
    images_per_step = slots * settings.train_batch_size
    if run.start >= settings.max_train_steps:
        print(f"{folder}: finished, {run.start} steps are done; more steps or epochs go on")

    announce.before(run)
    health, stop = Health(run.scaler), Signals()
    micro_batches = run.batches.ahead(run.start, run.ranks.index, run.ranks.count)
    with writer_for(run, stop) as writer:
        for step in range(run.start, settings.max_train_steps):
            run.optimizer.param_groups[0]["lr"] = lr = run.learning_rate(step)
            run.adapters.vector.grad.zero_()
            loss = torch.zeros((), device=run.device)
            for _ in range(slots // run.ranks.count):  # micro_step adds to the gradient, below
                loss += run.micro_step(next(micro_batches)) / slots
            loss = run.ranks.add_up(run.adapters.vector.grad, loss)

            run.scaler.unscale_(run.optimizer)
            norm = torch.nn.utils.clip_grad_norm_([run.adapters.vector], settings.max_grad_norm)
            loss, norm = torch.stack([loss, norm]).tolist()  # here Python waits for the device
            try:
                health.check(loss, norm)
            except NumbersError as error:
                raise give_up(run, writer, partial(forward, run), step, error) from None
            run.scaler.step(run.optimizer)  # does nothing when the gradient overflowed; the step counts all the same
            run.scaler.update()  # a smaller scale then, a larger one after 2,000 steps without
            run.adapters.refresh()  # the layers compute with the stepped weights from here on

            done, scale = step + 1, run.scaler.get_scale()
            numbers = dict(loss=loss, lr=lr, grad_norm=norm, loss_scale=scale, overflows=health.overflows)
            writer.log(done, images_per_step, numbers | run.validation.measure(done, stop))
            signal = run.ranks.agree(stop.received)  # asked once: one that comes after the save is the next step's
            if done % settings.checkpointing_steps == 0 or done == settings.max_train_steps or signal:
                writer.save(done)
            writer.show(done, run.samples.draw(done, stop))
            if signal and done < settings.max_train_steps:
                raise Stopped(signal, announce.stopped(run, done))
        writer.export("lora")
    announce.after(run, writer.seconds())
    run.ranks.leave()


def micro_step(run, **batch):
    """Forward and backward of one micro-batch: its share of the step's gradient is added to the adapters'. -> loss

    Not by backward(), because the layers' A and B are copies, in the base's dtype, of the fp32 vector that is trained:
    add_gradients adds the copies' gradients to the vector's.
    """
    weight = diffusion.loss_weight(batch["t"], run.alpha_bar, run.prediction_type, run.settings.snr_gamma)
    loss = (weight * forward(run, **batch)).mean()
    scaled = run.scaler.scale(loss / run.settings.gradient_accumulation_steps)  # a step's loss is their mean
    run.adapters.add_gradients(torch.autograd.grad(scaled, run.adapters.parameters))
    return loss.detach()


def forward(run, *, x0, eps, t, text, pooled, time_ids):
    """Squared errors (B,) of the pictures: noised, predicted, compared. train/batches.py drew the latents x0, the noise
    eps and the timesteps t; text, pooled (two embeddings of the caption) and time_ids (sizes, crop) are the cache's.

    Held-out pictures are measured with it as well; micro_step's weight is of the trained ones alone.
    """
    xt = diffusion.add_noise(x0, eps, t, run.alpha_bar)
    condition = dict(text_embeds=pooled.to(run.dtype), time_ids=time_ids)
    prediction = run.unet(xt.to(run.dtype), t, text.to(run.dtype), added_cond_kwargs=condition).sample
    target = diffusion.target(x0, eps, t, run.alpha_bar, run.prediction_type)
    return diffusion.squared_error(prediction, target)


@dataclass
class Run:
    """What a run carries from step to step."""

    settings: Train
    folder: Path
    cache: Cache
    batches: Batches
    device: torch.device
    dtype: torch.dtype  # the UNet computes in it
    unet: UNet2DConditionModel  # frozen, with the adapters in it
    adapters: Adapters
    alpha_bar: torch.Tensor  # (T,) on the device
    prediction_type: str
    optimizer: torch.optim.Optimizer
    learning_rate: Callable  # step -> learning rate
    scaler: torch.amp.GradScaler
    ranks: Alone  # this process among those that train together: Alone, or one of Ranks
    identity: dict  # what a continuation of this run must agree with
    origin: files.Origin  # what its files of weights say
    samples: Samples  # draws prompts while training
    start: int  # steps that are done
    memory_plan: dict | None  # which blocks are recomputed, and what that was decided for
    best: dict | None  # of the saves before `start`, the step with the lowest held-out loss, and that
    # plan_and_capture adds these two
    micro_step: Callable | None = None  # batch on the CPU -> loss: the function above, a captured graph on a GPU
    validation: Validation | None = None  # measures pictures that were held out


def setup(settings, folder):
    """-> the Run, ready for its next step. Whatever can be refused is refused before the model is loaded."""
    cache = Cache(cache_folder(folder, settings.cache_dir))
    base, vae = Model(**cache.manifest["model"]), Model(**cache.manifest["vae"])
    device, dtype = prepare_device(settings), torch_dtype(settings.mixed_precision)
    ranks = parallel.join(device)
    first = ranks.index == 0  # it alone reads and writes the run's folder, and tells the others
    config, shapes = base.unet_config(), cache.manifest["posterior_shapes"]
    decided = precision.of_the_base(settings, config, shapes, dtype, device) if first else None
    settings = replace(settings, base_precision=ranks.from_first(decided))
    check.gpu_memory(config, dtype, device, settings.base_precision)
    check_flags(settings)

    # which run this is, and what an earlier command left of it
    found = check_unchanged(cache.manifest["components"], base, vae, "run python -m data.precompute again")
    of_the_model = {name: found.get(name) for name in ("unet", "scheduler", "model_index")}
    name = f"local-{found.get('unet')}" if base.is_local() else base.name  # a folder may move and be renamed
    identity = identity_of(folder, settings, cache.manifest, base=name, revision=base.revision, **of_the_model)
    state = ranks.from_first(read_state(folder / "state", identity) if first and not settings.restart else None)
    scheduler = base.component("scheduler").config()
    alpha_bar = diffusion.noise_schedule(scheduler)

    # a frozen UNet, the updates in it, and what trains them
    unet = load_unet(base, cache, dtype, device, settings.base_precision)
    adapters = make_adapters(unet, settings, scheduler["prediction_type"], goes_on=state is not None)
    optimizer = make_optimizer(adapters.vector, settings)
    # fp16 ends at 6e-8, so gradients are of a loss times a scale, which the scaler finds by trying and divides out
    scaler = torch.amp.GradScaler(device.type, enabled=settings.mixed_precision == "fp16")
    start, memory_plan, best = restore(state, adapters, optimizer, scaler, ranks.count)
    if first:
        need_room(folder, settings, adapters.vector.numel(), start, cache.manifest["held_out"] > 0)
        if state:
            remember(folder, identity, cache.folder)
        else:
            begin(folder, identity, cache.folder, settings.restart)

    run = Run(
        settings=settings,
        folder=folder,
        cache=cache,
        batches=Batches(cache, settings, len(alpha_bar)),
        device=device,
        dtype=dtype,
        unet=unet,
        adapters=adapters,
        alpha_bar=alpha_bar.to(device),
        prediction_type=scheduler["prediction_type"],
        optimizer=optimizer,
        learning_rate=learning_rate(optimizer, settings),
        scaler=scaler,
        ranks=ranks,
        identity=identity,
        origin=origin_of(folder, settings, cache.manifest, base, scheduler, found.get("unet")),
        samples=Samples(settings, folder, cache, base, vae, unet, first),
        start=start,
        memory_plan=memory_plan,
        best=best,
    )
    plan_and_capture(run)
    return run


def plan_and_capture(run):
    """Decide which blocks recompute their activations, and give the run its micro-step and its validation.

    Both call a function above with batches on the CPU: graph.Eager copies a batch to the device and calls the function,
    graph.Captured copies it and replays, all at once, the kernels that the function started when it was captured.
    """
    settings, eager = run.settings, graph.Eager(partial(micro_step, run), run.device)
    batches = run.batches.one_of_each_bucket()  # of random numbers, the largest shape first
    run.memory_plan = plan.make(
        settings.vram_gib,
        settings.gradient_checkpointing,
        run.unet,
        partial(eager, batches[0]),
        run.device,
        # what a new optimizer allocates in its first step; one that was restored has it
        state_bytes=0 if run.start else run.adapters.vector.numel() * bytes_of_a_weight(settings),
        before=run.memory_plan,
        pictures=run.samples.memory,
        shapes=len(batches),
    )
    plan.recompute(run.unet, run.memory_plan["recomputed"])
    prepare = graph.preparer(run.device, capture=not settings.no_cuda_graph)
    run.micro_step = prepare(eager.function, batches)
    errors = partial(prepare, torch.no_grad()(partial(forward, run)))
    pictures = 0 if run.ranks.index else PICTURES
    run.validation = Validation(settings, run.cache, len(run.alpha_bar), run.adapters, errors, run.best, pictures)


def make_adapters(unet, settings, prediction_type, goes_on):
    """The adapters, put into the UNet: new ones, or those of --network_weights where a new run starts from a file."""
    if not settings.network_weights or goes_on:  # a state replaces them
        alpha = settings.lora_alpha or settings.rank
        return inject(unet, settings.rank, alpha, settings.seed, settings.lora_layers)
    weights = files.read(settings.network_weights)
    weights.contents.warn_of_another_prediction(prediction_type)
    adapters = files.load(unet, weights, settings.seed)
    of = f"rank {adapters.rank}, alpha {adapters.alpha:g}, --lora_layers {settings.lora_layers}"
    print(f"starts from {settings.network_weights}: {of}", flush=True)
    return adapters
