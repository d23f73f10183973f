"""YAML read strictly: plain mappings, lists and finite scalars, and nothing else.

No tags, no anchors or aliases, no duplicate keys, no NaN or overflowing numbers; `2e-4` is a number. Every refusal
names file and line.
"""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

from acdit.errors import ConfigError

_FLOAT = re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?")
_MAX_YAML_BYTES = 1 << 20


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader without tags, aliases, duplicate keys and non-finite numbers, and with `2e-4` a number."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise self._refusal("an alias (*name)", "values written out")
        event = self.peek_event()
        if getattr(event, "tag", None) not in (None, "!") or getattr(event, "anchor", None):
            raise self._refusal("a tag or an anchor", "plain values")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise ConfigError(_place(key_node), found=f"the key {key!r}", expected="a name")
            if key in seen:
                raise ConfigError(_place(key_node), found=f"the key {key!r} twice", expected="each key once")
            seen.add(key)
        return super().construct_mapping(node, deep)

    def _refusal(self, found: str, expected: str) -> ConfigError:
        return ConfigError(_place(self.peek_event()), found=found, expected=expected)


def _number(loader: Any, node: Any) -> float:
    value = float(node.value.replace("_", ""))
    if not math.isfinite(value):
        raise ConfigError(_place(node), found=node.value, expected="a finite number")
    return value


def _not_a_number(loader: Any, node: Any) -> float:
    raise ConfigError(_place(node), found=node.value, expected="a finite number")


def _place(node: Any) -> str:
    mark = node.start_mark
    return f"{mark.name}, line {mark.line + 1}"


# YAML 1.1 reads `2e-4` as text, `010` as eight and `1:30` as ninety: numbers are plain decimals here, dates are text.
_OWN = ("tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag not in _OWN]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][\d_]*)$"), list("-+0123456789")
)
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(rf"^(?:{_FLOAT.pattern}|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"),
    list("-+0123456789."),
)
_StrictLoader.add_constructor(
    "tag:yaml.org,2002:float",
    lambda loader, node: (_not_a_number if "n" in node.value.lower() else _number)(loader, node),
)


def read_yaml(text: str, name: str) -> Any:
    """Parse one YAML document strictly.

    Raises:
        ConfigError: anything but plain mappings, lists and finite scalars, with file and line.
    """
    if len(text.encode(errors="surrogatepass")) > _MAX_YAML_BYTES:  # a shell's stray bytes arrive as surrogates
        raise ConfigError(name, found=f"{len(text)} characters", expected=f"at most {_MAX_YAML_BYTES} bytes")
    try:
        loader = _StrictLoader(text)
        loader.name = name
        return loader.get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}, line {mark.line + 1}" if mark else name
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(where, found=f"invalid YAML ({problem})", expected="a mapping of recipe keys") from None
    except (RecursionError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(name, found=f"invalid YAML ({type(error).__name__})", expected="recipe keys") from None
