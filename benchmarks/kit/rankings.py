"""From a ranking that was measured here to the one that is committed.

``hunyuan-fast bench attention --tune`` measures for its user. With a result of the same device
beside it, which has its op's tests behind it, what was measured may decide for everybody with that
architecture: it goes to ``kernels/<op>/ranking.json``, and who agreed in every call and was not
slower than the reference gets the architecture into ``VERIFIED_ON``.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from math import exp, log
from pathlib import Path

from benchmarks.kit.record import Result
from hunyuan_fast import dispatch, ranking
from hunyuan_fast.ranking import Section

_REFERENCE = "reference"
_VERIFIED_ON = re.compile(r"^(VERIFIED_ON(?:: frozenset\[str\])?) = frozenset\((.*)\)$", re.M)


class NotCommitted(Exception):
    """A ranking cannot be committed; the message says why and what to do."""


def commit(sections: Sequence[Section], results: Sequence[Result]) -> list[str]:
    """Write the rankings of this machine's software into the rooms; returns what was done.

    sections: of the user's file.  results: the results at hand, of which one must be evidence.
    Raises NotCommitted.
    """
    fit = [each for each in sections if each.software == ranking.software(each.op)]
    if not fit:
        raise NotCommitted(
            "no ranking was measured with the software at hand: run "
            "hunyuan-fast bench attention --tune --backward"
        )
    done = []
    for section in fit:
        _need_evidence(section, results)
        path = ranking.committed_file(section.op)
        ranking.save(_without_absent(ranking.merged(section, ranking.load(path))), path)
        done.append(f"{section.op} on {section.arch}: wrote {path.name}")
        loaded = dispatch.choices(section.op)
        for name in proven(section):
            source = loaded[name].__file__ if name in loaded else None
            if source and verify(Path(source), section.arch):
                done.append(f"{section.op} on {section.arch}: {name} is verified")
    return done


def proven(section: Section) -> list[str]:
    """Who agreed in every call that it took, and was not slower than the reference in all."""
    wrong = {n for entry in section.entries for n, error in entry.error.items() if error > 1}
    names = dict.fromkeys(name for entry in section.entries for name in entry.ms)
    found = []
    for name in names:
        against = [
            log(entry.ms[_REFERENCE] / entry.ms[name])
            for entry in section.entries
            if name in entry.ms and _REFERENCE in entry.ms
        ]
        if name not in wrong and against and exp(sum(against) / len(against)) >= 1:
            found.append(name)
    return found


def verify(path: Path, arch: str) -> bool:
    """Add an architecture to the ``VERIFIED_ON`` of a module; whether that changed anything."""
    text = path.read_text()
    found = _VERIFIED_ON.search(text)
    if found is None:  # it follows from that of others
        return False
    known = set(re.findall(r'"([^"]+)"', found[2]))
    if known & {arch, "*"}:
        return False
    names = ", ".join(f'"{each}"' for each in sorted({*known, arch}))
    line = f"{found[1].split(':')[0]} = frozenset({{{names}}})"
    path.write_text(text[: found.start()] + line + text[found.end() :])
    return True


def _need_evidence(section: Section, results: Sequence[Result]) -> None:
    for result in results:
        machine = result.machine
        same = (result.op, machine.arch) == (section.op, section.arch)
        passed = result.tests == "passed" and not result.quick
        if same and passed and section.device.split(",")[0] == machine.device:
            return
    raise NotCommitted(
        f"no result of {section.op} on {section.device} has its tests behind it: run "
        f"python -m benchmarks {section.op}"
    )


def _without_absent(sections: Sequence[Section]) -> list[Section]:
    """Without what is of interest to nobody else: why somebody is not there."""
    return [
        replace(
            section,
            entries=[
                replace(
                    entry,
                    declined={n: r for n, r in entry.declined.items() if n in entry.error},
                )
                for entry in section.entries
            ],
        )
        for section in sections
    ]
