import pytest

from recipes.csv_rows import read_csv


def rows(tmp_path, content, **options):
    path = tmp_path / "t.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return list(read_csv(path, **options))


def test_marks_quotes_line_ends_and_short_rows_are_read(tmp_path):
    content = '\ufeffimage,caption\r\na.png,"one, ""two""\r\nlines"\r\n\r\nb.png\r\nc.png,x,,\r\n'
    assert rows(tmp_path, content) == [
        (3, {"image": "a.png", "caption": 'one, "two"\r\nlines'}),
        (5, {"image": "b.png", "caption": None}),
        (6, {"image": "c.png", "caption": "x"}),
    ]
    assert rows(tmp_path, "a\tb\n1\t2,3\n", delimiter="\t") == [(2, {"a": "1", "b": "2,3"})]


def test_a_value_may_be_long(tmp_path):
    ((_, row),) = rows(tmp_path, f"a,b\nx,{'y' * 200_000}\n")
    assert len(row["b"]) == 200_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "image,caption\na.png,x\nb.png,a dog, running\n",
            r"each of the 2 columns, got ' running' behind them in line 3 of .*t\.csv\. Put .* ','",
        ),
        ('a,b\n1,"never ends\n2,x\n', r"a quote must end .* got unexpected end .* line 2 of .*t\."),
        ('a,b\n1,"ends" early\n', r"a quote must end .* expected after '\"' .* line 2 of"),
        (b"a,b\n1,caf\xe9\n", r"a \.csv table must be readable as UTF-8, got .*0xe9.* in .*t\.csv"),
    ],
)
def test_what_would_lose_a_part_of_a_row_is_refused(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        rows(tmp_path, content)
