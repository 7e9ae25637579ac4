"""From YAML and `key.sub=value` overrides to a typed Config, and back; whatever is unclear is an error."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import os
import re
import tempfile
import types
import typing
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

import yaml

from megatron_scope.config.presets import with_implied
from megatron_scope.config.schema import Config
from megatron_scope.errors import ConfigError

COMMAND_LINE = "command line"

# Text for the model, where `${x}$` is LaTeX and not a reference to the environment.
_PROSE = frozenset({"data.system_prompt", "data.prompt_template", "data.chat_template_kwargs"})
_ENVIRONMENT = re.compile(r"(\$?)\$\{([^{}]*)\}")


class _Loader(yaml.SafeLoader):
    """Safe YAML with the scalars of YAML 1.2 (5e-5 is a number; yes, 1:30 and 2026-01-31 are text)."""

    yaml_implicit_resolvers: typing.ClassVar[dict[str, Any]] = {}
    yaml_constructors: typing.ClassVar[dict[Any, Any]] = {
        tag: constructor
        for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in ("null", "bool", "int", "float", "str", "seq", "map")
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key.start_mark)
            if key.value in seen:
                problem = f"{key.value!r} is given twice in one mapping; keep one of them"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # Unquoted, the library folds Unicode's own line ends into spaces.
    style = '"' if any(end in text for end in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    return int(text, 0) if text[:2] in ("0x", "0o") else int(text, 10)


# Tag, pattern, first characters.
_SCALARS = (
    ("null", r"~|null|Null|NULL|", ("~", "n", "N", "")),
    ("bool", r"true|True|TRUE|false|False|FALSE", tuple("tTfF")),
    ("int", r"[-+]?[0-9]+|0x[0-9a-fA-F]+|0o[0-7]+", tuple("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", tuple("-+.0123456789")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", tuple("-+.")),
    ("merge", r"<<", ("<",)),
)
for _tag, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Dumper.add_representer(str, _represent_text)


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """The config of a YAML file with `section.key=value` overrides applied on top.

    `${VAR}` in a setting is the environment's VAR (not in prompt text). Raises ConfigError, in one line, for
    an unreadable file, an unknown or doubled key, a wrong type or an undefined VAR.
    """
    source = os.fspath(path)
    mapping = _top_level(_parse_yaml(_read(path), source), source)
    overridden: dict[str, str] = {}
    for override in overrides:
        overridden[_apply_override(mapping, override, source)] = COMMAND_LINE
    return _build(mapping, source, overridden)


def parse_config(mapping: Mapping[str, Any], source: str) -> Config:
    """The config of an already parsed mapping of sections; `source` names it in errors."""
    return _build(_top_level(mapping, source), source, {})


def write_config(config: Config, path: str | os.PathLike[str]) -> None:
    """Writes every setting as YAML that `load_config` reads back as an equal Config; atomic."""
    target = Path(path)
    text = "# Every setting of this run, defaults included.\n" + yaml.dump(
        _plain(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110
    )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, target)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
    except OSError as error:
        message = f"cannot write {target}: {error.strerror}; choose another run.output_dir or mend this one"
        raise ConfigError(message) from error


def _read(path: str | os.PathLike[str]) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        message = f"cannot read the config {os.fspath(path)}: {error.strerror}; give the path of a YAML file"
        raise ConfigError(message) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{os.fspath(path)} is not UTF-8 text ({error.reason}); give a YAML file"
        ) from error


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, KeyError) as error:  # the last two: `!!int x`, `!!bool x`
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}" if mark is not None and "\n" in text else source
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise ConfigError(f"{where}: not valid YAML: {problem}") from error


def _top_level(mapping: Any, source: str) -> dict[str, dict[str, Any]]:
    """A copy of the mapping of sections, with empty sections as {}."""
    if mapping is None:
        return {}
    if not isinstance(mapping, Mapping):
        _fail(source, "the config", mapping, "a mapping of sections", "write `run:` and its keys below it")
    sections = {}
    for name, section in mapping.items():
        if name not in _section_types():
            raise ConfigError(f"{source}: {name} is not a section; {_suggest_section(name)}")
        if not isinstance(section, Mapping | None):
            _fail(source, name, section, "a mapping of keys", f"write `{name}:` and its keys below it")
        sections[name] = dict(section or {})
    return sections


def _apply_override(mapping: dict[str, dict[str, Any]], override: str, source: str) -> str:
    """Sets one `section.key=value` in the mapping and returns `section.key`; a dict's own keys may follow."""
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or len(keys) < 2 or not all(keys):
        message = (
            f"{COMMAND_LINE}: {override!r} is not an override; write section.key=value, as in run.steps=10"
        )
        raise ConfigError(message)
    section, key, *below = keys
    if section not in _section_types():
        raise ConfigError(f"{COMMAND_LINE}: {section} is not a section; {_suggest_section(section)}")
    annotation = _field_types(section).get(key)
    if annotation is None:
        raise ConfigError(f"{COMMAND_LINE}: {section}.{key} is not a key; {_suggest_key(section, key)}")
    name = f"{section}.{key}"
    value = _override_value(text, annotation, override)
    target, last = mapping.setdefault(section, {}), key
    if below:
        if typing.get_origin(annotation) is not dict:
            raise ConfigError(f"{COMMAND_LINE}: {name} has no keys below it; write {name}=value")
        for step in below:
            inner = target.get(last)
            if inner is not None and not isinstance(inner, Mapping):
                _fail(source, name, inner, "a mapping", f"remove it or do not set {path.strip()}")
            target[last] = dict(inner or {})
            target, last = target[last], step
    target[last] = value
    return name


