"""Seeded generators with exact truth: pages, MiniWoB++ screens, pictures, and questions about what they draw."""
