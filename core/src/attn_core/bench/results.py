"""The result file of a benchmark: device, date, versions, rows."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from attn_core.errors import UsageError

SCHEMA: Final = "attn/benchmark"


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement. ``impl`` is ``attn:NAME`` through one of our backends, a library's own name for a direct call.

    ms: of one layer's call. gbs: cache bytes over time. tflops: of the two products. err: ||out - ref|| / ||ref||
    against the reference on the same inputs, None if it was not compared.
    """

    bench: str
    shape: str
    impl: str
    ms: float
    gbs: float | None = None
    tflops: float | None = None
    err: float | None = None
    note: str | None = None


@dataclass(frozen=True, slots=True)
class Results:
    """What one run on one device measured; times of different runs are not comparable."""

    device: str
    versions: Mapping[str, str]
    rows: tuple[Row, ...]
    date: str = field(default_factory=lambda: datetime.datetime.now(datetime.UTC).date().isoformat())

    def write(self, path: Path) -> Path:
        """Write the JSON file, making its folder. Returns the path."""
        path.parent.mkdir(parents=True, exist_ok=True)
        head = {
            "schema": SCHEMA,
            "version": 1,
            "device": self.device,
            "date": self.date,
            "versions": dict(self.versions),
        }
        body = ",\n".join("  " + json.dumps(asdict(row)) for row in self.rows)
        text = json.dumps(head, indent=1)[:-2] + ',\n "rows": [\n' + body + "\n ]\n}\n"
        path.write_text(text)
        return path

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read such a file. Raises UsageError for another one."""
        data: dict[str, Any] = json.loads(path.read_text())
        if data.get("schema") != SCHEMA:
            raise UsageError(f"{path} is {data.get('schema')!r}", accepted=SCHEMA)
        rows = tuple(Row(**row) for row in data["rows"])
        return cls(data["device"], data["versions"], rows, data["date"])


def device_slug(device: str) -> str:
    """A device's name as a folder: 'NVIDIA H100 80GB HBM3' is 'nvidia-h100-80gb-hbm3'."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def table(rows: Iterable[Row]) -> str:
    """Rows as aligned text: shapes down, implementations across, milliseconds with GB/s or TFLOP/s."""
    rows = list(rows)
    shapes = list(dict.fromkeys(row.shape for row in rows))
    impls = list(dict.fromkeys(row.impl for row in rows))
    cell = {(row.shape, row.impl): row for row in rows}
    lines = [["shape", *impls]]
    for shape in shapes:
        lines.append([shape, *(_cell(cell.get((shape, impl))) for impl in impls)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(impls) + 1)]
    return "\n".join("  ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    if row.bench in ("decode", "mixed") and row.gbs is not None:
        rate = f" ({row.gbs:.0f} GB/s)"
    else:
        rate = f" ({row.tflops:.1f} TF/s)" if row.tflops is not None else ""
    return f"{row.ms:.4f}{rate}"
