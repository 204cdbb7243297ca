"""Seeded generators of scenes with exact truth: pages, MiniWoB++ screens, pictures, and questions about them."""
