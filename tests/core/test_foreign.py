"""Foreign text and JSON: limits, byte-order marks, separators, escapes."""

import pytest

from ratiograph.core.foreign import lines_of, parse_json, read_json, read_text, shown


def test_shown_is_one_printable_line():
    assert shown("a\x1b[31m\nb") == r"a\x1b[31m\nb"
    assert shown("x" * 300) == "x" * 199 + "…"
    assert shown("naïve 中文") == "naïve 中文"


def test_lines_are_cut_at_newlines_alone(tmp_path):
    (tmp_path / "prompts.txt").write_bytes("\ufeffa\u2028b\r\nc\x85d\re\n".encode())
    assert lines_of(read_text(tmp_path / "prompts.txt")) == ["a\u2028b", "c\x85d", "e"]
    assert lines_of("") == []


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 50_000, "{'a': 1}", "", "NaN]"])
def test_json_that_cannot_be_read_names_its_source(text):
    with pytest.raises(ValueError, match=r"^stats\.json is no JSON") as raised:
        parse_json(text, "stats.json")
    assert "\n" not in str(raised.value)


def test_files(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "a.json") == {"a": 1}
    with pytest.raises(ValueError, match=r"a\.json holds more than 4 bytes"):
        read_json(tmp_path / "a.json", most=4)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"latin\.txt is no UTF-8 text .*byte 3"):
        read_text(tmp_path / "latin.txt")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_text(tmp_path / "none.txt")
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        read_text(tmp_path)
