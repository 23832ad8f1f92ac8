"""What becomes of a caption before it is encoded: orders of its tags that are functions of it, and a trigger word."""

import math
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import PICTURES, ROOT, TRAIN, command, content, edit_captions, here, precompute, settings, untitled

from data.cache import Cache, read_manifest
from data.captions import VARIANTS, orders, parts_of, prefixed, wording
from data.common.errors import UserError
from data.dataset import open_examples
from train.batches import Batches

TAGS = "1girl, red hair, blue eyes,forest , night, rain"


def parts(caption):
    return [part.strip() for part in caption.split(",")]


# ---- Orders


@pytest.mark.parametrize("keep", [0, 1, 3, 6, 99])
def test_every_order_has_all_tags_and_the_first_ones_where_they_were(keep):
    found = orders(TAGS, 8, keep, 42)
    assert len(found) == 8 and found[0] == TAGS
    for other in found[1:]:
        assert sorted(parts(other)) == sorted(parts(TAGS)) and parts(other)[:keep] == parts(TAGS)[:keep]
        assert other in (TAGS, ", ".join(parts(other)))
    possible = math.factorial(max(0, 6 - keep))
    assert len({", ".join(parts(one)) for one in found}) == min(8, possible)


@pytest.mark.parametrize(
    "caption, count, different",
    [("a, b, c", 6, 6), ("a, b, c", 9, 6), ("a, b", 8, 2), ("one sentence", 8, 1), ("", 8, 1), ("a, a, b", 8, 3)]
    + [("a, a, a", 8, 1), ("a,, b,", 8, 2), (", ".join("abcde"), 120, 120), (",", 3, 1)],
)
def test_all_orders_that_there_are_come_before_one_comes_again(caption, count, different):
    found = orders(caption, count, 0, 7)
    assert len(found) == count and len(set(found[:different])) == different and found[0] == caption
    assert found == [found[i % different] for i in range(count)]


def test_an_order_is_a_function_of_seed_caption_and_index_alone():
    """Fewer orders are the first of more; another seed or caption has others; no process and no earlier call counts."""
    found = orders(TAGS, 20, 1, 42)
    assert orders(TAGS, 8, 1, 42) == found[:8]
    assert orders(TAGS, 8, 1, 43)[1:] != found[1:8]
    other = orders(TAGS.replace("rain", "snow"), 8, 1, 42)
    assert [one.replace("snow", "rain") for one in other[1:]] != found[1:8]
    code = f"from data.captions import orders; print(orders({TAGS!r}, 20, 1, 42))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"{found}\n"


def test_every_tag_comes_to_every_place_about_equally_often():
    """Over many captions, so that no place teaches the model a tag."""
    places = Counter()
    for i in range(600):
        for one in orders(f"a, b, c, d, e, x{i}", 3, 0, 0)[1:]:
            places[parts(one).index("a")] += 1
    assert sum(places.values()) == 1200 and all(150 < places[i] < 250 for i in range(6))


# ---- A trigger word


@pytest.mark.parametrize(
    "caption, wanted, kept",
    [
        ("a red dog", "sks dog, a red dog", 1),
        ("", "sks dog", 1),
        (" \n", "sks dog", 1),
        ("sks dog, running", "sks dog, running", 1),
        ("SKS  Dog running, fast", "SKS  Dog running, fast", 1),
        ("a photo of sks dog.", "a photo of sks dog.", 0),
        ("sks dogs", "sks dog, sks dogs", 1),
        ("asks dog", "sks dog, asks dog", 1),
        ("sks, dog", "sks dog, sks, dog", 1),
        ("dog sks", "sks dog, dog sks", 1),
    ],
)
def test_the_prompt_is_in_front_unless_its_words_are_there(caption, wanted, kept):
    assert prefixed(caption, "sks dog") == wanted and parts_of(wanted, "sks dog") == kept


def test_a_prompt_stays_in_front_of_every_order_and_keep_tokens_counts_behind_it():
    for prompt, caption, front in (
        ("ohwx", "b, c, d, e", ["ohwx", "b"]),
        ("ohwx", "ohwx, b, c, d, e", ["ohwx", "b"]),
        ("ohwx, a man", "OHWX, a man, b, c, d, e", ["OHWX", "a man", "b"]),
        ("ohwx, a man", "b, c, d, e", ["ohwx", "a man", "b"]),
    ):
        words = wording(
            settings("data.precompute", instance_prompt=prompt, shuffle_caption=True, keep_tokens=1, caption_variants=6)
        )
        texts = words.texts([caption])
        assert len(set(texts)) == 6 and all(parts(text)[: len(front)] == front for text in texts)


