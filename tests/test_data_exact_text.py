"""The text that is trained on is the characters in the file, whatever the format."""

import bz2
import datetime
import decimal
import gzip
import json
import logging
import lzma
import zipfile

import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from jsonargparse import ArgumentParser
from pyarrow import parquet

from adaptrank.data import CausalLMData, ClassificationData, Source, TaskData

WORDS = [
    *("007", "012", "1.10", "2.50", "-0", "+5", "1e5", "1_000", "0x1F", "12345678901234567890123"),
    *("true", "False", "NA", "nan", "NaN", "None", "null", "inf", "", "yes", "-"),
    *("2024-03-01", "2024-03-01T00:00:00", "12:30", " padded ", "\ttab", "a,b", 'say "hi"', "'q'"),
    *("two\nlines", "CR\r\nLF", "é", "e\u0301", "\ufb01\u2028x", "\U0001f600", "\ufeffmark", "{x}"),
]
"""Texts that some reader takes for a number, a date, a null or a line end."""

TEXT_KINDS = ("csv", "tsv", "jsonl", "json", "parquet", "arrow", "saved")


def cell(text):
    return '"' + text.replace('"', '""') + '"'


def store(path, rows):
    """Write rows of texts as the ending of the path says."""
    columns = list(rows[0])
    kind = path.suffix[1:]
    if kind in ("csv", "tsv"):
        separator = {"csv": ",", "tsv": "\t"}[kind]
        cells = [columns, *([row[column] for column in columns] for row in rows)]
        lines = [separator.join(map(cell, line)) + "\n" for line in cells]
        path.write_bytes("".join(lines).encode())
    elif kind == "jsonl":
        path.write_bytes("".join(json.dumps(row) + "\n" for row in rows).encode())
    elif kind == "json":
        path.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    elif kind == "parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "arrow":
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    else:
        Dataset.from_list(rows).save_to_disk(path)
    return str(path)


def prompts_and_completions(path, **options):
    data = CausalLMData(path, validation=path, **options)
    return [(row["prompt"], row["completion"]) for row in data.rows("train")]


def problem(make):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        make()
    said = str(caught.value)
    assert "Traceback" not in said
    assert "\n" not in said
    return said


@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_every_kind_keeps_every_character(kind, tmp_path):
    rows = [{"prompt": f"q{i}", "completion": word} for i, word in enumerate(WORDS)]
    path = store(tmp_path / f"some.{kind}", rows)
    expected = [(row["prompt"], row["completion"]) for row in rows]
    assert prompts_and_completions(path) == expected
    template = prompts_and_completions(path, prompt="<{completion}>", completion="{prompt}")
    assert template == [(f"<{word}>", f"q{i}") for i, word in enumerate(WORDS)]


@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_labels_are_characters(kind, tmp_path):
    labels = ["01", "1", "1", "NA", "true"]
    rows = [{"text": f"0{i}", "label": label} for i, label in enumerate(labels)]
    path = store(tmp_path / f"some.{kind}", rows)
    data = ClassificationData(path, validation=path)
    assert [row["text"] for row in data.rows("train")] == ["00", "01", "02", "03", "04"]
    assert data.class_names == ["01", "1", "NA", "true"]
    assert [row["label"] for row in data.rows("train")] == [0, 1, 1, 2, 3]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_integers_as_labels_are_sorted_by_value_and_are_indices_of_given_classes(kind, tmp_path):
    rows = [{"text": "t", "label": label} for label in ("10", "2", "0")]
    path = store(tmp_path / f"some.{kind}", rows)
    data = ClassificationData(path, validation=path)
    data.rows("train")
    assert data.class_names == ["0", "2", "10"]
    given = ClassificationData(path, validation=path, classes=list("abcdefghijk"))
    assert [row["label"] for row in given.rows("train")] == [10, 2, 0]
    named = ClassificationData(path, validation=path, classes=["10", "2", "0"])
    assert [row["label"] for row in named.rows("train")] == [0, 1, 2]


