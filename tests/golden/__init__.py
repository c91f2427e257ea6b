"""Numbers recorded from the authors' own code, replayed through this project's classes."""
