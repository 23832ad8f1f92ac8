"""What a model computes, told by digests, so that it can be seen when a component was replaced.

An identity is {"config": …, "content": …, "seen": …}:

    config   32 hex digits of the fields that change what is computed
    content  32 hex digits of the tensors, in whichever files they lie, or of a tokenizer's vocabulary
    seen     sizes, times and inodes of the files that were read for `content`

A folder that is moved keeps its config and content, and one that looks as it did then is not read again.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor

from data.common.disk import sha256_file
from data.common.errors import UserError
from data.common.fields import Rule, each, text, whole
from data.models import single
from data.models.schema import CONFIGS
from data.models.tensors import header

CHUNK = 2**22  # bytes that are read and digested at once


def _are_identities(value):
    if type(value) is not dict or not value.keys() <= CONFIGS.keys():
        return False
    for of in value.values():
        if type(of) is not dict or of.keys() != IDENTITY.keys() or not all(IDENTITY[n].fits(v) for n, v in of.items()):
            return False
    return True


IDENTITY = {"config": text(32), "content": text(32), "seen": each(each(whole(0, 2**64), 4), 0, 1000)}
IDENTITIES = Rule("the identities of a model's components", _are_identities)  # for a manifest's table of fields


def identity(component, before=None):
    """The identity of a component (data/models/files.py). before: an earlier one of what was in its place then."""
    _, table = CONFIGS[component.name]
    fields = {name: value for name, value in component.config().items() if table[name].changes}
    files = component.files()
    seen = [[s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino] for s in map(os.stat, files)]
    content = before["content"] if before and before["seen"] == seen else _content(component, files)
    return {"config": _digest(json.dumps(_plain(fields), sort_keys=True)), "content": content, "seen": seen}


def fingerprint(of):
    """16 hex digits for all that an identity says about what is computed."""
    return _digest(of["config"] + of["content"])[:16]


def identities(model, vae_model, before=None):
    """{name: identity} of all that a cache is made for, to be kept in its manifest.

    The UNet's is there when the model is a folder here: precompute does not download the UNet. before: what an earlier
    manifest says.
    """
    before, found = before or {}, {}
    for name in CONFIGS:
        source = vae_model if name == "vae" else model
        if name != "unet" or source.is_local():
            found[name] = identity(source.component(name), before.get(name))
    return found


def check_unchanged(there, model, vae_model, advice):
    """Raise UserError when a component in a folder here is not what it was when `there`, identities, was written.

    A component that is not in its folder any more cannot be mixed with anything and is passed over, and a commit of the
    hub cannot change. advice: what the user can do. -> {name: fingerprint}
    """
    for name, then in there.items():
        source = vae_model if name == "vae" else model
        if not source.is_local() or not source.has(name):
            continue
        component = source.component(name)
        now = identity(component, then)
        for what, words in (("config", "another config"), ("content", "other content")):
            if now[what] != then[what]:
                # a single file tells of its scheduler too, whose config lies in somebody else's folder
                of_the_file = single.is_file(source.name) and (component.single or not component.files())
                where = source.name if of_the_file else component.folder
                raise UserError(f"{where}: this {name} has {words} than before; {advice}")
    return {name: fingerprint(then) for name, then in there.items()}


def _content(component, files):
    return digest_of_tensors(component.weights()) if component.single else digest_of(files)


def digest_of_tensors(tensors):
    """digest_of for {name: tensor} on the CPU, the same where the tensors in files are the same."""

    import torch

    dtypes = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    dtypes |= {torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}  # as safetensors calls them

    def line(named):
        name, tensor = named
        digest = hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
        return f"{name} {dtypes[tensor.dtype]} {list(tensor.shape)} {digest.hexdigest()}"

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        lines = pool.map(line, _told_apart(tensors))
    return _digest("\n".join(sorted(lines)))


def _told_apart(tensors):
    """(name, what it stands for) without what transformers writes in one version and not in another."""
    for name, of in tensors.items():
        # an encoder's names have a prefix or not, and positions are just 0, 1, 2 …
        name = name.removeprefix("text_model.")
        if name != "embeddings.position_ids":
            yield name, of


def digest_of(files):
    """32 hex digits of the tensors in safetensors files, and of the bytes of others.

    Raises UserError when a file is damaged.
    """
    lines, tensors = [], []
    for path in files:
        if path.suffix == ".safetensors":
            tensors += _tensors(path)
        else:
            lines.append(f"{path.name} {sha256_file(path)}")
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashlib lets other threads run
        lines += pool.map(_line, tensors)
    return _digest("\n".join(sorted(lines)))


def _tensors(path):
    """[(path, name, Facts)] of the tensors in a file, by its header."""
    try:
        return [(path, name, facts) for name, facts in _told_apart(header(path)[0])]
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path.parent}: its weights are damaged ({error}); download the model again") from None


def _line(tensor):
    path, name, facts = tensor
    digest, begin, end = hashlib.sha256(), facts.begin, facts.end
    with open(path, "rb", buffering=0) as file:
        file.seek(begin)
        while begin < end:
            piece = file.read(min(CHUNK, end - begin))
            if not piece:
                raise UserError(f"{path.parent}: its weights became shorter while they were read")
            digest.update(piece)
            begin += len(piece)
    return f"{name} {facts.dtype} {list(facts.shape)} {digest.hexdigest()}"


def _digest(words):
    return hashlib.sha256(words.encode()).hexdigest()[:32]


def _plain(value):
    """The value with every number as a float, because 1 and 1.0 mean the same in a config."""
    if type(value) is dict:
        return {name: _plain(inside) for name, inside in value.items()}
    if type(value) is list:
        return [_plain(inside) for inside in value]
    return float(value) if type(value) is int else value