def test_a_number_in_one_file_and_a_text_in_another_are_one_class(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x", "label": 1}\n{"text": "y", "label": "2"}\n')
    (tmp_path / "b.csv").write_text("text,label\nz,1\n")
    sources = [Source(str(tmp_path / "a.jsonl")), Source(str(tmp_path / "b.csv"))]
    data = ClassificationData(sources, validation=sources)
    assert [row["label"] for row in data.rows("train")] == [0, 1, 0]


def test_numbers_without_quotes_keep_their_characters(tmp_path):
    values = ["1.10", "1e5", "-0.0", "true", "false", "12345678901234567890123", "0"]
    lines = "".join(f'{{"prompt": {value}, "completion": "x"}}\n' for value in values)
    (tmp_path / "a.jsonl").write_text(lines)
    assert [p for p, _ in prompts_and_completions(str(tmp_path / "a.jsonl"))] == values
    (tmp_path / "b.json").write_text("[" + ",\n".join(lines.splitlines()) + "]")
    assert [p for p, _ in prompts_and_completions(str(tmp_path / "b.json"))] == values


def test_typed_columns_become_the_text_of_their_value(tmp_path):
    moment = datetime.datetime(2024, 3, 1, 10)
    columns = {
        "int": pa.array([7], pa.int8()),
        "float": pa.array([0.1], pa.float32()),
        "double": pa.array([0.1], pa.float64()),
        "decimal": pa.array([decimal.Decimal("2.50")], pa.decimal128(5, 2)),
        "date": pa.array([moment.date()]),
        "moment": pa.array([moment], pa.timestamp("us")),
        "nanoseconds": pa.array([moment], pa.timestamp("ns")),
        "truth": pa.array([True]),
        "category": pa.array(["007"]).dictionary_encode(),
        "nested": pa.array([{"list": [1.5]}], pa.struct({"list": pa.list_(pa.float32())})),
        "bytes": pa.array([b"raw"]),
    }
    names = list(columns)
    for path in (tmp_path / "a.parquet", tmp_path / "a.arrow", tmp_path / "saved"):
        table = pa.table(columns)
        if path.suffix == ".parquet":
            parquet.write_table(table, path)
        elif path.suffix == ".arrow":
            with pa.ipc.new_stream(path, table.schema) as writer:
                writer.write_table(table)
        else:
            Dataset(table).save_to_disk(path)
        template = "|".join(f"{{{name}}}" for name in names[:9]) + "|{nested[list][0]}"
        [(prompt, completion)] = prompts_and_completions(
            str(path), prompt=template, completion="int"
        )
        assert prompt.split("|") == [
            *("7", "0.1", "0.1", "2.50", "2024-03-01", "2024-03-01 10:00:00"),
            *("2024-03-01 10:00:00", "true", "007", "1.5"),
        ]
        assert completion == "7"
        said = problem(
            lambda at=path: prompts_and_completions(str(at), prompt="bytes", completion="int")
        )
        assert "values of type binary in column 'bytes', which are no text" in said


def test_a_class_label_is_an_index_of_its_own_names(tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["1", "0"])})
    data = Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features)
    data.save_to_disk(tmp_path / "saved")
    data.to_parquet(tmp_path / "a.parquet")
    for path in (str(tmp_path / "saved"), str(tmp_path / "a.parquet")):
        task = ClassificationData(path, validation=path)
        assert [row["label"] for row in task.rows("train")] == [0, 1]
        assert task.class_names == ["1", "0"]
        turned = ClassificationData(path, validation=path, classes=["0", "1"])
        assert [row["label"] for row in turned.rows("train")] == [1, 0]
        renamed = ClassificationData(path, validation=path, classes=["no", "yes"])
        assert [row["label"] for row in renamed.rows("train")] == [0, 1]


def test_labels_that_spell_fractions_are_names_with_a_warning(tmp_path, caplog):
    (tmp_path / "a.csv").write_text("text,label\nx,1.10\ny,1.1\n")
    data = ClassificationData(str(tmp_path / "a.csv"), validation=str(tmp_path / "a.csv"))
    data.rows("train")
    assert data.class_names == ["1.1", "1.10"]
    assert "Set `regression: true`" in caplog.text
    scores = ClassificationData(str(tmp_path / "a.csv"), str(tmp_path / "a.csv"), regression=True)
    assert [row["label"] for row in scores.rows("train")] == [1.1, 1.1]


