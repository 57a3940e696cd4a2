"""Re-exports the offline workloads for the scripts of this folder. `server.bench` defines them, since it ships without this
folder."""

from server.bench import WORKLOADS, Work, fixed, mixed

__all__ = ["WORKLOADS", "Work", "fixed", "mixed"]