@pytest.mark.parametrize(
    "prompt, said",
    [("", " '': no word in it; give one or a few"), ("  , ,", " '  , ,': no word in it; give one or a few")]
    + [("x" * 257, ": 257 characters; give a word or a few, of at most 256")],
)
def test_a_prompt_without_a_word_or_without_end_is_refused(prompt, said):
    with pytest.raises(UserError) as error:
        wording(settings("data.precompute", instance_prompt=prompt))
    assert str(error.value) == f"--instance_prompt{said}"
    assert wording(settings("data.precompute", instance_prompt=" sks \n dog, ")).prompt == "sks dog"


def captions(source, **flags):
    found = open_examples(settings("data.precompute", **{"train_data_dir": str(source)} | flags))
    return [found[i].captions for i in range(len(found))], found.notes


def test_the_prompt_is_the_caption_where_there_is_none(source):
    """In a folder without a table, in a table, and before the name of a folder like kohya's."""
    texts = [("a cat",), ("sks, a cat",), ("sks",)]
    edit_captions(
        source, lambda rows: [rows[0] | {"text": "a cat"}, {"file_name": "001.png"}, rows[2] | {"text": None}]
    )
    assert captions(source, instance_prompt="sks") == (
        [("sks, a cat",), ("sks",), ("sks",)],
        [
            f"{source}: passed over: 5 pictures not in metadata.jsonl, e.g. 003.png",
            f"{source}: 1 picture without a caption: theirs is 'sks'",
        ],
    )
    edit_captions(source, lambda rows: [{"file_name": row["file_name"]} for row in rows])
    assert captions(source, instance_prompt="sks")[0] == [("sks",)] * 3
    for flags in (dict(), dict(instance_prompt="sks", caption_column="tags")):
        with pytest.raises(UserError, match="^--caption_column .*: not in .*, which has file_name"):
            captions(source, **flags)
    (source / "metadata.jsonl").unlink()
    for picture in sorted(source.glob("*.png"))[3:]:
        picture.unlink()
    (source / "2_red fox").mkdir()
    shutil.move(source / "000.png", source / "2_red fox")
    (source / "001.txt").write_text("a cat"), (source / "002.txt").write_text("")
    assert captions(source, instance_prompt="sks")[0] == [texts[1], texts[2], texts[2]]
    assert captions(source)[0] == [("a cat",), ("",), ("red fox",)]
    (source / "001.txt").write_bytes(b"\xff")  # it has one, which cannot be read
    with pytest.raises(UserError, match="001.txt: .*save it as UTF-8"):
        captions(source, instance_prompt="sks")


def test_a_dataset_without_captions_has_the_prompt_for_all(pictures, tmp_path):
    """As diffusers' own examples of a trigger word are."""
    import datasets

    features = datasets.Features(image=datasets.Image())
    rows = dict(image=[str(path) for path in sorted(pictures.glob("*.png"))[:2]])
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "d")
    flags = dict(train_data_dir=None, dataset_name=str(tmp_path / "d"))
    found, notes = captions(None, **flags, instance_prompt="sks dog")
    assert found == [("sks dog",)] * 2 and "no column text: every caption is 'sks dog'" in notes[0]
    for wrong in (dict(), dict(instance_prompt="sks", caption_column="tags")):
        with pytest.raises(UserError, match="^--caption_column .*: not in the dataset, which has image"):
            captions(None, **flags | wrong)


# ---- Under a cache

SHUFFLE = ("--shuffle_caption", "--keep_tokens", 1)


@pytest.fixture(scope="module")
def tagged(pictures, tmp_path_factory):
    """The pictures with tags, one of them with two captions and one with a single tag; to be copied, not changed."""
    folder = tmp_path_factory.mktemp("tagged") / "pictures"
    shutil.copytree(pictures, folder)
    tags = "abcdefg"
    edit_captions(folder, lambda rows: [row | {"text": f"fox {i}, " + ", ".join(tags)} for i, row in enumerate(rows)])
    two = ["cat, " + ", ".join(tags), "dog, " + ", ".join(tags)]
    edit_captions(folder, lambda rows: [rows[0] | {"text": two}, rows[1] | {"text": "alone"}, *rows[2:]])
    return folder


