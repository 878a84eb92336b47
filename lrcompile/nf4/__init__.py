"""Linear maps whose weight is NF4: the class they are swapped for, and which ones may be."""
