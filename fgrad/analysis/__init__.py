"""What a training step costs, and what its loss looks like."""

from fgrad.analysis.budget import DeviceBudget, device_budget
from fgrad.analysis.memory import Memory, MemoryReport, memory_report

__all__ = [
    "DeviceBudget",
    "Memory",
    "MemoryReport",
    "device_budget",
    "memory_report",
]
