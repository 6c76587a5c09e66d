"""What a training step costs, and what its loss looks like."""

from fgrad.analysis.memory import Memory, MemoryReport, memory_report

__all__ = ["Memory", "MemoryReport", "memory_report"]
