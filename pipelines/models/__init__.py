"""Models, adapters, tokenizers and saved states: opened, and checked when they are opened."""
