"""CSV tables: open_clip's layout, grouping by image, and what is refused."""

import pytest

from convclip.data.csv_table import CsvTable
from convclip.data.samples import BrokenSample
from convclip.schema import Data, UserError
from tests.data.makers import noise_jpeg


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(3):
        (tmp_path / "images" / f"{number}.jpg").write_bytes(noise_jpeg(number))
    return tmp_path


def _table(folder, text, **settings):
    (folder / "t.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    return CsvTable(str(folder / "t.csv"), Data(**settings))


def test_rows_of_a_path_are_one_image(folder):
    rows = ["filepath,title", "images/2.jpg,c", f'{folder}/images/0.jpg,"a, ""quoted""', 'text"', "images/2.jpg,d"]
    table = _table(folder, "\r\n".join(rows))
    assert table.counts.tolist() == [2, 1] and table.shard.tolist() == [0, 0]
    first, second = table.read_captions(0), table.read_captions(1)
    assert (first.image_id, first.texts, first.ids) == (0, ["c", "d"], [0, 2])
    assert (second.image_id, second.texts, second.ids) == (1, ['a, "quoted"\r\ntext'], [1])
    assert table.read_image(0) == noise_jpeg(2) and table.read_image(1) == noise_jpeg(0)
    assert table.name(0) == "t.csv:images/2.jpg"


def test_relative_paths_may_start_in_the_present_folder(folder, monkeypatch):
    text = f"filepath,title\nimages/1.jpg,x\n{folder}/images/0.jpg,y\n"
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder)
    for table in (_table(folder, text), _table(folder / "elsewhere", text)):
        assert table.read_image(0) == noise_jpeg(1) and table.read_image(1) == noise_jpeg(0)


def test_columns_and_separator(folder):
    text = "caption\timage\tother\nx\timages/1.jpg\ty\n"
    for separator in ("\t", "\\t"):
        table = _table(folder, text, csv_image_key="image", csv_caption_key="caption", csv_separator=separator)
        assert table.read_captions(0).texts == ["x"] and table.read_image(0) == noise_jpeg(1)


def test_byte_order_mark(folder):
    assert _table(folder, b"\xef\xbb\xbffilepath,title\nimages/1.jpg,x\n").read_captions(0).texts == ["x"]


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("image,title\nx,y\n", {}, r"no column 'filepath'.* 'image', 'title': set data.csv_image_key"),
        ("filepath\ttitle\nx\ty\n", {}, r"separator ',' its columns are 'filepath\\ttitle'"),
        ("filepath,text\nx,y\n", {}, "no column 'title'.*csv_caption_key"),
        ("", {}, "its columns are none"),
        ("filepath,title\n", {}, "no rows"),
        ("filepath,title\nnone.jpg,x\n", {}, "none of the first 1 images .* exists, the first is .*none.jpg"),
        ("filepath,title\nx,y\n", {"csv_separator": ";;"}, "must be one character"),
        ("filepath,title\nimages/0.jpg," + "x" * 5_000_000 + "\n", {}, "no readable CSV file"),
    ],
)
def test_mistakes_show_at_start(folder, text, settings, message):
    with pytest.raises(UserError, match=message):
        _table(folder, text, **settings)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"none.csv cannot be read: No such file"):
        CsvTable(str(tmp_path / "none.csv"), Data())


def test_broken_rows_break_alone(folder):
    text = b"filepath,title\nimages/0.jpg,caf\xe9\nimages/1.jpg,\nimages/2.jpg\n,x\nlost.jpg,x\nimages,y\na\x00b,z\n"
    table = _table(folder, text)
    for image, reason in ((0, "not UTF-8"), (1, "empty"), (2, "empty")):
        with pytest.raises(BrokenSample, match=reason):
            table.read_captions(image).usable(table.name(image), 0)
    for image in (3, 4, 5, 6):
        assert table.read_captions(image).usable("", 0)
        with pytest.raises(BrokenSample, match=r"t.csv:"):
            table.read_image(image)


@pytest.mark.parametrize(
    ("rows", "line"),
    [('0.jpg,"a\n1.jpg,b\n2.jpg,c\n', 4), ('0.jpg,"a\n1.jpg,"b, c"\n2.jpg,d\n', 3), ('0.jpg,"a" b\n', 2)],
)
def test_a_quote_that_is_not_closed_swallows_no_rows(folder, rows, line):
    (folder / "t.csv").write_text(f"filepath,title\n{rows}")
    with pytest.raises(
        UserError, match=rf"t\.csv is no readable CSV file \(line {line}: .*a quote inside it stands twice"
    ):
        CsvTable(str(folder / "t.csv"), Data())
