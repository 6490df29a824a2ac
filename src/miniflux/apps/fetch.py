"""`miniflux fetch` and `miniflux variants`: which models there are, which are here, and how to get the others."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from miniflux.apps import console
from miniflux.errors import InputError

if TYPE_CHECKING:
    from miniflux.variants import Variant
    from miniflux.weights.hub import Fetch


def add(commands: Any) -> None:
    """Add the two commands to the subparsers of the command line."""
    fetch = commands.add_parser(
        "fetch",
        help="download an official model (needs miniflux[hub])",
        description="Download the files of an official model into the Hugging Face cache, check them, and go on where "
        "an earlier download was cut. Files that are here are left alone. A token for gated models is read from "
        "HF_TOKEN or from `hf auth login`.",
    )
    fetch.add_argument("name", metavar="NAME", help="as `miniflux variants` lists them")
    fetch.add_argument("--dry-run", action="store_true", help="say what it would take, and stop")
    fetch.add_argument("--accept-licence", action="store_true", help="accept the licence of a gated model, unasked")
    fetch.set_defaults(run=_fetch)

    variants = commands.add_parser(
        "variants",
        help="list the models, and which of them are here",
        description="List every model with its size and licence, and which of its parts are on this machine: in the "
        "package, in the folder named by MINIFLUX_WEIGHTS, or in the Hugging Face cache.",
    )
    variants.add_argument("--json", action="store_true", help="the same for programs, with the place of every part")
    variants.set_defaults(run=_variants)
    for command in (fetch, variants):
        command.add_argument("-v", "--verbose", action="store_true", help="say more about what is done")


def _fetch(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    from miniflux.variants import variant
    from miniflux.weights import hub

    plan = hub.plan(variant(options.name))
    console.say(_said(plan))
    if options.dry_run:
        return
    if plan.wanted and plan.variant.gated and not options.accept_licence:
        _ask(plan.variant)
    total = sum(file.size for file in plan.wanted)
    with tqdm(total=total, initial=plan.begun, unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
        folder = hub.fetch(plan, bar.update)
    console.say(f"{plan.variant.name}: complete, checksums as the Hub states them, in {folder}")


def _said(plan: Fetch) -> str:
    """What will be taken, and where it goes."""
    wanted = plan.wanted
    lines = [f"{plan.variant.name}: {plan.variant.repository} at {plan.commit[:12]}, {plan.variant.licence}"]
    lines += [f"  {file.size:>14,}  {file.path}{'' if file in wanted else '  (here)'}" for file in plan.files]
    lines += [f"  {'here':>14}  {part}: {path}" for part, path in plan.here.items()]
    begun = f" ({plan.begun:,} of them from an earlier run)" if plan.begun else ""
    lines.append(f"{len(wanted)} files, {plan.bytes:,} bytes to fetch{begun} into {plan.folder}")
    return "\n".join(lines)


def _ask(variant: Variant) -> None:
    """Ask for the licence.

    Raises:
        InputError: it is refused, or there is nobody to ask.
    """
    where = f"{variant.licence}, https://huggingface.co/{variant.repository}"
    if sys.stdin is None or not sys.stdin.isatty():  # pyright: ignore[reportUnnecessaryComparison]: closed
        raise InputError(f"{variant.name} is under the {where}: to accept it, run this again with --accept-licence")
    print(f"Do you accept the {where}? [y/N] ", end="", flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise InputError("the licence was not accepted: nothing was fetched")


def _variants(options: argparse.Namespace) -> None:
    from miniflux.variants import UNPUBLISHED, VARIANTS
    from miniflux.weights.finding import needed
    from miniflux.weights.hub import complete_parts

    rows: list[dict[str, Any]] = []
    for variant in VARIANTS.values():
        found = complete_parts(variant)
        size = {download.part: download.bytes for download in variant.downloads}
        rows.append(
            {
                "name": variant.name,
                "repository": variant.repository,
                "licence": variant.licence,
                "gated": variant.gated,
                "bundled": variant.bundled,
                "bytes": sum(size.values()),
                "here": {part: str(path) for part, path in found.items()},
                "missing": {part: size.get(part, 0) for part in needed(variant) if part not in found},
            }
        )
    console.say(json.dumps(rows, indent=1) if options.json else _table(rows, UNPUBLISHED))


def _table(rows: Sequence[dict[str, Any]], closed: Mapping[str, str]) -> str:
    width = max(len(name) for name in (*(row["name"] for row in rows), *closed))
    lines = [f"{'model':<{width}}      GB  here      licence"]
    for row in rows:
        missing = row["missing"]
        here = "bundled" if row["bundled"] else "no" if not row["here"] else "in part" if missing else "yes"
        size = f"{row['bytes'] / 1e9:.2f}" if row["bytes"] else "-"
        licence = row["licence"] + (" (gated)" if row["gated"] else "")
        lines.append(f"{row['name']:<{width}}  {size:>6}  {here:<8}  {licence}")
        if missing and row["here"]:
            lines.append(
                f"{'':<{width}}          missing   {', '.join(missing)} ({sum(missing.values()) / 1e9:.2f} GB)"
            )
    lines += [f"{name:<{width}}       -  never     weights not published: {called}" for name, called in closed.items()]
    get = [row["name"] for row in rows if row["missing"]]
    return "\n".join([*lines, *([f"to get one: miniflux fetch {get[0]}"] if get else [])])
