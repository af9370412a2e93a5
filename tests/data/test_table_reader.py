"""CSV files of paths and labels."""

from __future__ import annotations

import pytest

from condu_ray.data import open_task
from condu_ray.errors import DataError


@pytest.fixture
def table(make, tmp_path):
    """Writes a CSV beside 12 pictures, p/0.png to p/11.png."""
    for number in range(12):
        make.write(tmp_path / "p" / f"{number}.png", make.picture_bytes(number))
    return lambda text: make.write(tmp_path / "list.csv", text if isinstance(text, bytes) else text.encode())


def rows(labels="abab", split=None, separator=","):
    ends = split or [None] * len(labels)
    return "\n".join(
        separator.join(filter(None, [f"p/{number}.png", label, end]))
        for number, (label, end) in enumerate(zip(labels, ends, strict=True))
    )


def test_paths_are_relative_and_labels_sorted(table):
    task = open_task("t", table("path,label\n" + rows("baba" * 3)))
    assert task.classes == ("a", "b") and task.split_made
    assert (len(task.train), len(task.test)) == (10, 2)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_mark_columns_in_any_order_and_other_separators(table, separator):
    text = (
        f"\ufeffPath{separator} Label\r\n".encode()
        + rows("abab", separator=separator).replace("\n", "\r\n\r\n").encode()
    )
    assert open_task("t", table(text)).classes == ("a", "b")
    turned = (
        separator.join(["label", "path"]) + "\n" + "\n".join(f"{'ab'[n % 2]}{separator}p/{n}.png" for n in range(4))
    )
    assert len(open_task("t", table(turned)).train) == 2


def test_quoted_labels(table):
    text = 'path,label\np/0.png,"cat, small"\np/1.png,"cat, small"\np/2.png,dog\np/3.png,dog\n'
    assert open_task("t", table(text)).classes == ("cat, small", "dog")


@pytest.mark.parametrize(
    ("split", "train", "test"),
    [
        (["train"] * 4 + ["test"] * 2, 4, 2),
        (["train"] * 4 + ["val"] * 2, 4, 2),
        (["train"] * 2 + ["val"] * 2 + ["Test"] * 2, 4, 2),
        (["training"] * 4 + ["Testing"] * 2, 4, 2),
    ],
)
def test_split_column(table, split, train, test):
    task = open_task("t", table("path,label,split\n" + rows("ababab", split)))
    assert not task.split_made and (len(task.train), len(task.test)) == (train, test)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no column 'path'"),
        ("file,label\nx,y\n", r"has no column 'path' \(found: file, label\)"),
        ("path,class\nx,y\n", "has no column 'label'"),
        ("path,label\n\n", "has no rows"),
        ("path,label\np/0.png\n", "line 2 has no label"),
        ("path,label\np/0.png,a\n,a\n", "line 3 has no path"),
        ("path,label\np/0.png,a\np/1.png,a\n", "one class only"),
        ("path,label,split\np/0.png,a,train\np/1.png,b,tset\n", r"line 3 has the split 'tset': did you mean test\?"),
        ("path,label,split\np/0.png,a,test\np/1.png,b,\n", "line 3 has an empty split"),
        ("path,label,split\np/0.png,a,test\np/1.png,b,test\n", "has no row of the split train"),
        ('path,label\np/0.png,"a\n', "is not a CSV file"),
        (b"path,label\np/0.png,caf\xe9\n", "is not UTF-8 text"),
        ("path,label\np/0.png,a\np/1.png,A\n", "'A' .number 1. and 'a' .number 2. have the same name"),
        ("path,label\n" + rows("abab") + "\np/\0.png,a\n", "line 6 has a path with a zero byte: correct it"),
        ("path,label\n" + rows("abab") + "\np/99.png,a\n", r"1 of 5 pictures .*p/99.png \(no such file\)"),
    ],
)
def test_refused_with_one_sentence(table, text, said):
    with pytest.raises(DataError, match=said) as raised:
        open_task("t", table(text))
    assert "\n" not in str(raised.value)
