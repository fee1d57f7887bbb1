"""Batches: what is in them, the same again, and resumed anywhere."""

import dataclasses
import itertools
import json
import subprocess
import sys

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest

from llama4_jax.data import emoji, heldout, loader
from llama4_jax.data.documents import PictureGrammar
from llama4_jax.data.draws import Draw, generator
from llama4_jax.data.pictures import Pictures, written_names
from llama4_jax.data.rendering import Renderer


def _assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert np.array_equal(left[name], right[name]), name


def _documents(batch):
    """The tokens, last target included, of every segment in order of appearance."""
    for row in range(len(batch["tokens"])):
        for segment in range(1, batch["segments"][row].max() + 1):
            here = batch["segments"][row] == segment
            yield [*batch["tokens"][row][here], batch["targets"][row][here][-1]]


def test_every_batch_has_all_its_pictures_and_little_padding(config, tok):
    batches = loader.make(config, tok)
    ratios = [loader.fill_ratio(next(batches)) for _ in range(30)]
    assert all(ratio["images"] == 1 for ratio in ratios)
    # At most min_text - 1 positions of a row stay empty.
    assert min(ratio["positions"] for ratio in ratios) >= 1 - (config.min_text - 1) / config.sequence_length


def test_images_come_in_the_order_of_their_documents(config, tok):
    batch = next(loader.make(config, tok))
    pictures = Pictures(config, tok)
    expected = {tok.decode(_tokens(pictures.document(position))): position for position in range(5)}
    seen = [tok.decode(document) for document in _documents(batch)]
    positions = [expected[text] for text in seen if text in expected]
    assert sorted(positions) == list(range(5))
    assert np.array_equal(batch["images"], np.stack([pictures.image(position) for position in positions]))


def _tokens(document):
    return [*document.inputs, document.targets[-1]]


def test_an_epoch_asks_for_every_trained_pair_once_and_never_for_a_held_out_one(config, tok):
    pictures = Pictures(config, tok)
    trained = sorted(name for name in written_names(config))
    for epoch in range(2):
        positions = range(epoch * pictures.epoch, (epoch + 1) * pictures.epoch)
        asked = [
            f"{emoji.LANGUAGES[language]}: {name}\n"
            for position in positions
            for language, name in pictures.lines(position)
        ]
        assert sorted(asked) == trained
    every = {(entry.character, language) for entry in pictures.emoji for language in config.languages}
    assert 0 < len(trained) < len(every)


def test_padding_has_no_segment_and_no_weight(config, tok):
    batches = loader.make(dataclasses.replace(config, min_text=10_000), tok)  # pictures alone
    batch = next(batches)
    padding = batch["segments"] == 0
    assert padding.any()
    for name in ("tokens", "targets", "positions", "loss_weights"):
        assert not batch[name][padding].any()


def _tight(config, tok):
    """One row that has room for the first two documents, but not for every later pair: (config, its pictures)."""
    for seed in itertools.count():
        tight = dataclasses.replace(config, seed=seed, rows=1, images_per_batch=2)
        pictures = Pictures(tight, tok)
        lengths = [len(pictures.document(position)) for position in range(2 * pictures.epoch)]
        room = max(lengths[0] + lengths[1], max(lengths))
        if any(left + right > room for left, right in zip(lengths[::2], lengths[1::2])):
            return dataclasses.replace(tight, sequence_length=room), pictures


def test_pictures_without_room_wait_for_the_next_batch_and_leave_tiles_of_zeros(config, tok):
    tight, pictures = _tight(config, tok)
    batches = loader.make(tight, tok)
    shown, waited = [], 0
    for batch in itertools.islice(batches, 40):
        real = np.any(batch["images"] != 0, axis=(1, 2, 3))
        waited += np.count_nonzero(~real)
        assert not np.any(np.diff(real.astype(int)) > 0)  # surplus tiles come last
        shown += [tok.decode(tokens) for tokens in _documents(batch) if tok.special["patch"] in tokens]
    state = batches.get_state()
    expected = set(range(state["next_picture"])) - set(state["waiting"])
    assert waited > 0
    assert sorted(shown) == sorted(tok.decode(_tokens(pictures.document(position))) for position in expected)


def test_more_pictures_than_rows_can_hold_are_refused_with_what_would_fit(config, tok):
    with pytest.raises(ValueError, match=r"images_per_batch=50 documents .* use images_per_batch <= \d+"):
        loader.make(dataclasses.replace(config, images_per_batch=50), tok)


def test_text_alone_has_no_images(config, tok):
    batch = next(loader.make(dataclasses.replace(config, images_per_batch=0), tok))
    assert "images" not in batch
    assert tok.special["patch"] not in batch["tokens"]
    assert np.all(batch["loss_weights"][batch["segments"] > 0] == config.text_weight)


def test_the_same_seed_gives_the_same_batches_and_another_seed_others(config, tok):
    first, again = loader.make(config, tok), loader.make(config, tok)
    other = loader.make(dataclasses.replace(config, seed=4), tok)
    for _ in range(3):
        batch = next(first)
        _assert_same(batch, next(again))
        assert not np.array_equal(batch["images"], next(other)["images"])


