"""Text and pictures as diffusers' own pipeline encodes them, and encoders that are refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import PIPELINE
from safetensors.torch import load_file, save_file

from data.buckets import time_ids
from data.common.errors import UserError
from data.encoders import VAE, TextEncoders
from data.loaded import InSlices, in_chunks
from data.models.files import Model
from data.models.identity import identities

LONG = "a very long caption about " + "foxes and birds and " * 60
CAPTIONS = ["a red fox in the forest", "a blue bird", "", "Unseen, wörds! 123", LONG]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pipeline():
    from diffusers import StableDiffusionXLPipeline

    return StableDiffusionXLPipeline.from_pretrained(PIPELINE, dtype=torch.float32)


@pytest.fixture(scope="module")
def texts():
    return TextEncoders(Model(str(PIPELINE)), "no").load(CPU)


@pytest.fixture
def model(tmp_path):
    """A copy of the toy's model to damage."""
    shutil.copytree(PIPELINE, tmp_path / "model")
    return tmp_path / "model"


def test_text_equals_the_pipelines(texts, pipeline):
    """With a wrong layer, pooled output or padding LoRA would train on text that no pipeline will ever give."""
    text, pooled = texts(CAPTIONS)
    described = TextEncoders(Model(str(PIPELINE)), "no")
    assert text.shape == (len(CAPTIONS), *described.text_shape)
    assert pooled.shape == (len(CAPTIONS), *described.pooled_shape)
    with torch.no_grad():
        for i, caption in enumerate(CAPTIONS):
            theirs = pipeline.encode_prompt(caption, device=CPU, do_classifier_free_guidance=False)
            torch.testing.assert_close(text[i : i + 1], theirs[0], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(pooled[i : i + 1], theirs[2], rtol=1e-4, atol=1e-4)
    assert (text[0] - text[1]).abs().max() > 0.01  # or the comparison would hold for anything


def stream(tokenizer, caption, length):
    """A caption's token ids, start and end around them, cut or padded to the length: what sd-scripts begins with."""
    ids = [tokenizer.bos_token_id, *tokenizer(caption, add_special_tokens=False).input_ids][: length - 1]
    ids.append(tokenizer.eos_token_id)
    return ids + [tokenizer.pad_token_id] * (length - len(ids))


def as_sd_scripts_do(pipeline, caption, chunks):
    """-> text (2 + 75 chunks, width), pooled; sd-scripts' SdxlTextEncodingStrategy, written again from what it does.

    The one long stream of ids is cut every 75; each piece gets the stream's first and last id around it. Where tokens
    are padded with another id than the end's, a piece that is full ends with the end, and one of padding alone begins
    with it. Of the hidden states the first, 75 of each piece and the last are kept; pooled comes from the first piece.
    """
    hidden, eos = [], pipeline.tokenizer.eos_token_id
    encoders = ((pipeline.tokenizer, pipeline.text_encoder), (pipeline.tokenizer_2, pipeline.text_encoder_2))
    for tokenizer, encoder in encoders:
        ids, pad, pieces = stream(tokenizer, caption, 75 * chunks + 2), tokenizer.pad_token_id, []
        for i in range(1, 75 * chunks, 75):
            piece = [ids[0], *ids[i : i + 75], ids[-1]]
            if pad != eos and piece[-2] not in (eos, pad):
                piece[-1] = eos
            if pad != eos and piece[1] == pad:
                piece[1] = eos
            pieces.append(piece)
        with torch.no_grad():
            out = encoder(torch.tensor(pieces), output_hidden_states=True)
        flat = out.hidden_states[-2].flatten(0, 1)
        kept = [0, *(77 * piece + j for piece in range(chunks) for j in range(1, 76)), 77 * chunks - 1]
        hidden.append(flat[kept])
    with torch.no_grad():
        pooled = encoder.text_projection(out.last_hidden_state[0, pieces[0].index(eos)])
    return torch.cat(hidden, dim=-1), pooled


def of_tokens(tokenizer, count):
    """A caption of so many tokens, which are not all alike."""
    words = [word for word in tokenizer.get_vocab() if word.endswith("</w>") and word[:-4].isalpha()]
    words = [word[:-4] for word in sorted(words) if len(tokenizer(word[:-4], add_special_tokens=False).input_ids) == 1]
    caption = " ".join(words[i * 7 % len(words)] for i in range(count))
    assert len(tokenizer(caption, add_special_tokens=False).input_ids) == count
    return caption


@pytest.mark.parametrize("length", [75, 150, 225])
def test_long_captions_are_read_as_sd_scripts_read_them(length, pipeline):
    """Around every edge of a chunk, where a start, an end or padding would go astray, and past the last one."""
    assert pipeline.tokenizer.pad_token_id == pipeline.tokenizer.eos_token_id
    assert pipeline.tokenizer_2.pad_token_id == 0 != pipeline.tokenizer_2.eos_token_id
    described = TextEncoders(Model(str(PIPELINE)), "no", length)
    texts, chunks = described.load(CPU), length // 75
    counts = [0, 1, 74, 75, 76, 149, 150, 151, 224, 225, 226, 300]
    captions = [of_tokens(pipeline.tokenizer, count) for count in counts]
    text, pooled = texts(captions)
    assert text.shape == (len(captions), *described.text_shape) and text.shape[1] == 2 + length
    assert pooled.shape == (len(captions), *described.pooled_shape)
    for i, caption in enumerate(captions):
        wanted, wanted_pooled = as_sd_scripts_do(pipeline, caption, chunks)
        torch.testing.assert_close(text[i], wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(pooled[i], wanted_pooled, rtol=1e-4, atol=1e-4)
    assert [texts.truncated(caption) for caption in captions] == [count > length for count in counts]
    assert chunks == 1 or (text[5, 76:] - text[4, 76:]).abs().max() > 0.01  # what follows 75 tokens is seen


def test_another_length_has_keys_of_its_own_and_75_the_ones_it_had(model):
    found = identities(Model(str(model)), Model(str(model)))
    prints = [TextEncoders(Model(str(model)), "no", length).fingerprint(found) for length in (75, 150, 225)]
    assert TextEncoders(Model(str(model)), "no").fingerprint(found) == prints[0] and prints[0].endswith("-no")
    assert len(set(prints)) == 3


def test_the_ids_of_75_tokens_are_the_tokenizers_own(pipeline):
    """Bit for bit what a tokenizer makes of them by itself, so that no cache is another one than before."""
    for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2):
        theirs = tokenizer(
            CAPTIONS, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        ).input_ids
        assert torch.equal(in_chunks(tokenizer, CAPTIONS, 1), theirs)


def test_a_captions_embedding_does_not_depend_on_its_batch(texts):
    """It is cached once per caption, so it must be the same next to any other."""
    together, alone = texts(CAPTIONS), [texts([c]) for c in CAPTIONS]
    for part, parts in zip(together, zip(*alone)):
        torch.testing.assert_close(part, torch.cat(parts), rtol=1e-4, atol=1e-4)


def test_time_ids_equal_the_pipelines(pipeline):
    described = TextEncoders(Model(str(PIPELINE)), "no")
    for size, target in (((300, 600), (1024, 1024)), ((2000, 1100), (832, 1216))):
        for ours in time_ids(size, target, "x"):
            theirs = pipeline._get_add_time_ids(
                ours[:2], ours[2:4], ours[4:], torch.float32, text_encoder_projection_dim=described.pooled_shape[0]
            )
            assert theirs.tolist() == [list(ours)]
            assert ours[:2] == size and ours[4:] == target


def test_truncated_captions_are_known(texts):
    assert [texts.truncated(c) for c in CAPTIONS] == [False, False, False, False, True]


@pytest.mark.parametrize("device", [CPU, pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)], ids=str)
def test_posteriors_equal_autoencoderkls(device, pipeline, monkeypatch):
    """Pixels in -1 .. 1; mean and standard deviation, not variance nor its logarithm; before the scaling factor."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    described = VAE(Model(str(PIPELINE)), "no")
    vae = described.load(device)
    batches = [np.random.default_rng(i).integers(0, 256, (3, 64, 128, 3), np.uint8) for i in range(5)]
    encoded = list(vae.encode((batch, vae.stage(batch)) for batch in batches))
    assert len(encoded) == len(batches)
    for pixels, posteriors in encoded:
        assert posteriors.shape == (3, *described.posterior_shape((64, 128))) and posteriors.dtype == torch.float16
        with torch.no_grad():
            x = pipeline.image_processor.preprocess(pixels.astype(np.float32) / 255)
            posterior = pipeline.vae.encode(x).latent_dist
        torch.testing.assert_close(posteriors[:, 0].float(), posterior.mean, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(posteriors[:, 1].float(), posterior.std, rtol=2e-3, atol=1e-6)


def test_sdxls_own_vae_is_not_run_in_fp16():
    """Its config asks for fp32 because it overflows: black latents in silence."""
    assert VAE(Model(str(PIPELINE)), "fp16").precision == "no"


@pytest.mark.slow
def test_a_row_that_overflows_in_fp16_is_encoded_again_in_fp32(model):
    """A VAE that claims to be fit for fp16, and is not for one bright picture of two."""
    config = json.loads((model / "vae" / "config.json").read_text())
    (model / "vae" / "config.json").write_text(json.dumps(config | dict(force_upcast=False)))
    weights = model / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["encoder.conv_in.weight"] = tensors["encoder.conv_in.weight"] * 0 + 2000  # what follows normalises it away
    save_file(tensors, weights)
    vae, exact = VAE(Model(str(model)), "fp16").load(CPU), VAE(Model(str(model)), "no").load(CPU)
    assert vae.dtype == torch.float16
    pixels = torch.full((2, 64, 64, 3), 127, dtype=torch.uint8)
    pixels[1, 8:40] = 255
    assert not vae._start(pixels).wait()[0][1].isfinite().all()  # the case is what it claims to be
    (_, posteriors), (_, after) = vae.encode([(None, pixels), (None, pixels.flip(0))])
    assert torch.equal(after, posteriors.flip(0))  # the batch after it is in half precision again
    assert posteriors.isfinite().all() and vae.vae.dtype == torch.float16
    torch.testing.assert_close(posteriors[1], next(exact.encode([(None, pixels)]))[1][1], rtol=1e-2, atol=1e-2)


def test_a_tokenizer_without_its_vocabulary_is_refused(model):
    """transformers makes one with 2 tokens and no error, and every caption would be the same."""
    (model / "tokenizer_2" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer_2: \d+ tokens; its vocabulary is missing"):
        TextEncoders(Model(str(model)), "no").load(CPU)


def test_tokens_that_the_encoder_does_not_know_are_refused(model):
    """As a padding token that is not in the vocabulary becomes: the encoder would look behind its last row."""
    config = model / "tokenizer_2" / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"pad_token": "!"', '"pad_token": "<pad>"'))
    with pytest.raises(UserError, match="tokenizer_2: it has tokens that .*text_encoder_2 does not know"):
        TextEncoders(Model(str(model)), "no").load(CPU)


def test_encoders_that_cannot_tell_captions_apart_are_refused(model):
    for part in ("text_encoder", "text_encoder_2"):
        path = model / part / "model.safetensors"
        save_file(
            {n: t * 0 if "token_embedding" in n else t for n, t in load_file(path).items()}, path, {"format": "pt"}
        )
    with pytest.raises(UserError, match="the same for every caption"):
        TextEncoders(Model(str(model)), "no").load(CPU)


@pytest.mark.parametrize("name", ["text_projection.weight", "text_model.encoder.layers.0.mlp.fc1.weight"])
def test_weights_that_lack_one_are_refused(name, model):
    """transformers fills it with random numbers, other ones each time, and says so where nobody sees it."""
    path = model / "text_encoder_2" / "model.safetensors"
    tensors = load_file(path)
    del tensors[next(there for there in tensors if there.endswith(name.removeprefix("text_model.")))]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"text_encoder_2: its weights lack .*weight; download the model again"):
        TextEncoders(Model(str(model)), "no").load(CPU)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


DAMAGED = {
    "tokenizer_2/tokenizer.json": lambda path: path.write_text(
        path.read_text().replace('"version": "1.0"', '"version": 1')
    ),
    "text_encoder/model.safetensors": cut,
    "tokenizer/tokenizer.json": cut,
    "text_encoder_2/config.json": lambda path: path.write_text(
        path.read_text().replace('"intermediate_size": ', '"intermediate_size": 1')
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_named(name, model):
    DAMAGED[name](model / name)
    with pytest.raises(UserError, match=f"{name.split('/')[0]}: (its weights are )?damaged") as refusal:
        TextEncoders(Model(str(model)), "no").load(CPU)
    assert "\n" not in str(refusal.value)


def test_too_little_memory_is_no_damage(monkeypatch):
    """The answer would be another download of five gigabytes."""
    from transformers import CLIPTextModel

    def full(*_, **__):
        raise RuntimeError("unable to mmap 196139808 bytes from file: Cannot allocate memory (12)")

    monkeypatch.setattr(CLIPTextModel, "from_pretrained", full)
    with pytest.raises(RuntimeError, match="Cannot allocate memory"):
        TextEncoders(Model(str(PIPELINE)), "no").load(CPU)


def test_a_vae_without_its_scaling_factor_is_refused_before_anything_is_encoded(model):
    config = model / "vae" / "config.json"
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "scaling_factor"}))
    with pytest.raises(UserError, match=r"vae/config.json: no scaling_factor in it, which must be a number"):
        VAE(Model(str(model)), "no")


def test_text_that_is_not_finite_is_refused(model):
    path = model / "text_encoder_2" / "model.safetensors"
    save_file({n: t * torch.nan if "layers.1." in n else t for n, t in load_file(path).items()}, path, {"format": "pt"})
    with pytest.raises(UserError, match="not finite"):
        TextEncoders(Model(str(model)), "no").load(CPU)


@pytest.mark.slow
def test_the_fingerprint_follows_content_precision_and_nothing_else(model):
    """A row is found by it: two encoders that differ must not share one, a folder that moved must not lose it."""

    def prints(path, precision="no"):
        named = Model(str(path))
        found = identities(named, named)
        return TextEncoders(named, precision).fingerprint(found), VAE(named, precision).fingerprint(found)

    texts, pictures = prints(model)
    assert (texts, pictures) == prints(PIPELINE)
    assert texts != prints(model, "bf16")[0] and pictures != prints(model, "bf16")[1]
    for name in ("tokenizer/tokenizer.json", "text_encoder_2/model.safetensors", "text_encoder/config.json"):
        blob = (model / name).read_bytes()
        (model / name).write_bytes(blob[:-1] + b" " if "config" not in name else blob.replace(b"1e-05", b"2e-05"))
        assert prints(model)[0] != texts and prints(model)[1] == pictures
        (model / name).write_bytes(blob)
    weights = model / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b" ")
    assert prints(model)[1] != pictures and prints(model)[0] == texts


def test_cudnn_tries_its_algorithms_while_the_vae_runs_and_only_then(monkeypatch):
    """Left on, it would also choose the kernels of whatever this process computes next."""
    vae, seen = VAE(Model(str(PIPELINE)), "no").load(CPU), []
    real = vae.vae.encode
    monkeypatch.setattr(vae.vae, "encode", lambda x: (seen.append(torch.backends.cudnn.benchmark), real(x))[1])
    assert not torch.backends.cudnn.benchmark
    list(vae.encode([(None, torch.zeros(1, 64, 64, 3, dtype=torch.uint8))]))
    assert seen == [True] and not torch.backends.cudnn.benchmark


@pytest.mark.parametrize("side, at_once", [(64, [2, 2, 1]), (128, [1] * 5), (32, [5])])
def test_the_first_level_sees_a_few_pictures_at_a_time(side, at_once, monkeypatch):
    """As many as their size allows, in their order, and the others all of the batch."""
    monkeypatch.setattr(InSlices, "BYTES", 2 * 64 * 64 * 4)
    vae, first, second = VAE(Model(str(PIPELINE)), "no").load(CPU), [], []
    encoder = vae.vae.encoder
    encoder.down_blocks[0][0].register_forward_pre_hook(lambda _, given: first.append(len(given[0])))
    encoder.down_blocks[1].register_forward_pre_hook(lambda _, given: second.append(len(given[0])))
    pixels = np.random.default_rng(0).integers(0, 256, (5, side, side, 3), np.uint8)
    ((_, together),) = vae.encode([(None, vae.stage(pixels))])
    assert first == at_once and second == [5]
    alone = torch.cat([posterior for _, posterior in vae.encode((None, vae.stage(one[None])) for one in pixels)])
    torch.testing.assert_close(together, alone, rtol=2e-3, atol=2e-3)
