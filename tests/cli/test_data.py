"""Reading and splitting: pure functions of the file."""

from peftcore.comparing.comparisons import demo
from peftcore.comparing.data.tables import read_rows
from peftcore.comparing.data.texts import Example, make_task, split


def examples(count: int) -> list[Example]:
    return [Example(f"text {index}", "ab"[index % 2]) for index in range(count)]


def test_csv_with_quotes_line_breaks_and_byte_order_mark(tmp_path):
    path = tmp_path / "texts.csv"
    path.write_bytes('\ufefftext,label\n"one, ""two""\nthree",x\nfour\u2028five,y\n'.encode())
    assert read_rows(path) == [{"text": 'one, "two"\nthree', "label": "x"}, {"text": "four\u2028five", "label": "y"}]


def test_jsonl_with_line_separators_inside_a_string(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "one\u2028two", "label": 3}\n\n', encoding="utf-8")
    assert read_rows(path) == [{"text": "one\u2028two", "label": 3}]


def test_splits_are_disjoint_complete_and_always_the_same():
    pieces = split(examples(100), [20, 10])
    assert [len(piece) for piece in pieces] == [20, 10, 70]
    assert sorted(example for piece in pieces for example in piece) == sorted(examples(100))
    assert pieces == split(examples(100), [20, 10])


def test_integers_are_ordered_by_value_and_before_words():
    train = [Example("t", label) for label in ("10", "9", "-1", "b", "a")] * 3
    assert make_task("here", train, train).labels == ("-1", "9", "10", "a", "b")


def test_majority_is_decided_on_the_training_texts():
    train = [Example("t", label) for label in "aaab"]
    assert make_task("here", train, [Example("t", label) for label in "abbb"]).majority == 0.25


def test_the_demo_holds_out_no_tweet_that_it_trains_on():
    held_out, tuning = demo.tweets(), demo.tweets(tuning=True)
    assert held_out.labels == ("negative", "neutral", "positive")
    assert held_out.train == tuning.train
    pools = [{example.text for example in pool} for pool in (held_out.train, held_out.held_out, tuning.held_out)]
    assert [len(pool) for pool in pools[1:]] == [1000, 1000]
    assert not pools[0] & pools[1] and not pools[0] & pools[2] and not pools[1] & pools[2]


def test_cleaning_drops_links_repetitions_and_contradictions():
    raw = ["so happy http://t.co/x", "RT @you: So happy!", "at last_\x99\x85", "no", "No."]
    kept = demo.clean(Example(text, label) for text, label in zip(raw, "ppnpn", strict=True))
    assert kept == [Example("so happy", "p"), Example("at last", "n")]
