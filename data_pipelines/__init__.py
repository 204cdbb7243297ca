"""From raw material and worlds to micro-batches.

Making: `build` (command line) drives the makers (`screens`, `web_pages`, `pictures`, `texts`) through `making` into
`shards`. Training reads them back: `shards` -> `documents` (drafts) -> `mixture` -> `packing` -> `stream`. Stages 1 and
2 have streams of their own: `galleries`, `masking`, `vision`.
"""
