"""The interactive page: one HTML file that opens from disk and needs no network.

It uses SVG and plain JavaScript (``assets/``), without libraries. No text of a record becomes markup: the data are JSON
in which ``<`` is escaped, the script writes text nodes alone, and the page's policy allows only the script with the
hash that it names.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from string import Template
from typing import Any

import tomli_w

from tpme.bench.record import Cell, CellResult, DatasetFacts
from tpme.bench.side_files import load_samples
from tpme.bench.text import escaped_lines
from tpme.reports.data.answer import answer
from tpme.reports.data.load import Recorded, stretches, thin
from tpme.reports.data.others import notes_of_others
from tpme.reports.data.phase_colours import PHASE_COLOURS
from tpme.reports.data.qualities import RANKED_TASK
from tpme.reports.data.section import Section
from tpme.reports.data.tpme import COLUMNS, Weights, members
from tpme.reports.data.trials import Line, shorten_path
from tpme.reports.page_axes import Axes, learning
from tpme.reports.page_words import group_words, words
from tpme.reports.tables.fields import value_of
from tpme.reports.tables.serving_costs import inference
from tpme.reports.tables.table import Table

SCRIPTS = ("page", "page_table", "page_chart", "page_curves", "page_cell", "page_controls")
"""Parts of the script, in the order in which they run."""
SPREADS = ("epoch_time_s_sd", "memory_bytes_sd", "memory_seen_bytes", "peak_phase")
CURVE_POINTS = 160


def page(title: str, sections: Sequence[Section], weights: Weights) -> str:
    """The whole page as HTML. Machine paths in texts are cut to their last two parts."""
    assets = files("tpme.reports").joinpath("assets")
    style, frame, *parts = (
        assets.joinpath(name).read_text(encoding="utf-8")
        for name in ("page.css", "page.html", *(f"{part}.js" for part in SCRIPTS))
    )
    script = "\n".join(parts)
    data = {"weights": weights.values, "phases": PHASE_COLOURS, "groups": [_group(section) for section in sections]}
    text = json.dumps(_shown(data), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Template(frame).substitute(
        title=html.escape(title),
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
        **words(sections),
        data=text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"),
    )


def _shown(value: Any) -> Any:
    """``value`` with escapes for what is not seen in every text."""
    if isinstance(value, str):
        return escaped_lines(value)
    if isinstance(value, Mapping):
        return {_shown(key): _shown(entry) for key, entry in value.items()}
    return [_shown(entry) for entry in value] if isinstance(value, list | tuple) else value


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _group(section: Section) -> dict[str, Any]:
    frame, axes = section.frame, Axes(section)
    usable = members(section.summary)
    firsts = section.firsts()
    common = _common(_environment(first.result) for first in firsts.values())
    results = [recorded.result for recorded in section.records]
    said = group_words(section)
    return {
        "name": section.name,
        "answer": [shorten_path(text) for text in vars(answer(section)).values()],
        "reference": section.reference,
        "noise": vars(section.noise) | {"text": section.noise.text},
        "frame": None
        if frame is None
        else {name: [getattr(frame, name).min, getattr(frame, name).max] for name in COLUMNS},
        "frozen": section.frame_from,
        "axes": axes.as_json(),
        **said,
        "shared": [
            shorten_path(text)
            for text in (*notes_of_others(results), *section.notes.shared, section.instruments)
            if text
        ],
        "footnotes": [shorten_path(text) for text in section.notes.footnotes],
        "environment": common,
        "inference": _table(inference(section)),
        "rows": [
            {
                **_row(section, index, name, line, bool(usable[name])),
                "values": axes.values(name),
                "learning": learning(firsts[name].result, str(said["validated"])),
                "cell": _cell(firsts[name], common),
            }
            for index, (name, line) in enumerate(section.lines.items())
        ],
    }


def _row(section: Section, index: int, name: str, line: Line, usable: bool) -> dict[str, Any]:
    return {
        "index": index,
        "name": name,
        "status": line["status"],
        "compared": bool(line["compared"]),
        "baseline": bool(line["baseline"]),
        "usable": usable,
        **{key: value_of(line[key]) for key in (*SPREADS, "tpme_low", "tpme_high")},
        "tpme_end": bool(line["tpme_end"]),
        "source": line["memory_source"],
        "seeds": int(line["seeds_ok"]),
        "notes": section.notes.marks[name],
    }


def _table(table: Table) -> dict[str, Any] | None:
    """A table as people read it; None for one without rows. The first column heads its row."""
    if not table.rows:
        return None
    return {
        "columns": [table.columns[index].title for index in table.visible],
        "rows": [[row[index].text for index in table.visible] for row in table.rows],
        "best": [[row[index].best for index in table.visible] for row in table.rows],
        "notes": list(table.notes),
    }


# --- the cell behind a row -----------------------------------------------------------------------------------


def _cell(recorded: Recorded, common: Mapping[str, str]) -> dict[str, Any]:
    result, environment = recorded.result, _environment(recorded.result)
    failure = result.failure
    return {
        "id": result.cell_id,
        "seed": result.cell.seed,
        "attempt": result.attempt,
        "code": result.code_version[:12],
        "failure": shorten_path(f"during {failure.phase}: {failure.message}") if failure else None,
        "phases": _phases(result),
        "curve": _curve(recorded),
        "configuration": matrix_of(result.cell, result.dataset) if result.cell.task == RANKED_TASK else _facts(result),
        "environment": _differing(environment, common),
        "command": f"tpme run cell.toml --device {result.cell.device}" if result.cell.task == RANKED_TASK else None,
    }


def _facts(result: CellResult) -> str:
    """What a record of another task says of its run, as TOML; no command repeats it."""
    cell = result.cell
    facts: dict[str, Any] = {"task": cell.task, "data": cell.dataset, "method": cell.method}
    facts |= {"options": cell.options, "settings": cell.settings}
    if result.source is not None:
        facts["measured_by_others"] = result.source.model_dump(exclude={"definitions"})
    return tomli_w.dumps(_without_none({key: value for key, value in facts.items() if value}))


def _phases(result: CellResult) -> dict[str, list[tuple[float, float]]]:
    """Start and end of every phase by kind (seconds); successive phases of one kind are merged."""
    spans: dict[str, list[tuple[float, float]]] = {}
    for kind, start_s, end_s in stretches(result, lambda phase: phase.kind):
        spans.setdefault(kind, []).append((round(start_s, 4), round(end_s, 4)))
    return spans


def _curve(recorded: Recorded) -> list[tuple[float, int]]:
    samples = recorded.beside("samples")
    if samples is None:
        return []
    time_s, used = thin(load_samples(samples), CURVE_POINTS)
    return [(round(t, 2), int(float(f"{b:.4g}"))) for t, b in zip(time_s.tolist(), used.tolist(), strict=True)]


def _common(environments: Iterable[Mapping[str, str] | None]) -> dict[str, str]:
    """What is the same for every cell whose environment is known."""
    known = [values for values in environments if values is not None]
    first = known[0] if known else {}
    return {key: value for key, value in first.items() if all(other.get(key) == value for other in known)}


def _differing(environment: Mapping[str, str] | None, common: Mapping[str, str]) -> dict[str, str] | None:
    """What a cell does not share with all others; None where its environment is not known."""
    if environment is None:
        return None
    return {key: value for key, value in environment.items() if common.get(key) != value}


def _environment(result: CellResult) -> dict[str, str] | None:
    """None where the attempt ended before it was known."""
    environment = result.environment
    if environment is None:
        return None
    here = result.source is None  # what others do not say is no fact of their machine
    values = {
        "device": environment.device_name,
        "driver": environment.driver,
        "threads": environment.cpu_threads if here else None,
        "platform": environment.platform,
        "python": environment.python if here else None,
        **dict(sorted(environment.packages.items())),
        "allocator": environment.allocator if here else None,
        "git": environment.git_revision,
        "started": result.started_at,
    }
    return {key: shorten_path(str(value)) for key, value in values.items() if value is not None}


def matrix_of(cell: Cell, facts: DatasetFacts | None = None) -> str:
    """A matrix (TOML) of this cell alone, whose first lines say what is to be filled in.

    A record holds no folder: neither that of its data nor, in a page, that of an encoder on the disk. ``facts`` hold
    the settings of the built-in catalogue.
    """
    data: dict[str, Any] = {"name": cell.dataset}
    if facts is None or facts.synthetic is None:
        data["path"] = "FOLDER"
    else:
        data |= {"synthetic": facts.synthetic, "image_size": facts.image_size}
    head = [f"data: {json.dumps(cell.dataset, ensure_ascii=False)}, fingerprint {cell.dataset_fingerprint[:12]}"]
    if "path" in data:
        head.append("fill in: path, the folder of that data, prepared; or in its place the synthetic settings it had")
    encoders = {"text": cell.text_encoder, "image": cell.image_encoder}
    pair = {
        kind: {**spec.model_dump(exclude_none=True), "source": shorten_path(spec.source)}
        for kind, spec in encoders.items()
        if spec is not None
    }
    if any(shorten_path(spec.source) != spec.source for spec in encoders.values() if spec is not None):
        head.append("fill in: source, the folder or file of an encoder; only the end of its path is shown here")
    method = {"name": cell.method, "options": cell.options, "cached": cell.cached}
    lines = {
        "name": "cell",
        "protocol": cell.protocol,
        "seeds": [cell.seed],
        "modalities": list(cell.modalities),
        "datasets": [data],
        "encoders": [pair],
        "methods": [{key: value for key, value in method.items() if value not in ({}, False)}],
        "training": cell.training.model_dump(mode="json", exclude_none=True),
        "lr": cell.lr.model_dump(),
    }
    return "".join(f"# {line}\n" for line in head) + tomli_w.dumps(_without_none(lines))


def _without_none(value: Any) -> Any:
    """``value`` without what TOML cannot hold."""
    if isinstance(value, Mapping):
        return {key: _without_none(entry) for key, entry in value.items() if entry is not None}
    return [_without_none(entry) for entry in value] if isinstance(value, list | tuple) else value
