"""The documentation as a page that needs no script and no network."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;width:100%}td,th{border:1px solid #8884;padding:.3rem .5rem;text-align:left;
vertical-align:top}code{font-size:.9em}summary{cursor:pointer}:root{color-scheme:light dark}"""


def page(document: Mapping[str, Any]) -> str:
    """An OpenAPI document in HTML: every operation with its parameters, its body and its answers."""
    parts = [f"<h1>{escape(document['info']['title'])} {escape(document['info']['version'])}</h1>"]
    parts += [f"<p>{escape(paragraph)}</p>" for paragraph in document["info"]["description"].split("\n\n")]
    parts.append('<p>The same for programs: <a href="openapi.json">openapi.json</a>.</p>')
    for path, operations in document["paths"].items():
        for method, about in operations.items():
            parts.append(f"<h2><code>{method.upper()} {escape(path)}</code></h2>")
            parts.append(f"<p>{escape(about.get('description', ''))}</p>")
            parts += _inputs(document, about)
            parts += _answers(about)
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>miniflux</title><style>{STYLE}</style>'
    return head + "".join(parts) + "</html>"


def _inputs(document: Mapping[str, Any], about: Mapping[str, Any]) -> Iterator[str]:
    rows = [
        (one["name"], one["in"], one.get("schema", {}), one.get("required", False))
        for one in about.get("parameters", [])
    ]
    for kind, body in about.get("requestBody", {}).get("content", {}).items():
        schema = _resolved(document, body["schema"])
        required = schema.get("required", [])
        rows += [(name, kind, field, name in required) for name, field in schema.get("properties", {}).items()]
    if rows:
        yield "<table><tr><th>name<th>where<th>what</tr>"
        for name, where, field, required in rows:
            what = escape(field.get("description", "")) + (" <b>required</b>" if required else "")
            yield f"<tr><td><code>{escape(name)}</code><td>{escape(where)}<td>{_kind(field)} {what}</tr>"
        yield "</table>"


def _answers(about: Mapping[str, Any]) -> Iterator[str]:
    yield "<details><summary>answers</summary><table>"
    for code, answer in about.get("responses", {}).items():
        yield f"<tr><td>{escape(str(code))}<td>{escape(answer.get('description', ''))}</tr>"
    yield "</table></details>"


def _kind(field: Mapping[str, Any]) -> str:
    """What values a field takes, in the words of JSON Schema."""
    kinds = [kind for kind in field.get("anyOf", [field]) if kind.get("type") != "null"]
    shown = {
        name: kind[name]
        for kind in kinds
        for name in ("type", "enum", "minimum", "maximum", "maxLength", "$ref")
        if name in kind
    }
    shown |= {"default": field["default"]} if field.get("default") is not None else {}
    return "; ".join(f"{escape(name)} <code>{escape(_text(value))}</code>" for name, value in shown.items())


def _text(value: Any) -> str:
    return value.removeprefix("#/components/schemas/") if isinstance(value, str) else json.dumps(value)


def _resolved(document: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    if "$ref" not in schema:
        return schema
    return document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
