"""One report in a few lines of JSON, for a machine to read, and as a badge."""

import json
from typing import Any

from bnbref.conformance import archive
from bnbref.conformance.board import STATES, Column


def as_summary(column: Column) -> str:
    """The summary as JSON: the backend and its versions, the digests of the vectors, and the rules by their state."""
    rules = {state: [rule for rule, cell in column.cells.items() if cell.state == state] for state in STATES}
    body = {
        "backend": column.backend,
        "device": column.device,
        "versions": dict(column.versions),
        "vectors": {f"v{version}": digest for version, digest in archive.DIGESTS.items()},
        "rules": rules,
        "badge": badge(column),
    }
    return json.dumps(body, indent=1) + "\n"


def as_badge(column: Column) -> str:
    """A file that shields.io reads by its "endpoint" badge: https://shields.io/badges/endpoint-badge."""
    return json.dumps(badge(column)) + "\n"


def badge(column: Column) -> dict[str, Any]:
    """Green where nothing failed, yellow where only dialects did, red where there is a defect, grey where nothing ran."""
    passed, dialects, defects = (column.count(state) for state in ("passed", "dialect", "defect"))
    words = [f"{passed} {'rule' if passed == 1 else 'rules'} kept"]
    words += [f"{dialects} dialect{'s' * (dialects > 1)}"] if dialects else []
    words += [f"{defects} defect{'s' * (defects > 1)}"] if defects else []
    color = "red" if defects else "yellow" if dialects else "brightgreen" if passed else "lightgrey"
    return {"schemaVersion": 1, "label": "bnbref", "message": ", ".join(words), "color": color}
