"""A low-rank factor between two diagonals, made and differentiated by one operation each."""
