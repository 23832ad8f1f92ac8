"""What is found out before anything is encoded: what is new and why, which rows are equal, and which are held out."""

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import (
    PICTURES,
    PIPELINE,
    PRECOMPUTE,
    TRAIN,
    caption_rows,
    content,
    edit_captions,
    here,
    precompute,
    settings,
)
from PIL import Image

from data.cache import Cache
from data.common.errors import UserError
from data.dataset import open_examples
from data.survey import Skipped, other_facts, survey
from train.batches import Batches


def everything(folder):
    """Every file and folder below, with content and time of change."""
    return {
        p: (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else None)
        for p in [folder, *folder.rglob("*")]
        if p.exists()
    }


def flip_byte(path, at):
    blob = bytearray(path.read_bytes())
    blob[at] ^= 1
    path.write_bytes(blob)


def recaption(source, index, text):
    edit_captions(source, lambda rows: [dict(row, text=text) if i == index else row for i, row in enumerate(rows)])


def replace(source, index):
    Image.new("RGB", (100, 80), "red").save(source / f"{index:03d}.png")


def add(source):
    Image.new("RGB", (70, 90), "blue").save(source / "new.png")
    edit_captions(source, lambda rows: [{"file_name": "new.png", "text": "a new one"}, *rows])


def another_vae(source):
    shutil.copytree(PIPELINE / "vae", source / "vae")
    config = source / "vae" / "config.json"
    config.write_text(config.read_text().replace("0.13025", "0.13026"))
    return "--pretrained_vae_model_name_or_path", source / "vae"


