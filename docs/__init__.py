"""Pages of the documentation, and what writes the generated parts of them."""
