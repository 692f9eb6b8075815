"""YAML file + key=value overrides -> `RunConfig`, or one `UserError` that says what, where and what is allowed."""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic
import yaml
from pydantic.fields import FieldInfo

from core.config import RunConfig
from core.errors import UserError, nearest
from core.section import Section

Path_ = tuple[str, ...]


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 1e-6 is a number (PyYAML follows YAML 1.1, where it is a string), on/off and dates are
    strings.
    """


_REPLACED = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("float", "bool", "timestamp"))
_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] not in _REPLACED]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.[\d_]*([eE][-+]?\d+)?|\.\d[\d_]*([eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.inf|\.nan)$"),
    list("-+.0123456789"),
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|True|false|False)$"), list("tTfF"))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run that `path` and `key.sub=value` overrides describe, checked. Raises UserError."""
    tree, lines = read_yaml(path)
    override(tree, overrides)
    lines |= {tuple(text.partition("=")[0].split(".")): f"command line '{text}'" for text in overrides}
    return parse_config(tree, str(path), lines)


def parse_config(tree: Mapping[str, Any], source: str, lines: Mapping[Path_, str] | None = None) -> RunConfig:
    """A plain tree -> RunConfig. `lines` maps a key's path to where it is written, for the error."""
    try:
        # JSON mode: strict about types ("3" is not a number), yet lists may fill tuples.
        return RunConfig.model_validate_json(json.dumps(tree, default=str))
    except pydantic.ValidationError as error:
        problems = [_explain(e, tree, source, lines or {}) for e in error.errors()]
        raise UserError("\n".join(problems)) from None


def read_yaml(path: str | Path) -> tuple[dict[str, Any], dict[Path_, str]]:
    """The file as a plain tree, and for each key's path where it is written ("file.yaml:12"). Raises UserError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        here = sorted(str(p) for p in Path("configs").glob("*.yaml")) or ["(no *.yaml in ./configs)"]
        raise UserError(f"{path}: cannot read the config: {error.strerror}; {nearest(str(path), here)}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a config: {error.reason} at byte {error.start}; a config is UTF-8 text") from None
    try:
        node = yaml.compose(text, Loader=_Loader)
        lines = {key: f"{path}:{line}" for key, line in _lines(node, ())}
        tree = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a config is a mapping of options (name: ..., model: ...), not {type(tree).__name__}")
    return tree, lines


def dump_config(config: RunConfig) -> str:
    """The resolved config as YAML, every option written out; loading it gives an equal config."""
    return yaml.safe_dump(json.loads(config.model_dump_json()), sort_keys=False, allow_unicode=True, width=100)


def _lines(node: yaml.Node | None, prefix: Path_) -> Iterator[tuple[Path_, int]]:
    if not isinstance(node, yaml.MappingNode):
        return
    seen = set()
    for key, value in node.value:
        path = (*prefix, str(key.value))
        if path in seen:
            raise yaml.YAMLError(f"line {key.start_mark.line + 1}: '{'.'.join(path)}' is written twice")
        seen.add(path)
        yield path, key.start_mark.line + 1
        yield from _lines(value, path)


def override(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`tree` with every "key.sub=value" put into it, in place. Raises UserError.

    The value is read as YAML, or taken as it stands where the option is a text and YAML sees something else in it:
    `data.template={prompt}` is no mapping, `name=7` no number.
    """
    for text in overrides:
        _override(tree, text)
    return tree


def _override(tree: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"command line '{text}': an override is key=value, for instance learner.optimizer.lr=1e-5")
    *parents, last = path = key.split(".")
    for parent in parents:
        # `method: grpo` becomes a mapping when one of its parts is overridden.
        if parent == "method" and isinstance(tree.get(parent), str):
            tree[parent] = {"row": tree[parent]}
        child = tree.setdefault(parent, {})
        if not isinstance(child, dict):
            raise UserError(f"command line '{text}': '{parent}' is {child!r}, which has no options below it")
        tree = child
    field = _field(tuple(path))
    tree[last] = _value(value, text=field is not None and field.annotation in (str, str | None))


def _value(written: str, *, text: bool) -> Any:
    try:
        value = yaml.load(written, Loader=_Loader)
    except yaml.YAMLError:
        return written
    return written if text and not isinstance(value, str | None) else value


def _explain(error: Any, tree: Mapping[str, Any], source: str, lines: Mapping[Path_, str]) -> str:
    """One pydantic error as a sentence with place, problem and what is allowed."""
    path = tuple(str(p) for p in error["loc"])
    # A union's errors name the branch of the type after the key; cut the path at what the tree really holds.
    while len(path) > 1 and not _written(tree, path) and error["type"] not in ("missing", "extra_forbidden"):
        path = path[:-1]
    at = next((lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines), source)
    name = ".".join(path)
    if error["type"] == "extra_forbidden":
        section = section_at(path[:-1])
        return f"{at}: unknown option '{name}'; {nearest(path[-1], section.model_fields if section else [])}"
    if error["type"] == "missing":
        meaning = _meaning(path)
        return f"{at}: option '{name}' is missing{f': {meaning}' if meaning else ''}"
    if error["type"] == "value_error":
        return f"{at}: {error['ctx']['error']}"
    meaning = _meaning(path)
    problem = error["msg"][0].lower() + error["msg"][1:]
    return f"{at}: '{name}' is {error['input']!r}: {problem}{f'. {meaning}' if meaning else ''}"


def _written(tree: Any, path: Path_) -> bool:
    for key in path:
        if not isinstance(tree, Mapping) or key not in tree:
            return False
        tree = tree[key]
    return True


def section_at(path: Path_) -> type[Section] | None:
    """The section of the tree at `path`, or none where the path leads elsewhere."""
    section: Any = RunConfig
    for key in path:
        field = section.model_fields.get(key)
        kinds = [field.annotation, *typing.get_args(field.annotation)] if field else []
        section = next((k for k in kinds if isinstance(k, type) and issubclass(k, Section)), None)
        if section is None:
            return None
    return section


def _field(path: Path_) -> FieldInfo | None:
    section = section_at(path[:-1])
    return section.model_fields.get(path[-1]) if section and path else None


def _meaning(path: Path_) -> str:
    field = _field(path)
    return f"{path[-1]}: {field.description}" if field and field.description else ""
