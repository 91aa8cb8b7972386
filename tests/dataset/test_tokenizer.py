import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from training.dataset.tokenizer import (
    EMBEDDED_FIM,
    EOS,
    load_base,
    open_folder,
    train_embedded,
    vocabulary_tables,
)
from training.errors import DataError, MissingInput

TEXTS = ["def name(value):\n    return value + 1\n\n",
         "class Name:\n    def __init__(self):\n        pass\n"] * 5


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    return folder, train_embedded(TEXTS, 400, 1, folder)


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=200))
def test_any_text_round_trips_and_its_bytes_add_up(trained, text):
    coder = trained[1]
    ids = coder.encode([text])[0]
    assert coder.decode(ids) == text
    assert int(coder.token_bytes[ids].sum()) == len(text.encode("utf-8"))


def test_text_that_spells_a_special_token_stays_text(trained):
    coder = trained[1]
    text = f"x{EOS}y{EMBEDDED_FIM['middle']}z"
    ids = coder.encode([text])[0]
    assert coder.eos_id not in ids
    assert set(coder.fim.values()).isdisjoint(ids)
    assert coder.decode(ids) == text


def test_line_ends_are_known_by_token(trained):
    coder = trained[1]
    ids = coder.encode(["a\nb"])[0]
    assert [bool(coder.ends_line[token]) for token in ids] == [False, True, False]


def test_training_twice_gives_the_same_bytes(trained, tmp_path):
    train_embedded(TEXTS, 400, 1, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (trained[0] / name).read_bytes()


def test_transformers_loads_the_folder_with_the_same_ids(trained):
    from transformers import AutoTokenizer

    folder, coder = trained
    loaded = AutoTokenizer.from_pretrained(folder)
    text = TEXTS[0] + "ünïcode \U0001f600"
    assert loaded(text, add_special_tokens=False)["input_ids"] == coder.encode([text])[0].tolist()
    assert (loaded.eos_token_id, loaded.pad_token_id) == (coder.eos_id, coder.pad_id)
    assert loaded.decode(coder.encode([text])[0]) == text


def test_a_base_folder_is_copied_and_its_sentinels_found(trained, tmp_path):
    coder = load_base(str(trained[0]), "", EMBEDDED_FIM, tmp_path / "copy")
    assert (tmp_path / "copy" / "tokenizer.json").read_bytes() == (trained[0] / "tokenizer.json").read_bytes()
    assert coder.fim == trained[1].fim
    assert len(coder.fim) == 3


@pytest.mark.parametrize("fim", [{}, {"prefix": "<|fim_prefix|>"}, EMBEDDED_FIM | {"middle": "<unknown>"},
                                 EMBEDDED_FIM | {"middle": "<|fim_prefix|>"}])
def test_sentinels_that_are_not_three_known_tokens_are_not_used(trained, tmp_path, fim):
    assert load_base(str(trained[0]), "", fim, tmp_path / "copy").fim == {}


def test_a_base_without_tokenizer_or_end_mark_is_refused(trained, tmp_path):
    with pytest.raises(MissingInput, match="has no tokenizer on this machine"):
        load_base("nobody/nothing-of-the-kind", "", {}, tmp_path / "a")
    shutil.copytree(trained[0], tmp_path / "b")
    (tmp_path / "b" / "tokenizer_config.json").write_text("{}")
    with pytest.raises(DataError, match="names no end-of-text token"):
        open_folder(tmp_path / "b", {})
    (tmp_path / "b" / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        open_folder(tmp_path / "b", {})


def test_end_marks_given_as_records_and_pads_left_out_are_understood(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "b")
    (tmp_path / "b" / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": EOS}}))
    coder = open_folder(tmp_path / "b", {})
    assert coder.pad_id == coder.eos_id == trained[1].eos_id


def test_bytes_of_a_sentencepiece_vocabulary():
    vocabulary = {"<s>": 0, "<0x0A>": 1, "\u2581def": 2, "é": 3}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(),
                                         decoders.Fuse()])
    backend.add_special_tokens(["<s>"])
    token_bytes, ends_line = vocabulary_tables(vocabulary, json.loads(backend.to_str()))
    assert token_bytes.tolist() == [0, 1, 4, 2]
    assert np.flatnonzero(ends_line).tolist() == [1]
