"""What is in a file of LoRA weights, by its header: which layers, their ranks and alphas, in any tool's spelling.

No torch here, so that a wrong file is refused within a second. One layer's A is called, among others:

    lora_unet_input_blocks_4_1_proj_in.lora_down.weight                  by kohya's tools, and by this program
    lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight        by OneTrainer
    diffusion_model.input_blocks.4.1.proj_in.lora_A.weight               by OneTrainer for ComfyUI
    unet.down_blocks.1.attentions.0.proj_in.lora_A.weight                by diffusers and peft, or .lora.down.weight
    unet.down_blocks.1.….attn1.processor.to_q_lora.down.weight           by diffusers before that

These differ in a prefix, in how blocks are counted, in dots and in the word for A; without these it is one name.
"""

import json
import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path

from data.common import door
from data.common.errors import UserError, one_line
from data.common.fields import shown
from data.common.words import many
from data.models.tensors import header

_BLOCKS = {  # diffusers' (i, j) -> SGM's flat numbering, for two layers per block as in SDXL
    "down_blocks": lambda i, j: f"input_blocks.{3 * i + j + 1}.1",
    "up_blocks": lambda i, j: f"output_blocks.{3 * i + j}.1",
}
_TENSOR = re.compile(
    r"(?:lora_unet_|unet\.|(?:model\.)?diffusion_model\.|base_model\.model\.)?(?P<layer>.+?)"
    r"(?:[._](?P<part>lora_down|lora_up|lora_A|lora_B|lora\.down|lora\.up)(?:\.default)?\.weight|\.(?P<alpha>alpha))"
)
_LAYER = re.compile(  # the keys of attn-mlp in SDXL, with the attention's in the group
    r"lora_unet_(?:input_blocks_[4578]|middle_block|output_blocks_[0-5])_1_"
    r"(?:transformer_blocks_\d+_(?:(attn[12]_to_(?:q|k|v|out_0))|ff_net_(?:0_proj|2))|proj_in|proj_out)"
)
_ELSE = {  # what a file may hold besides: in words, and what such keys have; the first that fits counts
    "of text encoders": r"^lora_te|text_encoder|^bundle_emb|^clip_",
    "with DoRA's scales": r"dora_scale|lora_magnitude_vector",
    "of LoHa, LoKr or another method": r"\.((hada|lokr|b?oft|glora)_|(diff|diff_b|on_input|set_weight)$|[ab][12]\.)",
    "of another architecture": r"^(lora_)?transformer[._]|double_blocks|single_(transformer_)?blocks|joint_blocks",
    "of another UNet, as SD 1.5 has": r"(down_blocks[._]0|up_blocks[._][23])[._]attentions"
    r"|(input_blocks[._][12]|output_blocks[._]([6-9]|1[01]))[._]1[._]",
    "of convolutions or unknown names": r"^(lora_unet_|unet\.|(model\.)?diffusion_model\.).*(lora|alpha)",
    "of something else than a LoRA": r"",
}
_FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
_NUMBERS = {"F64": "d", "F32": "f", "F16": "e", "I64": "q", "I32": "i", "I16": "h", "I8": "b", "U8": "B"}


def key(name):
    """Name of a layer in diffusers' UNet, with dots or underscores -> its name in the file.

    >>> key("down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_out.0")
    'lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_out_0'
    """
    block = r"^(down_blocks|up_blocks)[._](\d+)[._]attentions[._](\d+)"
    name = re.sub(block, lambda m: _BLOCKS[m[1]](int(m[2]), int(m[3])), name)
    name = re.sub(r"^mid_block[._]attentions[._]0", "middle_block.1", name)
    return "lora_unet_" + name.replace(".", "_")


def spelled(stored):
    """A tensor's name in any spelling -> (the layer's key, "A", "B" or "alpha"); None when it is none of attn-mlp.

    >>> spelled("unet.mid_block.attentions.0.proj_in.lora.up.weight")
    ('lora_unet_middle_block_1_proj_in', 'B')
    """
    if not (found := _TENSOR.fullmatch(stored)):
        return None
    layer = key(re.sub(r"to_out$", "to_out.0", found["layer"].replace(".processor.", ".")))
    part = found["alpha"] or ("A" if found["part"].endswith(("down", "A")) else "B")
    return (layer, part) if _LAYER.fullmatch(layer) else None


