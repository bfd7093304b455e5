"""The rows of a file, as they stand in it."""

from peftcore_lab.data.table_readers import read_rows


def test_csv_with_quotes_line_breaks_and_byte_order_mark(tmp_path):
    path = tmp_path / "texts.csv"
    path.write_bytes('\ufefftext,label\n"one, ""two""\nthree",x\nfour\u2028five,y\n'.encode())
    assert read_rows(path) == [{"text": 'one, "two"\nthree', "label": "x"}, {"text": "four\u2028five", "label": "y"}]


def test_jsonl_with_line_separators_inside_a_string(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "one\u2028two", "label": 3}\n\n', encoding="utf-8")
    assert read_rows(path) == [{"text": "one\u2028two", "label": 3}]
