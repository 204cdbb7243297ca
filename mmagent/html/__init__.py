"""Pages that need nothing but themselves: `pieces` of a page, and `charts` as SVG; for reports, cards and tools."""
