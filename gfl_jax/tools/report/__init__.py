"""What a detector gets wrong, and what that costs, as one page for a browser."""
