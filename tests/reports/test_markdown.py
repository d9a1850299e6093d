"""Foreign text in Markdown: shown as it is, and never markup."""

import pytest

from ratiograph.reports.markdown import code, plain, table


@pytest.mark.parametrize(
    ("foreign", "expected"),
    [
        ("frechet_distance (Inception-v3), 50,000", "frechet_distance (Inception-v3), 50,000"),
        ("<script>a</script>", r"\<script>a\</script>"),
        ("[a](http://x) *b* `c` _d_ ~e~", r"\[a\](http://x) \*b\* \`c\` \_d\_ \~e\~"),
        ("$x$ &lt; &", r"\$x\$ \&lt; &"),
        ("a\n# b\x1b[31m", r"a\\n# b\\x1b\[31m"),
    ],
)
def test_text_is_never_markup(foreign, expected):
    assert plain(foreign) == expected


def test_code_and_tables_keep_their_cells():
    assert code("a`b\nc") == r"`a'b\nc`"
    assert table(["a|b", "n"], [["x|y", 1]], left=1) == "| a\\|b | n |\n|---|---:|\n| x\\|y | 1 |"
