"""Safetensors files: what their headers say, read without torch, and their tensors, mapped and not read."""

from dataclasses import dataclass

from data.common.disk import check_readable
from data.common.errors import UserError
from data.common.fields import check_fields, each, loads, text, whole

LONGEST = 10**8  # bytes of a header, as the format has it
TENSOR = {"dtype": text(), "shape": each(whole(0, 2**48), 0, 16), "data_offsets": each(whole(0, 2**48), 2)}


@dataclass(frozen=True)
class Facts:
    """What a header says of one tensor; its bytes are those from `begin` to `end` of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def header(path):
    """-> {name: Facts} of the tensors in a safetensors file, and its metadata, {name: text}.

    Raises ValueError when it is damaged or no such file.
    """
    found = {}
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        if not size:
            raise ValueError("empty")
        length = int.from_bytes(file.read(8), "little")
        if length > min(size, LONGEST):
            raise ValueError("cut off, or no safetensors file")
        content = loads(file.read(length))
    if type(content) is not dict:
        raise ValueError("its header names no tensors")
    metadata = content.pop("__metadata__", None) or {}
    if type(metadata) is not dict or not all(type(value) is str for value in metadata.values()):
        raise ValueError("its metadata is no text")
    for name, facts in content.items():
        try:
            check_fields(TENSOR, facts, name, "")
        except UserError as error:
            raise ValueError(str(error)) from None
        begin, end = (8 + length + offset for offset in facts["data_offsets"])
        if not begin <= end <= size:
            raise ValueError(f"{name} is cut off")
        found[name] = Facts(facts["dtype"], tuple(facts["shape"]), begin, end)
    return found, metadata


def mapped(path, prefix=""):
    """{name: tensor} of the tensors whose names begin with `prefix`; their memory is the file's until it is copied."""
    from safetensors import safe_open

    check_readable(path)
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 - it is no dict
        return {name: file.get_tensor(name) for name in names}
