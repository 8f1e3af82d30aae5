"""The published results of the conformance kit: `python docs/results.py`, where bitsandbytes and torchao are installed.

Writes a JSON of each backend and one page of all into docs/content/conformance, and prints the table of conformance.md.
"""

from pathlib import Path

import torch

from bnbref.conformance import backends, board, findings, judge, report, vectors
from bnbref.conformance.board import page

FOLDER = Path(__file__).parent / "content" / "conformance"
BACKENDS = ("bitsandbytes", "bitsandbytes-default", "torchao", "bnbref-eager", "bnbref")


def main() -> None:
    """Runs every case on every backend."""
    cases, device = vectors.read_all(), torch.device("cpu")
    reports = []
    for name in BACKENDS:
        backend = backends.load(name)
        reports.append(report.report(backend, device, judge.run(backend, cases, device)))
        (FOLDER / f"{name}.json").write_text(report.as_json(reports[-1]), encoding="utf-8")
    columns = [board.of_run(done, FOLDER / f"{done.backend}.json") for done in reports]
    (FOLDER / "report.html").write_text(page.as_page(columns), encoding="utf-8")
    print(report.as_markdown(reports))
    for done in reports:
        print(done.backend, *findings.broken_by(done.findings), sep="\n  ")


if __name__ == "__main__":
    main()
