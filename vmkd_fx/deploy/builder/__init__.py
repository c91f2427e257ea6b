"""What stands around the two builders: their names, options, caches, complaints and known defects."""
