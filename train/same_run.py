"""Which run a folder holds, and whether a command asks for the same one.

    RUN/run.json     the cache that the run reads, and all that a continuation must agree with
    RUN/rows.npz     the cache's index and names as they were when the run began, and what its manifest said of how they
                     were encoded, so that it can say what changed since

Nothing here imports torch, so that another run is refused within a second.
"""

import json
import math
import os
import shlex
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np

from data.cache import cache_folder, changed_facts, changed_rows, read_began, read_index, read_manifest, with_repeats
from data.common.disk import atomic_write, sha256_file, sync_folder
from data.common.errors import UserError
from data.common.flags import Train
from lora.contents import look

# What may differ between a run and its continuation. The second line is about how a step is computed, not what;
# "compile" is a flag that earlier versions had.
MAY_CHANGE = {"output_dir", "cache_dir", "restart", "max_train_steps", "num_train_epochs", "checkpointing_steps"}
MAY_CHANGE |= {"validation_steps", "report_to", "push_to_hub", "hub_model_id", "private"}
MAY_CHANGE |= {"vram_gib", "gradient_checkpointing", "compile", "no_cuda_graph"}
DEFAULTS = {flag.name: flag.default for flag in fields(Train)} | dict(base_precision="plain")
CHOICES = {flag.name: flag.metadata["choices"] for flag in fields(Train)}
DIGESTS = {  # of the identity, and what another one means
    "unet": "another UNet",
    "scheduler": "another noise schedule or prediction type",
    "model_index": "another model_index.json",
}
ENCODED = ("text_shape", "caption_variants", "caption_orders", "identity", "decoder")  # of the manifest, for rows.npz
# What a run writes, next to its exports lora*.safetensors.
PARTS = ("state", "metrics.jsonl", "run.json", "rows.npz", "samples", "tensorboard", "wandb", "curves.png", "compare")


class AnotherRun(UserError):
    """The folder holds a run that was started with something else."""

    def __init__(self, run, cache, differences):
        super().__init__(f"{run}: holds another run: {'; '.join(differences)}")
        self.run, self.cache = Path(run), cache

    def ways_on(self, argv):
        """The ways that go on from here, a line each."""
        rest = list(argv)
        at = next(i for i, word in enumerate(rest) if word.split("=")[0] == "--output_dir")
        del rest[at : at + (1 if "=" in rest[at] else 2)]
        number = next(n for n in range(2, 10**6) if not os.path.lexists(f"{self.run}-{n}"))
        shared = [] if any(word.startswith("--cache_dir") for word in rest) else ["--cache_dir", str(self.cache)]
        new = shlex.join(["--output_dir", f"{self.run}-{number}", *rest, *shared])
        again = shlex.join(["--output_dir", str(self.run), *rest, "--restart"])
        return (
            f"in a folder of its own: python -m train {new}\n"
            f"from step 0 here, moving what is here to {earlier(self.run)}: python -m train {again}\n"
            "from where it stopped: put back what changed, and run the same command as then"
        )


def identity_of(run, settings, manifest, **of_the_model):
    """All that a continuation must agree with, {name: plain value}.

    Of the file that a run starts from it is the content that counts, 16 hex digits, and not where it lies.
    """
    weights = _weights_digest(run, settings)
    return dict(asdict(settings) | dict(network_weights=weights), cache=manifest["content"], **of_the_model)


def _weights_digest(run, settings):
    if settings.network_weights and Path(settings.network_weights).exists():
        return sha256_file(settings.network_weights)[:16]
    there = _there(run, settings.restart)
    return there and settings.network_weights and there.get("network_weights")


def _there(run, restart=False):
    """The identity of the run that would go on from here, None where a new one starts."""
    began = None if restart else read_began(run)
    return began["identity"] if began and any((run / "state").glob("*.state")) else None


def with_the_weights_facts(run, settings, argv, text_width):
    """-> the settings with the rank, alpha and layers of the --network_weights file, where one is named.

    A run that goes on needs the file no more, and has them from its beginning. text_width: the cache's.
    Raises UserError when the file cannot be started from, or a flag in `argv` says something else than it.
    """
    path = settings.network_weights
    if not path:
        return settings
    there = _there(run, settings.restart) or {}
    if there.get("network_weights") and not Path(path).exists():
        facts = {name: there.get(name) for name in ("rank", "lora_alpha")}
        facts["lora_layers"] = _known(run, "lora_layers", there.get("lora_layers"))
    elif Path(path).resolve().parent == Path(run).resolve():
        raise UserError(f"--network_weights {path}: this run writes files beside it; copy it to another folder first")
    else:
        contents = look(path)
        contents.check_width(text_width)
        facts = dict(rank=contents.rank, lora_alpha=contents.alpha, lora_layers=contents.kind)
    given = {word.split("=")[0].removeprefix("--") for word in argv}
    for name in facts.keys() & given:
        value, of_the_file = getattr(settings, name), facts[name]
        # half precision, in which a tool may have written alpha, has a thousandth of error
        near = name != "lora_layers" and math.isclose(value, of_the_file, rel_tol=1e-3)
        if value != of_the_file and not near:
            raise UserError(f"--{name} {value}: {path} has {of_the_file}; leave the flag out, or give that value")
    return replace(settings, **facts)


