"""Results of a comparison as printed tables, PNG charts and one self-contained HTML page.

Importing this package imports neither numpy nor matplotlib nor rich: each name is looked up in its
module on first use.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deep_delta.report.comparison import markdown_table as markdown_table
    from deep_delta.report.comparison import print_table as print_table
    from deep_delta.report.comparison import tables as tables
    from deep_delta.report.html import write_report as write_report
    from deep_delta.report.sentences import conclusions as conclusions

_MODULES = {
    "conclusions": "sentences",
    "markdown_table": "comparison",
    "print_table": "comparison",
    "tables": "comparison",
    "write_report": "html",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
