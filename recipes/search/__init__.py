"""Trees of responses: advantages and preferences of steps, values of steps, search with them."""
