"""Texts encoded of late: the same ids as without, nothing shared between owners, and no more kept than said."""

from __future__ import annotations

import threading

import pytest

from millis.tokenizer import Recent, Tokenizer
from millis.tokenizer.recent import EACH
from tokenizer_tiny import bpe, spm

SYSTEM = "hello hello, you are of help to those who ask <|im_start|> and to nobody else. "
CHAT = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "hello"}]


class Counted:
    """An encoder that notes what it was asked."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, text: str) -> list[int]:
        self.texts.append(text)
        return [ord(c) for c in text]


@pytest.mark.parametrize("owner", [None, "someone"])
def test_conversations_have_the_same_ids(owner: str | None) -> None:
    plain = Tokenizer.from_gguf(bpe())
    remembering = plain.remembering(Recent(), owner)
    for user in ("hello", SYSTEM, "hello <|im_end|>" * 9, SYSTEM):
        messages = [*CHAT, {"role": "assistant", "content": "yes"}, {"role": "user", "content": user}]
        for _ in range(2):
            assert remembering.encode_chat(messages) == plain.encode_chat(messages)
            assert remembering.encode(user * 3, parse_special=True) == plain.encode(user * 3, parse_special=True)


def test_a_text_begins_with_a_space_only_once() -> None:
    """A SentencePiece tokenizer puts one before a whole text; behind a special token some files have it otherwise."""
    plain = Tokenizer.from_gguf(spm())
    later = Tokenizer(
        encoder=plain._encoder,
        later=lambda text: [7, *plain._encoder(text)],
        spelling=plain._spelling,
        control=plain._control,
        prefix=[],
        suffix=[],
        bos=1,
        eos=frozenset((2,)),
        chat=plain._chat,
    )
    text = "abc" * 9
    for one in (plain, later):
        remembering = one.remembering(Recent())
        for _ in range(2):
            both = f"{text}<s>{text}"
            assert remembering.encode(both, parse_special=True) == one.encode(both, parse_special=True)


def test_what_was_encoded_is_not_encoded_again() -> None:
    encode, recent = Counted(), Recent()
    for key in ("one", "other", "one", "other"):
        found = recent.encoder(encode, key)
        assert found("hello") == [ord(c) for c in "hello"] and found("") == []
    assert encode.texts == ["hello", "", "hello", ""]  # once for each key


def test_the_caller_may_change_what_it_gets() -> None:
    encoder = Recent().encoder(Counted(), None)
    for _ in range(3):
        ids = encoder("hello")
        assert len(ids) == 5
        ids.clear()


def test_what_was_used_last_is_kept_within_the_limit() -> None:
    encode = Counted()
    encoder = Recent(12 * EACH).encoder(encode, None)
    text = {letter: letter * 2 * EACH for letter in "abcdef"}  # with its share, a quarter of the room
    for letter in "abcdae":  # a was used behind b, so b goes
        encoder(text[letter])
    for letter in "acde":
        encoder(text[letter])
    assert [one[0] for one in encode.texts] == ["a", "b", "c", "d", "e"]
    encoder(text["b"])
    assert encode.texts[-1][0] == "b"
    encoder(text["f"] + "f")  # more than a quarter: it drives nothing out
    for letter in "deb":
        encoder(text[letter])
    assert [one[0] for one in encode.texts] == ["a", "b", "c", "d", "e", "b", "f"]


def test_many_threads() -> None:
    encoder = Recent(20 * EACH).encoder(Counted(), None)
    wrong: list[str] = []

    def work(seed: int) -> None:
        for i in range(2000):
            letter = chr(97 + (seed * 7 + i * 3) % 9)
            if encoder(letter * 3 * EACH) != [ord(letter)] * (3 * EACH):
                wrong.append(letter)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
