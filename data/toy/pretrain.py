"""python -m data.toy.pretrain --out DIR: train the toy's SDXL from scratch, on one GPU.

The VAE comes first and sees every style. Then the UNet and both text encoders are trained together, on every style but
ink, because that one is for the LoRA to learn. Both stages run for a given time instead of a number of steps, so that
the learning rate's schedule fits the machine. A piece of the work ends after --seconds and saves its state. The same
command goes on from there, until DIR/pipeline.tar, DIR/losses.json and the sheets are complete.

Weights are kept in fp32, the networks compute in bf16, and forward, backward and update are one CUDA graph.
"""

import argparse
import json
import math
import os
import tarfile
import time
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

from .examples import examples, picture
from .model import TINY, Widths, build
from .world import PROMPTS, SIZE, STYLES, sheet

LATENT_STD = 1 / 0.13025  # what SDXL's scaling factor is made for; the trained VAE is brought to it
COUNTS = {"base": 24000, "ink": 6000, "poster": 3000, "sketch": 3000, "chalk": 3000, "faded": 3000}  # pictures


def log(*words):
    print(time.strftime("%H:%M:%S"), *words, flush=True)


@dataclass(frozen=True)
class Plan:
    """How much of everything. Latents and pictures are square; batch sizes are per optimizer step."""

    counts: dict = field(default_factory=COUNTS.copy)
    widths: Widths = Widths()
    vae_batch: int = 64
    vae_rate: float = 1e-3
    unet_batch: int = 256
    unet_rate: float = 1e-3
    warmup: int = 300  # steps at the start of every piece
    average: float = 0.9995  # decay of the exponential moving average, which the pipeline holds in the end
    log_every: int = 100
    sampling_steps: int = 25
    evaluated: int = 64  # pictures of each style
    finish_seconds: float = 35.0  # what training leaves of a piece, for the sheets and for saving

    @classmethod
    def smoke(cls):
        few = dict(vae_batch=4, unet_batch=8, warmup=4, log_every=2, sampling_steps=2, evaluated=4, finish_seconds=0.0)
        return cls(dict.fromkeys(STYLES, 12), TINY, **few)


class Trainer:
    """Optimizer steps for the parameters of some modules on static inputs.

    `terms(**inputs)` returns the loss as a vector of terms, whose sum is minimised. The modules compute in `dtype`; the
    weights that the optimizer sees, and their moving average, are fp32.
    """

    def __init__(self, modules, terms, inputs, dtype):
        self.parameters = [p for module in modules for p in module.parameters()]
        self.names = [f"{i}.{name}" for i, module in enumerate(modules) for name, _ in module.named_parameters()]
        self.weights = [p.detach().float().clone() for p in self.parameters]
        self.average = [w.clone() for w in self.weights]
        for module in modules:
            module.to(dtype).train()
        self.terms, self.inputs, self.graph, self.steps = terms, inputs, None, 0
        cuda = self.weights[0].is_cuda
        self.rate = torch.zeros((), device=self.weights[0].device)  # a tensor, because a captured graph fixes numbers
        self.optimizer = torch.optim.AdamW(
            self.weights, lr=self.rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True, capturable=cuda
        )

    def prepare(self):
        """Compile and capture the step on whatever the inputs hold, which changes no weight because the rate is 0."""
        if self.weights[0].is_cuda:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    self._update()
            torch.cuda.current_stream().wait_stream(side)
            self._forget_gradients()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.last_terms = self._update()
        else:
            self._update()
        for state in self.optimizer.state.values():  # forget what the preparation left in Adam's moments
            for value in state.values():
                value.zero_()

    def _forget_gradients(self):
        for p in self.parameters:
            p.grad = None

    def _update(self):
        self._forget_gradients()
        terms = self.terms(**self.inputs)
        terms.sum().backward()
        # CLIP's last layer has no gradient, because its output is not used.
        used = [(w, p) for w, p in zip(self.weights, self.parameters) if p.grad is not None]
        for w, _ in used:
            if w.grad is None:
                w.grad = torch.zeros_like(w)
        weights, parameters = zip(*used)
        torch._foreach_copy_([w.grad for w in weights], [p.grad for p in parameters])
        torch.nn.utils.clip_grad_norm_(weights, 1.0, foreach=True)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(parameters, weights)
        return terms.detach()

    def step(self, rate, decay):
        """Take one step on the current inputs. -> the loss terms, on the device, valid until the next step."""
        self.rate.fill_(rate)
        if self.graph:
            self.graph.replay()
        else:
            self.last_terms = self._update()
        self.steps += 1
        torch._foreach_lerp_(self.average, self.weights, 1 - min(decay, (1 + self.steps) / (10 + self.steps)))
        return self.last_terms

    def save(self, prefix):
        """Write the weights and their average as two files, in fp16.

        Adam's moments are not kept: they look back a hundred steps, and the next piece warms up for longer.
        """
        for kind in ("weights", "average"):
            tensors = {name: t.half().contiguous() for name, t in zip(self.names, getattr(self, kind))}
            save_file(tensors, f"{prefix}_{kind}.safetensors")

    def load(self, prefix, steps):
        self.steps = steps
        for kind in ("weights", "average"):
            tensors = load_file(f"{prefix}_{kind}.safetensors")
            torch._foreach_copy_(getattr(self, kind), [tensors[name].to(self.rate.device) for name in self.names])
        self._show(self.weights)

    def finish(self, modules):
        """Leave the averaged weights in the modules, in fp32, ready for use."""
        for module in modules:
            module.float().eval().requires_grad_(False)
        self._show(self.average)

    def _show(self, values):
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, values)


