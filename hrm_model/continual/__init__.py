"""The character-level model that grows while it learns one text after another."""