@pytest.fixture(scope="module")
def shuffled(tagged, tmp_path_factory):
    """A run's folder with the cache of the tags in four orders; to be copied, not changed."""
    run = tmp_path_factory.mktemp("shuffled") / "run"
    precompute(run, tagged, *SHUFFLE, "--caption_variants", 4)
    return run


def batches(run, **values):
    values = settings("train", **dict(train_batch_size=4, gradient_accumulation_steps=1, seed=1) | values)
    return Batches(Cache(run / "cache"), values, 1000)


def test_rows_are_the_texts_of_their_example_in_order_each_encoded_once(tagged, tmp_path, done):
    """The whole way, with a prompt: what row (example, caption, variant) holds is the embedding of that very text."""
    run, flags = tmp_path / "run", dict(shuffle_caption=True, caption_variants=4, instance_prompt="ohwx")
    precompute(run, tagged, "--shuffle_caption", "--caption_variants", 4, "--instance_prompt", "ohwx")
    found, _ = captions(tagged, **flags)
    assert [len(texts) for texts in found] == [8] + [4] * (PICTURES - 1) and found[1] == (("ohwx, alone",) * 4)
    texts = list(dict.fromkeys(text for some in found for text in some))
    assert sorted(done["captions"]) == sorted(texts) and len(texts) == 8 + 1 + 4 * (PICTURES - 2)
    cache = Cache(run / "cache")
    assert cache.manifest["caption_variants"] == 4 and cache.manifest["instance_prompt"] == "ohwx"
    places = dict(zip((text for some in found for text in some), cache.caption_rows))
    no = np.zeros(1, bool)
    for example, some in enumerate(found):
        for i, text in enumerate(some):
            draws = (np.array([x], np.float32) for x in ((i // 4 + 0.5) / (len(some) // 4), (i % 4 + 0.999) / 4))
            row = cache.batch([example], no, no, *draws)["text"][0]
            assert np.array_equal(row.ravel(), cache.captions[places[text]][: row.size])
    assert len(set(places.values())) == len(texts)


def test_explain_says_rows_orders_and_what_they_take(tagged, tmp_path, capsys, done):
    precompute(tmp_path / "run", tagged, *SHUFFLE, "--explain")
    overview, to_encode = capsys.readouterr().out.splitlines()[-2:]
    texts = PICTURES * VARIANTS + 1  # of nine captions, one of which is a single tag
    assert overview.startswith(f"{PICTURES} rows: ") and f"; each caption in 8 orders, {texts} texts in all" in overview
    variants = texts - PICTURES - 1
    why = f"{PICTURES + 1} captions new, {variants} variants new, {PICTURES} images new"
    assert to_encode.startswith(f"{PICTURES} of {PICTURES} rows to encode: {why}; ") and "MiB in" in to_encode
    assert not (tmp_path / "run").exists() and done == dict(captions=[], pictures=[])


def test_what_is_encoded_stays_when_orders_are_added_and_taken_away(tagged, tmp_path, capsys, done):
    """The captions as they are remain the rows that they were, and so do the pictures."""
    run = tmp_path / "run"
    precompute(run, tagged)
    plain = content(run)
    for flags, why in (
        ((*SHUFFLE, "--caption_variants", 3), f"{2 * PICTURES} variants new"),
        ((*SHUFFLE, "--caption_variants", 4), f"{PICTURES} variants new"),
        ((*SHUFFLE, "--caption_variants", 4, "--seed", 1), f"{3 * PICTURES} variants changed"),
    ):
        capsys.readouterr(), done["captions"].clear(), done["pictures"].clear()
        precompute(run, tagged, *flags)
        assert f" rows encoded: {why}; " in capsys.readouterr().out and not done["pictures"]
        assert len(done["captions"]) == int(why.split()[0])
    precompute(run, tagged)
    assert "0 of 8 rows encoded: " in capsys.readouterr().out
    assert {name: data for name, data in content(run).items() if not name.startswith("captions.") or "npy" in name} == {
        name: data for name, data in plain.items() if not name.startswith("captions.") or "npy" in name
    }


def test_no_caption_is_said_to_have_changed_where_its_orders_or_the_length_did(shuffled, tagged, tmp_path, capsys):
    """Orders that it had before are at another length, the others are new; and a caption that did change is said."""
    run, source = tmp_path / "run", tmp_path / "d"
    shutil.copytree(shuffled, run), shutil.copytree(tagged, source)
    edit_captions(source, lambda rows: rows[1:4])

    def explained(*flags):
        capsys.readouterr()
        precompute(run, source, *flags, "--explain")
        return capsys.readouterr().out.splitlines()[-1].split(" to encode: ")[1]

    longer, other = ("--max_token_length", 150), "3 captions at another length"
    assert explained(*SHUFFLE, "--caption_variants", 5, *longer).startswith(
        f"{other}, 6 variants at another length, 2 variants new, the unconditional embedding; 5 rows removed; "
    )
    assert explained(*longer).startswith(
        f"{other}, the unconditional embedding; 5 rows removed; captions in 1 order instead of 4; "
    )
    assert explained(*SHUFFLE, "--caption_variants", 3).startswith("5 rows removed; captions in 3 orders instead of 4")
    said = explained(*SHUFFLE, "--caption_variants", 4, "--seed", 1, *longer)
    assert said.startswith(f"{other}, 6 variants changed, the unconditional embedding; 5 rows removed; 0 MiB")
    edit_captions(source, lambda rows: [rows[0] | {"text": "another"}, *rows[1:]])
    assert explained(*longer).startswith("1 caption changed, 2 captions at another length, ")


def test_order_of_rows_and_other_rows_change_no_text(tagged, tmp_path):
    """Variants belong to the caption, not to its place or neighbours, so nothing is encoded again."""
    found, _ = captions(tagged, shuffle_caption=True)
    shutil.copytree(tagged, tmp_path / "d")
    edit_captions(tmp_path / "d", lambda rows: rows[:3:-1])
    assert captions(tmp_path / "d", shuffle_caption=True)[0] == found[:3:-1]


@pytest.mark.slow
def test_each_order_is_drawn_about_equally_and_nothing_else_changes(shuffled, tagged, tmp_path):
    """On a stream of its own: pictures, noise and the caption that is drawn are those of a cache without orders."""
    precompute(tmp_path / "plain", tagged)
    ours, plain = batches(shuffled), batches(tmp_path / "plain")
    drawn, seen = [], Counter()
    for step in range(150):
        batch, one = ours.draw(step, 0), plain.draw(step, 0)
        rows = ours.rows(step, 0)
        assert rows == plain.rows(step, 0)
        assert all(torch.equal(batch[name], one[name]) for name in one if name not in ("text", "pooled"))
        for row, text, original in zip(rows, batch["text"], one["text"]):
            first, count = ours.cache.index["first_caption"][row], ours.cache.index["captions"][row]
            texts = [ours.cache.captions[ours.cache.caption_rows[first + i]] for i in range(count)]
            (place, *_) = [i for i in range(count) if np.array_equal(texts[i][: text.numel()], text.flatten())]
            assert np.array_equal(texts[place // 4 * 4][: text.numel()], original.flatten())  # of the same caption
            if row != 1:  # which has one order only
                drawn.append(place % 4)
            seen[row, place] += 1
    assert len(drawn) > 500 and min(np.bincount(drawn, minlength=4)) > len(drawn) / 4 * 0.8
    assert {place for row, place in seen if row == 0} == set(range(8))
    again = batches(shuffled).draw(149, 0)
    assert all(torch.equal(again[name], batch[name]) for name in batch)


@pytest.mark.slow
def test_the_whole_line_with_orders_a_trigger_word_and_repeats_goes_on_exactly(tagged, tmp_path):
    """A run that was stopped in the middle ends with the bytes of one that was not."""
    source = tmp_path / "d"
    source.mkdir()
    (source / "3_fox").mkdir()
    for i in range(4):
        shutil.copy(tagged / f"{i:03d}.png", source / ("3_fox" if i < 2 else "."))
    (source / "002.txt").write_text("a, b, c, d"), (source / "003.caption").write_text("e, f, g, h")
    flags = (*SHUFFLE, "--caption_variants", 3, "--instance_prompt", "ohwx")
    for name, stops in (("once", (4,)), ("twice", (2, 4))):
        precompute(tmp_path / name, source, *flags)
        for steps in stops:
            here("train", "--output_dir", tmp_path / name, *TRAIN, "--max_train_steps", steps)
    once, twice = (untitled(tmp_path / name / "lora.safetensors") for name in ("once", "twice"))
    assert once == twice and read_manifest(tmp_path / "once" / "cache")["instance_prompt"] == "ohwx"
    wrong = command("data.precompute", "--output_dir", tmp_path / "x", "--pretrained_model_name_or_path", "y",
                    "--train_data_dir", source, "--keep_tokens", 1, code=2)  # fmt: skip
    assert wrong.startswith("error: --keep_tokens: does nothing without --shuffle_caption")
