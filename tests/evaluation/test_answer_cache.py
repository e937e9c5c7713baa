"""The file of judges' answers: torn lines, claims between threads, and what is refused."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from perceptiondlm.evaluation.judges.cache import Answer, AnswerCache, answer_key


KEYS = [answer_key(text=str(number)) for number in range(64)]


def test_keys_depend_on_every_part_and_not_on_order():
    key = answer_key(settings={"model": "a", "temperature": 0}, text="x", images=[])
    assert key == answer_key(images=[], text="x", settings={"temperature": 0, "model": "a"})
    others = [
        answer_key(settings={"model": "b", "temperature": 0}, text="x", images=[]),
        answer_key(settings={"model": "a", "temperature": 1}, text="x", images=[]),
        answer_key(settings={"model": "a", "temperature": 0}, text="y", images=[]),
        answer_key(settings={"model": "a", "temperature": 0}, text="x", images=["0"]),
    ]
    assert len({key, *others}) == 5
    assert len(answer_key(text="\ud800")) == 64  # half a character is text, too


def test_answers_come_back_from_another_cache_on_the_same_file(tmp_path):
    path = tmp_path / "deep" / "answers.jsonl"
    one, two = AnswerCache(path), AnswerCache(path)
    answer = Answer('A "quoted"\nline \ud800 é', 12, 3)
    one.add(KEYS[0], answer, "model")
    assert two.get(KEYS[0]) == answer
    two.add(KEYS[1], Answer("B"), "model")
    assert [one.get(key) for key in KEYS[:3]] == [answer, Answer("B"), None]
    assert len(AnswerCache(path)) == 2
    record = json.loads(path.read_text().splitlines()[0])
    assert (record["model"], record["prompt_tokens"], record["completion_tokens"]) == ("model", 12, 3)


@pytest.mark.parametrize("length", [1, 30, 10_000])
def test_a_torn_line_is_ignored_and_then_cut_off(tmp_path, length):
    path = tmp_path / "answers.jsonl"
    AnswerCache(path).add(KEYS[0], Answer("A"), "model")
    whole = path.read_bytes()
    path.write_bytes(whole + (b'{"key": "' + b"x" * length)[:length])
    cache = AnswerCache(path)
    assert len(cache) == 1
    cache.add(KEYS[1], Answer("B"), "model")
    assert path.read_bytes().startswith(whole + b'{"key": "' + KEYS[1].encode())
    assert AnswerCache(path).get(KEYS[1]) == cache.get(KEYS[1]) == Answer("B")


def test_a_file_that_is_torn_from_its_first_line(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_bytes(b'{"key"')
    cache = AnswerCache(path)
    cache.add(KEYS[0], Answer("A"), "model")
    assert len(AnswerCache(path)) == 1


def test_a_broken_record_is_named(tmp_path):
    path = tmp_path / "answers.jsonl"
    cache = AnswerCache(path)
    cache.add(KEYS[0], Answer("A"), "model")
    with path.open("a") as file:
        file.write('{"key": "0123"}\n')
    with pytest.raises(ValueError, match=rf"line 2 of {path} is not a record"):
        AnswerCache(path)
    with pytest.raises(ValueError, match=rf"line 2 of {path} is not a record"):
        cache.get(KEYS[1])


def test_a_claimed_question_is_asked_once(tmp_path):
    """Eight threads with two caches on one file: every question is asked by one of them."""
    caches = [AnswerCache(tmp_path / "answers.jsonl") for _ in range(2)]
    asked = []

    def ask(number):
        cache = caches[number % 2]
        for key in KEYS[:16]:
            with cache.claim(key):
                if cache.get(key) is None:
                    asked.append(key)
                    time.sleep(0.002)
                    cache.add(key, Answer("A"), "model")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(8)))
    assert sorted(asked) == sorted(KEYS[:16])
    assert len(AnswerCache(tmp_path / "answers.jsonl")) == 16


def test_claims_of_several_questions_do_not_lock_each_other_out(tmp_path):
    caches = [AnswerCache(tmp_path / "answers.jsonl") for _ in range(2)]
    done = []

    def work(cache, keys):
        for _ in range(20):
            with cache.claim(*keys):
                time.sleep(0.001)
        done.append(cache)

    threads = [
        threading.Thread(target=work, args=(cache, keys), daemon=True)
        for cache, keys in zip(caches, (KEYS, KEYS[::-1]), strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert len(done) == 2
