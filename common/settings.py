"""Settings of any kind: YAML into typed dataclasses, overrides on the command line, errors that name the setting."""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import yaml


class SettingsLoader(yaml.SafeLoader):
    """YAML as people write it: `1e-3` is a number (YAML 1.1 reads a string)."""


SettingsLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_settings(path: str | Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """A YAML file's mapping with `a.b=value` overrides applied (values in YAML syntax, `sources.0.path=...` in lists).

    `extends: other.yaml`, a path relative to the file, starts from another file's settings: sections are merged key by
    key, everything else (lists, too) is replaced.

    Raises:
        FileNotFoundError, ValueError: naming the file or the override.
    """
    content = _read_extended(Path(path), ())
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not key:
            raise ValueError(f"override {override!r} must have the form key=value or section.key=value")
        _assign(content, key.split("."), yaml.load(value, SettingsLoader), override)
    return content


RECIPES = Path(__file__).resolve().parents[1] / "training" / "configs"


def _read_extended(path: Path, extending: tuple[Path, ...]) -> dict[str, Any]:
    """A YAML file's mapping, laid over that of the file it extends."""
    if not path.is_file():
        raise FileNotFoundError(f"no training config at {path}; the recipes lie in {RECIPES}")
    if path.resolve() in extending:
        raise ValueError(f"{path} extends itself, by way of {[str(other) for other in extending]}")
    try:
        content = yaml.load(path.read_text(encoding="utf-8-sig"), SettingsLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a mapping of settings, got {type(content).__name__}")
    parent = content.pop("extends", None)
    if parent is None:
        return content
    if not isinstance(parent, str):
        raise ValueError(f"{path}: extends must be the path of another YAML file, got {parent!r}")
    return _merged(_read_extended(path.parent / parent, (*extending, path.resolve())), content)


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A mapping with the values of another laid over it, section by section."""
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merged(base[key], value) if both else value
    return merged


def _assign(content: Any, keys: list[str], value: Any, override: str) -> None:
    """Set one value in nested mappings and lists."""
    *path, last = keys
    for key in path:
        content = content[_place(content, key, override)] if isinstance(content, list) else content.setdefault(key, {})
        if not isinstance(content, (dict, list)):
            raise ValueError(f"override {override!r}: {key!r} is a value, not a section")
    content[_place(content, last, override) if isinstance(content, list) else last] = value


def _place(items: list, key: str, override: str) -> int:
    if not key.isdecimal() or int(key) >= len(items):
        raise ValueError(f"override {override!r}: {key!r} is no index of a list of {len(items)}")
    return int(key)


def build(kind: type, values: dict[str, Any], where: str = "") -> Any:
    """An instance of a dataclass from a mapping; `where` is its place in the file, for messages.

    Raises:
        ValueError: for unknown keys (with the nearest known name), missing keys and values of another type.
    """
    hints = typing.get_type_hints(kind)
    check_names(values, hints, where)
    required = {f.name for f in dataclasses.fields(kind) if _is_required(f)}
    if missing := sorted(required - set(values)):
        raise ValueError(f"missing settings {[where + name for name in missing]}")
    return kind(**{name: checked(hints[name], value, where + name) for name, value in values.items()})


def check_names(values: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raise `ValueError` for names that are not known, with the nearest one that is."""
    known = sorted(known)
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {where + near[0]!r}? Known are" if near else "known are"
            raise ValueError(f"unknown setting {where + str(name)!r}, {hint} {known}")


def _is_required(item: dataclasses.Field) -> bool:
    return item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING


def checked(hint: Any, value: Any, name: str) -> Any:
    """A value as its type hint wants it; raises `ValueError` naming the setting and what is accepted."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ValueError(f"{name} must be a section, got {value!r}")
        return build(hint, value, name + ".")
    if origin in (typing.Union, types.UnionType):
        return _checked_union(inner, value, name)
    if origin is Literal:
        if value not in inner:
            raise ValueError(f"{name} must be one of {inner}, got {value!r}")
        return value
    if origin is list and isinstance(value, list):
        return [checked(inner[0], item, f"{name}.{index}") for index, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {key: checked(inner[1], item, f"{name}.{key}") for key, item in value.items()}
    return _checked_plain(origin or hint, value, name)


def _checked_union(options: tuple, value: Any, name: str) -> Any:
    """The first of several types that takes the value; the last one's error if none does."""
    if value is None and type(None) in options:
        return None
    others = [option for option in options if option is not type(None)]
    for option in others[:-1]:
        try:
            return checked(option, value, name)
        except ValueError:
            continue
    return checked(others[-1], value, name)


def _checked_plain(kind: type, value: Any, name: str) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        accepted = (
            f"one of {[member.value for member in kind]}" if issubclass(kind, Enum) else f"of type {kind.__name__}"
        )
        raise ValueError(f"{name} must be {accepted}, got {value!r}")
    return value
