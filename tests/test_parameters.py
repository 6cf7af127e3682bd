"""Parameters: which lines declare one, and what a text or a value means for a declared type."""

import math
from typing import Any

import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st
from papermill.parameterize import parameterize_notebook

from gudlib.book.parameters import declared, load


def read(hint: str, value: Any) -> Any:
    return declared(f"value: {hint} = f()")["value"].read(value)


@pytest.mark.parametrize(
    ("hint", "text", "meant"),
    [
        ("int", "0012", 12),
        ("int", "0x10", 16),
        ("float", "1e-2", 0.01),
        ("float", "3", 3.0),
        ("float", "inf", math.inf),
        ("str", "007", "007"),
        ("str", "no", "no"),
        ("str", "1:30", "1:30"),
        ("str", "'x'", "'x'"),
        ("str", "a: [b", "a: [b"),
        ("str", "{1, 2}", "{1, 2}"),
        ("str", "b'x'", "b'x'"),
        ("str", "(" * 2000, "(" * 2000),
        ("bool", "no", False),
        ("bool", "True", True),
        ("int | None", "3", 3),
        ("int | None", "None", None),
        ("Optional[str]", "null", None),
        ("Union[int, str]", "3", 3),
        ("Union[int, str]", "three", "three"),
        ("list[str]", "[on, off, 1, 'x']", ["on", "off", "1", "x"]),
        ("list[float]", "[1, 2e-1]", [1.0, 0.2]),
        ("list[int | None]", "[1, null]", [1, None]),
        ("list[float | None]", "[null, inf]", [None, math.inf]),
        ("list[str | None]", "[null, 5]", [None, "5"]),
        ("dict[str, str | None]", "{a: null, b: 7}", {"a": None, "b": "7"}),
        ("list", "[1, a]", [1, "a"]),
        ("tuple[int, int]", "[3, 4]", (3, 4)),
        ("tuple[int, ...]", "(3, 4, 5)", (3, 4, 5)),
        ("dict[str, float]", "{a: 1}", {"a": 1.0}),
        ("dict[int, list[str]]", "{1: [yes]}", {1: ["yes"]}),
        ('Literal["a", "b"]', "b", "b"),
        ("Literal[16, 32]", "32", 32),
    ],
)
def test_a_text_is_read_as_its_type_says(hint, text, meant):
    found = read(hint, text)
    assert found == meant and type(found) is type(meant)


@pytest.mark.parametrize("text", ["[on, 007]", "{a: 1e-2}", "'null'"])
def test_a_file_is_read_as_its_types_say(tmp_path, text):
    (tmp_path / "a.yaml").write_text(f"value: {text}\nnothing: null")
    found = load(tmp_path / "a.yaml")
    hint, meant = {"[": ("list[str]", ["on", "007"]), "{": ("dict[str, float]", {"a": 0.01}), "'": ("str", "null")}[
        text[0]
    ]
    assert read(hint, found["value"]) == meant and found["nothing"] is None


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"a: \xe9", "a.yaml is not YAML in UTF-8: .*can't decode"),
        (b"a: [1", "a.yaml is not YAML in UTF-8"),
        (b"a: 1\nb: 2\na: 3", "a.yaml is not YAML in UTF-8: a is given twice"),
        (b"- a", "a.yaml holds no lines `name: value`"),
        (b"a", "a.yaml holds no lines `name: value`"),
        (b"a: " + b"[" * 3000, "a.yaml is not YAML in UTF-8"),
    ],
)
def test_a_file_that_is_none_is_named(tmp_path, content, complaint):
    (tmp_path / "a.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=complaint):
        load(tmp_path / "a.yaml")


def test_mappings_may_be_merged(tmp_path):
    (tmp_path / "a.yaml").write_text("b: &b {k: 1}\nl: [&x {<<: *b, k: 2}]\ny: {<<: *x}\n")
    assert load(tmp_path / "a.yaml")["y"] == {"k": "2"}


def test_an_empty_file_sets_nothing(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"\xef\xbb\xbf# none\n")  # with a byte order mark
    assert load(tmp_path / "a.yaml") == {}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("hint", "value"),
    [
        ("int", "1:30"),
        ("int", "3.5"),
        ("int", "true"),
        ("int", ""),
        ("int", True),
        ("int", 3.5),
        ("float", True),
        ("float", None),
        ("str", 7),
        ("bool", 1),
        ("bool", "2"),
        ("list[float]", "3"),
        ("list[float]", "[1, true]"),
        ("list[float]", "[1, a]"),
        ("list[str]", [7, "a"]),
        ("tuple[int, int]", "[1, 2, 3]"),
        ("dict[str, float]", "{a: b}"),
        ('Literal["a", "b"]', "c"),
        ("int | None", "nothing"),
        ("list[float]", "[" * 2000 + "]" * 2000),
    ],
)
def test_what_is_not_of_the_type_is_refused(hint, value):
    with pytest.raises(ValueError, match=r"is not .* \(value\)$") as refused:
        read(hint, value)
    assert hint in str(refused.value) and repr(value)[:50] in str(refused.value)


def test_lines_declare_a_name_a_type_and_a_default():
    found = declared(
        "a: int = 2  # how many\n\n# two\nb: tuple[int,\n  int] = (1,\n  2)\nc: float = 2 ** 0.5\nd: None = None"
    )
    assert [str(each) for each in found.values()] == [
        "a: int = 2",
        "b: tuple[int,\n  int] = (1,\n  2)",
        "c: float = 2 ** 0.5",
        "d: None = None",
    ]
    assert [each.literal for each in found.values()] == [(2,), ((1, 2),), (), (None,)]
    assert declared("# none") == {}


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("steps = 2", "not a parameter of the form"),
        ("steps: int = other = 2", "not a parameter of the form"),
        ("steps: int", "not a parameter of the form"),
        ("x.steps: int = 2", "not a parameter of the form"),
        ("import os", "not a parameter of the form"),
        ("steps: np.ndarray = 2", "a type must be made of bool, int"),
        ("steps: Path = 2", "a type must be made of bool, int"),
        ("steps: 3 = 3", "a type must be made of bool, int"),
        ("steps: int = 2.5", "the default is not of the type"),
        ("name: str = None", "the default is not of the type"),
        ("loud: bool = 1", "the default is not of the type"),
    ],
)
def test_a_line_that_declares_none_is_named(line, complaint):
    with pytest.raises(ValueError, match=complaint) as refused:
        declared(f"seed: int = 0\n{line}\nlast: int = 1")
    assert str(refused.value).endswith(f": {line}")


leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text(max_size=3) | st.integers(), inner)
    ),
    max_leaves=6,
)


@given(value=values)
def test_a_run_gives_a_notebook_the_very_value(value):
    """papermill alone makes texts of tuples and of keys."""
    cell = nbformat.v4.new_code_cell("value: int = 1", metadata={"tags": ["parameters"]})
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata={"papermill": {}})
    made = parameterize_notebook(notebook, {"value": value}, kernel_name="python3", language="python")
    told: dict[str, Any] = {}
    exec(made.cells[1].source, told)
    assert told["value"] == value and repr(told["value"]) == repr(value)
