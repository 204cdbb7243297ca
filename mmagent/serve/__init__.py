"""Our generator behind an OpenAI-compatible API: ``python -m mmagent.serve CHECKPOINT``."""
