"""What resume reads: one checksummed file per save, the last two kept, never half written, no pickle.

RUN/state/000100.state    a safetensors blob (LoRA vector, optimizer state; numbers and settings in its metadata),
                          then the sha256 of the blob
"""

import hashlib
import json
import struct

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from data.common.disk import atomic_write, need_space
from data.common.errors import UserError
from data.common.fields import Rule, check_fields, each, either, loads, named, number, one_of, only, text, whole
from data.common.words import many
from train.optimizer import KEEPS, bytes_of_a_weight
from train.same_run import check_same

VERSION = 2
KEPT = 2
ADVICE = "use another --output_dir or --restart"
_dict = Rule("named fields", lambda value: type(value) is dict)
FACTS = {
    "version": only(VERSION),
    "step": whole(0, 10**9),
    "numbers": named(number(0, 1e12)),
    "scaler": named(number(0, 1e38)),
    "identity": _dict,  # compared field by field with the run's
    "plan": {
        "made_for": _dict,
        "recomputed": either(one_of(None), each(text(), 0, 10**5)),
        "threads": whole(1, 10**5, missing=1),
    },
    "ranks": whole(1, 10**5, missing=1),
    "best": either(one_of(None), named(number(-1e38, 1e38)), missing=None),
}
DIGEST = hashlib.sha256().digest_size


def save_state(folder, step, adapters, optimizer, scaler, identity, plan, best, ranks):
    """Write the state after `step` optimizer steps; older ones go once it is safe on disk.

    identity: what a continuation must agree with, {name: plain value}; plan (plan.make) and best (validate.Validation):
    what it takes over, plain values. ranks: how many train.
    """
    tensors, numbers = {"vector": adapters.vector.detach()}, {}
    for name, value in optimizer.state[adapters.vector].items():
        kept = tensors if torch.is_tensor(value) else numbers
        kept[f"optimizer.{name}"] = value
    facts = dict(version=VERSION, step=step, numbers=numbers, scaler=scaler.state_dict(), identity=identity)
    facts |= dict(plan=plan, best=best, ranks=ranks)
    blob = save({name: tensor.cpu() for name, tensor in tensors.items()}, {"state": json.dumps(facts)})
    with atomic_write(folder / f"{step:06d}.state") as file:
        file.write(blob)
        file.write(hashlib.sha256(blob).digest())
    for old in _files(folder)[KEPT:]:
        old.unlink()


def read_state(folder, identity):
    """The newest good state, for `restore`; None when there is none. Called before the model is loaded, which may be
    another run's.

    A damaged file is said and passed over for the one before. Raises UserError when every one is damaged (a run never
    starts from 0 silently), or when the settings differ from those of the run.
    """
    files, damaged = _files(folder), []
    for path in files:
        blob = path.read_bytes()
        blob, digest = blob[:-DIGEST], blob[-DIGEST:]
        if hashlib.sha256(blob).digest() == digest:
            break
        print(f"{path}: damaged, going back to the state before it")
        damaged.append(path)
    else:
        if files:
            raise UserError(f"{folder}: every state is damaged; --restart puts it aside and starts from step 0")
        return None
    facts, tensors = _parts(path, blob)
    check_same(folder.parent, facts["identity"], identity)
    for other in damaged:  # it does not count as one of those that are kept
        other.rename(other.with_suffix(".damaged"))
    before = facts["identity"].get("max_train_steps")
    if before != identity["max_train_steps"] and not identity["lr_scheduler"].startswith("constant"):
        print(f"--max_train_steps was {before}: the learning rate goes on along the new schedule")
    return facts, tensors


def _parts(path, blob):
    """-> (facts, tensors) of a state whose checksum is right. Raises UserError when it is not one of this program's."""
    try:
        tensors, (size,) = load(blob), struct.unpack("<Q", blob[:8])
        facts = loads(loads(blob[8 : 8 + size])["__metadata__"]["state"])
    except (ValueError, LookupError, TypeError, RecursionError, SafetensorError, struct.error) as error:
        raise UserError(f"{path}: not a state of this program ({error}); {ADVICE}") from None
    if type(facts) is dict and facts.get("version", VERSION) != VERSION:
        raise UserError(f"{path}: written by another version of this program; {ADVICE}")
    checked = check_fields(FACTS, facts, path, ADVICE)
    facts |= {name: checked[name] for name in ("best", "ranks")}  # which states of earlier versions lack
    vector = tensors.get("vector")
    for name in ("vector", "optimizer.exp_avg", "optimizer.exp_avg_sq"):
        value = tensors.get(name, vector)
        if value is None or value.shape != vector.shape or value.dtype != torch.float32:
            raise UserError(f"{path}: its {name} is not what this program writes; {ADVICE}")
    kept = {name for name in (*tensors, *facts["numbers"]) if name != "vector"}
    if kept not in [{f"optimizer.{name}" for name in names} for names in KEEPS]:
        raise UserError(f"{path}: what it holds of the optimizer is not what this program writes; {ADVICE}")
    return facts, tensors


def restore(state, adapters, optimizer, scaler, ranks=1):
    """Put back what read_state gave. -> how many steps are done, the plan, the best save; 0, None, None without one."""
    if not state:
        return 0, None, None
    facts, tensors = state
    if tensors["vector"].shape != adapters.vector.shape or facts["scaler"].keys() != scaler.state_dict().keys():
        raise UserError(f"the state of step {facts['step']} is another model's or precision's; {ADVICE}")
    with torch.no_grad():
        adapters.vector.copy_(tensors.pop("vector"))
    adapters.refresh()
    moments = {name.removeprefix("optimizer."): value for name, value in {**tensors, **facts["numbers"]}.items()}
    if moments:
        optimizer.load_state_dict({"state": {0: moments}, "param_groups": optimizer.state_dict()["param_groups"]})
    scaler.load_state_dict(facts["scaler"])
    if ranks != facts["ranks"]:
        before = many(facts["ranks"], "GPU")
        print(f"on {many(ranks, 'GPU')} now, {before} before: sums are added in another order, and last bits differ")
    return facts["step"], facts["plan"], facts["best"]


def bytes_to_save(settings, length, start, best):
    """What a run saves from `start` on, with a vector of `length`. -> bytes of a state, bytes of an export, exports

    best: whether the best save is exported once more.
    """
    every, last = settings.checkpointing_steps, settings.max_train_steps
    exports = 1 + last // every - start // every + (last % every > 0)  # the final one, those in between, one at the end
    exports += best
    return length * (4 + bytes_of_a_weight(settings)), 2 * length, exports


def need_room(folder, settings, length, start, best):
    """Raise MachineError when the disk cannot hold what a run saves from step `start` on, states and weights."""
    state, export, exports = bytes_to_save(settings, length, start, best)
    there = len(_files(folder / "state"))  # KEPT stay, and one more is there while it is written
    if start < settings.max_train_steps:
        needed = max(1, KEPT + 1 - there) * state + (exports + best) * export  # a better one is written beside it
        need_space(folder, needed, "what the run will save (states and weights)")


def _files(folder):
    """State files, the newest first; not copies that somebody put aside under other names."""
    files = (path for path in folder.glob("*.state") if path.stem.isdecimal() and path.is_file())
    return sorted(files, key=lambda path: int(path.stem), reverse=True)
