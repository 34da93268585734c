"""Texts whose words are linked to boxes of their images, and relations between boxes, to probe attention with."""
