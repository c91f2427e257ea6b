"""The precision that a graph is deployed in: written into the graph, measured, and read back."""