def with_its_base(run, settings):
    """-> the settings with the precision that the base of the run has which goes on, where no flag says one."""
    there = _there(run, settings.restart)
    if settings.base_precision or there is None:
        return settings
    return replace(settings, base_precision=_known(run, "base_precision", (DEFAULTS | there)["base_precision"]))


def _known(run, name, value):
    """-> what RUN/run.json says for a flag with choices. Raises UserError when this version lacks that choice."""
    if value not in CHOICES[name]:
        raise UserError(
            f"{run / 'run.json'}: {name} {value} is none of {', '.join(CHOICES[name])}; go on with the version that "
            "began this run, or use another --output_dir"
        )
    return value


def check_same(run, there, here):
    """Raise AnotherRun when two identities differ in more than may change. there: what the run began with.

    A name that one side lacks has its flag's default, so that a later flag does not orphan the runs before it.
    """
    there, here = DEFAULTS | there, DEFAULTS | here
    differ = [name for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)]
    if differ := [name for name in differ if name not in MAY_CHANGE]:
        cache = cache_folder(run, here["cache_dir"])
        words = _what_changed(run, cache) if "cache" in differ else []
        words += [_in_words(name, there.get(name), here.get(name)) for name in differ if name != "cache"]
        raise AnotherRun(run, cache, dict.fromkeys(words))  # the base and its UNet say the same


def _in_words(name, there, here):
    """How a name of the identity differs; digests tell nobody anything."""
    if name in DIGESTS:
        return f"{DIGESTS[name]} than when it began"
    if name == "base" and any(str(base).startswith("local-") for base in (there, here)):
        return f"{DIGESTS['unet']} than when it began"
    if name == "network_weights":
        if there and here:
            return "begun from other weights"
        if there:
            return "begun from a file of weights, and none is named here"
        return "begun without a file of weights, and one is named here"
    return f"{name} {there} there, {here} here"


def check_at_the_door(run, settings, manifest):
    """The same before torch is imported and the model is known. manifest: the cache's."""
    here = identity_of(run, settings, manifest)
    if there := _there(run):
        check_same(run, {name: value for name, value in there.items() if name in here}, here)


def _what_changed(run, cache):
    """What changed in the cache since the run began, in words."""
    now, path = read_index(cache), Path(run) / "rows.npz"
    if not now or not path.exists():
        return ["other rows in the cache"]
    with np.load(path) as began:
        then = with_repeats(began["index"]), began["names"].tolist()
        facts = json.loads(began["facts"].item()) if "facts" in began else None  # earlier versions kept none
    words = [f"{', '.join(changed)} since it began"] if (changed := changed_rows(then, now)) else []
    words += changed_facts(facts, read_manifest(cache)) if facts else []
    return words or ["the cache was encoded by another model or VAE"]


def begin(run, identity, cache, restart):
    """Write down what a run begins with. cache: the folder of its cache. restart: move what is there away first.

    So are weights of an earlier run whose state is gone, because nobody could tell them from new ones.
    """
    before = read_began(run)
    if restart or any(run.glob("lora*.safetensors")) and not (before and before["identity"] == identity):
        put_aside(run)
    (index, names), manifest = read_index(cache), read_manifest(cache)
    facts = json.dumps({name: manifest[name] for name in ENCODED})
    with atomic_write(run / "rows.npz") as file:
        np.savez_compressed(file, index=index, names=np.array(names), facts=np.array(facts))
    remember(run, identity, cache)


def remember(run, identity, cache):
    """Write RUN/run.json; a cache that lies in the run's folder moves with it, so its place is not written down."""
    inside = Path(cache).resolve() == (run / "cache").resolve()
    began = dict(cache_dir=None if inside else str(Path(cache).resolve()), identity=identity)
    if read_began(run) != json.loads(json.dumps(began)):
        with atomic_write(run / "run.json", "w") as file:
            json.dump(began, file, indent=1)


def earlier(run):
    """The folder that put_aside moves to: RUN/earlier-N for the first N that is free."""
    return next(path for path in (Path(run) / f"earlier-{n}" for n in range(1, 10**6)) if not os.path.lexists(path))


def put_aside(run):
    """Move all that a run wrote to RUN/earlier-N. The state goes first, because without it nothing would go on."""
    there = [run / part for part in PARTS if os.path.lexists(run / part)] + sorted(run.glob("lora*.safetensors"))
    if there:
        folder = earlier(run)
        folder.mkdir()
        for path in there:
            os.rename(path, folder / path.name)
        sync_folder(run)
        print(f"{run}: what was here is in {folder}", flush=True)