@dataclass(frozen=True)
class Layer:
    """The update of one layer: the names of its tensors A (rank, inside) and B (out, rank), and its alpha."""

    A: str
    B: str
    inside: int
    out: int
    rank: int
    alpha: float


@dataclass(frozen=True)
class Contents:
    """What is in a file: its layers by kohya's keys, its metadata, and the dtypes of A and B as safetensors names them.

    Where ranks or alphas differ by layer, `rank` is the largest, and `alpha` equals it, so that the scale is 1 and each
    layer's own alpha / rank goes into its B.
    """

    path: Path
    layers: dict
    metadata: dict
    dtypes: tuple

    @property
    def rank(self):
        return max(layer.rank for layer in self.layers.values())

    @property
    def alpha(self):
        (first, *others) = {(layer.rank, layer.alpha) for layer in self.layers.values()}
        return float(self.rank) if others else first[1]

    @property
    def kind(self):
        """The set that it is of, as --lora_layers has it. It may lack some of its layers."""
        return "attn" if all(_LAYER.fullmatch(name)[1] for name in self.layers) else "attn-mlp"

    @property
    def text_width(self):
        """The width of the text that it was trained on, 2048 in SDXL; None where no layer reads text."""
        readers = (layer.inside for name, layer in self.layers.items() if name.endswith(("attn2_to_k", "attn2_to_v")))
        return next(readers, None)

    @property
    def fingerprint(self):
        """That of the base's UNet (data/models/identity.py); None where the file does not say it."""
        earlier = re.fullmatch(r"local-([0-9a-f]{16})", self.metadata.get("ss_sd_model_name", ""))
        return self.metadata.get("barelora_base_fingerprint", earlier and earlier[1])

    @property
    def base(self):
        """The base's name, a hub id or a folder's or file's own; None where the file does not say it."""
        return self.metadata.get("ss_sd_model_name")

    @property
    def prediction_type(self):
        """epsilon or v_prediction, what its base predicted; None where the file does not say it."""
        told = {"epsilon": "epsilon", "v": "v_prediction"}.get(self.metadata.get("modelspec.prediction_type"))
        of_v = {"True": "v_prediction", "False": "epsilon"}.get(self.metadata.get("ss_v_parameterization"))
        return told or of_v

    def warn_of_another_prediction(self, predicted):
        """Say it when it was trained on a base that predicts something else than `predicted`, the scheduler's field."""
        if self.prediction_type not in (None, predicted):
            print(f"warning: {self.path} is of a base that predicts {self.prediction_type}, this one {predicted}")

    def check_width(self, width):
        """Raise UserError when it was trained on another width of text than a base's, which is another architecture."""
        if self.text_width not in (None, width):
            raise UserError(f"{self.path}: a LoRA for text of width {self.text_width}, the base here has {width}")


