"""What a selector gets and gives back, and the selectors."""
