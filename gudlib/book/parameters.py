"""Parameters of notebooks: what a cell declares, what a text means for a declared type, and how it is set in a run.

The one place where a type is judged. A text, from a command line or a YAML file, is read as its type says and not as it
looks: 0012 is twelve for an int and itself for a str, 1:30 is no int, and `no` is a word in a list[str].
"""

from __future__ import annotations

import ast
import builtins
import json
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from papermill.models import Parameter as PapermillParameter
from papermill.translators import PythonTranslator, papermill_translators
from pydantic import TypeAdapter, ValidationError
from yaml.composer import ComposerError
from yaml.nodes import MappingNode, ScalarNode

PLAIN = ("bool", "int", "float", "str", "list", "tuple", "dict")
SPECIAL = ("Literal", "Optional", "Union")
NAMES = {name: getattr(builtins, name) for name in PLAIN} | {name: getattr(typing, name) for name in SPECIAL}
WORDS = {"None": None, "null": None, "true": True, "false": False}


class _Texts(yaml.SafeLoader):
    """Loads YAML with every scalar as the text that it is, but for null and merged mappings; no name twice."""

    def compose_mapping_node(self, anchor: Any) -> MappingNode:
        node = super().compose_mapping_node(anchor)
        names = [key.value for key, _ in node.value if isinstance(key, ScalarNode)]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ComposerError(None, None, f"{twice[0]} is given twice", node.start_mark)
        return node


_Texts.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if tag.rpartition(":")[2] in ("null", "merge")]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def load(file: Path) -> dict[str, Any]:
    """The mapping of a YAML file; what the texts in it mean is up to the types of the parameters.

    Raises:
        OSError: if it can't be read.
        ValueError: if it is no YAML in UTF-8, or holds something else; it names the file.
    """
    try:
        found = yaml.load(file.read_text(encoding="utf-8-sig"), _Texts)  # a SafeLoader
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{file} is not YAML in UTF-8: {error}") from error
    if not isinstance(found, dict | None):
        raise ValueError(f"{file} holds no lines `name: value`")
    return found or {}


@dataclass(frozen=True)
class Parameter:
    """A line `name: hint = default` of the cell tagged `parameters`; hint and default as written there."""

    name: str
    hint: str
    default: str

    def __str__(self) -> str:
        return f"{self.name}: {self.hint} = {self.default}"

    @cached_property
    def _type(self) -> TypeAdapter:
        return TypeAdapter(eval(self.hint, {"__builtins__": NAMES}))

    @property
    def literal(self) -> tuple[Any, ...]:
        """The default in a tuple; empty if it is an expression that only the notebook can evaluate."""
        try:
            return (ast.literal_eval(self.default),)
        except (ValueError, SyntaxError):
            return ()

    def read(self, value: Any) -> Any:
        """The value that a text says, a text within a list or a mapping too, or a value that is of the type already.

        Raises:
            ValueError: if it is not of the declared type.
        """
        try:
            for reading, strictly in _readings(value):
                try:
                    if strictly:  # as JSON, in which a tuple is a list
                        return self._type.validate_json(json.dumps(reading), strict=True)
                    return self._type.validate_python(reading)
                except (TypeError, ValueError):  # not of the type, or not even JSON
                    pass
        except (RecursionError, yaml.YAMLError):
            pass
        shown = repr(value)
        raise ValueError(f"{shown if len(shown) < 100 else f'{shown[:90]} ...'} is not {self.hint} ({self.name})")


def _readings(value: Any) -> Iterator[tuple[Any, bool]]:
    """What a value can mean, the likelier before, and whether it must be of the type as it is."""
    yield _literals(value), True
    if all(isinstance(leaf, str | None) for leaf in _leaves(value)):
        yield value, False
    if isinstance(value, str) and not isinstance(inner := yaml.load(value, _Texts), str):
        yield from _readings(inner)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple | dict):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _leaves(each)
    else:
        yield value


def _literals(value: Any) -> Any:
    """The same with what texts say that are numbers, words or the like in Python or JSON."""
    if isinstance(value, dict):
        return {name: _literals(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_literals(each) for each in value]
    if not isinstance(value, str):
        return value
    try:
        said = WORDS[value] if value in WORDS else ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return value
    return value if isinstance(said, str) else said


def declared(source: str) -> dict[str, Parameter]:
    """The parameters that the source of a cell declares, by name.

    Raises:
        ValueError: for a line that is no `name: type = default`, for a type that a text can't give, and for a default
            that is not of its type; it gives the line.
    """
    try:
        statements = ast.parse(source).body
    except SyntaxError as error:
        raise ValueError(f"not a parameter of the form `name: type = default`: {(error.text or '').strip()}") from error
    found: dict[str, Parameter] = {}
    for line in statements:
        text = ast.get_source_segment(source, line) or ""
        if not (isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.value):
            raise ValueError(f"not a parameter of the form `name: type = default`: {text}")
        hint, default = (ast.get_source_segment(source, part) or "" for part in (line.annotation, line.value))
        found[line.target.id] = each = Parameter(line.target.id, hint, default)
        try:
            each._type  # noqa: B018 (made, or not)
        except Exception as error:  # whatever an expression that is no type raises
            raise ValueError(f"a type must be made of {', '.join([*PLAIN, 'None', *SPECIAL])}: {text}") from error
        for value in each.literal:
            try:
                each._type.validate_python(value, strict=True)
            except ValidationError:
                raise ValueError(f"the default is not of the type: {text}") from None
    return found


class Translator(PythonTranslator):
    """papermill's, for all types that can be declared."""

    @classmethod
    def translate(cls, val: Any) -> str:
        """A value as Python writes it; papermill takes tuples and keys for texts."""
        if isinstance(val, tuple):
            return f"({''.join(f'{cls.translate(each)}, ' for each in val)})"
        if isinstance(val, dict):
            return f"{{{', '.join(f'{cls.translate(key)}: {cls.translate(each)}' for key, each in val.items())}}}"
        return super().translate(val)

    @classmethod
    def inspect(cls, parameters_cell: Any) -> list[PapermillParameter]:
        """What a cell declares."""
        found = declared(parameters_cell["source"]).values()
        return [PapermillParameter(each.name, each.hint, each.default, "") for each in found]


papermill_translators.register("python", Translator)
