"""Vocabularies that lie. Each gives one error that names the file and the key, whatever is wrong."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import BadModelFile, TramontaneError, UnsupportedModel
from runtime.tokenizer import load_tokenizer
from tests.tokenizer.vocabularies import KEY, bpe_metadata, spm_metadata

SPM = spm_metadata()
COUNT = len(SPM[KEY + "tokens"])
BPE = bpe_metadata()


def with_item(key, index, value, metadata=SPM):
    items = list(metadata[KEY + key])
    items[index] = value
    return {key: items}


SPM_CASES = [
    ("tokens", {"tokens": None}, "missing"),
    ("tokens", {"tokens": []}, "0 tokens"),
    ("tokens", {"tokens": "abc"}, "not an array"),
    ("tokens", with_item("tokens", 265, 7), "token 265 is not a string"),
    ("tokens", with_item("tokens", 265, "he"), "repeats token 260"),
    ("tokens", with_item("tokens", 265, "a\0b"), "token 265 holds a NUL"),
    ("tokens", with_item("tokens", 265, ""), "token 265 is empty"),
    ("tokens", with_item("tokens", 265, "\udc80"), "token 265 is not valid Unicode"),
    ("scores", {"scores": None}, "missing"),
    ("scores", {"scores": [0.0] * (COUNT - 1)}, f"{COUNT - 1} scores for {COUNT} tokens"),
    ("scores", with_item("scores", 3, float("nan")), "finite"),
    ("scores", with_item("scores", 3, "x"), "finite"),
    ("token_type", {"token_type": None}, "missing"),
    ("token_type", {"token_type": [1] * (COUNT + 1)}, f"{COUNT + 1} types for {COUNT} tokens"),
    ("token_type", with_item("token_type", 3, 9), "token 3 has the unknown type 9"),
    ("token_type", with_item("token_type", 3, [1]), "token 3 has the unknown type"),
    ("token_type", with_item("token_type", 3, 1), "255 byte tokens"),
    ("token_type", with_item("token_type", 260, 6), "no byte such as"),
    ("token_type", with_item("token_type", 1, 2), "more than one"),
    ("token_type", {"tokens": ["a"], "scores": [0.0], "token_type": [1], "bos_token_id": None,
                    "eos_token_id": None}, "no token is of the unknown type"),
    ("bos_token_id", {"bos_token_id": COUNT}, f"not a token id below {COUNT}"),
    ("eos_token_id", {"eos_token_id": -1}, "not a token id"),
    ("eot_token_id", {"eot_token_id": 2.0}, "not a token id"),
    ("add_bos_token", {"add_bos_token": 1}, "not true or false"),
    ("add_space_prefix", {"add_space_prefix": "yes"}, "not true or false"),
]  # fmt: skip
BPE_CASES = [
    ("merges", {"merges": None}, "missing"),
    ("merges", with_item("merges", 2, "Ġthe", BPE), "merge 2"),
    ("merges", with_item("merges", 2, "q z", BPE), "merge 2 ('q z')"),
    ("merges", with_item("merges", 2, "nope n", BPE), "merge 2"),
    ("merges", with_item("merges", 2, 5, BPE), "merge 2"),
    ("merges", with_item("merges", 2, "h e l", BPE), "merge 2"),
    ("tokens", with_item("tokens", 3, "he", BPE), "repeats token 3"),
    ("token_type", {"token_type": [1]}, "1 types for"),
    ("add_bos_token", {"add_bos_token": True, "bos_token_id": None}, "bos_token_id is missing"),
]


@pytest.mark.parametrize(("key", "changes", "reason"), SPM_CASES)
def test_spm(key, changes, reason):
    with pytest.raises(BadModelFile) as caught:
        load_tokenizer(spm_metadata(**changes), file="m.gguf")
    assert (caught.value.file, caught.value.where) == ("m.gguf", KEY + key)
    assert reason in caught.value.reason and "\n" not in str(caught.value)


@pytest.mark.parametrize(("key", "changes", "reason"), BPE_CASES)
def test_bpe(key, changes, reason):
    with pytest.raises(BadModelFile) as caught:
        load_tokenizer(bpe_metadata(**changes), file="m.gguf")
    assert (caught.value.file, caught.value.where) == ("m.gguf", KEY + key)
    assert reason in caught.value.reason


def test_what_is_not_served():
    with pytest.raises(UnsupportedModel, match=r"m\.gguf: tokenizer\.ggml\.pre: .*'weird'"):
        load_tokenizer(bpe_metadata(pre="weird"), file="m.gguf")
    with pytest.raises(UnsupportedModel, match=r"tokenizer\.ggml\.model: 'bert'"):
        load_tokenizer(spm_metadata(model="bert"), file="m.gguf")
    with pytest.raises(BadModelFile, match="no vocabulary"):
        load_tokenizer({}, file="m.gguf")
    with pytest.raises(BadModelFile, match=r"chat_template: not a string"):
        load_tokenizer(spm_metadata() | {"tokenizer.chat_template": 5}, file="m.gguf")


def test_unused_pieces_may_repeat():
    metadata = spm_metadata()
    metadata[KEY + "tokens"] += ["<pad>", "", "he"]
    metadata[KEY + "scores"] += [0.0] * 3
    metadata[KEY + "token_type"] += [5] * 3
    tokenizer = load_tokenizer(metadata)
    assert tokenizer.decode(tokenizer.encode("he <pad>")) == "he <pad>"
    assert max(tokenizer.encode("he <pad>")) < COUNT


junk = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 300), st.floats(), st.text(max_size=3), st.lists(st.integers())
)


@given(
    metadata=st.sampled_from([SPM, BPE]),
    key=st.sampled_from(sorted(set(SPM) | set(BPE))),
    value=junk,
    place=st.none() | st.integers(0, COUNT - 1),
)
def test_any_corruption_loads_or_is_refused(metadata, key, value, place):
    changed = dict(metadata)
    if place is not None and isinstance(changed.get(key), list):
        items = list(changed[key])
        items[place % len(items)] = value
        changed[key] = items
    else:
        changed[key] = value
    try:
        tokenizer = load_tokenizer(changed, file="m.gguf")
    except TramontaneError as error:
        assert "m.gguf" in str(error)
    else:
        tokenizer.decode(tokenizer.encode("the end <tool> é", parse_special=True), skip_special=False)