ALL = PICTURES
CHANGES = {  # what is done to (source, run) -> (rows to encode, of how many, why); it returns the flags of the next run
    "first time": (lambda s, r: shutil.rmtree(r), ALL, ALL, f"{ALL} captions new, {ALL} images new"),
    "nothing": (lambda s, r: None, 0, ALL, "nothing changed"),
    "caption": (lambda s, r: recaption(s, 3, "another"), 1, ALL, "1 caption changed"),
    "image": (lambda s, r: replace(s, 4), 1, ALL, "1 image changed"),
    "both of a row": (
        lambda s, r: (recaption(s, 4, "another"), replace(s, 4))[:0],
        1,
        ALL,
        "1 caption changed, 1 image changed",
    ),
    "of two rows": (
        lambda s, r: (recaption(s, 2, "another"), replace(s, 4))[:0],
        2,
        ALL,
        "1 caption changed, 1 image changed",
    ),
    "row added": (lambda s, r: add(s), 1, ALL + 1, "1 caption new, 1 image new"),
    "row removed": (lambda s, r: edit_captions(s, lambda rows: rows[1:]), 0, ALL - 1, "1 row removed"),
    "resolution": (lambda s, r: ("--resolution", 128), ALL, ALL, f"{ALL} images at another resolution"),
    "flip": (lambda s, r: ("--random_flip",), ALL, ALL, f"{ALL} images mirrored"),
    "vae": (lambda s, r: another_vae(s), ALL, ALL, f"{ALL} images for another encoder; the model's or the VAE's name"),
    "damaged image": (
        lambda s, r: flip_byte(r / "cache" / "posteriors-64x64.rows", 2000),
        1,
        ALL,
        "1 image damaged or lost",
    ),
    "damaged caption": (
        lambda s, r: flip_byte(r / "cache" / "captions.rows", -1),
        1,
        ALL,
        "1 caption damaged or lost",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_explain_says_what_the_next_run_does_and_does_nothing(change, cached, source, tmp_path, capsys, done):
    run = tmp_path / "run"
    shutil.copytree(cached, run)
    make, touched, count, why = CHANGES[change]
    flags = make(source, run) or ()
    before = everything(tmp_path)
    precompute(run, source, *flags, "--explain")
    said = capsys.readouterr().out
    overview, to_encode = said.splitlines()[-2:]
    assert overview.startswith(f"{count} rows: {count} at ") and "; none held out" in overview
    assert to_encode.startswith(f"{touched} of {count} rows to encode: {why}; ")
    assert everything(tmp_path) == before and done == dict(captions=[], pictures=[])

    precompute(run, source, *flags)
    out = capsys.readouterr().out
    assert out.startswith(said) and f"\n{touched} of {count} rows encoded: {why}; " in out
    for noun, kind in (("caption", "captions"), ("image", "pictures")):
        assert len(done[kind]) == sum(int(n) for n in re.findall(rf"(\d+) {noun}", why))
    assert len(Cache(run / "cache").index) == count

    after = content(run)
    precompute(run, source, *flags)
    assert f"\n0 of {count} rows to encode: nothing changed; 0 MiB" in capsys.readouterr().out
    assert content(run) == after


def test_explain_tells_of_the_unconditionals_repair(cached, source, tmp_path, capsys):
    """Its row belongs to no example, but a run that loads both text encoders for it does something."""
    run = tmp_path / "run"
    shutil.copytree(cached, run)
    flip_byte(run / "cache" / "captions.rows", 100)
    precompute(run, source, "--explain")
    assert "nothing changed" not in capsys.readouterr().out


def test_rows_of_one_name_in_several_folders_are_told_apart(pictures, tmp_path, capsys):
    """When a/same.png is removed, one row is removed; when c/same.png comes, one is new and none is changed."""
    source = tmp_path / "source"
    for i, folder in enumerate("abc"):
        (source / folder).mkdir(parents=True)
        shutil.copy(pictures / f"{i:03d}.png", source / folder / "same.png")
        (source / folder / "same.txt").write_text(f"caption {i}")
    shutil.move(source / "c", tmp_path / "c")
    precompute(tmp_path / "run", source)
    shutil.move(tmp_path / "c", source / "c")
    capsys.readouterr()
    precompute(tmp_path / "run", source, "--explain")
    assert "\n1 of 3 rows to encode: 1 caption new, 1 image new; " in capsys.readouterr().out
    shutil.rmtree(source / "a"), shutil.rmtree(source / "c")
    precompute(tmp_path / "run", source, "--explain")
    assert "\n0 of 1 row to encode: 1 row removed; " in capsys.readouterr().out


def test_equal_captions_and_equal_pictures_are_encoded_once(source, tmp_path, done):
    """Whatever their names; each row still has its own caption and picture."""
    shutil.copy(source / "000.png", source / "005.png")
    shutil.copy(source / "000.png", source / "006.png")
    texts = [["one", "two", "three"][i % 3] for i in range(PICTURES)]
    edit_captions(source, lambda rows: [dict(row, text=text) for row, text in zip(rows, texts)])
    precompute(tmp_path / "run", source, "--random_flip")
    assert done["captions"] == ["one", "two", "three"]
    assert len(done["pictures"]) == 2 * (PICTURES - 2) == len({p.tobytes() for p in done["pictures"]})
    cache = Cache(tmp_path / "run" / "cache")
    index, captions = cache.index, caption_rows(cache)
    for i in range(PICTURES):
        assert captions[i] == captions[i % 3]
        assert (
            (index[i]["picture"] == index[0]["picture"])
            == (i in (0, 5, 6))
            == (index[i]["mirrored"] == index[0]["mirrored"])
        )
    assert len(set(captions)) == 3 and len(set(index["picture"])) == PICTURES - 2


def test_all_that_is_wrong_is_listed_at_once(source, tmp_path, capsys):
    """Not one after another, each after minutes of looking; and --skip_bad leaves out exactly these."""
    (source / "001.png").write_bytes(b"<html>")
    (source / "002.png").unlink()
    edit_captions(source, lambda rows: [dict(row, text=None) if i == 5 else row for i, row in enumerate(rows)])
    with pytest.raises(UserError, match="^3 of 8 rows cannot be used, listed above; repair or remove .*--skip_bad"):
        precompute(tmp_path / "run", source)
    listed = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in listed] == ["001.png", "002.png", "005.png"]
    assert "None, not text" in listed[2] and not (tmp_path / "run" / "cache" / "index.npy").exists()
    precompute(tmp_path / "run", source, "--skip_bad")
    assert "5 rows: 5 at 64 × 64; none held out; 3 rows left out\n" in capsys.readouterr().out
    skipped = Cache(tmp_path / "run" / "cache").manifest["skipped"]
    assert [f"{name}: {why}" for name, why in skipped] == listed


@pytest.mark.slow
def test_nothing_changed_is_said_only_where_nothing_did(source, tmp_path, capsys):
    """Nothing is to be encoded in any of these, and each is another cache than before."""
    run = tmp_path / "run"

    def said(*flags):
        capsys.readouterr()
        precompute(run, source, *flags)
        return capsys.readouterr().out

    said()
    for change, why in (
        (lambda rows: [dict(rows[0], text=rows[1]["text"]), *rows[1:]], "1 row changed, encoded already"),
        (lambda rows: rows[::-1], "another order"),
        (lambda rows: [*rows, rows[0]], "1 row added, encoded already"),
        (
            lambda rows: [*rows[:7], dict(rows[7], text=rows[0]["text"])],
            "1 row changed, encoded already; 1 row removed",
        ),
    ):
        edit_captions(source, change)
        assert f" rows to encode: {why}; 0 MiB" in said("--explain")
        said()
    for flags, why in (
        (("--prediction_type", "v_prediction"), "the noise schedule or the prediction type"),
        (("--instance_prompt", "fox"), "the trigger word"),
    ):
        if "--instance_prompt" in flags:
            edit_captions(source, lambda rows: [row | {"text": f"fox {row['text']}"} for row in rows])
            said()
        assert f" 0 of 8 rows to encode: {why}; 0 MiB" in said(*flags, "--explain").replace("\n", " ")
    assert "captions at another length, the unconditional embedding; " in said("--max_token_length", 150)
    assert "\n0 of 8 rows to encode: 7 captions at another length, encoded already; 0 MiB" in said()
    pattern = r"; (\d) held out.*\n0 of 8 rows to encode: \1 rows? held out otherwise; "
    assert re.search(pattern, said("--validation_fraction", 0.3))
    (run / "cache" / "manifest.json").unlink()
    assert "0 of 8 rows to encode: 8 rows without an index, encoded already; " in said()
    assert "0 of 8 rows to encode: nothing changed; " in said()


def test_what_else_a_manifest_can_say_is_named():
    """Each alone, where no row has anything to say; where files were seen is nothing."""
    then = dict(identity={"vae": "a"}, decoder="x", buckets=[[64, 64]], instance_prompt=None)
    then["components"] = {"unet": dict(config="1", content="2", seen=[[1, 2, 3, 4]])}
    then["validation_prompts"] = {"a": 3, "b": 4}
    same = dict(then, buckets=[(64, 64)], components={"unet": dict(config="1", content="2", seen=[])})
    same["validation_prompts"] = {"a": None, "b": None}  # where they are is not known before they are encoded
    assert other_facts(then, same) == []
    for field, value, words in (
        ("identity", {"vae": "b"}, "the encoders or their precision, encoded already"),
        ("decoder", "y", "the decoder of pictures, encoded already"),
        ("buckets", [(64, 64), (64, 128)], "the buckets"),
        ("instance_prompt", "fox", "the trigger word"),
        ("validation_prompts", {"b": None, "a": None}, "the validation prompts"),
        ("components", {"unet": dict(config="1", content="3", seen=[])}, "the model's files"),
    ):
        assert other_facts(then, same | {field: value}) == [words]


def test_another_decoder_encodes_pictures_again(cached, pictures, tmp_path, monkeypatch, capsys, done):
    """Two versions of Pillow decode one JPEG to different pixels."""
    shutil.copytree(cached, tmp_path / "run")
    monkeypatch.setattr("data.survey.DECODER", "Pillow 99")
    monkeypatch.setattr("data.precompute.DECODER", "Pillow 99")
    precompute(tmp_path / "run", pictures)
    assert (
        f"{PICTURES} of {PICTURES} rows to encode: {PICTURES} images for another decoder; " in capsys.readouterr().out
    )
    assert len(done["pictures"]) == PICTURES and not done["captions"]


def test_the_overview_counts_what_a_user_wants_to_know(tmp_path, capsys):
    folder = tmp_path / "d"
    folder.mkdir()
    pictures = (("a", (128, 128), "one"), ("b", (30, 20), ""), ("c", (200, 90), "one\ntwo"), ("d", (128, 128), "three"))
    for name, size, caption in pictures:
        Image.new("RGB", size, "red").save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(caption)
    precompute(tmp_path / "run", folder, "--buckets", "--resolution", 128, "--explain")
    found = capsys.readouterr().out.splitlines()[1]
    assert found == (
        "4 rows: 2 at 128 × 128, 2 at 128 × 64; none held out; 1 picture enlarged, e.g. b.png; "
        "1 row with an empty caption, e.g. b.png; 1 row with several captions, e.g. c.png; "
        "1 row with a picture that an earlier one has, e.g. d.png"
    )


# ---- Held out


def small_pictures(folder, count):
    """Pictures of 16 × 16 pixels, no two alike, with captions."""
    folder.mkdir(exist_ok=True)
    noise = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(noise.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(f"number {i}")
    return folder


def held_out(folder, fraction):
    """-> {name of a picture: whether it is held out}, without encoding"""
    examples = open_examples(settings("data.precompute", train_data_dir=str(folder)))
    with ThreadPoolExecutor(2) as pool:
        rows, _, names = survey(examples, ("texts", "vae"), [(64, 64)], False, fraction, pool, Skipped(allowed=False))
    return dict(zip(names, rows["held_out"].tolist()))


def test_what_is_held_out_is_a_share_chosen_by_content(tmp_path):
    folder = small_pictures(tmp_path / "d", 200)
    some = held_out(folder, 0.2)
    assert sum(some.values()) / 200 == pytest.approx(0.2, abs=0.07)
    assert not any(held_out(folder, 0.0).values())
    more = held_out(folder, 0.4)
    assert all(more[name] for name in some if some[name]) and sum(more.values()) / 200 == pytest.approx(0.4, abs=0.08)
    # fewer, more and renamed rows, other captions: nobody changes sides, and a copy is on the side of its original
    for i in range(200):
        path = folder / f"{i:03d}.png"
        if i % 2:
            path.unlink()
        else:
            shutil.copy(path, folder / f"copy {i:03d}.png")
            path.rename(folder / f"z{i:03d}.png")
            for name in (f"copy {i:03d}", f"z{i:03d}"):
                (folder / f"{name}.txt").write_text("another caption")
    for name, out in held_out(folder, 0.2).items():
        assert out == some[name[-7:]], name


def test_an_epoch_has_each_picture_as_often_as_its_folder_says(tmp_path, capsys):
    """In both 3_a and 2_a it counts five times. What is held out counts nowhere, however often it would be repeated."""
    source, run = tmp_path / "d", tmp_path / "run"
    for folder in ("3_a", "2_a", "plain"):
        shutil.copytree(small_pictures(tmp_path / "twelve", 12), source / folder)
    precompute(run, source, "--validation_fraction", 0.3)
    cache = Cache(run / "cache")
    out = cache.index["held_out"].sum()
    kept = 12 - out // 3
    assert out and out % 3 == 0 and kept and len(cache) == 3 * kept and cache.epoch == 6 * kept
    said = capsys.readouterr().out
    assert f"; 24 pictures repeated (an epoch has {6 * kept} images), e.g. 2_a/000.png" in said
    batches = Batches(cache, settings("train", train_batch_size=1, gradient_accumulation_steps=1, seed=5), 1000)
    drawn = [batches.rows(step, 0)[0] for step in range(2 * cache.epoch)]
    times = {"3_a": 6, "2_a": 4, "plain": 2}
    for i, name in enumerate(cache.names(range(36))):
        assert drawn.count(i) == (0 if cache.index["held_out"][i] else times[name.split("/")[0]]), name
    before = cache.manifest["content"]
    (source / "3_a").rename(source / "4_a")
    precompute(run, source, "--validation_fraction", 0.3)
    assert Cache(run / "cache").manifest["content"] != before  # another order, so no run goes on with it


def test_one_picture_at_least_is_held_out_when_there_are_two(tmp_path):
    """A validation on nothing says nothing; and a picture and its copy are never on both sides."""
    folder = small_pictures(tmp_path / "d", 3)
    (out,) = (name for name, held in held_out(folder, 1e-9).items() if held)
    shutil.copy(folder / out, folder / "copy.png")
    (folder / "copy.txt").write_text("x")
    assert sum(held_out(folder, 1e-9).values()) == 2
    for path in folder.glob("0*.png"):
        path.unlink()
    assert held_out(folder, 1e-9) == {"copy.png": False}


def test_one_picture_at_least_is_left_to_train_on(tmp_path):
    """Said now, and not by train after hours of encoding."""
    small_pictures(tmp_path / "d", 1)
    with pytest.raises(UserError, match="--validation_fraction 1.0: would hold out all of 1 row"):
        held_out(tmp_path / "d", 1.0)


def test_what_is_held_out_is_cached_and_never_drawn(tmp_path):
    """And the rest comes in every epoch."""
    folder, run = small_pictures(tmp_path / "d", 24), tmp_path / "run"
    precompute(run, folder, "--validation_fraction", 0.3)
    cache, wanted = Cache(run / "cache"), held_out(folder, 0.3)
    outside = {i for i, name in enumerate(cache.names(range(24))) if wanted[name]}
    assert 2 < len(outside) < 15 and len(cache) == 24 - len(outside) and cache.manifest["held_out"] == len(outside)
    values = settings("train", train_batch_size=2, gradient_accumulation_steps=2, seed=5)
    batches = Batches(cache, values, 1000)
    drawn = [example for step in range(40) for slot in range(2) for example in batches.rows(step, slot)]
    assert set(drawn) == set(range(24)) - outside
    batch = cache.batch(sorted(outside), np.zeros(len(outside), bool), np.zeros(len(outside), bool))
    assert batch["mean"].any()  # there for validation
    before = cache.manifest["content"]
    precompute(run, folder)
    assert len(Cache(run / "cache")) == 24 and Cache(run / "cache").manifest["content"] != before


def test_a_cache_with_nothing_to_train_on_is_refused(tmp_path):
    """Every row held out: said in one line, by precompute or by train."""
    folder = small_pictures(tmp_path / "d", 30)
    for name, out in held_out(folder, 0.5).items():
        if not out:
            (folder / name).unlink()
    with pytest.raises(UserError):
        precompute(tmp_path / "run", folder, "--validation_fraction", 0.5)
        here("train", "--output_dir", tmp_path / "run", *TRAIN)


# ---- Sources


@pytest.mark.slow
def test_a_saved_dataset_and_a_parquet_file_give_the_same_rows_as_the_folder(cached, pictures, tmp_path):
    import datasets

    rows = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    columns = {"image": [str(pictures / row["file_name"]) for row in rows], "text": [row["text"] for row in rows]}
    table = datasets.Dataset.from_dict(columns, features=features)
    table.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "parquet").mkdir()
    table.to_parquet(str(tmp_path / "parquet" / "train-00000-of-00001.parquet"))
    bytes_only = [{"path": None, "bytes": (pictures / row["file_name"]).read_bytes()} for row in rows]
    datasets.Dataset.from_dict({**columns, "image": bytes_only}, features=features).save_to_disk(
        str(tmp_path / "nameless")
    )
    wanted = content(cached)
    for name in ("saved", "parquet", "nameless"):
        here(
            "data.precompute", "--output_dir", tmp_path / f"run {name}", "--dataset_name", tmp_path / name, *PRECOMPUTE
        )
        found = content(tmp_path / f"run {name}")
        assert all(found[file] == wanted[file] for file in wanted if file.endswith((".rows", ".keys", "index.npy")))
        names = Cache(tmp_path / f"run {name}" / "cache").names(range(PICTURES))
        assert names == [f"row {i}" if name == "nameless" else f"{i:03d}.png" for i in range(PICTURES)]


def test_datasets_that_cannot_be_used_are_refused(tmp_path):
    import datasets

    image, text = datasets.Image(), datasets.Value("string")
    datasets.Dataset.from_dict(
        {"image": [], "text": []}, features=datasets.Features(image=image, text=text)
    ).save_to_disk(str(tmp_path / "none"))
    datasets.Dataset.from_dict({"image": [1, 2], "text": ["a", "b"]}).save_to_disk(str(tmp_path / "integers"))
    for name, message in (
        ("none", "--dataset_name .*none: no rows"),
        ("integers", "--image_column image: holds no images"),
    ):
        with pytest.raises(UserError, match=message):
            here("data.precompute", "--output_dir", tmp_path / "run", "--dataset_name", tmp_path / name, *PRECOMPUTE)
    assert [path.name for path in (tmp_path / "run" / "cache").iterdir()] == [".writer"]


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv"])
def test_captions_that_are_not_utf_8_are_refused_naming_the_file(kind, tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    Image.new("RGB", (64, 64)).save(folder / "a.png")
    name, text = {
        "txt": ("a.txt", "f\xfcchse"),
        "jsonl": ("metadata.jsonl", '{"file_name": "a.png", "text": "f\xfcchse"}\n'),
        "csv": ("metadata.csv", "file_name,text\na.png,f\xfcchse\n"),
    }[kind]
    (folder / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=rf"{name}.*utf-8"):
        precompute(tmp_path / "run", folder)


def test_a_file_name_that_is_not_utf_8_is_no_obstacle(pictures, tmp_path):
    """Linux allows any bytes in a name, and after hours of encoding that would end in a traceback."""
    source = tmp_path / "source"
    source.mkdir()
    name = b"f\xfcchse.png".decode("utf-8", "surrogateescape")
    shutil.copy(pictures / "000.png", source / name)
    (source / name).with_suffix(".txt").write_text("foxes")
    precompute(tmp_path / "run", source)
    assert len(Cache(tmp_path / "run" / "cache")) == 1


def test_training_does_not_read_the_names(cached, tmp_path):
    """They are for messages only, so training draws the same numbers when they are gone."""
    values = settings("train", train_batch_size=4)
    wanted = Batches(Cache(cached / "cache"), values, 1000).draw(0, 0)
    shutil.copytree(cached, tmp_path / "run")
    (tmp_path / "run" / "cache" / "names.txt").unlink()
    found = Batches(Cache(tmp_path / "run" / "cache"), values, 1000).draw(0, 0)
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
