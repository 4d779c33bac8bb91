"""Reading answers out of text: tags and boxes, numbers, formulas."""
