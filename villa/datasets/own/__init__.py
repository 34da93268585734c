"""Users' own images, texts and answers."""
