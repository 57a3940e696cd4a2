"""The offline workloads, for the scripts here. They live with `tidegate bench`, which ships without this folder."""

from server.bench import WORKLOADS, Work, fixed, mixed

__all__ = ["WORKLOADS", "Work", "fixed", "mixed"]
