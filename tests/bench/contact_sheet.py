"""What the cache holds, to be looked at: sixty pictures of many kinds, each next to what its cached latent decodes to.

    python -m tests.bench.contact_sheet OUT

Toy scenes in the modes, formats, orientations, proportions and sizes that folders hold go through the real precompute.
Writes OUT/contact_sheet.png and OUT/contact_sheet.json. Left in each pair is what data.images reads, cropped to its
bucket. Only the eye sees where both are wrong: magenta is dropped transparency, red is another frame than the first,
and exif1 to exif8 show one scene. Greys come back tinted and dithering as mush, because the toy's VAE was trained on
neither.
"""

import argparse
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from data.buckets import resize_and_crop
from data.cache import Cache
from data.common import safe
from data.images import read_rgb
from data.toy.world import caption, random_scene, render

TOY = Path(__file__).parents[2] / "data/toy/pipeline"
RESOLUTION = 256
RATIOS = (1, 5 / 4, 3 / 2, 16 / 9, 2, 4 / 3, 3, 1, 1.6, 2.5, 1.9, 1.1, 1.7)  # of the sides, wide or tall
FACTORS = (0.4, 0.8, 1, 2, 4)  # the sides over the bucket's
CELL, LABEL, GAP, COLUMNS = (136, 96), 14, 4, 6  # of the sheet, in pixels: a picture's cell, the line below it, ...


def see_through(image):
    """RGBA: a soft oval of the picture. What nobody should see is magenta."""
    alpha = Image.radial_gradient("L").resize(image.size).point(lambda v: min(255, max(0, 8 * (175 - v))))
    image = Image.composite(image, Image.new("RGB", image.size, "magenta"), alpha.point(lambda v: 255 * (v > 0)))
    image.putalpha(alpha)
    return image


KINDS = {  # mode -> how a picture is brought to it, and the formats that have it
    "RGB": (lambda image: image, "png jpg webp tiff bmp gif"),
    "RGBA": (see_through, "png webp tiff gif"),
    "LA": (lambda image: see_through(image).convert("LA"), "png tiff"),
    "P": (lambda image: image.quantize(), "png bmp gif"),
    "PA": (lambda image: see_through(image).quantize(), "png"),  # a palette with an alpha for each colour
    "1": (lambda image: image.convert("1"), "png tiff"),
    "L": (lambda image: image.convert("L"), "png jpg tiff"),
    "I16": (lambda image: Image.fromarray(np.asarray(image.convert("L")) * np.uint16(257)), "png tiff"),
    "F": (lambda image: Image.fromarray(np.asarray(image.convert("L")) * np.float32(0.01)), "tiff"),
    "CMYK": (lambda image: image.convert("CMYK"), "jpg tiff"),
}
# How a camera stores a picture of EXIF orientation 2 to 8.
STORED = ["FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_90", "TRANSVERSE", "ROTATE_270"]


