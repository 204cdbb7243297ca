"""Environments of other houses: their devices, servers and programs, driven by their own protocols and judged by their
own scores. Each module says what was never run against the real thing."""
