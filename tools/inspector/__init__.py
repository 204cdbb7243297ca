"""The pages of tools/inspect.py: samples to browse, tokens, and packs."""
