"""What the compile gates share: print a table of kernels, write it or compare it with the committed one, and fail."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"

Row = dict[str, Any]


@dataclass(frozen=True)
class Gate:
    """The table of one compiler's kernels.

    Attributes:
        script: what writes the table, as the messages say.
        results: NAME of benchmarks/results/NAME.json and .md; where there is none, rows are held to the limits alone.
        compiler: its key in the JSON; the value is its version.
        kind: the column that names a row; with "s" the key of the rows in the JSON.
        table: rows as Markdown.
        violations: what is wrong with a row, against the limits and against the committed row of the same name, if any.
    """

    script: str
    results: str
    compiler: str
    kind: str
    table: Callable[[list[Row]], str]
    violations: Callable[[Row, Row | None], list[str]]

    def run(self, rows: list[Row], version: str, *, check: bool, partial: bool = False) -> int:
        """Print the rows, and write them or, with `check`, compare them; 1 if anything is wrong, else 0.

        partial: these aren't all rows, so nothing is written, and rows that lack are not missed.
        """
        rows = sorted(rows, key=self._key)
        print(self.table(rows), end="")
        committed = RESULTS / f"{self.results}.json"
        before: dict[tuple[str, int], Row] = {}
        if check and committed.exists():
            before = {self._key(row): row for row in json.loads(committed.read_text())[f"{self.kind}s"]}
        if not check and not partial:
            committed.write_text(json.dumps({self.compiler: version, f"{self.kind}s": rows}, indent=1) + "\n")
            head = f"What {self.compiler} {version} makes of every kernel that is shipped (`python {self.script}`)."
            committed.with_suffix(".md").write_text(f"{head}\n\n{self.table(rows)}")
        bad = [
            f"{row[self.kind]} sm_{row['capability']}: {violation}"
            for row in rows
            for violation in self.violations(row, before.get(self._key(row)))
        ]
        if check and not partial and before and before.keys() != {self._key(row) for row in rows}:
            bad.append(f"{committed.name} is not of these kernels: run {self.script}")
        for line in bad:
            print(line, file=sys.stderr)
        return int(bool(bad))

    def _key(self, row: Row) -> tuple[str, int]:
        return row[self.kind], row["capability"]
