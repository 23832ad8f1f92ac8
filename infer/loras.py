"""Which LoRAs are compared, in which order and under which names: told by their files' headers, without torch."""

import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from data.common import door
from data.common.disk import sha256_file
from data.common.errors import UserError, one_line
from lora.contents import Contents, look

SAVE = re.compile(r"lora-([0-9]{6,})\.safetensors")  # as train writes them
_MARKS = {"lora-best.safetensors": "best", "lora.safetensors": "final"}  # of a run as well, behind its saves


@dataclass(frozen=True)
class Lora:
    """A file of weights that has a row of pictures.

    names: what it is of a run, such as best and final, or its file's name. step: that of a run's save, where known.
    run: its folder, where others have files of the same names.
    """

    contents: Contents
    names: tuple
    step: int | None = None
    run: str = ""

    @property
    def path(self):
        return self.contents.path

    @property
    def label(self):
        """ "step 100", "best (step 300)", "best, final (step 500)", "final", "my fox", "cats: step 100" """
        names, step = ", ".join(self.names), f"step {self.step}"
        label = names if self.step is None else f"{names} ({step})" if names else step
        return f"{self.run}: {label}" if self.run else label


def find(paths):
    """-> [Lora], one for each file of other bytes among `paths`, which are files and folders of files.

    What is in a folder is ordered as a run's files: by step, then others by name. Files stay in the order given. Raises
    UserError for a file that is no LoRA and for a folder without one; what else lies in a folder is named and left out.
    """
    found = []
    for path in map(Path, paths):
        found += _in_folder(path) if path.is_dir() else [_told(look(path))]
    kept = {}
    for lora in found:
        digest = sha256_file(lora.path) if len(found) > 1 else ""
        same = kept.setdefault(digest, lora)
        if lora.path.name in _MARKS and lora.path.parent == same.path.parent and lora.names != same.names:
            kept[digest] = replace(same, names=same.names + lora.names)
        elif same is not lora:
            print(f"{lora.path}: the same bytes as {same.path}, so it has no row of its own")
    return _told_apart(list(kept.values()))


def _told(contents):
    name = contents.path.name
    if save := SAVE.fullmatch(name):
        return Lora(contents, (), int(save[1]))
    return Lora(contents, (_MARKS.get(name) or one_line(contents.path.stem),))


def _in_folder(folder):
    door.look_at(folder, "folder")
    loras = []
    for path in sorted(folder.glob("[!.]*.safetensors")):
        try:
            loras.append(_told(look(path)))
        except UserError as error:
            print(f"left out: {error}")
    if not loras:
        raise UserError(f"{folder}: a folder without a LoRA that can be loaded; name another, or a .safetensors file")
    # Saves, the best, the final one, others; two that are alike here stay in the order of their names.
    return sorted(loras, key=lambda lora: (lora.step is None, lora.step or 0, lora.path.name not in _MARKS))


def _told_apart(loras):
    """With the run's name where files of several runs are compared, and where other files have the same name."""
    of_runs = [lora.path for lora in loras if lora.step is not None or lora.path.name in _MARKS]
    if len({path.resolve().parent for path in of_runs}) > 1:
        loras = [replace(lora, run=lora.path.resolve().parent.name) if lora.path in of_runs else lora for lora in loras]
    for run in (lambda path: path.parent.name, lambda path: f"{path.parent.parent.name}/{path.parent.name}"):
        often = Counter(lora.label for lora in loras)
        loras = [replace(lora, run=run(lora.path.resolve())) if often[lora.label] > 1 else lora for lora in loras]
    return loras