class Ledger(dict):
    """DIR/losses.json: for each stage the seconds and steps done, the loss curve and the measurements.

    A piece writes it last, so what it says was done is on disk.
    """

    def __init__(self, out):
        super().__init__()
        self.path = Path(out, "losses.json")
        if self.path.exists():
            self.update(json.loads(self.path.read_text()))

    def stage(self, name):
        return self.setdefault(name, {"seconds": 0.0, "steps": 0, "done": False, "losses": []})

    def save(self):
        unfinished = self.path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(self, indent=1))
        os.replace(unfinished, self.path)


def train(trainer, fill, record, plan, peak_rate, budget, deadline):
    """Train until the stage's `budget` of seconds is spent, or until the clock reaches `deadline`, but at least a step.

    `fill(inputs)` writes a batch into the static inputs. The rate falls along a cosine of the share of time spent.
    -> whether the budget is spent
    """
    start, spent, in_piece, sums, summed = time.monotonic(), record["seconds"], 0, 0, 0
    while spent < budget:
        fill(trainer.inputs)
        cosine = 0.5 + 0.5 * math.cos(math.pi * spent / budget)
        in_piece += 1
        terms = trainer.step(peak_rate * min(1, in_piece / plan.warmup) * (0.01 + 0.99 * cosine), plan.average)
        sums, summed = sums + terms, summed + 1
        if trainer.steps % plan.log_every == 0:
            mean = [round(v, 5) for v in (sums / summed).tolist()]  # also keeps the host in step with the device
            record["losses"].append([trainer.steps, *mean])
            sums, summed = 0, 0
            if trainer.steps % (10 * plan.log_every) == 0:
                log("step", trainer.steps, mean, f"{(time.monotonic() - start) / in_piece * 1e3:.1f} ms/step")
        spent = record["seconds"] + time.monotonic() - start
        if time.monotonic() >= deadline:
            break
    record["seconds"], record["steps"] = round(spent, 2), trainer.steps
    return spent >= budget


def run_stage(name, trainer, modules, fill, ledger, plan, peak_rate, budget, args):
    """Go on with a stage from its saved state and save it again. -> whether the stage is trained

    The modules hold the averaged weights afterwards.
    """
    record, prefix = ledger.stage(name), Path(args.out, name)
    if record["steps"]:
        trainer.load(prefix, record["steps"])
    torch.manual_seed(args.seed + record["steps"])
    trained = train(trainer, fill, record, plan, peak_rate, budget, args.started + args.seconds - plan.finish_seconds)
    outcome = "of training" if trained else "so far: run the same command again"
    log(name, f"{record['steps']} steps in {record['seconds']} s", outcome)
    trainer.save(prefix)
    trainer.finish(modules)
    ledger.save()
    return trained


def vae_terms(vae):
    """The VAE's loss: absolute error of pixels and of their differences to the neighbours (edges), and a little KL."""

    def terms(pictures, noise):
        dtype = vae.post_quant_conv.weight.dtype
        mean, logvar = vae.quant_conv(vae.encoder(pictures.to(dtype))).float().chunk(2, dim=1)  # of the posterior
        logvar = logvar.clamp(-30, 20)
        latents = mean + noise * torch.exp(0.5 * logvar)
        output = vae.decoder(vae.post_quant_conv(latents.to(dtype))).float()
        pixels = F.l1_loss(output, pictures)
        edges = F.l1_loss(output.diff(dim=3), pictures.diff(dim=3))
        edges = edges + F.l1_loss(output.diff(dim=2), pictures.diff(dim=2))
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return torch.stack([pixels, edges, 1e-4 * divergence])

    return terms


