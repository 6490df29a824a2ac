"""`miniflux study`: schedules and solvers, measured and drawn."""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from miniflux.apps import arguments, console, study_count, study_diff, study_maps, study_path
from miniflux.apps.outputs import check_place, new_file


def add(commands: Any) -> None:
    """Add the command to the subparsers of the command line."""
    study = commands.add_parser("study", help="look at how it works")
    subjects = study.add_subparsers(dest="subject", metavar="SUBJECT", required=True)
    schedules = subjects.add_parser(
        "schedule", help="noise levels", description="Print a schedule, or draw several (needs miniflux[study])."
    )
    schedules.add_argument("names", nargs="*", metavar="NAME", help="default: uniform; with --plot all of them")
    schedules.add_argument("--steps", type=int, default=20, metavar="N", help="default %(default)s")
    schedules.add_argument(
        "--size", type=arguments.size, default=(1024, 1024), metavar="WxH", help="for the shift of FLUX.1 dev"
    )
    schedules.add_argument("--shift", type=float, metavar="X", help="a static shift instead; 1 for none")
    schedules.add_argument("--plot", type="path", metavar="FILE", help="draw them: .png, .svg or .pdf")
    schedules.set_defaults(run=_schedule)
    solvers = subjects.add_parser(
        "solvers",
        help="error against calls of the network",
        description="For every deterministic solver, the error of its latents against a reference of 1000 calls, and "
        "the order at which it falls.",
    )
    solvers.add_argument("--model", default="nano", metavar="NAME|PATH")
    solvers.add_argument("--prompts", type=int, default=4, metavar="N", help="how many; default %(default)s")
    solvers.add_argument(
        "--calls", type=arguments.numbers, default=[8, 16, 32, 64], metavar="N,N", help="default 8,16,32,64"
    )
    solvers.add_argument(
        "--plot", type="path", metavar="FILE", help="draw it: .png, .svg or .pdf (needs miniflux[study])"
    )
    solvers.set_defaults(run=_solvers)
    for command in (schedules, solvers):
        arguments.add_verbose(command)
        arguments.add_force(command)
    study_count.add(subjects)
    study_diff.add(subjects)
    study_maps.add(subjects)
    study_path.add(subjects)


def _schedule(options: argparse.Namespace) -> None:
    place = _figure(options)
    from miniflux.study import schedules

    width, height = options.size
    names = options.names or (list(schedules.SPACINGS) if options.plot else ["uniform"])
    made = schedules.schedules(names, options.steps, width, height, options.shift)
    if place is None:
        console.say("\n\n".join(str(schedule) for schedule in made))
        return
    with place as path:
        schedules.plot(made, path)
    console.say(f"{path}: {len(made)} schedules of {options.steps} steps")


def _solvers(options: argparse.Namespace) -> None:
    place = _figure(options)
    from miniflux.pipeline import load
    from miniflux.study import solvers

    solvers.check(options.calls, options.prompts)
    errors = solvers.measure(load(options.model), options.calls, options.prompts)
    console.say(solvers.table(errors))
    if place is not None:
        with place as path:
            solvers.plot(errors, path)
        console.say(str(path))


def _figure(options: argparse.Namespace) -> AbstractContextManager[Path] | None:
    """Where a figure goes, if one is wanted; refused before anything is computed, or torch imported."""
    if options.plot is None:
        return None
    from miniflux.study import plotting

    check_place(Path(options.plot), plotting.KINDS)
    plotting.check()
    return new_file(options.plot, options.force)
