"""Circulant mixers and global filters: one linear map, several ways to compute it."""
