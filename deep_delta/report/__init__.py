"""Results of a comparison as a printed table, PNG charts and one self-contained HTML page.

Importing this package imports neither numpy nor matplotlib nor rich: each name is looked up in its
module on first use.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deep_delta.report.html import write_report as write_report
    from deep_delta.report.table import conclusions as conclusions
    from deep_delta.report.table import markdown_table as markdown_table
    from deep_delta.report.table import print_table as print_table
    from deep_delta.report.table import summary_rows as summary_rows

_MODULES = {
    "conclusions": "table",
    "markdown_table": "table",
    "print_table": "table",
    "summary_rows": "table",
    "write_report": "html",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