@pytest.mark.parametrize("label", ["", "1_000", "1,5", "NA", "٣"])
def test_a_regression_refuses_a_text_that_is_no_decimal_number(label, tmp_path):
    path = store(tmp_path / "a.csv", [{"text": "x", "label": label}])
    said = problem(lambda: ClassificationData(path, path, regression=True).rows("train"))
    assert f"Row 0 of {path!r}: label {label!r} is no number" in said


def test_an_empty_label_names_no_class(tmp_path):
    path = store(tmp_path / "a.csv", [{"text": "x", "label": ""}])
    assert "label '' is no class" in problem(lambda: ClassificationData(path, path).rows("train"))


# ---- null


ALPACA = [
    {"instruction": "Add", "input": "1 2", "output": "3"},
    {"instruction": "Hi", "input": None, "output": "hi"},
    {"instruction": "Bye", "output": "x"},
]
TEMPLATES = {"prompt": "{instruction}\n{input}:", "completion": " {output}"}


def test_a_null_in_a_template_is_refused_with_its_row_or_empty(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ALPACA))
    said = problem(lambda: prompts_and_completions(str(path), **TEMPLATES))
    assert f"Row 1 of {str(path)!r} has no 'prompt'" in said
    assert f"'input' is null in line 2 of {str(path)!r}" in said
    assert "`null_is_empty: true`" in said
    expected = [("Add\n1 2:", " 3"), ("Hi\n:", " hi"), ("Bye\n:", " x")]
    assert prompts_and_completions(str(path), null_is_empty=True, **TEMPLATES) == expected
    source = Source(str(path), null_is_empty=True)
    data = CausalLMData([source], [source], **TEMPLATES)
    assert [(row["prompt"], row["completion"]) for row in data.rows("train")] == expected
    strict = Source(str(path), null_is_empty=False)
    problem(lambda: CausalLMData([strict], null_is_empty=True, **TEMPLATES).rows("train"))


def test_null_is_empty_stands_in_yaml(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": null, "label": "a"}\n{"text": "x", "label": "b"}\n')
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--data", type=TaskData)
    options = f"{{sources: {path}, validation: {path}, null_is_empty: true}}"
    config = parser.parse_string(f"data: {{class_path: ClassificationData, init_args: {options}}}")
    data = parser.instantiate(config).data
    assert [row["text"] for row in data.rows("train")] == ["", "x"]


def test_a_label_is_never_null(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x", "label": null}\n')
    make = ClassificationData(str(path), str(path), null_is_empty=True)
    assert "has no 'label' (it is null in line 1" in problem(lambda: make.rows("train"))


def test_a_row_without_completion_and_without_choices_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"prompt": "q", "choices": ["a", "b"], "label": 1}\n{"prompt": "r", "label": 0}\n'
    )
    said = problem(lambda: prompts_and_completions(str(path)))
    assert "Row 1 of" in said
    assert "no 'completion'" in said


def test_empty_completions_are_counted(tmp_path, caplog):
    path = store(tmp_path / "a.csv", [{"prompt": "a", "completion": ""}])
    with caplog.at_level(logging.WARNING, "adaptrank"):
        prompts_and_completions(path)
    assert f"1 of 1 completions of {path!r} are empty." in caplog.text


# ---- templates


def rows_file(tmp_path, **columns):
    return store(tmp_path / "row.jsonl", [{"prompt": "p", "completion": "c", **columns}])


def test_a_format_that_asks_for_a_number_gets_one(tmp_path):
    path = rows_file(tmp_path, score="1.256", n="7")
    [(prompt, _)] = prompts_and_completions(path, prompt="{score:.2f} {n:03d} {n:>3}|{prompt:4}|")
    assert prompt == "1.26 007   7|p   |"
    said = problem(lambda: prompts_and_completions(path, prompt="{completion:.2f}!"))
    assert "the format '.2f' asks for a number, and 'c' is none" in said


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{nested}", "an object is no text"),
        ("{nested} ", "an object is no text"),
        ("{list}", "a list is no text"),
        ("{prompt[0]}", "reaches inside of 'p'"),
        ("{nested.a}", "reaches inside of"),
        ("{list[a]}", "a list has numbers from 0"),
        ("{nested[b]}", "has no 'prompt'"),
        ("{list[9]}", "has no 'prompt'"),
        ("{}", "no column ''"),
        ("{absent}", "no column 'absent'"),
        ("{prompt:{absent}}", "no column 'absent'"),
        ("{prompt", "no format string"),
    ],
)
def test_templates_that_do_not_fit_are_refused_in_one_sentence(template, says, tmp_path):
    path = rows_file(tmp_path, nested={"a": "x"}, list=["y"])
    assert says in problem(lambda: prompts_and_completions(path, prompt=template))


