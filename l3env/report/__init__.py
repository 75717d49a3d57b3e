"""What people and programs read of a comparison: terminal table, JSON, CSV files, pictures, confidence intervals."""

from l3env.report.bootstrap import intervals
from l3env.report.folder import to_json, write_results
from l3env.report.names import CONTRACT_COLUMNS
from l3env.report.table import terminal_table

__all__ = ["CONTRACT_COLUMNS", "intervals", "terminal_table", "to_json", "write_results"]