def drawn(seed, style, ratio, side):
    """A scene of about side² pixels with width / height = ratio.

    It is in the middle, and its edges are drawn out over what the longer side has more.
    """
    width, height = round(side * ratio**0.5), round(side / ratio**0.5)
    pixels, spare = np.asarray(render(random_scene(seed), style, seed, min(width, height))), abs(width - height)
    around, none = (spare // 2, spare - spare // 2), (0, 0)
    return Image.fromarray(np.pad(pixels, (none, around, none) if width > height else (around, none, none), "edge"))


def pictures():
    """Yields sixty times (name, picture, how to save it, seed).

    First comes each kind, wide and tall, then one scene in all orientations.
    """
    kinds = [(kind, suffix, turn) for kind, (_, all_) in KINDS.items() for suffix in all_.split() for turn in (1, -1)]
    for i, (kind, suffix, turn) in enumerate(kinds):
        size = RATIOS[i % len(RATIOS)] ** turn, FACTORS[i % len(FACTORS)] * RESOLUTION
        image = KINDS[kind][0](drawn(i, ("base", "ink")[(i + 1) // 2 % 2], *size))
        frames = dict(save_all=True, append_images=[Image.new("RGB", image.size, "red")]) if suffix == "gif" else {}
        yield f"{i:02d}-{kind}.{suffix}", image, frames, i
    for i in range(1, 9):
        image, exif = drawn(99, "base", 1.5, 1.5 * RESOLUTION), Image.Exif()
        exif[0x0112], image = i, image if i == 1 else image.transpose(Image.Transpose[STORED[i - 2]])
        yield f"{len(kinds) + i - 1}-exif{i}.{('jpg', 'png', 'webp', 'tiff')[i % 4]}", image, dict(exif=exif), 99


@torch.inference_mode()
def pairs(cache, folder):
    """{name: (what is read, what is decoded)} of the whole cache, each uint8 (H, W, 3) of its bucket."""
    from diffusers import AutoencoderKL

    vae, found = AutoencoderKL.from_pretrained(TOY / "vae", torch_dtype=torch.float32).eval(), {}
    for bucket, members in zip(cache.buckets, cache.members):
        for example, name in zip(members, cache.names(members)):
            mean = torch.from_numpy(cache.batch([example], [False], [False])["mean"]).float()
            latent = mean * cache.manifest["scaling_factor"]  # what training sees
            decoded = vae.decode(latent / vae.config.scaling_factor).sample[0].permute(1, 2, 0)
            decoded = ((decoded + 1) * 127.5).round().clamp(0, 255).byte().numpy()
            found[name] = resize_and_crop(read_rgb((folder / name).read_bytes(), name), bucket, name), decoded
    return dict(sorted(found.items()))


def sheet(found, folder):
    """One picture with a cell for each pair: its name, the file's mode and size, and its bucket."""
    font, across, down = ImageFont.load_default(size=11), 2 * CELL[0] + 3 * GAP, CELL[1] + LABEL + GAP
    page = Image.new("RGB", (COLUMNS * across, -(-len(found) // COLUMNS) * down), (170, 170, 170))
    for i, (name, both) in enumerate(found.items()):
        left, top = i % COLUMNS * across + GAP, i // COLUMNS * down + GAP
        with Image.open(folder / name) as image:
            text = f"{name}  {image.mode} {image.width}x{image.height} in {both[0].shape[1]}x{both[0].shape[0]}"
        ImageDraw.Draw(page).text((left, top + CELL[1] - 1), text, "black", font)
        for column, pixels in enumerate(both):
            small = ImageOps.contain(Image.fromarray(pixels), CELL)
            page.paste(small, (left + column * (small.width + GAP), top))
    return page


def main(argv):
    parser = argparse.ArgumentParser(prog="python -m tests.bench.contact_sheet", description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--pictures", type=int, help="only the first so many of the sixty")
    args = parser.parse_args(argv)
    out = args.out.resolve()
    folder, run = out / "pictures", out / "run"
    for old in (folder, run):
        shutil.rmtree(old, ignore_errors=True)
    folder.mkdir(parents=True)
    with open(folder / "metadata.jsonl", "w") as metadata:
        for name, image, options, seed in itertools.islice(pictures(), args.pictures):
            image.save(folder / name, **options)
            metadata.write(json.dumps({"file_name": name, "text": caption(random_scene(seed))}) + "\n")
    flags = ["--output_dir", run, "--train_data_dir", folder, "--pretrained_model_name_or_path", TOY]
    flags += ["--buckets", "--resolution", RESOLUTION, "--mixed_precision", "no"]
    subprocess.run([sys.executable, "-m", "data.precompute", *map(str, flags)], check=True)

    cache = Cache(run / "cache")
    found = pairs(cache, folder)
    sheet(found, folder).save(out / "contact_sheet.png", optimize=True)
    buckets = {f"{width}x{height}": len(members) for (height, width), members in zip(cache.buckets, cache.members)}
    off = {name: round(float(np.abs(np.subtract(*both, dtype=float)).mean()), 2) for name, both in found.items()}
    mean, worst = round(float(np.mean(list(off.values()))), 2), max(off, key=off.get)
    print(*(f"{bucket}: {count} pictures" for bucket, count in buckets.items()), sep="\n")
    most = f"{mean} over {len(off)} pictures, most {off[worst]}: {worst}"
    print(f"mean absolute difference of read and decoded, 0..255: {most}")
    results = dict(buckets=buckets, mean=mean, largest=[worst, off[worst]], differences=off)
    (out / "contact_sheet.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    safe.run(main, sys.argv[1:])