def test_columns_of_any_name(tmp_path):
    names = ["my col", "a.b", "c[0]", "0", "{braces}"]
    row = {name: f"<{name}>" for name in names}
    path = rows_file(tmp_path, **row)
    for name in names:
        assert prompts_and_completions(path, prompt=name)[0][0] == f"<{name}>"
    [(prompt, _)] = prompts_and_completions(path, prompt="{my col}{a.b}{0}.")
    assert prompt == "<my col><a.b><0>."


def test_messages_and_choices_that_are_none_are_refused(tmp_path):
    for columns, says in (
        ({"messages": "hi"}, "messages is no list of turns"),
        ({"messages": [{"content": "x"}]}, "turn 0 of messages has no role"),
        (
            {"messages": [{"role": "user", "content": None}]},
            "content of turn 0 of messages is null",
        ),
        ({"choices": "yes", "label": 0}, "choices is 'yes', and not a list"),
        ({"choices": ["a", None], "label": 0}, "null is no text"),
    ):
        path = tmp_path / "a.jsonl"
        path.write_text(json.dumps({"prompt": "p", **columns}) + "\n")
        assert says in problem(lambda at=path: CausalLMData(str(at), str(at)).rows("train"))


def test_messages_keep_the_characters_of_their_content_and_the_json_of_the_rest(tmp_path):
    path = tmp_path / "a.jsonl"
    call = {"role": "assistant", "content": None, "tool_calls": [{"arguments": {"x": 1.5}}]}
    row = {"messages": [{"role": "user", "content": "01"}, call]}
    path.write_text(json.dumps(row).replace('"01"', "1.10") + "\n")
    [read] = CausalLMData(str(path), str(path)).rows("train")
    assert read["messages"] == [
        {"role": "user", "content": "1.10"},
        {"role": "assistant", "tool_calls": [{"arguments": {"x": 1.5}}], "content": ""},
    ]


# ---- files that cannot be read


PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256))
GOOD = b'{"prompt": "p", "completion": "c"}\n'
UNREADABLE = {
    "empty.csv": (b"", "No rows come from"),
    "empty.jsonl": (b"", "No rows come from"),
    "blank.jsonl": (b"\n \n", "No rows come from"),
    "list.json": (b"[]", "No rows come from"),
    "header.csv": (b"prompt,completion\n", "No rows come from"),
    "empty.parquet": (b"", "cannot be read as parquet"),
    "empty.arrow": (b"", "cannot be read as arrow"),
    "image.csv": (PNG, "it is an image"),
    "image.jsonl": (PNG, "it is an image"),
    "image.parquet": (PNG, "cannot be read as parquet"),
    "image.arrow": (PNG, "cannot be read as arrow"),
    "utf16.csv": ("prompt,completion\na,b\n".encode("utf-16"), "it is UTF-16"),
    "utf16le.csv": ("prompt,completion\na,b\n".encode("utf-16-le"), "a zero byte is no text"),
    "latin.csv": ("prompt,completion\na,b\né,c\n".encode("latin-1"), "line 3, cannot be read"),
    "latin.jsonl": (GOOD + '{"prompt": "é"}\n'.encode("latin-1"), "line 2, cannot be read"),
    "short.csv": (b"prompt,completion\na,b\nc\n", "line 3, cannot be read as csv: it has 1 cells"),
    "long.csv": (b"prompt,completion\na,b,c\n", "line 2, cannot be read as csv: it has 3 cells"),
    "open.csv": (b'prompt,completion\na,b\n"c,d\ne,f\n', "line 3, cannot be read as csv: a quote"),
    "quote.csv": (b'prompt,completion\n"a"b,c\n', "line 2, cannot be read as csv: text follows"),
    "lost.tsv": (
        b'prompt\tcompletion\n"I like\ta\nplain\tb\nhe said so"\tc\n',
        "line 2, cannot be read as tsv: a quote opens a cell that ends in line 4, with tabs in it",
    ),
    "mac.csv": (b"prompt,completion\ra,b\r", "its lines end in CR alone"),
    "twice.csv": (b"prompt,prompt\na,b\n", "two columns are named 'prompt'"),
    "broken.jsonl": (GOOD + b'{"prompt": \n', "line 2, cannot be read as json"),
    "two.jsonl": (GOOD + GOOD.strip() + GOOD, "line 2, cannot be read as json: Extra data"),
    "array.jsonl": (GOOD + b"[1]\n", "line 2, cannot be read as json: '[1]' is no object"),
    "number.jsonl": (b"3\n", "line 1, cannot be read as json: '3' is no object"),
    "numbers.json": (b"[\n1]\n", "line 2, cannot be read as json: '1' is no object"),
    "open.json": (b"[\n" + GOOD, "cannot be read as json: Expecting ',' or ']'"),
    "comma.json": (b"[" + GOOD + b",]", "cannot be read as json"),
    "after.json": (b"[" + GOOD + b"] x", "something follows the list"),
    "key.jsonl": (b'{"prompt": "a", "prompt": "b"}\n', "it has two values for 'prompt'"),
    "half.jsonl": (b'{"prompt": "\\ud800"}\n', "half of a character"),
    "deep.jsonl": (b'{"a": ' + b"[" * 100_000 + b"\n", "cannot be read as json"),
    "cut.csv.gz": (gzip.compress(b"prompt,completion\na,b\n" * 999)[:-20], "damaged or cut off"),
    "cut.jsonl.bz2": (bz2.compress(GOOD * 999)[:-20], "damaged or cut off"),
    "cut.jsonl.xz": (lzma.compress(GOOD * 999)[:-20], "damaged or cut off"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_an_unreadable_file_is_one_sentence(name, tmp_path):
    content, says = UNREADABLE[name]
    path = tmp_path / name
    path.write_bytes(content)
    said = problem(lambda: prompts_and_completions(str(path)))
    assert says in said
    assert repr(str(path)) in said


def test_a_zip_and_a_cut_parquet_file_are_one_sentence(tmp_path):
    archive = tmp_path / "a.csv"
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr("b.csv", "prompt,completion\na,b\n")
    assert "it is a zip archive" in problem(lambda: prompts_and_completions(str(archive)))
    whole = store(tmp_path / "a.parquet", [{"prompt": "p", "completion": "c"}])
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(content[: len(content) // 2])
    said = problem(lambda: prompts_and_completions(whole))
    assert "cannot be read as parquet: it is damaged, cut off or of another kind" in said
    (tmp_path / "b.zip").write_bytes(archive.read_bytes())
    said = problem(lambda: prompts_and_completions(str(tmp_path / "b.zip")))
    assert "holds ['.zip'] files" in said


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_files_are_unpacked_whatever_their_name(pack, tmp_path):
    for name in ("a.jsonl.gz", "b.jsonl"):
        (tmp_path / name).write_bytes(pack(GOOD))
        assert prompts_and_completions(str(tmp_path / name)) == [("p", "c")]
    store(tmp_path / "c.parquet", [{"prompt": "p", "completion": "c"}])
    (tmp_path / "d.parquet.gz").write_bytes(pack((tmp_path / "c.parquet").read_bytes()))
    assert prompts_and_completions(str(tmp_path / "d.parquet.gz")) == [("p", "c")]


def test_a_byte_order_mark_is_no_text(tmp_path):
    for name, content in (
        ("a.csv", b"prompt,completion\np,c\n"),
        ("b.csv", b'"prompt",completion\r\np,c\r\n'),
        ("c.jsonl", GOOD),
        ("d.json", b"[" + GOOD + b"]"),
    ):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content)
        assert prompts_and_completions(str(tmp_path / name)) == [("p", "c")]


def test_a_file_that_changes_is_read_anew(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD)
    assert len(prompts_and_completions(str(path))) == 1
    path.write_bytes(GOOD * 3)
    assert len(prompts_and_completions(str(path))) == 3


# ---- paths


def test_a_name_with_brackets_is_a_name(tmp_path):
    folder = tmp_path / "data[v2]"
    folder.mkdir()
    (tmp_path / "datav").mkdir()
    (folder / "train[1].jsonl").write_bytes(GOOD)
    (folder / "train1.jsonl").write_bytes(GOOD * 5)
    assert len(prompts_and_completions(str(folder / "train[1].jsonl"))) == 1
    assert len(prompts_and_completions(str(folder / "train[01].jsonl"))) == 5
    assert len(prompts_and_completions(str(folder / "*.jsonl"))) == 6
    assert len(prompts_and_completions(str(folder))) == 6


def test_files_of_one_source_may_have_different_columns(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,completion,note\n1,01,x\n")
    (tmp_path / "b.csv").write_text("completion,prompt\n02,2\n")
    assert prompts_and_completions(str(tmp_path / "*.csv")) == [("1", "01"), ("2", "02")]
    said = problem(lambda: prompts_and_completions(str(tmp_path / "*.csv"), prompt="{note}"))
    assert f"Row 1 of {str(tmp_path / '*.csv')!r}" in said
    assert f"line 2 of {str(tmp_path / 'b.csv')!r}" in said


def test_a_tab_separated_file_among_others_is_told_by_its_own_name(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,completion\n1\t,01\n")
    (tmp_path / "b.tsv").write_text("prompt\tcompletion\n2,\t02\n")
    said = problem(lambda: prompts_and_completions(str(tmp_path / "*.*sv")))
    assert "holds ['csv', 'tsv'] files" in said


def test_folders_without_data(tmp_path):
    (tmp_path / "train.csv").mkdir()
    (tmp_path / "README.txt").write_text("about")
    (tmp_path / ".train.jsonl").write_bytes(GOOD)
    assert "has no data file" in problem(lambda: prompts_and_completions(str(tmp_path)))
    assert "has no data file" in problem(
        lambda: prompts_and_completions(str(tmp_path / "train.csv"))
    )


def test_plain_lines(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b" 01 \r\n\r\nNA\n")
    rows = CausalLMData(str(path), predict=str(path), prompt="text").rows("predict")
    assert [row["prompt"] for row in rows] == [" 01 ", "NA"]


def test_slices_take_rows_of_all_files(tmp_path):
    for k in range(3):
        rows = [{"prompt": f"{k}{i}", "completion": "c"} for i in range(10)]
        store(tmp_path / f"part{k}.jsonl", rows)
    pattern = str(tmp_path / "part*.jsonl")

    def prompts(split):
        source = Source(pattern, split=split)
        return [row["prompt"] for row in CausalLMData([source], [source]).rows("train")]

    assert prompts("train[:10%]") == ["00", "01", "02"]
    assert prompts("train[9:12]") == ["09", "10", "11"]
    assert prompts("train[-1:]+train[:1]") == ["29", "00"]
    assert "No rows come from" in problem(lambda: prompts("train[x]"))


# ---- folders written by save_to_disk


def test_saved_data_sets_load(tmp_path):
    rows = [{"prompt": f"0{i}", "completion": "2.50"} for i in range(10)]
    one = Dataset.from_list(rows)
    one.save_to_disk(tmp_path / "one", num_shards=2)
    path = str(tmp_path / "one")
    assert prompts_and_completions(path) == [(row["prompt"], "2.50") for row in rows]
    held = CausalLMData(path, val_fraction=0.2)
    assert [len(held.rows(split)) for split in ("train", "val")] == [8, 2]
    part = Source(path, split="train[:20%]")
    assert len(CausalLMData([part], [part]).rows("train")) == 2
    splits = DatasetDict({"train": one, "dev": one.select([3]), "extra": one.select([1, 2])})
    splits.save_to_disk(tmp_path / "many")
    data = CausalLMData(str(tmp_path / "many"))
    assert [len(data.rows(split)) for split in ("train", "val")] == [10, 1]
    extra = Source(str(tmp_path / "many"), split="extra")
    assert len(CausalLMData([extra], [extra]).rows("train")) == 2
    absent = Source(str(tmp_path / "many"), split="absent")
    said = problem(lambda: CausalLMData([absent], [absent]).rows("train"))
    assert "has no 'absent' split, only ['train', 'dev', 'extra']" in said


def test_a_damaged_saved_data_set_is_one_sentence(tmp_path):
    Dataset.from_list([{"prompt": "p", "completion": "c"}]).save_to_disk(tmp_path / "one")
    path = str(tmp_path / "one")
    [file] = (tmp_path / "one").glob("*.arrow")
    file.write_bytes(b"nothing")
    assert "cannot be read as a saved data set" in problem(lambda: prompts_and_completions(path))
    (tmp_path / "one" / "state.json").write_text("{")
    assert "cannot be read as a saved data set" in problem(lambda: prompts_and_completions(path))


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_text_files_of_the_hub_are_read_exactly(kind, tmp_path, monkeypatch, caplog):
    """A folder stands for a data set on the Hub."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_UPDATE_DOWNLOAD_COUNTS", False)
    monkeypatch.setattr("adaptrank.data.files.is_local", lambda path: False)
    monkeypatch.setattr("adaptrank.data.mixing.is_file", lambda path: False)
    rows = [{"prompt": f"0{i}", "completion": "2.50"} for i in range(3)]
    (tmp_path / "films").mkdir()
    store(tmp_path / f"films/train.{kind}", rows)
    store(tmp_path / f"films/validation.{kind}", rows[:1])
    data = CausalLMData(str(tmp_path / "films"))
    read = [(row["prompt"], row["completion"]) for row in data.rows("train")]
    assert read == [("00", "2.50"), ("01", "2.50"), ("02", "2.50")]
    assert [row["prompt"] for row in data.rows("val")] == ["00"]
    part = Source(str(tmp_path / "films"), split="train[1:]")
    assert [row["prompt"] for row in CausalLMData([part], [part]).rows("train")] == ["01", "02"]
    assert not caplog.text


def test_a_template_without_a_gap_is_the_whole_name_of_a_column(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n')
    said = problem(lambda: prompts_and_completions(str(path), completion="answer.text"))
    assert "has no column 'answer.text'" in said


def test_no_pair_is_no_column_without_a_name(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(",text,label\n0,x,a\n1,y,b\n")
    data = ClassificationData([Source(str(path), text_pair="")], validation=str(path))
    assert [row["text_pair"] for row in data.rows("train")] == ["", ""]


@pytest.mark.parametrize(
    ("value", "template", "text"),
    [
        ("7", "{n:03}", "007"),
        ('"7"', "{n:03}", "007"),
        ("0.12567", "{n:.3}", "0.126"),
        ("1e5", "{n:>5}", "  1e5"),
        ('"abc"', "{n:>5}", "  abc"),
        ("1234.5", "{n:,.2f}", "1,234.50"),
    ],
)
def test_formats_of_numbers(tmp_path, value, template, text):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"n": {value}, "completion": "c"}}\n')
    ((prompt, _),) = prompts_and_completions(str(path), prompt=template)
    assert prompt == text


def test_a_fraction_is_no_whole_number(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"n": "7.9", "completion": "c"}\n')
    said = problem(lambda: prompts_and_completions(str(path), prompt="{n:d}"))
    assert "asks for a whole number, and '7.9' is none" in said


def test_declared_classes_in_another_order_are_never_counted(tmp_path):
    def part(name, names):
        features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
        Dataset.from_dict({"text": ["x", "y"], "label": [0, 1]}, features).to_parquet(
            tmp_path / name
        )
        return str(tmp_path / name)

    train = part("train.parquet", ["sports", "world"])
    other = part("other.parquet", ["world", "sports", "business"])
    data = ClassificationData(train, validation=other)
    said = problem(lambda: (data.rows("train"), data.rows("val")))
    assert "'world' has another number" in said
    (tmp_path / "both").mkdir()
    part("both/a.parquet", ["neg", "pos"])
    part("both/b.parquet", ["pos", "neg"])
    said = problem(lambda: ClassificationData(str(tmp_path / "both" / "*.parquet")).rows("train"))
    assert "declare different classes in 'label'" in said


def test_an_empty_object_is_a_row_without_a_prompt(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("{}\n")
    assert "has no column 'prompt'" in problem(lambda: prompts_and_completions(str(path)))