def _override_value(text: str, annotation: Any, override: str) -> Any:
    """The YAML value of an override; text settings take unquoted text as it is, {prompt} and # included."""
    text = text.strip()
    is_text = annotation is str or annotation == str | None
    if is_text and not text.startswith(("'", '"')) and text not in ("", "~", "null"):
        return text
    return _parse_yaml(text, f"{COMMAND_LINE}: {override!r}")


def _build(mapping: dict[str, dict[str, Any]], source: str, overridden: Mapping[str, str]) -> Config:
    sections = {}
    for name, values in mapping.items():
        converted = {}
        annotations = _field_types(name)
        for key, value in values.items():
            where = f"{name}.{key}"
            origin = overridden.get(where, source)
            if key not in annotations:
                raise ConfigError(f"{origin}: {where} is not a key; {_suggest_key(name, key)}")
            expanded = value if where in _PROSE else _expand(value, where, origin)
            converted[key] = _convert(expanded, annotations[key], where, origin)
        sections[name] = _section_types()[name](**converted)
    return with_implied(Config(**sections), stated=mapping.get("objective", {}))


def _section_types() -> dict[str, Any]:
    return typing.get_type_hints(Config)


def _field_types(section: str) -> dict[str, Any]:
    return typing.get_type_hints(_section_types()[section])


def _expand(value: Any, where: str, source: str) -> Any:
    """Replaces `${VAR}` in text, in lists too; `$${VAR}` stands for a literal `${VAR}`."""
    if isinstance(value, list | tuple):
        return [_expand(item, where, source) if isinstance(item, str) else item for item in value]
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        escape, name = match.groups()
        if escape:
            return match.group()[1:]
        if name not in os.environ:
            raise ConfigError(
                f"{source}: {where} refers to ${{{name}}}, which the environment does not define; "
                f"export {name}, or write $${{{name}}} for that text itself"
            )
        return os.environ[name]

    return _ENVIRONMENT.sub(replace, value)


def _convert(value: Any, annotation: Any, where: str, source: str) -> Any:
    """The value as its annotation says; only whole numbers become float, lists tuples, and text an enum."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        (annotation,) = (argument for argument in arguments if argument is not types.NoneType)
        return _convert(value, annotation, where, source)
    if value is None:
        _fail(source, where, value, "a value", "give one, or leave the key out for its default")
    if origin is tuple:
        if isinstance(value, str) and arguments[0] is str:
            value = [value]
        if not isinstance(value, list | tuple):
            _fail(source, where, value, "a list", "write it as [a, b]")
        items = enumerate(value)
        return tuple(_convert(item, arguments[0], f"{where}[{index}]", source) for index, item in items)
    if origin is dict:
        try:
            json.dumps(value)
        except (TypeError, ValueError):  # a mapping inside itself, or what a caller of parse_config put there
            _fail(
                source,
                where,
                value,
                "plain values only",
                "use text, numbers, true, false, null, lists, mappings",
            )
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            _fail(source, where, value, "a mapping with text keys", "write it as {name: value}")
        return dict(value)
    return _convert_scalar(value, annotation, where, source)


def _convert_scalar(value: Any, annotation: Any, where: str, source: str) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        allowed = [member.value for member in annotation]
        if value in allowed:
            return annotation(value)
        close = difflib.get_close_matches(str(value), allowed, 1)
        mend = f"did you mean {close[0]}?" if close else f"choose one, as in {where}={allowed[0]}"
        _fail(source, where, value, f"one of {', '.join(allowed)}", mend)
    if annotation is bool:
        if isinstance(value, bool):
            return value
        _fail(source, where, value, "true or false", "write one of the two, without quotes")
    if annotation is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        _fail(source, where, value, "a whole number", "write it in digits, without quotes, point or exponent")
    if annotation is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            with contextlib.suppress(OverflowError):
                return float(value)
        _fail(source, where, value, "a number", "write it as 0.5 or 5e-5, without quotes")
    if annotation is str:
        if isinstance(value, str):
            return value
        _fail(source, where, value, "text", "put it in quotes")
    raise TypeError(f"{where}: the schema has a type that the loader does not know: {annotation}")


def _fail(source: str, where: str, got: Any, expected: str, mend: str) -> NoReturn:
    shown = "null" if got is None else str(got).lower() if isinstance(got, bool) else repr(got)
    if len(shown) > 60:
        shown = shown[:57] + "..."
    raise ConfigError(f"{source}: {where} is {shown}: expected {expected}; {mend}")


def _suggest_section(name: Any) -> str:
    sections = list(_section_types())
    homes = [section for section in sections if name in _field_types(section)]
    if homes:
        return f"did you mean {homes[0]}.{name}?"
    close = difflib.get_close_matches(str(name), sections, 1)
    return f"did you mean {close[0]}?" if close else f"sections are {', '.join(sections)}"


def _suggest_key(section: str, key: Any) -> str:
    own = list(_field_types(section))
    close = difflib.get_close_matches(str(key), own, 1)
    if close:
        return f"did you mean {section}.{close[0]}?"
    homes = [other for other in _section_types() if key in _field_types(other)]
    if homes:
        return f"did you mean {homes[0]}.{key}?"
    return f"{section} has {', '.join(own)}"


def _plain(value: Any, where: str = "") -> Any:
    """A setting as plain YAML types, with `${` escaped where loading would expand it."""
    if dataclasses.is_dataclass(value):
        return {
            field.name: _plain(getattr(value, field.name), f"{where}.{field.name}".lstrip("."))
            for field in dataclasses.fields(value)
        }
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, tuple):
        return [_plain(item, where) for item in value]
    if isinstance(value, str) and where not in _PROSE:
        return _ENVIRONMENT.sub(lambda match: f"${match.group()}", value)
    return value