def normalise(vae, latents):
    """Shift and scale each latent channel inside the VAE's own 1 x 1 convolutions.

    `latents` (B, 4, h, w) are what it gives now for the base style. Afterwards it gives the same pictures latents of
    mean 0 and of the standard deviation that SDXL's scaling factor is made for.
    """
    mean, gain = latents.mean((0, 2, 3)), LATENT_STD / latents.std((0, 2, 3))
    quant, post = vae.quant_conv, vae.post_quant_conv
    post.bias += (post.weight[:, :, 0, 0] * mean).sum(dim=1)
    post.weight /= gain[None, :, None, None]
    quant.weight[:4] *= gain[:, None, None, None]
    quant.bias[:4] = (quant.bias[:4] - mean) * gain
    quant.bias[4:] += 2 * gain.log()  # the log of a variance


def encode(vae, pictures):
    """uint8 (n, 128, 128, 3) on the device -> latents (n, 4, 16, 16), the posterior's mean, unscaled."""
    return torch.cat([vae.encode(to_tensor(chunk)).latent_dist.mean for chunk in pictures.split(256)])


def to_tensor(pictures):
    """uint8 (n, H, W, 3) -> (n, 3, H, W) in -1..1."""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(tensor):
    """(n, 3, H, W) in -1..1 -> [PIL.Image]."""
    pixels = ((tensor.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(p) for p in pixels]


class Pictures:
    """All examples and their pictures, which every core renders in the background while the GPU is prepared."""

    def __init__(self, counts):
        self.examples = examples(counts)
        self.pool = get_context("fork").Pool(min(16, os.cpu_count()))  # forked before anything touches the GPU
        self.rendering = self.pool.map_async(picture, self.examples, chunksize=64)
        self.pool.close()

    @cached_property
    def pixels(self):
        """uint8 (n, 128, 128, 3), on the CPU. Waits for the rendering."""
        pixels = torch.from_numpy(np.stack(self.rendering.get()))
        self.pool.join()
        log("rendered", len(pixels), "pictures")
        return pixels

    def of(self, style):
        """The indices of a style's whole pictures."""
        return [i for i, e in enumerate(self.examples) if e.style == style and e.original == SIZE]


def train_vae(pipeline, pictures, ledger, plan, args, device, dtype):
    """The VAE's stage. -> whether it is done; DIR/pipeline/vae and sheet_vae.png are there then"""
    vae, batch = pipeline.vae, plan.vae_batch
    inputs = {
        "pictures": torch.zeros(batch, 3, SIZE, SIZE, device=device).contiguous(memory_format=torch.channels_last),
        "noise": torch.zeros(batch, 4, SIZE // 8, SIZE // 8, device=device),
    }
    vae.to(device, memory_format=torch.channels_last)
    terms = vae_terms(vae)
    trainer = Trainer([vae], torch.compile(terms, dynamic=False) if "vae" in args.compile else terms, inputs, dtype)
    trainer.prepare()
    log("VAE prepared")
    pixels = pictures.pixels.to(device)

    # Ink is seen more often than its share, because the VAE finds its lines hard.
    share = dict.fromkeys(plan.counts, 0.25 / (len(plan.counts) - 2)) | {"base": 0.45, "ink": 0.3}
    weights = torch.tensor([share[e.style] / plan.counts[e.style] for e in pictures.examples], device=device)

    def fill(inputs):
        inputs["pictures"].copy_(to_tensor(pixels[torch.multinomial(weights, batch, replacement=True)]))
        inputs["noise"].normal_()

    if not run_stage("vae", trainer, [vae], fill, ledger, plan, plan.vae_rate, args.vae_seconds, args):
        return False
    vae.to(memory_format=torch.contiguous_format)
    with torch.no_grad():
        normalise(vae, encode(vae, pixels[pictures.of("base")[:2048]]))
        shown, errors = [], {}
        for style in plan.counts:
            truth = to_tensor(pixels[pictures.of(style)[: plan.evaluated]])
            output = vae.decode(vae.encode(truth).latent_dist.mean).sample
            errors[style] = round(F.l1_loss(output, truth).item(), 4)
            shown += to_images(truth[:4]) + to_images(output[:4])
    sheet(shown, columns=8).save(Path(args.out, "sheet_vae.png"))
    ledger["vae"]["l1"] = errors
    log("VAE reconstruction L1", errors)
    vae.half().save_pretrained(Path(args.out, "pipeline", "vae"))
    vae.float()
    ledger["vae"]["done"] = True
    ledger.save()
    return True


def unet_terms(pipeline, dtype):
    """The UNet's loss: mean squared error of the predicted noise.

    `keep` (B,) is 0 where the caption is dropped. Its embeddings are zeros then, as SDXL's unconditional ones are.
    """
    unet, first, second = pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2
    alpha_bar = pipeline.scheduler.alphas_cumprod.to(unet.device)

    def terms(latents, noise, timesteps, tokens_1, tokens_2, keep, time_ids):
        share = alpha_bar[timesteps].view(-1, 1, 1, 1)
        noisy = share.sqrt() * latents + (1 - share).sqrt() * noise
        one = first(tokens_1, output_hidden_states=True)
        two = second(tokens_2, output_hidden_states=True)
        text = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1) * keep.view(-1, 1, 1).to(dtype)
        conditions = {"text_embeds": two.text_embeds * keep.view(-1, 1).to(dtype), "time_ids": time_ids}
        predicted = unet(noisy.to(dtype), timesteps, text, added_cond_kwargs=conditions).sample
        return F.mse_loss(predicted.float(), noise).view(1)

    return terms


def train_unet(pipeline, pictures, ledger, plan, args, device, dtype):
    """The stage of UNet and text encoders. -> whether it is done; the pipeline's modules hold the average then"""
    vae, unet, batch, side = pipeline.vae, pipeline.unet, plan.unet_batch, SIZE // 8
    vae.load_state_dict(load_file(Path(args.out, "pipeline", "vae", "diffusion_pytorch_model.safetensors")))
    vae.to(device).eval().requires_grad_(False)
    encoders = [pipeline.text_encoder.to(device), pipeline.text_encoder_2.to(device)]
    modules = [unet.to(device, memory_format=torch.channels_last), *encoders]
    whole = torch.tensor([SIZE, SIZE, 0, 0, SIZE, SIZE], dtype=torch.float, device=device)
    inputs = {
        "latents": torch.zeros(batch, 4, side, side, device=device),
        "noise": torch.zeros(batch, 4, side, side, device=device),
        "timesteps": torch.zeros(batch, dtype=torch.long, device=device),
        "tokens_1": torch.zeros(batch, 77, dtype=torch.long, device=device),
        "tokens_2": torch.zeros(batch, 77, dtype=torch.long, device=device),
        "keep": torch.ones(batch, device=device),
        "time_ids": whole.repeat(batch, 1),
    }
    terms = unet_terms(pipeline, dtype)
    trainer = Trainer(modules, torch.compile(terms, dynamic=False) if "unet" in args.compile else terms, inputs, dtype)
    trainer.prepare()
    log("UNet prepared")

    pixels = pictures.pixels.to(device)
    seen = [i for i, e in enumerate(pictures.examples) if e.style != "ink"]
    with torch.no_grad():
        latents = encode(vae, pixels[seen]) * vae.config.scaling_factor
    texts = [pictures.examples[i].text for i in seen]
    row = {text: n for n, text in enumerate(dict.fromkeys(texts))}
    caption_of = torch.tensor([row[text] for text in texts], device=device)
    tokens_1, tokens_2 = (
        t(list(row), padding="max_length", max_length=77, return_tensors="pt").input_ids.to(device)
        for t in (pipeline.tokenizer, pipeline.tokenizer_2)
    )
    time_ids = torch.tensor([pictures.examples[i].time_ids for i in seen], dtype=torch.float, device=device)
    log("encoded", len(latents), "pictures, latents' standard deviation", round(latents.std().item(), 3))

    def fill(inputs, rows=None):
        rows = torch.randint(len(latents), (batch,), device=device) if rows is None else rows
        inputs["latents"].copy_(latents[rows])
        inputs["noise"].normal_()
        inputs["timesteps"].random_(0, 1000)
        inputs["tokens_1"].copy_(tokens_1[caption_of[rows]])
        inputs["tokens_2"].copy_(tokens_2[caption_of[rows]])
        inputs["keep"].copy_(torch.rand(batch, device=device) > 0.1)
        inputs["time_ids"].copy_(time_ids[rows])

    done = run_stage("unet", trainer, modules, fill, ledger, plan, plan.unet_rate, args.unet_seconds, args)
    if done:
        views = (time_ids != whole).any(dim=1).nonzero().flatten()
        ledger["unet"]["time_ids"] = time_id_losses(unet_terms(pipeline, torch.float), inputs, fill, views, whole)
        log("loss on crops and enlargements with and without their time ids", ledger["unet"]["time_ids"])
    return done


def time_id_losses(terms, inputs, fill, views, whole, batches=16):
    """The loss on crops and enlargements when the time ids say what they are, and when they say whole pictures.

    Both see the same noise.
    """
    losses = {"true": 0.0, "whole": 0.0}
    with torch.no_grad():
        for _ in range(batches):
            fill(inputs, views[torch.randint(len(views), (len(inputs["keep"]),), device=views.device)])
            losses["true"] += terms(**inputs).item() / batches
            losses["whole"] += terms(**(inputs | {"time_ids": whole.expand_as(inputs["time_ids"])})).item() / batches
    return {name: round(value, 5) for name, value in losses.items()}


def finish(pipeline, ledger, plan, args):
    """Draw the sheets of samples, then write the pipeline in fp16 as DIR/pipeline and DIR/pipeline.tar."""

    def sample(prompts, **options):
        generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
        size = {"height": SIZE, "width": SIZE, "num_inference_steps": plan.sampling_steps, "guidance_scale": 5.0}
        return pipeline(prompts, generator=generators, **size, **options).images

    few = PROMPTS[:8]
    sheet(sample(PROMPTS), columns=8).save(Path(args.out, "sheet_base.png"))
    known = [style.words for style in STYLES.values() if style.words]
    styled = [image for words in known for image in sample([p + words for p in few])]
    sheet(styled, columns=8).save(Path(args.out, "sheet_styles.png"))
    views = [
        {"original_size": (40, 40)},
        {"original_size": (192, 192), "crops_coords_top_left": (0, 0)},
        {"original_size": (192, 192), "crops_coords_top_left": (64, 64)},
    ]
    viewed = [image for view in views for image in sample(few, **view)]
    sheet(viewed, columns=8).save(Path(args.out, "sheet_time_ids.png"))
    folder = Path(args.out, "pipeline")
    pipeline.unet.to(memory_format=torch.contiguous_format)
    pipeline.to("cpu", torch.float16, silence_dtype_warnings=True)
    pipeline.save_pretrained(folder)
    with tarfile.open(Path(args.out, "pipeline.tar"), "w") as archive:
        archive.add(folder, "pipeline")
    ledger["unet"]["done"] = True
    ledger["bytes"] = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    ledger.save()
    log("saved", folder, f"{ledger['bytes'] / 1e6:.2f} MB")


def parse_arguments(argv):
    what = "train the toy's SDXL from scratch"
    parser = argparse.ArgumentParser(prog="python -m data.toy.pretrain", description=what)
    add = parser.add_argument
    add("--out", required=True, help="folder for the state, the sheets, losses.json and the pipeline")
    both = "stop after the VAE, go on with the UNet, or both (default)"
    add("--stage", choices=("vae", "unet", "all"), default="all", help=both)
    add(
        "--seconds",
        type=float,
        default=510,
        help="end this piece after so long; the same command goes on (default 510)",
    )
    add("--vae_seconds", type=float, default=330, help="training time of the VAE over all pieces (default 330)")
    add("--unet_seconds", type=float, default=400, help="training time of the UNet over all pieces (default 400)")
    faster = "stages to torch.compile: faster steps after a minute"
    add("--compile", nargs="*", choices=("vae", "unet"), default=(), help=faster)
    add("--seed", type=int, default=0)
    add("--smoke", action="store_true", help="every stage at a tiny size, for a test")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_arguments(argv)
    plan = Plan.smoke() if args.smoke else Plan()
    args.started = time.monotonic()
    os.makedirs(args.out, exist_ok=True)
    ledger = Ledger(args.out)
    stages = ("vae", "unet") if args.stage == "all" else (args.stage,)
    todo = [stage for stage in stages if not ledger.stage(stage)["done"]]
    if not todo:
        log("done already:", args.out)
        return

    pictures = Pictures(plan.counts)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    pipeline = build(plan.widths, args.seed)
    trained = True
    if "vae" in todo:
        trained = train_vae(pipeline, pictures, ledger, plan, args, device, dtype)
    if "unet" in todo and trained and train_unet(pipeline, pictures, ledger, plan, args, device, dtype):
        finish(pipeline, ledger, plan, args)


if __name__ == "__main__":
    main()