@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize("consumed", [0, 1, 7, 23])
def test_a_restored_loader_continues_bit_for_bit(config, tok, prefetch, consumed):
    config = dataclasses.replace(config, prefetch=prefetch)
    whole = loader.make(config, tok)
    for _ in range(consumed):
        next(whole)
    state = json.loads(json.dumps(whole.get_state()))
    expected = [next(whole) for _ in range(4)]
    restored = loader.make(config, tok)
    next(restored)  # a used iterator can be set back too
    restored.set_state(state)
    for batch in expected:
        _assert_same(next(restored), batch)
    whole.close()
    restored.close()


def test_the_state_does_not_depend_on_how_far_ahead_batches_were_prepared(config, tok):
    ahead, prompt = loader.make(dataclasses.replace(config, prefetch=4), tok), loader.make(config, tok)
    for _ in range(5):
        _assert_same(next(ahead), next(prompt))
        assert ahead.get_state() == prompt.get_state()
    ahead.close()


def test_a_new_process_continues_where_the_old_one_stopped(config, tok, vocabulary, tmp_path, root):
    batches = loader.make(config, tok)
    for _ in range(6):
        next(batches)
    state, expected = batches.get_state(), [next(batches) for _ in range(2)]
    program = f"""
import json, sys, numpy as np
from llama4_jax import tokenizer
from llama4_jax.config.data import DataConfig
from llama4_jax.data import loader
batches = loader.make({config!r}, tokenizer.load({str(vocabulary)!r}))
batches.set_state(json.loads({json.dumps(state)!r}))
for number in range(2):
    np.savez({str(tmp_path)!r} + f"/{{number}}.npz", **next(batches))
assert not {{"tensorflow", "torch"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], cwd=root, check=True)
    for number, batch in enumerate(expected):
        _assert_same(dict(np.load(tmp_path / f"{number}.npz")), batch)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_orbax_saves_and_restores_the_iterator(config, tok, tmp_path, prefetch):
    config = dataclasses.replace(config, prefetch=prefetch)
    batches, restored = loader.make(config, tok), loader.make(config, tok)
    for _ in range(3):
        next(batches)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(3, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(batches)))
        manager.wait_until_finished()
        manager.restore(3, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(restored)))
    for _ in range(3):
        _assert_same(next(restored), next(batches))
    batches.close()
    restored.close()


def test_a_state_of_another_configuration_is_refused(config, tok):
    state = loader.make(config, tok).get_state()
    other = loader.make(dataclasses.replace(config, names_per_image=1), tok)
    with pytest.raises(ValueError, match="fingerprint"):
        other.set_state(state)


def test_held_out_batches_show_other_text_and_other_renderings(config, tok):
    train, other = next(loader.make(config, tok)), next(loader.make(config, tok, split="heldout"))
    pictures = Pictures(config, tok)
    assert not np.array_equal(train["images"], other["images"])
    assert not np.array_equal(train["tokens"], other["tokens"])
    assert not any(np.array_equal(image, pictures.image(p)) for image in other["images"] for p in range(5))


def test_questions_cover_each_pair_once_and_split_them_as_training_does(config, tok):
    trained = list(heldout.questions(config, tok))
    untrained = list(heldout.questions(config, tok, heldout.Pairs.UNTRAINED))
    asked = [(question.character, question.language) for question in trained + untrained]
    assert len(set(asked)) == len(asked) == config.num_emoji * len(config.languages)
    written = {f"{emoji.LANGUAGES[question.language]}: {question.name}\n" for question in trained}
    assert written == set(written_names(config))
    assert untrained


def test_a_question_is_a_training_document_up_to_the_name_on_an_unseen_rendering(config, tok):
    grammar, shown = PictureGrammar(tok, config.tokens_per_tile), Pictures(config, tok)
    renderer = Renderer([entry.character for entry in shown.emoji], config.image_size)
    seen = {shown.image(position).tobytes() for position in range(2 * shown.epoch)}
    for question in itertools.islice(heldout.questions(config, tok, renderings=2), 8):
        document = grammar.document([(question.language, question.name)], picture=0)
        assert [*question.prompt, *question.answer] == [*document.inputs, document.targets[-1]]
        assert grammar.read(question.answer) == question.name
        assert question.image.tobytes() not in seen
        first = renderer.render(question.character, generator(config.seed, Draw.TRAIN_RENDERING, question.index))
        assert not np.array_equal(first, question.image)


def test_a_configuration_that_cannot_work_says_why(config):
    for change, message in (
        ({"names_per_image": 4}, "names_per_image=4 exceeds the 3 languages"),
        ({"heldout_pairs": 1.0}, "heldout_pairs=1 leaves no pair"),
        ({"rows": 0}, "rows=0 must be at least 1"),
        ({"code_share": 1.5}, "code_share=1.5 is a share"),
        ({"languages": ()}, "there is nothing to name"),
        ({"prefetch": -1}, "prefetch=-1 must not be negative"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(config, **change)


def test_pictures_drawn_in_parts_are_those_of_the_whole_and_the_rest_is_the_same(config, tok):
    parts = [loader.make(config, tok, drawn=drawn) for drawn in (range(2), range(2, 5))]
    whole = loader.make(config, tok)
    for _ in range(3):
        batch, made = next(whole), [next(part) for part in parts]
        assert np.array_equal(sum(part["images"] for part in made), batch["images"])
        assert not made[0]["images"][2:].any() and made[0]["images"][0].any()
        for part in made:
            _assert_same({**part, "images": 0}, {**batch, "images": 0})
    assert parts[0].get_state() == whole.get_state()