def look(path):
    """-> Contents. Raises UserError when the file is no LoRA that can be loaded, in one line that says what it is."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: a folder; name the .safetensors file in it")
    door.look_at(path, "file")
    try:
        tensors, metadata, alphas = _header(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; python -m train writes RUN/lora.safetensors") from None
    except (ValueError, RecursionError, UserError, struct.error) as error:
        raise UserError(f"{path}: not a readable .safetensors file ({one_line(error, 200)})") from None
    parts, foreign = {}, []
    for stored in tensors:
        layer, part = spelled(stored) or (None, None)
        if layer is None:
            foreign.append(stored)
        elif part in parts.setdefault(layer, {}):
            raise UserError(f"{path}: {parts[layer][part]} and {stored} are one tensor in two spellings")
        else:
            parts[layer][part] = stored
    if foreign or not parts:
        can = "only SDXL's attention projections, or all layers of --lora_layers attn-mlp, can be loaded"
        raise UserError(f"{path}: {_told(parts, foreign)}; {can}")
    default = _alpha_in(path, metadata, any(name.startswith("base_model.") for name in tensors))
    layers = {name: _layer(path, name, found, tensors, alphas, default) for name, found in parts.items()}
    dtypes = {tensors[name].dtype for layer in layers.values() for name in (layer.A, layer.B)}
    return Contents(path, layers, metadata, tuple(sorted(dtypes)))


def _header(path):
    """-> {name: Facts}, the metadata, and {name: value} of the alphas"""
    tensors, metadata = header(path)
    alphas = {}
    with open(path, "rb") as file:
        for name in filter(re.compile(r".*\.alpha").fullmatch, tensors):
            file.seek(tensors[name].begin)
            alphas[name] = _number(tensors[name], file.read(min(tensors[name].end - tensors[name].begin, 16)))
    return tensors, metadata, alphas


def _number(facts, data):
    """The value of a tensor that is one number, from its bytes; None when it is something else."""
    if facts.shape not in ((), (1,)):
        return None
    if facts.dtype == "BF16":  # the upper half of an fp32
        return struct.unpack("<f", b"\0\0" + data)[0]
    return struct.unpack(f"<{_NUMBERS[facts.dtype]}", data)[0] if facts.dtype in _NUMBERS else None


def _alpha_in(path, metadata, by_peft):
    """The alpha of layers without one beside them; None means the rank.

    diffusers writes it into the metadata, and peft itself into an adapter_config.json next to the file.
    """
    names, beside = ("lora_alpha", "alpha_pattern", "use_rslora"), path.with_name("adapter_config.json")
    try:
        if by_peft:
            where, facts = str(beside), json.loads(beside.read_bytes())
            alpha, pattern, root = (facts.get(name) for name in names)
        else:
            where, facts = f"{path}: its lora_adapter_metadata", json.loads(metadata.get("lora_adapter_metadata", "{}"))
            alpha, pattern, root = (facts.get(f"unet.{name}") for name in names)
    except FileNotFoundError:
        raise UserError(f"{path}: peft's keys, and no {beside.name} next to it, which has the alpha") from None
    except (ValueError, AttributeError, RecursionError):
        raise UserError(f"{where} is damaged") from None
    if pattern or root or type(alpha) not in (int, float, type(None)):
        raise UserError(f"{where} scales layers each in its own way, which is not read here")
    return alpha


def _layer(path, name, found, tensors, alphas, default):
    """-> Layer. found: {"A", "B", "alpha": a tensor's name}."""
    for part, other in ("AB", "BA"):
        if part not in found:
            raise UserError(f"{path}: {found.get(other, found.get('alpha'))} has no partner: its {part} is missing")
    a, b = found["A"], found["B"]
    for stored in (a, b):
        if tensors[stored].dtype not in _FLOATS:
            raise UserError(f"{path}: {stored} holds numbers of type {tensors[stored].dtype} instead of floats")
    down, up = tensors[a].shape, tensors[b].shape
    if len(down) != 2 or len(up) != 2 or down[0] != up[1] or not down[0]:
        raise UserError(f"{path}: {a} is {down} and {b} {up} instead of rank × in and out × rank")
    alpha = alphas[found["alpha"]] if "alpha" in found else down[0] if default is None else default
    if alpha is None or not math.isfinite(alpha) or alpha == 0:
        raise UserError(f"{path}: {found.get('alpha', name)} is {alpha}: not a finite number other than 0")
    return Layer(a, b, down[1], up[0], down[0], float(alpha))


def _told(parts, foreign):
    """What is in a file that cannot be loaded, in words."""
    kinds = {}
    for stored in foreign:
        words = next(words for words, has in _ELSE.items() if re.search(has, stored))
        layer = re.split(r"\.(?:lora[._]|alpha|dora_|hada_|lokr_|oft_|diff|processor\.)", stored)[0]
        kinds.setdefault(words, {}).setdefault(layer, stored)
    told = [f"{many(len(parts), 'layer')} of SDXL's UNet"] if parts else []
    told += [f"{many(len(layers), 'layer')} {words} ({shown(min(layers.values()))})" for words, layers in kinds.items()]
    return ", ".join(told) or "no tensors in it"
